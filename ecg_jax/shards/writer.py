"""Writes one shard: reads its items, prepares them, sorts them by place on the subset circle, encodes,
renames.

Works on one shard at a time and knows nothing of the others (`convert` runs it, in this process or in a pool;
`finish` looks across shards). Holds one shard in memory. Invariant: a shard counts as written when its
sidecar under `.convert/` agrees with the sizes on disk, and the sidecar is written last, so that a kill at
any moment loses at most the shards in hand.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.datasets.source import Source
from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.records.leads import INDEPENDENT, LEADS, expand_matrix
from ecg_jax.records.preprocess import Chain, prepare_many
from ecg_jax.records.record import Prepared, Record, Refused
from ecg_jax.shards import schema
from ecg_jax.shards.grouping import ShardPlan, hash64
from ecg_jax.shards.schema import STATE

CHUNK = 128  # recordings prepared together: large enough for batched filters, 30 MB at 500 Hz
EIGHT_LEADS_TOLERANCE = 20.0  # uV; rounding alone leaves 1.5


@dataclass(frozen=True)
class Pseudonyms:
    """Keyed blake2b of ids: the same id gives the same 32 hex digits under one key, and no way back without
    it."""

    key: bytes

    @classmethod
    def load(cls, path: Path) -> "Pseudonyms":
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise UsageError(f"--pseudonymise {path}: {error.strerror or error}") from None
        if len(secret) < 16:
            raise UsageError(f"--pseudonymise {path}: holds {len(secret)} bytes, a key needs at least 16 random ones")
        return cls(hashlib.blake2b(secret, digest_size=32).digest())

    def __call__(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), digest_size=16, key=self.key).hexdigest()

    @property
    def check(self) -> str:
        """Tells keys apart without giving them away."""
        return hashlib.blake2b(b"", digest_size=4, key=self.key, person=b"check").hexdigest()


@dataclass(frozen=True)
class Job:
    """What every shard of one conversion shares; pickles."""

    source: Source  # its items removed: each shard brings its own
    folder: Path
    chain: Chain
    windows: str
    leads: schema.Leads
    pseudonyms: Pseudonyms | None
    strict: bool

    @property
    def id_space(self) -> str:
        """Name under which group hashes are comparable: data sets that share patient ids state the same
        one."""
        return str(self.source.about.get("id_space", self.source.name))


class Columns(NamedTuple):
    """What the pass over all shards needs of one shard, a row per prepared record, in file order."""

    record_id: np.ndarray  # UTF-8 bytes
    group: np.ndarray  # uint64, comparable inside the id space
    patient: np.ndarray  # uint64 hash of the patient id, 0 where unknown
    order: np.ndarray  # uint64 place on the subset circle
    signature: np.ndarray  # uint64 [n, 2]
    source: np.ndarray  # uint8 [n, 32]
    labels: dict[str, np.ndarray]  # int8 [n, K]
    bayes: dict[str, np.ndarray]  # float64 [n, K], only where the records carry it


# ----------------------------------------------------------------------------------------------- atomic files


def write_atomic(path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    """Write `chunks` to `path` under a temporary name, flush to disk, rename. Returns (bytes, sha256 hex).

    Raises MachineError (disk full, read-only, ...) with nothing left of this file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _forget(temporary)
        raise machine_error(path, error) from None
    except BaseException:
        _forget(temporary)
        raise
    return size, digest.hexdigest()


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the failure that brought us here is the one to report


def machine_error(path: Path, error: OSError) -> MachineError:
    """The one line for a write that the machine refused."""
    remedy = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some of your quota",
        errno.EROFS: "choose an --out that can be written",
        errno.EACCES: "choose an --out that you may write",
        errno.EPERM: "choose an --out that you may write",
    }.get(error.errno or 0, "mend that")
    return MachineError(
        f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again: "
        "the shards already written are kept"
    )


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------- one whole shard


def write_shard(job: Job, plan: ShardPlan) -> None:
    """Read, prepare, encode and store the shard of `plan`, with its index and its sidecar.

    Raises DataError at the first refused record if `job.strict`, MachineError where the disk fails.
    """
    name = plan.file_name(job.source.name)
    rows: list[tuple[int, str, schema.Encoded, Prepared]] = []
    refused: list[dict[str, str]] = []
    for record_id, outcome in _prepared(job, plan):
        if isinstance(outcome, Refused):
            if job.strict:
                raise DataError(f"record {record_id}: {outcome} (--strict accepts no refused record)")
            refused.append(_quarantine_line(job, record_id, outcome))
            continue
        for p in outcome:
            order = hash64("order", job.source.name, p.group)
            rows.append((order, p.record_id, schema.encode_indexed(p, job.leads), replace(p, signal=_NO_SIGNAL)))
    rows.sort(key=lambda row: row[:2])
    index = np.zeros(len(rows), schema.IndexRow)
    at = 0
    for i, (order, record_id, encoded, p) in enumerate(rows):
        index[i] = (
            at,
            len(encoded.payload),
            at + schema.HEADER + encoded.signal,
            schema.HEADER + encoded.id,
            encoded.id_length,
            plan.number,
            p.valid,
            hash64("split", job.source.name, p.group),
            hash64("shard", job.source.name, p.group),
            order,
            hash64("group", job.id_space, p.group),
            hash64("record", job.source.name, record_id),
        )
        at += len(encoded.payload) + schema.FRAME_EXTRA
    columns = _columns(job, [row[3] for row in rows], index)
    write_atomic(job.folder / STATE / f"{name}.npz", [_npz_bytes(columns)])
    frames = (schema.frame(row[2].payload) for row in rows)
    state = _store(job.folder, name, frames, index)
    state |= {"items": len(plan.items), "prepared": len(rows), "refused": refused, "dropped": []}
    write_atomic(job.folder / STATE / f"{name}.json", [json_bytes(state)])


_NO_SIGNAL = np.empty((0, len(LEADS)), np.int16)


def _store(folder: Path, name: str, frames: Iterable[bytes], index: np.ndarray) -> dict[str, Any]:
    size, digest = write_atomic(folder / name, frames)
    _, index_digest = write_atomic(folder / (name + schema.INDEX_SUFFIX), [npy_bytes(index)])
    return {"records": len(index), "bytes": size, "sha256": digest, "index_sha256": index_digest}


def _prepared(job: Job, plan: ShardPlan) -> Iterator[tuple[str, list[Prepared] | Refused]]:
    """(record id as stored, what became of it) for every item, read in the order of the source: the files'
    order."""
    items, records = iter(plan.items), iter(job.source.read(plan.items))
    while chunk := list(islice(items, CHUNK)):
        outcomes: list[list[Prepared] | Refused | None] = []
        ready: list[Record] = []
        for item in chunk:
            record = next(records)
            outcomes.append(record if isinstance(record, Refused) else None)
            if isinstance(record, Refused):
                continue
            if (record.record_id, record.group) != (item.record_id, item.group):
                raise ValueError(f"read() answered item {item.record_id} with record {record.record_id}")
            ready.append(_renamed(job, record))
        done = iter(prepare_many(ready, job.chain, job.windows) if ready else ())
        for item, outcome in zip(chunk, outcomes, strict=True):
            outcome = next(done) if outcome is None else outcome
            if not isinstance(outcome, Refused) and job.leads == "8":
                outcome = _eight_leads(outcome)
            yield (job.pseudonyms(item.record_id) if job.pseudonyms else item.record_id), outcome


def _renamed(job: Job, record: Record) -> Record:
    if job.pseudonyms is None:
        return record
    patient = record.patient_id and job.pseudonyms(record.patient_id)
    return replace(
        record,
        record_id=job.pseudonyms(record.record_id),
        group=job.pseudonyms(record.group),
        patient_id=patient,
    )


def _eight_leads(windows: list[Prepared]) -> list[Prepared] | Refused:
    """`windows`, if the four other limb leads follow from I and II and so need not be stored."""
    matrix, kept = expand_matrix(), [LEADS.index(lead) for lead in INDEPENDENT]
    for p in windows:
        start, length = p.valid
        signal = p.signal[start : start + length].astype(np.float32)
        off = np.percentile(np.abs(signal[:, kept] @ matrix - signal).max(1), 99)
        if off > EIGHT_LEADS_TOLERANCE:
            detail = f"limb leads differ from those that I and II give by {off:.0f} uV: convert with --leads 12"
            return Refused("leads-inconsistent", detail)
    return windows


def _quarantine_line(job: Job, record_id: str, refused: Refused) -> dict[str, str]:
    # A detail may quote file names and header lines, so it may quote a patient.
    hidden = "withheld (--pseudonymise): convert without it to read the detail"
    return {"id": record_id, "reason": refused.reason, "detail": hidden if job.pseudonyms else refused.detail}


# ------------------------------------------------------------------------------------------------ the sidecar


def _columns(job: Job, prepared: list[Prepared], index: np.ndarray) -> Columns:
    n = len(prepared)
    labels, bayes = {}, {}
    if extra := [p.record_id for p in prepared if set(p.labels) != set(job.source.tasks)]:
        raise ValueError(f"{extra[0]}: has other label tasks than the source declares: {sorted(job.source.tasks)}")
    for task, names in job.source.tasks.items():
        if wrong := [p.record_id for p in prepared if len(p.labels[task]) != len(names)]:
            raise ValueError(f"{wrong[0]}: task {task!r} has not {len(names)} labels")
        labels[task] = np.array([p.labels[task] for p in prepared], np.int8).reshape(n, len(names))
        known = [bayes_of(p.meta, task, len(names)) for p in prepared]
        if n and all(values is not None for values in known):
            bayes[task] = np.array(known, np.float64).reshape(n, len(names))
    patient = [hash64("group", job.id_space, p.patient_id) if p.patient_id else 0 for p in prepared]
    return Columns(
        record_id=np.array([p.record_id.encode() for p in prepared], np.bytes_),
        group=index["group"].copy(),
        patient=np.array(patient, np.uint64),
        order=index["order_hash"].copy(),
        signature=np.frombuffer(b"".join(p.signature for p in prepared), "<u8").reshape(n, 2),
        source=np.frombuffer(b"".join(p.source for p in prepared), np.uint8).reshape(n, schema.SOURCE_BYTES),
        labels=labels,
        bayes=bayes,
    )


def bayes_of(meta: dict[str, Any], task: str, count: int) -> list[float] | None:
    """The Bayes probabilities [K] of `task` that a simulator left in `meta["bayes"]`: per task, or one bare
    list."""
    bayes = meta.get("bayes")
    values = bayes.get(task) if isinstance(bayes, dict) else bayes
    return None if values is None or len(values) != count else list(values)


def _npz_bytes(columns: Columns) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for field, value in columns._asdict().items():
        arrays |= {f"{field}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {field: value}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_state(folder: Path, name: str) -> dict[str, Any] | None:
    """The sidecar of a shard that is completely written and as long as it should be, else None."""
    try:
        state = json.loads((folder / STATE / f"{name}.json").read_bytes())
        index = (folder / (name + schema.INDEX_SUFFIX)).read_bytes()
        whole = (folder / name).stat().st_size == state["bytes"] and (folder / STATE / f"{name}.npz").exists()
        return state if whole and hashlib.sha256(index).hexdigest() == state["index_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_columns(folder: Path, name: str) -> Columns:
    """The columns of the shard's sidecar, records that were dropped as duplicates included."""
    with np.load(folder / STATE / f"{name}.npz", allow_pickle=False) as arrays:
        fields: dict[str, Any] = {"labels": {}, "bayes": {}}
        for key in arrays.files:
            field, _, task = key.partition("/")
            if task:
                fields[field][task] = arrays[key]
            else:
                fields[field] = arrays[key]
    return Columns(**fields)


def drop_records(folder: Path, name: str, drop: list[str]) -> dict[str, Any]:
    """Rewrite the shard without the records `drop` (ids); returns its new sidecar."""
    state = json.loads((folder / STATE / f"{name}.json").read_bytes())
    index = np.load(folder / (name + schema.INDEX_SUFFIX), allow_pickle=False)
    gone = {drop_id.encode() for drop_id in drop}
    payloads = list(schema.read_frames(folder / name))
    keep = np.array([_id_bytes(p, row) not in gone for p, row in zip(payloads, index, strict=True)], bool)
    rows = index[keep]
    start = np.cumsum(rows["length"].astype(np.uint64) + np.uint64(schema.FRAME_EXTRA)) if len(rows) else rows["frame"]
    start = np.concatenate([np.zeros(1, np.uint64), start[:-1]])[: len(rows)]
    rows["signal"] = rows["signal"] - rows["frame"] + start
    rows["frame"] = start
    state |= _store(folder, name, (schema.frame(p) for p, k in zip(payloads, keep, strict=True) if k), rows)
    state["dropped"] = sorted(drop)
    write_atomic(folder / STATE / f"{name}.json", [json_bytes(state)])
    return state


def _id_bytes(payload: bytes, row: np.void) -> bytes:
    at = int(row["id"]) - schema.HEADER
    return payload[at : at + int(row["id_length"])]
