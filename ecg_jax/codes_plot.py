"""A picture of what codes mean: the beats that bear the most used ones, as waveforms.

Reads a codes folder and the data folder that it lies in; trains and encodes nothing. Invariant: what is drawn are
stored samples of real (or simulated) beats, averaged, never the decoder's idea of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.records import windows
from ecg_jax.records.leads import LEADS

SHOWN = 32
RECORDS = 2048  # at most: enough for the mean of a frequent code
TOGETHER = 256


def read_card(codes: Path) -> dict[str, Any]:
    """The card of a codes folder. Raises DataError where it does not fit its data folder any more."""
    from ecg_jax.shards.catalog import open_folder
    from ecg_jax.shards.codes import open_codes

    folder = open_codes(open_folder(Path(codes).parent), Path(codes).name)
    return {**folder.card, "path": str(folder.path)}


def card_lines(card: dict[str, Any]) -> list[str]:
    """The card for a reader: whose codes, of which beats, how many are used."""
    book, beats = card["codebook"], card["beats"]
    lines = [
        f"{card['data']['name']} {card['data']['version']}   {card['path']}",
        f"  codebook {book['id']} ({book['info']['source']}), {book['config']['codes']:,} codes of "
        f"{book['config']['code_dim']}; {beats['mode']} beats of {beats['detector']}",
    ]
    for split, found in card["splits"].items():
        lines.append(
            f"  {split:5} {found['records']:>9,} records  {found['tokens']:>11,} codes  {found['used']:>6,} codes used"
            f"  perplexity {found['perplexity']:.1f}"
        )
    return lines


def draw(codes: Path, path: Path, *, split: str = "train") -> dict[str, Any]:
    """Draw the 32 most used codes of the folder `codes` to the image `path`; returns {"beats", "used", "path"}.

    Each panel: mean and standard deviation of up to all beats of the code within the first 2,048 records of `split`,
    its share of all beats, and its leads. Only beats outside the outer half second count, as in training. Raises
    DataError for a folder without codes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number, total, square, lead = statistics(codes, split)
    counted = int(number.sum())
    if not counted:
        raise DataError(f"{codes}: no beat of {split} has a code; nothing to draw")
    order = np.argsort(-number, kind="stable")[:SHOWN]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 8, sharex=True)
    time = (np.arange(windows.WINDOW) - windows.HALF) / 100
    for axis in axes.flat[len(order) :]:
        axis.axis("off")
    for axis, code in zip(axes.flat, order, strict=False):
        n = number[code]
        axis.tick_params(labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
        if not n:
            axis.axis("off")
            continue
        mean = total[code] / n
        spread = np.sqrt(np.maximum(square[code] / n - mean**2, 0))
        axis.fill_between(time, mean - spread, mean + spread, color="0.85", lw=0)
        axis.plot(time, mean, color="#b3123a", lw=1.1)
        common = np.argsort(-lead[code])[:3]
        names = " ".join(f"{LEADS[i]} {lead[code, i] / n:.0%}" for i in common if lead[code, i])
        axis.set_title(f"{code}: {n / counted:.1%}\n{names}", fontsize=7)
    used = int((number > 0).sum())
    figure.suptitle(
        f"The {SHOWN} most used of {used:,} codes in use: mean and standard deviation of their beats "
        f"({counted:,} beats of {split}), mV (or z) over seconds from the R peak",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    return {"beats": counted, "used": used, "path": str(path)}


def statistics(codes: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each code: beats [N], sum and sum of squares of their samples [N, 96] in mV (or z), beats by lead [N, 12]."""
    import jax

    from ecg_jax.models import beats, inputs
    from ecg_jax.shards import tables
    from ecg_jax.shards.catalog import open_folder
    from ecg_jax.shards.codes import open_codes

    folder = open_codes(open_folder(codes.parent), codes.name)
    table = tables.load([codes.parent], split, "", codes=[codes.name])
    number = np.zeros(folder.n_codes, np.int64)
    total, square = np.zeros((2, folder.n_codes, windows.WINDOW))
    lead_count = np.zeros((folder.n_codes, len(LEADS)), np.int64)

    @jax.jit
    def cut(signal, valid, rpeaks):
        x, _, _ = inputs.to_input(signal, valid, scale="mv", crop=signal.shape[1])
        slots = beats.slots(rpeaks, valid, windows.SLOTS, mode=folder.mode)
        return beats.tokens(x, slots), slots.lead, slots.inner

    for first in range(0, min(len(table), RECORDS), TOGETHER):
        at = slice(first, first + TOGETHER)
        tokens, lead, inner = jax.device_get(cut(table.signal[at], table.valid[at], table.rpeaks[at]))
        own = inner & (table.codes[at] != windows.NO_CODE)
        code = table.codes[at][own]
        np.add.at(number, code, 1)
        np.add.at(total, code, tokens[own])
        np.add.at(square, code, tokens[own].astype(np.float64) ** 2)
        np.add.at(lead_count, (code, lead[own]), 1)
    return number, total, square, lead_count
