"""The tables of a sweep, and what is shown while it goes on.

    runs.csv             what became of each trial and run, a row each, in the order of the jobs
    results.csv          the eval log of all runs that have ended, for `ecg-jax fit`
    results-DATA.csv     that of a further data set

Invariant: but for `seconds`, the finished tables are the same however often the sweep was killed on its way.
"""

import csv
import fcntl
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ecg_jax import files
from ecg_jax.sweep import cells
from ecg_jax.sweep.folder import Folder
from ecg_jax.sweep.jobs import Job
from ecg_jax.training.folder import METRICS

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


def write_results(folder: Folder) -> list[Path]:
    """Write the eval logs of all runs that have ended, a table for each data set that has any; returns their paths."""
    from ecg_jax.evaluation import evalog

    written = []
    for runs in sorted(folder.root.glob("runs*/")):
        ended = sorted(path.parent for path in runs.glob(f"*/{evalog.NAME}"))
        if ended:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(evalog.FIELDS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(evalog.read(ended))
            written.append(folder.root / f"{runs.name.replace('runs', 'results', 1)}.csv")
            with folder.alone():
                files.write(written[-1], text.getvalue())
    return written


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


SHOWN = {"done": STATES[:2], "diverged": STATES[2:3], "failed": STATES[3:4], "running": STATES[4:5], "left": STATES[5:]}


def live(folder: Folder, jobs: Sequence[Job], states: dict[str, str], head: str, most: Callable[[Job], int]) -> Any:
    """For a terminal (a rich renderable): `head`, where the running jobs are and their steps at `most`, and jobs by
    family. Fits 80 columns. What matters most is on top, since a low terminal cuts the end off.
    """
    from rich.console import Group
    from rich.table import Table

    def columns(first: str, *rest: str) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        made.add_column(first, no_wrap=True, overflow="ellipsis")
        for name in rest:
            made.add_column(name, justify="right", no_wrap=True)
        return made

    running = columns("running", "step", "at most", "train", "best val")
    for job in (job for job in jobs if states[job.name] == "running"):
        now = _latest(folder.place(job) / METRICS) if job.kind != "codes" else {}
        steps = (f"{now['step']:,}" if "step" in now else "", f"{most(job):,}" if most(job) else "")
        losses = ("" if now.get(name) is None else f"{now[name]:.4f}" for name in ("train/loss", "val/best"))
        running.add_row(job.name, *steps, *losses)
    counted: dict[str, Counter] = {}
    for job in jobs:
        data = f"{job.cell.data} " if job.cell and len(folder.sweep.data) > 1 else ""
        family = f"{data}{job.kind}s {' '.join(job.cell.family)}" if job.cell else "stages"
        counted.setdefault(family, Counter())[states[job.name]] += 1
    sums = {family: [sum(n[state] for state in group) for group in SHOWN.values()] for family, n in counted.items()}
    there = [i for i in range(len(SHOWN)) if any(row[i] for row in sums.values())]
    by_family = columns("", *(list(SHOWN)[i] for i in there))
    for family, row in sums.items():
        by_family.add_row(family, *(str(row[i] or "") for i in there))
    return Group(head, *([running] if running.row_count else []), by_family)


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
