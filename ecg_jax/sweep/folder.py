"""The folder of a sweep: which jobs are finished, claimed or failed. All state there is, shared by all workers.

    sweep.json           what is swept, as read from the file with its overrides
    runs/NAME            run folders, for `ecg-jax fit`
    runs-DATA/NAME       those of further data sets, apart, since no law mixes them
    trials/NAME          run folders of learning-rate trials
    runs.csv             what became of each (`table`)
    results.csv          the eval logs of runs/ in one, for `ecg-jax fit`; results-DATA.csv those of runs-DATA/
    claims/NAME.lock     held (flock) by the worker that has the job; says which process that is
    failures/NAME.json   why a job failed and how often; emptied by every new launch
    logs/                what workers print

flock has to work on the file system: it does on local disks and NFS; Lustre is to be mounted with `flock`. Lock files
are never deleted. Invariant: whoever holds the claim of a job is the only one that works on it, and finished is what
the files say, never what anybody remembers.
"""

import fcntl
import functools
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecg_jax import files
from ecg_jax.errors import MachineError, UsageError
from ecg_jax.sweep import jobs as jobs_lib
from ecg_jax.sweep import spec
from ecg_jax.sweep.jobs import Job
from ecg_jax.sweep.spec import Probe, Sweep
from ecg_jax.training.folder import FINISHED, METRICS, SUMMARY

SPEC = "sweep.json"
DEATHS = 5  # of workers over one job without a new checkpoint, after which it is given up
TRIES = 2  # of a job that ends in an error of the machine
MACHINE = MachineError.exit_code


class Folder:
    """See the module's head."""

    def __init__(self, root: Path, sweep: Sweep) -> None:
        self.root, self.sweep = Path(root), sweep
        self._finished: dict[str, dict[str, Any]] = {}  # summaries of jobs that were found finished
        self._outcomes: dict[str, float] = {}
        self._prices: dict[tuple, float] = {}
        self._planned: list[Job] | None = None

    @classmethod
    def open(cls, root: Path) -> "Folder":
        """The sweep that was launched in `root`. Raises UsageError where none was."""
        try:
            said = json.loads((Path(root) / SPEC).read_text())
        except (OSError, ValueError):
            raise UsageError(f"{root} holds no sweep (no readable {SPEC}); start it with `ecg-jax sweep`") from None
        return cls(root, spec.build(said["tree"], Path(said["path"])))

    def begin(self) -> None:
        """Make the folder, write what is swept, forget failures. Raises MachineError where the disk refuses."""
        said = {"path": str(self.sweep.path), "tree": self.sweep.tree}
        try:
            for name in ("claims", "failures", "logs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot make {self.root}: {error.strerror or error}") from error
        with self.alone():
            files.write(self.root / SPEC, json.dumps(said, indent=1) + "\n")
            for path in (self.root / "failures").glob("*.json"):
                path.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While inside, no other process writes what belongs to no job."""
        with open(self.root / "claims" / ".sweep.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # ------------------------------------------------------------------------------------------ what is done

    def place(self, job: Job) -> Path:
        """The run folder of a job (of codes: the codebook's)."""
        if job.cell is None:
            return Path(self.sweep.book.folder)
        if job.kind == "trial":
            return self.root / "trials" / job.name
        first = next(iter(self.sweep.data))
        return self.root / ("runs" if job.cell.data == first else f"runs-{job.cell.data}") / job.name

    def jobs(self) -> list[Job]:
        """All jobs as the trials stand now, in their order."""
        open_trials = (j.name for j in self._planned or () if j.kind == "trial" and j.name not in self._outcomes)
        if self._planned is None or any(self.outcome(name) is not None for name in open_trials):
            self._planned = jobs_lib.plan(self.sweep, self.outcome, self._prices)
        return self._planned

    def outcome(self, trial: str) -> float | None:
        """See `jobs.Outcome`."""
        if trial in self._outcomes:
            return self._outcomes[trial]
        found = _json(self.root / "trials" / trial / SUMMARY)
        if found.get("status") not in FINISHED:
            return None
        loss = (found.get("losses") or {}).get("val")
        self._outcomes[trial] = float("inf") if found["status"] == "diverged" or loss is None else loss
        return self._outcomes[trial]

    def summary(self, job: Job) -> dict[str, Any]:
        """Of its run folder as it is now, {} where there is none."""
        return self._finished.get(job.name) or _json(self.place(job) / SUMMARY)

    def finished(self, job: Job) -> bool:
        """Whether nothing is left to do for a job, probes included."""
        if job.name in self._finished:
            return True
        found = self._done(job)
        if found:
            self._finished[job.name] = found
        return bool(found)

    def _done(self, job: Job) -> dict[str, Any]:
        if job.kind == "codes":
            return {"status": "done"} if not self.codes_missing(job.data) else {}
        found = _json(self.place(job) / SUMMARY)
        if job.kind == "codebook":  # one that lies there without a run was made elsewhere
            ready = (self.place(job) / "codebook.json").is_file()
            return {"status": "done"} | found if ready and found.get("status", "done") in FINISHED else {}
        if found.get("status") not in FINISHED or "trial" not in found:
            return {}
        return found if found["status"] == "diverged" or not self.probes_missing(job) else {}

    def codes_missing(self, data: str) -> list[Path]:
        """The data folders of a data set that have no codes of the codebook."""
        from ecg_jax.shards import codes

        book = _json(Path(self.sweep.book.folder) / "codebook.json")
        if not book:
            return [Path(folder) for folder in self.sweep.data[data].folders]
        name = codes.expected_name(book["id"], book["info"]["beats"])
        folders = [_data_folder(folder)[0] for folder in self.sweep.data[data].folders]
        return [folder for folder in folders if not (folder / name / codes.CARD).is_file()]

    def probes_missing(self, job: Job) -> list[Probe]:
        """The probes that the run of a job still lacks; trials are not probed."""
        wanted = [p for p in self.sweep.probes if job.kind == "run" and (not p.data or job.cell.data in p.data)]
        at = self.place(job) / "probes"
        return [p for p in wanted if p.wanted and not (at / f"{_probed(p)}-{p.task}.json").is_file()]

    # ------------------------------------------------------------------------------------- who works on what

    @contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """Try to hold a job; False where another worker has it."""
        with open(self.root / "claims" / f"{job.name}.lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            lock.truncate(0)
            lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            lock.flush()
            yield True

    def claimed(self, job: Job) -> bool:
        """Whether a worker holds a job right now."""
        try:
            with open(self.root / "claims" / f"{job.name}.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def held_by(self, pid: int, jobs: Sequence[Job]) -> Job | None:
        """The unfinished job that a process of this machine was the last to hold."""
        mine = {"host": socket.gethostname(), "pid": pid}
        claims = ((job, self.root / "claims" / f"{job.name}.lock") for job in jobs if not self.finished(job))
        return next((job for job, path in claims if _json(path) == mine), None)

    # --------------------------------------------------------------------------------------------- failures

    def failure(self, job: Job) -> dict[str, Any]:
        """What was noted of a job's failures, {} where nothing was; "final" where it is not tried again."""
        return _json(self.root / "failures" / f"{job.name}.json")

    def failed(self, job: Job, error: str, code: int) -> None:
        """Note that an attempt at a job ended in an error (exit code as of the command), or in its worker's death
        (code below 0). An error of configuration or data is final; deaths count from the last new checkpoint on.
        """
        before, reached = self.failure(job), self._reached(job)
        attempts = before.get("attempts", 0) + 1 if before.get("reached") == reached else 1
        final = attempts >= (DEATHS if code < 0 else TRIES if code == MACHINE else 1)
        said = {"error": error, "code": code, "attempts": attempts, "reached": reached, "final": final}
        with self.alone():
            files.write(self.root / "failures" / f"{job.name}.json", json.dumps(said) + "\n")

    def _reached(self, job: Job) -> int:
        found = [int(path.name) for path in (self.place(job) / "checkpoints").glob("*") if path.name.isdigit()]
        return max(found, default=0)

    # ------------------------------------------------------------------------------------------------ states

    def states(self, jobs: Sequence[Job]) -> dict[str, str]:
        """done | unconverged | diverged | failed | running | interrupted | waiting | ready, by name of the job."""
        ended = {job.name for job in jobs if self.finished(job)}
        return {job.name: self._state(job, ended) for job in jobs}

    def _state(self, job: Job, ended: set[str]) -> str:
        if job.name in ended:
            return self._finished[job.name]["status"]
        if self.claimed(job):
            return "running"
        if self.failure(job).get("final"):
            return "failed"
        if any(name not in ended for name in job.needs):
            return "waiting"
        return "interrupted" if (self.place(job) / METRICS).exists() else "ready"


@functools.cache
def _data_folder(path: str) -> tuple[Path, str]:
    from ecg_jax.shards import catalog

    found = catalog.open_folder(Path(path))
    return found.path, found.card["name"]


def _probed(probe: Probe) -> str:
    """The name that a probe's files bear for its data (`evaluation/probe`)."""
    return "+".join(dict.fromkeys(_data_folder(folder)[1] for folder in probe.folders))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
