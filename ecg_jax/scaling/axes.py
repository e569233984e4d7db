"""How a panel looks: size, fonts, colours, and logarithmic axes with ticks one can read at any span.

Matplotlib's own log ticks leave an axis from 0.07 to 0.12 without a label; losses of one study span less
than a decade. Invariant: every axis carries at least two labelled ticks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ecg_jax.scaling import numbers

PANEL = (4.1, 2.75)  # inches; text then has its natural size on a telephone
RAMPS = {"N": ("#8fb8d8", "#0b3c66"), "D": ("#efb27a", "#8a3208")}  # small to large
INK, GREY = "#222222", "#8c8c8c"
STEPS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8.5),
)
FEW, MANY = 3, 7


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings for everything drawn inside."""
    import matplotlib

    settings = {
        "svg.fonttype": "none", "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5,
        "legend.fontsize": 8,
        "font.family": ["sans-serif"], "axes.edgecolor": GREY, "axes.linewidth": 0.7, "axes.labelcolor": INK,
        "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def new_figure(*, rows: int):
    """A figure of `rows` axes below each other that share x, and the axes."""
    from matplotlib.figure import Figure

    height = PANEL[1] * (1.0 + 0.85 * (rows - 1))
    figure = Figure(figsize=(PANEL[0], height))
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]
    margin = 0.42 / height
    figure.subplots_adjust(left=0.155, right=0.975, bottom=margin, top=1 - 0.46 / height, hspace=0.12)
    return figure, axes


def ramp(ends: Sequence[str], count: int) -> list[tuple[float, float, float]]:
    """`count` colours from the first to the second; the single one is the second."""
    a, b = (np.array([int(e[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0 for e in ends)
    return [tuple(a + (b - a) * (1.0 if count == 1 else i / (count - 1))) for i in range(count)]


def log_ticks(low: float, high: float) -> np.ndarray:
    """Round values inside [low, high]: few enough to read, at least three where the span allows it."""
    best = np.array([low, high])
    for digits in STEPS:
        decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = np.sort((10.0 ** decades[:, None] * np.array(digits)).ravel())
        ticks = ticks[(ticks >= low * (1 - 1e-9)) & (ticks <= high * (1 + 1e-9))]
        if FEW <= len(ticks) <= MANY:
            return ticks
        if len(ticks) > MANY:
            return ticks[:: int(np.ceil(len(ticks) / MANY))]
    span = high - low
    step = 10.0 ** np.floor(np.log10(span))
    for part in (1.0, 0.5, 0.2, 0.1):
        first = np.ceil(low / (step * part)) * step * part
        ticks = np.arange(first, high + 1e-9 * step, step * part)
        if len(ticks) >= FEW:
            return ticks[:: int(np.ceil(len(ticks) / MANY))]
    return best


def dress(ax, x: np.ndarray, y: np.ndarray, x_label: str, *, loss_on_x: bool = False, decades: bool = False) -> None:
    """Log-log axes around the data x and y (> 0), with ticks at the sizes themselves where those are few."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, values, wide in ((ax.xaxis, x, 0.04), (ax.yaxis, y, 0.06)):
        low, high = float(values.min()), float(values.max())
        room = max((high / low) ** wide, 1.005)
        low, high = low / room, high * room
        losses = axis is ax.yaxis or loss_on_x
        sizes = np.unique(values)
        ticks = log_ticks(low, high)
        if not losses and not decades and _apart(sizes, low, high):
            ticks = sizes
        axis.set_minor_locator(_fixed([]))
        axis.set_major_locator(_fixed(ticks))
        axis.set_ticklabels(_labels(ticks) if losses else [numbers.count(t) for t in ticks])
        (ax.set_ylim if axis is ax.yaxis else ax.set_xlim)(low, high)
    ax.grid(True, color="#e6e6e6", lw=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(length=2.5, width=0.6, pad=2.5)
    ax.set_xlabel(x_label, labelpad=2.0)


def _apart(sizes: np.ndarray, low: float, high: float) -> bool:
    """Whether labels at these sizes would not run into each other."""
    if not 2 <= len(sizes) <= 8:
        return False
    return bool(np.diff(np.log(sizes)).min() > 0.11 * np.log(high / low))


def _labels(ticks: np.ndarray) -> list[str]:
    """As many decimals as it takes to tell the ticks apart and show each one exactly."""
    for digits in range(2, 8):
        words = [f"{t:.{digits}g}" for t in ticks]
        if all(abs(float(w) - t) < 1e-6 * abs(t) + 1e-12 for w, t in zip(words, ticks, strict=True)):
            return words
    return [f"{t:.4g}" for t in ticks]


def _fixed(places):
    from matplotlib.ticker import FixedLocator

    return FixedLocator(list(places))
