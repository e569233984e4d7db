"""Launches the workers of a sweep on the devices of this machine or through Slurm, and follows what they do.

The launcher works on nothing itself and holds nothing: it may be killed, and started again, at any time, and several
may serve one folder. It restarts workers that die, keeps the results table, and passes SIGTERM and SIGINT on to
workers of this machine, once, and waits for them; workers in Slurm go on without it. Invariant: a worker that ends
with 0 has seen that nothing is left to begin.
"""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecg_jax import errors
from ecg_jax.errors import DataError, EcgJaxError, InterruptedRun, MachineError, UsageError
from ecg_jax.sweep import cost, table
from ecg_jax.sweep import jobs as jobs_lib
from ecg_jax.sweep.folder import Folder
from ecg_jax.sweep.jobs import Job
from ecg_jax.sweep.spec import Sweep

POLL, SELDOM = 0.5, 5.0  # seconds between looks at the folder: ten times what a look takes, but within these
BARREN = 3  # workers in a row that die before they take a job
CPU_WORKERS = 8  # at most, where nobody says how many


@dataclass
class Slot:
    """A place for one worker of this machine: a device, a share of one, or a group of cores."""

    env: Mapping[str, str]
    cores: str | None = None
    process: subprocess.Popen | None = field(default=None, repr=False)
    log: Path | None = None
    told: bool = False  # to stop


def sweep(
    spec: Sweep,
    out: Path,
    *,
    launcher: str = "local",
    devices: str = "auto",
    per_device: int = 0,
    workers: int = 1,
    slurm: Mapping[str, Any] | None = None,
    cluster: str = "slurm",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is left of a sweep in the folder `out`; returns counts per state and the path of the table.

    launcher: "local" (on `devices`, see `slots`) or "slurm" (`workers` array tasks with the parameters `slurm`;
    `cluster` as submitit names it). Raises UsageError and DataError for what would keep runs from beginning,
    InterruptedRun after SIGTERM or SIGINT, and for jobs that failed the error of the first of them; a run that diverged
    is a result, not a failure.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give a folder")
    folder = Folder(out, spec)
    folder.jobs()  # every cell has a configuration
    check(spec)
    folder.begin()
    if launcher == "slurm":
        from ecg_jax.sweep import slurm as slurm_lib

        crew: Any = slurm_lib.Crew(folder, workers, dict(spec.slurm) | dict(slurm or {}), cluster)
    else:
        crew = Crew(folder, slots(devices, per_device))
    states = _follow(folder, crew, quiet)
    return _result(folder, states)


def check(spec: Sweep) -> None:
    """Refuse to begin what cannot end: data, tasks, codebook, codes and probes have to be there.

    Raises DataError naming what is missing and the command that makes it.
    """
    from ecg_jax.shards import catalog

    for name, data in spec.data.items():
        if not data.wanted:
            print(f"warning: no runs on {name}: {', '.join(data.folders)} is not there", file=sys.stderr)
    grids = [grid for grid in spec.grids if spec.data[grid.data].wanted]
    used = dict.fromkeys([grid.data for grid in grids] + [tuning.data for tuning in spec.tunings])
    supervised = {grid.data for grid in grids if "SL" in grid.paradigms}
    for name in used:
        for path in spec.data[name].folders:
            found = catalog.open_folder(Path(path))
            if name in supervised:
                found.labels(spec.data[name].task)
    for probe in spec.probes:
        for path in probe.folders if probe.wanted else ():
            catalog.open_folder(Path(path)).labels(probe.task)
        if not probe.wanted:
            print(f"warning: no probe of {probe.task}: {', '.join(probe.folders)} is not there", file=sys.stderr)
    if spec.book is None or spec.book.run is not None:
        return
    from ecg_jax import codebook
    from ecg_jax.shards import codes

    book = codebook.load(Path(spec.book.folder))
    for name in dict.fromkeys(grid.data for grid in grids if "SSL" in grid.paradigms):
        for path in spec.data[name].folders:
            expected = codes.expected_name(book.id, book.info["beats"])
            try:
                codes.open_codes(catalog.open_folder(Path(path)), expected, codebook=book.id)
            except DataError as error:
                make = f"ecg-jax tokenize --data {path} --codebook {spec.book.folder}"
                raise DataError(f"SSL runs on {name} need codes: {error} (`{make}`)") from None


def slots(devices: str = "auto", per_device: int = 0) -> list[Slot]:
    """Places for workers: `devices` is "cpu", "tpu" (one worker, all chips), GPUs as "0,1", or "auto": what there is.

    per_device: workers that share a device, each with its part of nine tenths of the memory (0: one; on CPU one a core,
    eight at most). Raises UsageError for anything else.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    wanted = _gpus() if devices == "auto" else [] if devices in ("cpu", "tpu") else devices.split(",")
    on_tpu = importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS") != "cpu"
    if devices == "tpu" or (devices == "auto" and not wanted and on_tpu):
        return [Slot({})]
    if per_device < 0 or not all(name.strip() for name in wanted):
        raise UsageError(
            f"--devices {devices!r} --per-device {per_device}: give cpu, tpu, or GPUs as 0,1; and 1 or more"
        )
    if not wanted:
        groups = min(per_device or CPU_WORKERS, len(cores))
        shares = [cores[i * len(cores) // groups : (i + 1) * len(cores) // groups] for i in range(groups)]
        return [Slot({"JAX_PLATFORMS": "cpu"}, ",".join(map(str, share))) for share in shares]
    per_device = per_device or 1
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / per_device:.3f}"} if per_device > 1 else {}
    return [Slot({"CUDA_VISIBLE_DEVICES": name.strip()} | part) for _ in range(per_device) for name in wanted]


def _gpus() -> list[str]:
    """GPUs that this process may use; asks the driver, not JAX, which would take their memory."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, text in enumerate(t for t in said.stdout.splitlines() if t.startswith("GPU "))]


class Crew:
    """Workers of this machine, one a slot."""

    def __init__(self, folder: Folder, places: Sequence[Slot]) -> None:
        self.folder, self.places, self.barren = folder, list(places), 0

    def start(self) -> None:
        for i, slot in enumerate(self.places):
            self._start(i, slot)

    def _start(self, i: int, slot: Slot) -> None:
        slot.log = self.folder.root / "logs" / f"worker-{os.getpid()}-{i}.log"
        command = [sys.executable, "-m", "ecg_jax.sweep.work", str(self.folder.root), "--launcher", str(os.getpid())]
        command += ["--cores", slot.cores] if slot.cores else []
        slot.told = False
        with open(slot.log, "ab") as log:  # a session of its own: Ctrl-C comes to the launcher, which passes it on once
            slot.process = subprocess.Popen(
                command, env=os.environ | dict(slot.env), stdout=log, stderr=log, start_new_session=True
            )

    def poll(self, jobs: Sequence[Job], stopping: bool) -> bool:
        """Whether any worker lives; one that died is replaced, unless `stopping`, and its death noted."""
        if stopping:
            self.stop(signal.SIGTERM)  # again, for one that was just being started
        for i, slot in enumerate(self.places):
            if slot.process is None or (code := slot.process.poll()) is None:
                continue
            pid, slot.process = slot.process.pid, None
            if code == 0 or stopping:
                continue
            held = self.folder.held_by(pid, jobs)
            self.barren = 0 if held else self.barren + 1
            if self.barren >= BARREN:
                raise MachineError(f"workers end (code {code}) before they begin: see {slot.log}")
            if held and code not in (InterruptedRun.exit_code, MachineError.exit_code):
                how = signal.Signals(-code).name if code < 0 else f"code {code}"
                self.folder.failed(held, f"its worker died ({how}); see {slot.log}", min(code, -1))
            self._start(i, slot)
        return any(slot.process for slot in self.places)

    def stop(self, number: int) -> None:
        """Send a signal to all workers; SIGTERM once, since a second one would end them before they have saved."""
        for slot in self.places:
            due = number != signal.SIGTERM or not slot.told
            if due and slot.process is not None and slot.process.poll() is None:
                slot.told = True
                slot.process.send_signal(number)


class _Stop:
    number: int | None = None


@contextmanager
def _signals(crew: Any) -> Iterator[_Stop]:
    """While inside, the first SIGTERM or SIGINT goes to the workers as SIGTERM; the second ends them and us at once."""
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        if stop.number is not None:
            crew.stop(signal.SIGKILL)
            os._exit(128 + number)
        stop.number = number
        crew.stop(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(folder: Folder, crew: Any, quiet: bool) -> dict[str, str]:
    """Start the crew and show and tabulate until it has ended; the states of all jobs then."""
    shown = _Display(folder, quiet)
    with _signals(crew) as stop, shown:
        try:
            lives, told = not set(folder.states(folder.jobs()).values()) <= set(table.ENDED[:3]), False
            if lives:
                crew.start()
            while lives:
                looked = time.monotonic()
                planned = folder.jobs()
                lives = crew.poll(planned, stop.number is not None)
                states = folder.states(planned)
                shown.update(planned, states)
                if stop.number is not None and not told:
                    told = True
                    shown.say(f"{signal.Signals(stop.number).name}: workers save and stop; once more to stop at once")
                if lives:
                    time.sleep(min(max(POLL, 10 * (time.monotonic() - looked)), SELDOM))
            planned = folder.jobs()  # what the last to end has decided
            states = folder.states(planned)
            shown.update(planned, states)
        except BaseException:
            crew.stop(signal.SIGTERM)
            raise
    table.write(folder, table.rows(folder, planned, states), wait=True)
    table.write_results(folder)
    if stop.number is not None:
        name = signal.Signals(stop.number).name
        raise InterruptedRun(f"{folder.root}: {name}: {table.tally(planned, states)}; run it again to go on")
    return states


class _Display:
    """Live on a terminal, else a line for each job that changes its state; and the table, when it changes."""

    def __init__(self, folder: Folder, quiet: bool) -> None:
        self.folder, self.quiet, self.before, self.live = folder, quiet, {}, None
        self.began, self.most = time.monotonic(), functools.cache(self._most)

    def __enter__(self) -> "_Display":
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True, highlight=False), auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, planned: Sequence[Job], states: dict[str, str]) -> None:
        changed = [job for job in planned if self.before.get(job.name, "waiting") != states[job.name]]
        told = ("diverged", "failed") if self.live is not None else (*table.ENDED, "running", "interrupted")
        for job in changed if self.before else ():
            if states[job.name] in told:
                self.say(table.line(self.folder, job, states[job.name]))
        head = table.tally(planned, states)
        if self.live is not None:
            spent = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.began))
            shown = table.live(self.folder, planned, states, f"{head}, {spent} since the start", self.most)
            self.live.update(shown, refresh=True)
        elif not self.before:
            self.say(head)
        if changed or not self.before:
            table.write(self.folder, table.rows(self.folder, planned, states))
        self.before = states

    def say(self, text: str) -> None:
        """A line that stays, above what is live."""
        text = f"{time.strftime('%H:%M:%S')} {text}"
        if self.live is not None:
            self.live.console.print(text, markup=False, soft_wrap=True)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _most(self, job: Job) -> int:
        """Steps of a job at most, 0 where it has none."""
        sweep = self.folder.sweep
        if job.kind == "codebook":
            return sweep.book.run.recipe.steps
        return cost.estimate(sweep, job.cell, cost.device("h200")).steps[1] if job.cell else 0


def _result(folder: Folder, states: dict[str, str]) -> dict[str, Any]:
    """Of a sweep whose workers have all ended. Raises for jobs that failed, or that nothing can begin."""
    planned = folder.jobs()
    failed = [job for job in planned if states[job.name] == "failed"]
    if failed:
        first = folder.failure(failed[0])
        kinds = (errors.UsageError, DataError, MachineError)
        kind = next((kind for kind in kinds if kind.exit_code == first["code"]), EcgJaxError)
        kind = MachineError if first["code"] < 0 else kind
        raise kind(f"{table.tally(planned, states)}; first of the failed: {failed[0].name}: {first['error']}")
    left = [job for job in planned if states[job.name] not in table.ENDED]
    if left:
        needs = [name for name in left[0].needs if states.get(name) not in table.ENDED]
        why = f"{left[0].name} needs {needs[0]}" if needs else f"{left[0].name} is {states[left[0].name]}"
        raise MachineError(f"{table.tally(planned, states)}; {why}; run it again to go on")
    return {
        "out": str(folder.root),
        "states": {state: list(states.values()).count(state) for state in table.STATES if state in states.values()},
        "jobs": len(planned),
        "table": str(folder.root / table.NAME),
        "results": [str(path) for path in sorted(folder.root.glob("results*.csv"))],
        "edges": jobs_lib.at_edges(folder.sweep, folder.outcome),
    }


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """What `sweep` gives, for a reader."""
    counted = ", ".join(f"{number} {state}" for state, number in result["states"].items())
    edges = [f"! {line}" for line in result["edges"]]
    fits = [f"laws: ecg-jax fit {path} --out {result['out']}/report" for path in result["results"][:1]]
    return [f"{result['jobs']} jobs: {counted}", *edges, f"table: {result['table']}", *fits]
