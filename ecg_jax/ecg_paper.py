"""Draws a 12-lead ECG on ECG paper, true to scale: 25 mm/s and 10 mm/mV, 1 mm and 5 mm grid.

Layout as on a clinical print: three rows of four leads, 2.5 s each, and lead II over the whole 10 s as a rhythm strip.
Does not filter or scale: what is drawn is what is stored. The invariant is the scale: one figure millimetre is one
paper millimetre at any resolution.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecg_jax.records.leads import LEADS

MM = 1 / 25.4  # inch
SPEED, GAIN = 25.0, 10.0  # mm per second, mm per millivolt
ROW, MARGIN, TOP = 30.0, 8.0, 16.0  # mm: height of a lead's row, paper border, space for the heading
PULSE = 7.0  # mm of paper before each row, for the 1 mV calibration pulse
COLUMNS = (("I", "II", "III"), ("aVR", "aVL", "aVF"), ("V1", "V2", "V3"), ("V4", "V5", "V6"))
MINOR, MAJOR, INK = "#f7d9d6", "#e8a39c", "#1c1c28"


@dataclass(frozen=True)
class Tracing:
    """One ECG to draw: signal `[T, 12]` in `unit` (mV, or z), rate in Hz, the observed span (start, length)."""

    signal: np.ndarray
    rate: float
    unit: str
    title: str
    notes: str = ""
    valid: tuple[int, int] | None = None


def draw(tracing: Tracing, path: Path, dpi: int = 200) -> None:
    """Write the tracing to `path` (PNG, SVG or PDF by its ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = 10.0
    width, height = PULSE + seconds * SPEED + 2 * MARGIN, 4 * ROW + TOP + 2 * MARGIN
    figure = Figure(figsize=(width * MM, height * MM), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    _grid(axes, width, height)
    start, length = tracing.valid or (0, len(tracing.signal))
    seen = np.zeros(len(tracing.signal), bool)
    seen[start : start + length] = True
    signal = np.where(seen[:, None], tracing.signal, np.nan)  # padding is not an isoelectric line
    for row in range(3):
        y = height - TOP - MARGIN - (row + 0.5) * ROW
        _calibrate(axes, y)
        for column, names in enumerate(COLUMNS):
            _lead(axes, signal, tracing.rate, names[row], y, column * seconds / 4, seconds / 4)
    y = height - TOP - MARGIN - 3.5 * ROW
    _calibrate(axes, y)
    _lead(axes, signal, tracing.rate, "II", y, 0.0, seconds)
    text = {"color": INK, "va": "top", "family": "DejaVu Sans"}
    axes.text(MARGIN, height - 5, tracing.title, size=10, weight="bold", **text)
    axes.text(MARGIN, height - 11, tracing.notes, size=7.5, **text)
    per_unit = "mV" if tracing.unit == "mV" else "unit (z: signal without physical unit)"
    scale = f"{SPEED:g} mm/s   {GAIN:g} mm/{per_unit}   {tracing.rate:g} Hz"
    axes.text(width - MARGIN, height - 5, scale, size=7.5, ha="right", **text)
    figure.savefig(path, dpi=dpi)


def _grid(axes, width: float, height: float) -> None:
    left, bottom, right, top = MARGIN, MARGIN, width - MARGIN, height - TOP
    for step, color, line in ((1.0, MINOR, 0.35), (5.0, MAJOR, 0.6)):
        axes.vlines(np.arange(left, right + 0.01, step), bottom, top, color=color, linewidth=line, zorder=1)
        axes.hlines(np.arange(bottom, top + 0.01, step), left, right, color=color, linewidth=line, zorder=1)


def _calibrate(axes, y: float) -> None:
    x = MARGIN + np.array([0.5, 1, 1, 6, 6, 6.5])
    axes.plot(x, y + GAIN * np.array([0, 0, 1, 1, 0, 0]), color=INK, linewidth=0.7, zorder=3)


def _lead(axes, signal: np.ndarray, rate: float, name: str, y: float, start: float, seconds: float) -> None:
    first, last = round(start * rate), round((start + seconds) * rate) + 1
    piece = signal[first:last, LEADS.index(name)]
    x = MARGIN + PULSE + SPEED * (start + np.arange(len(piece)) / rate)
    axes.plot(x, y + GAIN * piece, color=INK, linewidth=0.75, solid_joinstyle="round", zorder=3)
    axes.text(x[0] + 1.2 if len(x) else MARGIN, y + 11.5, name, size=8, color=INK, weight="bold", zorder=4)
    if start:
        axes.vlines(MARGIN + PULSE + SPEED * start, y - 3, y + 3, color=INK, linewidth=0.5, zorder=3)
