"""Files -> signals with ordered leads in one unit. WFDB so far, on the `wfdb` package.

Reads samples and says what they are; it repairs nothing and knows no labels. Invariant: whatever is wrong
with a recording's files becomes a `Refused` with one of the reasons listed at `read_wfdb`, never another
exception, and a signal that came through has every sample its header promised.
"""

import hashlib
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from ecg_jax.records.audit import Quality
from ecg_jax.records.leads import arrange, canonical
from ecg_jax.records.record import Refused

_MILLIVOLT = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
# Bits per sample of the formats whose files have a fixed size (310 and 311 pack three samples into 32 bits).
_BITS = {
    "8": 8,
    "16": 16,
    "24": 24,
    "32": 32,
    "61": 16,
    "80": 8,
    "160": 16,
    "212": 12,
    "310": 32 / 3,
    "311": 32 / 3,
}
_MULTI_SEGMENT = re.compile(r"\S+/\d+(\s|$)")


@dataclass(frozen=True)
class Reading:
    """What a file holds: signal float32 [T, 12] in the order of `LEADS` (NaN where invalid), samples per
    second, the leads that were derived, the names in the file, sha256 of header then signal files, start
    time, header comments.
    """

    signal: np.ndarray
    rate: float
    derived: tuple[str, ...]
    names: tuple[str, ...]
    source: bytes
    time: str | None
    comments: tuple[str, ...]

    @property
    def quality(self) -> int:
        """What the reader knows for `Record.quality`."""
        return int(Quality.DERIVED) if self.derived else 0

    def meta(self) -> dict[str, Any]:
        """The entries for `Record.meta`."""
        return {"leads": list(self.names), "derived": list(self.derived)}


def read_wfdb(path: Path, unit: Literal["mV", "z"] = "mV", checksums: bool = True) -> Reading:
    """Read the WFDB record whose header is `path` + ".hea" (`path` without the suffix).

    unit: "mV" converts V, mV, uV and nV (in any case); "z" takes the numbers as they are. checksums: compare
    the header's checksums with the samples (a header of zeros alone promises nothing). Refuses with:
    missing-file (no header), unreadable-header, missing-signal-file, truncated, unreadable-signal,
    checksum-mismatch, unknown-unit, no-signals, mixed-rates, missing-lead, duplicate-lead.
    """
    header = Path(f"{path}.hea")
    try:
        text = header.read_bytes()
    except FileNotFoundError:
        raise Refused("missing-file", f"there is no {header}") from None
    except OSError as error:
        raise Refused("unreadable-header", f"{header}: {error.strerror or error}") from None
    lines = _lines(text)
    multi = bool(lines and _MULTI_SEGMENT.match(lines[0]))
    record, channels = _read(path, lines, multi)
    if not record.n_sig or not record.sig_name:
        raise Refused("no-signals", f"{header} describes no signals")
    names = tuple(str(name) for name in record.sig_name)
    if multi:
        rate = float(record.fs)
    else:
        _check_size(path, record)
        if checksums:
            _check_sums(header, record, names)
        channels, rate = _align(header, record, names, channels)
    scale = [1.0] * len(names) if unit == "z" else _scales(header, record, names, [] if multi else lines)
    physical = np.stack([channel * factor for channel, factor in zip(channels, scale, strict=True)], axis=1)
    signal, derived = arrange(physical, names)
    if derived and unit == "z":
        lost = ", ".join(sorted(derived))
        raise Refused("missing-lead", f"{header}: no {lost}, which cannot be derived from unit-less leads")
    when = record.base_datetime
    return Reading(
        signal=signal,
        rate=rate,
        derived=tuple(sorted(derived)),
        names=names,
        source=_digest(path, text, lines, record, multi),
        time=when.isoformat(sep=" ") if when else None,
        comments=tuple(record.comments or ()),
    )


def _lines(text: bytes) -> list[str]:
    """Header lines without comments and blank ones, as `wfdb` counts them, but without loss of non-ASCII
    letters.
    """
    try:
        whole = text.decode("utf-8")
    except UnicodeDecodeError:
        whole = text.decode("latin-1")
    lines = (line.split("#", 1)[0].strip() for line in whole.splitlines())
    return [line for line in lines if line]


@cache
def _wfdb() -> ModuleType:
    """The package: a second to import, so not before a file is read; what it does on import, newer pandas
    warns of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wfdb
    return wfdb


def _read(path: Path, lines: list[str], multi: bool) -> tuple[Any, list[np.ndarray]]:
    """wfdb's record, and its physical channels, each at its own rate."""
    wfdb = _wfdb()
    try:
        if multi:  # segments of different gain have only physical values in common
            record = wfdb.rdrecord(str(path), physical=True)
            return record, list(record.p_signal.T)
        if any(line.split()[1:2] == ["61"] for line in lines[1:]):
            # wfdb 4.3 cannot name the type of big-endian samples when it expands frames; here a frame is one
            # sample.
            record = wfdb.rdrecord(str(path), physical=False)
            record.e_d_signal = list(record.d_signal.T)
        else:
            record = wfdb.rdrecord(str(path), physical=False, smooth_frames=False)
        return record, record.dac(expanded=True)
    except Exception as error:  # wfdb raises whatever its parsing ran into
        raise _diagnose(path, lines, multi, error) from None


def _diagnose(path: Path, lines: list[str], multi: bool, error: Exception) -> Refused:
    wfdb = _wfdb()
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    try:
        record = wfdb.rdheader(str(path))
    except Exception:
        if not lines:
            return Refused("unreadable-header", f"{path}.hea is empty")
        hint = ""
        if "." in lines[0].split()[0]:
            hint = f" (the first line names the record {lines[0].split()[0]!r}; a name has no suffix)"
        return Refused("unreadable-header", f"{path}.hea: {why}{hint}")
    if multi:
        for segment in (line.split()[0] for line in lines[1:]):
            if segment != "~" and not (path.parent / f"{segment}.hea").is_file():
                return Refused("missing-signal-file", f"{path}.hea names segment {segment!r}, which is not there")
    elif not record.n_sig:
        return Refused("no-signals", f"{path}.hea describes no signals")
    else:
        try:
            _check_size(path, record)
        except Refused as refusal:
            return refusal
        # The record line's count of signals is what wfdb goes by; the signal lines may be fewer.
        if record.n_sig != len(lines) - 1:
            found = f"{record.n_sig} signals and describes {len(lines) - 1}"
            return Refused("unreadable-header", f"{path}.hea announces {found}")
    return Refused("unreadable-signal", f"{path}: {why}")


def _check_size(path: Path, record: Any) -> None:
    """Every signal file exists and is as long as the header says."""
    if not record.n_sig or not record.file_name:
        return
    for name in dict.fromkeys(record.file_name):
        file = path.parent / name
        if name == "~":
            raise Refused("missing-signal-file", f"{path}.hea has a signal without a file")
        if not file.is_file():
            raise Refused("missing-signal-file", f"there is no {file}, which {path.name}.hea names")
        where = [i for i, other in enumerate(record.file_name) if other == name]
        bits = _BITS.get(str(record.fmt[where[0]]))
        if bits is None or not record.sig_len:
            continue
        offset = int(record.byte_offset[where[0]] or 0)
        samples = record.sig_len * sum(int(record.samps_per_frame[i] or 1) for i in where)
        need, have = int(samples * bits / 8), file.stat().st_size - offset
        if have < need:
            part = max(0, int(record.sig_len * have / need))
            raise Refused(
                "truncated",
                f"{file} holds {max(0, have)} of the {need} bytes that {path.name}.hea promises "
                f"(about {part} of {record.sig_len} samples)",
            )


def _check_sums(header: Path, record: Any, names: tuple[str, ...]) -> None:
    promised = record.checksum or []
    # Some writers leave the fields at zero throughout; a first sample of zero in every lead as well is no
    # accident.
    if not any(promised) and not any(record.init_value or []):
        return
    for i, samples in enumerate(record.e_d_signal):
        if promised[i] is None or (record.skew and record.skew[i]):
            continue
        found = int(np.sum(samples, dtype=np.int64)) % 65536
        if found != promised[i] % 65536:
            raise Refused(
                "checksum-mismatch",
                f"{header}: checksum {promised[i] % 65536} of lead {names[i]}, its samples give {found}",
            )


def _align(
    header: Path, record: Any, names: tuple[str, ...], channels: list[np.ndarray]
) -> tuple[list[np.ndarray], float]:
    """Channels of one length and their rate; only the twelve leads' rates must agree."""
    frames = [int(spf or 1) for spf in record.samps_per_frame]
    wanted = {frames[i] for i, name in enumerate(names) if canonical(name)} or set(frames[:1])
    if len(wanted) > 1:
        raise Refused("mixed-rates", f"{header}: leads have {sorted(wanted)} samples per frame")
    (spf,) = wanted
    length = record.sig_len * spf
    # Signals of other rates (respiration, pressure) are none of the twelve: only their place is kept.
    absent = np.full(length, np.nan)
    return [channel if len(channel) == length else absent for channel in channels], float(record.fs) * spf


def _scales(header: Path, record: Any, names: tuple[str, ...], lines: list[str]) -> list[float]:
    """Factor to mV of each signal. `lines` (may be empty) are the header's, for letters that wfdb drops."""
    scales = []
    for i, (name, unit) in enumerate(zip(names, record.units, strict=True)):
        given = str(unit or "mV")
        # wfdb reads ASCII and drops the rest, so microvolt spelled with a Greek letter arrives as volt.
        if given.casefold() == "v" and i + 1 < len(lines) and re.search(r"/[µμ]v\b", lines[i + 1], re.IGNORECASE):
            given = "uV"
        factor = _MILLIVOLT.get(given.casefold())
        if factor is None:
            if canonical(name):
                detail = f"{header}: unit {given!r} of lead {name} is no voltage (unit-less set? then unit=z)"
                raise Refused("unknown-unit", detail)
            factor = 1.0  # a signal that is none of the twelve leads is dropped anyway
        scales.append(factor)
    return scales


def _digest(path: Path, text: bytes, lines: list[str], record: Any, multi: bool) -> bytes:
    """sha256 of the header, then of the signal files as the header names them, segment by segment."""
    digest = hashlib.sha256(text)
    try:
        if not multi:
            for name in dict.fromkeys(record.file_name):
                digest.update((path.parent / name).read_bytes())
            return digest.digest()
        for segment in (line.split()[0] for line in lines[1:]):
            header = path.parent / f"{segment}.hea"
            if segment == "~" or not header.is_file():
                continue
            inner = header.read_bytes()
            digest.update(inner)
            for name in dict.fromkeys(line.split()[0] for line in _lines(inner)[1:]):
                file = path.parent / name
                if file.is_file():
                    digest.update(file.read_bytes())
    except OSError as error:
        raise Refused("unreadable-signal", f"{error.filename}: {error.strerror}") from None
    return digest.digest()
