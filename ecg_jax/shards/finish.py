"""What can only be done when every shard is there: duplicates, leakage, the card, TFDS's metadata.

Reads the sidecars, not the signals, except to rewrite a shard that holds a duplicate. Invariant: `card.json`
is written last, so that a folder with a card is complete; and everything here is a function of the sidecars
alone.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.progress import track
from ecg_jax.records.beats import DETECTOR
from ecg_jax.records.signature import signature
from ecg_jax.shards import schema
from ecg_jax.shards.catalog import Subset, select, write_tfds
from ecg_jax.shards.grouping import SPLITS, ShardPlan
from ecg_jax.shards.schema import CARD, CARD_FORMAT, QUARANTINE, SIGNATURES
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

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50, 1.0)
OFFSETS = (0.0, 1 / 3, 2 / 3)  # independent draws; a share above a third would overlap the next one


def finish(job: Job, plans: Sequence[ShardPlan], identity: dict[str, Any]) -> dict[str, Any]:
    """Settle what concerns more than one shard and write the card. Returns the card.

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

    copies = duplicates(rows)
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
        lines.append(line | {"split": SPLITS[split[i]]})
    lines.sort(key=lambda line: (line["id"], line["reason"]))
    write_atomic(job.folder / QUARANTINE, ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines))
    signatures = np.unique(rows.signature[keep].view("<u8,<u8").ravel()).view("<u8").reshape(-1, 2)
    _, signatures_digest = write_atomic(job.folder / SIGNATURES, [npy_bytes(signatures)])

    kept = _filtered(rows, keep)
    card = _card(job, plans, names, states, kept, split[keep], lines, identity)
    card["counts"]["duplicates"] = len(copies)
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


_SILENT = np.frombuffer(signature(np.zeros((12, schema.LENGTH))), "<u8")  # says nothing about whose it is


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


def _entropy(share: np.ndarray) -> np.ndarray:
    p = np.clip(share, 1e-300, 1.0)
    q = np.clip(1.0 - share, 1e-300, 1.0)
    return -(share * np.log(p) + (1.0 - share) * np.log(q))


def label_statistics(labels: np.ndarray) -> dict[str, Any]:
    """int8 [n, K] -> known, positives, prevalence [K] (None where nobody looked) and the mean entropy in nats
    of predicting each label's prevalence, over the labels that were looked for."""
    known, positive = (labels >= 0).sum(0), (labels == 1).sum(0)
    seen = known > 0
    share = positive / np.maximum(known, 1)
    entropy = float(_entropy(share[seen]).mean()) if seen.any() else None
    return {
        "known": known.tolist(),
        "positives": positive.tolist(),
        "prevalence": [float(s) if k else None for s, k in zip(share, seen, strict=True)],
        "entropy": entropy,
    }


def bayes_statistics(labels: np.ndarray, bayes: np.ndarray) -> dict[str, float]:
    """The loss (BCE in nats, mean over labels) of the Bayes probabilities on these labels, and its
    expectation."""
    mask = labels >= 0
    p = np.clip(bayes, 1e-12, 1 - 1e-12)
    loss = np.where(mask, -np.where(labels == 1, np.log(p), np.log1p(-p)), 0.0)
    expected = np.where(mask, _entropy(bayes), 0.0)
    count, seen = np.maximum(mask.sum(0), 1), mask.any(0)
    return {
        "loss": float((loss.sum(0) / count)[seen].mean()),
        "entropy": float((expected.sum(0) / count)[seen].mean()),
    }


def _subsets(kept: Columns, train: np.ndarray) -> list[dict[str, Any]]:
    group = kept.group[train]
    index = np.zeros(len(group), [("order_hash", "<u8"), ("group", "<u8")])
    index["order_hash"], index["group"] = kept.order[train], group
    table = []
    for offset in OFFSETS:
        for fraction in FRACTIONS:
            if offset and fraction > 1 / 3:
                continue
            inside = select(index, Subset(fraction, offset=offset))
            labels = {task: label_statistics(values[train][inside]) for task, values in kept.labels.items()}
            table.append(
                {
                    "fraction": fraction,
                    "offset": offset,
                    "records": int(inside.sum()),
                    "patients": len(np.unique(group[inside])),
                    "positives": {task: found["positives"] for task, found in labels.items()},
                    "label_entropy": {task: found["entropy"] for task, found in labels.items()},
                }
            )
    return table


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
    refused = sum(len(state["refused"]) for state in states)
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
        "subsets": _subsets(kept, split == 0),
        "counts": {
            "items": sum(state["items"] for state in states),
            "items_refused": refused,
            "records": sum(state["prepared"] for state in states),
            "duplicates": 0,
            "written": len(split),
        },
        "refused": dict(sorted(Counter(line["reason"] for line in lines).items())),
        "id_space": job.id_space,
        "pseudonymised": ["record_id", "patient_id"] if job.pseudonyms else [],
        "source": job.source.about,
        "source_digest": source_digest,
        "code": code_versions(),
        "identity": identity,
        "files": files,
    }


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
