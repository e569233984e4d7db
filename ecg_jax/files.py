"""Files that are whole or not there: written beside themselves, brought to disk, then renamed.

Invariant: processes that write one file at the same time leave the whole content of one of them, and nothing beside it.
"""

import contextlib
import fcntl
import glob
import os
import secrets
from pathlib import Path

from ecg_jax.errors import MachineError


def write(path: Path, content: str | bytes) -> None:
    """Write `content` as the whole file `path`, making its folder; what killed processes left of the same file goes.

    Raises MachineError where the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _written(path, content.encode() if isinstance(content, str) else content):
            pass  # where locks do not reach from machine to machine, another one may take our part for left over
        for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            _remove_if_left(part)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error


def _written(path: Path, content: bytes) -> bool:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # as long as it is held, somebody is at it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            try:
                part.replace(path)
            except FileNotFoundError:
                return False
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return True


def _remove_if_left(part: Path) -> None:
    with contextlib.suppress(OSError), open(part, "rb") as file:  # gone, held, or a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
