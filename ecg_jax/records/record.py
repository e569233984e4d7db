"""What a recording is before preparation (`Record`), after it (`Prepared`), and when it cannot be used
(`Refused`).

Holds no logic of its own. Invariant: a `Record` always has the twelve leads of `leads.LEADS`, in that order,
in one unit; whatever cannot be brought into that form is a `Refused` with a reason code that never changes
between releases.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

UNKNOWN = -1  # int8 label of a diagnosis that nobody looked for; never 0
NO_SOURCE = bytes(32)


@dataclass(frozen=True)
class Record:
    """One recording as the source holds it, leads ordered, unit settled.

    signal       float32 [T, 12], in `unit`; NaN where the source marks a sample invalid
    rate         samples per second
    record_id    unique within its data set
    group        patient id, else the id of the recording: what a split never cuts
    age, sex     years; 1 male, 0 female; NaN unknown
    labels       per task int8 [K] in the task's label order; -1 unknown
    source       32 bytes: sha256 of header then signal file(s), or of the row it came from
    split        the official split, or None
    missing      leads that the recording does not have; their columns of `signal` are NaN
    quality      bits of `audit.Quality` that the reader already knows (derived leads, saturation in the file)
    meta         JSON-able extras, stored with the record
    """

    signal: np.ndarray
    rate: float
    record_id: str
    group: str
    patient_id: str | None = None
    age: float = float("nan")
    sex: float = float("nan")
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    time: str | None = None
    device: str | None = None
    source: bytes = NO_SOURCE
    split: Literal["train", "val", "test"] | None = None
    unit: Literal["mV", "z"] = "mV"
    missing: tuple[str, ...] = ()
    quality: int = 0
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """One stored ECG: 10 s at 100 Hz.

    signal       int16 [1000, 12], 1 LSB = 1 uV, or 0.001 of a unit-less signal; zero outside `valid`
    valid        (start, length) of the observed samples
    rpeaks       int16 [n], sample positions of the R peaks in `signal`, ascending
    source       32 bytes, of the `Record`
    signature    16 bytes: content hash that scale, offset and sampling rate do not change
    meta         time, device, original rate, leads, length, derived leads, and what `Record.meta` held
    """

    signal: np.ndarray
    valid: tuple[int, int]
    record_id: str
    group: str
    patient_id: str
    split: str | None
    age: float
    sex: float
    quality: int
    labels: dict[str, np.ndarray]
    rpeaks: np.ndarray
    source: bytes
    signature: bytes
    meta: dict[str, Any]


class Refused(Exception):
    """A recording that cannot be used. `reason` is a stable kebab-case code, `detail` one line for a reader.

    Raised where one recording is handled and returned (never raised) where many are.
    """

    def __init__(self, reason: str, detail: str) -> None:
        detail = " ".join(str(detail).split())
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
