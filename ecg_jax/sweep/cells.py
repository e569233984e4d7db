"""The runs of a sweep: every combination its grids name, once, with a name and a training configuration each.

Reads cards for the number of records where data folders are there, else believes the sweep's file, so that a sweep can
be planned before anything is downloaded. Chooses no learning rate. Invariant: cells of equal name have equal
configurations but for the learning rate.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ecg_jax import config as config_lib
from ecg_jax.config import Config
from ecg_jax.errors import DataError, UsageError
from ecg_jax.models import ladder
from ecg_jax.sweep.spec import ARCHITECTURES, PARADIGMS, SPLITS, Data, Sweep, holds, merge


@dataclass(frozen=True)
class Cell:
    """One place of the grid; `rung` with its letter, `input` settled."""

    data: str
    rung: str
    input: str
    paradigm: str
    subset: float = 1.0
    offset: float = 0.0
    seed: int = 0

    @property
    def architecture(self) -> str:
        return ladder.get(self.rung).family

    @property
    def family(self) -> tuple[str, str, str]:
        """What laws are fitted to: architecture, paradigm, input."""
        return self.architecture, self.paradigm, self.input

    @property
    def name(self) -> str:
        share, offset = f"D{100 * self.subset:g}", f"o{round(100 * self.offset)}"
        return "-".join((self.rung, self.input, self.paradigm, self.data, share, offset, f"s{self.seed}"))


def cell(data: str, architecture: str, paradigm: str, world: str, rung: str, *place: float) -> Cell:
    """The `Cell` of values as a sweep's file has them."""
    full = ARCHITECTURES[architecture] + rung
    return Cell(data, full, ladder.for_input(ladder.get(full), world).input, paradigm, *place)


def expand(sweep: Sweep) -> list[Cell]:
    """All cells in the order of the file, each once; optional data that are not there have none.

    Raises UsageError where two cells would have one name.
    """
    found: dict[str, Cell] = {}
    for grid in sweep.grids:
        if not sweep.data[grid.data].wanted:
            continue
        axes = (grid.architectures, grid.paradigms, grid.inputs, grid.rungs, grid.subsets, grid.offsets, grid.seeds)
        for values in itertools.product(*axes):
            one = cell(grid.data, *values)
            if one != found.setdefault(one.name, one):
                raise UsageError(f"{sweep.path}: subsets or offsets too close to tell apart: two runs named {one.name}")
    return list(found.values())


def configure(sweep: Sweep, one: Cell, lr: float | None = None, base_width: int = 0) -> Config:
    """The training configuration of a cell: [run], the [[set]]s that hold, the cell itself, the rate.

    lr None: as the file has it. Raises UsageError as `config.load`.
    """
    tree = sweep.run
    about = {"architectures": one.architecture, "paradigms": one.paradigm, "inputs": one.input, "data": one.data}
    about["rungs"] = one.rung[1:]
    for entry in sweep.sets:
        if holds(entry, about):
            tree = merge(tree, {key: value for key, value in entry.items() if key not in about})
    data = sweep.data[one.data]
    own = {
        "data": {"folders": list(data.folders), "subset": one.subset, "subset_offset": one.offset},
        "model": {"rung": one.rung, "input": one.input},
        "objective": {"name": PARADIGMS[one.paradigm]},
        "train": {"seed": one.seed},
    }
    if data.exclude:
        own["data"]["exclude"] = data.exclude
    if one.paradigm == "SL":
        own["data"]["task"] = data.task
        if not data.task:
            raise UsageError(f"{sweep.path}: [data.{one.data}]: SL runs need a task")
    else:
        own["objective"]["codebook"] = sweep.book.folder
    if lr is not None:
        own["optim"] = {"lr": lr} | ({"base_width": base_width} if base_width else {})
    return config_lib.from_dict(merge(tree, own), f"{sweep.path}, run {one.name}")


def counts(data: Data) -> tuple[Mapping[str, int], str]:
    """Records of train, val and test, and where the numbers are from: "the card", or "the sweep's file".

    Raises DataError where there are neither folders nor numbers.
    """
    return _counts(data.folders, tuple(sorted(data.records.items())), data.name)


@functools.cache
def _counts(folders: tuple[str, ...], stated: tuple, name: str) -> tuple[Mapping[str, int], str]:
    from ecg_jax.shards import catalog

    if all(Path(folder).is_dir() for folder in folders):
        cards = [catalog.open_folder(Path(folder)).card for folder in folders]
        return {s: sum(card["splits"].get(s, {}).get("records", 0) for card in cards) for s in SPLITS}, "the card"
    missing = [split for split in SPLITS if split not in dict(stated)]
    if missing:
        raise DataError(
            f"{folders[0]}: no such folder, and [data.{name}] states no records.{missing[0]}; convert the data set, or "
            "state the records of train, val and test to plan without it"
        )
    return dict(stated), "the sweep's file"


def size(sweep: Sweep, one: Cell) -> int:
    """Training records of a cell, about (subsets are whole patients)."""
    return max(1, round(one.subset * counts(sweep.data[one.data])[0]["train"]))


def columns(one: Cell) -> dict[str, object]:
    """What a table says of a cell, and its number of parameters."""
    arch = ladder.for_input(ladder.get(one.rung), one.input)
    return {"architecture": one.architecture, "n_params": ladder.count(arch)} | asdict(one)
