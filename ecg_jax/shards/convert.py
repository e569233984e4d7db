"""Raw recordings to a data folder: plan the shards, write the missing ones in a pool of processes, finish.

`ecg-jax convert` is this function. It reads nothing itself (the source does) and prepares nothing (`records`
does). Invariants: the bytes do not depend on the number of workers or on how often the run was interrupted; a
folder has a card only when it is complete; a folder is never continued with other arguments or another
source.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ecg_jax.datasets.source import PackedItems, Source, pack
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.records.beats import DETECTOR
from ecg_jax.records.preprocess import CHAINS
from ecg_jax.shards import pool, schema
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.finish import finish
from ecg_jax.shards.grouping import ShardPlan, check_shards, plan, record_bytes, survey
from ecg_jax.shards.pseudonyms import Pseudonyms
from ecg_jax.shards.resume import finished, identity_of, locked, refuse_refusals, resume, unlink
from ecg_jax.shards.schema import CARD
from ecg_jax.shards.writer import Job, json_bytes, read_state


def convert(
    source: Source,
    out: Path,
    *,
    shards: int | None = None,
    workers: int = 1,
    chain: str = "default",
    leads: schema.Leads = "12",
    windows: str | None = None,
    missing_leads: Literal["refuse", "zero"] = "refuse",
    limit: int | None = None,
    dry_run: bool = False,
    pseudonymise: Path | None = None,
    strict: bool = False,
    against: Sequence[Path] = (),
    runner: Literal["local", "beam"] = "local",
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `out`/<name>/<version>/ from `source`, or go on where an interrupted run stopped.

    shards         of the train split, a multiple of 8; None goes by size
    workers        processes; 1 works in this one. The bytes are the same for any number
    missing_leads  a recording that lacks leads is refused, or gets zeros there and a quality bit
    limit          only the first so many items of the source; the others count as skipped
    dry_run        counts and sizes, nothing written
    pseudonymise   file with a secret: patient and record ids become keyed hashes
    strict         a refused record or window fails the conversion
    against        other data folders: recordings that are there too are listed in overlaps.jsonl
    runner         local: `workers` processes of this machine; beam: an Apache Beam pipeline with `beam_options`,
                   each "name=value" (see `beam`). The bytes are the same

    Returns the card, with `path` and `report` (shards written and kept, or the estimate of a dry run) added.
    Raises UsageError for wrong arguments or a folder begun with others, DataError for bad data (nothing is
    left behind), MachineError for a full or read-only disk (finished shards are kept, no card).
    """
    out = Path(out)
    check_shards(shards)
    source = _limited(source, limit)
    job = _job(source, out, chain, leads, windows, missing_leads, pseudonymise, strict)
    write = _writer(runner, beam_options)
    others = [open_folder(path) for path in against]
    listing = survey(source.name, source.items, job.pseudonyms or str)
    plans = plan(listing, leads, shards)
    identity = identity_of(job, source, listing, shards, limit)
    compared = {"--against": {f"{o.card['name']}/{o.card['version']}": o.card["signatures"]["sha256"] for o in others}}
    if dry_run:
        return _dry_run(job, plans, identity)
    first_new = next((p for p in reversed([job.folder, *job.folder.parents]) if not p.exists()), None)
    with locked(job.folder):
        kept = resume(job, plans, identity)
        if strict:
            refuse_refusals(job.folder, kept)
        todo = [p for p in plans if p.file_name(source.name) not in kept]
        card = finished(job.folder)
        if not todo and card and card.get("identity") == json.loads(json_bytes(identity | compared)):
            return card | {"path": str(job.folder), "report": {"shards_written": 0, "shards_kept": len(kept)}}
        unlink(job.folder / CARD)  # from here on the folder is not complete, whatever it was before
        try:
            write(job, todo, workers)
        except DataError:
            # Work that a corrected source can go on from is worth keeping; a shard of refusals alone is not.
            done = [read_state(job.folder, p.file_name(source.name)) or {} for p in plans]
            if not kept and (strict or not any(state.get("prepared") for state in done)):
                _remove(job.folder, first_new)
            raise
        try:
            card = finish(job, plans, identity | compared, others)
        except DataError:  # the source itself must change, so nothing of this can be gone on from
            _remove(job.folder, first_new)
            raise
    report = {"shards_written": len(todo), "shards_kept": len(plans) - len(todo)}
    return card | {"path": str(job.folder), "report": report}


def _writer(runner: str, beam_options: Sequence[str]) -> Callable[[Job, list[ShardPlan], int], None]:
    if runner == "local":
        if beam_options:
            raise UsageError(f"--beam-option {beam_options[0]}: only with --runner beam")
        return pool.write_shards
    if runner != "beam":
        raise UsageError(f"--runner {runner}: known are local, beam")
    from ecg_jax.shards import beam  # the extra is not everybody's

    options = beam.pipeline_options(beam_options)
    return lambda job, todo, workers: beam.write_shards(job, todo, options)


def _limited(source: Source, limit: int | None) -> Source:
    """`source` with packed items, the first `limit` of them."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least 1")
    items = source.items if isinstance(source.items, PackedItems) else pack(source.items)
    if not len(items):
        left_out = "".join(f", {count:,} left out: {reason}" for reason, count in source.skipped.items())
        raise DataError(f"{source.name}: the source lists no recordings{left_out}")
    skipped = {reason: int(count) for reason, count in source.skipped.items() if count}
    if limit is not None and limit < len(items):
        skipped["--limit"] = len(items) - limit
    return replace(source, items=items[:limit], skipped=skipped)


def _job(
    source: Source,
    out: Path,
    chain: str,
    leads: schema.Leads,
    windows: str | None,
    missing_leads: str,
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
    if missing_leads not in ("refuse", "zero"):
        raise UsageError(f"--missing-leads {missing_leads}: known are refuse, zero")
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
        missing_leads=missing_leads,
        pseudonyms=Pseudonyms.load(pseudonymise) if pseudonymise else None,
        strict=strict,
    )


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
        "skipped": job.source.skipped,
        "source": job.source.about,
        "path": str(job.folder),
        "report": {
            "dry_run": True,
            "bytes": sum(found["bytes"] for found in splits.values()),
            "free_bytes": shutil.disk_usage(place).free,
        },
    }
