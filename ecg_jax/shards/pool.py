"""Writes shards in a pool of processes of this machine.

Knows nothing of a data set nor of what a shard is. Invariant: no worker outlives the command, however it ends.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process

from ecg_jax.errors import MachineError
from ecg_jax.progress import track
from ecg_jax.shards.grouping import ShardPlan
from ecg_jax.shards.writer import Job, write_shard

MIN_ITEMS_PER_WORKER = 100  # starting a process costs about as much as preparing so many

_JOB: Job | None = None  # of a pool process


def _start(job: Job) -> None:
    global _JOB
    _JOB = job
    # Ctrl-C reaches every process of the terminal; Python's own answer to it is a traceback from each. A command in the
    # background of a script does not hear it at all, and its workers must not either.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A parent killed outright tells its workers nothing, and they would go on writing beside its successor's.
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _work(todo: ShardPlan) -> None:
    if _JOB is None:
        raise RuntimeError("a worker without its job")
    write_shard(_JOB, todo)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back: here until the end, and in the processes that are started meanwhile until they are ready."""
    pressed: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # what a new process begins with
    # The mask is this thread's alone, and Python would raise here what another thread has caught.
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if pressed:
        raise KeyboardInterrupt


def write_shards(job: Job, todo: Sequence[ShardPlan], workers: int) -> None:
    """Write `todo` in up to `workers` processes, one shard at a time in each; 1 works in this one.

    Raises what `write_shard` raises, and MachineError where a worker was killed; the shards written are kept.
    """
    items = sum(len(p.items) for p in todo)
    workers = max(1, min(workers, len(todo), items // MIN_ITEMS_PER_WORKER))
    if workers == 1:
        for shard in track(todo, f"convert {job.source.name}", unit="shards"):
            write_shard(job, shard)
        return
    # Spawned, never forked: a fork copies locks of whatever threads the caller has (TensorFlow's, say).
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(job,)) as pool:
        try:
            with _undisturbed():
                # The pool pickles a shard's items when a process is about to want them: some `workers` shards, never
                # all of them.
                futures = [pool.submit(_work, shard) for shard in todo]
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
