"""Archives: what is listed and copied, what a kill leaves, and how processes share a cache."""

import gzip
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import archive
from ecg_jax.errors import MachineError, UsageError


def pack(path: Path, members: list[tuple[str, bytes]], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sort(name: str) -> str | None:
    return archive.KEEP if name.endswith(".hea") else "a signal" if name.endswith(".mat") else None


def content(index: archive.Index) -> dict[str, bytes]:
    descriptor = os.open(index.tar, os.O_RDONLY)
    try:
        names = [name.decode() for name in index.names.tolist()]
        return {name: archive.read_member(descriptor, index.find(name)) for name in names}
    finally:
        os.close(descriptor)


MEMBERS = [
    ("S0/b.hea", b"old"),
    ("S0/a.hea", b"A" * 700),
    ("S0/a.mat", b"1" * 5000),
    ("S0/readme", b"x"),
    ("S0/b.hea", b"B"),
    ("S0/empty.hea", b""),
]
EXPECTED = {"a.hea": b"A" * 700, "b.hea": b"B", "empty.hea": b""}


@pytest.mark.parametrize(
    ("name", "mode"), [("S0.tar.gz", "w:gz"), ("S0.tgz", "w:gz"), ("S0.tar", "w"), ("S1.tar.gz", "w")]
)
def test_wanted_members_are_found(tmp_path, name, mode):
    path, cache = pack(tmp_path / name, MEMBERS, mode), tmp_path / "cache" / "deep"
    assert archive.load(path, cache, "k") is None
    archive.prepare([path], cache, sort, "k")
    index = archive.load(path, cache, "k")
    assert content(index) == EXPECTED
    assert index.left_out == {"a signal": 1} and index.error is None
    assert index.find("c.hea") is None and index.find("a.he") is None and index.find("a.mat") is None
    assert (index.tar == path) == (mode == "w")
    if mode == "w:gz":  # the copy is a tar like any other, without what is not wanted
        with tarfile.open(index.tar) as copy:
            assert [member.name for member in copy] == ["b.hea", "a.hea", "b.hea", "empty.hea"]
    assert sorted(p.name for p in cache.iterdir() if p.name.endswith(".part")) == []


def test_links_and_strange_members(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.hea")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../up.hea", "\u00e4.hea", "n" * 120 + ".hea"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
    archive.prepare([path], tmp_path / "cache", sort, "k")
    index = archive.load(path, tmp_path / "cache", "k")
    assert content(index) == {"up.hea": b"ok"} and index.left_out == {"file beyond 64 MiB": 2}


def test_another_archive_or_other_members_are_built_anew(tmp_path):
    path, cache = pack(tmp_path / "S0.tar.gz", MEMBERS), tmp_path / "cache"
    archive.prepare([path], cache, sort, "k")
    before = (cache / "S0.index.npz").stat().st_mtime_ns
    archive.prepare([path], cache, sort, "k")
    assert (cache / "S0.index.npz").stat().st_mtime_ns == before  # nothing done
    assert archive.load(path, cache, "other key") is None
    archive.prepare([path], cache, lambda name: archive.KEEP, "all")
    assert len(archive.load(path, cache, "all").names) == 5 and archive.load(path, cache, "k") is None
    pack(path, [("c.hea", b"C")])
    os.utime(path, ns=(1, 1))
    assert archive.load(path, cache, "all") is None
    archive.prepare([path], cache, sort, "k")
    assert content(archive.load(path, cache, "k")) == {"c.hea": b"C"}
    (cache / "S0.tar").write_bytes(b"")  # as a disk that lost it
    assert archive.load(path, cache, "k") is None


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -9, -1])
def test_a_damaged_archive_is_reported_and_not_used(tmp_path, cut):
    noise = np.random.default_rng(0).bytes(3000)
    path = pack(tmp_path / "S0.tar.gz", [("a.hea", noise), ("b.hea", noise[::-1])])
    path.write_bytes(path.read_bytes()[:cut])
    archive.prepare([path], tmp_path / "cache", sort, "k")
    index = archive.load(path, tmp_path / "cache", "k")
    assert "cannot be read to its end" in index.error and len(index.names) == 0
    assert not list((tmp_path / "cache").glob("*.tar*"))
    pack(path, MEMBERS)  # downloaded again
    archive.prepare([path], tmp_path / "cache", sort, "k")
    assert content(archive.load(path, tmp_path / "cache", "k")) == EXPECTED


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "S0.tar.gz"
    plain = pack(tmp_path / "x.tar", [("a.hea", bytes(4000))], "w").read_bytes()
    whole = bytearray(gzip.compress(plain, 0))  # stored, so that a flipped bit is one of a member
    whole[2000] ^= 1
    path.write_bytes(whole)
    archive.prepare([path], tmp_path / "cache", sort, "k")
    assert archive.load(path, tmp_path / "cache", "k").error


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=1200), packed=st.booleans(), at=st.integers(0, 3000), flip=st.integers(0, 255))
def test_any_bytes(data, packed, at, flip):
    with tempfile.TemporaryDirectory() as name:  # a fresh one each time: the cache knows archives by size and time
        folder = Path(name)
        whole = bytearray(pack(folder / "x.tar", MEMBERS, "w").read_bytes())
        whole[at : at + len(data) // 8] = data[: len(data) // 8]
        whole[at] ^= flip
        path = folder / "S0.tar"
        path.write_bytes(gzip.compress(whole, 1) if packed else data if at % 2 else bytes(whole))
        archive.prepare([path], folder / "cache", sort, "k")
        index = archive.load(path, folder / "cache", "k")
        if index is not None and len(index.names):  # without members nothing is copied
            assert all(len(found) <= 20_000 for found in content(index).values())


def test_any_index(tmp_path):
    path, cache = pack(tmp_path / "S0.tar.gz", MEMBERS), tmp_path / "cache"
    archive.prepare([path], cache, sort, "k")
    whole = (cache / "S0.index.npz").read_bytes()
    for cut in range(0, len(whole), 97):
        (cache / "S0.index.npz").write_bytes(whole[:cut])
        assert archive.load(path, cache, "k") is None
    archive.prepare([path], cache, sort, "k")
    assert content(archive.load(path, cache, "k")) == EXPECTED


def slow_sort(name: str) -> str | None:
    time.sleep(0.02)
    return sort(name)


def worker(paths: list[Path], cache: Path, log) -> None:
    built = archive._build

    def logged(path: Path, *rest, **more) -> None:
        log.put((os.getpid(), path.name))
        built(path, *rest, **more)

    archive._build = logged
    archive.prepare(paths, cache, slow_sort, "k")
    log.put((os.getpid(), all(archive.load(path, cache, "k") for path in paths)))


def test_processes_share_the_work_and_a_kill_loses_only_what_was_in_hand(tmp_path):
    paths = [pack(tmp_path / f"S{i}.tar.gz", [(f"{j}.hea", b"x" * j) for j in range(12)]) for i in range(6)]
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    log = context.Queue()
    victim = context.Process(target=worker, args=(paths, cache, log))
    victim.start()
    log.get(timeout=20)  # it has begun one
    time.sleep(0.1)
    victim.kill()
    victim.join()
    done = [path for path in paths if archive.load(path, cache, "k")]
    assert len(done) < 6 and list(cache.glob("*.part"))
    for path in set(paths) - set(done):
        assert not (cache / f"{archive.stem(path)}.index.npz").exists()
    pool = [context.Process(target=worker, args=(paths, cache, log)) for _ in range(2)]
    for process in pool:
        process.start()
    events = []
    while sum(1 for _, what in events if what is True) < 2:
        events.append(log.get(timeout=20))
    for process in pool:
        process.join()
    built = [what for _, what in events if isinstance(what, str)]
    assert sorted(built) == sorted(path.name for path in set(paths) - set(done))  # each once, by one of them
    assert all(content(archive.load(path, cache, "k"))["11.hea"] == b"x" * 11 for path in paths)
    assert not list(cache.glob("*.part"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = pack(tmp_path / "S0.tar.gz", MEMBERS)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cache=DIR"):
        archive.check_cache(tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match="cache=DIR"):
        archive.prepare([path], tmp_path / "file" / "cache", sort, "k")
    archive.check_cache(tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a disk mounted read-only
    with pytest.raises(UsageError, match=r"not a folder that can be written; .* as cache=DIR"):
        archive.check_cache(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path, cache = pack(tmp_path / "S0.tar.gz", MEMBERS), tmp_path / "cache"

    def full(out, block):
        raise archive._Disk(OSError(28, "No space left on device"))

    monkeypatch.setattr(archive, "_put", full)
    with pytest.raises(MachineError, match=r"No space left.*free some space"):
        archive.prepare([path], cache, sort, "k")
    assert [p.name for p in cache.iterdir()] == ["S0.lock"] and archive.load(path, cache, "k") is None


def test_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(archive.fcntl, "flock", none)
    path, cache = pack(tmp_path / "S0.tar.gz", MEMBERS), tmp_path / "cache"
    cache.mkdir()
    (cache / "S0.tar.1.part").touch()  # maybe of a process that is at it
    archive.prepare([path], cache, sort, "k")
    assert content(archive.load(path, cache, "k")) == EXPECTED and (cache / "S0.tar.1.part").exists()
