"""What a run writes while it goes, the one place where the host reads from the device, and where wall time
went.

`metrics.jsonl` holds what is reproducible to the bit, `timing.jsonl` the rest. Invariant: every number that
comes from a device passes `read`, so that a test can count the waits.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecg_jax.errors import DataError, MachineError
from ecg_jax.training import hosts, runtime


def read(values: Any) -> Any:
    """Wait for device values and return them as NumPy, whole on every process. The only place where training waits for
    a device."""
    return hosts.fetch(values)


class Log:
    """A JSONL file that can be cut back to where a checkpoint stood. One object a line, NaN and infinity
    as null. Of several processes only the first one writes.
    """

    def __init__(self, path: Path, offset: int | None = None) -> None:
        """Open for writing at byte `offset`, dropping what follows it (None: at the end).

        Raises:
            DataError: the file is shorter than that.
        """
        path = path if hosts.first() else Path(os.devnull)
        if not hosts.first():
            offset = None
        size = path.stat().st_size if path.exists() else 0
        offset = size if offset is None else offset
        if size < offset:
            raise DataError(f"{path} has {size} bytes, {offset} expected: lines are missing; delete the run folder")
        self._file = open(path, "ab")
        if hosts.first():
            self._file.seek(self._file.truncate(offset))  # else `offset` tells the old end until something is written

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; flushed, so that the file can be followed. Raises MachineError where the disk refuses."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write(json.dumps(clean).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise MachineError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def offset(self) -> int:
        """Bytes so far, safe on disk: what a checkpoint remembers must survive the machine too."""
        if hosts.first():
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class Clock:
    """Wall time by what it was spent on, kept over resumes. What has no name of its own is training."""

    NAMED = ("data", "input_wait", "eval", "checkpoint", "finish")

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._compiled = runtime.compiles.seconds
        self._before: dict[str, float] = {}  # of the processes before this one
        self._spent = dict.fromkeys(self.NAMED, 0.0)

    def resume(self, spent: dict[str, float]) -> None:
        """Go on from what an earlier process of the run had `spent`."""
        self._before = dict(spent)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the time inside under `what`, compilations excepted."""
        start, compiled = time.monotonic(), runtime.compiles.seconds
        try:
            yield
        finally:
            inside = time.monotonic() - start - (runtime.compiles.seconds - compiled)
            self._spent[what] += max(inside, 0.0)

    def spent(self) -> dict[str, float]:
        """Seconds by name, with `compile`, `train` (the rest) and `wall` (all of it)."""
        wall = time.monotonic() - self._start
        named = self._spent | {"compile": runtime.compiles.seconds - self._compiled}
        all_of_it = named | {"train": max(wall - sum(named.values()), 0.0), "wall": wall}
        return {name: seconds + self._before.get(name, 0.0) for name, seconds in all_of_it.items()}


class Window:
    """Means of per-step values between two lines of the log, over the finite ones; part of a checkpoint."""

    def __init__(self, sums: dict[str, list[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = dict(sums or {})  # name -> [sum, number of finite values]

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            entry = self.sums.setdefault(name, [0.0, 0])
            if math.isfinite(value):
                entry[0] += value
                entry[1] += 1

    def empty(self) -> bool:
        return not self.sums

    def mean(self) -> dict[str, float | None]:
        """The means so far, None where nothing was finite; starts a new window."""
        means = {name: total / n if n else None for name, (total, n) in self.sums.items()}
        self.sums = {}
        return means
