"""The published networks of the CODE group, reproduced exactly: the age regressor (PyTorch), the diagnoser (Keras).

Only for their weights, and to compare with them: for studies there is `resnet1d`, which deviates knowingly. Two streams
run through the units: x, normalised, and y, the raw sum. Invariant: with equal weights the outputs equal those of the
public code, in evaluation and (running statistics included, dropout apart) in training. Input is the whole record at
400 Hz, padded with zeros by the caller; nothing is masked, as there.

Where the two published versions differ:

                     torch                                keras
  kernel             17, odd only                         16
  padding            floor((kernel - stride + 1) / 2)     SAME: the odd zero comes last
                     on both sides
  stem               conv, BatchNorm                      conv, BatchNorm, ReLU, which y also receives
  units              five, the first without stride       four
  BatchNorm epsilon  1e-5                                 1e-3
  running average    0.9 old, unbiased variance           0.99 old, biased variance
  dropout            0.8 is dropped, probably a misread   0.2 is dropped, as 0.8 is kept
                     of the other version's 0.8
  features flattened channel by channel                   frame by frame (the head's kernel is [S, D, K] here)
  head               the age                              logits of six sigmoids

Sources: E. M. Lima et al., Nature Communications 12:5117 (2021), github.com/antonior92/ecg-age-prediction;
A. H. Ribeiro et al., ibid. 11:1760 (2020), github.com/antonior92/automatic-ecg-diagnosis.

Shapes: B records, T samples, S frames, C channels, D channels of a frame, K outputs.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import layers
from ecg_jax.models.layers import Parameter

SOURCES = ("torch", "keras")
EPS = {"torch": 1e-5, "keras": 1e-3}
KEPT = {"torch": 0.9, "keras": 0.99}  # of the running statistics, a step
RATE = 400  # samples a second
# Input is twice the millivolt value, as in the published CODE-15 % (ecg-preprocessing, `--scale 2`). The networks' own
# notes say both "1e-4 V" and "volts times 1000", which contradict each other.
SCALE = 2.0
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
DIAGNOSES = ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")


@dataclasses.dataclass(frozen=True)
class LegacyConfig:
    """One published architecture. `filters[0]` and `lengths[0]` are the stem's (torch: also the first unit's)."""

    source: str  # of SOURCES: which of the two versions
    outputs: int
    kernel: int  # taps
    dropout: float  # share that is dropped
    filters: tuple[int, ...] = (64, 128, 196, 256, 320)
    lengths: tuple[int, ...] = (4096, 1024, 256, 64, 16)  # positions after each of them
    leads: int = 12
    samples: int = 4096
    family = "legacy"

    def __post_init__(self):
        if self.source not in SOURCES:
            raise UsageError(
                f"unknown source {self.source!r}{did_you_mean(self.source, SOURCES)}; known: {', '.join(SOURCES)}"
            )
        if len(self.filters) != len(self.lengths) or len(self.filters) < 2:
            raise UsageError(f"{len(self.filters)} filters and {len(self.lengths)} lengths: a pair each, two at least")
        if min(self.outputs, self.kernel, self.leads, self.samples, *self.filters, *self.lengths) < 1:
            raise UsageError("filters, lengths, kernel, leads, samples and outputs must be positive")
        before = (self.samples, *self.lengths)
        if any(a % b for a, b in zip(before, self.lengths, strict=False)):
            raise UsageError(f"lengths {before} must go down by whole factors")
        if self.source == "torch" and self.kernel % 2 == 0:
            raise UsageError(f"the torch version takes odd kernels, not {self.kernel}")
        if self.source == "keras" and self.samples != self.lengths[0]:
            raise UsageError(f"the keras version has no stride in its stem: {self.samples} samples, {self.lengths[0]}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def features(self) -> int:
        """Channels of a frame."""
        return self.filters[-1]

    @property
    def frame(self) -> int:
        """Samples per frame."""
        return self.samples // self.lengths[-1]

    @property
    def units(self) -> tuple[tuple[int, int, int], ...]:
        """(channels in, channels out, stride) of each residual unit."""
        first = 0 if self.source == "torch" else 1
        filters, lengths = (self.filters[0], *self.filters), (self.lengths[0], *self.lengths)
        every = range(first, len(self.filters))
        return tuple((filters[i], filters[i + 1], lengths[i] // lengths[i + 1]) for i in every)

    def padded(self, length: int) -> int:
        """Samples that a record must be padded to with zeros: the published number, whatever its length."""
        if length > self.samples:
            raise UsageError(f"the network takes {self.samples} samples at {RATE} Hz, not {length}: crop first")
        return self.samples


PRESETS: dict[str, LegacyConfig] = {
    "legacy_age": LegacyConfig("torch", outputs=1, kernel=17, dropout=0.8),  # 6,924,705 with its head
    "legacy_diagnosis": LegacyConfig("keras", outputs=len(DIAGNOSES), kernel=16, dropout=0.2),  # 6,421,910 likewise
}


def parameters(config: LegacyConfig) -> dict[str, Parameter]:
    """Every parameter of the encoder by name, in the order of use; the head is in `head`.

    Starting values: Keras' He normal; for torch a normal of the variance of its uniform distribution.
    """
    table: dict[str, Parameter] = {}
    gain = _gain(config)

    def conv(name: str, kernel: int, before: int, after: int) -> None:
        table[f"{name}_kernel"] = layers.matrix((kernel, before, after), kernel * before, gain)

    def norm(name: str, width: int) -> None:
        table[f"{name}_scale"] = Parameter((width,), "ones")
        table[f"{name}_bias"] = Parameter((width,), "zeros")

    conv("stem", config.kernel, config.leads, config.filters[0])
    norm("stem_norm", config.filters[0])
    for number, (before, after, _) in enumerate(config.units, 1):
        if before != after:
            conv(f"unit{number}_skip", 1, before, after)
        conv(f"unit{number}_conv1", config.kernel, before, after)
        norm(f"unit{number}_norm1", after)
        conv(f"unit{number}_conv2", config.kernel, after, after)
        norm(f"unit{number}_norm2", after)
    return table


def statistics(config: LegacyConfig) -> dict[str, Parameter]:
    """The running statistics of every BatchNorm by name. They are not parameters."""
    table: dict[str, Parameter] = {}
    for name, one in parameters(config).items():
        if name.endswith("_scale"):
            norm = name.removesuffix("_scale")
            table[f"{norm}_running_mean"] = Parameter(one.shape, "zeros")
            table[f"{norm}_running_var"] = Parameter(one.shape, "ones")
    return table


def head(config: LegacyConfig) -> dict[str, Parameter]:
    """The published linear head: kernel [S, D, K] and bias [K]."""
    frames, width = config.lengths[-1], config.features
    fan_in = frames * width
    bias = Parameter((config.outputs,), "zeros")
    if config.source == "torch":
        bias = layers.matrix((config.outputs,), fan_in, _gain(config))
    return {"kernel": layers.matrix((frames, width, config.outputs), fan_in, _gain(config)), "bias": bias}


def predict(head: dict[str, jax.Array], frames_BxSxD: jax.Array) -> jax.Array:
    """Outputs float32 [B, K] of the published head: the age in years (torch), logits of DIAGNOSES (keras)."""
    out_BxK = jnp.einsum("bsd,sdk->bk", frames_BxSxD, head["kernel"], precision=lax.Precision.HIGHEST)
    return out_BxK + head["bias"]


def _gain(config: LegacyConfig) -> float:
    """Variance of a starting weight times its fan-in."""
    return 2.0 if config.source == "keras" else 1 / 3


class Legacy(nn.Module):
    """Encoder: `apply(variables, x, valid, train=False, keys=None) -> (frames [B, S, D] float32, weight [B, S])`.

    x float [B, T, leads] with exactly `config.samples` samples, twice the millivolt value at 400 Hz, leads in the order
    of LEADS. `valid` ((start, length) in samples, int [B, 2]) goes into the weights only. `keys` [B] typed keys,
    needed for dropout only. With train=True pass mutable=["batch_stats"].
    """

    config: LegacyConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        if x.shape[1:] != (config.samples, config.leads):
            raise UsageError(f"input must be [B, {config.samples}, {config.leads}], got {x.shape}")
        p = {name: self.param(name, one.init, one.shape) for name, one in parameters(config).items()}
        keys = keys if train else None
        drop = 0  # dropout layers passed

        def conv(x, name, stride=1):
            return _conv(x, p[f"{name}_kernel"].astype(self.dtype), stride, config.source)

        def norm(x, name):
            return self._batch_norm(x, p[f"{name}_scale"], p[f"{name}_bias"], name, train)

        def dropped_relu(x):
            nonlocal drop
            drop += 1
            return layers.dropout(nn.relu(x), config.dropout, keys, drop)

        stem_stride = config.samples // config.lengths[0]
        x = norm(conv(x.astype(self.dtype), "stem", stem_stride), "stem_norm")
        x = y = nn.relu(x) if config.source == "keras" else x
        for number, (before, after, stride) in enumerate(config.units, 1):
            y = y.reshape(y.shape[0], -1, stride, before).max(2)
            if before != after:
                y = conv(y, f"unit{number}_skip")
            x = dropped_relu(norm(conv(x, f"unit{number}_conv1"), f"unit{number}_norm1"))
            y = conv(x, f"unit{number}_conv2", stride) + y
            x = dropped_relu(norm(y, f"unit{number}_norm2"))
        return x.astype(jnp.float32), layers.position_weight(valid, config.lengths[-1], config.frame)

    def _batch_norm(self, x, scale_C, bias_C, name, train):
        source = self.config.source
        mean = self.variable("batch_stats", f"{name}_running_mean", jnp.zeros, scale_C.shape)
        var = self.variable("batch_stats", f"{name}_running_var", jnp.ones, scale_C.shape)
        mean_C, var_C = mean.value, var.value
        if train:
            mean_C, var_C = x.astype(jnp.float32).mean((0, 1)), x.astype(jnp.float32).var((0, 1))
            if not self.is_initializing():
                n = x.shape[0] * x.shape[1]
                seen_C = var_C * (n / max(n - 1, 1)) if source == "torch" else var_C
                mean.value += (1 - KEPT[source]) * (mean_C - mean.value)
                var.value += (1 - KEPT[source]) * (seen_C - var.value)
        gain_C = scale_C * lax.rsqrt(var_C + EPS[source])
        return (x * gain_C + (bias_C - mean_C * gain_C)).astype(x.dtype)


def _conv(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, source: str) -> jax.Array:
    """Convolution without bias and with the zeros where the published code puts them; full precision everywhere."""
    padding: str | list[tuple[int, int]] = "SAME"
    if source == "torch":
        padding = [(max((w_KxCxD.shape[0] - stride + 1) // 2, 0),) * 2]
    return lax.conv_general_dilated(
        x_BxTxC, w_KxCxD, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"), precision=lax.Precision.HIGHEST
    )
