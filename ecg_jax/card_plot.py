"""The audit of a data folder as one picture: amplitudes, quality bits, prevalence per split, fate of the records.

Draws what the card holds and computes nothing. Invariant: every panel states its numbers, so that the picture can be
read without the card.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.shards.review import BINS

INK, USUAL, QUIET = "#1c1c28", "#d9ead3", "#8a8a99"
SPLIT_COLOURS = {"train": "#3b6ea5", "val": "#e0a030", "test": "#b5483a"}
MOST_LABELS = 24


def draw_card(card: dict[str, Any], path: Path, dpi: int = 120) -> None:
    """Write four panels on `card` to `path` (PNG, SVG or PDF by its ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in card["tasks"] if any(card["known"][task].values())]
    figure = Figure(figsize=(12, 7.5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _amplitude(axes[0, 0], card)
    _quality(axes[0, 1], card)
    _prevalence(axes[1, 0], card, tasks[0] if tasks else None)
    _fate(axes[1, 1], card)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    figure.suptitle(f"{card['name']} {card['version']}: audit", color=INK, fontsize=13, x=0.01, ha="left")
    figure.savefig(path, dpi=dpi)


def _amplitude(axes: Any, card: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    summary = card["amplitude"]
    axes.set_title("amplitude of the records", loc="left", fontsize=10)
    if not summary["known"]:
        axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes)
        return
    counts = np.array(summary["histogram"])
    if summary["usual"]:
        axes.axvspan(*summary["usual"], color=USUAL, label="usual median of a data set")
    axes.stairs(counts, BINS, fill=True, color=SPLIT_COLOURS["train"])
    axes.axvline(summary["median"], color=INK, lw=1.2, label=f"median {summary['median']:.3g}")
    seen = np.flatnonzero(counts)
    axes.set(xscale="log", xlim=(BINS[seen[0]] / 1.5, BINS[seen[-1] + 1] * 1.5), ylabel="records")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"peak to peak, median over leads ({summary['unit']})")
    axes.legend(fontsize=8, frameon=False)


def _quality(axes: Any, card: dict[str, Any]) -> None:
    axes.set_title("records with a quality bit", loc="left", fontsize=10)
    total = max(1, card["counts"]["written"])
    bits = sorted(((name, sum(per.values())) for name, per in card["quality"].items()), key=lambda bit: bit[1])
    _bars(axes, [name.replace("_", " ") for name, _ in bits], [n for _, n in bits], total)


def _fate(axes: Any, card: dict[str, Any]) -> None:
    axes.set_title("what became of the recordings", loc="left", fontsize=10)
    counts = card["accounting"]
    rows = [("written", counts["written"])]
    rows += [(f"quarantined: {reason}", n) for reason, n in sorted(card["refused"].items(), key=lambda r: -r[1])]
    rows += [(f"skipped: {reason}", n) for reason, n in counts["skipped"].items()]
    _bars(axes, [name[:44] for name, _ in rows][::-1], [n for _, n in rows][::-1], max(1, counts["listed"]))


def _bars(axes: Any, names: list[str], counts: list[int], total: int) -> None:
    if not names:
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.barh(names, counts, color=SPLIT_COLOURS["train"], height=0.7)
    axes.set_xlim(0, max(1, *counts) * 1.3)
    for y, n in enumerate(counts):
        axes.text(n, y, f" {n:,} ({n / total:.1%})", va="center", fontsize=8, color=INK)


def _prevalence(axes: Any, card: dict[str, Any], task: str | None) -> None:
    if task is None:
        axes.set_title("no labels", loc="left", fontsize=10)
        axes.set_axis_off()
        return
    names = card["tasks"][task]
    shares = {
        split: np.array([np.nan if v is None else v for v in values])
        for split, values in card["prevalence"][task].items()
    }
    mean = np.nanmax(np.stack([np.nan_to_num(v) for v in shares.values()]), axis=0)
    order = np.argsort(-mean, kind="stable")[:MOST_LABELS]
    more = f" (the {MOST_LABELS} commonest of {len(names)})" if len(names) > MOST_LABELS else ""
    axes.set_title(f"share of positives, task {task}{more}", loc="left", fontsize=10)
    for shift, (split, values) in enumerate(shares.items()):
        at = np.arange(len(order)) + (shift - (len(shares) - 1) / 2) * 0.8 / len(shares)
        axes.bar(at, 100 * values[order], width=0.8 / len(shares), color=SPLIT_COLOURS[split], label=split)
    axes.set_xticks(range(len(order)), [names[i] for i in order], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("%")
    axes.legend(fontsize=8, frameon=False)
