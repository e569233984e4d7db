"""The results table of a sweep (`runs.csv`), and what is shown while it goes on.

A row for each trial and run, in the order of the jobs. Invariant: but for `seconds`, the finished table is the same
however often the sweep was killed on its way.
"""

import csv
import fcntl
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecg_jax import files
from ecg_jax.sweep import cells
from ecg_jax.sweep.folder import Folder
from ecg_jax.sweep.jobs import Job

NAME = "runs.csv"
STATES = ("done", "unconverged", "diverged", "failed", "running", "interrupted", "ready", "waiting")
ENDED = STATES[:4]


def rows(folder: Folder, jobs: Sequence[Job], states: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each trial and run; None where a number is not known yet."""
    out = []
    for job in jobs:
        if job.cell is None:
            continue
        found = folder.summary(job)
        losses, ended = found.get("losses") or {}, states[job.name] in ENDED[:3]
        row = {"run": job.name, "kind": job.kind, "status": states[job.name]} | cells.columns(job.cell)
        row |= {"n_records": found.get("n_records"), "lr": job.lr if job.lr is not None else found.get("lr")}
        row |= {"trial": job.trial, "val": losses.get("val"), "test": losses.get("test")}
        row |= {name: found.get(name) if ended else None for name in ("step", "examples_seen", "flops")}
        row |= {"seconds": (found.get("seconds") or {}).get("wall"), "error": None}
        if states[job.name] == "failed":
            row["error"] = folder.failure(job).get("error")
        out.append(row)
    return out


def write(folder: Folder, found: Sequence[dict[str, Any]], wait: bool = False) -> None:
    """Write `runs.csv`, whole or not at all; left to another launcher that is just doing it, unless `wait`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    with open(folder.root / "claims" / f".{NAME}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        files.write(folder.root / NAME, text.getvalue())


def tally(jobs: Sequence[Job], states: dict[str, str]) -> str:
    """ "31 of 64 ended (30 done, 1 diverged), 2 running, ..."."""
    number = Counter(states.values())
    ended = [f"{number[state]} {state}" for state in ENDED if number[state]]
    rest = [f"{number[state]} {state}" for state in STATES[4:] if number[state]]
    counted = f"{sum(number[state] for state in ENDED)} of {len(jobs)} ended"
    return ", ".join([counted + (f" ({', '.join(ended)})" if ended else ""), *rest])


def line(folder: Folder, job: Job, state: str) -> str:
    """What became of a job, in a line."""
    if state == "failed":
        return f"{job.name}: failed: {folder.failure(job).get('error')}"
    if state not in ENDED:
        return f"{job.name}: {state}"
    found = folder.summary(job)
    losses = found.get("losses") or {}
    known = [f"{name} {losses[name]:.4f}" for name in ("val", "test") if losses.get(name) is not None]
    seconds = (found.get("seconds") or {}).get("wall")
    return ", ".join([f"{job.name}: {state}", *known, *([f"{seconds:.0f} s"] if seconds else [])])


def live(folder: Folder, jobs: Sequence[Job], states: dict[str, str]) -> Any:
    """For a terminal: jobs by family and state, and where the running ones are (a rich renderable)."""
    from rich.console import Group
    from rich.table import Table

    counted: dict[str, Counter] = {}
    for job in jobs:
        family = f"{job.kind}s {' '.join(job.cell.family)}" if job.cell else "stages"
        counted.setdefault(family, Counter())[states[job.name]] += 1
    shown = [state for state in STATES if any(number[state] for number in counted.values())]
    by_family = Table("", *shown, box=None)
    for family, number in counted.items():
        by_family.add_row(family, *(str(number[state] or "") for state in shown))
    running = Table("running", "step", "train loss", "val", "best val", box=None)
    for job in jobs:
        if states[job.name] == "running":
            now = _latest(folder.place(job) / "metrics.jsonl")
            values = (now.get(name) for name in ("train/loss", "val/loss", "val/best"))
            running.add_row(job.name, str(now.get("step", "")), *("" if v is None else f"{v:.4f}" for v in values))
    return Group(by_family, running, tally(jobs, states))


def _latest(path: Path) -> dict[str, Any]:
    """The last of each value in the last lines of a run's log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for text in lines:
        try:
            found |= json.loads(text)
        except ValueError:  # the first one is cut, the last one may be
            continue
    return found
