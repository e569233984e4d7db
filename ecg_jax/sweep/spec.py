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

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecg_jax import config as config_lib
from ecg_jax.config import Config
from ecg_jax.errors import UsageError
from ecg_jax.models import ladder
from ecg_jax.sweep import values
from ecg_jax.sweep.values import REQUIRED

ARCHITECTURES = {"resnet1d": "R", "transformer": "T"}  # and the letter of their rungs
PARADIGMS = {"SL": "supervised", "SSL": "masked_codes"}
SPLITS = ("train", "val", "test")
CONDITIONS = ("architectures", "paradigms", "inputs", "data", "rungs")


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
        "order": (values.one_of("cheap", "long"), "cheap"),
        "run": (values.mapping, {}),
        "data": (values.mapping, REQUIRED),
        "grid": (values.mappings, REQUIRED),
        "tuning": (values.mappings, ()),
        "set": (values.mappings, ()),
        "probe": (values.mappings, ()),
        "codebook": (values.mapping, None),
        "slurm": (values.mapping, {}),
    }
    found = values.read(tree, top, where)
    data = {
        name: _data(name, values.mapping(entry, f"{where}: data.{name}"), where)
        for name, entry in found["data"].items()
    }
    named = values.names(*data)
    grids = tuple(_grid(entry, named, f"{where}: [[grid]] {i}") for i, entry in enumerate(found["grid"], 1))
    tunings = tuple(_tuning(entry, named, f"{where}: [[tuning]] {i}") for i, entry in enumerate(found["tuning"], 1))
    if len({t.data for t in tunings}) < len(tunings):
        raise UsageError(f"{where}: two [[tuning]] of one data set; make them one")
    for i, entry in enumerate(found["set"], 1):
        values.read({k: v for k, v in entry.items() if k in CONDITIONS}, _conditions(named), f"{where}: [[set]] {i}")
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
    read = values.read({k: v for k, v in entry.items() if k in CONDITIONS}, _conditions(values.texts), "[[set]]")
    return all(wanted is None or about[name] in wanted for name, wanted in read.items())


# ------------------------------------------------------------------------------------------------- tables


def _data(name: str, entry: Mapping[str, Any], where: str) -> Data:
    where = f"{where}: [data.{name}]"
    kinds = {
        "folders": (values.texts, REQUIRED),
        "task": (values.text, ""),
        "records": (values.mapping, {}),
        "exclude": (values.text, None),
    }
    kinds["optional"] = (values.flag, False)
    found = values.read(entry, kinds, where)
    if not found["folders"]:
        raise UsageError(f"{where}: folders is empty")
    records = values.read(found.pop("records"), dict.fromkeys(SPLITS, (values.positive, None)), f"{where} records")
    return Data(name=name, records={k: v for k, v in records.items() if v is not None}, **found)


def _grid(entry: Mapping[str, Any], named: Callable, where: str) -> Grid:
    kinds = {
        "data": (lambda value, where: named([value], where)[0], REQUIRED),
        "architectures": (values.names(*ARCHITECTURES), tuple(ARCHITECTURES)),
        "paradigms": (values.names(*PARADIGMS), tuple(PARADIGMS)),
        "inputs": (values.names(*ladder.WORLDS), ("auto",)),
        "rungs": (values.rungs, REQUIRED),
        "subsets": (values.shares, (1.0,)),
        "offsets": (values.offsets, (0.0,)),
        "seeds": (values.wholes, (0,)),
    }
    return Grid(**values.read(entry, kinds, where))


def _tuning(entry: Mapping[str, Any], named: Callable, where: str) -> Tuning:
    kinds = {
        "data": (lambda value, where: named([value], where)[0], REQUIRED),
        "rungs": (values.rungs, REQUIRED),
        "subsets": (values.shares, REQUIRED),
        "rates": (values.rates, REQUIRED),
        "extensions": (values.whole, 3),
    }
    return Tuning(**values.read(entry, kinds, where))


def _probe(entry: Mapping[str, Any], named: Callable, where: str) -> Probe:
    kinds = {
        "folders": (values.texts, REQUIRED),
        "task": (values.text, REQUIRED),
        "data": (named, ()),
        "bootstrap": (values.positive, 1000),
        "optional": (values.flag, False),
    }
    return Probe(**values.read(entry, kinds, where))


def _book(entry: Mapping[str, Any], named: Callable, where: str) -> Book:
    where = f"{where}: [codebook]"
    found = values.read(
        entry, {"folder": (values.text, REQUIRED), "data": (named, ()), "run": (values.mapping, None)}, where
    )
    run = found["run"]
    if run is not None:
        if not found["data"]:
            raise UsageError(f"{where}: name the data that it is trained on, as data = [{named.known[0]!r}]")
        run = config_lib.from_dict(merge(run, {"objective": {"name": "codebook"}}), f"{where} run")
    return Book(found["folder"], found["data"], run)


def _conditions(named: Callable) -> dict[str, tuple[Callable, Any]]:
    known = {
        "architectures": values.names(*ARCHITECTURES),
        "paradigms": values.names(*PARADIGMS),
        "inputs": values.names("signal", "beats"),
    }
    return {name: (known.get(name, values.rungs if name == "rungs" else named), None) for name in CONDITIONS}


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
    at[key] = config_lib.parse_value(value.strip())
