"""The audit of a whole data set: what became of every input record, copies, gain, quality, prevalence; in words, too.

Works on the columns that the shards left beside them and reads no signal. It names what is odd and corrects nothing.
Invariants: every input record is counted once, as written, quarantined or skipped; the result is a function of the
columns alone.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ecg_jax.records.audit import Quality, names
from ecg_jax.records.signature import signatures
from ecg_jax.shards import schema
from ecg_jax.shards.writer import Columns

# Median of a data set's amplitudes (`meta["amplitude"]`) in mV: sets of healthy and sick adults lie within these.
USUAL_AMPLITUDE = (0.75, 1.35)
GAINS = (2.0, 5.0, 10.0, 100.0, 1000.0)  # errors that were met in published files
STRANGE = 4.0  # a record so many times above or below its own set's median is named
NOTABLE = 0.05  # share of records from which a quality bit is worth a line
BINS = np.geomspace(1e-4, 1e3, 57)  # of the amplitude histogram, eight a decade
LISTED = 20  # record ids named in the card
FAULTS = Quality(~(Quality.DERIVED | Quality.STRIPPED) & sum(Quality))


# ------------------------------------------------------------------------------------- what became of each record


def accounting(
    rows: Columns,
    shard: np.ndarray,
    keep: np.ndarray,
    states: Sequence[dict[str, Any]],
    skipped: dict[str, int],
) -> dict[str, Any]:
    """Input recordings: listed = written + quarantined + skipped. A recording is written if one of its windows is.

    rows, shard [n] and keep [n] are of all prepared windows; `states` the shards' sidecars. Raises RuntimeError where
    the three do not add up, which would be a bug of ours.
    """
    recording = np.stack([shard.astype(np.int64), rows.recording.astype(np.int64)], 1)
    prepared = np.unique(recording, axis=0)
    written = np.unique(recording[keep], axis=0)
    refused = sum(not line.get("window") for state in states for line in state["refused"])
    items = sum(state["items"] for state in states)
    quarantined = refused + len(prepared) - len(written)
    if len(written) + quarantined != items:
        raise RuntimeError(f"{items} recordings, {len(written)} written and {quarantined} quarantined")
    return {
        "listed": items + sum(skipped.values()),
        "written": len(written),
        "quarantined": quarantined,
        "skipped": dict(sorted(skipped.items())),
        "records": int(keep.sum()),
        "windows_quarantined": sum(bool(line.get("window")) for state in states for line in state["refused"]),
    }


# --------------------------------------------------------------------------------------------------------- copies


_SILENT = np.frombuffer(signatures(np.zeros((1, 12, schema.LENGTH)))[0], "<u8")  # says nothing about whose it is


def duplicates(rows: Columns) -> dict[int, int]:
    """row of a copy -> row that it is a copy of.

    Rows with one half of the signature in common (`records.signature.same_content`, taken transitively) are
    one content. Of one content, the smallest record id stays, with all records of its group; those of other
    groups go.
    """
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while (up := parent.setdefault(i, i)) != i:
            parent[i] = i = parent[up]
        return i

    for half in (0, 1):
        values = rows.signature[:, half]
        order = np.argsort(values, kind="stable")
        values = values[order]
        start = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.zeros(0, int)
        length = np.diff(np.append(start, len(values)))
        several = (length > 1) & (values[start] != _SILENT[half])
        for at, n in zip(start[several].tolist(), length[several].tolist(), strict=True):
            for i in order[at + 1 : at + n].tolist():
                parent[root(i)] = root(int(order[at]))
    contents: dict[int, list[int]] = {}
    for i in sorted(parent):
        contents.setdefault(root(i), []).append(i)
    found: dict[int, int] = {}
    for members in contents.values():
        members.sort(key=lambda i: rows.record_id[i])
        first = members[0]
        found |= {i: first for i in members[1:] if rows.group[i] != rows.group[first]}
    return found


def known_elsewhere(rows: Columns, signatures: np.ndarray) -> np.ndarray:
    """int64 [n]: row of `signatures` (uint64 [m, 2], of another data set) with the content of each record, -1: none."""
    found = np.full(len(rows.group), -1)
    for half in (0, 1):
        order = np.argsort(signatures[:, half], kind="stable")
        values = signatures[order, half]
        at = np.minimum(np.searchsorted(values, rows.signature[:, half]), max(len(values) - 1, 0))
        if not len(values):
            break
        same = (values[at] == rows.signature[:, half]) & (rows.signature[:, half] != _SILENT[half])
        found = np.where(same & (found < 0), order[at], found)
    return found


# ------------------------------------------------------------------------------------------- quality and amplitude


def quality_counts(rows: Columns, split: np.ndarray, splits: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bit name -> split -> records that have it; `split` [n] are indices into `splits`."""
    return {
        names(int(bit))[0]: {
            name: int(((rows.quality & int(bit)) != 0)[split == number].sum()) for number, name in enumerate(splits)
        }
        for bit in Quality
        if (rows.quality & int(bit)).any()
    }


def amplitude_summary(rows: Columns, unit: str) -> dict[str, Any]:
    """Quantiles and histogram of the records' amplitudes, and the records far from the set's own median.

    Amplitude is `meta["amplitude"]` of a record, in mV or the set's own unit.
    """
    known = np.isfinite(rows.amplitude) & (rows.amplitude > 0)
    values = rows.amplitude[known].astype(np.float64)
    if not len(values):
        return {"unit": unit, "known": 0}
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    ratio = values / median
    strange = {}
    for word, chosen in (("high", ratio > STRANGE), ("low", ratio < 1 / STRANGE)):
        order = np.argsort(np.where(word == "high", -ratio, ratio)[chosen], kind="stable")
        ids = rows.record_id[known][chosen][order][:LISTED]
        strange[word] = {
            "records": int(chosen.sum()),
            "factor": [round(float(r), 4) for r in ratio[chosen][order][:LISTED]],
            "ids": [i.decode() for i in ids],
        }
    return {
        "unit": unit,
        "known": len(values),
        "median": round(float(median), 4),
        "p5": round(float(low), 4),
        "p95": round(float(high), 4),
        "usual": list(USUAL_AMPLITUDE) if unit == "mV" else None,
        "histogram": np.histogram(values, BINS)[0].tolist(),
        "strange": strange,
    }


def _gain(median: float) -> str | None:
    """The nearest known factor that would bring `median` back to the usual range, in words."""
    low, high = USUAL_AMPLITUDE
    if low <= median <= high:
        return None
    middle = (low * high) ** 0.5
    off = max(median / middle, middle / median)
    factor = min(GAINS, key=lambda g: abs(np.log(off / g)))
    return f"{'above' if median > high else 'below'} it by {off:.3g}, nearest known mistake a factor of {factor:g}"


# ---------------------------------------------------------------------------------------------------- in words


def findings(card: dict[str, Any]) -> list[str]:
    """What a reader of the card should look at before training, one line each, the gravest first."""
    found = [*_gain_findings(card), *_copies(card), *_faults(card), *_labels(card)]
    counts = card["accounting"]
    if (share := counts["quarantined"] / max(1, counts["quarantined"] + counts["written"])) > NOTABLE:
        found.append(f"{share:.1%} of the recordings were quarantined: see quarantine.jsonl")
    return found


def _gain_findings(card: dict[str, Any]) -> list[str]:
    found, amplitude = [], card["amplitude"]
    if card["unit"] == "mV" and amplitude["known"] and (words := _gain(amplitude["median"])):
        low, high = USUAL_AMPLITUDE
        median = f"median amplitude {amplitude['median']:.3g} mV, usual is {low:g} to {high:g}"
        found.append(f"gain: {median}: {words}; nothing was corrected, check gain and unit")
    for word, strange in amplitude.get("strange", {}).items():
        if strange["records"]:
            first = ", ".join(f"{i} ({f:.3g}x)" for i, f in zip(strange["ids"][:3], strange["factor"], strict=False))
            found.append(f"amplitude: {strange['records']:,} records far too {word} beside the rest: {first}")
    return found


def _copies(card: dict[str, Any]) -> list[str]:
    found, counts = [], card["counts"]
    if counts["duplicates"]:
        across = f"{counts['duplicates_across_splits']:,} of them across splits"
        copies = f"{counts['duplicates']:,} with the content of another patient's record"
        found.append(f"copies quarantined: {copies}, {across}")
    for other, overlap in card.get("overlaps", {}).items():
        if overlap["records"]:
            found.append(f"overlap: {overlap['records']:,} records are in {other} as well: see overlaps.jsonl")
    return found


def _faults(card: dict[str, Any]) -> list[str]:
    found, total = [], max(1, card["counts"]["written"])
    for name, per in card["quality"].items():
        share = sum(per.values()) / total
        if share > NOTABLE and Quality[name.upper()] in FAULTS:
            remedy = "; lead order, signs or scales are wrong" if name == "einthoven" and share > 0.5 else ""
            found.append(f"quality: {share:.0%} of the records have {name}{remedy}")
    return found


def _labels(card: dict[str, Any]) -> list[str]:
    found = []
    for task, labels in card["tasks"].items():
        for split, positives in card["positives"][task].items():
            none = [label for label, n in zip(labels, positives, strict=True) if not n]
            if none and card["splits"][split]["records"]:
                more = f" and {len(none) - 5} more" if len(none) > 5 else ""
                found.append(f"labels: no {split} record of task {task} has {', '.join(none[:5])}{more}")
    return found


def tally(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """reason -> quarantined records and windows."""
    return dict(sorted(Counter(line["reason"] for line in lines).items()))
