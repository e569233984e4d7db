"""What the encoder of any objective sees of a batch, and what it makes of it.

Two worlds (`arch.input`). "signal": the scaled, cropped leads. "beats": one token for each lead and beat, gathered on
the device out of the scaled signal at the stored R peaks; with a crop, the beats whose windows lie wholly inside it. In
the signal world the beats are found too if the batch brings R peaks, for objectives that ask about them. No head, no
loss. Invariant: what is masked or padded reaches the encoder only as its mask vector or blank, never as samples.

Shapes: B records, T stored samples, P samples of the crop, S slots of beats, F frames, D channels of a frame.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ecg_jax import models
from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import beats, inputs, layers
from ecg_jax.models.ladder import Config
from ecg_jax.records.leads import LEADS
from ecg_jax.records.windows import MODES, most_slots

DTYPES = ("auto", "float32", "bfloat16")


class View(NamedTuple):
    """A batch as it may be seen.

    x          float32 [B, P, 12], scaled; the crop in the signal world, the whole stored record on beats
    valid      int32 [B, 2], (start, length) of what is observed within x
    log_gain   float32 [B], 0 unless the scale is "gain"
    first      int32 [B], the stored sample at which x begins
    slots      the beats, at places of the stored record; None where the batch has no R peaks
    """

    x: jax.Array
    valid: jax.Array
    log_gain: jax.Array
    first: jax.Array
    slots: beats.Slots | None


class Encoded(NamedTuple):
    """Frames float32 [B, F, D] (on beats one a slot) with weights [B, F]; where asked for, the stages of a ResNet as
    (frames, stride); new running statistics of BatchNorm, else {}.
    """

    frames: jax.Array
    weight: jax.Array
    stages: tuple[tuple[jax.Array, int], ...]
    stats: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Front:
    """Encoder with its input; make it with `make`. Hashable by its arguments.

    mode: how beats were found and are kept ("robust" or "heartlang", see `records/windows`); number: slots of a
    record's beats.
    """

    arch: Config
    scale: str
    crop: int
    dtype: str
    random_crop: bool
    mode: str
    number: int

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the table that a batch must hold."""
        return ("signal", "valid", "rpeaks") if self.on_beats else ("signal", "valid")

    @property
    def on_beats(self) -> bool:
        return getattr(self.arch, "input", "signal") == "beats"

    @property
    def length(self) -> int:
        """Of a record as `models/flops` counts it: samples, or slots on beats."""
        return self.number if self.on_beats else self.crop

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Parameters of the encoder, running statistics of BatchNorm included."""
        encoder = models.init(self.arch, key)
        for name, one in models.statistics(self.arch).items():
            encoder[name] = one.init(key, one.shape)
        return encoder

    def view(self, batch: dict[str, jax.Array], keys_B: jax.Array | None = None) -> View:
        """signal int16 [B, T, L], valid int32 [B, 2] and, for beats, rpeaks [B, n] of `batch`; `keys` [B] typed keys
        move the crop where crops are random.
        """
        stored = batch["signal"].shape[1]
        crop = min(self.crop, stored)
        keys_B = keys_B if self.random_crop else None
        first_B = inputs.crop_start(batch["valid"], crop, stored, keys_B)
        slots = None
        if "rpeaks" in batch:
            window = (first_B, crop) if crop < stored else None
            slots = beats.slots(batch["rpeaks"], batch["valid"], self.number, mode=self.mode, crop=window)
        whole = {"scale": self.scale, "crop": stored}
        cut = whole | {"crop": self.crop, "keys": keys_B}
        if self.on_beats:
            return View(*inputs.to_input(batch["signal"], batch["valid"], **whole), jnp.zeros_like(first_B), slots)
        length = self.arch.padded(self.crop)
        return View(*inputs.to_input(batch["signal"], batch["valid"], **cut, length=length), first_B, slots)

    def encode(
        self,
        encoder: dict[str, jax.Array],
        view: View,
        *,
        train: bool = False,
        keys: jax.Array | None = None,
        x: jax.Array | None = None,
        hidden: jax.Array | None = None,
        blank: jax.Array | None = None,
        stages: bool = False,
    ) -> Encoded:
        """Frames of a view.

        Args:
            keys: [B] typed keys, for dropout.
            x: what is shown instead of `view.x`, with windows blanked, say.
            hidden: bool [B, S], on beats: slots whose content is not shown. A Transformer puts its mask vector there,
                a ResNet `blank`, float32 [samples of a token].
            stages: give the stages of a ResNet too.
        """
        running = models.statistics(self.arch)
        variables = {"params": {name: leaf for name, leaf in encoder.items() if name not in running}}
        stats = {name: jax.lax.stop_gradient(encoder[name]) for name in running}
        if running:
            variables["batch_stats"] = stats
        shown = (view.x if x is None else x, view.valid)
        more: dict[str, Any] = {"train": train, "keys": keys}
        resnet = self.arch.family == "resnet1d"
        if self.on_beats:
            tokens, there = beats.tokens(shown[0], view.slots), view.slots.there
            if resnet:
                if hidden is not None:
                    tokens = jnp.where(hidden[:, :, None], blank, tokens)
                count_B = there.sum(1, dtype=jnp.int32)  # compact: they come first
                shown = tokens, jnp.stack([jnp.zeros_like(count_B), count_B], 1)
            else:
                shown = tokens, there
                more["masked"] = hidden
                more["place"] = tuple(jnp.where(there, at + 1, 0) for at in (view.slots.lead, view.slots.time))
        if stages and resnet:
            more["stages"] = True
        module = models.build(self.arch, jnp.dtype(self.dtype))
        if running and train:
            out, new = module.apply(variables, *shown, **more, mutable=["batch_stats"])
            stats = jax.lax.stop_gradient(new["batch_stats"])
        else:
            out = module.apply(variables, *shown, **more)
        frames, weight, *found = out
        return Encoded(frames, weight, found[0] if found else (), stats)

    def pooled(self, encoded: Encoded, view: View) -> jax.Array:
        """[B, D + 1] float32: the mean over valid frames, then the log gain."""
        return jnp.concatenate([layers.pool(encoded.frames, encoded.weight), view.log_gain[:, None]], axis=1)

    def features(self, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        """[B, D + 1] float32 of `params["encoder"]`: centre crop, nothing hidden. Zeros, but for the log gain, where a
        record on the beats input has no beat.
        """
        view = self.view(batch)
        return self.pooled(self.encode(params["encoder"], view), view)

    def at_width(self, width: int) -> "Front":
        """The same at another `width` of the network, for rates that scale with it."""
        return dataclasses.replace(self, arch=dataclasses.replace(self.arch, width=width))


def make(
    arch: Config,
    *,
    scale: str = "gain",
    crop: int = 1000,
    dtype: Any = "auto",
    random_crop: bool = True,
    mode: str = "robust",
    slots: int = 0,
) -> Front:
    """The front of these arguments.

    `dtype` is that of the encoder's arithmetic, by name or as a type: "auto" is bfloat16 on accelerators and float32 on
    CPU; parameters, statistics, softmax, logits and loss are float32 always. Without `random_crop`, training crops are
    centred as in evaluation. `slots` of beats, 0 for as many as the mode may fill (252 or 256). Raises UsageError for
    unknown choices.
    """
    if not isinstance(dtype, str):
        dtype = jnp.dtype(dtype).name
    for what, value, known in (
        ("precision", dtype, DTYPES),
        ("scale", scale, inputs.SCALES),
        ("beats", mode, MODES),
    ):
        if value not in known:
            raise UsageError(f"unknown {what} {value!r}{did_you_mean(value, known)}; known: {', '.join(known)}")
    if getattr(arch, "input", "signal") == "signal" and crop < arch.frame:
        raise UsageError(f"crop of {crop} samples is shorter than one frame of {arch.frame}")
    most = most_slots(mode)
    slots = slots or most
    if not len(LEADS) <= slots <= most or (mode == "robust" and slots % len(LEADS)):
        raise UsageError(
            f"model.slots = {slots}: {mode} beats fill up to {most}, twelve a beat; give a multiple of 12 up to that"
        )
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Front(arch, scale, crop, dtype, random_crop, mode, slots)
