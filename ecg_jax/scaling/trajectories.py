"""Loss against step of the runs whose folders were given: reads `metrics.jsonl`, draws nothing.

Each line is an object with `step` and, where it has them, the training and the validation loss. Invariant:
a folder without a readable `metrics.jsonl` simply has no trajectory; a fit never fails for the want of a
picture.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.table import Table

TRAIN = ("loss", "train_loss", "train/loss", "train_bce")
VALIDATION = ("val_loss", "val/loss", "val_bce", "val/bce", "validation_loss")


@dataclass(frozen=True)
class Trajectory:
    """One run: what it is, and (step, loss) pairs of training and validation."""

    run: str
    family: tuple[str, str, str]
    n_params: float
    n_records: float
    train: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]


def load(table: Table, sets: Sequence[RunSet]) -> list[Trajectory]:
    """Trajectories of all run folders of `table`, by family, size and data."""
    folders = set(table.runs)
    known: dict[Path, tuple] = {}
    for runs in sets:
        for i, folder in enumerate(runs.folders):
            if folder in folders:
                known.setdefault(folder, (runs.runs[i], runs.key.family, runs.n_params[i], runs.n_records[i]))
    found = []
    for folder, (run, family, n_params, n_records) in known.items():
        train, validation = _read(folder / "metrics.jsonl")
        if len(train) > 1 or len(validation) > 1:
            found.append(Trajectory(run, family, float(n_params), float(n_records), train, validation))
    return sorted(found, key=lambda t: (t.family, t.n_params, t.n_records, t.run))


def _read(path: Path) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return (), ()
    curves: tuple[list, list] = ([], [])
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a killed run may end in the middle of a line
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int | float):
            continue
        for curve, names in zip(curves, (TRAIN, VALIDATION), strict=True):
            values = [row[n] for n in names if isinstance(row.get(n), int | float)]
            if values and math.isfinite(values[0]) and values[0] > 0:
                curve.append((float(step), float(values[0])))
    return tuple(curves[0]), tuple(curves[1])
