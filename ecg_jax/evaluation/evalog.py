"""The eval log: one row per number that a law or a table may use, as JSONL (or CSV) that anyone can read or
write.

`FIELDS` is the whole contract: names, kinds, which are required, and what a missing one means. `row` is
strict and makes rows; `append` keeps one row per key in a file, atomically; `read` takes files or run
folders, ours or foreign. Knows nothing of how a number was made. Invariant: whatever stands in a file was
checked by `row`'s rules.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecg_jax import files
from ecg_jax.errors import DataError, did_you_mean

SCHEMA_VERSION = 1
NAME = "evals.jsonl"  # in a run folder
REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """kind: str, int or float. default: what an absent value means; None is "not known". REQUIRED has
    none.
    """

    kind: type
    default: Any = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


STATUS = ("done", "unconverged", "diverged", "interrupted")
DOMAINS = ("id", "ood_seen", "ood_unseen", "contaminated")

FIELDS: dict[str, Field] = {
    "schema_version": Field(int, SCHEMA_VERSION),
    "run": Field(str, REQUIRED),
    "architecture": Field(str, REQUIRED),
    "paradigm": Field(str, REQUIRED),
    "input": Field(str, "signal"),
    "objective": Field(str),
    "codebook": Field(str),
    "pool": Field(str),
    "n_params": Field(int, REQUIRED),  # the encoder
    "n_params_total": Field(int),
    "n_params_nonembedding": Field(int),
    "n_records": Field(int, REQUIRED),
    "n_patients": Field(int),
    "examples_seen": Field(int),
    "epochs": Field(float),
    "subset_offset": Field(float, 0.0),
    "flops": Field(float),
    "seed": Field(int, 0),
    "lr": Field(float),
    "trial": Field(int, 0),
    "status": Field(str, "done", STATUS),
    "step": Field(int),
    "selection": Field(str, "best-val"),
    "dataset": Field(str, REQUIRED),
    "task": Field(str, REQUIRED),
    "label": Field(str, "macro"),
    "split": Field(str, "test"),
    "domain": Field(str, "id", DOMAINS),
    "probe": Field(str),
    "label_fraction": Field(float, 1.0),
    "probe_seed": Field(int, 0),
    "metric": Field(str, REQUIRED),
    "value": Field(float, REQUIRED),  # empty only where the run diverged
    "ci_low": Field(float),
    "ci_high": Field(float),
    "n_examples": Field(int),
    "n_labels": Field(int),  # labels in a macro
    "floor": Field(float),  # known irreducible loss of the scored records, nats
    "prior": Field(float),  # loss of the constant predictor at the training split's prevalence, nats
    "lineage": Field(str),
}
KEY = ("run", "dataset", "task", "label", "split", "metric", "probe", "label_fraction", "probe_seed", "step")
RUN_FIELDS = tuple(FIELDS)[1 : tuple(FIELDS).index("dataset")]  # what is the same in all rows of a run
# A task may mix domains and its macro is logged in each; a run's best checkpoint may also be its last one.
STORE_KEY = (*KEY, "domain", "selection")


def row(**fields: Any) -> dict[str, Any]:
    """A complete row: every field of `FIELDS` in that order, defaults filled in, `schema_version` set.

    Raises DataError for an unknown field, a missing required one, a wrong kind, a value that is no finite
    number (allowed only with status "diverged"), or an interval that does not hold its point.
    """
    for name in fields:
        if name not in FIELDS:
            raise DataError(f"eval log has no field {name!r}{did_you_mean(name, list(FIELDS))}")
    return _checked(fields)


def key(entry: Mapping[str, Any]) -> tuple:
    """What makes two rows the same row in a file."""
    return tuple(entry[name] for name in STORE_KEY)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add `rows` to the log at `path`; a row with the key of an older one takes its place.

    The file is replaced as a whole: a reader or a kill sees the old or the new log. Raises DataError for a
    bad row (nothing is written then), MachineError where the disk refuses.
    """
    kept = {key(entry): entry for entry in _entries(path)} if path.exists() else {}
    kept |= {key(entry): entry for entry in (row(**fields) for fields in rows)}
    lines = (json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n" for entry in kept.values())
    files.write(path, "".join(lines))


def read(paths: Path | Sequence[Path], columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """All rows of JSONL or CSV files, or of the run folders below the folders given; complete, as `row` makes
    them.

    `columns` names our field -> their column. Columns that the log does not know are left out. Rows equal in
    `key` count once, the later one. Raises DataError with file and line for a row that cannot be read, and
    for a path without any log.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for file in _files(Path(path)):
            for entry in _entries(file, columns or {}):
                rows[key(entry)] = entry
    return list(rows.values())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = sorted(path.rglob(NAME))
    if not found:
        raise DataError(f"{path}: no {NAME} in it or below it; train a run, or give a JSONL or CSV file")
    return found


def _entries(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    for line, raw in _csv_lines(path) if path.suffix.lower() == ".csv" else _json_lines(path):
        for theirs in (columns or {}).values():
            if theirs not in raw:
                raise DataError(f"{path}:{line}: no column {theirs!r}{did_you_mean(theirs, list(raw))}")
        renamed = {ours: raw[theirs] for ours, theirs in (columns or {}).items()}
        taken = set((columns or {}).values())
        found = {name: value for name, value in raw.items() if name in FIELDS and name not in taken} | renamed
        try:
            yield _checked(found)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
            if not isinstance(entry, dict):
                raise DataError(f"{path}:{number}: a row is a JSON object, not {type(entry).__name__}")
            yield number, entry


def _csv_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for entry in reader:
            if None in entry or None in entry.values():
                raise DataError(f"{path}:{reader.line_num}: not as many cells as the head line has columns")
            yield reader.line_num, entry


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, field in FIELDS.items():
        value = found.get(name)
        value = None if value is None or value == "" else _as(field.kind, value, name)
        if value is None:
            value = None if field.required else field.default
        if field.choices and value is not None and value not in field.choices:
            raise DataError(f"{name} is {value!r}, not one of {', '.join(field.choices)}")
        entry[name] = value
    missing = [name for name, field in FIELDS.items() if field.required and entry[name] is None]
    if missing and (missing != ["value"] or entry["status"] != "diverged"):
        raise DataError(f"required field{'s' * (len(missing) > 1)} missing: {', '.join(missing)}")
    if entry["schema_version"] > SCHEMA_VERSION:
        raise DataError(f"schema_version {entry['schema_version']}, but this version reads up to {SCHEMA_VERSION}")
    low, value, high = entry["ci_low"], entry["value"], entry["ci_high"]
    if value is not None and ((low is not None and low > value) or (high is not None and high < value)):
        raise DataError(f"value {value!r} lies outside its interval [{low!r}, {high!r}]")
    return entry


def _as(kind: type, value: Any, name: str) -> Any:
    if kind is str:
        if isinstance(value, str):
            return value
        raise DataError(f"{name} is {value!r}, not text")
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        raise DataError(f"{name} is {value!r}, not a number") from None
    if math.isnan(number) and name == "value" and not isinstance(value, bool):
        return None  # accepted or refused by status
    if not math.isfinite(number):
        raise DataError(f"{name} is {value!r}, not a finite number")
    if kind is int and number != int(number):
        raise DataError(f"{name} is {value!r}, not a whole number")
    return int(value) if kind is int and isinstance(value, int) else kind(number)
