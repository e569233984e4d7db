"""What every reader returns, and the one way from named channels to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ecg_jax.records.audit import Quality
from ecg_jax.records.leads import arrange

Unit = Literal["mV", "z"]
# Factor to millivolt of a unit's name in lower case; both Greek letters that look like mu.
MILLIVOLT = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}


@dataclass(frozen=True)
class Reading:
    """What a file holds.

    signal      float32 [T, 12] in the order of `LEADS`, mV or unit-less; NaN where invalid or missing
    rate        samples per second
    names       lead names as the file has them
    derived     limb leads computed from two others
    missing     leads that the file does not have and that nothing gives (their columns are NaN)
    source      sha256 (32 bytes) of header then signal files, or of the one file or row
    time        start of the recording as the file says it, ISO 8601, or None
    comments    free text lines of the file
    """

    signal: np.ndarray
    rate: float
    names: tuple[str, ...]
    derived: tuple[str, ...]
    missing: tuple[str, ...]
    source: bytes
    time: str | None = None
    comments: tuple[str, ...] = ()

    @property
    def quality(self) -> int:
        """What the reader knows for `Record.quality`."""
        return int(Quality.DERIVED) if self.derived else 0

    def meta(self) -> dict[str, Any]:
        """The entries for `Record.meta`."""
        return {"leads": list(self.names), "derived": list(self.derived), "missing": list(self.missing)}


def settle(
    physical: np.ndarray,
    names: Sequence[str],
    rate: float,
    source: bytes,
    unit: Unit = "mV",
    time: str | None = None,
    comments: Sequence[str] = (),
) -> Reading:
    """Channels [T, n] in mV (or unit-less), any order and spelling -> `Reading`.

    Refuses with duplicate-lead, bad-shape, and missing-lead where none of the twelve leads is there. Unit-less limb
    leads are never derived: each has its own scale.
    """
    signal, derived, missing = arrange(physical, names, derive=unit == "mV")
    return Reading(
        signal=signal,
        rate=float(rate),
        names=tuple(str(name) for name in names),
        derived=tuple(sorted(derived)),
        missing=tuple(sorted(missing)),
        source=source,
        time=time,
        comments=tuple(comments),
    )
