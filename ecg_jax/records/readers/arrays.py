"""From a bare array to a `Reading`: which axis holds the leads, in what order, in which unit, at what rate.

Shared by the readers of NumPy, MATLAB, HDF5 and CSV files, which all may leave these four unsaid. Invariant: what the
file says and what the user says (`Declared`) must agree; what neither says is refused with the option that would say
it. The one default: twelve unnamed leads are in the standard order, I II III aVR aVL aVF V1 to V6.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecg_jax.records.leads import LEADS, canonical
from ecg_jax.records.readers.reading import MILLIVOLT, Reading, settle
from ecg_jax.records.record import Refused

Layout = Literal["leads-first", "samples-first"]
UNITS = ("mV", "uV", "V", "z")
# Names under which files are known to keep their facts; small letters and digits only. "rate" may be the heart's.
_RATE = {
    "fs",
    "fshz",
    "freq",
    "frequency",
    "samplingrate",
    "samplingratehz",
    "samplerate",
    "samplingfrequency",
    "samplefrequency",
    "currsamplerate",
    "srate",
    "sfreq",
}
_UNIT = {"unit", "units"}
_LEADS = {"lead", "leads", "leadnames", "leadname", "leadorder", "signame", "signames", "channelnames", "channels"}


@dataclass(frozen=True)
class Declared:
    """What the user says of files: rate in Hz, unit (of `UNITS`), lead names in order, layout. None: nothing."""

    rate: float | None = None
    unit: str | None = None
    leads: tuple[str, ...] | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class Facts:
    """What a file says: rate (Hz) or None, one unit or one for each lead or none, lead names or none."""

    rate: float | None = None
    units: tuple[str, ...] = ()
    leads: tuple[str, ...] = ()


@contextmanager
def refusing(where: str | Path) -> Iterator[None]:
    """Whatever a library raises over a file, as a refusal: missing-file, unreadable-signal."""
    try:
        yield
    except Refused:
        raise
    except FileNotFoundError:
        raise Refused("missing-file", f"there is no {where}") from None
    except Exception as error:  # parsers raise whatever they ran into
        why = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        raise Refused("unreadable-signal", f"{where}: {why}") from None


def file_digest(path: Path) -> bytes:
    """sha256 of a file, 32 bytes."""
    with refusing(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def is_fact(name: str) -> bool:
    """Whether `facts_of` listens to a value of that name."""
    return _plain_name(name) in _RATE | _UNIT | _LEADS


def _plain_name(name: str) -> str:
    return "".join(letter for letter in str(name).casefold() if letter.isalnum())


def facts_of(where: str, values: Mapping[str, Any]) -> Facts:
    """What named scalars and texts (attributes, variables) say. Refuses with bad-rate, mixed-rates."""
    rates: dict[float, str] = {}
    units: tuple[str, ...] = ()
    leads: tuple[str, ...] = ()
    for name, value in values.items():
        plain = _plain_name(name)
        if plain in _RATE:
            rates |= dict.fromkeys(_rates(where, name, value), name)
        elif plain in _UNIT:
            units = units or texts(value)
        elif plain in _LEADS:
            leads = leads or texts(value)
    if len(rates) > 1:
        said = " and ".join(f"{name}={rate:g}" for rate, name in list(rates.items())[:2])
        raise Refused("mixed-rates", f"{where} says {said}")
    return Facts(next(iter(rates), None), units, leads)


def _rates(where: str, name: str, value: Any) -> list[float]:
    try:
        found = [float(text.casefold().removesuffix("hz")) for text in texts(value) if text.casefold() != "hz"]
        found = found or [float(number) for number in np.unique(np.asarray(value, np.float64))[:3]]
    except (ValueError, TypeError, OverflowError):
        raise Refused("bad-rate", f"{where}: {name} is no number of samples per second") from None
    for rate in found:
        if not 0 < rate < math.inf:
            raise Refused("bad-rate", f"{where}: {name}={rate:g} is no number of samples per second")
    return found


def texts(value: Any) -> tuple[str, ...]:
    """The text, or the texts of an array of them; () where `value` is none. A comma list is taken apart."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return tuple(part for part in value.replace(",", " ").split() if part)
    if not isinstance(value, np.ndarray | list | tuple):
        return ()
    found = []
    for part in np.asarray(value, object).ravel() if isinstance(value, list | tuple) else value.ravel():
        while isinstance(part, np.ndarray) and part.size == 1:  # a cell within a cell
            part = part.ravel()[0]
        if isinstance(part, bytes):
            part = part.decode("utf-8", "replace")
        if not isinstance(part, str):
            return ()
        found.append(str(part).strip())
    if len(found) == 1:
        return texts(str(found[0]))
    return tuple(found)


def numeric(dtype: np.dtype) -> bool:
    """Whether samples can be of this type: integers and floats, nothing complex, boolean or composed."""
    return dtype.kind in "iuf" and dtype.subdtype is None


def lead_count(declared: Declared, facts: Facts) -> int:
    """How long the axis of the leads is."""
    return len(declared.leads or facts.leads or LEADS)


def lead_axis(shape: Sequence[int], count: int) -> bool:
    """Whether a two-dimensional array of `shape` may hold `count` leads."""
    return len(shape) == 2 and count in shape and 0 not in shape


def one_recording(where: str, data: Any, row: int | None, count: int) -> np.ndarray:
    """The samples of one recording, [a, b] or [a], out of an array or data set; only these are read.

    row: which of a batch, counted from 0 along the first axis; None where there is but one. Axes of length one around
    the two of a recording are dropped: [N, 1, T, 12]. Refuses with bad-shape, missing-row, wrong-type.
    """
    if not numeric(data.dtype):
        raise Refused("wrong-type", f"{where} holds {data.dtype}, not numbers that could be samples")
    shape = tuple(int(n) for n in data.shape)
    if row is not None:
        if len(shape) < 3 and not (count == 1 and len(shape) == 2):
            raise Refused(
                "bad-shape", f"{where} has shape {shape}; a batch needs three axes: recording, leads, samples"
            )
        if not 0 <= row < shape[0]:
            raise Refused(
                "missing-row", f"{where} holds {shape[0]} recordings, counted from 0; row {row} is none of them"
            )
        shape = shape[1:]
    kept = _outer(shape)
    if len(kept) not in (1, 2):
        hint = "; which recording? say row=COLUMN or rows=order" if len(kept) > 2 and row is None else ""
        raise Refused("bad-shape", f"{where} has shape {tuple(data.shape)}, not leads and samples{hint}")
    raw = np.array(data[()] if row is None else data[row])
    return raw.reshape(kept)


def _outer(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def reading_of(where: str, raw: np.ndarray, declared: Declared, facts: Facts, source: bytes) -> Reading:
    """Samples [a, b] or [a] as stored -> `Reading`. inf and what float32 cannot hold become NaN.

    Refuses with no-samples, lead-mismatch, ambiguous-shape, bad-shape, no-rate, rate-mismatch, no-unit, unknown-unit,
    unit-mismatch, and what `settle` refuses.
    """
    if raw.size == 0:
        raise Refused("no-samples", f"{where} has shape {raw.shape}")
    names = lead_names(where, declared, facts)
    signal = _samples_first(where, raw, len(names), declared)
    rate = settled_rate(where, declared.rate, facts.rate)
    factors = unit_factors(where, declared.unit, facts.units, names)
    return settle(scaled(signal, factors), names, rate, source, "z" if declared.unit == "z" else "mV")


def scaled(signal: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """float64 [T, n] of `signal` times a factor for each channel, NaN where float32 has no such number."""
    with np.errstate(over="ignore", invalid="ignore"):
        physical = signal.astype(np.float64) * factors
        physical[~(np.abs(physical) <= np.finfo(np.float32).max)] = np.nan
    return physical


def lead_names(where: str, declared: Declared, facts: Facts) -> tuple[str, ...]:
    """Names of the channels. Refuses (lead-mismatch) where file and user differ."""
    if declared.leads and facts.leads:
        said, given = _plain(facts.leads), _plain(declared.leads)
        if said != given:
            raise Refused(
                "lead-mismatch", f"{where} names its leads {' '.join(facts.leads)[:120]}; leads= says otherwise"
            )
    return declared.leads or facts.leads or LEADS


def _plain(names: Iterable[str]) -> list[str]:
    return [canonical(name) or name.casefold() for name in names]


def _samples_first(where: str, raw: np.ndarray, count: int, declared: Declared) -> np.ndarray:
    if raw.ndim == 1 and count == 1:
        raw = raw[:, None]
    shape, layout = raw.shape, declared.layout
    if raw.ndim != 2 or count not in shape:
        raise Refused(
            "bad-shape", f"{where} has shape {shape}, none of its axes has the length {count} of the leads; say leads="
        )
    if layout is None:
        if shape[0] == shape[1]:
            raise Refused(
                "ambiguous-shape", f"{where} has shape {shape}; say layout=leads-first or layout=samples-first"
            )
        layout = "leads-first" if shape[0] == count else "samples-first"
    if shape[layout == "samples-first"] != count:
        raise Refused("bad-shape", f"{where} has shape {shape}, which is not {layout} with {count} leads")
    return raw.T if layout == "leads-first" else raw


def settled_rate(where: str, declared: float | None, found: float | None) -> float:
    """Samples per second by user or file. Refuses with no-rate, rate-mismatch."""
    if declared is None and found is None:
        raise Refused("no-rate", f"{where} does not say its sampling rate; say rate=HZ")
    if declared is not None and found is not None and not math.isclose(declared, found, rel_tol=1e-3):
        raise Refused("rate-mismatch", f"{where} says {found:g} Hz, rate= says {declared:g} Hz; leave rate= out")
    return float(found if found is not None else declared)


def unit_factors(where: str, declared: str | None, found: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Factor to mV of each channel [n]; 1 where the user says "z". Refuses: no-unit, unknown-unit, unit-mismatch."""
    if declared == "z":
        return np.ones(len(names))
    if not found:
        if declared is None:
            raise Refused("no-unit", f"{where} does not say its unit; say unit=mV, uV, V or z")
        return np.full(len(names), MILLIVOLT[declared.casefold()])
    if len(found) not in (1, len(names)):
        raise Refused(
            "unknown-unit", f"{where} names {len(found)} units for {len(names)} leads; unit=z takes the numbers"
        )
    factors = []
    for name, unit in zip(names, [found[0]] * len(names) if len(found) == 1 else found, strict=True):
        factor = MILLIVOLT.get(unit.casefold())
        if canonical(name) is None:
            factor = factor or 1.0  # dropped anyway
        elif factor is None:
            raise Refused(
                "unknown-unit", f"{where}: unit {unit!r} of lead {name} is no voltage; unit-less? then unit=z"
            )
        elif declared is not None and factor != MILLIVOLT[declared.casefold()]:
            raise Refused("unit-mismatch", f"{where}: lead {name} is in {unit!r}, unit= says {declared}")
        factors.append(factor)
    return np.array(factors)
