"""What can only be done when every shard is there: duplicates, leakage, the card, TFDS's metadata.

Reads the sidecars, not the signals, except to rewrite a shard that holds a duplicate. Invariant: `card.json`
is written last, so that a folder with a card is complete; and everything here is a function of the sidecars
alone.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.progress import track
from ecg_jax.records.beats import DETECTOR
from ecg_jax.shards import review, schema
from ecg_jax.shards.catalog import DataFolder, group_hex, write_tfds
from ecg_jax.shards.grouping import SPLITS, ShardPlan
from ecg_jax.shards.remedies import remedy
from ecg_jax.shards.schema import CARD, CARD_FORMAT, QUARANTINE, SIGNATURES
from ecg_jax.shards.statistics import bayes_statistics, label_statistics, subset_table
from ecg_jax.shards.writer import (
    Columns,
    Job,
    drop_records,
    json_bytes,
    machine_error,
    npy_bytes,
    read_columns,
    read_state,
    write_atomic,
)

OVERLAPS = "overlaps.jsonl"


def finish(
    job: Job, plans: Sequence[ShardPlan], identity: dict[str, Any], against: Sequence[DataFolder] = ()
) -> dict[str, Any]:
    """Settle what concerns more than one shard and write the card. Returns the card.

    against: other data folders, whose recordings are looked for in this one.

    Raises DataError when nothing was accepted (first reason), when one patient is in two splits, or when a
    record id occurs twice; MachineError where the disk fails.
    """
    names = [plan.file_name(job.source.name) for plan in plans]
    states = [read_state(job.folder, name) for name in names]
    columns = [read_columns(job.folder, name) for name in names]
    rows = _joined(columns)
    shard = np.repeat(np.arange(len(plans)), [len(c.group) for c in columns])
    split = np.array([SPLITS.index(plan.split) for plan in plans], np.int8)[shard]
    _refuse_empty(job, plans, states, len(shard))
    _refuse_leaks(rows, split)

    copies = review.duplicates(rows)
    for number in track(sorted({int(shard[i]) for i in copies}), "duplicates"):
        drop = sorted(rows.record_id[i].decode() for i in copies if shard[i] == number)
        if states[number]["dropped"] != drop:
            states[number] = drop_records(job.folder, names[number], drop)
    keep = np.ones(len(shard), bool)
    keep[list(copies)] = False

    lines = [
        line | {"split": plan.split} for plan, state in zip(plans, states, strict=True) for line in state["refused"]
    ]
    for i, first in copies.items():
        detail = f"{rows.record_id[first].decode()}: same content, another patient; the smaller id is kept"
        line = {"id": rows.record_id[i].decode(), "reason": "duplicate-of", "detail": detail}
        line["remedy"] = remedy("duplicate-of")
        lines.append(line | {"split": SPLITS[split[i]]})
    lines.sort(key=lambda line: (line["id"], line["reason"]))
    write_atomic(job.folder / QUARANTINE, ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines))
    signatures = np.unique(rows.signature[keep].view("<u8,<u8").ravel()).view("<u8").reshape(-1, 2)
    _, signatures_digest = write_atomic(job.folder / SIGNATURES, [npy_bytes(signatures)])

    kept = _filtered(rows, keep)
    card = _card(job, plans, names, states, kept, split[keep], lines, identity)
    card["counts"]["duplicates"] = len(copies)
    card["counts"]["duplicates_across_splits"] = sum(int(split[i] != split[first]) for i, first in copies.items())
    card["accounting"] = review.accounting(rows, shard, keep, states, job.source.skipped)
    card["quality"] = review.quality_counts(kept, split[keep], SPLITS)
    card["amplitude"] = review.amplitude_summary(kept, job.source.unit)
    card["overlaps"] = _overlaps(job.folder, kept, split[keep], against)
    card["findings"] = review.findings(card)
    card["signatures"] = {"file": SIGNATURES, "count": len(signatures), "sha256": signatures_digest}
    card["lineage"] = [
        {
            "dataset": job.source.name,
            "version": job.source.version,
            "id_space": job.id_space,
            "contains": list(job.source.about.get("contains", [])),
            "records": int(keep.sum()),
            "patients": hashlib.sha256(np.unique(kept.group).tobytes()).hexdigest(),
            "signatures": signatures_digest,
        }
    ]
    shards: dict[str, list[tuple[int, int]]] = {}
    for plan, state in zip(plans, states, strict=True):
        shards.setdefault(plan.split, []).append((state["records"], state["bytes"]))
    try:
        write_tfds(job.folder, job.source.name, job.source.version, job.leads, job.source.tasks, shards)
    except OSError as error:
        raise machine_error(Path(error.filename or job.folder), error) from None
    text = json_bytes(card)
    write_atomic(job.folder / CARD, [text])
    return json.loads(text)  # what a later run will read


# ------------------------------------------------------------------------------------------ across the shards


def _joined(columns: list[Columns]) -> Columns:
    fields: dict[str, Any] = {}
    for field in Columns._fields:
        values = [getattr(c, field) for c in columns]
        if isinstance(values[0], dict):
            filled = [v for v, c in zip(values, columns, strict=True) if len(c.group)]
            tasks = [task for task in filled[0] if all(task in v for v in filled)] if filled else []
            fields[field] = {task: np.concatenate([v[task] for v in filled]) for task in tasks}
        else:
            fields[field] = np.concatenate(values)
    return Columns(**fields)


def _filtered(rows: Columns, keep: np.ndarray) -> Columns:
    def cut(value: Any) -> Any:
        return {k: v[keep] for k, v in value.items()} if isinstance(value, dict) else value[keep]

    return Columns(*(cut(value) for value in rows))


def _refuse_empty(job: Job, plans: Sequence[ShardPlan], states: list[dict[str, Any]], written: int) -> None:
    if written:
        return
    lines = [line for state in states for line in state["refused"]]
    if not lines:
        raise DataError(f"{job.source.name}: the source lists no recordings")
    reason = {line["id"]: line for line in lines}
    ids = [job.pseudonyms(i.record_id) if job.pseudonyms else i.record_id for plan in plans for i in plan.items]
    first = next(reason[i] for i in ids if i in reason)
    raise DataError(
        f"{job.source.name}: all {len(lines)} recordings were refused, the first ({first['id']}) as "
        f"{first['reason']}: {first['detail']}"
    )


def _refuse_leaks(rows: Columns, split: np.ndarray) -> None:
    ids, count = np.unique(rows.record_id, return_counts=True)
    if (count > 1).any():
        raise DataError(f"record id {ids[count > 1][0].decode()!r} occurs twice: ids must be unique in a data set")
    for hashes in (rows.group, rows.patient):
        order = np.lexsort((split, hashes))
        same = (hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)
        for i in np.flatnonzero(same & (split[order][1:] != split[order][:-1]))[:1]:
            where = [f"record {rows.record_id[k].decode()} in {SPLITS[split[k]]}" for k in order[i : i + 2]]
            raise DataError(f"one patient is in two splits: {', '.join(where)}; correct the source's ids or splits")


# --------------------------------------------------------------------------------------------------- the card


def _card(
    job: Job,
    plans: Sequence[ShardPlan],
    names: list[str],
    states: list[dict[str, Any]],
    kept: Columns,
    split: np.ndarray,
    lines: list[dict[str, Any]],
    identity: dict[str, Any],
) -> dict[str, Any]:
    files = [
        {"file": name, "split": plan.split, "number": plan.number}
        | {key: state[key] for key in ("records", "bytes", "sha256", "index_sha256")}
        for name, plan, state in zip(names, plans, states, strict=True)
    ]
    splits: dict[str, Any] = {}
    labels: dict[str, dict[str, Any]] = {task: {} for task in job.source.tasks}
    for name in dict.fromkeys(plan.split for plan in plans):
        inside = split == SPLITS.index(name)
        mine = [file for file in files if file["split"] == name]
        splits[name] = {
            "records": int(inside.sum()),
            "patients": len(np.unique(kept.group[inside])),
            "shards": len(mine),
            "bytes": sum(file["bytes"] for file in mine),
        }
        if kept.bayes and inside.any():
            bayes = {t: bayes_statistics(kept.labels[t][inside], v[inside]) for t, v in kept.bayes.items()}
            splits[name]["bayes_loss"] = {task: found["loss"] for task, found in bayes.items()}
            splits[name]["bayes_entropy"] = {task: found["entropy"] for task, found in bayes.items()}
        for task, values in kept.labels.items():
            labels[task][name] = label_statistics(values[inside])
    source_digest = hashlib.sha256(b"".join(sorted(row.tobytes() for row in kept.source))).hexdigest()
    refused = sum(not line.get("window") for state in states for line in state["refused"])
    return {
        "format": CARD_FORMAT,
        "name": job.source.name,
        "version": job.source.version,
        "rate": schema.RATE,
        "length": schema.LENGTH,
        "unit": job.source.unit,
        "lsb": 0.001,
        "leads": list(schema.LEAD_NAMES[job.leads]),
        "chain": {"name": job.chain.name, "digest": job.chain.digest(), "steps": job.chain.describe()},
        "detector": DETECTOR,
        "windows": job.windows,
        "tasks": {task: list(names) for task, names in job.source.tasks.items()},
        "splits": splits,
        "prevalence": _per_task(labels, "prevalence"),
        "positives": _per_task(labels, "positives"),
        "known": _per_task(labels, "known"),
        "prior_entropy": _per_task(labels, "entropy"),
        "subsets": subset_table(*_train(kept, split == 0)),
        "counts": {
            "items": sum(state["items"] for state in states),
            "items_refused": refused,
            "records": sum(state["prepared"] for state in states),
            "duplicates": 0,
            "written": len(split),
        },
        "refused": review.tally(lines),
        "id_space": job.id_space,
        "pseudonymised": ["record_id", "patient_id"] if job.pseudonyms else [],
        "source": job.source.about,
        "source_digest": source_digest,
        "code": code_versions(),
        "identity": identity,
        "files": files,
    }


def _train(kept: Columns, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    return kept.group[train], kept.order[train], {task: values[train] for task, values in kept.labels.items()}


def _overlaps(folder: Path, kept: Columns, split: np.ndarray, against: Sequence[DataFolder]) -> dict[str, Any]:
    """Name of another data set -> how many records here are recordings of it. Each goes to `overlaps.jsonl`, with the
    group hash that an exclude list takes."""
    found: dict[str, Any] = {}
    lines = []
    for other in against:
        name = f"{other.card['name']}/{other.card['version']}"
        same = np.flatnonzero(review.known_elsewhere(kept, other.signatures()) >= 0)
        found[name] = {
            "records": len(same),
            "patients": len(np.unique(kept.group[same])),
            "splits": {part: int((split[same] == number).sum()) for number, part in enumerate(SPLITS)},
        }
        for i in same:
            line = {"id": kept.record_id[i].decode(), "split": SPLITS[split[i]], "group": group_hex(kept.group[i])}
            lines.append(line | {"also_in": name})
    lines.sort(key=lambda line: (line["id"], line["also_in"]))
    write_atomic(folder / OVERLAPS, ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines))
    return found


def _per_task(labels: dict[str, dict[str, Any]], field: str) -> dict[str, Any]:
    return {task: {split: found[field] for split, found in per.items()} for task, per in labels.items()}


def code_versions() -> dict[str, str]:
    """What the bytes depend on besides the source. `digest` is of the modules that make them, since a version
    number stands still while one works on the code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("records", "datasets", "shards"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    packages = {name: version(name) for name in ("ecg-jax", "numpy", "scipy")}
    return packages | {"python": platform.python_version(), "digest": digest.hexdigest()[:16]}
