"""Two and four processes against one: same gradients and losses, own shards only, and what is said of a lost one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.errors import UsageError
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.training import hosts

HERE = Path(__file__).parent
STEPS = 100


def _child(data: str, out: str, *overrides: str) -> None:
    """Runs in each process: ten steps of a real network one by one, then a whole run of the toy; prints JSON."""
    import jax
    import tiny_run

    from ecg_jax.errors import EcgJaxError
    from ecg_jax.models import ladder
    from ecg_jax.objectives import supervised
    from ecg_jax.training import data as data_lib
    from ecg_jax.training import feed, loop, mesh, optim, step

    try:
        hosts.join()
        mesh.FSDP_BYTES = 1
        config = tiny_run.config(f'data.folders=["{data}"]', "data.task=code", *overrides)
        result = {"losses": {}, "step": {}, "mu": []}
        for name, fsdp in (("data", 1), ("fsdp", 2))[: 1 + (len(jax.devices()) > 1)]:
            where = mesh.make(8, 0, fsdp)
            real = supervised.make(ladder.get("Td1"), 6, crop=200)
            loaded = data_lib.load(config, None, where, True)
            whole, hyper = mesh.replicated(where), optim.hyper(config.optim)
            programs = step.build(real, where, 64, 8, False)
            seed, hyper = mesh.put(np.uint32(0), whole), mesh.put(hyper, whole)
            state = programs.init(seed, mesh.put(loaded.start, whole))
            if loaded.batches is None:
                inputs = feed.ResidentFeed(feed.place(loaded.train, where), where, 16, 0, False)
            else:
                inputs = feed.BatchFeed(loaded.batches(feed.FIELDS), where, False)
            losses, one = [], None
            for number in range(10):
                rows, (entry,), (rate,) = inputs.take(number, np.full(1, 0.01, np.float32))
                one = one or programs.one.lower(state, rows, entry, rate, hyper, seed).compile()
                state, found = one(state, rows, entry, rate, hyper, seed)
                losses.append(float(hosts.fetch(found["loss"])))
                if not number and name == "data":
                    mu = [hosts.fetch(leaf) for leaf in jax.tree.leaves(state.mu)]
                    result["mu"] = np.concatenate([leaf.ravel() for leaf in mu]).tolist()
            inputs.close()
            text = one.as_text()
            kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
            result["step"][name] = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
            result["losses"][name] = losses
        loop.objectives.make = lambda config, n, _: tiny_run.Toy(config.model.crop, n)
        loop.train(config, out, quiet=True)
        print(json.dumps(result), flush=True)
    except EcgJaxError as error:
        hosts.leave(error)  # as the command does
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _start(processes: int, folders: list[Path], out: Path, *overrides: str, number: int | None = None) -> list:
    """`number` of the `processes` processes, each with its data folder; the first few are started if it is given."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_hosts; test_hosts._child(*sys.argv[1:])"
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    base = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "ECG_JAX_TIMEOUT": "60"}
    started = []
    for own in range(processes if number is None else number):
        who = dict(zip(hosts.VARIABLES, (f"localhost:{port}", str(processes), str(own)), strict=True))
        environment = base | (who if processes > 1 else {})
        command = [sys.executable, "-c", code, str(folders[own]), str(out), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    return started


def _finish(started: list) -> list[tuple[int, str, str]]:
    ended = []
    for process in started:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended.append((process.returncode, out, err))
    return ended


def _results(started: list) -> list[dict]:
    ended = _finish(started)
    assert all(code == 0 for code, _, _ in ended), "\n".join(err for _, _, err in ended)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


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
    out = tmp_path_factory.mktemp("one")
    (result,) = _results(_start(1, [folder], out / "run", *LONG))
    return result, out / "run"


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("processes", "loader"), [(2, "host"), (4, "resident")])
def test_several_processes_do_what_one_does(folder, one, tmp_path, processes, loader):
    alone, run = one
    copies = _own_shards(folder, tmp_path, processes)
    results = _results(_start(processes, copies, tmp_path / "run", f"train.loader={loader}", *LONG))
    scale = max(map(abs, alone["mu"]))
    for found in results:
        assert found == results[0], "every process knows the same"
        assert found["mu"] == pytest.approx(alone["mu"], rel=1e-5, abs=1e-5 * scale)
        for name in ("data", "fsdp"):
            assert found["losses"][name] == pytest.approx(alone["losses"]["data"], rel=1e-5)
        assert found["step"]["data"]["all-gather"] == found["step"]["data"]["all-to-all"] == 0
        assert 0 < found["step"]["data"]["all-reduce"] <= REDUCTIONS
        assert found["step"]["fsdp"]["all-gather"] > 0
    assert sum(alone["step"]["data"].values()) == 0

    there, here = _lines(run), _lines(tmp_path / "run")
    assert [sorted(line) for line in there] == [sorted(line) for line in here]
    for own, other in zip(there, here, strict=True):
        for name in own:
            wanted = own[name] if isinstance(own[name], str) else pytest.approx(own[name], rel=1e-3, abs=1e-4)
            assert other[name] == wanted, (own["update"], name)
    summary, wanted = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", run))
    assert summary["data"] == wanted["data"] and summary["n_records"] == wanted["n_records"]
    assert summary["losses"]["test"] == pytest.approx(wanted["losses"]["test"], rel=1e-3)
    assert len((tmp_path / "run" / "evals.jsonl").read_text()) > 1000
    if loader == "resident":  # a checkpoint of four processes goes on in one
        summary = tmp_path / "run" / "summary.json"
        summary.unlink()
        (resumed,) = _finish(_start(1, [folder], tmp_path / "run", f"train.loader={loader}", *LONG))
        assert resumed[0] == 0, resumed[2]
        assert json.loads(summary.read_text())["resumes"] == 1
        for own, other in zip(here, _lines(tmp_path / "run"), strict=True):
            if "train/loss" in own:
                assert other["train/loss"] == pytest.approx(own["train/loss"], rel=1e-4)


def test_a_signal_to_one_process_stops_all_and_they_go_on(folder, tmp_path):
    long = ("recipe.steps=4000", "recipe.eval_every=2000", "checkpoint.every_steps=20", "train.loader=resident")
    started = _start(2, [folder] * 2, tmp_path / "run", *long)
    _until(lambda: (tmp_path / "run" / "checkpoints" / "20").exists(), started)
    started[1].send_signal(signal.SIGTERM)
    ended = _finish(started)
    assert [code for code, _, _ in ended] == [75, 75], ended
    assert "another process was told to stop" in ended[0][2] and "SIGTERM" in ended[1][2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_a_killed_process_is_named(folder, tmp_path):
    long = ("recipe.steps=100000", "recipe.eval_every=50000", "checkpoint.every_steps=20", "train.loader=resident")
    started = _start(2, [folder] * 2, tmp_path / "run", *long)
    _until(lambda: (tmp_path / "run" / "checkpoints" / "20").exists(), started)
    started[1].kill()
    code, _, err = _finish(started)[0]
    assert code == 5 and "process 1 did not come" in err, (code, err)


def _until(there, started, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until and all(process.poll() is None for process in started), _finish(started)
        time.sleep(0.02)


def test_damage_that_one_process_meets_ends_all(folder, tmp_path):
    copy = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, copy)
    shard = max((s for s in open_folder(copy).shards("train") if s.number % 8 >= 4), key=lambda s: s.records)
    content = bytearray(shard.path.read_bytes())
    content[len(content) // 2] ^= 1
    shard.path.write_bytes(content)
    ended = _finish(_start(2, [copy] * 2, tmp_path / "run", "train.loader=resident"))
    assert [code for code, _, _ in ended] == [3, 3], ended
    assert all(shard.path.name in err for _, _, err in ended) and "process 1:" in ended[0][2]


def test_who_does_not_come_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ECG_JAX_TIMEOUT", "5")
    started = _start(2, [folder] * 2, tmp_path / "run", number=1)
    code, _, err = _finish(started)[0]
    assert code == 5 and "cannot join" in err, (code, err)


def test_numbers_of_processes_that_work_are_listed(monkeypatch):
    with pytest.raises(UsageError, match="3 processes cannot share the 8 lanes of the data evenly; start 1, 2, 4, 8"):
        hosts.check_count(3)
    with pytest.raises(UsageError, match="8 processes cannot share the 12 training shards evenly; start 1, 2, 4"):
        hosts.check_count(8, 12, "training shards")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        hosts.join()


REDUCTIONS = 30
