"""What `ecg-jax inspect` shows: a data folder's card in words, and one recording ready to be drawn.

Reads only; the card is the one that `convert` wrote, nothing is computed again.
"""

import hashlib
import importlib
from pathlib import Path

import numpy as np

from ecg_jax.ecg_paper import Tracing
from ecg_jax.errors import DataError

RAW = {".hea": ("wfdb", "read_wfdb"), ".xml": ("xml", "read_xml"), ".dcm": ("dicom", "read_dicom")}
SHOWN_LABELS = 30  # of a task; the commonest


def read_card(path: Path) -> dict:
    """The card of the data folder at `path`. Raises DataError where there is none."""
    from ecg_jax.shards.catalog import open_folder

    folder = open_folder(path)
    return {**folder.card, "path": str(folder.path)}


def verify(path: Path) -> dict:
    """Every digest of the data folder at `path`: shards and indexes against the card, codes beside them against theirs.

    Returns {"path", "checked": files, "bytes": of the shards, "damaged": [what is wrong, file by file]}. Raises
    DataError where there is no data folder.
    """
    from ecg_jax.progress import track
    from ecg_jax.shards import codes, schema
    from ecg_jax.shards.catalog import open_folder

    folder = open_folder(path)
    checked, size, damaged = 0, 0, []
    shards = [shard for split in folder.splits for shard in folder.shards(split)]
    for shard in track(shards, "verify", unit="shards"):
        index = shard.path.with_name(shard.path.name + schema.INDEX_SUFFIX)
        for file, digest in ((shard.path, shard.sha256), (index, shard.index_sha256)):
            checked += 1
            if (what := _differs(file, digest)) is not None:
                damaged.append(f"{file}: {what}")
        size += shard.bytes
    for beside in sorted(folder.path.glob("codes-*")):
        try:
            found = codes.open_codes(folder, beside)
        except DataError as error:
            checked, damaged = checked + 1, [*damaged, str(error)]
            continue
        for shard in shards:
            checked += len(codes.KINDS)
            try:
                codes.read_files(beside, shard.path.name, found.card["files"][shard.path.name], shard.records)
            except DataError as error:
                damaged.append(str(error))
    return {"path": str(folder.path), "checked": checked, "bytes": size, "damaged": damaged}


def _differs(file: Path, digest: str) -> str | None:
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return error.strerror or str(error)
    return None if found == digest else "is not the file that card.json names (another sha256)"


def verified_lines(result: dict) -> list[str]:
    """What `verify` found, as lines for a terminal."""
    lines = [f"damaged   {what}" for what in result["damaged"]]
    sound = result["checked"] - len(result["damaged"])
    return [*lines, f"{result['path']}: {sound:,} of {result['checked']:,} files are sound ({result['bytes']:,} bytes)"]


def raw_record(path: Path) -> Tracing:
    """A recording that says all about itself (`RAW`: WFDB header, XML, DICOM) as it lies on disk, in mV."""
    from ecg_jax.records.record import Refused

    module, function = RAW[path.suffix.lower()]
    read = getattr(importlib.import_module(f"ecg_jax.records.readers.{module}"), function)
    try:
        reading = read(path.with_suffix("") if module == "wfdb" else path)
    except Refused as error:
        raise DataError(f"{path}: {error.reason}: {error.detail}") from None
    return Tracing(reading.signal, reading.rate, "mV", path.stem, "; ".join(reading.comments)[:120])


def stored_record(path: Path, record_id: str | None = None) -> Tracing:
    """The stored record `record_id` (default: the first of the test split) of the data folder at `path`."""
    from ecg_jax.records.leads import expand_matrix
    from ecg_jax.shards.catalog import open_folder
    from ecg_jax.shards.schema import decode, read_frames

    folder = open_folder(path)
    for split in sorted(folder.splits, key=("test", "val", "train").index):
        for shard in folder.shards(split):
            for frame in read_frames(shard.path):
                stored = decode(frame)
                if record_id in (None, stored["record_id"]):
                    signal = np.asarray(stored["signal"], np.float32) * 1e-3
                    if signal.shape[1] == 8:
                        signal = signal @ expand_matrix()
                    unit = folder.card["unit"]
                    notes = _notes(stored["age"], stored["sex"], stored["labels"], folder.card["tasks"])
                    title = f"{folder.card['name']} {stored['record_id']} ({split})"
                    valid = tuple(int(v) for v in stored["valid"])
                    return Tracing(signal, folder.card["rate"], unit, title, notes, valid)
    raise DataError(f"{folder.path}: no record {record_id!r}: ids stand in the shards and in quarantine.jsonl")


def _notes(age: float, sex: float, labels: dict, names: dict) -> str:
    person = [
        f"{age:.0f} years" if np.isfinite(age) else "",
        {1.0: "male", 0.0: "female"}.get(float(sex), ""),
    ]
    found = {task: [n for n, v in zip(names[task], values, strict=True) if v == 1] for task, values in labels.items()}
    diagnoses = [f"{task}: {', '.join(positive)}" for task, positive in found.items() if positive]
    return "   ".join(filter(None, [*person, *diagnoses]))


def card_lines(card: dict) -> list[str]:
    """The card as lines for a terminal: what was made, what became of every record, what to look at, prevalences."""
    lines = [f"{card['name']} {card['version']}   {card.get('path', '')}".rstrip()]
    rate, leads = card["rate"], card["leads"]
    made = f"unit {card['unit']}, filter chain {card['chain']['name']}, R peaks {card['detector']}"
    lines.append(f"  {len(leads)} leads at {rate} Hz, {made}")
    for split, counts in card["splits"].items():
        records, groups, shards = counts["records"], counts["patients"], counts["shards"]
        lines.append(f"  {split:5} {records:>9,} records  {groups:>9,} groups  {shards:>5} shards")
    lines += _fate_lines(card)
    lines += [f"  ! {finding}" for finding in card.get("findings", ())]
    for task, names in card["tasks"].items():
        lines += _prevalence_lines(task, names, card["prevalence"][task])
    return lines


def _fate_lines(card: dict) -> list[str]:
    lines = []
    if counts := card.get("accounting"):  # a dry run has none
        skipped = sum(counts["skipped"].values())
        total = f"{counts['written']:,} written + {counts['quarantined']:,} quarantined + {skipped:,} skipped"
        lines.append(f"  {counts['listed']:,} recordings = {total}")
        lines += [f"    skipped {n:,}: {reason}" for reason, n in counts["skipped"].items()]
    if refused := card.get("refused"):
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(refused.items(), key=lambda r: -r[1]))
        lines.append(f"    quarantined, by reason (details and remedies in quarantine.jsonl): {reasons}")
    if quality := card.get("quality"):
        bits = sorted(((name, sum(per.values())) for name, per in quality.items()), key=lambda bit: -bit[1])
        lines.append("    quality bits: " + ", ".join(f"{name} {n:,}" for name, n in bits))
    amplitude = card.get("amplitude", {})
    if amplitude.get("known"):
        spread = f"5 to 95 %: {amplitude['p5']:.3g} to {amplitude['p95']:.3g}"
        lines.append(f"    amplitude: median {amplitude['median']:.3g} {amplitude['unit']} peak to peak ({spread})")
    return lines


def _prevalence_lines(task: str, names: list[str], prevalence: dict[str, list]) -> list[str]:
    lines = [f"  task {task} ({len(names)} labels), share of positives in " + ", ".join(prevalence)]
    width = max(map(len, names))
    order = range(len(names))
    if len(names) > SHOWN_LABELS:
        order = sorted(order, key=lambda i: -max((v[i] or 0) for v in prevalence.values()))[:SHOWN_LABELS]
    for i in order:
        shares = "  ".join("      -" if v[i] is None else f"{v[i]:7.2%}" for v in prevalence.values())
        lines.append(f"    {names[i]:{width}}  {shares}")
    if len(names) > SHOWN_LABELS:
        lines.append(f"    and {len(names) - SHOWN_LABELS} rarer ones, see card.json")
    return lines
