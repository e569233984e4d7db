"""Files that are whole or not there: written beside themselves, brought to disk, then renamed."""

import os
from pathlib import Path

from ecg_jax.errors import MachineError


def write(path: Path, content: str | bytes) -> None:
    """Write `content` as the whole file `path`, making its folder. Raises MachineError where the disk
    refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from error
