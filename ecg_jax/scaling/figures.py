"""Figures of a fit as SVG: each law with its bands, OOD loss against ID loss, loss against step.

A drawing is one or more panels. Panels go into the report one by one, so that they can stand side by side
on a desk and below each other on a telephone; the file in `figures/` holds them side by side.

Matplotlib is imported when something is drawn. Nothing is computed here but the curves' points (and bands,
from the draws). Invariant: the same results give the same bytes (no dates, fixed ids).
"""

from collections.abc import Sequence

import numpy as np

from ecg_jax.progress import track
from ecg_jax.scaling import forest, intervals, numbers
from ecg_jax.scaling.analysis import LawResult
from ecg_jax.scaling.axes import GREY, RAMPS, dress, new_figure, ramp, style
from ecg_jax.scaling.drawing import Drawing, side_by_side, svg, unique
from ecg_jax.scaling.multipliers import Multiplier
from ecg_jax.scaling.trajectories import Trajectory

LINES = 6  # at most so many levels of the other variable are drawn as curves
CURVE = 60  # points per curve
FAMILY = ("#1f5a8a", "#b3541e", "#3f7d4f", "#7a4b8c", "#8a6d1f", "#555555")
MARKS = ("o", "s", "^", "D", "v", "P")


def draw_all(
    results: Sequence[LawResult], runs: Sequence[Trajectory], compared: Sequence[Multiplier] = (), *, level: float
) -> list[Drawing]:
    """All figures of a fit. Sets without an identified law are drawn as points without curves."""
    names: set[str] = set()
    out = []
    with style():
        for result in track(results, "figures"):
            out.append(_law(result, unique("law", result, names), level))
        out += forest.draw(compared, names, level)
        out += _transfers(results, names)
        out += _trajectories(runs, names)
    return out


# ------------------------------------------------------------------------------------------ a law


def _law(result: LawResult, name: str, level: float) -> Drawing:
    runs = result.runs
    variables = result.law.variables if result.law else ("N", "D")
    variables = tuple(v for v in ("N", "D", "L") if v in variables and len(_values(runs, v)) > 1) or ("N",)
    panels = []
    for v in variables:
        figure, axes = new_figure(rows=2 if result.identified else 1)
        _law_panel(axes[0], result, v, level, reference=0.0)
        if result.identified:
            known = runs.known_floor()
            reference = result.fit.parameters.get("E", 0.0) if known is None else known
            _law_panel(axes[1], result, v, level, reference=reference)
            axes[1].set_ylabel(f"excess over {'fitted E' if known is None else 'known floor'} (nats)")
            axes[0].set_xlabel("")
            axes[1].legend().remove()
        axes[0].set_ylabel("loss (nats)")
        panels.append(svg(figure, f"{name}-{v}"))
    if result.identified:
        figure, (ax,) = new_figure(rows=1)
        _residual_panel(ax, result)
        panels.append(svg(figure, f"{name}-residuals"))
    curves = "no curves, as no law is identified"
    if result.identified:
        curves = (
            f"lines are the fitted law, bands its {100 * level:g} % interval"
            if result.draws
            else "lines are the fitted law"
        )
    caption = f"Points are runs; {curves}. Open points did not converge." if not runs.converged.all() else (
        f"Points are runs; {curves}."
    )  # fmt: skip
    return Drawing(name, "law", caption, tuple(panels), side_by_side(panels), result)


def _residual_panel(ax, result: LawResult) -> None:
    """ln L - ln L_fitted of every run over the fitted loss, one colour per size."""
    runs = result.runs
    fitted = result.fit.predict(result.log_x)
    miss = 100.0 * np.log(runs.loss / fitted)
    sizes = runs.sizes
    colours = dict(zip(sizes.tolist(), ramp(RAMPS["N"], len(sizes)), strict=True))
    from matplotlib.ticker import AutoLocator, ScalarFormatter

    dress(ax, fitted, np.array([1.0, 2.0]), "fitted loss (nats)", loss_on_x=True)
    reach = max(1.15 * float(np.abs(miss).max()), 1e-6)
    ax.set_yscale("linear")
    ax.yaxis.set_major_locator(AutoLocator())
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.set_ylim(-reach, reach)
    ax.axhline(0.0, color=GREY, lw=0.8)
    for n in sizes:
        for ok in (True, False):
            rows = (runs.n_params == n) & (runs.converged == ok)
            colour = colours[float(n)]
            ax.plot(fitted[rows], miss[rows], "o", ms=4, mfc=colour if ok else "white", mec=colour, zorder=3)
    ax.set_ylabel("residual (% of the loss)")
    if len(sizes) > 1:
        ax.set_title(f"darker: larger N, {numbers.count(sizes[0])} to {numbers.count(sizes[-1])}", loc="left", pad=8)


def _values(runs, v: str) -> np.ndarray:
    return {"N": runs.n_params, "D": runs.n_records, "L": runs.id_loss}[v]


def _law_panel(ax, result: LawResult, v: str, level: float, *, reference: float) -> None:
    """Loss (less `reference`) against v, one curve and one colour per value of the other variable."""
    runs = result.runs
    other = "D" if v == "N" else "N"
    x, fixed = _values(runs, v), _values(runs, other)
    shown = np.unique(fixed)
    if len(shown) > LINES:
        shown = shown[np.linspace(0, len(shown) - 1, LINES).round().astype(int)]
    nearest = np.abs(np.log(fixed)[:, None] - np.log(shown)).argmin(axis=1)
    colours = ramp(RAMPS[other], len(shown))
    y = runs.loss - reference
    seen = [y[y > 0]]
    for i, (value, colour) in enumerate(zip(shown, colours, strict=True)):
        mine = (nearest == i) & (y > 0)
        label = f"{other} {numbers.count(value)}"
        for ok in (True, False):
            rows = mine & (runs.converged == ok)
            face = colour if ok else "white"
            ax.plot(x[rows], y[rows], "o", ms=4, mfc=face, mec=colour, mew=1.0, zorder=3, clip_on=False)
        if not result.identified:
            ax.plot([], [], "o", ms=4, color=colour, label=label)
            continue
        grid = np.geomspace(x.min(), x.max(), CURVE)
        columns = {v: np.log(grid), other: np.full(CURVE, np.log(value))}
        columns["U"] = columns.get("D")
        at = np.stack([columns[u] for u in result.law.variables], axis=1)
        curve = result.fit.predict(at) - reference
        ax.plot(grid, np.where(curve > 0, curve, np.nan), color=colour, lw=1.3, label=label, zorder=2)
        if result.draws is not None:
            low, high = (end - reference for end in intervals.band(result.fit, result.draws, at, level=level))
            floor = 0.5 * seen[0].min() if len(seen[0]) else 1e-9
            ax.fill_between(grid, np.maximum(low, floor), np.maximum(high, floor), color=colour, alpha=0.13, lw=0)
        seen.append(curve[curve > 0])
    spread = np.concatenate(seen)
    dress(
        ax,
        x,
        spread if len(spread) else np.array([1.0]),
        {"N": "parameters N", "D": "records D", "L": "ID loss (nats)"}[v],
        loss_on_x=v == "L",
    )
    if len(np.unique(fixed)) > 1:
        ax.legend(
            ncols=3,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


# --------------------------------------------------------------------------------- OOD against ID


def _transfers(results: Sequence[LawResult], names: set[str]) -> list[Drawing]:
    """OOD loss against ID loss of the same run; one panel per OOD task, one figure per paradigm (the units
    differ)."""
    at_home = {(r.runs.key.family, r.runs.key.metric): r.runs for r in results if r.runs.key.domain == "id"}
    figures: dict[tuple, dict[tuple, list]] = {}
    for r in results:
        key = r.runs.key
        home = at_home.get((key.family, key.metric)) or at_home.get((key.family, "loss"))
        if key.domain == "id" or home is None:
            continue
        loss_of = dict(zip(home.runs, home.loss, strict=True))
        rows = [i for i, run in enumerate(r.runs.runs) if run in loss_of]
        if len(rows) > 2:
            pairs = np.array([loss_of[r.runs.runs[i]] for i in rows]), r.runs.loss[rows]
            figures.setdefault((key.paradigm, key.input), {}).setdefault(key.measured, []).append((key, *pairs))
    out = []
    for (paradigm, given), tasks in figures.items():
        panels = []
        name = unique("transfer", (paradigm, given), names)
        for i, families in enumerate(tasks.values()):
            figure, (ax,) = new_figure(rows=1)
            for j, (key, x, y) in enumerate(families):
                colour, mark = FAMILY[j % len(FAMILY)], MARKS[j % len(MARKS)]
                ax.plot(
                    x,
                    y,
                    mark,
                    ms=4.5,
                    mfc=colour,
                    mec="white",
                    mew=0.5,
                    label=key.architecture,
                    clip_on=False,
                )
            all_x, all_y = (np.concatenate([f[k] for f in families]) for k in (1, 2))
            dress(ax, all_x, all_y, "ID loss (nats)", loss_on_x=True)
            ax.set_ylabel("OOD loss (nats)")
            key = families[0][0]
            ax.set_title(f"{key.dataset} {key.task}, {key.domain.replace('_', ' ')}", loc="left", pad=20)
            ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), handlelength=0.8, borderaxespad=0.2)
            panels.append(svg(figure, f"{name}-{i}"))
        caption = f"OOD loss against ID loss of the same run, paradigm {paradigm}, input {given}. Every point is a run."
        out.append(Drawing(name, "transfer", caption, tuple(panels), side_by_side(panels)))
    return out


# ------------------------------------------------------------------------------ loss against step


def _trajectories(runs: Sequence[Trajectory], names: set[str]) -> list[Drawing]:
    """One figure per family: training loss (thin) and validation loss of every run against step."""
    out = []
    for family in dict.fromkeys(t.family for t in runs):
        mine = [t for t in runs if t.family == family]
        sizes = sorted({t.n_params for t in mine})
        panels = []
        name = unique("trajectory", family, names)
        data = sorted({t.n_records for t in mine})
        colours = dict(zip(data, ramp(RAMPS["D"], len(data)), strict=True))
        if len(sizes) > LINES:
            sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, LINES).round().astype(int)]
        for size in sizes:
            figure, (ax,) = new_figure(rows=1)
            steps, losses = [], []
            for t in (t for t in mine if t.n_params == size):
                for curve, width, alpha in ((t.train, 0.7, 0.45), (t.validation, 1.4, 1.0)):
                    if curve:
                        x, y = _unbroken(curve)
                        ax.plot(np.maximum(x, 1), y, color=colours[t.n_records], lw=width, alpha=alpha)
                        steps.append(np.maximum(x, 1))
                        losses.append(y)
            for d in sorted({t.n_records for t in mine if t.n_params == size}):
                ax.plot([], [], color=colours[d], lw=1.4, label=f"D {numbers.count(d)}")
            if not steps:
                continue
            x, y = np.concatenate(steps), np.concatenate(losses)
            dress(ax, x[np.isfinite(x)], y[np.isfinite(y)], "step", decades=True)
            ax.set_ylabel("loss (nats)")
            ax.set_title(f"N {numbers.count(size)}", loc="left", pad=20)
            ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), handlelength=1.2, borderaxespad=0.2)
            panels.append(svg(figure, f"{name}-{size:.0f}"))
        caption = f"{' / '.join(family)}: validation loss (thick) and training loss (thin) of every run against step."
        out.append(Drawing(name, "trajectory", caption, tuple(panels), side_by_side(panels)))
    return out


def _unbroken(curve: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses; a NaN where a run went back to an earlier state (a decay from its best), so that
    the line breaks."""
    x, y = np.array(curve).T
    back = np.flatnonzero(np.diff(x) < 0) + 1
    return np.insert(x, back, np.nan), np.insert(y, back, np.nan)
