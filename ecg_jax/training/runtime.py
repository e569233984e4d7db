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

import jax

from ecg_jax import config as config_lib
from ecg_jax import stops
from ecg_jax.errors import InterruptedRun
from ecg_jax.models import ladder
from ecg_jax.models.ladder import ResNet1dConfig
from ecg_jax.shards import LANES
from ecg_jax.training import hosts

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


def spread(config: config_lib.Config | None = None, held: int = 0) -> None:
    """Give this process the CPU devices that a run of `config` takes (None: of anything, one for each core), or `held`,
    if that is not 0: as many as the run to be gone on with was begun on.

    To be called before JAX has devices; after that, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many there are,
    it changes nothing. Nor does it matter beside a GPU or TPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not _given():
        with contextlib.suppress(RuntimeError):  # JAX has its devices
            jax.config.update("jax_num_cpu_devices", held or _fastest(config, cores))


def share(config: config_lib.Config, held: int = 0) -> int:
    """Over how many devices a run is split, 0 for all: as many as it asks for; where it asks for none, in one process
    and on CPUs, as many as it was begun on (`held`) if they are here, else one or all, whichever is faster.
    """
    asked = config.train.devices
    if asked or config.train.fsdp > 1 or _given() or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return asked
    return held if 0 < held <= jax.device_count() else _fastest(config, jax.device_count())


def _fastest(config: config_lib.Config | None, most: int) -> int:
    """Of at most `most` CPU devices, a core each.

    Measured, ms of a train step on one and on two devices of two cores: R4 91 and 70, T4 216 and 192, T8 1458 and 1224,
    T9 2476 and 2197, T10 4771 and 4544; but R6 216 and 209, R7 586 and 709, R8 497 and 798: the wide convolutions are
    products so large that they fill all cores by themselves. And T11, at four records a step, takes a quarter longer
    with two, since each device updates all parameters. R8 on one of two devices, as in a process that has further runs
    to do, takes 3 % longer.
    """
    if config and config.objective.name == "codebook":
        return 1
    arch = ladder.get(config.model.rung) if config else None
    large = arch and (arch.width >= WIDE if isinstance(arch, ResNet1dConfig) else ladder.count(arch) > LARGE)
    return 1 if large else max(n for n in range(1, LANES + 1) if LANES % n == 0 and n <= most)


def _given() -> bool:
    """Whether somebody has said how many CPU devices there are to be."""
    flags = os.environ.get("XLA_FLAGS", "")
    return "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ


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

    def too_late() -> None:
        late = f"what was under way did not end within {GRACE:.0f} s of {stop.signal}"
        text = f"{where}: {late}; {stop.saved}; run it again to go on"
        hosts.tell(InterruptedRun(text))
        end(InterruptedRun.exit_code, f"ecg-jax: error: {text}")

    def end(code: int, message: str) -> None:
        os.write(2, message.encode() + b"\n")  # no buffer, no lock: whoever holds them is interrupted here
        os._exit(code)

    def listen() -> None:
        while said := os.read(read, 1):
            if said[0] not in stops.SIGNALS:
                continue
            name = signal.Signals(said[0]).name
            if stop.signal:
                end(128 + said[0], f"{name}: stopped at once")
            stop.signal = name
            stops.heard.append(name)
            clock.start()
            os.write(2, f"{name}: saving and stopping; once more to stop at once\n".encode())
            noticed.set()

    # A thread listens, since handlers run in the main thread alone, and not while it is in a compiled program.
    clock, noticed = threading.Timer(GRACE, too_late), threading.Event()
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    clock.daemon = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    outer = signal.set_wakeup_fd(write)
    listener.start()
    before = {number: signal.signal(number, lambda *_: noticed.wait()) for number in stops.SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(write)
        listener.join()
        os.close(read)
        clock.cancel()


class Watchdog:
    """Shows the stacks of all threads when no step has completed for `minutes` (0: never), and, of several processes,
    which does not answer; changes nothing.
    """

    def __init__(self, minutes: float, where: str) -> None:
        self._seconds, self._where = 60 * minutes, where
        self._seen, self._steps, self._end = time.monotonic(), 0, threading.Event()
        if minutes > 0:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A step has completed."""
        self._seen, self._steps = time.monotonic(), self._steps + 1

    def close(self) -> None:
        self._end.set()

    def _run(self) -> None:
        due = self._seen + self._seconds
        while not self._end.wait(max(due - time.monotonic(), 0)):
            if time.monotonic() - self._seen >= self._seconds:
                waited = f"{self._seconds / 60:.3g} minutes"
                os.write(2, f"watchdog: {self._where}: no step completed for {waited}; the stacks:\n".encode())
                faulthandler.dump_traceback(2, all_threads=True)
                if others := hosts.stands(self._steps):
                    os.write(2, f"watchdog: {others}\n".encode())
                due = time.monotonic() + self._seconds
            else:
                due = self._seen + self._seconds
