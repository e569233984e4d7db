"""Learning the codes themselves: VQ-HBR on the beat tokens of whole records.

Reconstruction and commitment are learned by gradient, the codebook by its moving average in `absorb`. Tokens are cut
on the device at the stored R peaks, from the whole record, without crops or augmentation. A token counts (in losses, in
the moving average, in k-means) if its window keeps off the outer half second of the record, where filters leave their
marks, and if its lead is not dead; with `arch.faithful` every slot counts, padding too, as published.

Invariant: sums are over the whole batch, so a sharded batch and micro-batches learn what one batch on one device does,
up to rounding.

Shapes: B records, T samples, L leads stored, S slots, W samples of a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import beats, vqhbr
from ecg_jax.models.inputs import SCALES, to_input
from ecg_jax.models.vqhbr import Sentences
from ecg_jax.objectives.front import DTYPES
from ecg_jax.records.windows import MAX_PEAKS, MODES, WINDOW

Params = dict[str, Any]
SAMPLES, LEADS = 1000, 12  # of a stored record, as announced to whoever gathers `start`; eight leads do as well
AT_ONCE = 16  # records of `start` encoded together


@dataclasses.dataclass(frozen=True)
class Objective:
    """VQ-HBR objective; make it with `make`. Hashable by its arguments.

    scale: of the signal, as in `models/inputs`; mode: which beats, as in `records/windows`; indices: whether the model
    is told lead and second of a token; sample: records that k-means starts from.
    """

    arch: vqhbr.Config
    scale: str
    mode: str
    indices: bool
    sample: int
    dtype: str
    fields = ("signal", "valid", "rpeaks")
    columns = ("reconstruction", "commitment")

    @property
    def start(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `init` wants to know of the data: records of the training split, as stored."""
        n = self.sample
        return {
            "signal": jax.ShapeDtypeStruct((n, SAMPLES, LEADS), jnp.int16),
            "valid": jax.ShapeDtypeStruct((n, 2), jnp.int32),
            "rpeaks": jax.ShapeDtypeStruct((n, MAX_PEAKS), jnp.int16),
        }

    @property
    def training_flops(self) -> int:
        """Of forward and backward over one record, at 2 per multiply-add."""
        return 2 * vqhbr.training_macs(self.arch, self.arch.slots)

    def at_width(self, width: int) -> "Objective":
        """The same at another width of the network."""
        return dataclasses.replace(self, arch=dataclasses.replace(self.arch, width=width))

    def init(self, key: jax.Array, start: dict[str, jax.Array]) -> Params:
        """Params of `vqhbr`, float32, with the codebook at the k-means of the records in `start` as the untrained
        encoder sees them.
        """
        params_key, start_key = jax.random.split(key)
        params = vqhbr.init(self.arch, params_key)
        n = start["signal"].shape[0]
        together = max(k for k in range(1, min(n, AT_ONCE) + 1) if n % k == 0)

        def encoded(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seen = self.sentences(batch)
            return vqhbr.encode(self.arch, params, *seen[:4], dtype=jnp.dtype(self.dtype)), seen.counted

        parts = {name: x.reshape(n // together, together, *x.shape[1:]) for name, x in start.items()}
        z, counted = lax.map(encoded, parts)
        z_BxSxd, counted_BxS = z.reshape(n, *z.shape[2:]), counted.reshape(n, -1)
        return vqhbr.started(self.arch, params, z_BxSxd, counted_BxS, start_key)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], keys: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(mean over counted tokens of reconstruction + beta x commitment, aux), see `vqhbr.loss`.

        `keys` [B] typed keys, one per record, choose the tokens that rare codes are put on, and nothing else.
        """
        return vqhbr.loss(self.arch, params, self.sentences(batch), keys, jnp.dtype(self.dtype))

    def absorb(self, params: Params, aux: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """`vqhbr.absorb`: moves the codebook; call it after the optimiser's update, inside the step."""
        return vqhbr.absorb(self.arch, params, aux)

    def sums(self, params: Params, batch: dict[str, jax.Array], weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sums of reconstruction and commitment over counted tokens, their number), float32 [2] each, records
        weighted by `weight` (0 for padding).
        """
        each, counted_BxS = self._each(params, batch)
        counted_BxS = counted_BxS * weight_B.astype(jnp.float32)[:, None]
        # `where`, not a product: a padding record may hold anything.
        sums = [jnp.where(counted_BxS > 0, each[name] * counted_BxS, 0.0).sum() for name in self.columns]
        return jnp.stack(sums), jnp.full(2, counted_BxS.sum())

    def mean(self, sums_2x2: np.ndarray) -> float:
        """Reconstruction + beta x commitment of a split (NaN without a token), from the sums of `sums`."""
        total, known = np.asarray(sums_2x2, np.float64)
        return float(total @ (1.0, self.arch.beta) / known[0]) if known[0] > 0 else float("nan")

    def logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Mean reconstruction error of each record's counted tokens, float32 [B, 1]; 0 without any."""
        each, counted_BxS = self._each(params, batch)
        error_B = (each["reconstruction"] * counted_BxS).sum(1) / jnp.maximum(counted_BxS.sum(1), 1)
        return error_B[:, None]

    def sentences(self, batch: dict[str, jax.Array]) -> Sentences:
        """The tokens of a batch of stored records: signal int16 [B, T, L], valid int32 [B, 2], rpeaks int16 [B, n]."""
        stored = batch["signal"].shape[1]
        x_BxTxC, _, _ = to_input(batch["signal"], batch["valid"], scale=self.scale, crop=stored)
        slots = beats.slots(batch["rpeaks"], batch["valid"], self.arch.slots, mode=self.mode)
        tokens = beats.tokens(x_BxTxC, slots)
        lead, time = (slots.lead, slots.time) if self.indices or self.arch.faithful else (None, None)
        return Sentences(tokens, lead, time, slots.there, slots.inner & jnp.any(tokens != 0, axis=2))

    def _each(self, params: Params, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        seen = self.sentences(batch)
        each = vqhbr.losses(self.arch, params, seen, jnp.dtype(self.dtype))
        return each, vqhbr.weights(self.arch, seen.counted)


def make(
    arch: vqhbr.Config,
    *,
    scale: str = "mv",
    mode: str = "robust",
    indices: bool = True,
    sample: int = 1024,
    dtype: str = "auto",
) -> Objective:
    """The objective of these arguments; equal ones give equal objectives.

    Without `indices` the model is not told lead and second, unless it is `faithful`: the published model was trained
    with them, though its codes were then made without. `dtype` is that of the backbones' arithmetic: "auto" is bfloat16
    on accelerators and float32 on CPU. Raises UsageError for unknown choices and impossible sizes.
    """
    known = {"scale": (scale, SCALES), "beats": (mode, MODES), "precision": (dtype, DTYPES)}
    for what, (value, choices) in known.items():
        if value not in choices:
            raise UsageError(f"unknown {what} {value!r}{did_you_mean(value, choices)}; known: {', '.join(choices)}")
    if arch.window != WINDOW:
        raise UsageError(f"codebook: window = {arch.window}, but beat tokens have {WINDOW} samples")
    if sample < 1:
        raise UsageError(f"codebook: k-means needs a sample of records, not {sample}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Objective(arch, scale, mode, indices, sample, dtype)
