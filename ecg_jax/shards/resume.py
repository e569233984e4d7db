"""What a conversion finds in its folder: nothing, its own beginning to go on from, or something else to keep off.

Decides only whether and where to go on; writes nothing but the plan and the lock. Invariants: one conversion at a time
holds a folder; a folder is never continued with other arguments, another source or other code.
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecg_jax.datasets.source import Source
from ecg_jax.errors import DataError, UsageError
from ecg_jax.shards import schema
from ecg_jax.shards.finish import code_versions
from ecg_jax.shards.grouping import Listing, ShardPlan
from ecg_jax.shards.schema import CARD, STATE
from ecg_jax.shards.writer import Job, json_bytes, machine_error, read_state, write_atomic

PLAN, LOCK = "plan.json", "lock"
NAMED = 4  # differences named in a message


def identity_of(job: Job, source: Source, listing: Listing, shards: int | None, limit: int | None) -> dict[str, Any]:
    """Everything that the bytes depend on, by the names that a user knows."""
    return {
        "dataset": source.name,
        "version": source.version,
        "unit": source.unit,
        "tasks": {task: list(names) for task, names in source.tasks.items()},
        "recordings": len(listing.items),
        "listing": listing.digest,
        "source": json.loads(schema.meta_json(source.about)),
        "skipped": dict(job.source.skipped),
        "--chain": f"{job.chain.name} {job.chain.digest()}",
        "--leads": job.leads,
        "--windows": job.windows,
        "--missing-leads": job.missing_leads,
        "--shards": shards,
        "--limit": limit,
        "--pseudonymise": job.pseudonyms.check if job.pseudonyms else None,
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it: two conversions into one folder would remove each other's temporary
    files. Raises UsageError for a folder that is no conversion, or is held by another."""
    state = folder / STATE
    try:
        if folder.exists() and not state.is_dir() and any(folder.iterdir()):
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


def resume(job: Job, plans: Sequence[ShardPlan], identity: dict[str, Any]) -> set[str]:
    """Names of the shards that are already written; leftovers of a kill are removed.

    Raises UsageError for a folder that was begun otherwise, naming what differs; DataError for a damaged plan.
    """
    path = job.folder / STATE / PLAN
    names = [p.file_name(job.source.name) for p in plans]
    kept = {name for name in names if read_state(job.folder, name)}
    now = {**identity, "code": ", ".join(f"{name} {found}" for name, found in code_versions().items())}
    if not path.exists():
        write_atomic(path, [json_bytes(now)])
    else:
        try:
            before = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            before = None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        if not isinstance(before, dict):
            raise DataError(f"{path} is damaged: delete {job.folder} and convert again")
        # Other code may find a folder complete, but may not mix its shards with these.
        complete = (job.folder / CARD).exists() and len(kept) == len(plans)
        now = json.loads(json_bytes(now))
        for one in (before, now) if complete else ():
            one.pop("code", None)
        if found := differences(before, now):
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise UsageError(
                f"{job.folder} was begun otherwise ({'; '.join(found[:NAMED])}{more}): repeat that command, delete the "
                "folder, or choose another --out"
            )
    for stale in [*job.folder.glob("*.tmp"), *(job.folder / STATE).glob("*.tmp")]:
        unlink(stale)
    return kept


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, each innermost key in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*now, *(key for key in before if key not in now)]:
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    if before == now:
        return []
    then, today = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in (before, now))
    if then == today:  # a number became its text
        then, today = json.dumps(before), json.dumps(now)
    at = next((i for i, (a, b) in enumerate(zip(then, today, strict=False)) if a != b), min(len(then), len(today)))
    return [f"{name}: {_short(then, at)} then, {_short(today, at)} now"]


def _short(text: str, at: int) -> str:
    """At most some 40 letters of `text`, the one at `at` among them."""
    if len(text) <= 40:
        return text
    begin = max(0, min(at - 12, len(text) - 36))
    end = begin + 36
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"


def refuse_refusals(folder: Path, names: set[str]) -> None:
    """Raise DataError where a shard that is already written refused something: for --strict."""
    for name in sorted(names):
        for line in (read_state(folder, name) or {}).get("refused", []):
            raise DataError(f"{folder}: record {line['id']} is refused ({line['reason']}): --strict accepts none")


def finished(folder: Path) -> dict[str, Any] | None:
    """The card, if there is a whole one."""
    try:
        card = json.loads((folder / CARD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return card if isinstance(card, dict) else None


def unlink(path: Path) -> None:
    """Remove `path` if it is there. Raises MachineError where the disk refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise machine_error(path, error) from None
