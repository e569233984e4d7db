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
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ecg_jax.datasets.source import Item, Source
from ecg_jax.errors import DataError, MachineError
from ecg_jax.records.leads import INDEPENDENT, LEADS, expand_matrix
from ecg_jax.records.preprocess import Chain, prepare_many
from ecg_jax.records.record import Prepared, Record, Refused
from ecg_jax.shards import schema
from ecg_jax.shards.grouping import ShardPlan, hash64
from ecg_jax.shards.pseudonyms import Pseudonyms
from ecg_jax.shards.remedies import remedy
from ecg_jax.shards.schema import STATE

WRITE_BUFFER = 1 << 20
CHUNK, CHUNK_VALUES = 128, 1 << 23  # recordings, or samples of all leads, prepared together: 32 MB
EIGHT_LEADS_TOLERANCE = 20.0  # uV; rounding alone leaves 1.5


@dataclass(frozen=True)
class Job:
    """What every shard of one conversion shares; pickles."""

    source: Source  # its items removed: each shard brings its own
    folder: Path
    chain: Chain
    windows: str
    leads: schema.Leads
    missing_leads: Literal["refuse", "zero"]
    pseudonyms: Pseudonyms | None
    strict: bool

    @property
    def id_space(self) -> str:
        """Name under which group hashes are comparable: data sets that share patient ids state the same one."""
        return str(self.source.about.get("id_space", self.source.name))


class Columns(NamedTuple):
    """What the pass over all shards needs of one shard, a row per prepared record, in file order."""

    record_id: np.ndarray  # UTF-8 bytes
    group: np.ndarray  # uint64, comparable inside the id space
    patient: np.ndarray  # uint64 hash of the patient id, 0 where unknown
    order: np.ndarray  # uint64 place on the subset circle
    signature: np.ndarray  # uint64 [n, 2]
    source: np.ndarray  # uint8 [n, 32]
    recording: np.ndarray  # int32, which of the shard's items it is a window of
    amplitude: np.ndarray  # float32, `meta["amplitude"]`; NaN where the record has none
    quality: np.ndarray  # int64, bits of `audit.Quality`
    labels: dict[str, np.ndarray]  # int8 [n, K]
    bayes: dict[str, np.ndarray]  # float64 [n, K], only where the records carry it


# ----------------------------------------------------------------------------------------------- atomic files


def write_atomic(path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    """Write `chunks` to `path` under a temporary name, flush to disk, rename. Returns (bytes, sha256 hex).

    Raises MachineError (disk full, read-only, ...) with nothing left of this file.
    """
    # Not the process id: workers on several machines may have the same.
    temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb", buffering=WRITE_BUFFER) as file:
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
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
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

    Raises DataError at the first refused record or window if `job.strict`, MachineError where the disk fails.
    """
    name = plan.file_name(job.source.name)
    rows: list[_Row] = []
    refused: list[dict[str, Any]] = []
    written = 0
    for recording, (record_id, outcome) in enumerate(_prepared(job, plan)):
        kept, lines = _settled(job, record_id, outcome)
        if lines and job.strict:
            first = lines[0]
            raise DataError(f"record {first['id']}: {first['reason']}: {first['detail']} (--strict accepts no refusal)")
        refused += lines
        written += bool(kept)
        rows += [_row(job, recording, p) for p in kept]
    rows.sort(key=lambda row: (row.order, row.record_id))
    index = np.zeros(len(rows), schema.IndexRow)
    at = 0
    for i, row in enumerate(rows):
        encoded = row.encoded
        index[i] = (
            at,
            len(encoded.payload),
            at + schema.HEADER + encoded.signal,
            schema.HEADER + encoded.id,
            encoded.id_length,
            plan.number,
            row.valid,
            hash64("split", job.source.name, row.group),
            hash64("shard", job.source.name, row.group),
            row.order,
            hash64("group", job.id_space, row.group),
            hash64("record", job.source.name, row.record_id),
        )
        at += len(encoded.payload) + schema.FRAME_EXTRA
    write_atomic(job.folder / STATE / f"{name}.npz", [npz_bytes(_columns(job, rows, index))])
    state = store(job.folder, name, (part for row in rows for part in schema.frame_parts(row.encoded.payload)), index)
    state |= {"items": len(plan.items), "written": written, "prepared": len(rows), "refused": refused, "dropped": []}
    write_atomic(job.folder / STATE / f"{name}.json", [json_bytes(state)])


class _Row(NamedTuple):
    """A window on its way into the shard: its bytes, and what index and columns need. The `Prepared` itself would
    double the shard's memory."""

    order: int  # place on the subset circle
    record_id: str
    encoded: schema.Encoded
    recording: int  # which of the shard's items
    group: str
    patient_id: str
    valid: tuple[int, int]
    signature: bytes
    source: bytes
    amplitude: float
    quality: int
    labels: dict[str, np.ndarray]
    bayes: dict[str, list[float] | None]


def _row(job: Job, recording: int, p: Prepared) -> _Row:
    amplitude = p.meta.get("amplitude")
    return _Row(
        order=hash64("order", job.source.name, p.group),
        record_id=p.record_id,
        encoded=schema.encode_indexed(p, job.leads),
        recording=recording,
        group=p.group,
        patient_id=p.patient_id,
        valid=p.valid,
        signature=p.signature,
        source=p.source,
        amplitude=np.nan if amplitude is None else amplitude,
        quality=p.quality,
        labels=p.labels,
        bayes={task: bayes_of(p.meta, task, len(names)) for task, names in job.source.tasks.items()},
    )


def store(folder: Path, name: str, frames: Iterable[bytes], index: np.ndarray) -> dict[str, Any]:
    size, digest = write_atomic(folder / name, frames)
    _, index_digest = write_atomic(folder / (name + schema.INDEX_SUFFIX), [npy_bytes(index)])
    return {"records": len(index), "bytes": size, "sha256": digest, "index_sha256": index_digest}


Outcome = list[Prepared | Refused] | Refused


def _prepared(job: Job, plan: ShardPlan) -> Iterator[tuple[str, Outcome]]:
    """(record id as stored, what became of it) for every item, in the order of the source: the files' order."""
    listed = list(plan.items)  # unpacked once
    chunk: list[tuple[Item, Record | Refused]] = []
    values = 0
    for item, record in zip(listed, job.source.read(listed), strict=True):
        if isinstance(record, Record):
            if (record.record_id, record.group) != (item.record_id, item.group):
                raise ValueError(f"read() answered item {item.record_id} with record {record.record_id}")
            record = _renamed(job, record)
            values += record.signal.size
        chunk.append((item, record))
        if len(chunk) == CHUNK or values > CHUNK_VALUES:
            yield from _outcomes(job, chunk)
            chunk, values = [], 0
    yield from _outcomes(job, chunk)


def _outcomes(job: Job, chunk: list[tuple[Item, Record | Refused]]) -> Iterator[tuple[str, Outcome]]:
    ready = [record for _, record in chunk if isinstance(record, Record)]
    done = iter(prepare_many(ready, job.chain, job.windows, job.missing_leads, job.leads) if ready else ())
    for item, record in chunk:
        outcome = next(done) if isinstance(record, Record) else record
        if not isinstance(outcome, Refused) and job.leads == "8":
            outcome = [_eight_leads(p) for p in outcome]
        yield (job.pseudonyms(item.record_id) if job.pseudonyms else item.record_id), outcome


def _renamed(job: Job, record: Record) -> Record:
    if job.pseudonyms is None:
        return record
    hide = job.pseudonyms
    patient = record.patient_id and hide(record.patient_id)
    return replace(record, record_id=hide(record.record_id), group=hide(record.group), patient_id=patient)


def _eight_leads(p: Prepared | Refused) -> Prepared | Refused:
    """`p`, if the four other limb leads follow from I and II and so need not be stored."""
    if isinstance(p, Refused):
        return p
    start, length = p.valid
    signal = p.signal[start : start + length].astype(np.float32)
    off = np.percentile(np.abs(signal[:, _EIGHT] @ _MATRIX - signal).max(1), 99)
    if off <= EIGHT_LEADS_TOLERANCE:
        return p
    detail = f"limb leads differ from those that I and II give by {off:.0f} uV: convert with --leads 12"
    return Refused("leads-inconsistent", f"{p.record_id}: {detail}")


_MATRIX, _EIGHT = expand_matrix(), [LEADS.index(lead) for lead in INDEPENDENT]


def _settled(job: Job, record_id: str, outcome: Outcome) -> tuple[list[Prepared], list[dict[str, Any]]]:
    """(windows to store, quarantine lines) of one recording. A recording that keeps any window is not refused; one that
    keeps none has a single line, however many windows it had."""
    if isinstance(outcome, Refused):
        return [], [_quarantine_line(job, record_id, outcome)]
    kept = [p for p in outcome if not isinstance(p, Refused)]
    gone = [p for p in outcome if isinstance(p, Refused)]
    if not kept:
        of_first = f"every window was refused, the first as {gone[0].detail}" if len(gone) > 1 else gone[0].detail
        return [], [_quarantine_line(job, record_id, Refused(gone[0].reason, of_first))]
    lines = []
    for refusal in gone:
        window = re.match(r"#\d+(?=: )", refusal.detail.removeprefix(" ".join(record_id.split())))
        if window is None:
            raise ValueError(f"a refused window of {record_id} does not name itself: {refusal.detail[:60]}")
        lines.append(_quarantine_line(job, record_id + window[0], refusal) | {"window": True})
    return kept, lines


def _quarantine_line(job: Job, record_id: str, refused: Refused) -> dict[str, Any]:
    # A detail may quote file names and header lines, so it may quote a patient.
    hidden = "withheld (--pseudonymise): convert without it to read the detail"
    detail = hidden if job.pseudonyms else refused.detail
    return {"id": record_id, "reason": refused.reason, "detail": detail, "remedy": remedy(refused.reason)}


# ------------------------------------------------------------------------------------------------ the sidecar


def _columns(job: Job, rows: list[_Row], index: np.ndarray) -> Columns:
    n = len(rows)
    labels, bayes = {}, {}
    if extra := [row.record_id for row in rows if set(row.labels) != set(job.source.tasks)]:
        raise ValueError(f"{extra[0]}: has other label tasks than the source declares: {sorted(job.source.tasks)}")
    for task, names in job.source.tasks.items():
        if wrong := [row.record_id for row in rows if len(row.labels[task]) != len(names)]:
            raise ValueError(f"{wrong[0]}: task {task!r} has not {len(names)} labels")
        labels[task] = np.array([row.labels[task] for row in rows], np.int8).reshape(n, len(names))
        if n and all(row.bayes[task] is not None for row in rows):
            bayes[task] = np.array([row.bayes[task] for row in rows], np.float64).reshape(n, len(names))
    patient = [hash64("group", job.id_space, row.patient_id) if row.patient_id else 0 for row in rows]
    return Columns(
        record_id=np.array([row.record_id.encode() for row in rows], np.bytes_),
        group=index["group"].copy(),
        patient=np.array(patient, np.uint64),
        order=index["order_hash"].copy(),
        signature=np.frombuffer(b"".join(row.signature for row in rows), "<u8").reshape(n, 2),
        source=np.frombuffer(b"".join(row.source for row in rows), np.uint8).reshape(n, schema.SOURCE_BYTES),
        recording=np.array([row.recording for row in rows], np.int32),
        amplitude=np.array([row.amplitude for row in rows], np.float32),
        quality=np.array([row.quality for row in rows], np.int64),
        labels=labels,
        bayes=bayes,
    )


def bayes_of(meta: dict[str, Any], task: str, count: int) -> list[float] | None:
    """The Bayes probabilities [K] of `task` that a simulator left in `meta["bayes"]`: per task, or one bare
    list."""
    bayes = meta.get("bayes")
    values = bayes.get(task) if isinstance(bayes, dict) else bayes
    return None if values is None or len(values) != count else list(values)


def npz_bytes(columns: Columns) -> bytes:
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
    left = (p for p, k in zip(payloads, keep, strict=True) if k)
    state |= store(folder, name, (part for p in left for part in schema.frame_parts(p)), rows)
    state["dropped"] = sorted(drop)
    write_atomic(folder / STATE / f"{name}.json", [json_bytes(state)])
    return state


def _id_bytes(payload: bytes, row: np.void) -> bytes:
    at = int(row["id"]) - schema.HEADER
    return payload[at : at + int(row["id_length"])]
