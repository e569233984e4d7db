"""`ecg-jax convert` as it is met: killed outright at any moment, on a disk that fills up, or on one that cannot be
written."""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from read_back import contents

from ecg_jax import cli

FOLDER = Path("synthetic") / "1.0.0"
KILLS = int(os.environ.get("ECG_JAX_KILLS", "3"))
RECORDS, SHARDS = 240, 24
FINISH = ("quarantine.jsonl", "signatures.npy", "overlaps.jsonl", "features.json", "dataset_info.json")


def words(out: Path, *more: str, workers: int = 1) -> list[str]:
    given = ["--out", str(out), "--option", f"records={RECORDS}", "--workers", str(workers), *more]
    return ["convert", "synthetic", *given]


def start(out: Path, *more: str) -> subprocess.Popen:
    """The command with two workers, in a process group of its own."""
    # Where the tests themselves run in the background of a script, Ctrl-C is ignored, and would be inherited so.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}; from ecg_jax.cli import main; sys.exit(main())"]
    command += words(out, *more, workers=2)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run(out: Path, *more: str, workers: int = 1) -> tuple[int, str, str]:
    """The command in this process: (exit code, stdout, stderr)."""
    answer, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(errors):
        code = cli.main(words(out, *more, workers=workers))
    return code, answer.getvalue(), told(errors.getvalue())


def told(errors: str) -> str:
    """stderr without the progress that a slow machine has time to print."""
    return "".join(line for line in errors.splitlines(keepends=True) if not re.match(r"[a-z ]+: \d+/\d+ ", line))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Converted by one uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    code, _, errors = run(out)
    assert (code, errors) == (0, "")
    assert written(out / FOLDER) == SHARDS
    return out / FOLDER


def written(folder: Path) -> int:
    return len(list((folder / ".convert").glob("*tfrecord*.json")))


def reached(folder: Path, phase: "int | str") -> bool:
    if isinstance(phase, int):
        return written(folder) >= phase
    return written(folder) == SHARDS and (folder / phase).exists()


def test_killed_at_any_moment_and_run_again_it_is_the_same_to_the_byte(whole, tmp_path):
    # Moments are chosen by what has been written, so that kills meet the shards and the finish on any machine. In each
    # round the folder is at some earlier point already: every other round loses shards again to have work left.
    rng = random.Random(os.environ.get("ECG_JAX_KILL_SEED", "1"))
    folder = tmp_path / FOLDER
    phases = [rng.randint(1, SHARDS - 2), FINISH[rng.randrange(len(FINISH))]]
    phases += [rng.choice([0, *range(SHARDS), *FINISH, *FINISH, *FINISH]) for _ in range(KILLS)]
    killed = 0
    for number, phase in enumerate(phases[:KILLS]):
        if folder.exists() and (isinstance(phase, str) or written(folder) > phase):
            (folder / "card.json").unlink(missing_ok=True)  # as after a kill just before it
            for name in FINISH:
                if name == phase:
                    (folder / name).unlink(missing_ok=True)
            for shard in sorted(folder.glob("*.tfrecord-?????-of-?????")):
                if isinstance(phase, int) and written(folder) > phase:
                    shard.unlink()
                    (folder / ".convert" / f"{shard.name}.json").unlink(missing_ok=True)
        process = start(tmp_path)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not reached(folder, phase):
            time.sleep(0.001)
        time.sleep(rng.choice([0, 0.001, 0.01, 0.05]))
        if process.poll() is None:
            killed += 1
        if number % 3 == 2:
            process.kill()  # the command alone: its workers must not outlive it
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert ended(process.pid)
        assert not (folder / "card.json").exists() or written(folder) == SHARDS
    assert killed >= KILLS // 2
    code, answer, errors = run(tmp_path)
    assert (code, errors) == (0, "") and "synthetic 1.0.0" in answer
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("when", ["workers start", "workers write"])
def test_interrupted_by_the_user_it_says_so_and_nothing_more(tmp_path, when):
    process = start(tmp_path)
    while process.poll() is None and not (
        written(tmp_path / FOLDER) if when == "workers write" else len(_members(process.pid)) > 3
    ):
        time.sleep(0.001)
    assert len(_members(process.pid)) >= 3  # the command and two workers, and what multiprocessing adds
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, told(errors)) == (130, "ecg-jax: error: interrupted\n")
    assert ended(process.pid)
    assert written(tmp_path / FOLDER) < SHARDS and not (tmp_path / FOLDER / "card.json").exists()


def ended(group: int) -> bool:
    """Whether the process group is gone, soon."""
    deadline = time.monotonic() + 20
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left := _members(group):
        os.killpg(group, signal.SIGKILL)
    return not left


def _members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(entry.name))
    return found


# ------------------------------------------------------------------------------------------------------- the disk


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def shards_are_whole(folder: Path, whole: Path) -> int:
    """How many shards are there, each of them to the byte, and nothing half-written beside them."""
    names = {p.name for p in folder.glob("*.tfrecord-?????-of-?????")}
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not list(folder.rglob("*.tmp")) and not (folder / "card.json").exists()
    return len(names)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(whole, tmp_path, workers):
    size = sum(len(data) for data in contents(whole).values())
    with small_disk(tmp_path / "disk", str(size * 2)) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(size * 2 - size // 2 & ~0xFFF))
        code, answer, errors = run(disk / "out", workers=workers)
        assert (code, answer, errors.count("\n")) == (5, "", 1)
        assert errors.startswith("ecg-jax: error: cannot write ") and "No space left on device; free some" in errors
        kept = shards_are_whole(disk / "out" / FOLDER, whole)
        assert 0 < kept < SHARDS and kept - workers <= written(disk / "out" / FOLDER) <= kept
        filler.unlink()
        kept = written(disk / "out" / FOLDER)
        code, answer, errors = run(disk / "out", "--json")
        assert (code, errors) == (0, "") and f'"shards_kept": {kept}' in answer
        assert contents(disk / "out" / FOLDER) == contents(whole)


def test_a_disk_that_is_full_at_the_end_leaves_every_shard(whole, tmp_path):
    last = (*FINISH, "card.json")
    size = sum(len(data) for data in contents(whole).values())
    with small_disk(tmp_path / "disk", str(size * 2)) as disk:
        folder = disk / "out" / FOLDER
        for number in range(len(last)):  # the files from here on are not there yet
            shutil.rmtree(disk / "out", ignore_errors=True)
            shutil.copytree(whole, folder)
            for name in last[number:]:
                (folder / name).unlink()
            _fill(disk / "filler")
            code, answer, errors = run(disk / "out")
            (disk / "filler").unlink()
            assert (code, answer, errors.count("\n")) == (5, "", 1), last[number]
            assert "No space left on device; free some space" in errors
            assert shards_are_whole(folder, whole) == SHARDS == written(folder)
            for left in set(FINISH) & {p.name for p in folder.iterdir()}:
                assert (folder / left).read_bytes() == (whole / left).read_bytes()
        assert run(disk / "out")[0] == 0
        assert contents(folder) == contents(whole)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_target_that_cannot_be_written_is_one_line(whole, tmp_path):
    with small_disk(tmp_path / "disk", "20m") as disk:
        shutil.copytree(whole, disk / "begun" / FOLDER)
        (disk / "begun" / FOLDER / "card.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = contents(disk)
        for out in (disk / "new", disk / "begun"):
            code, answer, errors = run(out)
            assert (code, answer, errors.count("\n")) == (5, "", 1)
            assert "Read-only file system; choose an --out that can be written" in errors
        assert contents(disk) == before


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, _, errors = run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, errors.count("\n")) == (5, 1)
    assert "File too large; raise the limit on the size of files" in errors
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("card.json"))
