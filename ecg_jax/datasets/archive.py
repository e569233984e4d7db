"""Members of tar archives by position: a list of where they lie, made once, and for a compressed archive a plain copy.

A compressed tar cannot be sought in, and every shard needs recordings of every archive. So each archive is read
through once: a plain one for the list alone, a compressed one into a plain tar that holds the wanted members only. Both
lie in a cache folder. It knows no recording: which members are wanted is told by a function. Invariants: a list exists
only when all it points at is on disk, whenever the work was killed; processes that share a cache build different
archives side by side and none twice; a list that was made from another state of the archive, or for other members, is
made anew. Of members of one name the last counts, as when unpacking.
"""

import errno
import fcntl
import glob
import gzip
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import MachineError, UsageError
from ecg_jax.progress import track

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_MEMBER = 64 << 20  # bytes; a wanted member is a header or the signals of ten seconds
KEEP = ""  # what `sort` answers for a wanted member
_VERSION = 1
_BLOCK = 1 << 20
_GZIP = b"\x1f\x8b"  # by content: browsers unpack a download and leave its name
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError, IndexError)

Sort = Callable[[str], str | None]  # file name of a member -> KEEP, why it is left out (counted), or None (no matter)


@dataclass(frozen=True)
class Index:
    """Where the wanted members of one archive lie.

    tar       the plain tar to read from: the archive itself, or its copy in the cache
    names     bytes [n], ascending; start, size int64 [n], in bytes, of each
    left_out  why a member is not among them -> how many
    error     one line, where the archive could not be read to its end (then nothing is listed)
    """

    tar: Path
    names: np.ndarray
    start: np.ndarray
    size: np.ndarray
    left_out: dict[str, int]
    error: str | None

    def find(self, name: str) -> tuple[int, int] | None:
        """(start, size) of the member `name`."""
        key = name.encode()
        at = int(np.searchsorted(self.names, key))
        if at == len(self.names) or self.names[at] != key:
            return None
        return int(self.start[at]), int(self.size[at])


def stem(archive: Path) -> str:
    """The archive's name without .tar, .tar.gz or .tgz."""
    for suffix in SUFFIXES:
        if archive.name.endswith(suffix):
            return archive.name[: -len(suffix)]
    return archive.name


def check_cache(cache: Path) -> None:
    """`UsageError` where `cache` cannot be made or written in, before hours of work. Writes nothing."""
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _no_cache(cache, "not a folder that can be written")


def prepare(archives: Sequence[Path], cache: Path, sort: Sort, key: str) -> None:
    """Make what is missing of the indexes of `archives` in `cache`; returns when all are there.

    `key` says what `sort` does: an index made under another one is made anew. Archives that another process is at are
    left to it and waited for at the end. Raises `UsageError` (naming the option cache=) where the cache cannot be
    written, `MachineError` where the disk is full. An archive that cannot be read is no error here: its index says so.
    """
    todo = [archive for archive in archives if load(archive, cache, key) is None]
    # Processes begin at different places, so that they seldom meet.
    turn = os.getpid() * 7919 % len(todo) if todo else 0
    todo = todo[turn:] + todo[:turn]
    busy = []
    for archive in _shown(todo):
        with _lock(archive, cache, wait=False) as mine:
            if mine is False:
                busy.append(archive)
            elif load(archive, cache, key) is None:
                _build(archive, cache, sort, key, alone=bool(mine))
    for archive in busy:
        with _lock(archive, cache, wait=True) as mine:
            if load(archive, cache, key) is None:  # the other one was killed
                _build(archive, cache, sort, key, alone=bool(mine))


def load(archive: Path, cache: Path, key: str) -> Index | None:
    """The index of `archive`, or None where there is none that fits the archive, the key and the copy."""
    try:
        with open(_index_path(archive, cache), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            names, start, size = arrays["names"], arrays["start"], arrays["size"]
        tar = _copy_path(archive, cache) if facts["copied"] else archive
        if facts["about"] != _about(archive, key) or not (facts["error"] or tar.stat().st_size == facts["bytes"]):
            return None
        return Index(tar, names, start, size, facts["left_out"], facts["error"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile):
        return None  # none, or a damaged one


def read_member(descriptor: int, place: tuple[int, int]) -> bytes:
    """The bytes of a member of the open tar `descriptor`; fewer where the file ends."""
    start, size = place
    return os.pread(descriptor, size, start)


# ---------------------------------------------------------------------------------------------------- the work


def _about(archive: Path, key: str) -> list[Any]:
    found = archive.stat()
    return [_VERSION, archive.name, found.st_size, found.st_mtime_ns, key]


def _index_path(archive: Path, cache: Path) -> Path:
    return cache / f"{stem(archive)}.index.npz"


def _copy_path(archive: Path, cache: Path) -> Path:
    return cache / f"{stem(archive)}.tar"


def _shown(todo: list[Path]) -> Iterator[Path]:
    # In a pool every worker would draw its own bar over the others'.
    return iter(todo) if parent_process() else track(todo, "reading archives", unit="archives")


@contextmanager
def _lock(archive: Path, cache: Path, wait: bool) -> Iterator[bool | None]:
    """Whether this process has the archive to itself (None: nobody can tell, the file system has no locks; then an
    archive may be built twice, and the last one stays). The lock goes with the process, however that ends.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f"{stem(archive)}.lock").open("w")
    except OSError as error:
        raise _cannot_write(cache, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except BlockingIOError:
            yield False
            return
        except OSError:
            locked = None
        yield locked


def _build(archive: Path, cache: Path, sort: Sort, key: str, alone: bool) -> None:
    """Write copy and index of `archive`, in that order, each whole or not at all."""
    about = _about(archive, key)
    places: dict[bytes, tuple[int, int]] = {}
    left_out: Counter[str] = Counter()
    part, failure, copied = cache / f"{stem(archive)}.tar.{os.getpid()}.part", None, False
    if alone:  # what is there is of processes that were killed
        for made in (_index_path(archive, cache), _copy_path(archive, cache)):
            for stale in cache.glob(f"{glob.escape(made.name)}.*.part"):
                _unlink(stale, cache)
    _unlink(_index_path(archive, cache), cache)  # from here on there is none, whatever the old one said
    try:
        with open(archive, "rb") as file:
            copied = file.read(2) == _GZIP
            file.seek(0)
            if copied:
                _copy(file, part, cache, sort, places, left_out)
            else:
                _list(file, sort, places, left_out)
    except _Disk as error:
        _unlink(part, cache)
        raise _cannot_write(cache, error.args[0]) from None
    except _UNREADABLE as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        failure, places = f"cannot be read to its end ({why})", {}
        _unlink(part, cache)
    if copied and failure is None:
        try:
            size = part.stat().st_size
            part.replace(_copy_path(archive, cache))
        except OSError as error:
            raise _cannot_write(cache, error) from None
    else:
        size = about[2]
    names = sorted(places)
    facts = {"about": about, "copied": copied, "bytes": size, "left_out": dict(left_out), "error": failure}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
        names=np.array(names, np.bytes_),
        start=np.array([places[name][0] for name in names], np.int64),
        size=np.array([places[name][1] for name in names], np.int64),
    )
    _write(_index_path(archive, cache), buffer.getvalue(), cache)


def _list(file: Any, sort: Sort, places: dict[bytes, tuple[int, int]], left_out: Counter[str]) -> None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member, name in _wanted(tar, sort, left_out):
            places[name.encode()] = member.offset_data, member.size


def _copy(
    file: Any, part: Path, cache: Path, sort: Sort, places: dict[bytes, tuple[int, int]], left_out: Counter[str]
) -> None:
    try:
        out = open(part, "wb")
    except OSError as error:
        raise _Disk(error) from None
    with out, gzip.open(file) as plain, tarfile.open(fileobj=plain, mode="r|", bufsize=_BLOCK) as tar:
        at = 0
        for member, name in _wanted(tar, sort, left_out):
            data = tar.extractfile(member).read()
            if len(data) != member.size:
                raise EOFError("the archive ends in a member")
            copy = tarfile.TarInfo(name)
            copy.size, copy.mtime = member.size, member.mtime
            block = copy.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
            places[name.encode()] = at + tarfile.BLOCKSIZE, member.size
            at += len(block)
            _put(out, block)
        while plain.read(_BLOCK):  # to the end, where the checksum stands
            pass
        _put(out, bytes(2 * tarfile.BLOCKSIZE))
        try:
            out.flush()
            os.fsync(out.fileno())
        except OSError as error:
            raise _Disk(error) from None


def _wanted(tar: tarfile.TarFile, sort: Sort, left_out: Counter[str]) -> Iterator[tuple[tarfile.TarInfo, str]]:
    while (member := tar.next()) is not None:
        tar.members = []  # it would keep all of them
        if not member.isreg() or member.issparse():
            continue
        name = member.name.rpartition("/")[2]
        reason = sort(name)
        if reason == KEEP and not (member.size <= MAX_MEMBER and name.isascii() and len(name) < 100):
            reason = f"file beyond {MAX_MEMBER >> 20} MiB"
        if reason == KEEP:
            yield member, name
        elif reason is not None:
            left_out[reason] += 1


class _Disk(Exception):
    """An OSError of writing, told from those of reading."""


def _put(out: Any, block: bytes) -> None:
    try:
        out.write(block)
    except OSError as error:
        raise _Disk(error) from None


def _write(path: Path, content: bytes, cache: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _cannot_write(cache, error) from None


def _unlink(path: Path, cache: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(cache, error) from None


def _no_cache(cache: Path, why: str) -> UsageError:
    return UsageError(
        f"cannot write the cache of unpacked archives {cache}: {why}; give a folder that can be written, with room for "
        "the recordings, as cache=DIR"
    )


def _cannot_write(cache: Path, error: OSError) -> UsageError | MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return MachineError(
            f"cannot write the cache of unpacked archives {cache}: {error.strerror}; free some space, or give another "
            "folder as cache=DIR; archives that are done are kept"
        )
    return _no_cache(cache, error.strerror or str(error))
