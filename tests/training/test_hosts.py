"""Two and four processes against one: same gradients and losses, own shards only, and what is said of a lost one."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import host_child
import jax
import pytest
import tiny_run

from ecg_jax.datasets import open_source
from ecg_jax.errors import UsageError
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.training import hosts, loop, mesh

SAME = {"data": "data", "toy": "toy", "fsdp": "toy"}
STEPS = 100


def _port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts processes, each with its data folder: forked from one that has imported all, which takes longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["host_child", "orbax.checkpoint.v1"])
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, sys.path), str(Path(host_child.__file__).parent)]))
        patch.setenv("JAX_PLATFORMS", "cpu")

        def start(processes: int, folders: list[Path], out: Path, *words: str) -> list:
            port, logs, started = _port(), tmp_path_factory.mktemp("logs"), []
            base = {"XLA_FLAGS": flags, "ECG_JAX_TIMEOUT": "60", "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
            for own in range(processes):
                who = dict(zip(hosts.VARIABLES, (f"localhost:{port}", str(processes), str(own)), strict=True))
                words_of_it = (str(folders[own]), str(out), *words)
                process = context.Process(target=host_child.child, args=(base | who, logs / str(own), *words_of_it))
                process.start()
                started.append((process, logs / str(own)))
            return started

        yield start


def _finish(started: list) -> list[tuple[int, str, str]]:
    ended = []
    for process, log in started:
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
        ended.append((process.exitcode, *(log.with_name(f"{log.name}.{kind}").read_text() for kind in ("out", "err"))))
        process.close()
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"records": "420", "val": "60", "test": "60", "prevalence": "balanced"}
    source = open_source("synthetic", None, options)
    return Path(convert(source, tmp_path_factory.mktemp("data"), shards=8)["path"])


def _own_shards(folder: Path, out: Path, processes: int) -> list[Path]:
    """A copy of the data folder for each process, in which other processes' shards hold nothing but zeros."""
    copies = []
    for own in range(processes):
        copy = out / f"process{own}" / folder.parent.name / folder.name
        shutil.copytree(folder, copy)
        for split in open_folder(copy).splits:
            for shard in open_folder(copy).shards(split):
                if shard.number % 8 * processes // 8 != own:
                    shard.path.write_bytes(bytes(shard.bytes))
        copies.append(copy)
    return copies


LONG = (f"recipe.steps={STEPS}", "recipe.eval_every=25", "train.log_every=1", "checkpoint.every_steps=20")


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """The same in this process, alone, on one device: what the child prints, and its run folder."""
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(mesh, "FSDP_BYTES", mesh.FSDP_BYTES)  # the child changes both
        patch.setattr(loop.objectives, "make", loop.objectives.make)
        jax.config.update("jax_disable_most_optimizations", True)
        host_child.run(str(folder), str(out), "train.devices=1", *LONG)
        jax.config.update("jax_disable_most_optimizations", False)
    return json.loads(printed.getvalue().splitlines()[-1]), out


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# In the compiled step: all gradients are summed in one, what counts in another; FSDP puts together what it has split.
COLLECTIVES = {
    "data": {"all-reduce": 2, "all-gather": 0, "all-to-all": 0, "collective-permute": 0},
    "toy": {"all-reduce": 2, "all-gather": 0, "all-to-all": 0, "collective-permute": 0},
    "fsdp": {"all-reduce": 6, "all-gather": 4, "all-to-all": 0, "collective-permute": 0},
}


def _same_steps(found: list[dict], alone: dict, processes: int) -> None:
    for each in found:
        assert each == found[0], "every process knows the same"
        for name in host_child.NETS[processes]:
            wanted = alone["mu"][SAME[name]]
            assert each["mu"][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5 * max(map(abs, wanted)))
            assert each["losses"][name] == pytest.approx(alone["losses"][SAME[name]], rel=1e-5)
            assert each["step"][name] == COLLECTIVES[name], (name, each["step"])


def _same_lines(here: list[dict], there: list[dict]) -> None:
    assert [sorted(line) for line in here] == [sorted(line) for line in there]
    for own, other in zip(here, there, strict=True):
        for name in own:
            wanted = other[name] if isinstance(other[name], str) else pytest.approx(other[name], rel=1e-3, abs=1e-4)
            assert own[name] == wanted, (own["update"], name)


STREAM = ("train.loader=stream", "train.log_every=1", "checkpoint.every_steps=8")
AFTER = (
    *("then=stream", *STREAM),
    *("then=again", *STREAM, "stop=13"),
    *("then=again", *STREAM),
    *("then=damaged", "train.loader=host", "damage=1", "recipe.steps=200"),
)


def test_two_processes_do_what_one_does(start, folder, one, tmp_path):
    """And after it, in the same processes: a stream, stopped and gone on with; a shard that is damaged."""
    alone, run = one
    assert not any(sum(kinds.values()) for kinds in alone["step"].values())
    copies = _own_shards(folder, tmp_path, 2)
    ended = _finish(start(2, copies, tmp_path / "run", "train.loader=host", *LONG, *AFTER))
    assert [code for code, _, _ in ended] == [3, 3], ended
    _same_steps([json.loads(out.splitlines()[-1]) for _, out, _ in ended], alone, 2)
    _same_lines(_lines(tmp_path / "run"), _lines(run))
    summary, wanted = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", run))
    assert summary["data"] == wanted["data"] and summary["n_records"] == wanted["n_records"]
    assert summary["losses"]["test"] == pytest.approx(wanted["losses"]["test"], rel=1e-3)
    counts = [len((path / "evals.jsonl").read_text().splitlines()) for path in (tmp_path / "run", run)]
    assert counts[0] == counts[1] > 5

    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("stream", "again")]
    assert [found["resumes"] for found in summaries] == [0, 1]
    assert all(found["loader"] == "stream" and found["data"]["stream processes"] == 2 for found in summaries)
    assert _lines(tmp_path / "again") == _lines(tmp_path / "stream")

    for own, (_, _, err) in enumerate(ended):
        (line,) = [line for line in err.splitlines() if line.startswith("ecg-jax: error: ")]
        assert ("process 1: " in line) == (own == 0), "whose shard it is"
        assert "record at byte" in line and "a checksum is wrong" in line
    assert (tmp_path / "damaged" / "config.json").exists(), "in the middle of an epoch"


def test_a_signal_to_one_of_four_stops_all_and_one_goes_on(start, folder, one, tmp_path, monkeypatch):
    alone, run = one
    slow = "slow=0.1"  # seconds a step, so that the signal comes in the middle
    started = start(4, _own_shards(folder, tmp_path, 4), tmp_path / "run", "train.loader=resident", slow, *LONG)
    _until(lambda: (tmp_path / "run" / "checkpoints" / "20").exists(), started)
    os.kill(started[2][0].pid, signal.SIGTERM)
    ended = _finish(started)
    assert [code for code, _, _ in ended] == [75] * 4, ended
    assert "another process was told to stop" in ended[0][2] and "SIGTERM" in ended[2][2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    _same_steps([json.loads(out.splitlines()[-1]) for _, out, _ in ended], alone, 4)

    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: tiny_run.Toy(config.model.crop, n))
    config = tiny_run.config(f'data.folders=["{folder}"]', "data.task=code", "train.loader=resident", *LONG)
    assert loop.train(config, tmp_path / "run", quiet=True)["resumes"] == 1
    _same_lines(_lines(tmp_path / "run"), _lines(run))


def test_a_process_killed_while_a_checkpoint_is_committed_is_named(start, folder, tmp_path):
    """Orbax would wait for it for minutes, jax end this one with a page of stack."""
    words = ("recipe.steps=40", "checkpoint.every_steps=5", "only=loop", "die=commit")
    (code, _, err), (killed, _, _) = _finish(start(2, [folder] * 2, tmp_path / "run", *words))
    assert (code, killed) == (5, -signal.SIGKILL), err
    assert "ecg-jax: error: process 1 is gone" in err and "start all 2 again to go on" in err


def _until(there, started, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until and all(process.is_alive() for process, _ in started), _finish(started)
        time.sleep(0.02)


def test_numbers_of_processes_that_work_are_listed(monkeypatch):
    with pytest.raises(UsageError, match="3 processes cannot share the 8 lanes of the data evenly; start 1, 2, 4, 8"):
        hosts.check_count(3)
    with pytest.raises(UsageError, match="8 processes cannot share the 12 training shards evenly; start 1, 2, 4"):
        hosts.check_count(8, 12, "training shards")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        hosts.join()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UsageError, match="JAX_PROCESS_ID is 2: of 2 processes the numbers are 0 to 1"):
        hosts.join()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost")
    with pytest.raises(UsageError, match="must be host:port"):
        hosts.join()
