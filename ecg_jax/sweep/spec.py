"""What a sweep is, read from TOML: a base configuration, data sets, grids, learning-rate trials, probes, a codebook.

    [run]                    what all runs share: the sections of a training configuration, [run.recipe] and so on
    [data.NAME]              folders, task, exclude, optional; records of each split, for planning before they are there
    [[grid]]                 data, architectures, paradigms, inputs, rungs, subsets, offsets, seeds: all combinations
    [[set]]                  a condition (architectures, paradigms, inputs, data, rungs) and settings where it holds
    [[tuning]]               data, rungs, subsets, rates, extensions: learning-rate trials, the same for every family
    [codebook]               folder; with [codebook.run] it is trained, on `data`, and codes are made, as first stages
    [[probe]]                folders, task, data: what finished runs of which pre-training data are probed on

Every key is checked. Knows nothing of what has been run. Invariant: a `Sweep` is a function of the file and the
overrides alone.
"""

import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ecg_jax import config as config_lib
from ecg_jax.config import Config
from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import ladder

ARCHITECTURES = {"resnet1d": "R", "transformer": "T"}  # and the letter of their rungs
PARADIGMS = {"SL": "supervised", "SSL": "masked_codes"}
SPLITS = ("train", "val", "test")
CONDITIONS = ("architectures", "paradigms", "inputs", "data", "rungs")
REQUIRED = object()


@dataclass(frozen=True)
class Data:
    """A pre-training data set. records: of each split, as the file states them. optional: its grids are left out, with
    a word, where its folders are not there.
    """

    name: str
    folders: tuple[str, ...]
    task: str
    records: Mapping[str, int]
    exclude: str | None
    optional: bool

    @property
    def wanted(self) -> bool:
        """Whether its grids count."""
        return not self.optional or all(Path(folder).is_dir() for folder in self.folders)


@dataclass(frozen=True)
class Grid:
    """A block of runs: all combinations. Rungs without their letter ("4", "d1")."""

    data: str
    architectures: tuple[str, ...]
    paradigms: tuple[str, ...]
    inputs: tuple[str, ...]
    rungs: tuple[str, ...]
    subsets: tuple[float, ...]
    offsets: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Tuning:
    """Learning-rate trials on one data set; rates ascending in one ratio."""

    data: str
    rungs: tuple[str, ...]
    subsets: tuple[float, ...]
    rates: tuple[float, ...]
    extensions: int  # rates that may be added at either end


@dataclass(frozen=True)
class Probe:
    """A task that encoders are probed on. data: the pre-training data of the runs that are; () for all."""

    folders: tuple[str, ...]
    task: str
    data: tuple[str, ...]
    bootstrap: int
    optional: bool  # left out, with a word, where its folders are not there

    @property
    def wanted(self) -> bool:
        """Whether it is asked for."""
        return not self.optional or all(Path(folder).is_dir() for folder in self.folders)


@dataclass(frozen=True)
class Book:
    """The codebook of all SSL runs. run: how it is trained, None where the folder must be there already."""

    folder: str
    data: tuple[str, ...]
    run: Config | None


@dataclass(frozen=True)
class Sweep:
    """The whole file. tree: as it was read, with overrides; `run` and `sets` are checked when a run is configured."""

    path: Path
    tree: Mapping[str, Any]
    order: str
    run: Mapping[str, Any]
    data: Mapping[str, Data]
    grids: tuple[Grid, ...]
    tunings: tuple[Tuning, ...]
    sets: tuple[Mapping[str, Any], ...]
    probes: tuple[Probe, ...]
    book: Book | None
    slurm: Mapping[str, Any]


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read `path`; `overrides` are `table.key=value`, as `run.train.batch=64` or `data.code.folders=["data/code15"]`.

    Raises UsageError naming file, table, key and remedy.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the path of a sweep's TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for text in overrides:
        _override(tree, text)
    return build(tree, Path(path))


def build(tree: Mapping[str, Any], path: Path) -> Sweep:
    """A `Sweep` of what a TOML file says; `path` is named in errors. Raises UsageError as `load`."""
    where = str(path)
    top = {
        "order": (_one_of("cheap", "long"), "cheap"),
        "run": (_mapping, {}),
        "data": (_mapping, REQUIRED),
        "grid": (_mappings, REQUIRED),
        "tuning": (_mappings, ()),
        "set": (_mappings, ()),
        "probe": (_mappings, ()),
        "codebook": (_mapping, None),
        "slurm": (_mapping, {}),
    }
    found = _read(tree, top, where)
    data = {name: _data(name, _mapping(entry, f"{where}: data.{name}"), where) for name, entry in found["data"].items()}
    named = _names(*data)
    grids = tuple(_grid(entry, named, f"{where}: [[grid]] {i}") for i, entry in enumerate(found["grid"], 1))
    tunings = tuple(_tuning(entry, named, f"{where}: [[tuning]] {i}") for i, entry in enumerate(found["tuning"], 1))
    if len({t.data for t in tunings}) < len(tunings):
        raise UsageError(f"{where}: two [[tuning]] of one data set; make them one")
    for i, entry in enumerate(found["set"], 1):
        _read({k: v for k, v in entry.items() if k in CONDITIONS}, _conditions(named), f"{where}: [[set]] {i}")
        config_lib.from_dict({k: v for k, v in entry.items() if k not in CONDITIONS}, f"{where}: [[set]] {i}")
    book = _book(found["codebook"], named, where) if found["codebook"] is not None else None
    if book is None and any("SSL" in grid.paradigms for grid in grids):
        raise UsageError(f'{where}: SSL runs need a [codebook]: name its folder, as folder = "books/own"')
    return Sweep(
        path=path,
        tree=tree,
        order=found["order"],
        run=found["run"],
        data=data,
        grids=grids,
        tunings=tunings,
        sets=tuple(found["set"]),
        probes=tuple(_probe(entry, named, f"{where}: [[probe]] {i}") for i, entry in enumerate(found["probe"], 1)),
        book=book,
        slurm=found["slurm"],
    )


def holds(entry: Mapping[str, Any], about: Mapping[str, str]) -> bool:
    """Whether the conditions of a [[set]] hold for a run, given as {condition: value}."""
    read = _read({k: v for k, v in entry.items() if k in CONDITIONS}, _conditions(_texts), "[[set]]")
    return all(wanted is None or about[name] in wanted for name, wanted in read.items())


# ------------------------------------------------------------------------------------------------- tables


def _data(name: str, entry: Mapping[str, Any], where: str) -> Data:
    where = f"{where}: [data.{name}]"
    kinds = {"folders": (_texts, REQUIRED), "task": (_text, ""), "records": (_mapping, {}), "exclude": (_text, None)}
    kinds["optional"] = (_flag, False)
    found = _read(entry, kinds, where)
    if not found["folders"]:
        raise UsageError(f"{where}: folders is empty")
    records = _read(found.pop("records"), dict.fromkeys(SPLITS, (_positive, None)), f"{where} records")
    return Data(name=name, records={k: v for k, v in records.items() if v is not None}, **found)


def _grid(entry: Mapping[str, Any], named: Callable, where: str) -> Grid:
    kinds = {
        "data": (lambda value, where: named([value], where)[0], REQUIRED),
        "architectures": (_names(*ARCHITECTURES), tuple(ARCHITECTURES)),
        "paradigms": (_names(*PARADIGMS), tuple(PARADIGMS)),
        "inputs": (_names(*ladder.WORLDS), ("auto",)),
        "rungs": (_rungs, REQUIRED),
        "subsets": (_shares, (1.0,)),
        "offsets": (_offsets, (0.0,)),
        "seeds": (_wholes, (0,)),
    }
    return Grid(**_read(entry, kinds, where))


def _tuning(entry: Mapping[str, Any], named: Callable, where: str) -> Tuning:
    kinds = {
        "data": (lambda value, where: named([value], where)[0], REQUIRED),
        "rungs": (_rungs, REQUIRED),
        "subsets": (_shares, REQUIRED),
        "rates": (_rates, REQUIRED),
        "extensions": (_whole, 3),
    }
    return Tuning(**_read(entry, kinds, where))


def _probe(entry: Mapping[str, Any], named: Callable, where: str) -> Probe:
    kinds = {
        "folders": (_texts, REQUIRED),
        "task": (_text, REQUIRED),
        "data": (named, ()),
        "bootstrap": (_positive, 1000),
        "optional": (_flag, False),
    }
    return Probe(**_read(entry, kinds, where))


def _book(entry: Mapping[str, Any], named: Callable, where: str) -> Book:
    where = f"{where}: [codebook]"
    found = _read(entry, {"folder": (_text, REQUIRED), "data": (named, ()), "run": (_mapping, None)}, where)
    run = found["run"]
    if run is not None:
        if not found["data"]:
            raise UsageError(f"{where}: name the data that it is trained on, as data = [{named.known[0]!r}]")
        run = config_lib.from_dict(merge(run, {"objective": {"name": "codebook"}}), f"{where} run")
    return Book(found["folder"], found["data"], run)


def _conditions(named: Callable) -> dict[str, tuple[Callable, Any]]:
    known = {
        "architectures": _names(*ARCHITECTURES),
        "paradigms": _names(*PARADIGMS),
        "inputs": _names("signal", "beats"),
    }
    return {name: (known.get(name, _rungs if name == "rungs" else named), None) for name in CONDITIONS}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, those `above` winning."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def _override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not tables or not key:
        raise UsageError(f"override {text!r} is not of the form table.key=value, as in run.train.batch=64")
    at = tree
    for table in tables:
        at = at.setdefault(table, {})
        if not isinstance(at, dict):
            raise UsageError(f"override {text!r}: {table!r} is no table that a word can change; edit the file")
    at[key] = config_lib._parse_value(value.strip())


# ------------------------------------------------------------------------------------------------- values


def _read(entry: Mapping[str, Any], kinds: Mapping[str, tuple[Callable, Any]], where: str) -> dict[str, Any]:
    """{key: value} of all of `kinds` (key -> (conversion, default)), nothing else allowed."""
    for key in entry:
        if key not in kinds:
            hint = did_you_mean(key, list(kinds)) or f"; known: {', '.join(kinds)}"
            raise UsageError(f"{where}: unknown key {key!r}{hint}")
    for key, (_, default) in kinds.items():
        if default is REQUIRED and key not in entry:
            raise UsageError(f"{where}: {key} is missing")
    return {k: kind(entry[k], f"{where}: {k}") if k in entry else default for k, (kind, default) in kinds.items()}


def _bad(where: str, value: Any, want: str) -> UsageError:
    return UsageError(f"{where} = {value!r}: must be {want}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _bad(where, value, "a string")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(where, value, "true or false")
    return value


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(where, value, "a whole number, 0 or more")
    return value


def _positive(value: Any, where: str) -> int:
    if _whole(value, where) < 1:
        raise _bad(where, value, "1 or more")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(where, value, "a table of key = value lines")
    return value


def _mappings(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise _bad(where, value, "written with double brackets, one [[...]] for each")
    return tuple(value)


def _many(value: Any, where: str, want: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _bad(where, value, want)
    if len({repr(item) for item in value}) < len(value):
        raise UsageError(f"{where} = {value!r}: names something twice")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in _many(value, where, 'a list of strings, as ["a", "b"]'))


def _names(*known: str) -> Callable[[Any, str], tuple[str, ...]]:
    def convert(value: Any, where: str) -> tuple[str, ...]:
        for item in _texts(value, where):
            if item not in known:
                raise UsageError(f"{where}: {item!r} is none of {', '.join(known)}{did_you_mean(item, known)}")
        return tuple(value)

    convert.known = known
    return convert


def _one_of(*known: str) -> Callable[[Any, str], str]:
    return lambda value, where: _names(*known)([value], where)[0]


def _wholes(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_whole(item, where) for item in _many(value, where, "a list of whole numbers"))


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    out = []
    for item in _many(value, where, 'a list of numbers, as [0.1, "1/3"]'):
        try:
            out.append(float(Fraction(item)) if isinstance(item, str) else float(item))
        except (TypeError, ValueError, ZeroDivisionError):
            raise _bad(where, item, 'a number, or a fraction as "1/3"') from None
    return tuple(out)


def _shares(value: Any, where: str) -> tuple[float, ...]:
    found = _numbers(value, where)
    if not all(0 < share <= 1 for share in found):
        raise _bad(where, value, "shares in (0, 1]")
    return found


def _offsets(value: Any, where: str) -> tuple[float, ...]:
    found = _numbers(value, where)
    if not all(0 <= offset < 1 for offset in found):
        raise _bad(where, value, "places in [0, 1)")
    return found


def _rates(value: Any, where: str) -> tuple[float, ...]:
    """At least two, ascending in one ratio up to rounding: only then is it clear how the grid goes on at its edges."""
    rates = _numbers(value, where)
    good = len(rates) > 1 and rates[0] > 0 and rates[1] > rates[0]
    ratio = rates[1] / rates[0] if good else 1.0
    if not good or any(abs(b / a / ratio - 1) > 0.2 for a, b in itertools.pairwise(rates)):
        raise _bad(where, value, "at least two rates that ascend in one ratio, as [1e-3, 3e-3, 1e-2]")
    return rates


def _rungs(value: Any, where: str) -> tuple[str, ...]:
    """Whole numbers, "d1" (a demonstration rung), or "1-8"."""
    out: list[str] = []
    for item in [value] if isinstance(value, str) else _many(value, where, 'a list of rungs, as [1, 2] or "1-8"'):
        first, dash, last = str(item).partition("-")
        known = not isinstance(item, bool) and (
            first.isdigit() and last.isdigit() if dash else f"R{first}" in ladder.RUNGS
        )
        if not known:
            raise UsageError(f'{where}: {item!r} is no rung; write 1 to 12, "1-8", or "d1"')
        out += [str(n) for n in range(int(first), int(last) + 1)] if dash else [first]
    if not out or any(f"R{rung}" not in ladder.RUNGS for rung in out) or len(set(out)) < len(out):
        raise _bad(where, value, "rungs from 1 to 12, each once")
    return tuple(out)
