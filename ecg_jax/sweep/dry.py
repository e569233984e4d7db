"""`ecg-jax sweep --dry-run`: every run of a sweep and what it will cost, before anything is run or downloaded.

Runs that are one of the learning-rate trials are listed and not counted twice. What is not in the totals is said below
them: trials that an optimum at an edge adds, the stages, and probes. Invariant: reads no record and touches no device.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecg_jax.sweep import cells, cost
from ecg_jax.sweep.cost import Device
from ecg_jax.sweep.folder import Folder
from ecg_jax.sweep.spec import Sweep


def dry_run(spec: Sweep, out: Path, device: Device) -> dict[str, Any]:
    """JSON-able: `runs` (one entry per trial and run, in order), `totals`, `notes`; of a sweep that `out` holds already
    with what has become of each run.

    Raises UsageError and DataError as launching would for the configuration, not for data that are not there.
    """
    folder = Folder(out, spec)
    planned = folder.jobs()
    states = folder.states([job for job in planned if job.cell]) if (out / "claims").is_dir() else {}
    trials = {job.cell for job in planned if job.kind == "trial"}
    known: dict[Any, cost.Cost] = {}
    runs = []
    for job in planned:
        if job.cell is None:
            continue
        place = (job.cell.data, job.cell.rung, job.cell.input, job.cell.paradigm, job.cell.subset)
        if place not in known:
            known[place] = cost.estimate(spec, job.cell, device)
        of = known[place]
        entry = {"run": job.name, "kind": job.kind} | cells.columns(job.cell)
        entry |= {"n_records": of.n_records, "lr": job.lr, "trial": job.trial}
        entry |= {name: list(getattr(of, name)) for name in ("epochs", "steps", "flops", "hours")}
        entry |= {"gib": of.gib, "is_trial": job.kind == "run" and job.cell in trials, "state": states.get(job.name)}
        runs.append(entry)
    return {
        "device": device.name,
        "runs": runs,
        "totals": _totals(runs),
        "notes": list(_notes(spec, planned, runs, device)),
    }


def _totals(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By kind and family, then of all; `counted` are those that are not a trial as well."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["kind"], run["architecture"], run["input"], run["paradigm"]), []).append(run)
    for kind in ("trial", "run"):
        mine = [run for run in runs if run["kind"] == kind]
        if mine:
            groups[f"{kind}s", "", "", ""] = mine
    groups["all", "", "", ""] = list(runs)
    out = []
    for (kind, architecture, world, paradigm), mine in groups.items():
        counted = [run for run in mine if not run["is_trial"]]
        sums = {name: [sum(run[name][i] for run in counted) for i in (0, 1)] for name in ("flops", "hours")}
        entry = {"kind": kind, "architecture": architecture, "input": world, "paradigm": paradigm}
        out.append(entry | {"runs": len(mine), "counted": len(counted)} | sums)
    return out


def _notes(spec: Sweep, planned: Sequence[Any], runs: Sequence[Mapping[str, Any]], device: Device) -> Any:
    yield f"{device.name}: {device.about()}"
    yield "from the recipe's fewest epochs to its budget; evaluations are in the hours, not in the FLOPs"
    for name in dict.fromkeys(run["data"] for run in runs):
        counts, where = cells.counts(spec.data[name])
        yield f"{name}: {counts['train']:,} train, {counts['val']:,} val, {counts['test']:,} test records, from {where}"
    for name, data in spec.data.items():
        if not data.wanted:
            yield f"{name}: left out, {', '.join(data.folders)} is not there; data.{name}.optional=false plans it"
    stages = [job.name for job in planned if job.cell is None]
    if stages:
        yield f"not counted: {', '.join(stages)}"
    if spec.tunings:
        most = max(tuning.extensions for tuning in spec.tunings)
        yield f"not counted: further rates where the best is at an edge, at most {most} at either end of a rung and D"
    if spec.probes:
        yield f"not counted: {len(spec.probes)} probes of a run"
    for run in runs:
        if device.gib is not None and run["gib"] > device.gib:
            yield f"! {run['run']} needs {run['gib']:.0f} of {device.gib:g} GiB: set train.accumulate by a [[set]]"


HEAD = ("run", "N", "D", "epochs", "steps", "FLOPs", "hours", "GiB", "lr", "")


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """`dry_run` for a reader: a line a run, totals, notes."""
    rows = [HEAD]
    for run in result["runs"]:
        lr = "from trials" if run["lr"] is None else f"{run['lr']:g}"
        what = run["state"] or ("is a trial" if run["is_trial"] else "")
        spans = (_span(run["epochs"], ".3g"), _span(run["steps"], ","), _span(run["flops"], ".2g"))
        numbers = (f"{run['n_params']:,}", f"{run['n_records']:,}", *spans, _span(run["hours"], ".2g"))
        rows.append((run["run"], *numbers, f"{run['gib']:.1f}", lr, what))
    totals = [("kind", "architecture", "input", "paradigm", "runs", "FLOPs", f"hours on {result['device']}")]
    for entry in result["totals"]:
        names = (entry[name] for name in ("kind", "architecture", "input", "paradigm"))
        spans = (_span(entry["flops"], ".3g"), _span(entry["hours"], ".3g"))
        totals.append((*names, f"{entry['runs']:,}", *spans))
    return [*_aligned(rows), "", *_aligned(totals), "", *result["notes"]]


def _span(ends: Sequence[float], form: str) -> str:
    low, high = (format(round(end) if form == "," else end, form) for end in ends)
    return low if low == high or not math.isfinite(ends[0]) else f"{low} - {high}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
