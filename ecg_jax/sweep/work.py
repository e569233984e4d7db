"""One worker: takes the next job of a sweep that nobody has, does it, and so on until none is left.

    python -m ecg_jax.sweep.work OUT [--cores 0,1]

Started by `launch`, on the device that its environment names; ends with 0 when there is nothing left, 75 after
SIGTERM or SIGINT (the run under way has saved), 5 after an error of the machine (whoever started it starts another: a
process that ran out of memory is not to be trusted with the next run). What goes wrong with one job is noted and does
not stop the others. Invariant: every file that counts is written under the claim of its job.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecg_jax import files, stops
from ecg_jax.errors import DivergedError, EcgJaxError, InterruptedRun, MachineError

POLL = 1.0  # seconds between looks for a job while others hold what one waits for
PR_SET_PDEATHSIG = 1


def work(root: Path) -> int:
    """Work on the sweep in `root` until nothing is left to begin; returns how many jobs were done.

    Raises InterruptedRun on SIGTERM or SIGINT while training, MachineError where a job ended in one.
    """
    from ecg_jax.sweep.folder import Folder
    from ecg_jax.training import runtime

    runtime.spread()
    folder, done = Folder.open(root), 0
    while True:
        planned = folder.jobs()
        states = folder.states(planned)
        for job in planned:
            if states[job.name] not in ("ready", "interrupted"):
                continue
            with folder.claim(job) as mine:
                if not mine:
                    states[job.name] = "running"
                    continue
                if folder.finished(job) or folder.failure(job).get("final"):
                    break  # by somebody else, a moment ago
                try:
                    _do(folder, job)
                except (InterruptedRun, MachineError) as error:
                    if isinstance(error, MachineError):
                        folder.failed(job, str(error), error.exit_code)
                    raise
                except EcgJaxError as error:
                    folder.failed(job, str(error), error.exit_code)
                except Exception as error:
                    traceback.print_exc()
                    folder.failed(job, f"a bug: {error!r}; its traceback is in {folder.root / 'logs'}", 1)
                done += 1
            if stops.heard:  # when the run was all but over
                raise InterruptedRun(f"{stops.heard[0]}: stopped after {job.name}; the same sweep goes on")
            gc.collect()
            break
        else:
            if "running" not in states.values():
                return done
            time.sleep(POLL * random.uniform(0.5, 1.0))


def _do(folder: Any, job: Any) -> None:
    """The job, or what is left of it."""
    from ecg_jax.sweep.cells import configure

    sweep, where = folder.sweep, folder.place(job)
    if job.kind == "codes":
        from ecg_jax.tokenize import tokenize

        tokenize([Path(path) for path in sweep.data[job.data].folders], where, quiet=True)
        return
    from ecg_jax.training.loop import train

    if job.kind == "codebook":
        import dataclasses

        paths = tuple(path for name in sweep.book.data for path in sweep.data[name].folders)
        own = dataclasses.replace(sweep.book.run.data, folders=paths)
        train(dataclasses.replace(sweep.book.run, data=own), where, quiet=True)
        return
    if job.source and not where.exists():
        _copy(folder.root / "trials" / job.source, where)
    try:
        summary = train(configure(sweep, job.cell, job.lr, job.base_width), where, quiet=True)
    except DivergedError:
        summary = json.loads((where / "summary.json").read_text())
    _name(where, job.name, job.trial, summary)
    for probe in folder.probes_missing(job) if summary["status"] != "diverged" else ():
        from ecg_jax.evaluation.probe import probe_run

        probe_run(where, [Path(path) for path in probe.folders], probe.task, bootstrap=probe.bootstrap)


def _copy(trial: Path, run: Path) -> None:
    """A finished trial as a run, without its checkpoints; whole or not there."""
    part = run.with_name(f".{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(trial, part, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
        part.rename(run)
    except OSError as error:
        raise MachineError(f"cannot copy {trial} to {run}: {error.strerror or error}") from error


def _name(where: Path, name: str, trial: int, summary: dict[str, Any]) -> None:
    """Say in the eval log and then in the summary what training does not know: the number of the trial, and the name of
    a run that was a trial.
    """
    from ecg_jax.evaluation import evalog
    from ecg_jax.training import folder

    if (summary.get("run"), summary.get("trial")) == (name, trial):
        return
    rows = [row | {"run": name, "trial": trial} for row in evalog.read(where)]
    lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    files.write(where / folder.EVALS, "".join(lines))
    files.write(where / folder.SUMMARY, json.dumps(summary | {"run": name, "trial": trial}, indent=2) + "\n")


def main(arguments: list[str] | None = None, leave: Callable[[int], object] = os._exit) -> int:
    """The program; returns its exit code, and calls `leave` with it where SIGTERM or SIGINT come between runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--cores", help="that it may use, as 0,1")
    parser.add_argument("--launcher", type=int, help="process whose end is a SIGTERM for this one")
    args = parser.parse_args(arguments)
    with stops.at_once(leave):
        if args.launcher and sys.platform == "linux":  # a launcher that is killed takes its workers along
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != args.launcher:  # it was quicker
                return InterruptedRun.exit_code
        if args.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])  # before JAX counts them
        try:
            work(args.root)
        except EcgJaxError as error:
            print(f"ecg-jax: error: {error}", file=sys.stderr, flush=True)
            return error.exit_code
        return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # all is written; the threads of libraries have nothing to say that is worth a signal in between
