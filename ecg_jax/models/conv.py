"""1-D convolution in several formulations that mean the same, and the choice between them.

Each formulation is convolution without bias, SAME padding, odd kernels; they agree to float rounding, gradients
included, whatever the lengths, widths and strides. Which one is fast depends on backend and shape, so the choice
is measured (`tools/bench_conv.py` writes `conv_table.json`). What it does not do: depthwise, dilated or grouped
convolution. Invariant: a record of the batch never reaches another one.

Shapes: B records, T positions in time, C channels in, D channels out, K taps; inside the spectral formulation
N samples of a window, M outputs of it, I windows of a record, R real products, P = I x B.
"""

import functools
import json
import math
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CONV_IMPLS = ("auto", "direct", "polyphase", "blocked", "patches", "spectral")
# Output channels after folding at which XLA's CPU convolution runs best (measured, AVX-512).
FOLDED_WIDTH = 40
# Fewer output channels than these make products too small; the spectral formulation then folds time, too.
NARROW = 24
# How far a shape may be from a measured one, as a factor, for the measurement to count.
NEAR = {"batch": 4.0, "length": 2.0, "channels": 1.5, "out": 1.5}


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """(positions out = ceil(length / stride), zeros before, zeros after), as TensorFlow's and XLA's SAME."""
    out = -(-length // stride)
    total = max((out - 1) * stride + kernel - length, 0)
    return out, total // 2, total - total // 2


def conv1d(
    x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int = 1, impl: str = "auto", size: int | None = None
) -> jax.Array:
    """SAME-padded 1-D convolution without bias -> [B, ceil(T / stride), D] in the dtype of `x`; odd K only.

    All formulations mean the same and agree to float rounding, gradients included:
      direct     XLA's convolution.
      polyphase  `stride` neighbouring samples folded into channels, then a stride-1 convolution of
                 ceil(K / stride) taps: XLA-CPU's strided gradients are slow, its unstrided ones are not.
      blocked    polyphase with `size` outputs made at once, so that narrow layers get channels enough to
                 fill vector units; `size * stride` samples and `size` outputs are folded into channels and
                 the kernel becomes a banded matrix, at the price of multiplying with the zeros beside it.
      patches    the K shifted copies of the signal side by side, then one matrix product.
      spectral   polyphase, then overlap-save: windows of `size` folded samples, a real DFT as a product with a
                 constant matrix, one product per frequency, the inverse. In float32 whatever the dtypes. About
                 2 instead of K multiplications per output and channel pair, three passes over memory more.
      auto       by backend, shape and dtype: see `choose`.

    Raises ValueError for an even kernel and an unknown formulation.
    """
    taps, channels, out_channels = w_KxCxD.shape
    if taps % 2 == 0:
        raise ValueError(f"conv1d needs an odd kernel, got {taps} taps")
    if impl not in CONV_IMPLS:
        raise ValueError(f"unknown conv1d formulation {impl!r}; known: {', '.join(CONV_IMPLS)}")
    if taps == stride == 1:
        return x_BxTxC @ w_KxCxD[0]
    if impl == "auto":
        batch, length = x_BxTxC.shape[:2]
        dtype = str(x_BxTxC.dtype)
        impl, size = choose(length, taps, channels, out_channels, stride, jax.default_backend(), dtype, batch)
    if impl == "direct":
        return lax.conv_general_dilated(x_BxTxC, w_KxCxD, (stride,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    if impl == "polyphase":
        return _folded(x_BxTxC, w_KxCxD, stride, 1)
    if impl == "blocked":
        return _folded(x_BxTxC, w_KxCxD, stride, size or default_block(out_channels))
    if impl == "patches":
        return _patches(x_BxTxC, w_KxCxD, stride)
    block = narrow_block(out_channels)
    size = size or default_window(folded_taps(taps, stride, block))
    return _spectral(x_BxTxC, w_KxCxD, stride, size, block)


def choose(
    length: int,
    taps: int,
    channels: int,
    out: int,
    stride: int,
    backend: str,
    dtype: str = "float32",
    batch: int = 32,
) -> tuple[str, int | None]:
    """(formulation, size) for a convolution of `taps` x `channels` -> `out` over `batch` x `length` positions.

    The winner at the nearest measured shape of the same backend, dtype, taps and stride, if one is near in every
    other respect (`NEAR`). Otherwise on CPU the rule that holds over all shapes tried: narrow outputs fold (1.3-4
    times faster than direct), strided ones go polyphase, wide unstrided ones stay direct. Backends without a
    measurement: direct.
    """
    if taps == 1:
        return "direct", None
    here = {"batch": batch, "length": length, "channels": channels, "out": out}
    best, nearest = None, math.inf
    for row in measured():
        if (row["backend"], row["dtype"], row["taps"], row["stride"]) != (backend, dtype, taps, stride):
            continue
        apart = [abs(math.log(here[name] / row[name])) / math.log(factor) for name, factor in NEAR.items()]
        if max(apart) <= 1.0 and sum(apart) < nearest:
            best, nearest = (row["impl"], row["size"]), sum(apart)
    if best:
        return best
    if backend != "cpu":
        return "direct", None
    block = min(default_block(out), 1 << max(-(-length // stride) - 1, 0).bit_length())
    if block > 1:
        return "blocked", block
    return ("polyphase", None) if stride > 1 else ("direct", None)


@functools.cache
def measured() -> tuple[dict, ...]:
    """The rows of `conv_table.json`: a shape each, with the fastest formulation and its size."""
    text = resources.files("ecg_jax.models").joinpath("conv_table.json").read_text()
    return tuple(json.loads(text)["rows"])


def default_block(out: int) -> int:
    """Power of two that brings `out` channels nearest to FOLDED_WIDTH when multiplied."""
    return 2 ** max(round(math.log2(FOLDED_WIDTH / out)), 0)


def narrow_block(out: int) -> int:
    """Outputs of the spectral formulation folded together, so that its products have `NARROW` channels or more."""
    return 2 ** max(math.ceil(math.log2(NARROW / out)), 0)


def default_window(taps: int) -> int:
    """Samples of a spectral window for `taps` folded taps: three windows' overlaps, so two in three are outputs."""
    return max(3 * (taps - 1), 2)


def _fold(x_BxTxC: jax.Array, before: int, samples: int, rows: int) -> jax.Array:
    """`before` zeros, the signal, zeros or a cut to `rows` whole rows of `samples` folded into channels."""
    batch, length, channels = x_BxTxC.shape
    after = max(rows * samples - before - length, 0)
    x = jnp.pad(x_BxTxC, ((0, 0), (before, after), (0, 0)))[:, : rows * samples]
    return x.reshape(batch, rows, samples * channels)


def _fold_kernel(w_KxCxD: jax.Array, stride: int, block: int) -> jax.Array:
    """The kernel over folded samples, [Q, block * stride * C, block * D]: banded where `block` is above 1."""
    taps, channels, out_channels = w_KxCxD.shape
    n = block * stride
    q = folded_taps(taps, stride, block)
    # Output i of a block reads samples i * stride + tap of its window: one shifted copy of the kernel each.
    shifted = [jnp.pad(w_KxCxD, ((i * stride, q * n - taps - i * stride), (0, 0), (0, 0))) for i in range(block)]
    return jnp.stack(shifted, axis=2).reshape(q, n * channels, block * out_channels)


def folded_taps(taps: int, stride: int, block: int) -> int:
    """Taps of the kernel once `block * stride` samples are folded into channels."""
    return -(-((block - 1) * stride + taps) // (block * stride))


def _folded(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, block: int) -> jax.Array:
    """The polyphase and blocked formulations: reshape time into channels, convolve with a banded kernel."""
    out, before, _ = same_padding(x_BxTxC.shape[1], w_KxCxD.shape[0], stride)
    blocks = -(-out // block)
    w = _fold_kernel(w_KxCxD, stride, block)
    x = _fold(x_BxTxC, before, block * stride, blocks + w.shape[0] - 1)
    y = lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return y.reshape(y.shape[0], -1, w_KxCxD.shape[2])[:, :out]


def _patches(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int) -> jax.Array:
    """Shifted copies of the folded signal side by side and one product with the kernel as a matrix."""
    out, before, _ = same_padding(x_BxTxC.shape[1], w_KxCxD.shape[0], stride)
    w_QxCxD = _fold_kernel(w_KxCxD, stride, 1)
    q = w_QxCxD.shape[0]
    x = _fold(x_BxTxC, before, stride, out + q - 1)
    x = jnp.concatenate([x[:, tap : tap + out] for tap in range(q)], axis=2)
    return x @ w_QxCxD.reshape(-1, w_QxCxD.shape[2])


def _spectral(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, size: int, block: int) -> jax.Array:
    """The spectral formulation: folding, windows, `_bilinear`, windows put back together.

    Time leads inside, because then windows are whole slices of one transposed copy and both transforms and all
    products are plain matrix products without another transposition.
    """
    batch = x_BxTxC.shape[0]
    out, before, _ = same_padding(x_BxTxC.shape[1], w_KxCxD.shape[0], stride)
    w_QxCxD = _fold_kernel(w_KxCxD.astype(jnp.float32), stride, block)
    q = w_QxCxD.shape[0]
    if size < q:
        raise ValueError(f"a spectral window of {size} is shorter than {q} folded taps")
    step = size - q + 1  # outputs of a window
    windows, tail = -(-out // (step * block)), -(-(q - 1) // step)
    x = _fold(x_BxTxC.astype(jnp.float32), before, block * stride, (windows + tail) * step)
    x = x.reshape(batch, windows + tail, step, -1).transpose(2, 1, 0, 3)  # [step, windows + tail, B, C]
    # A window is `step` samples and the first q - 1 of the windows that follow.
    pieces = [x[: size - i * step, i : i + windows] for i in range(tail + 1)]
    x_NxIxBxC = jnp.concatenate(pieces) if tail else x
    y_MxIxBxD = _bilinear(x_NxIxBxC, w_QxCxD)
    y = y_MxIxBxD.transpose(2, 1, 0, 3).reshape(batch, windows * step * block, w_KxCxD.shape[2])
    return y[:, :out].astype(x_BxTxC.dtype)


@functools.cache
def bilinear_matrices(size: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices (A [R, M], F [R, N], G [R, K]), float32, with which y = A^T ((G w) * (F x)) is the sliding product.

    y[m] = sum_k w[k] x[m + k] for m < M = size - taps + 1: the real DFT over `size` samples with Gauss's three
    real products for each complex one, and the sums that these need folded into the matrices. R is about 3/2 of
    `size`. Rows are DFT frequencies in order, so all is as well conditioned as the DFT itself.
    """
    m = size - taps + 1
    forward, kernel, back = [], [], []
    for frequency in range(size // 2 + 1):
        angle = 2 * np.pi * frequency * np.arange(size) / size
        cos, sin = np.cos(angle), np.sin(angle)
        if frequency == 0 or 2 * frequency == size:
            forward.append(cos)
            kernel.append(cos[:taps])
            back.append(cos[:m] / size)
            continue
        # X = cos - i sin of the signal, W = cos + i sin of the kernel (conjugate: a sliding product, not a
        # convolution). X W = (p - r) + i (p + q), p = (Xr + Xi) Wr, q = Xr (Wi - Wr), r = Xi (Wr + Wi).
        forward += [cos - sin, cos, -sin]
        kernel += [cos[:taps], sin[:taps] - cos[:taps], cos[:taps] + sin[:taps]]
        real, imaginary = 2 * cos[:m] / size, -2 * sin[:m] / size
        back += [real + imaginary, imaginary, -real]
    return tuple(np.asarray(rows, np.float32) for rows in (back, forward, kernel))


@jax.custom_vjp
def _bilinear(x_NxIxBxC: jax.Array, w_KxCxD: jax.Array) -> jax.Array:
    """Sliding product of each window with the kernel -> [M, I, B, D], M = N - K + 1; float32.

    The gradient is its own: transforms of signal and kernel are kept, that of the cotangent is made once for
    both gradients, so the three passes take R products each and no transform twice.
    """
    return _bilinear_forward(x_NxIxBxC, w_KxCxD)[0]


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Product of a constant matrix with the leading axis of `x`."""
    return jnp.matmul(matrix, x.reshape(x.shape[0], -1), precision=lax.Precision.HIGHEST).reshape(-1, *x.shape[1:])


def _bilinear_forward(x_NxIxBxC, w_KxCxD):
    size, windows, batch, channels = x_NxIxBxC.shape
    back_RxM, forward_RxN, kernel_RxK = bilinear_matrices(size, w_KxCxD.shape[0])
    x_RxPxC = _transform(forward_RxN, x_NxIxBxC.reshape(size, windows * batch, channels))
    w_RxCxD = _transform(kernel_RxK, w_KxCxD)
    y_RxPxD = jnp.einsum("rpc,rcd->rpd", x_RxPxC, w_RxCxD)
    y_MxPxD = _transform(back_RxM.T.copy(), y_RxPxD)
    return y_MxPxD.reshape(-1, windows, batch, w_KxCxD.shape[2]), (x_RxPxC, w_RxCxD)


def _bilinear_backward(kept, cotangent_MxIxBxD):
    x_RxPxC, w_RxCxD = kept
    m, windows, batch, out_channels = cotangent_MxIxBxD.shape
    size = 2 * (x_RxPxC.shape[0] + 1) // 3
    back_RxM, forward_RxN, kernel_RxK = bilinear_matrices(size, size - m + 1)
    g_RxPxD = _transform(back_RxM, cotangent_MxIxBxD.reshape(m, windows * batch, out_channels))
    x_NxPxC = _transform(forward_RxN.T.copy(), jnp.einsum("rpd,rcd->rpc", g_RxPxD, w_RxCxD))
    w_KxCxD = _transform(kernel_RxK.T.copy(), jnp.einsum("rpc,rpd->rcd", x_RxPxC, g_RxPxD))
    return x_NxPxC.reshape(size, windows, batch, -1), w_KxCxD


_bilinear.defvjp(_bilinear_forward, _bilinear_backward)
