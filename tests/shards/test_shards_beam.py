"""The Beam runner writes what the local one writes, goes on where it stopped, and fails in one line."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import tiny_source
from read_back import contents

from ecg_jax import cli
from ecg_jax.datasets import DATASETS, DatasetEntry
from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.shards import resume
from ecg_jax.shards.convert import convert


@pytest.fixture(scope="module")
def beam():
    pytest.importorskip("apache_beam")
    from ecg_jax.shards import beam

    return beam


def test_the_same_bytes_and_only_the_missing_shards(beam, folder, tmp_path, monkeypatch):
    card = convert(tiny_source.standard(), tmp_path, runner="beam")
    path = Path(card["path"])
    assert card["report"] == {"shards_written": 24, "shards_kept": 0}
    assert contents(path) == contents(folder)
    (path / card["files"][3]["file"]).unlink()
    seen = []
    original = beam.write_shard
    monkeypatch.setattr(beam, "write_shard", lambda job, plan: seen.append(plan.number) or original(job, plan))
    again = convert(tiny_source.standard(), tmp_path, runner="beam", beam_options=["runner=DirectRunner"])
    assert again["report"] == {"shards_written": 1, "shards_kept": 23}
    assert seen == [3]
    assert contents(path) == contents(folder)


def test_a_refusal_under_strict_is_the_same_line(beam, tmp_path):
    source = tiny_source.source(40, change={9: {"refuse": "not-good"}})
    with pytest.raises(DataError) as local:
        convert(source, tmp_path / "local", strict=True)
    with pytest.raises(DataError) as error:
        convert(source, tmp_path / "beam", strict=True, runner="beam")
    assert str(error.value) == str(local.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("note_too", [False, True])
def test_a_failing_disk_is_one_line_and_keeps_what_is_there(beam, tmp_path, monkeypatch, note_too):
    whole = Path(convert(tiny_source.source(40), tmp_path / "whole")["path"])
    calls = 0
    original = os.fsync

    def failing(fd):
        nonlocal calls
        calls += 1
        if calls > 30:  # the plan, GO and 24 tasks take 10, a shard 4
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd)

    def unable(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", failing)
    if note_too:  # not even the note can be written: the error comes through Beam's own account
        monkeypatch.setattr(beam, "_note", unable)
    with pytest.raises(MachineError, match=r"^cannot write \S+: No space left on device; free some space") as error:
        convert(tiny_source.source(40), tmp_path / "full", runner="beam")
    assert "\n" not in str(error.value) and "while running" not in str(error.value)
    monkeypatch.undo()
    left = contents(tmp_path / "full")
    assert left and not [name for name in left if name.endswith((".tmp", "card.json"))]
    card = convert(tiny_source.source(40), tmp_path / "full", runner="beam")
    assert 0 < card["report"]["shards_kept"] < 24
    assert contents(Path(card["path"])) == contents(whole)


def test_errors_of_the_system_keep_their_kind(beam, tmp_path):
    state = tmp_path
    for error in (
        OSError(errno.EIO, "I/O error", "/a/b"),
        MemoryError("x"),
        DataError("y" * 9000),
        DataError("ä" * 9000),
    ):
        beam.write_atomic(beam._task(state, "s"), [bytes(beam.NOTE), b"task"])
        assert beam._noted(state, "s") is None
        beam._note(state, "s", error)
        back = beam._noted(state, "s")
        assert type(back) is type(error) and str(back)[:20] == str(error)[:20]
        assert beam._task(state, "s").read_bytes()[beam.NOTE :] == b"task"


def test_a_bug_of_ours_is_not_taken_for_a_failing_machine(beam, tmp_path, monkeypatch):
    def broken(job, plan):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(beam, "write_shard", broken)
    with pytest.raises(RuntimeError, match=r"in a Beam worker:(?s:.*)ZeroDivisionError: ours"):
        convert(tiny_source.source(10), tmp_path, runner="beam")


def test_a_runner_that_cannot_be_had_is_a_failing_machine(beam, tmp_path):
    with pytest.raises(MachineError, match="the Beam pipeline failed"):
        options = ["runner=PortableRunner", "job_endpoint=localhost:1", "job_server_timeout=1"]
        convert(tiny_source.source(10), tmp_path, runner="beam", beam_options=options)
    assert convert(tiny_source.source(10), tmp_path)["report"]["shards_kept"] == 0


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["runner"], "write it as NAME=VALUE"),
        (["=x"], "write it as NAME=VALUE"),
        (["runner=NoSuchRunner"], "NoSuchRunner"),
        (["direct_num_workers=many"], "many"),
    ],
)
def test_options_that_beam_does_not_take(beam, tmp_path, pairs, said, capfd):
    with pytest.raises(UsageError, match="--beam-option") as error:
        convert(tiny_source.source(10), tmp_path / "out", runner="beam", beam_options=pairs)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""


def test_options_reach_the_pipeline(beam):
    made = beam.pipeline_options(["direct_num_workers=3", "streaming=true", "experiments=a", "experiments=b"])
    found = made.get_all_options()
    assert (found["direct_num_workers"], found["streaming"], found["experiments"]) == (3, True, ["a", "b"])


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "ecg_jax.shards.beam", raising=False)
    monkeypatch.delattr("ecg_jax.shards.beam", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'ecg-jax\[beam\]'"):
        convert(tiny_source.source(10), tmp_path / "out", runner="beam")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(beam, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("tiny:open", "tests"))
    monkeypatch.setattr("ecg_jax.datasets.open_source", lambda name, source, options: tiny_source.source(30))
    words = ["convert", "tiny", "--source", str(tmp_path), "--out", str(tmp_path), "--json"]
    assert cli.main([*words, "--runner", "beam", "--beam-option", "runner=DirectRunner"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["shards_written"] == 16
    assert cli.main([*words, "--runner", "local"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == {"shards_written": 0, "shards_kept": 16}
    assert resume.finished(tmp_path / "tiny" / "1.2.3")
