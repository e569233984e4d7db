"""Checkpoints of a run: the only importer of Orbax.

One checkpoint holds the arrays (state and best state) and a JSON object (controller, time accounting, byte
offset of the metrics file). Written asynchronously, visible only when complete; the last few are kept, and those at
a fixed cadence for ever. A
checkpoint that cannot be read, or whose arrays have another checksum than they were saved with (Orbax does
not notice a flipped byte), is named in a warning and the one before it is used. Does not decide what is in a
checkpoint or what follows from it.

Invariant: `save` hands over buffers that nobody else will donate or change.
"""

import gc
import itertools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import numpy as np

from ecg_jax.config import CheckpointConfig
from ecg_jax.errors import DataError, MachineError
from ecg_jax.training import hosts


class Checkpoints:
    """The checkpoints of one run folder, under `<run>/checkpoints/<update>`."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder.absolute()
        self.config = config
        self._manager: Any = None  # opened at the first use: importing and opening Orbax takes most of a second
        self._last_time = time.monotonic()
        self._last_update = -1

    def due(self, update: int) -> bool:
        """Whether `every_steps` asks for a checkpoint after this update; one that an evaluation held up stays due."""
        every = self.config.every_steps
        return every > 0 and update // every > max(self._last_update, 0) // every

    def overdue(self) -> bool:
        """Whether the last one is `every_seconds` old: a matter of this process's clock: of several one decides."""
        return 0 < self.config.every_seconds <= time.monotonic() - self._last_time

    def save(self, update: int, arrays: dict[str, Any], host: dict[str, Any], wait: bool = False) -> None:
        """Start writing a checkpoint; returns before it is on disk unless `wait`.

        Args:
            update: its name; a checkpoint of that name is replaced.
            arrays: tree of device arrays.
            host: JSON-able.

        Raises:
            MachineError: this or the checkpoint before it could not be written (disk full, folder gone), or another
                process does not come.
        """
        hosts.meet("checkpoint")  # Orbax would wait for minutes for one that hangs, and name nobody
        try:
            manager = self._open()
            # Copied, because it is written later, by a thread, when the loop has gone on.
            about = {"host": json.loads(json.dumps(host)), "crc32c": checksum(arrays)}  # of several, process 0's
            manager.save_async(update, arrays, force=True, overwrite=True, custom_metadata=about)
        except (OSError, ValueError, RuntimeError) as error:
            raise MachineError(f"cannot write checkpoint {self.folder / str(update)}: {_line(error)}") from error
        self._last_time, self._last_update = time.monotonic(), update
        if wait:
            self.close()

    def restore(self, abstract: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest readable checkpoint as (update, arrays, host), placed like `abstract`; None if there is
        none.

        Raises:
            DataError: there are checkpoints and not one of them can be read.
        """
        there = self.folder.is_dir() and any(path.name.isdigit() for path in self.folder.iterdir())
        hosts.meet("checkpoints listed")
        if not there:
            return None
        damaged: list[Path] = []
        for update in sorted((found.step for found in self._open().checkpoints), reverse=True):
            read = self._read(update, abstract)
            if hosts.total(np.array(isinstance(read, str))) and not isinstance(read, str):
                read = "another process could not read it"
            if not isinstance(read, str):
                self._set_aside(damaged)
                self._last_update = update
                return update, *read
            damaged.append(self.folder / str(update))
            hosts.say(f"warning: checkpoint {damaged[-1]} is damaged and not used: {read}")
        raise DataError(f"no checkpoint in {self.folder} can be read; delete the run folder to start anew")

    def _read(self, update: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | str:
        """(arrays, host) of one checkpoint, or what is wrong with it."""
        chatter = logging.getLogger("asyncio")  # tells of every array of a damaged checkpoint, pages of it
        level = chatter.level
        chatter.setLevel(logging.CRITICAL)
        try:
            manager = self._open()
            about = manager.metadata(update).custom_metadata
            arrays = manager.load(update, abstract_state=abstract)
            if checksum(arrays) != about["crc32c"]:
                return "its arrays do not have the checksum they were saved with"
            return arrays, about["host"]
        except Exception as error:  # Orbax and TensorStore raise whatever they like on a damaged file
            return _line(error)
        finally:
            gc.collect()  # the chatter comes when the failed reads are collected
            chatter.setLevel(level)

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            MachineError: the last checkpoint could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except (OSError, ValueError, RuntimeError) as error:
                raise MachineError(f"cannot write a checkpoint in {self.folder}: {_line(error)}") from error

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename, so that they neither count as the newest nor take the place of a good one among
        those kept.
        """
        if damaged:
            self.close()
        for path in damaged if hosts.first() else ():
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        if damaged:
            hosts.meet("damaged checkpoints set aside")

    def _open(self) -> Any:
        if self._manager is None:
            import absl.logging
            from orbax.checkpoint import v1 as ocp

            # Progress by the page otherwise, and the whole stack of what is raised anyway and told in one line.
            absl.logging.set_verbosity(absl.logging.FATAL)
            policies = ocp.training.preservation_policies
            keep = [policies.LatestN(self.config.keep)]
            if self.config.keep_every:
                keep.append(_Milestones(self.config.keep_every))
            self._manager = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )
        return self._manager


class _Milestones:
    """A preservation policy of Orbax: the first checkpoint at or after every multiple of a number of updates. (Its own
    one keeps exact multiples, which an evaluation may hold up.)
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        passed = [0, *(found.step // self._every for found in checkpoints)]
        return [now > before for before, now in itertools.pairwise(passed)]


def checksum(arrays: Any) -> int:
    """CRC32C over all arrays of a tree, in tree order."""
    crc = 0
    for leaf in jax.tree.leaves(arrays):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(hosts.fetch(leaf)).tobytes())
    return crc


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax wraps what went wrong, several times over
        error = error.__cause__
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__}: {text}")[:200]  # a bare word says nothing by itself
