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

CONV_IMPLS = ("auto", "direct", "polyphase", "blocked")
NORM_EPS = 1e-5
HIDDEN = -1e30  # logit of a token that may not be attended to
BATCH_NORM_MOMENTUM = 0.9
TRUNCATED_STD = 0.87962566  # standard deviation of a unit normal cut at +-2
# Output channels after folding at which XLA's CPU convolution runs best (measured, AVX-512).
FOLDED_WIDTH = 40


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


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """(positions out = ceil(length / stride), zeros before, zeros after), as TensorFlow's and XLA's SAME."""
    out = -(-length // stride)
    total = max((out - 1) * stride + kernel - length, 0)
    return out, total // 2, total - total // 2


def conv1d(
    x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int = 1, impl: str = "auto", block: int | None = None
) -> jax.Array:
    """SAME-padded 1-D convolution without bias -> [B, ceil(T / stride), D]; odd K only.

    All formulations mean the same and agree to float rounding, gradients included:
      direct     XLA's convolution.
      polyphase  `stride` neighbouring samples folded into channels, then a stride-1 convolution of
                 ceil(K / stride) taps: XLA-CPU's strided gradients are slow, its unstrided ones are not.
      blocked    polyphase with `block` outputs made at once, so that narrow layers get channels enough to
                 fill vector units; `block * stride` samples and `block` outputs are folded into channels and
                 the kernel becomes a banded matrix, at the price of multiplying with the zeros beside it.
      auto       by backend and shape: see `choose`.
    """
    taps = w_KxCxD.shape[0]
    if taps % 2 == 0:
        raise ValueError(f"conv1d needs an odd kernel, got {taps} taps")
    if taps == stride == 1:
        return x_BxTxC @ w_KxCxD[0]
    if impl == "auto":
        impl, block = choose(x_BxTxC.shape[1], *w_KxCxD.shape, stride, jax.default_backend())
    if impl == "direct":
        return lax.conv_general_dilated(x_BxTxC, w_KxCxD, (stride,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    if impl == "polyphase":
        return _folded(x_BxTxC, w_KxCxD, stride, 1)
    if impl == "blocked":
        return _folded(x_BxTxC, w_KxCxD, stride, block or default_block(w_KxCxD.shape[2]))
    raise ValueError(f"unknown conv1d formulation {impl!r}; known: {', '.join(CONV_IMPLS)}")


def choose(length: int, taps: int, channels: int, out: int, stride: int, backend: str) -> tuple[str, int]:
    """(formulation, block) for a convolution of `taps` x `channels` -> `out` over `length` positions.

    CPU, measured at kernels 9 and 17: narrow outputs fold (1.3-4 times faster than direct), strided ones go
    polyphase, wide unstrided ones stay direct. Other backends: direct, until somebody has measured there.
    """
    if backend != "cpu" or taps == 1:
        return "direct", 1
    block = min(default_block(out), 1 << max(-(-length // stride) - 1, 0).bit_length())
    if block > 1:
        return "blocked", block
    return ("polyphase", 1) if stride > 1 else ("direct", 1)


def default_block(out: int) -> int:
    """Power of two that brings `out` channels nearest to FOLDED_WIDTH when multiplied."""
    return 2 ** max(round(math.log2(FOLDED_WIDTH / out)), 0)


def _folded(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, block: int) -> jax.Array:
    """The polyphase and blocked formulations: reshape time into channels, convolve with a banded kernel."""
    batch, length, channels = x_BxTxC.shape
    taps, _, out_channels = w_KxCxD.shape
    out, before, _ = same_padding(length, taps, stride)
    n = block * stride  # input samples folded together
    blocks = -(-out // block)
    q = -(-((block - 1) * stride + taps) // n)  # folded taps
    total = (blocks + q - 1) * n
    x = jnp.pad(x_BxTxC, ((0, 0), (before, max(total - before - length, 0)), (0, 0)))[:, :total]
    x = x.reshape(batch, blocks + q - 1, n * channels)
    # Output i of a block reads samples i * stride + tap of its window: one shifted copy of the kernel each.
    shifted = [jnp.pad(w_KxCxD, ((i * stride, q * n - taps - i * stride), (0, 0), (0, 0))) for i in range(block)]
    w = jnp.stack(shifted, axis=2).reshape(q, n * channels, block * out_channels)
    y = lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return y.reshape(batch, blocks * block, out_channels)[:, :out]


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
    mean_BxC, square_BxC = _moments(x_BxTxC, weight_BxT)
    groups = group_count(x_BxTxC.shape[2], most)
    mean_BxC, square_BxC = _over_groups(mean_BxC, groups), _over_groups(square_BxC, groups)
    variance_BxC = jnp.maximum(square_BxC - mean_BxC**2, 0.0)
    gain_BxC = scale_C * lax.rsqrt(variance_BxC + NORM_EPS)
    shift_BxC = bias_C - mean_BxC * gain_BxC
    return (x_BxTxC * gain_BxC[:, None] + shift_BxC[:, None]).astype(x_BxTxC.dtype)


def _moments(x_BxTxC: jax.Array, weight_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted means over time of x and of its square, [B, C] each, float32."""
    share_BxTx1 = (weight_BxT / jnp.maximum(weight_BxT.sum(1, keepdims=True), 1e-6))[:, :, None]
    x = x_BxTxC.astype(jnp.float32)
    weighted = x * share_BxTx1
    return weighted.sum(1), (weighted * x).sum(1)


def _over_groups(x_BxC: jax.Array, groups: int) -> jax.Array:
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


def attention(
    q_BxSxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, seen_BxS: jax.Array, impl: str = "auto"
) -> jax.Array:
    """Softmax attention to the tokens that are `seen` (at least one per record) -> [B, S, H, K]; softmax in float32.

    "xla" is `jax.nn.dot_product_attention`; "matmul" says the same in products laid out for XLA-CPU, where it
    takes two thirds of the time of gradients; "auto" is the latter on CPU.
    """
    if impl == "auto":
        impl = "matmul" if jax.default_backend() == "cpu" else "xla"
    if impl == "xla":
        return jax.nn.dot_product_attention(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, mask=seen_BxS[:, None, None, :])
    if impl != "matmul":
        raise ValueError(f"unknown attention formulation {impl!r}; known: auto, xla, matmul")
    q_BxHxSxK = (q_BxSxHxK * q_BxSxHxK.shape[3] ** -0.5).transpose(0, 2, 1, 3)
    logits = (q_BxHxSxK @ k_BxSxHxK.transpose(0, 2, 3, 1)).astype(jnp.float32)
    logits = logits + jnp.where(seen_BxS, 0.0, HIDDEN)[:, None, None, :]
    share = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    total_BxHxSx1 = share.sum(-1, keepdims=True)
    out = (share.astype(v_BxSxHxK.dtype) @ v_BxSxHxK.transpose(0, 2, 1, 3)) / total_BxHxSx1
    return out.astype(v_BxSxHxK.dtype).transpose(0, 2, 1, 3)


def max_pool(x_BxTxC: jax.Array, occupied_BxT: jax.Array, stride: int) -> jax.Array:
    """Maximum over each run of `stride` positions, unoccupied ones left out; 0 where none is occupied.

    T must be a multiple of `stride`. A reshape and a maximum: XLA-CPU's windowed maximum has a slow gradient.
    """
    if stride == 1:
        return x_BxTxC
    batch, length, channels = x_BxTxC.shape
    lowest = jnp.finfo(x_BxTxC.dtype).min
    x = jnp.where(occupied_BxT[:, :, None], x_BxTxC, lowest)
    x = x.reshape(batch, length // stride, stride, channels).max(2)
    return jnp.where(occupied_BxT.reshape(batch, -1, stride).any(2)[:, :, None], x, 0)


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
