"""VQ-HBR, HeartLang's tokenizer of heartbeats: an autoencoder of beat tokens through a codebook on the unit sphere.

A sentence of tokens (96 samples of one beat in one lead each) goes through a Transformer and a small head to a unit
vector per token; the nearest code stands for it, and a second Transformer draws the beat from the code. Codes are
learned by their moving average, the rest by gradient. Pure functions of nested dictionaries. What it does not do: find
beats, cut tokens (`beats`), or train (`objectives/codebook`).

Which tokens count in the losses, the moving average and k-means is said by the caller (`counted`). Deviations from
the published model, all switched off by `faithful`:

  - padding is neither attended to nor convolved with, so the code of a beat does not depend on the number of slots;
    the sentence's ends do not touch
  - only counted tokens count (published: every slot, padding included)
  - a vector without length has no direction and no gradient (published: up to 1e12 times the incoming gradient)
  - usage is each code's share of the counted tokens (published: their number)
  - position, lead and time vectors start small (TABLE_STD)

Sources: see `sentence` and `quantiser`.

Shapes: B records, S slots, W samples of a token, D width, d features of a code, N codes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.errors import UsageError
from ecg_jax.models import layers, quantiser, sentence
from ecg_jax.models.layers import Parameter
from ecg_jax.models.sentence import SentenceConfig

HEAD_STD = 0.02  # of the heads' weights at the start, as published
# Of cls and of the position, lead and time vectors at the start. Convolved tokens in mV have about 0.16, and under
# vectors of 1 codes first stand for places: after 160 updates (width 96, 512 codes, 768 real records) reconstruction on
# other records was 0.0154 from 0.05, and 0.0255 after 80 from 1 (0.0166 from 0.05), of a token power of 0.040.
TABLE_STD, PUBLISHED_TABLE_STD = 0.05, 1.0
# Rare codes that one update can put anew. Refresh is worth it, since the encoder soon leaves where k-means saw its
# tokens: of 512 codes 96 other records used, after 160 updates as above, 101 without refresh, 74 at 0.03, 398 at 0.2.
SEEDS = 256
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and upkeep of a codebook; the defaults are the published ones."""

    width: int = 768
    encoder_layers: int = 4
    decoder_layers: int = 2
    heads: int = 2
    head_size: int = 64
    mlp: int = 2048
    codes: int = 8192
    code_dim: int = 128
    slots: int = 256  # tokens of a record, at most
    window: int = 96  # samples of a token
    decay: float = 0.99  # of the moving average
    beta: float = 1.0  # weight of the commitment loss
    faithful: bool = False  # as published, see above
    refresh: float = 0.0  # codes used less than this share of an even use are put on a token of the batch (0: never)

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (int, "int")}
        for name, value in sizes.items():
            if value < 1:
                raise UsageError(f"codebook: {name} = {value} must be positive")
        if not 0 < self.decay < 1 or not 0 <= self.refresh < 1:
            raise UsageError(f"codebook: decay = {self.decay} must be in (0, 1), refresh = {self.refresh} in [0, 1)")

    @property
    def encoder(self) -> SentenceConfig:
        return self._backbone(self.window, self.encoder_layers)

    @property
    def decoder(self) -> SentenceConfig:
        return self._backbone(self.code_dim, self.decoder_layers)

    def _backbone(self, inputs: int, depth: int) -> SentenceConfig:
        sizes = (self.width, depth, self.heads, self.head_size, self.mlp, self.slots)
        table_std = PUBLISHED_TABLE_STD if self.faithful else TABLE_STD
        return SentenceConfig(inputs, *sizes, bounded=not self.faithful, table_std=table_std)


class Sentences(NamedTuple):
    """Tokens of records: float [B, S, W]; lead and time index, int [B, S], or None (see `encode`); bool [B, S] which
    slots hold a beat, and which of those count.
    """

    tokens: jax.Array
    lead: jax.Array | None
    time: jax.Array | None
    there: jax.Array
    counted: jax.Array


def parameters(config: Config) -> dict[str, dict[str, Parameter]]:
    """Every learned parameter, in groups: "encoder", "decoder", "encode_head", "decode_head"."""

    def head(outputs: int) -> dict[str, Parameter]:
        d = config.width
        return {
            "hidden_kernel": Parameter((d, d), "normal", HEAD_STD),
            "hidden_bias": Parameter((d,), "zeros"),
            "out_kernel": Parameter((d, outputs), "normal", HEAD_STD),
            "out_bias": Parameter((outputs,), "zeros"),
        }

    return {
        "encoder": sentence.parameters(config.encoder),
        "decoder": sentence.parameters(config.decoder),
        "encode_head": head(config.code_dim),
        "decode_head": head(config.window),
    }


def init(config: Config, key: jax.Array) -> Params:
    """Starting parameters, float32: those of `parameters`, a `codebook` [N, d] of random unit vectors, `usage` [N] 0.

    `started` puts the codebook where the tokens are.
    """
    key, codebook_key = jax.random.split(key)
    codebook = quantiser.normalise(jax.random.normal(codebook_key, (config.codes, config.code_dim)))
    usage = jnp.zeros(config.codes, jnp.float32)
    return layers.start(parameters(config), key) | {"codebook": codebook, "usage": usage}


def started(config: Config, params: Params, z_BxSxd: jax.Array, counted_BxS: jax.Array, key: jax.Array) -> Params:
    """Params with the codebook at the k-means of encoded tokens (`encode`), and its usage theirs."""
    weight_BxS = weights(config, counted_BxS)
    rows_Nxd = quantiser.draw(key, z_BxSxd, weight_BxS, config.codes)
    rows_Nxd = jnp.where(jnp.any(rows_Nxd != 0, axis=1, keepdims=True), rows_Nxd, params["codebook"])
    codebook, count_N = quantiser.kmeans(z_BxSxd, weight_BxS, rows_Nxd, faithful=config.faithful)
    # Published: usage starts at 0; a share that did would make every code look dead that the first batch has not.
    usage = jnp.zeros_like(count_N) if config.faithful else count_N / jnp.maximum(count_N.sum(), 1)
    return params | {"codebook": codebook, "usage": usage}


def encode(
    config: Config,
    params: Params,
    tokens_BxSxW: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Unit vectors of tokens, float32 [B, S, d].

    Args:
        tokens: float, in the unit that the codebook was trained in, zero around the beat and in padding.
        lead, time: int, 0-11 and seconds from 0 (R peak in samples // 100), or None for none: so HeartLang's released
            masked pre-training computes its labels, though its codebook was trained with them.
        there: bool, slots that hold a beat, the first ones of each record.
        dtype: of the backbone's products; the head is float32.
    """
    hidden = _backbone(config.encoder, params["encoder"], tokens_BxSxW, lead_BxS, time_BxS, there_BxS, dtype)
    return quantiser.normalise(_head(params["encode_head"], hidden), config.faithful)


def assign(config: Config, params: Params, z_BxSxd: jax.Array) -> jax.Array:
    """The code of each encoded token, int32 [B, S]; of padding too, where it means nothing."""
    return quantiser.nearest(z_BxSxd, params["codebook"])


def decode(
    config: Config,
    params: Params,
    quantised_BxSxd: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Tokens drawn from codes, float32 [B, S, W]; arguments as in `encode`."""
    hidden = _backbone(config.decoder, params["decoder"], quantised_BxSxd, lead_BxS, time_BxS, there_BxS, dtype)
    return _head(params["decode_head"], hidden)


def losses(
    config: Config, params: Params, seen: Sentences, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """Of each token: "reconstruction" and "commitment" [B, S] (mean squares over samples and features), its vector "z"
    and its "codes". Gradients go to all parameters but the codebook; through the choice of a code they go straight.
    """
    tokens_BxSxW, lead_BxS, time_BxS, there_BxS, _ = seen
    z = encode(config, params, tokens_BxSxW, lead_BxS, time_BxS, there_BxS, dtype)
    codebook = lax.stop_gradient(params["codebook"])
    codes = quantiser.nearest(lax.stop_gradient(z), codebook)
    chosen = codebook[codes]
    drawn = decode(config, params, z + lax.stop_gradient(chosen - z), lead_BxS, time_BxS, there_BxS, dtype)
    return {
        "reconstruction": jnp.mean((drawn - tokens_BxSxW) ** 2, axis=-1),
        "commitment": jnp.mean((z - chosen) ** 2, axis=-1),
        "z": z,
        "codes": codes,
    }


def loss(
    config: Config,
    params: Params,
    seen: Sentences,
    keys_B: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(mean over counted tokens of reconstruction + beta x commitment, aux).

    aux: scalars `known` (counted tokens), `reconstruction`, `commitment`; and for `absorb` `count` [N] and `total`
    [N, d], sums over the batch, and `seeds` where there is a refresh, drawn with `keys` [B], one per record.
    """
    each = losses(config, params, seen, dtype)
    weight_BxS = weights(config, seen.counted)
    known = weight_BxS.sum()
    means = {k: (each[k] * weight_BxS).sum() / jnp.maximum(known, 1) for k in ("reconstruction", "commitment")}
    z = lax.stop_gradient(each["z"])
    count, total = quantiser.tally(z, each["codes"], weight_BxS, config.codes)
    aux = means | {"known": known, "count": count, "total": total}
    if config.refresh:
        if keys_B is None:
            raise UsageError("codebook: refresh draws tokens of the batch and needs its keys")
        aux["seeds"] = quantiser.seeds(keys_B, z, weight_BxS, min(SEEDS, config.codes, z.shape[0] * z.shape[1]))
    return means["reconstruction"] + config.beta * means["commitment"], aux


def absorb(config: Config, params: Params, aux: dict[str, jax.Array]) -> tuple[Params, dict[str, jax.Array]]:
    """(params after the codebook's moving average and refresh, aux without the arrays for it).

    Adds to aux, from the usage after the update, `perplexity` (codes in even use that would have its entropy) and
    `dead` (share of the codes used less than a hundredth of an even use).

    `count` and `total` may be sums over the batch or, alike, means of such sums over micro-batches: the codebook needs
    their ratio only, and usage is a share. (`faithful` counts tokens, of a micro-batch then.) `seeds` averaged over
    micro-batches are directions between tokens, one of each; refresh works best without accumulation.
    """
    aux = dict(aux)
    count, total, candidates = aux.pop("count"), aux.pop("total"), aux.pop("seeds", None)
    codebook = quantiser.moved(params["codebook"], count, total, config.decay, config.faithful)
    use = count if config.faithful else count / jnp.maximum(count.sum(), jnp.finfo(jnp.float32).tiny)
    usage = config.decay * params["usage"] + (1 - config.decay) * use
    aux["perplexity"], aux["dead"] = quantiser.perplexity(usage), quantiser.dead(usage)
    if candidates is not None:
        codebook, usage = quantiser.refreshed(codebook, usage, candidates, config.refresh)
    return params | {"codebook": codebook, "usage": usage}, aux


def weights(config: Config, counted_BxS: jax.Array) -> jax.Array:
    """Weight of each slot, float32 [B, S]: 1 where it counts, everywhere if `faithful`."""
    return jnp.ones(counted_BxS.shape) if config.faithful else counted_BxS.astype(jnp.float32)


def encode_macs(config: Config, slots: int) -> int:
    """Multiply-adds from the tokens of one record to their codes, products of matrices only, as `flops` counts."""
    head = config.width * (config.width + config.code_dim) + config.code_dim * config.codes
    return sentence.macs(config.encoder, slots) + slots * head


def training_macs(config: Config, slots: int) -> int:
    """Multiply-adds of a training step per record: forward, and twice that for the gradients of what has one."""
    search = slots * config.code_dim * config.codes
    drawn = sentence.macs(config.decoder, slots) + slots * config.width * (config.width + config.window)
    return 3 * (encode_macs(config, slots) - search + drawn) + search


def _backbone(
    config: SentenceConfig,
    p: Params,
    tokens_BxSxC: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Tokens without cls; 0 where the input is exactly 0, as published: padding, and leads that are dead."""
    if config.bounded:
        tokens_BxSxC = jnp.where(there_BxS[:, :, None], tokens_BxSxC, 0)
    hidden = sentence.forward(config, p, tokens_BxSxC, there_BxS, lead_BxS, time_BxS, dtype=dtype)[:, 1:]
    return jnp.where(jnp.any(tokens_BxSxC != 0, axis=-1, keepdims=True), hidden, 0)


def _head(p: Params, x_BxSxD: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        hidden = jnp.tanh(sentence.linear(x_BxSxD, p["hidden_kernel"], p["hidden_bias"]))
        return sentence.linear(hidden, p["out_kernel"], p["out_bias"])
