"""What a run says and keeps when the disk, the memory, the data or the clock are against it."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from ecg_jax.config import CheckpointConfig
from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError, MachineError
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.training import data, loop, memory, mesh
from ecg_jax.training.checkpoint import Checkpoints

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"


@pytest.fixture
def toy(monkeypatch):
    """The toy objective in place of the supervised one, for any number of labels."""
    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: tiny_run.Toy(config.model.crop, n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"records": "300", "val": "40", "test": "40", "prevalence": "balanced"}
    source = open_source("synthetic", None, options)
    return Path(convert(source, tmp_path_factory.mktemp("data"))["path"])


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- checkpoints


def _golden_arrays():
    """What the golden checkpoint holds: a formula, so that it is known without the checkpoint."""
    return {"params": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7}, "count": np.int32(41)}


def test_a_checkpoint_of_an_earlier_release_can_be_read(tmp_path):
    """Written by version 0.1.0 with jax 0.10.2 and orbax 0.12.8. If this fails, runs that people have begun are lost:
    make the reader read it, do not write it anew."""
    shutil.copytree(GOLDEN, tmp_path / "checkpoints")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), _golden_arrays())
    update, arrays, host = Checkpoints(tmp_path / "checkpoints", CheckpointConfig()).restore(abstract)
    assert (update, host) == (7, {"offset": 123, "note": [1.5, None]})
    for found, wanted in zip(jax.tree.leaves(arrays), jax.tree.leaves(_golden_arrays()), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_last_ones_and_those_of_a_cadence_are_kept(toy, tables, tmp_path):
    config = tiny_run.config("checkpoint.every_steps=3", "checkpoint.keep_every=6", "recipe.steps=24")
    loop.train(config, tmp_path / "run", tables=tables, quiet=True)
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [6, 12, 18, 21], "24 is the end, which needs none"
    config = tiny_run.config("checkpoint.every_steps=4", "checkpoint.keep_every=8", "checkpoint.keep=1")
    loop.train(config, tmp_path / "held up", tables=tables, quiet=True)
    kept = sorted(int(path.name) for path in (tmp_path / "held up" / "checkpoints").iterdir())
    assert kept == [9, 17, 20], "evaluations at 8 and 16 are read one dispatch later"


def test_checkpoints_by_the_clock_and_on_whole_dispatches(toy, tables, tmp_path, monkeypatch):
    config = tiny_run.config(
        "checkpoint.every_seconds=5", "train.steps_per_dispatch=4", "checkpoint.keep=9", "train.log_every=3"
    )
    now = iter(range(10**6))
    monkeypatch.setattr("ecg_jax.training.checkpoint.time.monotonic", lambda: float(next(now)))
    loop.train(config, tmp_path / "run", tables=tables, quiet=True)
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) >= 1 and all(update % 4 == 0 for update in kept)
    lines = [line["update"] for line in _lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert lines and all(update % 4 == 0 for update in lines)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops what failed beside it
def test_a_full_disk_loses_no_checkpoint(toy, tables, tmp_path, monkeypatch):
    """Files may not grow beyond a size, which is what a full disk is to whoever writes."""
    config = tiny_run.config("checkpoint.every_steps=6")
    loop.train(config, tmp_path / "whole", tables=tables, quiet=True)
    save, limits = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, update, *args):
        if update != 12:
            return save(self, update, *args)
        self.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            save(self, update, *args)
            self.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(MachineError, match=r"cannot write .*checkpoint"):
            loop.train(config, run, tables=tables, quiet=True)
    loop.train(config, run, tables=tables, quiet=True)
    assert [line["update"] for line in _lines(run / "timing.jsonl") if "resumed" in line] == [6]
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


# ----------------------------------------------------------------------------------------------------- signals


def _process(run: Path, *overrides: str, code: str = "") -> subprocess.Popen:
    program = Path(tiny_run.__file__)
    run_it = f"runpy.run_path({str(program)!r}, run_name='__main__')"
    text = f"import sys, runpy; sys.argv = sys.argv[1:]; {code or 'pass'}\n{run_it}"
    command = [sys.executable, "-c", text, str(program), str(run), *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


SLOW = (  # a call that no handler interrupts, as a compiled program is none
    "import hashlib, ecg_jax.training.runtime as r, ecg_jax.training.feed as f; r.GRACE = {grace};"
    "take = f.ResidentFeed.take; f.ResidentFeed.take = lambda self, step, rates: "
    "step == 14 and hashlib.pbkdf2_hmac('md5', b'', b'', {wait}) or take(self, step, rates)"
)


def _at_the_slow_step(run: Path) -> None:
    """Until the run has logged the step before the one that takes for ever."""
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"train/loss") < 13:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)  # the line is written just before the flag is looked at


OVERRIDES = ("checkpoint.every_steps=6", "train.log_every=1", "recipe.steps=40")


def test_a_step_that_does_not_end_is_shown_and_leaves_the_last_checkpoint(toy, tables, tmp_path):
    """The watchdog shows where every thread stands; SIGTERM waits for a while; the next start goes on."""
    run = tmp_path / "run"
    process = _process(run, *OVERRIDES, "train.watchdog=0.01", code=SLOW.format(grace=2, wait=10**9))
    _at_the_slow_step(run)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "did not end within 2 s of SIGTERM; checkpoint 12 has been begun; run it again" in err
    assert f"watchdog: {run}: no step completed for 0.01 minutes; the stacks" in err
    assert "most recent call first" in err and "in <lambda>" in err and "loop.py" in err
    loop.train(tiny_run.config(*OVERRIDES), run, tables=tables, quiet=True)
    assert [line["update"] for line in _lines(run / "timing.jsonl") if "resumed" in line] == [12]
    loop.train(tiny_run.config(*OVERRIDES), tmp_path / "whole", tables=tables, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_second_signal_of_another_kind_ends_at_once(tmp_path):
    run = tmp_path / "run"
    process = _process(run, *OVERRIDES, code=SLOW.format(grace=600, wait=10**9))
    _at_the_slow_step(run)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving and stopping" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGINT: stopped at once" in err


# ------------------------------------------------------------------------------------------ numbers and memory


def test_a_step_that_is_not_finite_is_said_and_left_out(tables, tmp_path, monkeypatch, capsys):
    class Spoilt(tiny_run.Toy):
        def loss(self, params, batch, keys):
            loss, aux = super().loss(params, batch, keys)
            return jnp.where((batch["signal"] == 31000).any(), jnp.nan, loss), aux

    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: Spoilt(config.model.crop, n))
    signals = tables["train"].signal.copy()
    signals[17, 0, 0] = 31000
    given = tables | {"train": dataclasses.replace(tables["train"], signal=signals)}
    loop.train(tiny_run.config("train.log_every=1"), tmp_path / "run", tables=given, quiet=True)
    err = capsys.readouterr().err
    skipped = [line["update"] for line in _lines(tmp_path / "run" / "metrics.jsonl") if line.get("train/skipped")]
    assert 1 <= len(skipped) <= 3
    assert f"warning: step {skipped[0]}: loss or gradient not finite" in err


def test_out_of_memory_names_a_batch_that_fits(toy, tables, tmp_path, monkeypatch):
    build = loop.step.build

    def exhausted(*args):
        programs = build(*args)

        def step(state, *rest):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

        return programs._replace(step=step)

    monkeypatch.setattr(loop.step, "build", exhausted)
    with pytest.raises(MachineError) as caught:
        loop.train(tiny_run.config("train.batch=64"), tmp_path / "run", tables=tables, quiet=True)
    said = str(caught.value)
    assert "train.batch=64: train.batch=32 would fit (in a new run folder), train.accumulate=2" in said
    assert "12345 bytes" in said and "\n" not in said
    monkeypatch.setattr(loop.step, "build", lambda *args: build(*args)._replace(step=_broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):  # no fault of the machine that we know of
        loop.train(tiny_run.config("train.batch=64"), tmp_path / "run", tables=tables, quiet=True)


def _broken(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_the_batch_that_fits_is_worked_out_from_the_programs_own_account():
    gib = 2**30
    assert memory.largest_batch(256, 8, (2 * gib, 16 * gib), 10 * gib) == 120  # (9.5 - 2) / 16 of 256
    assert memory.largest_batch(256, 32, (2 * gib, 16 * gib), 10 * gib) == 96
    assert memory.largest_batch(256, 8, (12 * gib, 16 * gib), 10 * gib) == 0
    assert memory.largest_batch(256, 8, None, 10 * gib) == 128
    account = memory.Account()
    account.keep(jax.jit(lambda x: (x @ x.T).sum()), jnp.zeros((64, 64)))
    fixed, _ = account.sizes()
    assert account.begun() and fixed == 64 * 64 * 4


# ------------------------------------------------------------------------------------------------- the loaders


def _config(folder, *overrides):
    return tiny_run.config(f'data.folders=["{folder}"]', "data.task=code", *overrides)


def test_the_host_loader_trains_as_the_resident_one(toy, folder, tmp_path):
    """Same batches, so the same bytes; and it waits for its input where it says so."""
    for loader in ("resident", "host"):
        loop.train(_config(folder, f"train.loader={loader}"), tmp_path / loader, quiet=True)
    resident, host = (tmp_path / loader for loader in ("resident", "host"))
    assert (host / "metrics.jsonl").read_bytes() == (resident / "metrics.jsonl").read_bytes()
    assert (host / "encoder.safetensors").read_bytes() == (resident / "encoder.safetensors").read_bytes()
    assert json.loads((host / "data.json").read_text()) == json.loads((resident / "data.json").read_text())
    for line in _lines(host / "timing.jsonl"):
        assert 0 <= line["input_wait_frac"] <= 1 and "mfu" in line


def test_auto_says_what_it_chose_and_why(folder, monkeypatch, capsys):
    cases = {"resident": (1 << 40, 1 << 40), "host": (1 << 10, 1 << 40), "stream": (1 << 10, 1 << 10)}
    for wanted, (devices, machine) in cases.items():
        monkeypatch.setattr(data, "_memory", lambda mesh, have=devices: (float(have), "on the devices"))
        monkeypatch.setattr(data, "_free_memory", lambda have=machine: float(have))
        assert data._loader(_config(folder), None, [open_folder(folder)], mesh.make(8, 1), False) == wanted
        assert f"loader {wanted}: 0.01 GiB of signals, " in capsys.readouterr().err


def test_damage_met_in_the_middle_of_an_epoch_ends_the_run_by_name(toy, folder, tmp_path):
    copy = tmp_path / "synthetic" / folder.name
    shutil.copytree(folder, copy)
    shard = max(open_folder(copy).shards("train"), key=lambda s: s.records)
    content = bytearray(shard.path.read_bytes())
    content[int(shard.index()[-1]["signal"]) + 5000] ^= 1
    shard.path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.path.name}: record at byte \d+: a checksum is wrong"):
        loop.train(_config(copy, "train.loader=host", "checkpoint.every_steps=1"), tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["loader"] == "host"
