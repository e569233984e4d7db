"""PR, QRS and QT of `records.delineate` beside the annotations of LUDB's cardiologists.

    ecg-jax convert ludb --source ludb --out data
    python tools/score_intervals.py --source ludb --data data/ludb

A recording's annotated interval is the median over the leads of the median over their beats (4 leads, 2 beats at
least). Thresholds were set on recordings of odd number, not on the others. Errors in milliseconds.
"""

import argparse
from pathlib import Path

import numpy as np
import wfdb

from ecg_jax.records import delineate
from ecg_jax.shards import catalog, tables

LEADS = ("i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6")
MS = 2  # a sample of LUDB


def annotated(record: Path) -> list[float]:
    """[PR, QRS, QT] in ms, NaN where not annotated."""
    leads: list[list[list[int]]] = [[], [], []]
    for lead in LEADS:
        found: list[list[int]] = [[], [], []]
        waves = _waves(wfdb.rdann(str(record), lead))
        for i, (kind, begin, end) in enumerate(waves):
            if kind != "N":
                continue
            found[1].append(end - begin)
            if i and waves[i - 1][0] == "p":
                found[0].append(begin - waves[i - 1][1])
            if i + 1 < len(waves) and waves[i + 1][0] == "t":
                found[2].append(waves[i + 1][2] - begin)
        for kept, values in zip(leads, found, strict=True):
            if len(values) >= 2:
                kept.append(np.median(values))
    return [MS * float(np.median(kept)) if len(kept) >= 4 else np.nan for kept in leads]


def _waves(annotation: wfdb.Annotation) -> list[tuple[str, int, int]]:
    """(kind, begin, end) of the waves that have both ends."""
    out, begin, kind = [], None, None
    for sample, symbol in zip(annotation.sample, annotation.symbol, strict=True):
        if symbol == "(":
            begin, kind = sample, None
        elif symbol == ")":
            if begin is not None and kind is not None:
                out.append((kind, begin, sample))
            begin = kind = None
        else:
            kind = symbol
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="LUDB as published: data/1.hea, data/1.i, ...")
    parser.add_argument("--data", type=Path, required=True, help="what `ecg-jax convert ludb` made of it")
    args = parser.parse_args()
    ids, want, got = [], [], []
    for split in catalog.open_folder(args.data).splits:
        table = tables.load([args.data], split, "rhythm")
        for i, name in enumerate(table.record_ids):
            ids.append(int(name))
            want.append(annotated(args.source / "data" / name))
            got.append(delineate.intervals(table.signal[i], table.rpeaks[i], *table.valid[i]))
    odd = np.array(ids) % 2 == 1
    print("| | annotated | measured | without annotation | median error | median size | 90 % within | r |")
    print("|---|---|---|---|---|---|---|---|")
    for half, rows in (("odd, tuned on", odd), ("even", ~odd)):
        for k, name in enumerate(("PR", "QRS", "QT")):
            theirs, ours = np.array(want)[rows, k], np.array(got)[rows, k]
            both = np.isfinite(theirs) & np.isfinite(ours)
            error = (ours - theirs)[both]
            cells = np.isfinite(theirs).sum(), both.sum(), (np.isfinite(ours) & ~np.isfinite(theirs)).sum()
            size = np.abs(error)
            cells += f"{np.median(error):+.0f}", f"{np.median(size):.0f}", f"{np.quantile(size, 0.9):.0f}"
            cells += (f"{np.corrcoef(ours[both], theirs[both])[0, 1]:.2f}",)
            print(f"| {name}, {half} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
