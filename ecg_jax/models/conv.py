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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAST = ("NWC", "WIO", "NWC")  # channels last
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
        # With records and positions as one axis XLA-CPU reads the signal as it lies for the kernel's gradient.
        return (x_BxTxC.reshape(-1, channels) @ w_KxCxD[0]).reshape(*x_BxTxC.shape[:2], out_channels)
    if impl == "auto":
        batch, length = x_BxTxC.shape[:2]
        dtype = str(x_BxTxC.dtype)
        impl, size = choose(length, taps, channels, out_channels, stride, jax.default_backend(), dtype, batch)
    if impl == "direct" and stride > 1:
        return lax.conv_general_dilated(x_BxTxC, w_KxCxD, (stride,), "SAME", dimension_numbers=LAST)
    if impl == "direct":
        return _slide(x_BxTxC, w_KxCxD, (taps // 2, taps // 2))
    if impl == "polyphase":
        return _folded(x_BxTxC, w_KxCxD, stride, 1)
    if impl == "blocked":
        return _folded(x_BxTxC, w_KxCxD, stride, size or default_block(out_channels))
    if impl == "patches":
        return _patches(x_BxTxC, w_KxCxD, stride)
    block = narrow_block(out_channels)
    size = size or default_window(folding(x_BxTxC.shape[1], taps, stride, block).taps)
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


class Folding(NamedTuple):
    """How `block * stride` neighbouring samples become the channels of one row, and how rows then meet the taps.

    Rows start at sample 0, not at the first zero of the padding: then folding is a reshape, zeros are whole rows,
    and the kernel is shifted instead. A copy of the signal would cost more than the few zeros in the kernel.
    """

    taps: int  # of the kernel over rows
    shift: int  # zeros in front of the kernel, in samples
    before: int  # rows of zeros before the signal
    blocks: int  # rows out


def folding(length: int, taps: int, stride: int, block: int) -> Folding:
    """The folding of a convolution of `taps` over `length` samples that makes `block` outputs at once."""
    out, zeros, _ = same_padding(length, taps, stride)
    n = block * stride
    before = -(-zeros // n)
    shift = before * n - zeros
    return Folding(-(-(shift + (block - 1) * stride + taps) // n), shift, before, -(-out // block))


def _fold(x_BxTxC: jax.Array, samples: int) -> jax.Array:
    """`samples` neighbouring samples folded into channels; zeros after the signal where they do not divide it."""
    batch, length, channels = x_BxTxC.shape
    rows = -(-length // samples)
    if rows * samples > length:
        x_BxTxC = jnp.pad(x_BxTxC, ((0, 0), (0, rows * samples - length), (0, 0)))
    return x_BxTxC.reshape(batch, rows, samples * channels)


def _fold_kernel(w_KxCxD: jax.Array, stride: int, block: int, folded: Folding) -> jax.Array:
    """The kernel over rows, [Q, block * stride * C, block * D]: banded where `block` is above 1."""
    taps, channels, out_channels = w_KxCxD.shape
    n, q = block * stride, folded.taps
    # Output i of a block reads samples shift + i * stride + tap of its rows: one shifted copy of the kernel each.
    places = [folded.shift + i * stride for i in range(block)]
    shifted = [jnp.pad(w_KxCxD, ((at, q * n - taps - at), (0, 0), (0, 0))) for at in places]
    return jnp.stack(shifted, axis=2).reshape(q, n * channels, block * out_channels)


def _folded(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, block: int) -> jax.Array:
    """The polyphase and blocked formulations: reshape time into channels, convolve with a banded kernel."""
    folded = folding(x_BxTxC.shape[1], w_KxCxD.shape[0], stride, block)
    w, x = _fold_kernel(w_KxCxD, stride, block, folded), _fold(x_BxTxC, block * stride)
    zeros = folded.before, folded.blocks + folded.taps - 1 - folded.before - x.shape[1]
    y = _slide(x, w, zeros)
    return y.reshape(y.shape[0], -1, w_KxCxD.shape[2])[:, : -(-x_BxTxC.shape[1] // stride)]


def _slide(x_BxTxC: jax.Array, w_QxCxD: jax.Array, zeros: tuple[int, int]) -> jax.Array:
    """Convolution of stride 1 with (before, after) zeros, by XLA; on CPU in the shapes that it does best."""
    if jax.default_backend() == "cpu":
        return _slide_cpu(x_BxTxC, w_QxCxD, zeros)
    return lax.conv_general_dilated(x_BxTxC, w_QxCxD, (1,), (zeros,), dimension_numbers=LAST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _slide_cpu(x_BxTxC: jax.Array, w_QxCxD: jax.Array, zeros: tuple[int, int]) -> jax.Array:
    """As an image of height 1, which XLA-CPU convolves up to 1.8 times faster than a signal."""
    image = lax.conv_general_dilated(
        x_BxTxC[:, None], w_QxCxD[None], (1, 1), ((0, 0), zeros), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return image[:, 0]


def _slide_forward(x_BxTxC, w_QxCxD, zeros):
    return _slide_cpu(x_BxTxC, w_QxCxD, zeros), (x_BxTxC, w_QxCxD)


def _slide_backward(zeros, kept, g_BxUxD):
    x_BxTxC, w_QxCxD = kept
    q = len(w_QxCxD)
    # What is before the cotangent when the kernel, turned round, slides over it; and what must follow it.
    before = q - 1 - zeros[0]
    turned = before, q - 1 - before + x_BxTxC.shape[1] - g_BxUxD.shape[1]
    dx_BxTxC = _slide_cpu(g_BxUxD, w_QxCxD[::-1].transpose(0, 2, 1), turned)
    # The kernel's gradient slides one signal over the other with records as channels, for which XLA transposes the
    # first of them. Let that be the smaller one.
    slide = functools.partial(lax.conv_general_dilated, window_strides=(1,), dimension_numbers=("CWN", "IWO", "NWC"))
    if x_BxTxC.shape[2] <= g_BxUxD.shape[2]:
        dw_QxCxD = slide(x_BxTxC, g_BxUxD, padding=(zeros,)).transpose(1, 0, 2)
    else:
        dw_QxCxD = slide(g_BxUxD, x_BxTxC, padding=(turned,))[:, ::-1].transpose(1, 2, 0)
    return dx_BxTxC, dw_QxCxD


_slide_cpu.defvjp(_slide_forward, _slide_backward)


def _patches(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int) -> jax.Array:
    """Shifted copies of the folded signal side by side and one product with the kernel as a matrix."""
    folded = folding(x_BxTxC.shape[1], w_KxCxD.shape[0], stride, 1)
    w_QxCxD, x = _fold_kernel(w_KxCxD, stride, 1, folded), _fold(x_BxTxC, stride)
    x = _rows(x, 1, folded.before, folded.blocks + folded.taps - 1)
    x = jnp.concatenate([x[:, tap : tap + folded.blocks] for tap in range(folded.taps)], axis=2)
    return x @ w_QxCxD.reshape(-1, w_QxCxD.shape[2])


def _rows(x: jax.Array, axis: int, before: int, rows: int) -> jax.Array:
    """`rows` rows: `before` of zeros, those of `x`, zeros or a cut at the end."""
    zeros = [(0, 0, 0)] * x.ndim
    zeros[axis] = before, rows - before - x.shape[axis], 0
    return lax.pad(x, jnp.zeros((), x.dtype), zeros)


def _spectral(x_BxTxC: jax.Array, w_KxCxD: jax.Array, stride: int, size: int, block: int) -> jax.Array:
    """The spectral formulation: folding, windows, `_bilinear`, windows put back together.

    Time leads inside, because then windows are slices of one transposed copy and both transforms and all products are
    plain matrix products without another transposition. Records come before windows, so that the merged axis is still
    split over devices by record.
    """
    batch, length, out_channels = x_BxTxC.shape[0], x_BxTxC.shape[1], w_KxCxD.shape[2]
    folded = folding(length, w_KxCxD.shape[0], stride, block)
    w_QxCxD = _fold_kernel(w_KxCxD.astype(jnp.float32), stride, block, folded)
    q = folded.taps
    if size < q:
        raise ValueError(f"a spectral window of {size} is shorter than {q} folded taps")
    step = size - q + 1  # outputs of a window
    windows, tail = -(-folded.blocks // step), -(-(q - 1) // step)
    x = _rows(_fold(x_BxTxC.astype(jnp.float32), block * stride), 1, folded.before, (windows + tail) * step)
    x = x.reshape(batch, windows + tail, step, -1).transpose(2, 0, 1, 3)  # [step, B, windows + tail, C]
    # A window is `step` samples and the first q - 1 of the windows that follow.
    pieces = [x[: size - i * step, :, i : i + windows] for i in range(tail + 1)]
    x_NxBxIxC = jnp.concatenate(pieces) if tail else x
    y_MxBxIxD = _bilinear(x_NxBxIxC, w_QxCxD)
    y = y_MxBxIxD.transpose(1, 2, 0, 3).reshape(batch, windows * step * block, out_channels)
    return y[:, : -(-length // stride)].astype(x_BxTxC.dtype)


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
def _bilinear(x_NxBxIxC: jax.Array, w_KxCxD: jax.Array) -> jax.Array:
    """Sliding product of each window with the kernel -> [M, B, I, D], M = N - K + 1; float32.

    The gradient is its own: transforms of signal and kernel are kept, that of the cotangent is made once for
    both gradients, so the three passes take R products each and no transform twice.
    """
    return _bilinear_forward(x_NxBxIxC, w_KxCxD)[0]


def _transform(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Product of a constant matrix with the leading axis of `x`."""
    return jnp.matmul(matrix, x.reshape(x.shape[0], -1), precision=lax.Precision.HIGHEST).reshape(-1, *x.shape[1:])


def _bilinear_forward(x_NxBxIxC, w_KxCxD):
    size, batch, windows, channels = x_NxBxIxC.shape
    back_RxM, forward_RxN, kernel_RxK = bilinear_matrices(size, w_KxCxD.shape[0])
    x_RxPxC = _transform(forward_RxN, x_NxBxIxC.reshape(size, batch * windows, channels))
    w_RxCxD = _transform(kernel_RxK, w_KxCxD)
    y_RxPxD = jnp.einsum("rpc,rcd->rpd", x_RxPxC, w_RxCxD)
    y_MxPxD = _transform(back_RxM.T.copy(), y_RxPxD)
    return y_MxPxD.reshape(-1, batch, windows, w_KxCxD.shape[2]), (x_RxPxC, w_RxCxD)


def _bilinear_backward(kept, cotangent_MxBxIxD):
    x_RxPxC, w_RxCxD = kept
    m, batch, windows, out_channels = cotangent_MxBxIxD.shape
    size = 2 * (x_RxPxC.shape[0] + 1) // 3
    back_RxM, forward_RxN, kernel_RxK = bilinear_matrices(size, size - m + 1)
    g_RxPxD = _transform(back_RxM, cotangent_MxBxIxD.reshape(m, batch * windows, out_channels))
    x_NxPxC = _transform(forward_RxN.T.copy(), jnp.einsum("rpd,rcd->rpc", g_RxPxD, w_RxCxD))
    w_KxCxD = _transform(kernel_RxK.T.copy(), jnp.einsum("rpc,rpd->rcd", x_RxPxC, g_RxPxD))
    return x_NxPxC.reshape(size, batch, windows, -1), w_KxCxD


_bilinear.defvjp(_bilinear_forward, _bilinear_backward)
