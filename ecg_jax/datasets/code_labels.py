"""What the sets of the CODE group share: six diagnoses, cells of their tables, and the `tracings` of their HDF5 files.

It knows no file name and no table. Facts: Zenodo 4916206, 3765780 and 4905618, and the README of
antonior92/ecg-preprocessing (400 Hz, 4,096 samples, values of twice the millivolts, no baseline removed); lead orders
and lead-II amplitudes as vlbthambawita/ECGBench measured them. Invariant: the rows come out as they lie in the file, to
the bit, whichever way they are stored; what cannot be read of one row is a `Refused`, what is wrong with a file a
`DataError`.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ecg_jax.datasets.table import Row
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records import audit
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import UNKNOWN, Refused

CODE6 = ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")
RATE = 400.0
SAMPLES = 4096
SCALE = 2.0  # stored value over mV
SCALE_POLICY = "the published values are 2 x mV (the authors' --scale 2); they are divided by `scale`"

# Whatever h5py raises on a file that is damaged, or is no HDF5 file at all.
H5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError)
_SLAB = 64 << 20  # bytes read at once where rows share chunks
EINTHOVEN = 0.15  # residual over amplitude of the limb leads; wrong orders miss by a third and more
ABSURD = 1e6  # no sample of the checks is beyond it
_DEFLATE = 1100  # no filter of HDF5 packs more tightly than deflate on zeros, 1032:1
_SAMPLE = 30  # records from which on a median says something about the unit

_FLAGS = {"1": 1, "0": 0, "true": 1, "false": 0, "1.0": 1, "0.0": 0, "": UNKNOWN, "nan": UNKNOWN}
_SEXES = {"m": 1.0, "male": 1.0, "f": 0.0, "female": 0.0, "": math.nan, "nan": math.nan}


# ------------------------------------------------------------------------------------------------- table cells


def flag(row: Row, column: str) -> int:
    """1, 0, or -1 where the cell is empty: True/False, 1/0, 1.0/0.0."""
    value = _FLAGS.get(row[column].casefold())
    if value is None:
        raise DataError(f"{row.where}: {column}={row[column]!r}, must be True, False, 1, 0 or empty")
    return value


def flags(row: Row, columns: Sequence[str]) -> bytes:
    """The flags of `columns`, as the bytes of int8 [K]."""
    return bytes(flag(row, column) & 0xFF for column in columns)


def labels_of(packed: bytes) -> np.ndarray:
    """int8 [K] again."""
    return np.frombuffer(packed, np.int8)


def male(row: Row, column: str) -> float:
    """1 male, 0 female, NaN unknown, of a column that is a flag for male."""
    value = flag(row, column)
    return math.nan if value == UNKNOWN else float(value)


def sex(row: Row, column: str) -> float:
    """1 male, 0 female, NaN unknown, of a column of M and F."""
    value = _SEXES.get(row[column].casefold())
    if value is None:
        raise DataError(f"{row.where}: {column}={row[column]!r}, must be M, F or empty")
    return value


def whole(row: Row, column: str, empty: int | None = None) -> int:
    """The cell as a whole number, 0 to 2^62; an empty one is `empty` (None: not allowed)."""
    text = row.identifier(column)
    if not text and empty is not None:
        return empty
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise DataError(f"{row.where}: {column}={row[column]!r} is no id (a whole number)")
    return int(text)


def scale_of(dataset: str, options: dict[str, str]) -> float:
    """Option `scale`: what the stored values are divided by to give mV."""
    text = options.get("scale", str(SCALE))
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 1e-6 <= scale <= 1e6:
        raise UsageError(
            f"{dataset}: scale={text!r} must be a positive number: the stored values over mV (2 as published)"
        )
    return scale


def hash_of(path: Path) -> str:
    """sha256 of a whole file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


# -------------------------------------------------------------------------------------------------- HDF5 files


@dataclass(frozen=True)
class Tracings:
    """`tracings` of one file: rows [4096, 12] of float32 or float64; `size` of the file in bytes."""

    path: Path
    rows: int
    size: int


def open_tracings(path: Path) -> Tracings:
    """Look at `path` without reading signals. `DataError` unless `tracings` is (N, 4096, 12) of float32 or float64."""
    try:
        with h5py.File(path, "r") as file:
            data = _dataset(path, file, "tracings")
            if data.ndim != 3 or data.shape[1:] != (SAMPLES, len(LEADS)):
                raise DataError(f"{path}: tracings is {data.shape}, must be (N, {SAMPLES}, {len(LEADS)})")
            if data.dtype.kind != "f" or data.dtype.itemsize not in (4, 8):
                raise DataError(f"{path}: tracings holds {data.dtype}, must be float32 or float64")
            return Tracings(path, data.shape[0], path.stat().st_size)
    except H5_ERRORS as error:
        raise _no_hdf5(path, error) from None


def read_ids(path: Path, rows: int) -> np.ndarray:
    """int64 [rows]: `exam_id` of the file. `DataError` for another length, or for numbers that are no ids."""
    try:
        with h5py.File(path, "r") as file:
            data = _dataset(path, file, "exam_id")
            if data.shape != (rows,):
                raise DataError(f"{path}: exam_id is {data.shape}, tracings has {rows} rows")
            if data.dtype.kind not in "iuf":
                raise DataError(f"{path}: exam_id holds {data.dtype}, must be whole numbers")
            # The length is a number in a header: it is believed only as far as the file is long.
            if data.dtype.itemsize * rows > _DEFLATE * (data.id.get_storage_size() + 4096):
                raise DataError(f"{path}: exam_id claims {rows} numbers, which the file does not hold")
            ids = data[:]
    except H5_ERRORS as error:
        raise _no_hdf5(path, error) from None
    with np.errstate(invalid="ignore", over="ignore"):
        out, wide = ids.astype(np.int64), ids.astype(np.float64)
        bad = np.flatnonzero((out != ids) | ~(wide >= 0) | (wide >= 2.0**62))
    if len(bad):
        raise DataError(f"{path}: exam_id of row {bad[0]} is {ids[bad[0]]}, must be a whole number from 0 on")
    return out


def read_rows(path: Path, rows: Sequence[int]) -> Iterator[np.ndarray | Refused]:
    """Row after row of `tracings`, [4096, 12] as stored, or why it cannot be read; `rows` ascending for speed.

    Rows that lie bare in the file are read past the HDF5 library, which takes ten times as long over one; others
    through it, neighbours and rows of one chunk together.
    """
    try:
        with h5py.File(path, "r") as file:
            data = _dataset(path, file, "tracings")
            layout = (data.shape[1:], data.dtype.kind, data.dtype.itemsize in (4, 8))
            if layout != ((SAMPLES, len(LEADS)), "f", True):
                raise DataError(f"{path}: tracings is {data.shape} of {data.dtype} now")
            offset = _bare(file, data)
            if offset is None:
                yield from _through_library(data, rows)
                return
            total, dtype = data.shape[0], data.dtype
    except DataError as error:
        yield from itertools.repeat(Refused("unreadable-signal", str(error)), len(rows))
        return
    except FileNotFoundError:
        yield from itertools.repeat(Refused("missing-file", f"there is no {path}"), len(rows))
        return
    except H5_ERRORS as error:
        yield from itertools.repeat(Refused("unreadable-signal", str(_no_hdf5(path, error))), len(rows))
        return
    yield from _past_library(path, rows, offset, total, dtype)


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    data = file.get(name)
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        found = ", ".join(itertools.islice(file, 8)) or "nothing"
        raise DataError(f"{path}: no data set {name!r} in it (it has: {found})")
    return data


def _no_hdf5(path: Path, error: BaseException) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no {path}")
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path}: {error.strerror}")
    why = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"{path} cannot be read as HDF5 ({why}); unpack or download it again")


def _bare(file: h5py.File, data: h5py.Dataset) -> int | None:
    """Where the rows begin in the file, if they lie there one after another, unfiltered, as NumPy would hold them."""
    plan = data.id.get_create_plist()
    kind = data.id.get_type()
    offset = data.id.get_offset()
    plain = (
        plan.get_layout() == h5py.h5d.CONTIGUOUS
        and not plan.get_external_count()
        and not file.userblock_size
        and offset is not None
        and kind == h5py.h5t.py_create(data.dtype)
        and kind.get_size() == data.dtype.itemsize
    )
    return offset if plain else None


def _past_library(path: Path, rows: Sequence[int], offset: int, total: int, dtype: np.dtype) -> Iterator[Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        yield from itertools.repeat(Refused("unreadable-signal", f"{path}: {error.strerror}"), len(rows))
        return
    try:
        for row in rows:
            if not 0 <= row < total:
                yield Refused("missing-row", f"{path} has {total} rows, no row {row}")
                continue
            out = np.empty((SAMPLES, len(LEADS)), dtype)
            try:
                found = os.preadv(descriptor, [out], offset + row * out.nbytes)
            except OSError as error:
                yield Refused("unreadable-signal", f"{path}: row {row}: {error.strerror}")
                continue
            if found < out.nbytes:
                yield Refused("truncated", f"{path} ends in row {row} of {total}: download it again")
            else:
                yield out
    finally:
        os.close(descriptor)


def _through_library(data: h5py.Dataset, rows: Sequence[int]) -> Iterator[Any]:
    total, row_bytes = data.shape[0], data.dtype.itemsize * SAMPLES * len(LEADS)
    chunk = max(1, data.chunks[0]) if data.chunks else 1
    for first, last in _slabs(rows, chunk, max(1, _SLAB // row_bytes)):
        wanted = rows[first:last]
        low, high = wanted[0], wanted[-1] + 1
        slab = None
        if 0 <= low and high <= total:
            try:
                slab = data[low:high]
            except H5_ERRORS:
                pass  # one bad chunk: the rows are tried one by one
        for row in wanted:
            yield slab[row - low] if slab is not None else _one(data, row)


def _slabs(rows: Sequence[int], chunk: int, most: int) -> Iterator[tuple[int, int]]:
    """Runs (first, last) of `rows` to read together: ascending, neighbours or in one chunk, at most `most` long."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i < len(rows):
            together = rows[i] == rows[i - 1] + 1 or (
                rows[i] > rows[i - 1] and rows[i] // chunk == rows[i - 1] // chunk
            )
            if together and rows[i] - rows[first] < most:
                continue
        yield first, i
        first = i


def _one(data: h5py.Dataset, row: int) -> np.ndarray | Refused:
    path = data.file.filename
    if not 0 <= row < data.shape[0]:
        return Refused("missing-row", f"{path} has {data.shape[0]} rows, no row {row}")
    try:
        return data[row]
    except H5_ERRORS as error:
        return Refused("unreadable-signal", f"{path}: row {row}: {' '.join(str(error).split())[:120]}")


# ------------------------------------------------------------------------------------------ from rows to leads


def millivolt(raw: np.ndarray, scale: float, order: Sequence[str] = LEADS) -> np.ndarray:
    """A row in `order` as stored -> float32 [4096, 12] in mV, in the order of `LEADS`. `raw` may be overwritten."""
    with np.errstate(over="ignore", invalid="ignore"):
        if raw.dtype == np.float32 and raw.flags.writeable and raw.dtype.isnative and raw.base is None:
            signal = np.divide(raw, np.float32(scale), out=raw)
        else:
            signal = (raw / scale).astype(np.float32)
    return signal if tuple(order) == LEADS else signal[:, [order.index(lead) for lead in LEADS]]


def source_of(raw: np.ndarray, record_id: str) -> bytes:
    """sha256 of the row as it lies in the file, then of its id."""
    digest = hashlib.sha256(np.ascontiguousarray(raw))
    digest.update(record_id.encode())
    return digest.digest()


def examine(
    where: str, sample: Iterable[np.ndarray], order: Sequence[str], level: float | None, scale: str | None
) -> dict[str, Any]:
    """Check `order` of the leads, and the unit, on some rows as stored; the facts for `about`.

    `level`: median R amplitude of lead II as published, in stored units (None: not published). `scale`: the option,
    None where the user did not give it. `DataError` where another order of the augmented leads fits the data and this
    one does not, or where the amplitude is that of another unit.
    """
    residuals: dict[tuple[str, ...], list[float]] = {}
    peaks: list[float] = []
    for raw in sample:
        x = np.asarray(raw, np.float64)
        if not np.abs(x).max() < ABSURD or not x[:, :6].any():  # nor is NaN
            continue
        start, stop = audit.observed(x)
        lead = x[start:stop, 1]
        peaks.append(float(lead.max() - np.median(lead)))
        for last in itertools.permutations(LEADS[3:6]):
            residuals.setdefault((*LEADS[:3], *last), []).append(_residual(x, last))
    if not peaks:
        return {"lead_order": " ".join(order), "lead_order_checked_on": 0}
    fit = {one: float(np.median(values)) for one, values in residuals.items()}
    best = min(fit, key=fit.__getitem__)
    mine = fit[tuple(order[:6])]
    if mine > EINTHOVEN or mine > fit[best]:
        found = f"order {' '.join(best)}" if fit[best] <= EINTHOVEN else "no order of the limb leads"
        raise DataError(
            f"{where}: {found} fits the data of {len(peaks)} rows, and not {' '.join(order[:6])} as published "
            f"(Einthoven residual {mine:.2f}); is this the published file?"
        )
    peak = float(np.median(peaks))
    if level and scale is None and len(peaks) >= _SAMPLE and not level / math.sqrt(2) <= peak <= level * 2:
        raise DataError(
            f"{where}: lead II peaks at {peak:.3g} (median of {len(peaks)} rows) and at {level} as published: another "
            f"unit? Say scale=1 if these are mV, or scale={SCALE:g} if they are as published after all"
        )
    return {
        "lead_order": " ".join(order),
        "lead_order_checked_on": len(peaks),
        "lead_order_residual": round(mine, 4),
        "lead_II_peak_stored": round(peak, 3),
    }


def _residual(x: np.ndarray, last: Sequence[str]) -> float:
    """How far columns 3-5 of [T, 12], read as the leads `last`, miss Einthoven's and Goldberger's equations."""
    y = x[:, [0, 1, 2, *(3 + last.index(lead) for lead in LEADS[3:6])]].T
    one, two = y[0], y[1]
    missed = np.stack([y[2] - (two - one), y[3] + (one + two) / 2, y[4] - (one - two / 2), y[5] - (two - one / 2)])
    return float(np.abs(missed).mean(axis=1).max() / max(np.abs(y).mean(axis=1).max(), 1e-12))


def spread(rows: int, count: int) -> list[int]:
    """`count` rows evenly over the file (all of them where there are fewer)."""
    return sorted({int(i) for i in np.linspace(0, rows - 1, min(count, rows))}) if rows else []
