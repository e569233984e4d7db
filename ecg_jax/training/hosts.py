"""Several processes, one run: they join, meet, tell each other what went wrong, and add up what each has.

All that is known of `jax.distributed` stands here. A run of one process passes through without any of it. A process is
told who it is by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
`tools/launch_slurm.sh` and `tools/launch_tpu.sh` set. Moves no records.

Invariant: every process calls these functions in the same order. Who does not come is named within `TIMEOUT` seconds
(the environment variable ECG_JAX_TIMEOUT says otherwise).
"""

import atexit
import contextlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the key-value store of the coordinator has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ecg_jax import errors
from ecg_jax.errors import EcgJaxError, MachineError, UsageError
from ecg_jax.shards import LANES
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import peers

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUT = 300.0  # seconds at a meeting
LOST = 10.0  # seconds in which news of the others come, where there are any
_met: Counter[str] = Counter()
_line: peers.Line | None = None  # where there are other processes


def join() -> None:
    """Connect to the other processes of the run, where the environment names any; before any device is touched, and
    before signal handlers are set (those set earlier never run: jax installs its own).

    Raises UsageError for an incomplete environment, or a number of processes that the lanes cannot be split over;
    MachineError where the others do not come.
    """
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if not given[VARIABLES[0]] or jax.distributed.is_initialized():
        return
    try:
        count, own = int(given[VARIABLES[1]]), int(given[VARIABLES[2]])
        int(given[VARIABLES[0]].rpartition(":")[2])
    except ValueError:
        wanted = (
            f"{VARIABLES[0]} is set, so it must be host:port, and {VARIABLES[1]} and {VARIABLES[2]} must be numbers"
        )
        raise UsageError(wanted) from None
    check_count(count)
    if not 0 <= own < count:
        raise UsageError(f"{VARIABLES[2]} is {own}: of {count} processes the numbers are 0 to {count - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = int(float(os.environ.get("ECG_JAX_TIMEOUT", TIMEOUT)))
    global _line
    _line = peers.Line(own, count, given[VARIABLES[0]], seconds)
    try:
        jax.distributed.initialize(
            given[VARIABLES[0]],
            count,
            own,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            shutdown_timeout_seconds=min(seconds, 30),
        )
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise MachineError(f"process {own} of {count} cannot join the others at {given[VARIABLES[0]]}: {why}") from None
    atexit.register(_line.tell, None)
    meet("join")


def check_count(processes: int, shards: int = LANES, what: str = "lanes of the data") -> None:
    """Raise UsageError unless `processes` divides `shards` and the lanes; it names the numbers that do."""
    if processes < 1 or LANES % processes or shards % processes:
        works = [str(n) for n in range(1, LANES + 1) if LANES % n == 0 and shards % n == 0]
        raise UsageError(f"{processes} processes cannot share the {shards} {what} evenly; start {', '.join(works)}")


def count() -> int:
    """Processes of the run."""
    return jax.process_count()


def first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def meet(name: str, error: EcgJaxError | None = None, seconds: float | None = None) -> None:
    """Wait until every process is at the meeting `name`, and hear what went wrong with any of them.

    Raises MachineError naming those that do not come in time; the first error that another process came with.
    """
    if count() == 1:
        return
    _met[name] += 1
    client, own = distributed.global_state.client, jax.process_index()
    seconds = float(os.environ.get("ECG_JAX_TIMEOUT", TIMEOUT)) if seconds is None else seconds
    key = f"ecg_jax/{name}/{_met[name]}/"
    said = None if error is None else [type(error).__name__, str(error)]
    try:
        client.key_value_set(f"{key}{own}", json.dumps(said))
    except RuntimeError:
        raise MachineError("process 0, the coordinator, is gone: start all again to go on") from None
    until, absent, heard = time.monotonic() + seconds, [], []
    for other in set(range(count())) - {own}:
        left = max(until - time.monotonic(), 0.1)
        try:
            heard.append((other, json.loads(client.blocking_key_value_get(f"{key}{other}", int(left * 1000)))))
        except RuntimeError:  # it has run out of time, or the coordinator is gone
            absent.append(other)
    for other, found in heard:
        if found is not None and error is None:
            raise getattr(errors, found[0])(f"process {other}: {found[1]}")
    if absent:
        who = " and ".join(f"process {other}" for other in absent)
        raise MachineError(
            f"{who} did not come to {name!r} within {seconds:.0f} s: look at its own messages; start all "
            f"{count()} again to go on from the last checkpoint"
        )


@contextlib.contextmanager
def together(name: str) -> Iterator[None]:
    """What is inside succeeds in every process, or ends in all of them with the error of the one where it failed."""
    try:
        yield
    except EcgJaxError as error:
        # The error at hand matters more than who else is missing.
        with contextlib.suppress(EcgJaxError):
            meet(name, error)
        raise
    meet(name)


def leave(error: Exception) -> None:
    """The end of a command that failed in a run of several processes: tells the others, who may stand at a collective,
    and ends this one at once, since jax's farewell waits for everybody. Where a process is alone, or all were told to
    stop, nothing.
    """
    if _line is None or isinstance(error, errors.InterruptedRun):
        return
    if not isinstance(error, EcgJaxError):
        traceback.print_exception(error)
        kind = MachineError if isinstance(error, OSError | MemoryError) else EcgJaxError
        error = kind(f"failed with {type(error).__name__}: {error}")
    _line.leave(error)


def tell(error: EcgJaxError) -> None:
    """Have the other processes end with `error`, since this one is about to end without them."""
    if _line is not None:
        _line.tell(error)


def lost(error: Exception) -> EcgJaxError:
    """What to say of a collective that failed, unless a process is gone: then this one is ended meanwhile, by name."""
    time.sleep(LOST)
    return MachineError(f"the devices failed: {' '.join(str(error).split())[:300]}")


def stands(done: int) -> str:
    """Where each process of a run that hangs stands, in words; nothing where a process is alone. To be called by all at
    about the same time, as their watchdogs do, with the dispatches that they have completed; who does not is named.
    """
    if count() == 1:
        return ""
    client, key = distributed.global_state.client, "ecg_jax/stands/"
    try:
        client.key_value_set(f"{key}{jax.process_index()}", f"completed {done} dispatches", allow_overwrite=True)
        time.sleep(LOST)
        said = dict(client.key_value_dir_get(key))
    except RuntimeError:
        return "process 0, the coordinator, is gone"
    return "; ".join(f"process {other} {said.get(f'{key}{other}', 'does not answer')}" for other in range(count()))


def gather(array: np.ndarray) -> list[np.ndarray]:
    """`array` [n, ...] of every process, in their order; n may differ, the rest not. Any type, bit by bit."""
    if count() == 1:
        return [array]
    array = np.ascontiguousarray(array)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(array)], np.int32))).ravel()
    width = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    padded = np.zeros((int(sizes.max()), max(width, 1)), np.uint8)
    padded[: len(array), :width] = array.reshape(len(array), -1).view(np.uint8).reshape(len(array), width)
    found = np.asarray(multihost_utils.process_allgather(padded))
    found = found.reshape(count(), *padded.shape)[:, :, :width]
    parts = [np.ascontiguousarray(part[:n]).reshape(-1) for part, n in zip(found, sizes, strict=True)]
    shapes = [(int(n), *array.shape[1:]) for n in sizes]
    return [part.view(array.dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def total(array: np.ndarray) -> np.ndarray:
    """The sum of `array` over the processes."""
    return sum(gather(np.asarray(array)[None])).sum(0) if count() > 1 else np.asarray(array)


def fetch(tree: Any) -> Any:
    """Arrays as NumPy on every process, those that are split over hosts put together; waits for them."""

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.device_get(tree) if count() == 1 else jax.tree.map(whole, tree)


class Votes:
    """Yes or no of every process, once per dispatch: a signal reaches one of them, all have to stop at one step.

    A sum over the devices, sent beside the step and read one dispatch late, as everything else is.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._sent = mesh, None
        self._sum = jax.jit(lambda x: x.sum(0), out_shardings=mesh_lib.replicated(mesh))

    def poll(self, *flags: bool) -> Sequence[bool]:
        """Whether anybody said yes, flag by flag: at the last call (at this one where a process is alone)."""
        if count() == 1:
            return flags
        own = np.tile(np.array(flags, np.int32), (jax.local_device_count(), 1))
        sent, self._sent = self._sent, self._sum(mesh_lib.put_parts(own, mesh_lib.lanes_first(self._mesh)))
        if mesh_lib.on_cpu(self._mesh):
            jax.block_until_ready(self._sent)
        return (False,) * len(flags) if sent is None else (jax.device_get(sent) > 0).tolist()


def say(text: str) -> None:
    """To stderr, by one process."""
    if first():
        print(text, file=sys.stderr, flush=True)
