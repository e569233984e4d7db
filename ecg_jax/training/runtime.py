"""What a process needs around training: the cache of compiled programs, the count of compilations, signals.

Invariant: calling `setup` again changes nothing but the cache folder.
"""

import contextlib
import hashlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax

from ecg_jax.models.ladder import Config, ResNet1dConfig

WIDE = 32  # channels of a ResNet's first stage from which its convolutions fill all cores of a CPU
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
    R4 86 and 61, T4 216 and 192, T8 1458 and 1224; but R6 216 and 209, R7 586 and 709, R8 527 and 825: the wide
    convolutions are products so large that they fill all cores by themselves.
    """
    wide = isinstance(arch, ResNet1dConfig) and arch.width >= WIDE
    if wide or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= cores)
    with contextlib.suppress(RuntimeError):  # JAX has its devices
        jax.config.update("jax_num_cpu_devices", devices)


class Stop:
    """Set by a signal, looked at between dispatches."""

    signal: str | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """While inside, the first SIGTERM or SIGINT only sets a flag; a second one ends the process at once
    (128 + n).
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # handlers belong to the main thread; whoever runs us elsewhere has to stop us otherwise
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name
        signal.signal(number, lambda n, _: os._exit(128 + n))
        print(f"{stop.signal}: saving and stopping; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
