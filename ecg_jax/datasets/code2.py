"""CODE-II (open and test sets), by a manifest of your own: its files are not published in a form known here.

What is documented: CC BY-NC-SA 4.0; the open set has 15,000 exams of 15,000 patients in a fixed 12,000 train and 3,000
validation, the test set 8,475 exams without labels; recordings of 7 to 12 s at 300 to 1000 Hz. File format, lead order
and unit are not, so none is assumed: a manifest says them, in TOML (or a CSV file with the columns key and value).

Option (`--option key=value`): manifest=FILE, relative to SOURCE or absolute; default SOURCE/manifest.toml. Its keys:

    format = "hdf5"         hdf5, wfdb, npy, csv or mat: how the recordings are stored
    labels = "exams.csv"    and every other option of `ecg-jax convert FORMAT` (shown by its --describe) by name: id,
    rate = 400              patient, tasks, binary, split, path, dataset, ids, unit, leads, ... A list may be one of
    "labels.dx" = ["a"]     TOML's, on and off may be true and false
    scale = 2               what the stored values are divided by, beyond the unit; default 1
    set = "open"            open or test: the counts above are checked
    split_values = ["valid=val"]    what the cells of the split column mean, where they are not train, val and test

Example of a manifest:

    format = "hdf5"
    set = "open"
    labels = "exams.csv"
    id = "exam_id"
    patient = "patient_id"
    ignore = ["hospital"]
    binary = ["AF", "ST"]
    split = "partition"
    split_values = ["train=train", "valid=val"]
    dataset = "tracings"
    ids = "exam_id"
    rate = 400
    unit = "mV"

Invariant: what is converted is what FORMAT makes of the same options, each signal divided by `scale`.
"""

import hashlib
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options, own
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import need_columns, read_table
from ecg_jax.errors import DataError, did_you_mean
from ecg_jax.records.record import Record, Refused

OPTIONS = ("manifest",)
FORMATS: dict[str, Callable[[Path, dict[str, str]], Source]] = {
    "hdf5": own.open_hdf5,
    "wfdb": own.open_wfdb,
    "npy": own.open_npy,
    "csv": own.open_csv,
    "mat": own.open_mat,
}
SETS = {"open": {"train": 12_000, "val": 3_000}, "test": {"test": 8_475}}
SPLITS = ("train", "val", "test")
_MANIFEST = 1 << 20  # bytes


def open_code2(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the recordings that the manifest describes; the module's docstring says how.

    Raises `UsageError` for options (those of the format too, which the manifest gives), `DataError` for the manifest,
    for the table, and where the counts are not those of the set that the manifest names.
    """
    check_options("code2", options, OPTIONS)
    path = source_dir / options.get("manifest", "manifest.toml")
    keys, digest = _manifest(path)
    kind, which = _choice(path, keys, "format", FORMATS), _choice(path, keys, "set", SETS, needed=False)
    scale = _scale(path, keys.pop("scale", "1"))
    meaning = _meaning(path, keys.pop("split_values", ""))
    column = keys.get("split")
    if meaning:
        if column is None:
            raise DataError(f"{path}: split_values without split, the column that has them")
        keys["ignore"] = ",".join(filter(None, [keys.get("ignore", ""), keys.pop("split")]))
    keys = {"name": "code2"} | keys
    source = FORMATS[kind](source_dir, keys)
    if meaning:
        source = replace(source, items=_split(source, source_dir, keys, column, meaning))
    if scale != 1:
        source = replace(source, read=partial(_read, source.read, scale))
    if which == "test":
        source = replace(source, items=pack(replace(item, split="test") for item in source.items))
    found = Counter(item.split for item in source.items)
    if which:
        _check(path, which, source, found)
    about = source.about | {
        "manifest_sha256": digest,
        "format": kind,
        "set": which,
        "scale": scale,
        "split_values": meaning,
        "splits": {split or "by hash of the patient": n for split, n in found.items()},
        "licence": "CC BY-NC-SA 4.0 (open and test sets), not for commercial use",
    }
    return replace(source, about=about)


def _manifest(path: Path) -> tuple[dict[str, str], str]:
    """(key -> value as an option, sha256)."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MANIFEST + 1)
    except FileNotFoundError:
        raise DataError(f"there is no {path}; CODE-II needs a manifest (`--describe` shows one)") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if len(content) > _MANIFEST:
        raise DataError(f"{path} is longer than any manifest")
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix.lower() == ".csv":
        table = read_table(path)
        need_columns(table, ("key", "value"))
        values = [(row["key"], row["value"]) for row in table.rows]
        twice = [key for key, times in Counter(key for key, _ in values).items() if times > 1]
        if twice:
            raise DataError(f"{path}: key {twice[0]!r} is there twice")
        return dict(values), digest
    try:
        found = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{path} is not TOML: {' '.join(str(error).split())[:160]}") from None
    return {key: _text(path, key, value) for key, value in found.items()}, digest


def _text(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str) and "," not in one for one in value):
        return ",".join(value)
    raise DataError(f"{path}: {key!r} must be a text, a number, true, false, or a list of texts without commas")


def _choice(path: Path, keys: dict[str, str], key: str, known: dict[str, Any], needed: bool = True) -> str | None:
    value = keys.pop(key, None)
    if value is None and not needed:
        return None
    if value not in known:
        hint = did_you_mean(value or "", list(known))
        said = f"{key} = {value!r}{hint}" if value else f"{key} is not said"
        raise DataError(f"{path}: {said}; known are {', '.join(known)}")
    return value


def _scale(path: Path, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1e-9 <= scale <= 1e9:
        raise DataError(f"{path}: scale = {text!r} must be a positive number, the stored values over the unit")
    return scale


def _meaning(path: Path, text: str) -> dict[str, str]:
    """ "valid=val,train=train" -> cell -> split."""
    meaning: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        cell, mark, split = (part.strip() for part in pair.partition("="))
        if not mark or split not in SPLITS or cell in meaning:
            raise DataError(
                f"{path}: split_values: {pair.strip()!r} is not of the form cell=train, cell=val, cell=test"
            )
        meaning[cell] = split
    return meaning


def _split(
    source: Source, source_dir: Path, keys: dict[str, str], column: str, meaning: dict[str, str]
) -> Sequence[Item]:
    table = read_table(source_dir / keys.get("labels", "labels.csv"))
    need_columns(table, (column,))
    split_of = {}
    for i in range(len(table.rows)):
        row = table.row(i)
        if row[column] not in meaning:
            raise DataError(f"{row.where}: {column}={row[column]!r} is not in split_values ({', '.join(meaning)})")
        split_of[row[keys.get("id", "record")]] = meaning[row[column]]
    return pack(replace(item, split=split_of[item.record_id]) for item in source.items)


def _check(path: Path, which: str, source: Source, found: Counter) -> None:
    """`DataError` unless the items are as many as the set has, and, in the open set, each of another patient."""
    wanted = SETS[which]
    if found != wanted and not (set(found) == {None} and found.total() == sum(wanted.values())):
        shown = ", ".join(f"{n} {split or 'without split'}" for split, n in sorted(found.items(), key=str))
        official = ", ".join(f"{n} {split}" for split, n in wanted.items())
        raise DataError(f"{path}: set = {which!r} has {official}; found are {shown}")
    if which == "open":
        patients = len({item.group for item in source.items})
        if patients != found.total():
            raise DataError(f"{path}: set = 'open' has an exam a patient; found are {patients} patients")


def _read(read: Callable, scale: float, items: Sequence[Item]) -> Iterator[Record | Refused]:
    for result in read(items):
        if isinstance(result, Refused):
            yield result
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                yield replace(result, signal=result.signal / np.float32(scale))
