"""Supervised multi-label learning: encoder, mean pool, one linear head, binary cross-entropy in nats.

Labels are 0, 1 or -1 (unknown: no loss, no gradient). Learning rate, prior and seed are values, not parts of
the objective, so that equal arguments of `make` give the identical objective and every `jit` over it is
shared between runs. No optimiser here.

Shapes: B records, T samples, L leads stored, K labels, D features of a frame.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax import models
from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import layers
from ecg_jax.models.inputs import SCALES, to_input
from ecg_jax.models.ladder import Config

Params = dict[str, Any]
DTYPES = ("auto", "float32", "bfloat16")
HEAD_GAIN = 0.01  # variance of the head's start relative to 1 / inputs: first losses within a percent of the prior's
PRIOR_EDGE = 1e-4  # a label never (or always) positive in training still starts at a finite logit
UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Objective:
    """Supervised objective; make it with `make`. Hashable by its arguments, so usable as a static argument of `jit`."""

    arch: Config
    n_labels: int
    scale: str
    crop: int
    dtype: str
    random_crop: bool = True

    @property
    def module(self) -> nn.Module:
        return models.build(self.arch, jnp.dtype(self.dtype))

    def init(self, key: jax.Array, prior_K: jax.Array) -> Params:
        """{"encoder": {...}, "head": {"kernel", "bias"}}, float32; head bias at the logit of `prior_K`.

        With BatchNorm the encoder also holds its running statistics ("..._running_mean", "..._running_var"),
        which get gradient zero and are renewed by `absorb`. `key` a typed PRNG key; `prior_K` prevalence of
        each label among known ones of the training split (traced is fine).
        """
        encoder_key, head_key = jax.random.split(key)
        prior_K = jnp.clip(jnp.asarray(prior_K, jnp.float32), PRIOR_EDGE, 1 - PRIOR_EDGE)
        head = layers.matrix((self.arch.features + 1, self.n_labels), self.arch.features + 1, HEAD_GAIN)
        encoder = models.init(self.arch, encoder_key)
        for name, one in models.statistics(self.arch).items():
            encoder[name] = one.init(encoder_key, one.shape)
        bias_K = jnp.log(prior_K) - jnp.log1p(-prior_K)
        return {"encoder": encoder, "head": {"kernel": head.init(head_key, head.shape), "bias": bias_K}}

    def loss(
        self, params: Params, batch: dict[str, jax.Array], keys: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(mean BCE in nats over the known labels of the batch, aux).

        `keys` [B] typed keys, one per record, for crops and dropout; default `batch["key"]`; without either
        the crop is the centre one and nothing is dropped. aux holds scalars (`known`: share of known labels)
        and, with BatchNorm, "stats": hand it to `absorb`.
        """
        keys = batch.get("key") if keys is None else keys
        features_BxF, stats = self._encode(params, batch, keys, train=True)
        logits_BxK = self._head(params, features_BxF)
        labels_BxK = batch["labels"]
        known_BxK = labels_BxK != UNKNOWN
        loss = (bce(logits_BxK, labels_BxK) * known_BxK).sum() / jnp.maximum(known_BxK.sum(), 1)
        aux: dict[str, Any] = {"known": known_BxK.mean(dtype=jnp.float32)}
        if stats:
            aux["stats"] = stats
        return loss, aux

    def absorb(self, params: Params, aux: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """Params with the running statistics of `aux` in place, and `aux` with scalars only.

        Call it after the optimiser's update, inside the step. Without BatchNorm it changes nothing.
        """
        if "stats" not in aux:
            return params, aux
        scalars = {name: value for name, value in aux.items() if name != "stats"}
        return {**params, "encoder": {**params["encoder"], **aux["stats"]}}, scalars

    def sums(self, params: Params, batch: dict[str, jax.Array], weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`bce_sums` of this batch, as in evaluation: (sum of BCE [K], known labels [K])."""
        return bce_sums(self.logits(params, batch), batch["labels"], weight_B)

    def logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, K] float32, centre crop, no dropout."""
        return self._head(params, self.features(params, batch))

    def features(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, D + 1] float32: pooled frames, then the log gain (0 unless scale is "gain"). Needs no head."""
        return self._encode(params, batch, None, train=False)[0]

    def _encode(self, params, batch, keys_B, train):
        crop_keys = drop_keys = None
        if train and keys_B is not None:
            both = jax.vmap(jax.random.split)(keys_B)
            crop_keys, drop_keys = both[:, 0] if self.random_crop else None, both[:, 1]
        x, valid, log_gain_B = to_input(
            batch["signal"],
            batch["valid"],
            scale=self.scale,
            crop=self.crop,
            keys=crop_keys,
            length=self.arch.padded(self.crop),
        )
        running = models.statistics(self.arch)
        variables = {"params": {n: v for n, v in params["encoder"].items() if n not in running}}
        stats = {n: jax.lax.stop_gradient(params["encoder"][n]) for n in running}
        if running and train:
            (frames, weight), new = self.module.apply(
                variables | {"batch_stats": stats},
                x,
                valid,
                train=True,
                keys=drop_keys,
                mutable=["batch_stats"],
            )
            stats = jax.lax.stop_gradient(new["batch_stats"])
        else:
            if running:
                variables["batch_stats"] = stats
            frames, weight = self.module.apply(variables, x, valid, train=train, keys=drop_keys)
        pooled_BxD = layers.pool(frames, weight)
        return jnp.concatenate([pooled_BxD, log_gain_B[:, None]], axis=1), stats

    def _head(self, params, features_BxF):
        # Logits stay float32 in earnest, also where the default precision of products is lower.
        head = params["head"]
        return jnp.dot(features_BxF, head["kernel"], precision="highest") + head["bias"]


def make(
    arch_config: Config,
    n_labels: int,
    *,
    scale: str = "gain",
    crop: int = 1000,
    dtype: Any = "auto",
    random_crop: bool = True,
) -> Objective:
    """The objective of these arguments, one and the same object for equal ones.

    `dtype` is that of the encoder's arithmetic, by name or as a type: "auto" is bfloat16 on accelerators and float32 on
    CPU; parameters, statistics, softmax, logits and loss are float32 always. Without `random_crop`, training crops are
    centred as in evaluation. Raises UsageError for unknown choices.
    """
    if not isinstance(dtype, str):
        dtype = jnp.dtype(dtype).name
    if dtype not in DTYPES:
        raise UsageError(f"unknown precision {dtype!r}{did_you_mean(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}{did_you_mean(scale, SCALES)}; known: {', '.join(SCALES)}")
    if crop < arch_config.frame:
        raise UsageError(f"crop of {crop} samples is shorter than one frame of {arch_config.frame}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return _make(arch_config, n_labels, scale, crop, dtype, random_crop)


@functools.cache
def _make(arch: Config, n_labels: int, scale: str, crop: int, dtype: str, random_crop: bool) -> Objective:
    return Objective(arch, n_labels, scale, crop, dtype, random_crop)


def bce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy in nats per element, float32; where a label is unknown the value means nothing."""
    z = logits.astype(jnp.float32)
    return jnp.maximum(z, 0) - z * labels.astype(jnp.float32) + jnp.log1p(jnp.exp(-jnp.abs(z)))


def bce_sums(logits: jax.Array, labels: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of BCE over known labels, their count), float32 [K] each, records weighted by `weight_B` (0 for padding).

    Sums of batches add up, so that a split's loss does not depend on how it was batched; BCE of a label = sum
    / count.
    """
    counted_BxK = (labels != UNKNOWN) * weight_B.astype(jnp.float32)[:, None]
    # `where`, not a product: a padding row may hold anything.
    sums = jnp.where(counted_BxK > 0, bce(logits, labels) * counted_BxK, 0.0)
    return sums.sum(0), counted_BxK.sum(0)
