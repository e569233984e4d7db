"""Stopping and going on: killed, told to stop, or with a damaged checkpoint, a run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from ecg_jax.errors import DataError, InterruptedRun
from ecg_jax.training import loop, metrics

PLATEAU = (
    "recipe.kind=plateau",
    "recipe.steps=0",
    "recipe.max_epochs=60",
    "recipe.eval_every=5",
    "recipe.patience=2",
    "recipe.min_epochs=1",
    "optim.lr=0.3",
    "train.log_every=3",
)


@pytest.fixture
def toy(monkeypatch):
    """The toy objective in place of the supervised one."""
    monkeypatch.setattr(loop.objectives, "make", lambda config, n, _: tiny_run.Toy(config.model.crop, n))


def _resumed(run):
    """Updates after which the run was gone on with."""
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return [line["update"] for line in lines if "resumed" in line]


def _stop_at(monkeypatch, update):
    """Send ourselves SIGTERM while dispatch `update` is being prepared."""
    take, count = loop.ResidentFeed.take, iter(range(10**6))

    def stopping(self, *args):
        if next(count) == update - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    monkeypatch.setattr(loop.ResidentFeed, "take", stopping)


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bytes(toy, tables, tmp_path, monkeypatch, capfd):
    """Stopped in the trunk, with an evaluation unread, and in the decay; each stop a real resume."""
    config = tiny_run.config(*PLATEAU)
    whole = loop.train(config, tmp_path / "whole", tables=tables, quiet=True)
    updates, start = whole["updates"], whole["updates"] - 3
    stops = []
    for at in (7, 10, 17, start):
        with monkeypatch.context() as patch:
            _stop_at(patch, at - (stops[-1] if stops else 0))
            with pytest.raises(InterruptedRun, match="SIGTERM"):
                loop.train(config, tmp_path / "cut", tables=tables, quiet=True)
        summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        stops.append(summary["updates"])
    assert stops == [7, 11, 17, start], "not between an evaluation (after 10) and its reading"
    cut = loop.train(config, tmp_path / "cut", tables=tables, quiet=True)
    assert _resumed(tmp_path / "cut") == stops and cut["resumes"] == 4
    for name in ("metrics.jsonl", "encoder.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert (cut["losses"], cut["updates"], cut["status"]) == (whole["losses"], updates, whole["status"])
    assert "SIGTERM: saving and stopping" in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_latest_checkpoint_is_named_and_the_one_before_used(toy, tables, tmp_path, monkeypatch, capsys, damage):
    config = tiny_run.config("checkpoint.every_steps=6")
    loop.train(config, tmp_path / "whole", tables=tables, quiet=True)
    run = tmp_path / "cut"
    with monkeypatch.context() as patch:
        _stop_at(patch, 15)
        with pytest.raises(InterruptedRun):
            loop.train(config, run, tables=tables, quiet=True)
    names = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert names == [12, 15], "two are kept"
    _damage(run / "checkpoints" / "15", damage)
    capsys.readouterr()
    loop.train(config, run, tables=tables, quiet=True)
    assert f"{run / 'checkpoints' / '15'} is damaged" in capsys.readouterr().err
    assert _resumed(run) == [12]
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_no_readable_checkpoint_is_an_error(toy, tables, tmp_path, monkeypatch):
    config = tiny_run.config()
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(InterruptedRun):
            loop.train(config, tmp_path / "run", tables=tables, quiet=True)
    _damage(tmp_path / "run" / "checkpoints" / "5", "truncate")
    with pytest.raises(DataError, match="can be read; delete the run folder"):
        loop.train(config, tmp_path / "run", tables=tables, quiet=True)


def test_a_log_that_was_cut_back_ends_where_it_was_cut(tmp_path):
    """Whoever saves before the next line is written remembers that place, not the old end."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" * 3)
    log = metrics.Log(path, 3)
    assert log.offset() == 3
    log.write({})
    log.close()
    assert path.read_bytes() == b"{}\n" * 2


def _damage(checkpoint: Path, how: str) -> None:
    data = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    if how == "remove":
        data.unlink()
        return
    if how == "truncate":
        content = content[:10]
    else:
        content[len(content) // 2] ^= 16
    data.write_bytes(content)


def test_kill_9_in_mid_epoch_and_the_same_command_again(toy, tables, tmp_path):
    """A real process, killed without warning after its second checkpoint; started again it goes on from a
    checkpoint and leaves the log of a run that was never killed."""
    overrides = ("recipe.steps=60", "checkpoint.every_steps=3", "train.log_every=1", "recipe.eval_every=10")
    whole = loop.train(tiny_run.config(*overrides), tmp_path / "whole", tables=tables, quiet=True)
    run = tmp_path / "cut"
    command = [sys.executable, str(Path(tiny_run.__file__)), str(run), *overrides]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        done = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
        if len(done) >= 2:
            process.kill()
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, "killed while it trained"
    written = (run / "metrics.jsonl").read_bytes().splitlines()
    assert 6 < len(written) < 66 and not (run / "summary.json").exists()

    cut = loop.train(tiny_run.config(*overrides), run, tables=tables, quiet=True)
    (update,) = _resumed(run)
    assert update >= 6 and update % 3 == 0 and cut["resumes"] == 1
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert cut["losses"] == whole["losses"]
