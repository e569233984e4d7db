"""ResNet1d on raw leads: the two-stream pre-activation network of the CODE group, for 100 Hz and any length.

Two streams run through the units: x, normalised, and y, the raw sum. A unit is conv -> norm -> ReLU -> conv
(strided) on x beside max-pool -> 1x1 conv on y; their sum is the next y, and norm -> ReLU of it the next x.
The stem is conv -> norm without activation. All convolutions are SAME and without bias. The head is not here.
Differences from the published code: GroupNorm by default, mean over frames instead of flattening (so N does
not depend on the length), norms and pools that see valid samples only.

Source: A. H. Ribeiro et al., Nature Communications 11:1760 (2020), and E. M. Lima et al., ibid. 12:5117
(2021).

Shapes: B records, T samples (padded to whole frames), S frames, C channels, D channels of a frame.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models import layers, norms
from ecg_jax.models.ladder import ResNet1dConfig
from ecg_jax.models.layers import Parameter

RUNNING = "_running_"  # in the names of BatchNorm's statistics


def parameters(config: ResNet1dConfig) -> dict[str, Parameter]:
    """Every parameter by name, in the order of use. Kernels are He-initialised: each feeds a ReLU."""
    table: dict[str, Parameter] = {}

    def conv(name, kernel, before, after):
        table[f"{name}_kernel"] = layers.matrix((kernel, before, after), kernel * before, gain=2.0)

    def norm(name, width):
        table[f"{name}_scale"] = Parameter((width,), "ones")
        table[f"{name}_bias"] = Parameter((width,), "zeros")

    before = config.width
    conv("stem", config.kernel, config.leads, before)
    norm("stem_norm", before)
    for name, width, _ in _units(config):
        conv(f"{name}_conv1", config.kernel, before, width)
        norm(f"{name}_norm1", width)
        conv(f"{name}_conv2", config.kernel, width, width)
        if before != width:
            conv(f"{name}_skip", 1, before, width)
        norm(f"{name}_norm2", width)
        before = width
    return table


def running_names(norm: str) -> tuple[str, str]:
    """Names of the running mean and variance of the norm called `norm`, in the collection `batch_stats`."""
    return f"{norm}{RUNNING}mean", f"{norm}{RUNNING}var"


def statistics(config: ResNet1dConfig) -> dict[str, Parameter]:
    """The running statistics of BatchNorm by name and starting value; none with GroupNorm. They are not parameters."""
    table: dict[str, Parameter] = {}
    if config.norm == "batch":
        for name, one in parameters(config).items():
            if name.endswith("_scale"):
                mean, var = running_names(name.removesuffix("_scale"))
                table |= {mean: Parameter(one.shape, "zeros"), var: Parameter(one.shape, "ones")}
    return table


def _units(config: ResNet1dConfig) -> list[tuple[str, int, int]]:
    """(name, width, stride) of each residual unit; the first of a stage takes its stride."""
    return [
        (f"stage{stage}_unit{unit}", width, stride if unit == 1 else 1)
        for stage, (width, stride) in enumerate(zip(config.widths, config.strides, strict=True), 1)
        for unit in range(1, config.units + 1)
    ]


class ResNet1d(nn.Module):
    """Encoder: `apply(variables, x, valid, train=False, keys=None) -> (frames [B, S, D] float32, weight [B, S])`.

    x float [B, T, leads], zero outside `valid` ((start, length) in samples, int [B, 2]); T is zero-padded to
    whole frames here if it is not yet. `keys` [B] typed keys, needed for dropout only. With norm "batch" and
    train=True pass mutable=["batch_stats"]. With `stages` a third result: every stage's output as (frames float32
    [B, T / stride, width], stride), the last of which is the first result.

    On the beats input x is [B, tokens, samples of a token] and positions are tokens.
    """

    config: ResNet1dConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        train: bool = False,
        keys: jax.Array | None = None,
        stages: bool = False,
    ) -> tuple[jax.Array, ...]:
        config = self.config
        p = {name: self.param(name, one.init, one.shape) for name, one in parameters(config).items()}
        length = config.padded(x.shape[1])
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))).astype(self.dtype)
        keys = keys if train else None
        size = 1  # samples per position of the current stage
        weight = layers.position_weight(valid, length, size)

        def conv(x, name, stride=1):
            return layers.conv1d(x, p[f"{name}_kernel"].astype(self.dtype), stride, config.conv)

        def norm(x, name, relu=True):
            scale, bias = p[f"{name}_scale"], p[f"{name}_bias"]
            if config.norm == "group" and jax.default_backend() == "cpu":
                return norms.group_norm(x, weight, scale, bias, config.groups, relu)
            if config.norm == "group":
                x = layers.group_norm(x, weight, scale, bias, config.groups)
            else:
                x = self._batch_norm(x, weight, scale, bias, name, train)
            return _mask(nn.relu(x) if relu else x, weight)

        x = y = norm(conv(x, "stem"), "stem_norm", relu=False)
        found = []
        for number, (name, width, stride) in enumerate(_units(config)):
            x = norm(conv(x, f"{name}_conv1"), f"{name}_norm1")
            x = layers.dropout(x, config.dropout, keys, 2 * number)
            x = conv(x, f"{name}_conv2", stride)
            y = layers.max_pool(y, weight > 0, stride)
            if y.shape[2] != width:
                y = conv(y, f"{name}_skip")
            size *= stride
            weight = layers.position_weight(valid, length // size, size)
            y = x + y
            x = norm(y, f"{name}_norm2")
            x = layers.dropout(x, config.dropout, keys, 2 * number + 1)
            found.append((x, size))
        last = x.astype(jnp.float32)
        if stages:  # the output of a stage is that of its last unit
            ends = found[config.units - 1 :: config.units]
            return last, weight, tuple((frames.astype(jnp.float32), size) for frames, size in ends)
        return last, weight

    def _batch_norm(self, x, weight, scale_C, bias_C, name, train):
        mean_name, var_name = running_names(name)
        running = {
            "mean": self.variable("batch_stats", mean_name, jnp.zeros, scale_C.shape),
            "var": self.variable("batch_stats", var_name, jnp.ones, scale_C.shape),
        }
        mean_C, var_C = running["mean"].value, running["var"].value
        if train:
            mean_C, var_C = layers.batch_moments(x, weight)
            if not self.is_initializing():
                for which, new_C in (("mean", mean_C), ("var", var_C)):
                    running[which].value += (1 - layers.BATCH_NORM_MOMENTUM) * (new_C - running[which].value)
        gain_C = scale_C * jax.lax.rsqrt(var_C + layers.NORM_EPS)
        return (x * gain_C + (bias_C - mean_C * gain_C)).astype(x.dtype)


def _mask(x_BxTxC: jax.Array, weight_BxT: jax.Array) -> jax.Array:
    return jnp.where(weight_BxT[:, :, None] > 0, x_BxTxC, 0)
