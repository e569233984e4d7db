"""Samples of WFDB signal files of fixed sample size, read without the `wfdb` package, which needs ten times as long.

Formats 16, 61, 160, 80, 24, 32 and 212, one sample a frame, any number of files, each read once: what is hashed is what
is decoded. Also the checks that every way of reading shares: sizes, checksums, units. Invariant: no array is larger
than the file it comes from makes it, and all numbers are those that the package gives, to the last bit.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.records.leads import canonical
from ecg_jax.records.readers.reading import MILLIVOLT, Unit
from ecg_jax.records.readers.wfdb_header import SAMPLE_BYTES, Header, size_of
from ecg_jax.records.record import Refused

# The value of each format that says "no sample here".
INVALID = {
    "80": -(2**7), "212": -(2**11), "16": -(2**15), "61": -(2**15), "160": -(2**15), "24": -(2**23), "32": -(2**31)
}  # fmt: skip
_ROWS = 64  # frames added up at once by `sums`
_CHUNK = 1 << 20


def read_digital(path: Path, header: Header, digest: Any) -> list[tuple[list[int], np.ndarray]]:
    """Samples of the record `path` (without suffix): for each signal file (numbers of its signals, int [T, n]).

    `header` as `wfdb_header.parse` returns it, its length settled (`settle_length`). Each file's bytes are given to
    `digest.update`. Refuses with missing-signal-file, truncated, unreadable-signal.
    """
    out = []
    for file, where in by_file(header).items():
        first = header.signals[where[0]]
        need = size_of(first.format, header.length * len(where))
        check_size(path, file, first.offset + need, header.length)
        try:
            with (path.parent / file).open("rb") as stream:
                digest.update(prolog := _take(stream, first.offset))
                digest.update(data := _take(stream, need))
                while rest := stream.read(_CHUNK):
                    digest.update(rest)
        except OSError as error:
            raise Refused("unreadable-signal", f"{path.parent / file}: {error.strerror or error}") from None
        if len(prolog) + len(data) != first.offset + need:  # cut off between the check and the reading
            raise Refused("truncated", f"{path.parent / file} became shorter while it was read")
        samples = _decode(data, first.format, header.length * len(where))
        out.append((where, samples.reshape(header.length, len(where))))
    return out


def by_file(header: Header) -> dict[str, list[int]]:
    """File name -> numbers of its signals, both in the header's order."""
    files: dict[str, list[int]] = {}
    for i, signal in enumerate(header.signals):
        files.setdefault(signal.file, []).append(i)
    return files


def disagreement(header: Header) -> str | None:
    """What makes it doubtful where the samples of a file begin or which signal they are; None where nothing does."""
    for file, where in by_file(header).items():
        if where[-1] - where[0] >= len(where):
            return f"the signals of {file[:80]} do not stand together"
        if len({(header.signals[i].format, header.signals[i].offset) for i in where}) > 1:
            return f"{file[:80]} has two formats, or two places to begin at"
    return None


def settle_length(path: Path, header: Header) -> Header:
    """`header` with its length: where it has none, as many frames as its first signal file holds."""
    if header.length is not None:
        return header
    (file, where), *_ = by_file(header).items()
    first = header.signals[where[0]]
    if first.format not in SAMPLE_BYTES:
        raise Refused("unreadable-header", f"{path}.hea: no number of samples, and format {first.format} does not tell")
    have = file_size(path, file) - first.offset
    size, samples = SAMPLE_BYTES[first.format]
    length = have * samples // (size * sum(header.signals[i].frame for i in where))
    if length < 1:
        raise Refused("truncated", f"{path.parent / file} holds no sample, and {path.name}.hea says of no number")
    return header._replace(length=length)


def file_size(path: Path, file: str) -> int:
    """Bytes of the signal file `file` that the header of `path` names; refuses with missing-signal-file."""
    whole = path.parent / file
    try:
        if whole.is_file():
            return whole.stat().st_size
    except OSError:  # a name too long for the file system
        pass
    raise Refused("missing-signal-file", f"there is no {str(whole)[-200:]}, which {path.name}.hea names")


def check_size(path: Path, file: str, need: int, length: int) -> None:
    """Refuse ("truncated", "missing-signal-file") where `file` has less than the `need` bytes of `length` frames."""
    have = file_size(path, file)
    if have < need:
        part = max(0, int(length * have / need))
        raise Refused(
            "truncated",
            f"{path.parent / file} holds {have} of the {need} bytes that {path.name}.hea promises "
            f"(about {part} of {length} samples)",
        )


def check_sums(path: Path, header: Header, found: list[int], strict: bool = False) -> None:
    """Compare the header's checksums with `found`, those of the samples; refuses with checksum-mismatch.

    Some writers leave the fields at zero throughout, which promises nothing; but a first sample of zero in every signal
    as well is no accident. `strict` takes even that for a promise.
    """
    if not strict and not any(signal.checksum or signal.initial for signal in header.signals):
        return
    for signal, total in zip(header.signals, found, strict=True):
        if signal.checksum is None or signal.skew:
            continue
        if total != signal.checksum % 65536:
            raise Refused(
                "checksum-mismatch",
                f"{path}.hea: checksum {signal.checksum % 65536} of lead {signal.name[:40]}, its samples give {total}",
            )


def sums(samples: np.ndarray) -> list[int]:
    """Sums of the columns of int [T, n], modulo 65536."""
    short = samples.astype(np.int16, copy=False)  # what is cut off are multiples of 65536
    length, n = short.shape
    whole = length - length % _ROWS
    wide = short[:whole].reshape(-1, _ROWS * n).sum(axis=0, dtype=np.int16).reshape(_ROWS, n)
    total = wide.sum(axis=0, dtype=np.int16) + short[whole:].sum(axis=0, dtype=np.int16)
    return (total.astype(np.int64) % 65536).tolist()


def physical(header: Header, digital: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Digital samples -> float64 [T, n] in the unit of each signal, NaN where the file says that there is no sample."""
    if len(digital) == 1:
        return _physical(header, *digital[0])
    out = np.empty((header.length, len(header.signals)))
    for where, samples in digital:
        out[:, where] = _physical(header, where, samples)
    return out


def steps(header: Header, digital: list[tuple[list[int], np.ndarray]], step: float) -> np.ndarray:
    """Digital samples -> float64 [T, n], one digital step being `step`, gains and baselines ignored; NaN as above."""
    plain = [signal._replace(gain=1.0, baseline=0) for signal in header.signals]
    return physical(header._replace(signals=tuple(plain)), digital) * step


def scales(path: Path, header: Header, unit: Unit) -> np.ndarray:
    """Factor of each signal to millivolt (1 where `unit` is "z"); refuses with unknown-unit.

    A signal that is none of the twelve leads may have any unit: it is dropped later.
    """
    factors = np.ones(len(header.signals))
    for i, signal in enumerate(header.signals if unit == "mV" else ()):
        factor = MILLIVOLT.get(signal.unit.casefold())
        if factor is not None:
            factors[i] = factor
        elif canonical(signal.name):
            raise Refused(
                "unknown-unit",
                f"{path}.hea: unit {signal.unit[:40]!r} of lead {signal.name[:40]} is no voltage "
                "(unit-less set? then unit=z)",
            )
    return factors


def _physical(header: Header, where: list[int], samples: np.ndarray) -> np.ndarray:
    chosen = [header.signals[i] for i in where]
    gain, baseline = {s.gain for s in chosen}, {s.baseline for s in chosen}
    out = samples.astype(np.float64)
    if baseline != {0}:
        out -= baseline.pop() if len(baseline) == 1 else np.array([float(s.baseline) for s in chosen])
    if gain != {1.0}:
        out /= gain.pop() if len(gain) == 1 else np.array([s.gain for s in chosen])
    invalid = samples == INVALID[chosen[0].format]
    if invalid.any():
        out[invalid] = np.nan
    return out


def _take(stream: Any, count: int) -> bytes:
    return stream.read(count) if count else b""


def _decode(data: bytes, fmt: str, count: int) -> np.ndarray:
    """The first `count` samples (native integers) of `data`, which holds them."""
    if fmt == "16":
        return np.frombuffer(data, "<i2", count).astype(np.int16, copy=False)
    if fmt == "61":
        return np.frombuffer(data, ">i2", count).astype(np.int16)
    if fmt == "160":  # offset binary
        return (np.frombuffer(data, "<u2", count).astype(np.uint16) ^ np.uint16(1 << 15)).view(np.int16)
    if fmt == "80":
        return (np.frombuffer(data, np.uint8, count) ^ np.uint8(1 << 7)).view(np.int8)
    if fmt == "32":
        return np.frombuffer(data, "<i4", count).astype(np.int32, copy=False)
    if fmt == "24":
        wide = np.zeros((count, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8, 3 * count).reshape(count, 3)
        return wide.reshape(-1).view("<i4").astype(np.int32, copy=False) >> 8  # the sign comes along
    # 212: two samples of 12 bits in three bytes, the middle one holding the high parts of both; the last may be alone.
    triples = np.frombuffer(data + b"\0" * (-len(data) % 3), np.uint8).reshape(-1, 3).astype(np.uint16)
    out = np.empty((len(triples), 2), np.uint16)
    out[:, 0] = triples[:, 0] | triples[:, 1] << 8
    out[:, 1] = triples[:, 2] | (triples[:, 1] & 0xF0) << 4
    return ((out << 4).view(np.int16) >> 4).reshape(-1)[:count]
