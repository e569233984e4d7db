"""Workers of a sweep as one Slurm array, through submitit (the extra `slurm`).

Each task of the array is a worker like any other: it takes runs out of the shared folder until none is left, so no
dependency between jobs has to be told to Slurm. Before its time is up Slurm sends SIGUSR2; the run under way then
saves, and submitit puts the task into the queue again. Submits and looks; a launcher that ends leaves the array
alone.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecg_jax.errors import InterruptedRun, MachineError, UsageError
from ecg_jax.sweep.folder import Folder
from ecg_jax.sweep.jobs import Job

REQUEUES = 1000  # of a task whose time was up: a study takes many days, and submitit's own limit is three


class Worker:
    """What a task of the array runs; pickled by submitit."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def __call__(self) -> int:
        """Work until nothing is left; the exit code that `work.main` would have."""
        from ecg_jax.sweep import work

        out_of_time = signal.getsignal(signal.SIGUSR2)  # submitit's: queues the task again and ends this process
        came: list[Any] = []

        def near_the_end(number: int, frame: Any) -> None:
            came.append(frame)
            os.kill(os.getpid(), signal.SIGTERM)  # which saves the run under way

        def leave(code: int) -> None:
            try:
                if came and callable(out_of_time):
                    out_of_time(signal.SIGUSR2, came[0])
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else code
            os._exit(code & 0xFF)

        signal.signal(signal.SIGUSR2, near_the_end)
        code = work.main([str(self.root)], leave)
        if code == InterruptedRun.exit_code and came and callable(out_of_time):
            out_of_time(signal.SIGUSR2, came[0])
        return code

    def checkpoint(self) -> Any:
        """What submitit puts into the queue when the time is up: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Crew:
    """The array; the counterpart of `launch.Crew`."""

    def __init__(self, folder: Folder, workers: int, parameters: Mapping[str, Any], cluster: str) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError("--launcher slurm needs submitit: pip install 'ecg-jax[slurm]'") from None
        if workers < 1:
            raise UsageError(f"--workers {workers}: give 1 or more")
        self.workers, self.folder, self.tasks = workers, folder, []
        try:
            logs = folder.root / "logs" / "slurm-%j"
            self.executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=REQUEUES)
            self.executor.update_parameters(**{"name": "ecg-jax-sweep"} | dict(parameters))
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UsageError(f"--launcher slurm: {' '.join(str(error).split())}") from None

    def start(self) -> None:
        """Submit the array."""
        try:
            with self.executor.batch():
                self.tasks = [self.executor.submit(Worker(self.folder.root.absolute())) for _ in range(self.workers)]
        except Exception as error:  # sbatch says in its own words what it does not like
            raise MachineError(f"Slurm took no jobs: {' '.join(str(error).split())[:300]}") from error
        print(f"array {self.tasks[0].job_id.split('_')[0]}: {self.workers} workers", file=sys.stderr, flush=True)

    def poll(self, jobs: Sequence[Job], stopping: bool) -> bool:
        """Whether tasks are queued or running; False at once where the launcher is to stop."""
        return not stopping and not all(task.done() for task in self.tasks)

    def stop(self, number: int) -> None:
        """The array goes on; `scancel` ends it."""
