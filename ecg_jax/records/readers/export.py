"""What the readers of files that a cardiograph's software exports (XML, DICOM) share: bytes in, times and names out.

Knows no format. Invariant: no file is read beyond the size that its reader allows.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ecg_jax.records.record import Refused

MAX_RATE = 100_000.0
_STAMP = re.compile(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?(?:\.\d*)?([+-]\d{4})?")


def load(path: Path, most: int) -> bytes:
    """The file's bytes. Refuses with missing-file, unreadable-file, too-large."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise Refused("missing-file", f"there is no {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise Refused("unreadable-file", f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > most:
        raise Refused("too-large", f"{path} is larger than {most >> 20} MB")
    return data


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Refusals of what knows only the channels (a lead twice, none of the twelve) get the file's name."""
    try:
        yield
    except Refused as refused:
        if str(path) in refused.detail:
            raise
        raise Refused(refused.reason, f"{path}: {refused.detail}") from None


def timestamp(text: str) -> str | None:
    """HL7 or DICOM time "YYYYMMDD[HHMM[SS[.F]]][+ZZZZ]" as ISO 8601, None where it is none. Fractions are dropped."""
    match = _STAMP.fullmatch(text.strip())
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    try:
        moment = datetime(year, month, day, hour, minute, second)
    except ValueError:
        return None
    return moment.isoformat(sep=" ") if match[4] else moment.date().isoformat()
