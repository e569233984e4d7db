"""The run folder: who may write in it, whether it is the same run, and whether it is finished.

Knows the names of the files, not what is in them, except `config.json`. Invariant: one process trains in a
folder at a time, and only the run whose identity the folder holds.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecg_jax import config as config_lib
from ecg_jax import files
from ecg_jax.config import Config
from ecg_jax.errors import DivergedError, MachineError, UsageError

LOCK, CONFIG, DATA, SUMMARY = ".lock", "config.json", "data.json", "summary.json"
METRICS, TIMING, EVALS = "metrics.jsonl", "timing.jsonl", "evals.jsonl"
FINISHED = ("done", "unconverged", "diverged")


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, made if need be, for this process.

    Raises:
        UsageError: it is something else than a run folder, or another process trains in it.
        MachineError: it cannot be made.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir} is a file; give a folder for the run")
    if run_dir.is_dir() and not (run_dir / CONFIG).exists():
        strange = [path.name for path in run_dir.iterdir() if path.name != LOCK and not path.name.endswith(".part")]
        if strange:
            raise UsageError(f"{run_dir} is no run folder (it holds {strange[0]} but no {CONFIG}); give another")
    fresh = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / LOCK, "w")
    except OSError as error:
        raise MachineError(f"cannot make run folder {run_dir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is training in {run_dir}; wait for it or give another folder") from None
        try:
            yield
        finally:
            if fresh and [path.name for path in run_dir.iterdir()] == [LOCK]:  # failed before it began
                (run_dir / LOCK).unlink()
                run_dir.rmdir()


def begun(run_dir: Path) -> bool:
    """Whether anything was trained in the folder: a configuration that failed at once binds nobody."""
    log = run_dir / METRICS
    return (log.exists() and log.stat().st_size > 0) or (run_dir / SUMMARY).exists()


def devices(run_dir: Path) -> int:
    """On how many devices the run of the folder was begun, where it says so, else 0."""
    try:
        return json.loads((run_dir / CONFIG).read_text())["train"]["devices"] if begun(run_dir) else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0  # `adopt` says what is wrong with it


def adopt(run_dir: Path, config: Config) -> Config:
    """The configuration to run with: `config`, with what `auto` meant when the folder was begun.

    Raises:
        UsageError: the folder holds a run of another identity; names every key that differs, with both
        values.
    """
    if not (run_dir / CONFIG).exists() or not begun(run_dir):
        return config
    held = config_lib.from_json((run_dir / CONFIG).read_text(), str(run_dir / CONFIG))
    if config.train.loader == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, loader=held.train.loader))
    old, new = config_lib.identity(held)[0], config_lib.identity(config)[0]
    differing = [f"{key} is {old[key]!r}, not {new[key]!r}" for key in new if old[key] != new[key]]
    if differing:
        raise UsageError(f"{run_dir} holds another run: {'; '.join(differing)}; give another folder for this one")
    return config


def finished(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, None while there is work left.

    Raises:
        DivergedError: the run is finished because it diverged.
    """
    path = run_dir / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    if summary.get("status") == "diverged":
        raise DivergedError(f"{run_dir} diverged at step {summary['step']}; lower optim.lr and give another folder")
    return summary if summary.get("status") in FINISHED else None


def check_data(run_dir: Path, found: dict[str, Any]) -> None:
    """Remember which data a run is begun on, or refuse to go on with other data.

    Raises:
        UsageError: the folder's run was begun on other records or labels.
    """
    path = run_dir / DATA
    if path.exists() and begun(run_dir):
        held = json.loads(path.read_text())
        differing = [key for key in found | held if held.get(key) != found.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"the data of {run_dir} have changed: {key} was {held.get(key)!r}, now {found.get(key)!r}; "
                "restore the data folders or give another run folder"
            )
    else:
        files.write(path, json.dumps(found, indent=2) + "\n")
