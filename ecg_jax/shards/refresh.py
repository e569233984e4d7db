"""R peaks anew: a data folder whose R peaks are an older detector's, written again with this version's.

The peaks are functions of the stored signals, so no raw recording is needed. What comes out is, byte for byte, what
this version would make of the raw recordings, sidecars included, except for the quality bit `no_beats` in the sidecars'
columns of records that were left out as duplicates, whose signals are not stored; and for what else has changed between
the versions (the chain that made the signals stays, and the card says which). Codes beside the shards belong to the old
peaks and stay with the old folder. Invariants: the old folder is only read; the card is written last; run again after
an interruption, it goes on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.records.audit import Quality
from ecg_jax.records.beats import DETECTOR, stored_peaks
from ecg_jax.records.leads import INDEPENDENT, LEADS
from ecg_jax.records.record import Prepared
from ecg_jax.shards import review, schema
from ecg_jax.shards.catalog import DataFolder, Shard, open_folder, write_tfds
from ecg_jax.shards.finish import code_versions
from ecg_jax.shards.grouping import SPLITS
from ecg_jax.shards.resume import PLAN, differences, finished, locked, unlink
from ecg_jax.shards.schema import CARD, STATE
from ecg_jax.shards.writer import (
    json_bytes,
    machine_error,
    npz_bytes,
    read_columns,
    read_state,
    store,
    write_atomic,
)

CHUNK = 128  # records whose beats are sought together
_EIGHT = [LEADS.index(lead) for lead in INDEPENDENT]
_NO_BEATS = int(Quality.NO_BEATS)


def check_detector(card: dict[str, Any], path: Path) -> None:
    """Raise DataError where the R peaks in the data folder at `path` are another detector's than this version's."""
    found = card.get("detector")
    if found != DETECTOR:
        raise DataError(
            f"{path}: its R peaks are those of detector {found}, this version has {DETECTOR}: write them anew with "
            f"`ecg-jax convert refresh --source {path} --out DIR`"
        )


def refresh(folder: Path, out: Path) -> dict[str, Any]:
    """Write `out`/<name>/<version>/: the data folder `folder` with the R peaks of this version's detector.

    Returns the new card, with `path` and `report` (shards written and kept) added. Raises UsageError where the folder's
    peaks are this detector's already, or `out` is where it lies, or something else lies there; DataError for a damaged
    or incomplete folder; MachineError where the disk fails (finished shards are kept, no card).
    """
    old = open_folder(Path(folder))
    card = old.card
    if card.get("detector") == DETECTOR:
        raise UsageError(f"{old.path}: its R peaks are those of {DETECTOR} already, there is nothing to refresh")
    new = Path(out) / card["name"] / card["version"]
    if new.resolve() == old.path.resolve():
        raise UsageError(f"--out {out}: there the data folder itself lies; choose another")
    shards = [shard for split in old.splits for shard in old.shards(split)]
    with locked(new):
        kept = _begin(new, card, shards)
        done = finished(new)
        if not done or len(kept) < len(shards):
            unlink(new / CARD)  # from here on the folder is not complete, whatever it was before
            for shard in track(shards, f"refresh {card['name']}", unit="shards"):
                if shard.path.name not in kept:
                    _rewrite(old, shard, new)
            _carry_over(old, new, shards)
            done = _finish(old, new, shards)
    report = {"shards_written": len(shards) - len(kept), "shards_kept": len(kept)}
    return done | {"path": str(new), "report": report}


def _begin(new: Path, card: dict[str, Any], shards: list[Shard]) -> set[str]:
    """Names of the shards that an earlier run has written. Leaves the plan that a conversion would leave."""
    path = new / STATE / PLAN
    identity = {name: value for name, value in card["identity"].items() if name != "--against"}
    now = identity | {"code": ", ".join(f"{name} {found}" for name, found in code_versions().items())}
    if not path.exists():
        write_atomic(path, [json_bytes(now)])
    else:
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            before = {}
        if found := differences(before, now):
            raise UsageError(f"{new} was begun otherwise ({found[0]}): delete it, or choose another --out")
    for stale in [*new.glob("*.tmp"), *(new / STATE).glob("*.tmp")]:
        unlink(stale)
    return {shard.path.name for shard in shards if _is_there(new, shard)}


def _is_there(new: Path, shard: Shard) -> bool:
    if read_state(new, shard.path.name) is None:
        return False
    index = np.load(new / (shard.path.name + schema.INDEX_SUFFIX), allow_pickle=False)
    return np.array_equal(index["record"], shard.index()["record"])


def _rewrite(old: DataFolder, shard: Shard, new: Path) -> None:
    """Write the shard anew, with its index and its sidecar."""
    name = shard.path.name
    state = read_state(old.path, name)
    if state is None:
        raise DataError(
            f"{old.path}: lacks the sidecars of {name} in {STATE}: copy the folder as a whole, or convert again"
        )
    index = shard.index()
    records = list(_refreshed(shard, old.leads))
    if len(records) != len(index):
        raise DataError(f"{shard.path}: holds {len(records)} records, its index {len(index)}; {schema.REPAIR}")
    encoded = [schema.encode_indexed(record, old.leads) for record in records]
    at = 0
    for row, one in zip(index, encoded, strict=True):
        row["frame"], row["length"] = at, len(one.payload)
        row["signal"], row["id"] = at + schema.HEADER + one.signal, schema.HEADER + one.id
        at += len(one.payload) + schema.FRAME_EXTRA
    columns = read_columns(old.path, name)
    quality = {record.record_id.encode(): record.quality for record in records}
    own = [quality.get(i, q) for i, q in zip(columns.record_id.tolist(), columns.quality.tolist(), strict=True)]
    columns = columns._replace(quality=np.array(own, np.int64))
    write_atomic(new / STATE / f"{name}.npz", [npz_bytes(columns)])
    state |= store(new, name, (part for one in encoded for part in schema.frame_parts(one.payload)), index)
    write_atomic(new / STATE / f"{name}.json", [json_bytes(state)])


def _refreshed(shard: Shard, leads: schema.Leads) -> Iterator[Prepared]:
    """The records of the shard with their new peaks."""
    chunk: list[dict[str, Any]] = []
    for payload in schema.read_frames(shard.path):
        chunk.append(schema.decode(payload))
        if len(chunk) == CHUNK:
            yield from _with_peaks(chunk, leads)
            chunk = []
    yield from _with_peaks(chunk, leads)


def _with_peaks(rows: list[dict[str, Any]], leads: schema.Leads) -> Iterator[Prepared]:
    if not rows:
        return
    signals = np.stack([row.pop("signal") for row in rows])
    found = stored_peaks(signals, [row["valid"] for row in rows])
    for row, signal, peaks in zip(rows, signals, found, strict=True):
        if leads == "8":  # the encoder takes 12 and stores these 8
            wide = np.zeros((schema.LENGTH, len(LEADS)), np.int16)
            wide[:, _EIGHT] = signal
            signal = wide
        row["quality"] = row["quality"] & ~_NO_BEATS | (0 if len(peaks) else _NO_BEATS)
        row["rpeaks"] = peaks.astype(np.int16)
        yield Prepared(signal=signal, group="", split=None, **row)


def _carry_over(old: DataFolder, new: Path, shards: list[Shard]) -> None:
    """Copy what the peaks do not change: quarantine, signatures, overlaps and whatever else lies there."""
    rewritten = {CARD} | {shard.path.name + suffix for shard in shards for suffix in ("", schema.INDEX_SUFFIX)}
    for path in sorted(old.path.iterdir()):
        if path.is_file() and path.name not in rewritten and path.suffix != ".tmp":
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from None
            write_atomic(new / path.name, [content])


def _finish(old: DataFolder, new: Path, shards: list[Shard]) -> dict[str, Any]:
    """Write TFDS's metadata, which know the sizes of the shards, and the card. Returns the card."""
    card = old.card
    files, quality, split, columns = [], [], [], None
    sizes: dict[str, list[tuple[int, int]]] = {}
    for file, shard in zip(card["files"], shards, strict=True):
        state = read_state(new, shard.path.name)
        files.append(file | {key: state[key] for key in ("records", "bytes", "sha256", "index_sha256")})
        sizes.setdefault(file["split"], []).append((state["records"], state["bytes"]))
        columns = read_columns(new, shard.path.name)
        keep = ~np.isin(columns.record_id, [name.encode() for name in state["dropped"]])
        quality.append(columns.quality[keep])
        split += [SPLITS.index(file["split"])] * int(keep.sum())
    rows = columns._replace(quality=np.concatenate(quality))
    splits = {name: found | {"bytes": sum(size for _, size in sizes[name])} for name, found in card["splits"].items()}
    fresh = {"detector": DETECTOR, "splits": splits, "code": code_versions(), "files": files}
    fresh["quality"] = review.quality_counts(rows, np.array(split), SPLITS)
    card = card | fresh
    card["findings"] = review.findings(card)
    try:
        write_tfds(new, card["name"], card["version"], old.leads, card["tasks"], sizes)
    except OSError as error:
        raise machine_error(Path(error.filename or new), error) from None
    text = json_bytes(card)
    write_atomic(new / CARD, [text])
    return json.loads(text)  # what a later run will read
