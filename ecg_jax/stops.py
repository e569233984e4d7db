"""SIGTERM and SIGINT where there is nothing to save: while imports last, between the runs of a sweep, in a probe.

The process ends on the spot. An exception out of a handler would come up wherever Python happens to be, in an import,
a destructor or a callback, where a library swallows it or prints its traceback. Files are written whole or not at all
and locks die with the process, so nothing is lost. Training has handlers of its own (`training/runtime`), which save.

Invariant: a process that is told to stop says so in one line and leaves with the exit code of `InterruptedRun`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ecg_jax.errors import InterruptedRun

SIGNALS = (signal.SIGTERM, signal.SIGINT)
heard: list[str] = []  # of them, those that training heard in this process; it may have been at its end by then


@contextlib.contextmanager
def at_once(leave: Callable[[int], object] = os._exit) -> Iterator[None]:
    """While inside, the first SIGTERM or SIGINT ends the process by `leave(exit code)`. Changes nothing outside of the
    main thread, to which handlers belong.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, f"ecg-jax: error: {signal.Signals(number).name}: stopped; run it again to go on\n".encode())
        leave(InterruptedRun.exit_code)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
