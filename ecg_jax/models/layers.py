"""Layers that the encoders share: 1-D convolution in several formulations, masked norms, dropout, pooling.

Every function is pure. What it does not do: hold parameters (the encoders do) or know of ECG. Invariant: a
position whose weight is 0 (no valid sample in it) changes nothing at any other position, so padding never
reaches a feature.

Shapes: B records, T positions in time, C channels in, D channels out, K kernel taps, G groups.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.models.conv import conv1d  # noqa: F401  (one of the layers)

NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.9
TRUNCATED_STD = 0.87962566  # standard deviation of a unit normal cut at +-2


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of an encoder: its shape and how it starts.

    `start` is "normal" (truncated at two standard deviations, of standard deviation `std`), "ones" or
    "zeros".
    """

    shape: tuple[int, ...]
    start: str
    std: float = 0.0

    def init(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The starting value, as a Linen initializer."""
        if self.start == "normal":
            return self.std * unit_normal(key, shape)
        return jnp.full(shape, float(self.start == "ones"), jnp.float32)


def matrix(shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> Parameter:
    """A weight of variance gain / fan_in."""
    return Parameter(shape, "normal", math.sqrt(gain / fan_in))


def unit_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal noise truncated at two standard deviations and rescaled to variance 1."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / TRUNCATED_STD


def start(tables: dict[str, dict[str, Parameter]], key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Starting values of groups of parameters, float32, from a single draw: one for each compiles many times longer."""
    drawn = sum(math.prod(one.shape) for table in tables.values() for one in table.values() if one.start == "normal")
    noise, at = unit_normal(key, (drawn,)), 0
    values: dict[str, dict[str, jax.Array]] = {group: {} for group in tables}
    for group, table in tables.items():
        for name, one in table.items():
            if one.start == "normal":
                size = math.prod(one.shape)
                values[group][name] = one.std * noise[at : at + size].reshape(one.shape)
                at += size
            else:
                values[group][name] = jnp.full(one.shape, float(one.start == "ones"), jnp.float32)
    return values


def group_count(width: int, most: int = 8) -> int:
    """Groups of a GroupNorm: the largest divisor of the width up to `most`."""
    return max(g for g in range(1, most + 1) if width % g == 0)


def group_norm(
    x_BxTxC: jax.Array, weight_BxT: jax.Array, scale_C: jax.Array, bias_C: jax.Array, most: int = 8
) -> jax.Array:
    """GroupNorm (see `group_count`) whose statistics are means over positions weighted by `weight` in [0, 1];
    float32 inside.

    A record without any weight is normalised by mean 0 and variance 0, and stays finite.
    """
    mean_BxC, variance_BxC = group_moments(x_BxTxC, weight_BxT, most)
    gain_BxC = scale_C * lax.rsqrt(variance_BxC + NORM_EPS)
    shift_BxC = bias_C - mean_BxC * gain_BxC
    return (x_BxTxC * gain_BxC[:, None] + shift_BxC[:, None]).astype(x_BxTxC.dtype)


def group_moments(x_BxTxC: jax.Array, weight_BxT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and variance of each channel's group over time, [B, C] each, float32."""
    share_BxT = weight_BxT / jnp.maximum(weight_BxT.sum(1, keepdims=True), 1e-6)
    x = x_BxTxC.astype(jnp.float32)
    # Products with the weights: as sums of weighted copies, XLA-CPU takes half as long again.
    mean = functools.partial(jnp.einsum, "btc,bt->bc", precision=lax.Precision.HIGHEST)
    groups = group_count(x.shape[2], most)
    mean_BxC, square_BxC = over_groups(mean(x, share_BxT), groups), over_groups(mean(x * x, share_BxT), groups)
    return mean_BxC, jnp.maximum(square_BxC - mean_BxC**2, 0.0)


def over_groups(x_BxC: jax.Array, groups: int) -> jax.Array:
    """Each channel's value replaced by the mean over its group."""
    batch, channels = x_BxC.shape
    mean = x_BxC.reshape(batch, groups, -1).mean(2, keepdims=True)
    return jnp.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, channels)


def batch_moments(x_BxTxC: jax.Array, weight_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance per channel over the batch and the valid positions, float32.

    Under `jit` with a sharded batch these are statistics of the global batch; inside `shard_map` they would
    be local.
    """
    weight = weight_BxT / jnp.maximum(weight_BxT.sum(), 1e-6)
    x = x_BxTxC.astype(jnp.float32)
    mean_C = jnp.einsum("btc,bt->c", x, weight)
    square_C = jnp.einsum("btc,bt->c", x * x, weight)
    return mean_C, jnp.maximum(square_C - mean_C**2, 0.0)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, float32 statistics, result in the dtype of `x`."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.maximum((y * y).mean(-1, keepdims=True) - mean**2, 0.0)
    return ((y - mean) * lax.rsqrt(variance + NORM_EPS) * scale + bias).astype(x.dtype)


def max_pool(x_BxTxC: jax.Array, occupied_BxT: jax.Array, stride: int) -> jax.Array:
    """Maximum over each run of `stride` positions, unoccupied ones left out; 0 where none is occupied.

    T must be a multiple of `stride`. The first of equal maxima gets the gradient, as in PyTorch.
    """
    if stride == 1:
        return x_BxTxC
    batch, length, channels = x_BxTxC.shape
    x = jnp.where(occupied_BxT[:, :, None], x_BxTxC, jnp.finfo(x_BxTxC.dtype).min)
    x = _largest(x.reshape(batch, length // stride, stride, channels), stride)
    return jnp.where(occupied_BxT.reshape(batch, -1, stride).any(2)[:, :, None], x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _largest(x_BxUxSxC: jax.Array, run: int) -> jax.Array:
    """Maximum over axis 2, of length `run`, by comparisons. XLA-CPU's windowed maximum has a slow gradient. That of a
    reduction shares it among all that equal the maximum: if the compiler evaluates `x` once more, rounded otherwise,
    none does, and the share is infinite.
    """
    return _largest_forward(x_BxUxSxC, run)[0]


def _largest_forward(x_BxUxSxC, run):
    best_BxUxC = x_BxUxSxC[:, :, 0]
    place_BxUxC = jnp.zeros(best_BxUxC.shape, jnp.int32)
    for i in range(1, run):
        larger = x_BxUxSxC[:, :, i] > best_BxUxC
        best_BxUxC = jnp.where(larger, x_BxUxSxC[:, :, i], best_BxUxC)
        place_BxUxC = jnp.where(larger, i, place_BxUxC)
    return best_BxUxC, place_BxUxC


def _largest_backward(run, place_BxUxC, ct_BxUxC):
    return (jnp.where(place_BxUxC[:, :, None] == jnp.arange(run)[:, None], ct_BxUxC[:, :, None], 0),)


_largest.defvjp(_largest_forward, _largest_backward)


def position_weight(valid_Bx2: jax.Array, positions: int, size: int) -> jax.Array:
    """Share of valid samples in each of `positions` runs of `size` samples, [B, positions] float32 in [0, 1].

    `valid` is (start, length) in samples.
    """
    start_Bx1, stop_Bx1 = valid_Bx2[:, :1], valid_Bx2[:, :1] + valid_Bx2[:, 1:]
    left = jnp.arange(positions) * size
    inside = jnp.minimum(stop_Bx1, left + size) - jnp.maximum(start_Bx1, left)
    return jnp.clip(inside, 0, size).astype(jnp.float32) / size


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, salt: int) -> jax.Array:
    """Inverted dropout with a key per record, so that a mask does not depend on the record's place in the batch.

    `salt` tells layers apart (a Python or traced integer). No-op where `rate` is 0 or there are no keys
    (evaluation).
    """
    if rate == 0.0 or keys_B is None:
        return x
    keep = functools.partial(jax.random.bernoulli, p=1.0 - rate, shape=x.shape[1:])
    mask = jax.vmap(lambda key: keep(jax.random.fold_in(key, salt)))(keys_B)
    return jnp.where(mask, x / (1.0 - rate), 0).astype(x.dtype)


def pool(frames_BxSxD: jax.Array, weight_BxS: jax.Array) -> jax.Array:
    """Mean over frames weighted by their share of valid samples -> [B, D] float32; zeros without any valid one."""
    share = weight_BxS / jnp.maximum(weight_BxS.sum(1, keepdims=True), 1e-6)
    return jnp.einsum("bsd,bs->bd", frames_BxSxD.astype(jnp.float32), share)
