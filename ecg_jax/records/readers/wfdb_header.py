"""WFDB headers as nearly all archives write them, parsed here; what is rarer is left to the `wfdb` package.

The grammar is a part of the format's (https://physionet.org/physiotools/wag/header-5.htm): one segment, every field of
a signal line present, samples of fixed size, one sample a frame, no skew. Nothing is opened here except, for the repair
of a merged first line, the size of the signal file. Invariant: a header that `parse` takes means to the `wfdb` package
what it means here; one that leaves any doubt is None, not a guess.
"""

import datetime
import math
import re
from pathlib import Path
from typing import NamedTuple

from ecg_jax.records.record import Refused

# Formats in which all samples have the same size: so many bytes hold so many samples.
SAMPLE_BYTES = {
    "16": (2, 1), "61": (2, 1), "160": (2, 1), "80": (1, 1), "8": (1, 1), "24": (3, 1), "32": (4, 1),
    "212": (3, 2), "310": (4, 3), "311": (4, 3),
}  # fmt: skip
# What can be put right in a header, and is where a data set asks for it by name:
#   record-name-suffix  the first line names the record "E00271.mat"
#   merged-first-line   the line end between the first two lines is lost, and with it the head of the second
REPAIRS = ("record-name-suffix", "merged-first-line")
MAX_HEADER = 1 << 22  # bytes; an hour in segments of a second takes a hundredth of it
MAX_LINE = 1000  # characters; the format allows 255

# What the package takes for the end of a line. str.splitlines takes more: 0x85 is an ellipsis in many a comment.
_LINE_END = re.compile(r"[\n\r\v\f\x1c-\x1e]")
_RATE = r"(\d{1,9}(?:\.\d{0,18})?)(?:/\d{1,9}(?:\.\d{0,9})?(?:\(-?\d{1,9}(?:\.\d{0,9})?\))?)?"
# A date of MATLAB's ("05-Feb-2020 11:39:16"), as the Challenge files have it, is when the file was made: no field of
# the format, and not the time of the recording.
_TIME = (
    r"(?:[ \t]+(\d{1,2}:\d{1,2}:\d{1,2}(?:\.\d{1,6})?)(?:[ \t]+(\d{1,2}/\d{1,2}/\d{4}))?"
    r"|[ \t]+[0-3]\d-[A-Z][a-z]{2}-\d{4} \d\d:\d\d:\d\d)?"
)
_RECORD = re.compile(rf"([-\w]+)(\.\w+)?[ \t]+(\d{{1,4}})[ \t]+{_RATE}(?:[ \t]+(\d{{1,15}}){_TIME})?", re.ASCII)
_SIGNAL = re.compile(
    r"([-\w]+\.?\w*)[ \t]+(16|61|160|80|24|32|212)(?:x1)?(?::0)?(?:\+(\d{1,15}))?"
    r"[ \t]+(-?(?:\d{1,15}\.?\d{0,15}|\.\d{1,15})(?:e[+-]?\d{1,3})?)(?:\((-?\d{1,15})\))?(?:/([\w^\-?%/]+))?"
    r"[ \t]+\d{1,15}[ \t]+(-?\d{1,15})[ \t]+(-?\d{1,15})[ \t]+(-?\d{1,15})[ \t]+\d{1,15}[ \t]+([!-~][ -~]*)",
    re.ASCII,
)
_MERGED = re.compile(
    rf"([-\w]+)[ \t]+(\d{{1,4}})[ \t]+{_RATE}[ \t]+(\d{{2,15}})/([\w^\-?%]+)"
    r"([ \t]+\d{1,15}[ \t]+-?\d{1,15}[ \t]+-?\d{1,15}[ \t]+-?\d{1,15}[ \t]+\d{1,15}[ \t]+[!-~][ -~]*)",
    re.ASCII,
)
_SHARED = re.compile(r"([-\w]+\.?\w*)[ \t]+(\S+)[ \t]+(\d+(?:\.\d*)?)/([\w^\-?%]+)[ \t].*", re.ASCII)
# The package reads a number as far as it goes and takes what follows for the next field: 50O.5 would be 50 Hz.
_NUMBERS = re.compile(rf"\S+[ \t]+\d+(?:[ \t]+{_RATE}(?:[ \t]+\d+(?:[ \t].*)?)?)?", re.ASCII)
_SUFFIXED = re.compile(r"[ \t]*[-\w]+\.\w+[ \t]", re.ASCII)
_OUTSIDE = re.compile(r"\S*[/\\]\S*|\.\.?")


class Signal(NamedTuple):
    """One signal line. `initial` and `checksum` are None where the line has none."""

    file: str
    format: str
    frame: int  # samples per frame
    skew: int
    offset: int  # bytes in front of the first sample
    gain: float  # digital steps per unit
    baseline: int
    unit: str
    initial: int | None
    checksum: int | None
    name: str


class Header(NamedTuple):
    """A header of one segment. `rate` in frames a second; `length` in frames, None where the header has none."""

    rate: float
    length: int | None
    time: str | None
    signals: tuple[Signal, ...]


def split(text: bytes) -> tuple[list[str], tuple[str, ...]]:
    """Lines of a header that are neither blank nor comment, and the comments without their #. UTF-8, else Latin-1."""
    try:
        whole = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        whole = text.decode("latin-1")
    stripped = [line.strip() for line in _LINE_END.split(whole)]
    found = [line for line in stripped if line and not line.startswith("#")]
    return found, tuple(line.strip(" \t#") for line in stripped if line.startswith("#"))


def parse(found: list[str], repairs: tuple[str, ...], folder: Path) -> tuple[Header, str | None] | None:
    """Header lines -> (header, the repair it needed or None); None where it is beyond the grammar of this module.

    Only repairs of `REPAIRS` that are in `repairs` are made. `folder` holds the signal files.
    """
    if not found or not all(map(str.isascii, found)):
        return None
    repair = None
    if "merged-first-line" in repairs and _MERGED.fullmatch(found[0]):
        mended = _unmerge(found, folder)
        if mended is None:
            return None
        found, repair = mended, "merged-first-line"
    match = _RECORD.fullmatch(found[0])
    if match is None or int(match[3]) != len(found) - 1 or len(found) == 1:
        return None
    if match[2]:
        if "record-name-suffix" not in repairs:
            return None
        repair = "record-name-suffix"
    length = int(match[5]) if match[5] else None
    signals = [_signal(line) for line in found[1:]]
    try:
        time = _time(match[6], match[7])
    except ValueError:
        return None
    if length == 0 or None in signals:
        return None
    return Header(_rate(float(match[4])), length, time, tuple(signals)), repair


def size_of(fmt: str, count: int) -> int:
    """Bytes that `count` samples of format `fmt` (one of `SAMPLE_BYTES`) take."""
    size, samples = SAMPLE_BYTES[fmt]
    # The second of three samples in format 310 lies in the last two bytes of four.
    return -(-count * size // samples) + (fmt == "310" and count % 3 == 2)


def check_lines(path: Path, found: list[str]) -> None:
    """Refuse ("unreadable-header") lines of the header `path`.hea that the `wfdb` package must not or cannot read, and
    say how they can be mended.
    """
    if not found:
        raise Refused("unreadable-header", f"{path}.hea is empty")
    if len(longest := max(found, key=len)) > MAX_LINE:
        raise Refused("unreadable-header", f"{path}.hea has a line of {len(longest)} characters")
    if _SUFFIXED.match(found[0]):
        detail = (
            f"{path}.hea: the first line names the record {found[0].split()[0]!r}; a name has no suffix "
            "(for a header of plain signal lines the repair record-name-suffix takes it off)"
        )
        raise Refused("unreadable-header", detail)
    if _MERGED.fullmatch(found[0]):
        detail = (
            f"{path}.hea: the line end after the first line is lost ({found[0][:60]!r}); the repair merged-first-line "
            "restores it where the other signal lines and the size of the signal file leave no doubt"
        )
        raise Refused("unreadable-header", detail)
    if not _NUMBERS.fullmatch(found[0]):
        raise Refused("unreadable-header", f"{path}.hea: a field of the first line is no number ({found[0][:60]!r})")
    for line in found[1:]:
        if _OUTSIDE.fullmatch(line.split()[0]):
            raise Refused("unreadable-header", f"{path}.hea names {line.split()[0]!r}, which is not in its own folder")


def _signal(line: str) -> Signal | None:
    match = _SIGNAL.fullmatch(line)
    if match is None:
        return None
    file, fmt, offset, gain, baseline, unit, zero, initial, checksum, name = match.groups()
    steps = float(gain) or 200.0  # by the format, zero means that nobody knows, and 200 is assumed
    if not math.isfinite(steps):
        return None
    return Signal(
        file=file,
        format=fmt,
        frame=1,
        skew=0,
        offset=int(offset or 0),
        gain=steps,
        baseline=int(zero if baseline is None else baseline),
        unit=unit or "mV",
        initial=int(initial),
        checksum=int(checksum),
        name=name,
    )


def _rate(rate: float) -> float:
    return float(round(rate)) if round(rate, 8) == int(rate) else rate


def _time(time: str | None, date: str | None) -> str | None:
    """ISO 8601 of both, None unless both are there; ValueError for a time that cannot be."""
    if time is None:
        return None
    clock = datetime.datetime.strptime(time, "%H:%M:%S.%f" if "." in time else "%H:%M:%S").time()
    if date is None:
        return None
    return datetime.datetime.combine(datetime.datetime.strptime(date, "%d/%m/%Y"), clock).isoformat(sep=" ")


def _unmerge(found: list[str], folder: Path) -> list[str] | None:
    """Lines with the first one cut in two, or None where anything is open.

    "JS01052 12 500 500000/mV 16 0 15 31255 0 I" was the two lines "JS01052 12 500 5000" and "JS01052.mat 16+24 1000/mV
    16 0 15 31255 0 I". What is lost (file, format, first digits of the gain) must be the same in all other signal
    lines; the number of samples must be what the signal file holds, to the byte, and the digits left over must end the
    gain. That the samples are the announced ones, the checksums tell, which the reader of such a header compares in any
    case.
    """
    match = _MERGED.fullmatch(found[0])
    others = [_SHARED.fullmatch(line) for line in found[1:]]
    if match is None or not others or None in others or int(match[2]) != len(others) + 1:
        return None
    if len({other.groups() for other in others}) != 1 or others[0] is None:
        return None
    file, fmt, gain, unit = others[0].groups()
    signal = _signal(found[1])
    if signal is None or signal.format not in ("16", "61", "160") or unit != match[5]:
        return None
    try:
        size = (folder / file).stat().st_size - signal.offset
    except OSError:
        return None
    length, rest = divmod(size, size_of(signal.format, int(match[2])))
    digits = match[4]
    if rest or length < 1 or not digits.startswith(str(length)):
        return None
    tail = digits[len(str(length)) :]
    if not tail or not gain.endswith(tail):
        return None
    head = found[0][: match.start(4)]
    return [f"{head}{length}", f"{file} {fmt} {gain}/{unit}{match[6]}", *found[1:]]
