"""What a process needs around training: the cache of compiled programs, the count of compilations, signals, a watchdog.

Invariant: calling `setup` again changes nothing but the cache folder.
"""

import contextlib
import faulthandler
import hashlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax

from ecg_jax.errors import InterruptedRun
from ecg_jax.models import ladder
from ecg_jax.models.ladder import Config, ResNet1dConfig

WIDE = 32  # channels of a ResNet's first stage from which its convolutions fill all cores of a CPU
LARGE = 20e6  # parameters of a Transformer from which updating them on every device costs more than it wins
GRACE = 10.0  # seconds that a signal leaves to what is under way; schedulers give 30 and more before they kill
COMPILED = "/jax/core/compile/backend_compile_duration"
COMPILING = (
    COMPILED,
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


class CompileMeter:
    """Seconds spent in tracing and compiling, and programs compiled or loaded, in this process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.programs = 0
        self._listening = False

    def listen(self) -> None:
        """Start counting (once)."""
        if not self._listening:
            jax.monitoring.register_event_duration_secs_listener(self._hear)
            self._listening = True

    def _hear(self, event: str, seconds: float, **_: str | int) -> None:
        if event in COMPILING:
            self.seconds += seconds
            self.programs += event == COMPILED


compiles = CompileMeter()


def setup(cache_dir: str | None) -> None:
    """Start the compile meter and keep compiled programs on disk.

    Args:
        cache_dir: None for the user's cache folder, "" for no cache. Programs for CPU hold instructions of
            the machine that made them, so each kind of processor has a folder of its own.
    """
    compiles.listen()
    if cache_dir == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    folder = str(cache_folder(cache_dir))
    if jax.config.jax_compilation_cache_dir == folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        print(f"warning: no cache of compiled programs in {folder}: {error.strerror}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder(cache_dir: str | None = None) -> Path:
    """Where compiled programs are kept for this kind of processor; `cache_dir` as in `setup`, but not ""."""
    base = cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ecg_jax", "xla")
    return Path(base).expanduser().absolute() / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        about = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


def spread(arch: Config, lanes: int) -> None:
    """Split the batches of `arch` over the cores of this process, a CPU device each, where that is faster.

    To be called before JAX has devices; after that, or where XLA_FLAGS says how many there are, it changes nothing.
    Nor does it matter beside a GPU or TPU. Measured, ms of a train step with one and with two devices on two cores:
    R4 91 and 70, T4 216 and 192, T8 1458 and 1224, T9 2476 and 2197, T10 4771 and 4544; but R6 216 and 209, R7 586 and
    709, R8 497 and 798: the wide convolutions are products so large that they fill all cores by themselves. And T11, at
    four records a step, takes a quarter longer with two, since each device updates all parameters.
    """
    large = arch.width >= WIDE if isinstance(arch, ResNet1dConfig) else ladder.count(arch) > LARGE
    if large or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= cores)
    with contextlib.suppress(RuntimeError):  # JAX has its devices
        jax.config.update("jax_num_cpu_devices", devices)


class Stop:
    """What signals have said, looked at between dispatches. `saved`: the last checkpoint, for the last message."""

    signal: str | None = None
    saved: str = "nothing has been saved yet"


@contextlib.contextmanager
def stop_signals(where: str = "") -> Iterator[Stop]:
    """While inside, the first SIGTERM or SIGINT sets a flag and starts a clock: what is under way (a step, an
    evaluation, a checkpoint) has `GRACE` seconds to come to where the state is saved, else the process leaves with
    exit code 75 and its last checkpoint. A second signal of either kind ends it at once (128 + n).

    `where` is named in the messages. To be entered after `jax.distributed.initialize`, which sets handlers of its own.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # handlers belong to the main thread; whoever runs us elsewhere has to stop us otherwise
        return
    clocks: list[threading.Timer] = []

    def too_late() -> None:
        end(
            InterruptedRun.exit_code,
            f"ecg-jax: error: {where}: what was under way did not end within {GRACE:.0f} s of {stop.signal}; "
            f"{stop.saved}; run it again to go on",
        )

    def end(code: int, message: str) -> None:
        os.write(2, message.encode() + b"\n")  # no buffer, no lock: whoever holds them is interrupted here
        os._exit(code)

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.signal:
            end(128 + number, f"{name}: stopped at once")
        stop.signal = name
        clocks.append(threading.Timer(GRACE, too_late))
        clocks[0].daemon = True
        clocks[0].start()
        os.write(2, f"{name}: saving and stopping; once more to stop at once\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for clock in clocks:
            clock.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Shows the stacks of all threads when no step has completed for `minutes` (0: never); changes nothing."""

    def __init__(self, minutes: float, where: str) -> None:
        self._seconds, self._where = 60 * minutes, where
        self._seen, self._end = time.monotonic(), threading.Event()
        if minutes > 0:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A step has completed."""
        self._seen = time.monotonic()

    def close(self) -> None:
        self._end.set()

    def _run(self) -> None:
        due = self._seen + self._seconds
        while not self._end.wait(max(due - time.monotonic(), 0)):
            if time.monotonic() - self._seen >= self._seconds:
                waited = f"{self._seconds / 60:.3g} minutes"
                os.write(2, f"watchdog: {self._where}: no step completed for {waited}; the stacks:\n".encode())
                faulthandler.dump_traceback(2, all_threads=True)
                due = time.monotonic() + self._seconds
            else:
                due = self._seen + self._seconds
