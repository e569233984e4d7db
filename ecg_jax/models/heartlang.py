"""HeartLang's networks as published: the masked model, the classifier, and the files of all three.

The masked model predicts the codes of masked tokens from the others; the classifier reads cls. Both are the backbone of
`sentence`, as published. `load` reads checkpoints of the public training code (VQ-HBR included, see `vqhbr`) through
`torch_file`: nothing in them is executed, and whatever is not exactly such a network is refused. What it does not do:
train (our own objective is `masked_codes`). Invariant: `state` and `from_state` are inverse to each other.

Source: github.com/PKUDigitalHealth/HeartLang (MIT licence), see `sentence`.

Shapes: B records, S slots, W samples of a token, D width, K masked slots, V codes, L classes.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.models import layers, sentence, torch_file, vqhbr
from ecg_jax.models.layers import Parameter, matrix
from ecg_jax.models.sentence import SentenceConfig
from ecg_jax.models.torch_file import short

FILE_BYTES = 1 << 31
HEAD_SIZE = 64  # of the published networks; no shape tells it
UNUSED_CODES = 1024  # of a head that the published classifier has and never uses
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    """The masked model, 44,562,176 parameters as published."""

    width: int = 768
    layers: int = 12
    heads: int = 8
    head_size: int = 64
    mlp: int = 1024
    codes: int = 8192
    slots: int = 256
    window: int = 96
    dropout: float = 0.1

    @property
    def backbone(self) -> SentenceConfig:
        sizes = (self.window, self.width, self.layers, self.heads, self.head_size, self.mlp, self.slots)
        return SentenceConfig(*sizes, bounded=False, dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The same backbone under a linear head on cls; 39,053,829 parameters with 5 classes, the unused ones included."""

    classes: int
    masked: MaskedConfig = dataclasses.field(default_factory=lambda: MaskedConfig(codes=UNUSED_CODES))


Config = vqhbr.Config | MaskedConfig | ClassifierConfig


def parameters(config: MaskedConfig | ClassifierConfig) -> dict[str, dict[str, Parameter]]:
    """Every parameter in groups: "backbone" and "head" of the masked model; the classifier adds "classifier"."""

    def linear(outputs: int) -> dict[str, Parameter]:
        width = masked.width
        return {"kernel": matrix((width, outputs), width, 1 / 3), "bias": Parameter((outputs,), "zeros")}

    masked = config.masked if isinstance(config, ClassifierConfig) else config
    groups = {"backbone": sentence.parameters(masked.backbone), "head": linear(masked.codes)}
    return groups | {"classifier": linear(config.classes)} if isinstance(config, ClassifierConfig) else groups


def init(config: MaskedConfig | ClassifierConfig, key: jax.Array) -> Params:
    """Starting parameters, float32, with the published variances."""
    return layers.start(parameters(config), key)


def hidden(
    config: MaskedConfig,
    params: Params,
    tokens_BxSxW: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    *,
    masked_BxS: jax.Array | None = None,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """Features float32 [B, S + 1, D], cls first; arguments as in `vqhbr.encode` and `sentence.forward`."""
    more = {"masked_BxS": masked_BxS, "keys_B": keys_B}
    return sentence.forward(config.backbone, params["backbone"], tokens_BxSxW, there_BxS, lead_BxS, time_BxS, **more)


def masked_logits(
    config: MaskedConfig,
    params: Params,
    tokens_BxSxW: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    places_BxK: jax.Array,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """Logits of the codes of masked slots, float32 [B, K, V]; only these are projected.

    places: int, the masked slots of each record, as many in all (published: 128 of 256 by chance, padding included).
    """
    batch, slots, _ = tokens_BxSxW.shape
    masked_BxS = jnp.zeros((batch, slots), bool).at[jnp.arange(batch)[:, None], places_BxK].set(True)
    sizes = (tokens_BxSxW, lead_BxS, time_BxS, there_BxS)
    features = hidden(config, params, *sizes, masked_BxS=masked_BxS, keys_B=keys_B)
    chosen_BxKxD = jnp.take_along_axis(features, places_BxK[:, :, None] + 1, axis=1)
    return sentence.linear(chosen_BxKxD, params["head"]["kernel"], params["head"]["bias"])


def masked_loss(logits_BxKxV: jax.Array, codes_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy in nats, share of codes that have the largest logit) over the masked slots."""
    logp = jax.nn.log_softmax(logits_BxKxV)
    loss = -jnp.take_along_axis(logp, codes_BxK[:, :, None], axis=2).mean()
    return loss, (logits_BxKxV.argmax(-1) == codes_BxK).mean()


def classify(
    config: ClassifierConfig,
    params: Params,
    tokens_BxSxW: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    there_BxS: jax.Array,
    keys_B: jax.Array | None = None,
) -> jax.Array:
    """Logits float32 [B, L], from cls."""
    features = hidden(config.masked, params, tokens_BxSxW, lead_BxS, time_BxS, there_BxS, keys_B=keys_B)
    return sentence.linear(features[:, 0], params["classifier"]["kernel"], params["classifier"]["bias"])


# --- published names


class Place(NamedTuple):
    """Where an array of a published state dict goes: group and name of ours, and the layer of a stacked one."""

    group: str
    name: str
    layer: int | None = None


BACKBONE = {
    "mask_vector": "mask_token",
    "cls": "cls_token",
    "position_table": "pos_embed",
    "token_kernel": "token_embed.tokenConv.weight",
    "lead_table": "spa_embed.embed.weight",
    "time_table": "tem_embed.embed.weight",
    "norm_scale": "norm_layer.weight",
    "norm_bias": "norm_layer.bias",
}
LAYER = {
    "norm1_scale": "0.norm.weight",
    "norm1_bias": "0.norm.bias",
    "qkv_kernel": "0.to_qkv.weight",
    "out_kernel": "0.to_out.0.weight",
    "out_bias": "0.to_out.0.bias",
    "norm2_scale": "1.net.0.weight",
    "norm2_bias": "1.net.0.bias",
    "mlp1_kernel": "1.net.1.weight",
    "mlp1_bias": "1.net.1.bias",
    "mlp2_kernel": "1.net.4.weight",
    "mlp2_bias": "1.net.4.bias",
}
HEAD = {"hidden_kernel": "0.weight", "hidden_bias": "0.bias", "out_kernel": "2.weight", "out_bias": "2.bias"}
LINEAR = {"kernel": "weight", "bias": "bias"}
WITH_BATCH_AXIS = ("mask_vector", "position_table")  # published with a first axis of 1
# Arrays of the published quantiser that its code never reads, and the flag that the codebook has been started.
LEFT_OVER = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
STARTED = "quantize.embedding.initted"


def names(config: Config) -> dict[str, Place]:
    """Published key -> place, for every array that is kept."""
    table: dict[str, Place] = {}

    def add(group: str, prefix: str, leaves: dict[str, str]) -> None:
        table.update({f"{prefix}{theirs}": Place(group, ours) for ours, theirs in leaves.items()})

    def backbone(group: str, prefix: str, depth: int) -> None:
        add(group, prefix, BACKBONE)
        for i in range(depth):
            for ours, theirs in LAYER.items():
                table[f"{prefix}transformer.layers.{i}.{theirs}"] = Place(group, f"layers_{ours}", i)

    if isinstance(config, vqhbr.Config):
        backbone("encoder", "encoder.", config.encoder_layers)
        backbone("decoder", "decoder.", config.decoder_layers)
        add("encode_head", "encode_task_layer.", HEAD)
        add("decode_head", "decode_task_layer.", HEAD)
        table["quantize.embedding.weight"] = Place("", "codebook")
        table["quantize.cluster_size"] = Place("", "usage")
        return table
    whole = isinstance(config, ClassifierConfig)
    prefix = "backbone." if whole else ""
    backbone("backbone", prefix, (config.masked if whole else config).layers)
    add("head", f"{prefix}lm_head.", LINEAR)
    if whole:
        add("classifier", "mlp_head.", LINEAR)
    return table


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, for every array of the state dict."""
    if isinstance(config, vqhbr.Config):
        groups = vqhbr.parameters(config)
        groups[""] = {
            "codebook": Parameter((config.codes, config.code_dim), "zeros"),
            "usage": Parameter((config.codes,), "zeros"),
        }
        shapes = dict(zip((*LEFT_OVER, STARTED), ((config.codes,), (config.codes, config.code_dim), (1,)), strict=True))
    else:
        groups, shapes = parameters(config), {}
    for key, place in names(config).items():
        shape = groups[place.group][place.name].shape[0 if place.layer is None else 1 :]
        if place.name.endswith("kernel"):  # PyTorch has outputs first
            shape = shape[::-1]
        shapes[key] = (1, *shape) if place.name in WITH_BATCH_AXIS else shape
    return shapes


def state(config: Config, params: Params) -> dict[str, np.ndarray]:
    """The published state dict of our parameters, float32 (without the two arrays that nothing reads)."""
    shapes = published_shapes(config)
    arrays = {}
    for key, place in names(config).items():
        array = np.asarray((params[place.group] if place.group else params)[place.name], np.float32)
        array = array if place.layer is None else array[place.layer]
        arrays[key] = np.ascontiguousarray(array.T if place.name.endswith("kernel") else array).reshape(shapes[key])
    return arrays | ({STARTED: np.ones(1, np.float32)} if isinstance(config, vqhbr.Config) else {})


def from_state(config: Config, arrays: dict[str, np.ndarray]) -> Params:
    """Our parameters, NumPy float32, of a published state dict.

    Raises ValueError, naming the key, for one that is missing, unknown, of another shape, or not finite.
    """
    shapes = published_shapes(config)
    for key in shapes:
        _check(arrays, key, shapes[key])
    extra = sorted(set(arrays) - set(shapes))
    if extra:
        raise ValueError(f"key {short(extra[0])} is none of the published network's ({len(extra)} such)")
    if STARTED in shapes and arrays[STARTED] != 1:
        raise ValueError(f"{STARTED} is not 1: its codebook was never started")
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for key, place in names(config).items():
        array = arrays[key].astype(np.float32)
        if place.name in WITH_BATCH_AXIS:
            array = array[0]
        found.setdefault(place[:2], []).append(array.T if place.name.endswith("kernel") else array)
    params: Params = {}
    for (group, name), each in found.items():
        array = np.stack(each) if name.startswith("layers_") else each[0]
        (params.setdefault(group, {}) if group else params)[name] = np.ascontiguousarray(array)
    return params


# --- published files


def import_heartlang(path: str | Path) -> tuple[vqhbr.Config, Params]:
    """The codebook of a published VQ-HBR checkpoint: (`faithful` config of its sizes, parameters, NumPy float32).

    Raises DataError as `load` does, and for a checkpoint of another of HeartLang's networks.
    """
    config, params = load(path)
    if not isinstance(config, vqhbr.Config):
        what = "masked model" if isinstance(config, MaskedConfig) else "classifier"
        raise DataError(f"{path}: is HeartLang's {what}, which has no codebook; give the VQ-HBR checkpoint")
    return config, params


def load(path: str | Path) -> tuple[Config, Params]:
    """Whichever of the three networks a checkpoint of the public training code (file of `torch.save`) holds.

    Sizes are read off the shapes; heads are taken to have HEAD_SIZE features. Raises DataError, one line that names the
    file and the key, for whatever is not exactly such a network; nothing in the file is executed.
    """
    path = Path(path)
    try:
        if path.stat().st_size > FILE_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, more than such a file ever has")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or short(error)})") from None
    arrays = torch_file.state_dict(data, str(path))
    try:
        config = _config(arrays)
        return config, from_state(config, arrays)
    except ValueError as error:
        raise DataError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _config(arrays: dict[str, np.ndarray]) -> Config:
    """The sizes of a state dict."""

    def sizes(key: str, axes: int) -> tuple[int, ...]:
        found = arrays.get(key)
        if found is None:
            raise ValueError(f"key {key} is missing")
        if found.ndim != axes or not found.size:
            raise ValueError(f"key {key} has shape {found.shape}, not {axes} axes")
        return found.shape

    def backbone(prefix: str) -> dict[str, int]:
        width, window, _ = sizes(f"{prefix}{BACKBONE['token_kernel']}", 3)
        first = f"{prefix}transformer.layers.0."
        inner = sizes(f"{first}{LAYER['qkv_kernel']}", 2)[0] // 3
        if not inner or inner % HEAD_SIZE:
            raise ValueError(f"key {first}{LAYER['qkv_kernel']} is not for heads of {HEAD_SIZE} features")
        mlp, slots = (
            sizes(f"{first}{LAYER['mlp1_bias']}", 1)[0],
            sizes(f"{prefix}{BACKBONE['position_table']}", 3)[1] - 1,
        )
        return {"width": width, "window": window, "heads": inner // HEAD_SIZE, "mlp": mlp, "slots": slots}

    def depth(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"transformer\.layers\.(\d{1,3})\.0\.to_qkv\.weight")
        return max((int(match[1]) + 1 for key in arrays if (match := pattern.fullmatch(key))), default=0)

    if "quantize.embedding.weight" in arrays:
        codes, code_dim = sizes("quantize.embedding.weight", 2)
        layers = {"encoder_layers": depth("encoder."), "decoder_layers": depth("decoder.")}
        if not all(layers.values()):
            raise ValueError("key decoder.transformer.layers.0.0.to_qkv.weight is missing")
        return vqhbr.Config(**backbone("encoder."), **layers, codes=codes, code_dim=code_dim, faithful=True)
    if "mlp_head.weight" in arrays:
        masked = {"layers": depth("backbone."), "codes": sizes("backbone.lm_head.weight", 2)[0]}
        masked = MaskedConfig(**backbone("backbone."), **masked)
        return ClassifierConfig(sizes("mlp_head.weight", 2)[0], masked)
    if "lm_head.weight" in arrays:
        return MaskedConfig(**backbone(""), layers=depth(""), codes=sizes("lm_head.weight", 2)[0])
    raise ValueError(
        "none of HeartLang's networks: no key quantize.embedding.weight, mlp_head.weight or lm_head.weight"
    )


def _check(arrays: dict[str, np.ndarray], key: str, shape: tuple[int, ...]) -> None:
    found = arrays.get(key)
    if found is None:
        raise ValueError(f"key {key} is missing")
    if found.dtype.kind != "f" or found.shape != shape:
        raise ValueError(f"key {key} is {found.dtype} of shape {found.shape}, not floating-point of {shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"key {key} is not finite")
