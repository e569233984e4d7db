"""Raw recordings to a data folder: plan the shards, write the missing ones in a pool of processes, finish.

`ecg-jax convert` is this function. It reads nothing itself (the source does) and prepares nothing (`records`
does). Invariants: the bytes do not depend on the number of workers or on how often the run was interrupted; a
folder has a card only when it is complete; a folder is never continued with other arguments or another
source.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from ecg_jax.datasets.source import Item, Source
from ecg_jax.errors import DataError, MachineError, UsageError, did_you_mean
from ecg_jax.progress import track
from ecg_jax.records.beats import DETECTOR
from ecg_jax.records.preprocess import CHAINS
from ecg_jax.shards import schema
from ecg_jax.shards.finish import code_versions, finish
from ecg_jax.shards.grouping import ShardPlan, plan, record_bytes
from ecg_jax.shards.schema import CARD, STATE
from ecg_jax.shards.writer import (
    Job,
    Pseudonyms,
    json_bytes,
    machine_error,
    read_state,
    write_atomic,
    write_shard,
)

PLAN, LOCK = "plan.json", "lock"
MIN_ITEMS_PER_WORKER = 100  # starting a process costs about as much as preparing so many


def convert(
    source: Source,
    out: Path,
    *,
    shards: int | None = None,
    workers: int = 1,
    chain: str = "default",
    leads: schema.Leads = "12",
    windows: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    pseudonymise: Path | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Write `out`/<name>/<version>/ from `source`, or go on where an interrupted run stopped.

    shards        of the train split, a multiple of 8; None goes by size
    workers       processes; 1 works in this one. The bytes are the same for any number
    limit         only the first so many items of the source
    dry_run       counts and sizes, nothing written
    pseudonymise  file with a secret: patient and record ids become keyed hashes
    strict        a refused record fails the conversion

    Returns the card, with `path` and `report` (shards written and kept, or the estimate of a dry run) added.
    Raises UsageError for wrong arguments or a folder begun with others, DataError for bad data (nothing is
    left behind), MachineError for a full or read-only disk (finished shards are kept, no card).
    """
    out = Path(out)
    job = _job(source, out, chain, leads, windows, pseudonymise, strict)
    items = _items(source, limit)
    plans = plan(source.name, items, leads, shards, job.pseudonyms or str)
    identity = _identity(job, source, items, shards, limit)
    if dry_run:
        return _dry_run(job, plans, identity)
    first_new = next((p for p in reversed([job.folder, *job.folder.parents]) if not p.exists()), None)
    with _locked(job.folder):
        kept = _resume(job, plans, identity)
        if strict:
            _refuse_refusals(job.folder, kept)
        todo = [p for p in plans if p.file_name(source.name) not in kept]
        if not todo and (card := _finished(job.folder)):
            return card | {"path": str(job.folder), "report": {"shards_written": 0, "shards_kept": len(kept)}}
        _unlink(job.folder / CARD)  # from here on the folder is not complete, whatever it was before
        try:
            _write(job, todo, workers)
        except DataError:
            # Work that a corrected source can go on from is worth keeping; a shard of refusals alone is not.
            done = [read_state(job.folder, p.file_name(source.name)) or {} for p in plans]
            if not kept and (strict or not any(state.get("prepared") for state in done)):
                _remove(job.folder, first_new)
            raise
        try:
            card = finish(job, plans, identity)
        except DataError:  # the source itself must change, so nothing of this can be gone on from
            _remove(job.folder, first_new)
            raise
    report = {"shards_written": len(todo), "shards_kept": len(plans) - len(todo)}
    return card | {"path": str(job.folder), "report": report}


def _job(
    source: Source,
    out: Path,
    chain: str,
    leads: schema.Leads,
    windows: str | None,
    pseudonymise: Path | None,
    strict: bool,
) -> Job:
    if chain not in CHAINS:
        raise UsageError(f"--chain {chain}: known are {', '.join(CHAINS)}{did_you_mean(chain, list(CHAINS))}")
    if leads not in schema.LEAD_NAMES:
        raise UsageError(f"--leads {leads}: known are {', '.join(schema.LEAD_NAMES)}")
    windows = windows or source.default_windows
    if windows not in ("all", "first"):
        raise UsageError(f"--windows {windows}: known are all, first")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", source.name):
        raise UsageError(f"data set name {source.name!r}: use small letters, digits, '-' and '_', a letter first")
    if not re.fullmatch(r"\d+\.\d+\.\d+", source.version):
        raise UsageError(f"version {source.version!r} of {source.name}: must look like 1.0.0")
    for task, names in source.tasks.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", task) or not names or len(set(names)) < len(names):
            raise DataError(f"{source.name}: task {task!r} needs a plain name and label names that differ: {names}")
    return Job(
        source=replace(source, items=()),
        folder=out / source.name / source.version,
        chain=CHAINS[chain],
        windows=windows,
        leads=leads,
        pseudonyms=Pseudonyms.load(pseudonymise) if pseudonymise else None,
        strict=strict,
    )


def _items(source: Source, limit: int | None) -> Sequence[Item]:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1")
    items = source.items[:limit]
    if not items:
        raise DataError(f"{source.name}: the source lists no recordings")
    seen: set[str] = set()
    for item in items:
        if item.record_id in seen:
            raise DataError(f"{source.name}: record id {item.record_id!r} is listed twice: ids must be unique")
        seen.add(item.record_id)
    return items


# ------------------------------------------------------------------------------------------- what is going on


def _identity(job: Job, source: Source, items: Sequence[Item], shards: int | None, limit: int | None) -> dict[str, Any]:
    """Everything that the bytes depend on, by the names that a user knows."""
    listing = hashlib.sha256()
    for item in items:
        listing.update(json.dumps([item.record_id, item.group, item.split]).encode() + b"\n")
    return {
        "dataset": source.name,
        "version": source.version,
        "unit": source.unit,
        "tasks": {task: list(names) for task, names in source.tasks.items()},
        "recordings": len(items),
        "listing": listing.hexdigest()[:16],
        "source": json.loads(schema.meta_json(source.about)),
        "--chain": f"{job.chain.name} {job.chain.digest()}",
        "--leads": job.leads,
        "--windows": job.windows,
        "--shards": shards,
        "--limit": limit,
        "--pseudonymise": job.pseudonyms.check if job.pseudonyms else None,
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it: two conversions into one folder would remove each other's temporary
    files."""
    state = folder / STATE
    try:
        if folder.exists() and not _is_ours(folder) and any(folder.iterdir()):
            raise UsageError(f"{folder} holds something that is no conversion: choose another --out")
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / LOCK).open("w")
    except OSError as error:
        raise machine_error(Path(error.filename or folder), error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another `ecg-jax convert` is writing there; wait for it") from None
        except OSError:
            pass  # a file system without locks: the user has to take care
        yield


def _is_ours(folder: Path) -> bool:
    return (folder / STATE).is_dir()


def _resume(job: Job, plans: list[ShardPlan], identity: dict[str, Any]) -> set[str]:
    """Names of the shards that are already written. Refuses a folder that was begun otherwise."""
    path = job.folder / STATE / PLAN
    names = [p.file_name(job.source.name) for p in plans]
    kept = {name for name in names if read_state(job.folder, name)}
    before: dict[str, Any] | None = None
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            raise DataError(f"{path} is damaged: delete {job.folder} and convert again") from None
    now = {**identity, "code": ", ".join(f"{name} {found}" for name, found in code_versions().items())}
    if before is None:
        write_atomic(path, [json_bytes(now)])
    else:
        # Other code may find a folder complete, but may not mix its shards with these.
        complete = (job.folder / CARD).exists() and len(kept) == len(plans)
        keys = [key for key in now if key != "code" or not complete]
        if differing := [key for key in keys if before.get(key) != now[key]]:
            changes = "; ".join(f"{k}: {_short(before.get(k))} then, {_short(now[k])} now" for k in differing)
            raise UsageError(
                f"{job.folder} was begun otherwise ({changes}): repeat that command, delete the folder, or "
                "choose another --out"
            )
    for stale in [*job.folder.glob("*.tmp"), *(job.folder / STATE).glob("*.tmp")]:
        _unlink(stale)
    return kept


def _refuse_refusals(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        for line in (read_state(folder, name) or {}).get("refused", []):
            raise DataError(f"{folder}: record {line['id']} is refused ({line['reason']}): --strict accepts none")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:24]}...{text[-12:]}"


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / CARD).read_bytes())
    except (OSError, ValueError):
        return None


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise machine_error(path, error) from None


def _remove(folder: Path, first_new: Path | None) -> None:
    """Remove the data folder, and those of its parents that this run created."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if first_new is None or not (parent == first_new or first_new in parent.parents):
            return
        try:
            parent.rmdir()
        except OSError:
            return


# ------------------------------------------------------------------------------------------------ the workers

_JOB: Job | None = None  # of a pool process


def _start(job: Job) -> None:
    global _JOB
    _JOB = job
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A parent killed outright tells its workers nothing, and they would go on writing beside its successor's.
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _work(todo: ShardPlan) -> None:
    if _JOB is None:
        raise RuntimeError("a worker without its job")
    write_shard(_JOB, todo)


def _write(job: Job, todo: list[ShardPlan], workers: int) -> None:
    items = sum(len(p.items) for p in todo)
    workers = max(1, min(workers, len(todo), items // MIN_ITEMS_PER_WORKER))
    if workers == 1:
        for shard in track(todo, f"convert {job.source.name}", unit="shards"):
            write_shard(job, shard)
        return
    # Spawned, never forked: a fork copies locks of whatever threads the caller has (TensorFlow's, say).
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(job,)) as pool:
        futures = [pool.submit(_work, shard) for shard in todo]
        try:
            for future in track(as_completed(futures), f"convert {job.source.name}", len(todo), "shards"):
                future.result()
        except BrokenProcessPool:
            raise MachineError(
                "a worker process was killed, mostly for want of memory; the shards written so far are "
                "kept: run the same command again with fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _dry_run(job: Job, plans: list[ShardPlan], identity: dict[str, Any]) -> dict[str, Any]:
    """What the card would begin with, by the listing alone: nothing is read, so refusals and windows are not
    known."""
    splits: dict[str, dict[str, int]] = {}
    for shard in plans:
        found = splits.setdefault(shard.split, {"records": 0, "patients": 0, "shards": 0, "bytes": 0})
        found["records"] += len(shard.items)
        found["patients"] += len({item.group for item in shard.items})
        found["shards"] += 1
        found["bytes"] += len(shard.items) * record_bytes(job.leads)
    place = next(p for p in [job.folder, *job.folder.parents] if p.exists())
    return {
        "name": job.source.name,
        "version": job.source.version,
        "rate": schema.RATE,
        "length": schema.LENGTH,
        "unit": job.source.unit,
        "leads": list(schema.LEAD_NAMES[job.leads]),
        "chain": {"name": job.chain.name, "digest": job.chain.digest(), "steps": job.chain.describe()},
        "detector": DETECTOR,
        "windows": job.windows,
        "tasks": identity["tasks"],
        "splits": splits,
        "prevalence": {task: {} for task in identity["tasks"]},
        "refused": {},
        "source": job.source.about,
        "path": str(job.folder),
        "report": {
            "dry_run": True,
            "bytes": sum(found["bytes"] for found in splits.values()),
            "free_bytes": shutil.disk_usage(place).free,
        },
    }
