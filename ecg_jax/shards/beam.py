"""Writes shards as an Apache Beam pipeline: one element a shard, each through the same `write_shard` as the local pool.

For machines that the pool does not reach; it knows nothing of a data set. The workers need ecg-jax, and the source and
the data folder under the same paths as here, on a file system that all of them see: what a worker is to do, and why it
failed, lies in the folder's `.convert` meanwhile, since Beam hands back neither. Invariants: the bytes are those of the
local runner; a failure is the same one line, not Beam's account of it.
"""

import contextlib
import io
import json
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ecg_jax import errors
from ecg_jax.errors import EcgJaxError, MachineError, UsageError
from ecg_jax.shards.grouping import ShardPlan
from ecg_jax.shards.schema import STATE
from ecg_jax.shards.writer import Job, machine_error, read_state, write_atomic, write_shard

_quiet = logging.root.manager.disable
logging.disable(logging.WARNING)  # on import Beam complains of extras that nobody asked for
try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
except ImportError as error:
    raise UsageError(f"--runner beam needs Apache Beam ({error}): pip install 'ecg-jax[beam]'") from None
finally:
    logging.disable(_quiet)

NOTE = 4096  # bytes kept free in front of a task for the error, so that a full disk cannot swallow it
GO = "beam.go.tmp"  # while it is there, workers begin shards; all names end in .tmp, as what `resume` sweeps away


def pipeline_options(pairs: Sequence[str]) -> PipelineOptions:
    """`["runner=FlinkRunner", "flink_master=host:8081"]` as Beam has it; true and false are flags, a name given twice
    is a list. Raises UsageError for what Beam does not take."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--beam-option {pair!r}: write it as NAME=VALUE")
        value = {"true": True, "false": False}.get(text, text)
        before = options.get(name)
        options[name] = value if before is None else [*(before if isinstance(before, list) else [before]), value]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # Beam reads options as a command line, and ends as one
            made = PipelineOptions.from_dictionary(options)
            made.get_all_options()
            _runner(made)
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1:] or ["not understood"]
        raise UsageError(f"--beam-option: {reason[0].partition('error: ')[2] or reason[0]}") from None
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise UsageError(f"--beam-option {' '.join(pairs)}: {error}") from None
    return made


def _runner(options: PipelineOptions) -> Any:
    name = options.get_all_options()["runner"] or "DirectRunner"
    # Beam's own DirectRunner would first try to fetch a runner written in Go from the network.
    return FnApiRunner() if name == "DirectRunner" else apache_beam.runners.create_runner(name)


def write_shards(job: Job, todo: Sequence[ShardPlan], options: PipelineOptions) -> None:
    """Write `todo` wherever the pipeline runs.

    Raises what `write_shard` raises, and MachineError where Beam fails; the shards written are kept.
    """
    if not todo:
        return
    job = replace(job, folder=job.folder.resolve())
    tasks = {shard.file_name(job.source.name): shard for shard in todo}
    state = job.folder / STATE
    try:
        write_atomic(state / GO, [b""])
        for name, shard in tasks.items():
            write_atomic(_task(state, name), [bytes(NOTE), pickle.dumps(shard)])
        failure = _run(job, list(tasks), options)
        for name in tasks:
            if noted := _noted(state, name):
                raise noted
        if failure is not None:
            raise failure
        for name in tasks:
            if read_state(job.folder, name) is None:
                raise MachineError(f"Beam ended without {job.folder / name}: run the same command again")
    finally:
        for path in (state / GO, *(_task(state, name) for name in tasks)):
            with contextlib.suppress(OSError):
                path.unlink()


def _task(state: Path, name: str) -> Path:
    return state / f"{name}.beam.tmp"


def _run(job: Job, names: list[str], options: PipelineOptions) -> Exception | None:
    try:
        pipeline = apache_beam.Pipeline(runner=_runner(options), options=options)
        elements = pipeline | "shards" >> apache_beam.Create(names) | "spread" >> apache_beam.Reshuffle()
        _ = elements | "write" >> apache_beam.FlatMap(_write, pickle.dumps(job))
        pipeline.run().wait_until_finish()
    except Exception as error:  # whatever the chosen runner throws; what failed in a worker is told by its note
        return _ours(error) or _lost(error)
    return None


def _ours(error: Exception) -> EcgJaxError | None:
    """The error of ours in an account of Beam's, for a worker that could not even note it."""
    if isinstance(error, EcgJaxError):
        return type(error)(_WHERE.sub("", str(error)))
    found = re.findall(r"^ecg_jax\.errors\.(\w+): (.*)$", str(error), re.MULTILINE)
    return getattr(errors, found[-1][0], MachineError)(_WHERE.sub("", found[-1][1])) if found else None


_WHERE = re.compile(r" \[while running .*", re.DOTALL)


def _lost(error: Exception) -> MachineError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return MachineError(f"the Beam pipeline failed ({lines[-1].strip()[:200]}); the shards written so far are kept")


# ---------------------------------------------------------------------------------------------------- on a worker


@lru_cache(maxsize=1)
def _job(pickled: bytes) -> Job:
    return pickle.loads(pickled)


def _write(name: str, pickled: bytes) -> list[None]:
    """Write the shard `name`. Beam's element function: no output; a failure is noted where the task came from."""
    job = _job(pickled)
    state = job.folder / STATE
    if not (state / GO).exists() or read_state(job.folder, name):
        return []  # another worker failed, or Beam tries again what was done
    try:
        task = _task(state, name).read_bytes()
    except OSError as error:
        where = f"{job.folder} (does every Beam worker see that folder?)"
        raise machine_error(Path(where), error) from None
    try:
        write_shard(job, pickle.loads(task[NOTE:]))
    except Exception as error:
        with contextlib.suppress(OSError):
            (state / GO).unlink()
        try:
            _note(state, name, error)
        except OSError:
            raise error from None
    return []


def _note(state: Path, name: str, error: Exception) -> None:
    """Write `error` into the room in front of the task: that needs no new space."""
    if isinstance(error, OSError):
        kind, arguments = "OSError", [error.errno, error.strerror, str(error.filename)]
    elif isinstance(error, EcgJaxError | MemoryError):
        kind, arguments = type(error).__name__, [str(error)]
    else:  # a bug of ours
        kind, arguments = "", ["in a Beam worker:\n" + "".join(traceback.format_exception(error))]
    text = json.dumps([kind, arguments])
    if len(text) > NOTE:  # six letters for one, at the worst
        arguments[-1] = arguments[-1][: NOTE // 8] if kind else arguments[-1][-NOTE // 8 :]
        text = json.dumps([kind, arguments])
    with _task(state, name).open("r+b") as file:
        file.write(text.encode())


def _noted(state: Path, name: str) -> Exception | None:
    try:
        with _task(state, name).open("rb") as file:
            text = file.read(NOTE).rstrip(b"\0")
    except OSError:
        return None
    if not text:
        return None
    kind, arguments = json.loads(text)
    known: dict[str, Callable[..., Exception]] = {"OSError": OSError, "MemoryError": MemoryError, "": RuntimeError}
    return (known.get(kind) or getattr(errors, kind))(*arguments)
