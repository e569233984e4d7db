"""A file is whole or not there, whoever writes it at the same time."""

import fcntl
from concurrent.futures import ThreadPoolExecutor

import pytest

from ecg_jax import files
from ecg_jax.errors import MachineError


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    path, contents = tmp_path / "new" / "note.json", {str(n) * 10**n for n in range(5)}
    with ThreadPoolExecutor(5) as pool:
        for _ in range(20):
            list(pool.map(lambda content: files.write(path, content), contents))
            assert path.read_text() in contents
    assert [found.name for found in path.parent.iterdir()] == ["note.json"]


def test_what_a_killed_writer_left_goes_and_what_another_one_is_writing_stays(tmp_path):
    for name in ("note[1].json.dead.part", "note[1].json.live.part", "other.json.dead.part"):
        (tmp_path / name).write_bytes(b"half")
    with open(tmp_path / "note[1].json.live.part") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        files.write(tmp_path / "note[1].json", b"whole")
    left = sorted(found.name for found in tmp_path.iterdir())
    assert left == ["note[1].json", "note[1].json.live.part", "other.json.dead.part"]


def test_a_disk_that_refuses_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    files.write(tmp_path / "note.json", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MachineError, match=r"cannot write .*note.json: No space left on device"):
        files.write(tmp_path / "note.json", "new")
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"]
