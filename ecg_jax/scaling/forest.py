"""Multipliers as a forest plot: every ratio with its interval on one logarithmic axis, a line at one.

One panel per kind of ratio. An unbounded end is an arrow to the panel's edge; ratios of laws that are not
identified are not drawn. Matplotlib is imported when something is drawn.
"""

from collections.abc import Sequence

from ecg_jax.scaling import numbers
from ecg_jax.scaling.axes import GREY, INK, log_ticks
from ecg_jax.scaling.drawing import Drawing, side_by_side, svg, unique
from ecg_jax.scaling.multipliers import Multiplier

KINDS = {
    "M_N": "parameters at equal loss",
    "M_D": "records at equal loss",
    "M_C": "compute at equal loss",
    "rho_N": "ratio of alphas",
    "rho_D": "ratio of betas",
    "rho_T": "ratio of kappas",
}
ROW = 0.40  # inches
WIDEST = 1e3  # ratios and ends further from one than this are drawn as arrows


def draw(found: Sequence[Multiplier], names: set[str], level: float) -> list[Drawing]:
    """One drawing with a panel per kind that has a ratio to show; none without any."""
    shown = {k: [m for m in found if m.kind == k and m.identified and m.value is not None] for k in KINDS}
    name, panels = unique("forest", ("multipliers",), names), []
    for kind, rows in shown.items():
        if rows:
            panels.append(svg(_panel(kind, rows), f"{name}-{kind}"))
    if not panels:
        return []
    caption = f"Points are ratios, lines their {100 * level:g} % intervals, arrows unbounded ends; 1 is no difference."
    return [Drawing(name, "forest", caption, tuple(panels), side_by_side(panels))]


def _panel(kind: str, rows: Sequence[Multiplier]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    height = ROW * len(rows) + 0.85
    figure = Figure(figsize=(4.1, height))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.40 / height, top=1 - 0.32 / height)
    ends = [e for m in rows for e in (*m.interval, m.value) if e is not None]
    ends = [e for e in ends if 1 / WIDEST < e < WIDEST] + [1.0]
    low, high = min(ends) / 1.15, max(ends) * 1.15
    alike = len({f.split(" / ")[2] for m in rows for f in (m.numerator, m.denominator)}) == 1
    for i, m in enumerate(rows):
        y = -i
        left, right = (low if m.interval[0] is None else max(m.interval[0], low)), m.interval[1]
        right = high if right is None else min(right, high)
        sure = m.interval[0] is not None and m.interval[1] is not None and (m.interval[0] > 1 or m.interval[1] < 1)
        colour = "#0b3c66" if sure else GREY
        ax.plot([left, right], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        for end, at, mark in ((m.interval[0], low, "<"), (m.interval[1], high, ">")):
            if end is None or not low <= end <= high:
                ax.plot([at], [y], mark, color=colour, ms=5, clip_on=False)
        ax.plot([min(max(m.value, low), high)], [y], "o", color=colour, ms=5)
        ax.text(0.0, y + 0.20, f"{m.task}: {_short(m.numerator, alike)} over {_short(m.denominator, alike)}",
                transform=ax.get_yaxis_transform(), fontsize=7.6, color=INK, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.axvline(1.0, color=INK, lw=0.8)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(-len(rows) + 0.45, 0.75)
    ticks = log_ticks(low, high)
    ax.xaxis.set_minor_locator(FixedLocator([]))
    ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.set_xticklabels([numbers.short(float(t), 2) for t in ticks])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    symbol, v = kind.split("_")
    ax.set_title(f"{'M' if symbol == 'M' else 'rho'} {v}, {KINDS[kind]}", loc="left", pad=4)
    return figure


def _short(family: str, alike: bool) -> str:
    """A family's name, without its input where all share one."""
    parts = family.split(" / ")
    return " ".join(parts[:2] if alike else parts)
