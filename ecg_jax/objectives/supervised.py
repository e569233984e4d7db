"""Supervised multi-label learning: encoder, mean pool, one linear head, binary cross-entropy in nats.

Labels are 0, 1 or -1 (unknown: no loss, no gradient). Learning rate, prior and seed are values, not parts of
the objective, so that equal arguments of `make` give the identical objective and every `jit` over it is
shared between runs. No optimiser here.

Shapes: B records, T samples, L leads stored, K labels, D features of a frame.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models import layers
from ecg_jax.models.ladder import Config
from ecg_jax.objectives import front as front_lib
from ecg_jax.objectives.front import Front

Params = dict[str, Any]
HEAD_GAIN = 0.01  # variance of the head's start relative to 1 / inputs: first losses within a percent of the prior's
PRIOR_EDGE = 1e-4  # a label never (or always) positive in training still starts at a finite logit
UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Objective:
    """Supervised objective; make it with `make`. Hashable by its arguments, so usable as a static argument of `jit`."""

    front: Front
    n_labels: int

    @property
    def arch(self) -> Config:
        return self.front.arch

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the table that a batch must hold."""
        return (*self.front.fields, "labels")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `sums`: the labels, by number."""
        return tuple(map(str, range(self.n_labels)))

    @property
    def start(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `init` wants to know of the data: the prevalence of each label."""
        return {"prior": jax.ShapeDtypeStruct((self.n_labels,), jnp.float32)}

    def at_width(self, width: int) -> "Objective":
        """The same at another width of the network."""
        return dataclasses.replace(self, front=self.front.at_width(width))

    def init(self, key: jax.Array, start: dict[str, jax.Array]) -> Params:
        """{"encoder": {...}, "head": {"kernel", "bias"}}, float32; head bias at the logit of `start["prior"]` [K].

        With BatchNorm the encoder also holds its running statistics ("..._running_mean", "..._running_var"),
        which get gradient zero and are renewed by `absorb`. `key` a typed PRNG key; `prior` prevalence of
        each label among known ones of the training split (traced is fine).
        """
        encoder_key, head_key = jax.random.split(key)
        prior_K = jnp.clip(jnp.asarray(start["prior"], jnp.float32), PRIOR_EDGE, 1 - PRIOR_EDGE)
        head = layers.matrix((self.arch.features + 1, self.n_labels), self.arch.features + 1, HEAD_GAIN)
        bias_K = jnp.log(prior_K) - jnp.log1p(-prior_K)
        kernel = head.init(head_key, head.shape)
        return {"encoder": self.front.init(encoder_key), "head": {"kernel": kernel, "bias": bias_K}}

    def loss(
        self, params: Params, batch: dict[str, jax.Array], keys: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(mean BCE in nats over the known labels of the batch, aux).

        `keys` [B] typed keys, one per record, for crops and dropout; default `batch["key"]`; without either
        the crop is the centre one and nothing is dropped. aux holds scalars (`known`: share of known labels)
        and, with BatchNorm, "stats": hand it to `absorb`.
        """
        keys = batch.get("key") if keys is None else keys
        crop_keys = drop_keys = None
        if keys is not None:
            both = jax.vmap(jax.random.split)(keys)
            crop_keys, drop_keys = both[:, 0], both[:, 1]
        view = self.front.view(batch, crop_keys)
        encoded = self.front.encode(params["encoder"], view, train=True, keys=drop_keys)
        logits_BxK = self._head(params, self.front.pooled(encoded, view))
        labels_BxK = batch["labels"]
        known_BxK = labels_BxK != UNKNOWN
        loss = (bce(logits_BxK, labels_BxK) * known_BxK).sum() / jnp.maximum(known_BxK.sum(), 1)
        aux: dict[str, Any] = {"known": known_BxK.mean(dtype=jnp.float32)}
        if encoded.stats:
            aux["stats"] = encoded.stats
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

    def mean(self, sums_2xK: np.ndarray) -> float:
        """Mean BCE over the labels that occur, nats (NaN without any), from the sums of `sums`."""
        total, known = np.asarray(sums_2xK, np.float64)
        seen = known > 0
        return float(np.mean(total[seen] / known[seen])) if seen.any() else float("nan")

    def logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, K] float32, centre crop, no dropout."""
        return self._head(params, self.features(params, batch))

    def features(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, D + 1] float32, see `Front.features`. Needs no head."""
        return self.front.features(params, batch)

    def _head(self, params, features_BxF):
        # Logits stay float32 in earnest, also where the default precision of products is lower.
        head = params["head"]
        return jnp.dot(features_BxF, head["kernel"], precision="highest") + head["bias"]


def make(arch_config: Config, n_labels: int, **front: Any) -> Objective:
    """The objective of these arguments, one and the same object for equal ones. `front`: arguments of `front.make`.

    Raises UsageError for unknown choices.
    """
    return _make(front_lib.make(arch_config, **front), n_labels)


@functools.cache
def _make(front: Front, n_labels: int) -> Objective:
    return Objective(front, n_labels)


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
