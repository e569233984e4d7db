"""WFDB records of every format and layout: `read_wfdb`.

The common case (one segment, samples of fixed size) is read by `wfdb_direct`. This module reads the rest with the
`wfdb` package (FLAC, formats 8, 310 and 311, several samples per frame, skew) and joins the segments of multi-segment
records. It knows no labels and repairs no sample. Invariant: whatever is wrong with a recording's files becomes a
`Refused` with one of the reasons listed at `read_wfdb`, never another exception; a signal that came through has every
sample its header promised; and the package decodes nothing whose announced size was not compared with the files.
"""

import hashlib
import math
import re
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ecg_jax.records.leads import canonical
from ecg_jax.records.readers import wfdb_direct as direct
from ecg_jax.records.readers import wfdb_header as headers
from ecg_jax.records.readers.reading import Reading, Unit, settle
from ecg_jax.records.readers.wfdb_header import Header, Signal
from ecg_jax.records.record import Refused

_FLAC = ("508", "516", "524")
_FLAC_RATIO = 4096  # samples a byte: silence in the usual blocks is somewhat below
_GAP_RATIO = 64  # samples announced per sample stored, where a record consists of gaps for the most part
_SMALL = 1 << 22  # samples that any record may announce
_MULTI_SEGMENT = re.compile(r"\S+/\d+(\s|$)")


class _How(NamedTuple):
    unit: Unit
    checksums: bool
    repairs: tuple[str, ...]
    step: float | None


class _Channels(NamedTuple):
    """Float64 [T, n] in mV (or unit-less), and what belongs to it."""

    values: np.ndarray
    names: tuple[str, ...]
    rate: float
    time: str | None
    repair: str | None = None


def read_wfdb(
    path: Path,
    unit: Unit = "mV",
    checksums: bool = True,
    repairs: tuple[str, ...] = (),
    millivolt_per_step: float | None = None,
) -> Reading:
    """Read the WFDB record whose header is `path` + ".hea" (`path` without the suffix).

    unit                "mV" converts V, mV, uV and nV (in any case); "z" takes the numbers as they are
    checksums           compare the header's checksums with the samples (a header of zeros alone promises nothing)
    repairs             names out of `wfdb_header.REPAIRS` of faults of the header that are put right; a line "repaired:
                        NAME" in `Reading.comments` says where one was
    millivolt_per_step  what one step of the stored integers is worth, gains, baselines and units ignored (LUDB's are
                        bogus); with it `unit` only says what the numbers are called

    Refuses with: missing-file (no header), unreadable-header, missing-signal-file, truncated, unreadable-signal,
    checksum-mismatch, unknown-unit, no-signals, mixed-rates, missing-lead (none of the twelve), duplicate-lead.
    ValueError for a name that is no repair.
    """
    if unknown := set(repairs) - set(headers.REPAIRS):
        raise ValueError(f"repairs {sorted(unknown)}: known are {', '.join(headers.REPAIRS)}")
    how = _How(unit, checksums, tuple(repairs), millivolt_per_step)
    digest = hashlib.sha256()
    with np.errstate(all="ignore"):  # absurd gains give infinities, which are no samples
        text = _load(path, digest)
        lines, comments = headers.split(text)
        if lines and _MULTI_SEGMENT.match(lines[0]):
            channels = _multi(path, lines, how, digest)
        else:
            channels = _single(path, lines, how, digest)
        if channels.repair:
            comments = (*comments, f"repaired: {channels.repair}")
        return settle(
            channels.values,
            channels.names,
            channels.rate,
            source=digest.digest(),
            unit=unit,
            time=channels.time,
            comments=comments,
        )


def _load(path: Path, digest: Any) -> bytes:
    header = Path(f"{path}.hea")
    try:
        if not header.is_file() and header.exists():
            raise Refused("unreadable-header", f"{header} is no file")  # a pipe would be waited for
        with header.open("rb") as stream:
            text = stream.read(headers.MAX_HEADER + 1)
    except FileNotFoundError:
        raise Refused("missing-file", f"there is no {header}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise Refused("unreadable-header", f"{header}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > headers.MAX_HEADER:
        raise Refused("unreadable-header", f"{header} is larger than {headers.MAX_HEADER >> 20} MiB: no WFDB header")
    digest.update(text)
    return text


def _single(path: Path, lines: list[str], how: _How, digest: Any) -> _Channels:
    parsed = headers.parse(lines, how.repairs, path.parent)
    if parsed is None:
        return _by_package(path, lines, how, digest)
    header, repair = parsed
    _refuse_disagreement(path, header)
    header = direct.settle_length(path, header)
    digital = direct.read_digital(path, header, digest)
    merged = repair == "merged-first-line"  # what was restored is right only if the checksums say so
    if how.checksums or merged:
        found = [0] * len(header.signals)
        for where, samples in digital:
            for i, total in zip(where, direct.sums(samples), strict=True):
                found[i] = total
        direct.check_sums(path, header, found, strict=merged)
    names = tuple(signal.name for signal in header.signals)
    if how.step is not None:
        return _Channels(direct.steps(header, digital, how.step), names, header.rate, header.time, repair)
    factors = direct.scales(path, header, how.unit)
    values = direct.physical(header, digital)
    if (factors != 1).any():
        values *= factors
    return _Channels(values, names, header.rate, header.time, repair)


@cache
def _wfdb() -> ModuleType:
    """The package: a second to import, so not before it is needed; what it does on import, newer pandas warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wfdb
    return wfdb


def _header(path: Path) -> Any:
    """The package's reading of the header of `path`."""
    wfdb = _wfdb()
    try:
        return wfdb.rdheader(str(path))
    except Exception as error:  # it raises whatever its parsing ran into
        raise Refused("unreadable-header", f"{path}.hea: {_why(error)}") from None


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__


def _by_package(path: Path, lines: list[str], how: _How, digest: Any) -> _Channels:
    headers.check_lines(path, lines)
    header, time = _understood(path, _header(path), lines)
    _refuse_disagreement(path, header)
    header = direct.settle_length(path, header)
    _check_files(path, header)
    record = _samples(path, header)
    if how.checksums:
        found = [int(np.sum(samples, dtype=np.int64)) % 65536 for samples in record.e_d_signal]
        direct.check_sums(path, header, found)
    if how.step is not None:
        record.adc_gain, record.baseline = [1 / how.step] * len(header.signals), [0] * len(header.signals)
        factors = np.ones(len(header.signals))
    else:
        factors = direct.scales(path, header, how.unit)
    values, rate = _align(path, header, record.dac(expanded=True))
    for file in direct.by_file(header):
        _hash(path.parent / file, digest)
    return _Channels(values * factors, tuple(signal.name for signal in header.signals), rate, time)


def _understood(path: Path, record: Any, lines: list[str]) -> tuple[Header, str | None]:
    """The package's header as ours, and the time of the recording."""
    if not record.n_sig:
        raise Refused("no-signals", f"{path}.hea describes no signals")
    found = len(record.file_name or ())
    if not record.n_sig == found == len(lines) - 1:
        raise Refused("unreadable-header", f"{path}.hea announces {record.n_sig} signals and describes {found}")
    signals = []
    for i in range(record.n_sig):
        unit = record.units[i] or "mV"
        # The package reads ASCII and drops the rest, so microvolt spelled with a Greek letter arrives as volt.
        if unit.casefold() == "v" and re.search(r"/[µμ]v\b", lines[i + 1], re.IGNORECASE):
            unit = "uV"
        signal = Signal(
            file=record.file_name[i],
            format=record.fmt[i],
            frame=record.samps_per_frame[i],
            skew=record.skew[i] or 0,
            offset=record.byte_offset[i] or 0,
            gain=record.adc_gain[i],
            baseline=record.baseline[i],
            unit=unit,
            initial=record.init_value[i],
            checksum=record.checksum[i],
            name=record.sig_name[i] or "",
        )
        if signal.file == "~":
            raise Refused("missing-signal-file", f"{path}.hea has a signal without a file")
        if signal.format not in (*headers.SAMPLE_BYTES, *_FLAC):
            raise Refused("unreadable-header", f"{path}.hea: there is no format {signal.format[:20]} of signal files")
        if signal.frame < 1 or not math.isfinite(signal.gain):
            detail = f"{path}.hea: {signal.frame} samples per frame, gain {signal.gain} of {signal.name[:40]!r}"
            raise Refused("unreadable-header", detail)
        signals.append(signal)
    when = record.base_datetime
    return Header(float(record.fs), record.sig_len, None, tuple(signals)), when.isoformat(sep=" ") if when else None


def _refuse_disagreement(path: Path, header: Header) -> None:
    if doubt := direct.disagreement(header):
        raise Refused("unreadable-header", f"{path}.hea: {doubt}")


def _check_files(path: Path, header: Header) -> None:
    """Every signal file is there and as long as the header says, so that no number in it asks for more memory."""
    if header.length is None or header.length < 1:
        raise Refused("truncated", f"{path}.hea announces no sample")
    for file, where in direct.by_file(header).items():
        signals = [header.signals[i] for i in where]
        count = header.length * sum(signal.frame for signal in signals)
        if any(signal.skew > header.length for signal in signals):
            raise Refused("unreadable-header", f"{path}.hea: a skew of more than the {header.length} frames there are")
        if signals[0].format in _FLAC:
            _check_flac(path, file, signals, header.length)
        else:
            need = signals[0].offset + headers.size_of(signals[0].format, count)
            direct.check_size(path, file, need, header.length)


def _check_flac(path: Path, file: str, signals: list[Signal], length: int) -> None:
    have = direct.file_size(path, file)
    import soundfile  # as the package does, and as late

    try:
        with soundfile.SoundFile(str(path.parent / file)) as sound:
            frames = sound.frames
    except Exception as error:
        raise Refused("unreadable-signal", f"{path.parent / file}: {_why(error)}") from None
    need = length * signals[0].frame
    if frames < signals[0].offset + need or need * len(signals) > have * _FLAC_RATIO:
        detail = f"{path.parent / file} ({have} bytes) holds {frames} samples, {path.name}.hea promises {need}"
        raise Refused("truncated", detail)


def _samples(path: Path, header: Header) -> Any:
    """The package's record with `e_d_signal`, the digital samples of each signal at its own rate."""
    wfdb = _wfdb()
    try:
        if any(signal.format == "61" for signal in header.signals):
            # wfdb 4.3 cannot name the type of big-endian samples when it expands frames.
            if any(signal.frame > 1 for signal in header.signals):
                raise Refused("unreadable-signal", f"{path}.hea: format 61 with several samples per frame")
            record = wfdb.rdrecord(str(path), physical=False)
            record.e_d_signal = list(record.d_signal.T)
        else:
            record = wfdb.rdrecord(str(path), physical=False, smooth_frames=False)
    except Refused:
        raise
    except Exception as error:  # it raises whatever its decoding ran into
        raise Refused("unreadable-signal", f"{path}: {_why(error)}") from None
    for signal, samples in zip(header.signals, record.e_d_signal, strict=True):
        if len(samples) != header.length * signal.frame:
            detail = f"{path.parent / signal.file} holds {len(samples)} of {header.length * signal.frame} samples"
            raise Refused("truncated", f"{detail} of {signal.name[:40]!r}")
    return record


def _align(path: Path, header: Header, channels: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Channels of one length as [T, n], and their rate; only the rates of the twelve leads must agree."""
    frames = [signal.frame for signal in header.signals]
    wanted = {signal.frame for signal in header.signals if canonical(signal.name)} or set(frames[:1])
    if len(wanted) > 1:
        raise Refused("mixed-rates", f"{path}.hea: leads have {sorted(wanted)} samples per frame")
    (frame,) = wanted
    # Signals of other rates (respiration, pressure) are none of the twelve: only their place is kept.
    values = np.full((header.length * frame, len(channels)), np.nan)
    for i, channel in enumerate(channels):
        if frames[i] == frame:
            values[:, i] = channel
    return values, header.rate * frame


def _multi(path: Path, lines: list[str], how: _How, digest: Any) -> _Channels:
    """All segments one after the other, channels matched by name; NaN in gaps and where a segment lacks a lead."""
    headers.check_lines(path, lines)
    record = _header(path)
    if record.n_seg != len(record.seg_name) or not record.seg_name:
        detail = f"{path}.hea announces {record.n_seg} segments and lists {len(record.seg_name)}"
        raise Refused("unreadable-header", detail)
    parts: list[tuple[int, int, _Channels]] = []  # first and last frame (not included) of what is stored
    at = stored = 0
    for i, (name, length) in enumerate(zip(record.seg_name, record.seg_len, strict=True)):
        if name != "~":
            segment = _segment(path, name, layout=i == 0 and not length, how=how, digest=digest)
            if segment and any(map(canonical, segment.names)):
                parts.append((at, at + length, segment))
                stored += segment.values.size
        at += length
    if not parts:
        raise Refused("no-signals", f"{path}.hea: no segment has any of the twelve leads")
    if record.sig_len not in (None, 0, at):
        raise Refused("unreadable-header", f"{path}.hea announces {record.sig_len} samples, its segments have {at}")
    names = tuple(dict.fromkeys(name for _, _, segment in parts for name in segment.names))
    frame = parts[0][2].rate / float(record.fs) if record.fs else 0.0
    if frame < 1 or not frame.is_integer() or len({segment.rate for _, _, segment in parts}) > 1:
        rates = sorted({segment.rate for _, _, segment in parts})
        raise Refused("mixed-rates", f"{path}.hea has {record.fs} frames a second, its segments {rates} samples")
    frame = int(frame)
    if at * frame * len(names) > max(_SMALL, _GAP_RATIO * stored):
        raise Refused("truncated", f"{path}.hea announces {at} samples, its segments hold next to none of them")
    values = np.full((at * frame, len(names)), np.nan)
    for first, last, segment in parts:
        if len(segment.values) != (last - first) * frame:
            detail = f"{path}.hea gives a segment {last - first} frames that has {len(segment.values) // frame}"
            raise Refused("unreadable-header", detail)
        if len(set(segment.names)) < len(segment.names):
            raise Refused("duplicate-lead", f"{path}.hea: a segment has two signals of one name")
        for column, name in enumerate(segment.names):
            values[first * frame : last * frame, names.index(name)] = segment.values[:, column]
    when = record.base_datetime
    time = when.isoformat(sep=" ") if when else None
    repair = next((segment.repair for _, _, segment in parts if segment.repair), None)
    return _Channels(values, names, parts[0][2].rate, time, repair)


def _segment(path: Path, name: str, layout: bool, how: _How, digest: Any) -> _Channels | None:
    """One segment; None for the layout, which has names and no samples."""
    inner = path.parent / name
    try:
        lines, _ = headers.split(_load(inner, digest))
    except Refused as refusal:
        if refusal.reason != "missing-file":
            raise
        raise Refused("missing-signal-file", f"{path}.hea names segment {name!r}, which is not there") from None
    if lines and _MULTI_SEGMENT.match(lines[0]):
        raise Refused("unreadable-header", f"{path}.hea: segment {name!r} consists of segments itself")
    return None if layout else _single(inner, lines, how, digest)


def _hash(file: Path, digest: Any) -> None:
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise Refused("unreadable-signal", f"{file}: {error.strerror or error}") from None
