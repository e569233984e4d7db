"""Filter chains at 100 Hz: what they are, and how one is run.

A chain is a zero-phase Butterworth filter as `scipy.signal.sosfiltfilt` runs it, with an odd extension. Where the
chain allows it (a high-pass of order 1 and, at will, a low-pass, on a signal longer than the extension), the same sums
are made in another way, five times as fast. Run forwards and backwards, the filter answers to an impulse with h[k],
which soon is nothing but c * a^|k|: the low-pass has died away, the high-pass goes on. So the signal is cut into blocks
of `BLOCK` samples; a block hears itself and its two neighbours through three matrices, and the rest of the recording
through two numbers, the sums of what came before and of what comes after, weighted by a^k. What lies beyond the
extension, which SciPy cares for in another way, has a weight of a^300 = 3e-6.

Invariant: what comes out does not depend on the machine, the number of threads, or what else is computed at the same
time. No sum within a matrix product is rounded (how: see `resample`). Of a signal of 1 (22 bits), extended (times 3),
resampled (2.3), less its first sample (2) and extended again (3), a sample is less than 42; the absolute numbers of a
column of the matrices sum to less than 2.7 (24 bits) and the weights to less than 47 (20 bits): all of it less than
2^53 steps of the grid. All else is done sample by sample, or along the time axis of one lead.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from scipy import signal as dsp

from ecg_jax.records.resample import RATE, magic, on_grid, product

LENGTH = 1000
LSB = 1e-3  # mV, or SD of a unit-less signal
BLOCK = 48  # samples
LEFT_OUT = 2e-5  # of an impulse: what may lie beyond the neighbours of a block and yet not be c * a^|k|
MATRIX_BITS, WEIGHT_BITS = 24, 20  # of the grids
TOGETHER = 4  # recordings of 10 s filtered at once: 1 MB, what a core's cache holds


@dataclass(frozen=True)
class Chain:
    """A filter chain. Orders and Hz of Butterworth designs, each run forwards and backwards at 100 Hz.

    `pad` is the length of the odd extension in samples at 100 Hz (less where the record is shorter).
    """

    name: str
    highpass: tuple[int, float] | None = None
    lowpass: tuple[int, float] | None = None
    bandpass: tuple[int, float, float] | None = None
    pad: int = 0
    version: int = 1  # of everything else in the preparation that changes stored values

    def describe(self) -> dict:
        """All that decides the stored samples, JSON-able."""
        return asdict(self) | {
            "rate": RATE,
            "length": LENGTH,
            "lsb": LSB,
            "steps": ["strip", "repair", "resample", "filter", "cut", "round"],
            "resample": "polyphase, kaiser 5.0, odd extension",
            "filter": "butterworth, zero phase, odd extension",
        }

    def digest(self) -> str:
        """32 hex digits of `describe`."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


CHAINS: dict[str, Chain] = {
    # 300 samples are 12 time constants of the high-pass: its start-up has died away before the first sample.
    "default": Chain("default", highpass=(1, 0.67), lowpass=(5, 40.0), pad=300),
    # What HeartLang's codebook was trained on: one band-pass, SciPy's default extension for its 11
    # coefficients.
    "heartlang": Chain("heartlang", bandpass=(5, 0.67, 40.0), pad=33),
    "none": Chain("none"),
}


@dataclass(frozen=True)
class _Kernel:
    """h[k] of a chain, in the form that the module's head tells. What a block's outputs get from ..."""

    decay: float  # a
    near: tuple[np.ndarray, np.ndarray, np.ndarray]  # [BLOCK, BLOCK] ... the block before, itself, the block after
    far: np.ndarray  # [2, BLOCK] ... the weighted sums of all that lies before, and behind, those
    weights: np.ndarray  # [BLOCK, 2] of a block's samples in these sums


def run(chain: Chain, parts: Sequence[np.ndarray], grids: Sequence[float | np.ndarray]) -> np.ndarray:
    """Filter recordings [12, n] of one length at 100 Hz, with their grids (`resample.grid_of`) -> float64 [B, 12, n].

    Equal to `sosfiltfilt` to 2e-5 of a recording's largest step (measured: 0.4 uV for one of 20 mV).
    """
    sections = _sections(chain)
    if sections is None:
        return np.stack(parts)
    kernel, n = _kernel(chain), parts[0].shape[1]
    if kernel is None or n <= chain.pad:
        return dsp.sosfiltfilt(sections, np.stack(parts), axis=2, padtype="odd", padlen=min(chain.pad, n - 1))
    out = np.empty((len(parts), *parts[0].shape))
    size = max(1, TOGETHER * LENGTH // n)
    for first in range(0, len(parts), size):
        some = slice(first, first + size)
        _by_blocks(kernel, parts[some], grids[some], chain.pad, out[some])
    return out


def _by_blocks(
    kernel: _Kernel, parts: Sequence[np.ndarray], grids: Sequence[float | np.ndarray], pad: int, out: np.ndarray
) -> None:
    leads, n = parts[0].shape
    blocks = -(-n // BLOCK) + 2  # one more before and behind
    end = BLOCK + n
    wide = np.empty((len(parts), leads, blocks * BLOCK))
    for x, part, grid in zip(wide, parts, grids, strict=True):
        shift = magic(grid)
        inner = x[:, BLOCK:end]
        np.add(part, shift, out=inner)
        # The first sample goes too: the filter has none of a constant, its rounded numbers have a millionth.
        np.subtract(inner, inner[:, :1].copy(), out=inner)
    wide = wide.reshape(len(parts) * leads, -1)
    x = wide[:, BLOCK:end]
    right = wide.shape[1] - end  # BLOCK to 2 * BLOCK - 1 samples of the extension
    last = 2 * x[:, -1:]
    np.negative(x[:, BLOCK:0:-1], out=wide[:, :BLOCK])
    np.subtract(last, x[:, -2 : -right - 2 : -1], out=wide[:, end:])
    # All leads are one long row of blocks; what the first and the last block of a lead get is not used.
    flat = wide.reshape(-1, BLOCK)
    sums = (flat @ kernel.weights).reshape(len(wide), blocks, 2)
    # Before block b lies what was before block b - 1, further off by a block, and block b - 2; behind it likewise.
    rest = np.zeros((len(wide), blocks, 2))
    before, behind = rest[:, 1:-1, 0], rest[:, -2:0:-1, 1]
    before[:, 1:], behind[:, 1:] = sums[:, : blocks - 3, 0], sums[:, : 2 - blocks : -1, 1]
    left_weights, right_weights = _beyond(kernel.decay, BLOCK, pad), _beyond(kernel.decay, right, pad)
    before[:, 0] = -(x[:, BLOCK + 1 : pad + 1] @ left_weights)
    mirrored = np.ascontiguousarray(x[:, -right - 2 : -pad - 2 : -1])
    behind[:, 0] = last[:, 0] * right_weights.sum() - mirrored @ right_weights
    step = [1.0, -(kernel.decay**BLOCK)]
    for far in (before, behind):
        far[:] = dsp.lfilter([1.0], step, far, axis=1)
    for some, grid in zip(rest.reshape(len(parts), leads, -1), grids, strict=True):
        some += magic(grid)
        some -= magic(grid)
    y = np.empty_like(flat)
    inner = y[1:-1]
    product(flat[1:-1], kernel.near[1], inner, add=False)
    product(flat[:-2], kernel.near[0], inner, add=True)
    product(flat[2:], kernel.near[2], inner, add=True)
    product(rest.reshape(-1, 2)[1:-1], kernel.far, inner, add=True)
    out[:] = y.reshape(len(parts), leads, -1)[:, :, BLOCK:end]


@lru_cache(maxsize=128)
def _beyond(decay: float, skip: int, pad: int) -> np.ndarray:
    """Weights of samples `skip` + 1 to `pad` of an extension; the last stands for all that would follow it."""
    weights = decay ** np.arange(pad - skip)
    weights[-1] /= 1 - decay
    return on_grid(weights, WEIGHT_BITS)


@lru_cache(maxsize=8)
def _sections(chain: Chain) -> np.ndarray | None:
    parts = []
    if chain.highpass:
        parts.append(dsp.butter(chain.highpass[0], chain.highpass[1], "highpass", fs=RATE, output="sos"))
    if chain.lowpass:
        parts.append(dsp.butter(chain.lowpass[0], chain.lowpass[1], "lowpass", fs=RATE, output="sos"))
    if chain.bandpass:
        order, low, high = chain.bandpass
        parts.append(dsp.butter(order, [low, high], "bandpass", fs=RATE, output="sos"))
    return np.concatenate(parts) if parts else None


@lru_cache(maxsize=8)
def _kernel(chain: Chain) -> _Kernel | None:
    """None where the chain's impulse response is not of that form, or its extension too short."""
    if chain.highpass is None or chain.highpass[0] != 1 or chain.bandpass or chain.pad < 3 * BLOCK:
        return None
    sections = _sections(chain)
    decay = -float(sections[0, 4])
    middle = 32 * BLOCK
    impulse = np.zeros(2 * middle + 1)
    impulse[middle] = 1.0
    h = dsp.sosfilt(sections, dsp.sosfilt(sections, impulse)[::-1])[::-1][middle:]
    c = h[3 * BLOCK] / decay ** (3 * BLOCK)  # where the low-pass is gone, and the high-pass not yet
    if np.abs(h - c * decay ** np.arange(len(h)))[BLOCK + 1 :].max() > LEFT_OUT or decay**chain.pad > 1e-5:
        return None
    place = np.arange(BLOCK)
    apart = place - place[:, None]  # from a sample (row) to an output (column) of the same block
    near = tuple(on_grid(h[np.abs(apart + shift)], MATRIX_BITS) for shift in (BLOCK, 0, -BLOCK))
    tail = c * decay ** (BLOCK + 1 + place)
    far = on_grid(np.stack([tail, tail[::-1]]), MATRIX_BITS)
    weights = on_grid(np.stack([decay ** place[::-1], decay**place], axis=1), WEIGHT_BITS)
    if 2 * np.abs(h).sum() - abs(h[0]) > 2.7 or 1 / (1 - decay) > 47:
        return None
    return _Kernel(decay, near, far, weights)
