"""Groups checked rows into sets that one law is fitted to: one family (architecture x paradigm x input) on
one task.

Repeated seeds of a configuration (N, D) stay separate rows, and their spread is the noise everything else
is measured against. Runs that diverged or did not converge stay in, flagged. Where a run has several rows
for the same thing, one is used: the checkpoint chosen on `val` before the last step, the `test` split
before others, the latest step, the mean over probe seeds.

It does not fit. Invariant: one row per run and set; what was passed over is counted in
`RunSet.passed_over`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.scaling.table import Table

SELECTIONS = ("best-val", "best", "final", "last")  # first one present wins
ARRAYS = ("n_params", "n_records", "loss", "converged", "floor", "prior", "examples", "error", "id_loss", "flops")
SPLITS = ("test", "val", "validation", "train")


@dataclass(frozen=True)
class SetKey:
    """What one law is fitted to."""

    architecture: str
    paradigm: str
    input: str
    dataset: str
    task: str
    domain: str
    metric: str
    probe: str
    label_fraction: float

    @property
    def family(self) -> tuple[str, str, str]:
        return self.architecture, self.paradigm, self.input

    @property
    def measured(self) -> tuple[str, ...]:
        """What was measured, whatever the family: the same for all families of a comparison."""
        return self.dataset, self.task, self.domain, self.metric, self.probe, str(self.label_fraction)


@dataclass(frozen=True)
class RunSet:
    """Runs of one family on one task, [n] each; `loss` > 0, `converged` False for flagged runs."""

    key: SetKey
    n_params: np.ndarray
    n_records: np.ndarray
    loss: np.ndarray
    converged: np.ndarray
    floor: np.ndarray  # NaN where not known
    prior: np.ndarray
    runs: tuple[str, ...]
    status: tuple[str, ...]
    folders: tuple[Path, ...]  # where each run's row was read: its run folder, if it has one
    split: str
    selection: str
    passed_over: dict[str, int]
    mixed: tuple[str, ...]  # columns that should be one per family and are not
    examples: np.ndarray  # records read in training, repeats counted; NaN where not stated
    spread: dict[str, tuple[float, int]] = field(default_factory=dict)  # see `spread`
    error: np.ndarray | None = None  # standard error of ln L from the evaluation's interval, NaN where not stated
    id_loss: np.ndarray | None = None  # the run's ID loss, NaN where the log has none
    flops: np.ndarray | None = None  # of the training, NaN where not stated

    @property
    def n(self) -> int:
        return len(self.loss)

    @property
    def cells(self) -> np.ndarray:
        """Number of each run's configuration (N, D), [n]."""
        pairs = np.stack([self.n_params, self.n_records], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def sizes(self) -> np.ndarray:
        return np.unique(self.n_params)

    @property
    def data(self) -> np.ndarray:
        return np.unique(self.n_records)

    def log_x(self, variables: Sequence[str]) -> np.ndarray:
        """ln of the variables of a law, [n, V]; with U in it D is what was read and U the distinct records."""
        columns = {"N": self.n_params, "D": self.n_records, "L": self.id_loss}
        if "U" in variables:
            columns = {"N": self.n_params, "D": self.examples, "U": self.n_records}
        return np.log(np.stack([columns[v] for v in variables], axis=1))

    def only(self, rows: np.ndarray) -> "RunSet":
        """The same set with a boolean or integer selection of rows."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        arrays = {f: getattr(self, f)[rows] for f in ARRAYS if getattr(self, f) is not None}
        words = {f: tuple(getattr(self, f)[i] for i in rows) for f in ("runs", "status", "folders")}
        return replace(self, **arrays, **words)

    def known_floor(self) -> float | None:
        """The irreducible loss that the log states, or None where any run lacks it."""
        return float(np.mean(self.floor)) if np.all(np.isfinite(self.floor)) else None


@dataclass(frozen=True)
class SeedNoise:
    """Spread among repeated seeds: standard deviation of ln L, of L, and their degrees of freedom."""

    log: float
    absolute: float
    df: int
    pooled_over: int  # families whose repeats went in


def seed_noise(sets: Sequence[RunSet]) -> SeedNoise | None:
    """Pooled within configurations (and families, where several sets are given); None without repeats."""
    log_ss = absolute_ss = 0.0
    df = contributing = 0
    for runs in sets:
        before = df
        cells = runs.cells
        for cell in np.unique(cells):
            losses = runs.loss[(cells == cell) & runs.converged]
            if len(losses) > 1:
                log_ss += float(np.sum((np.log(losses) - np.log(losses).mean()) ** 2))
                absolute_ss += float(np.sum((losses - losses.mean()) ** 2))
                df += len(losses) - 1
        contributing += df > before
    if not df:
        return None
    return SeedNoise((log_ss / df) ** 0.5, (absolute_ss / df) ** 0.5, df, contributing)


def group(table: Table, *, trials: bool = False) -> list[RunSet]:
    """One `RunSet` per family and measured thing: the ID losses first, then by data set, task, domain and
    family. `trials`: with all tuning trials, not only the best of each configuration."""
    buckets: dict[SetKey, list[Mapping[str, Any]]] = defaultdict(list)
    for row in table.rows:
        key = SetKey(
            row["architecture"], row["paradigm"], row["input"], row["dataset"], row["task"], row["domain"],
            row["metric"], row["probe"], row["label_fraction"],
        )  # fmt: skip
        buckets[key].append(row)
    beaten = set() if trials else {run for ranked in ranked_trials(table) for run in ranked[1:]}
    sets = [_run_set(key, rows, beaten) for key, rows in buckets.items()]
    home: dict[tuple, dict[str, float]] = {}
    for s in sets:
        if s.key.domain == "id":
            home.setdefault(s.key.family, {}).update(zip(s.runs, s.loss.tolist(), strict=True))
    sets = [replace(s, id_loss=np.array([home.get(s.key.family, {}).get(run, np.nan) for run in s.runs])) for s in sets]
    return sorted(
        sets,
        key=lambda s: (s.key.domain != "id", s.key.measured, s.key.paradigm, s.key.input, s.key.architecture),
    )


def ranked_trials(table: Table) -> list[list[str]]:
    """For each configuration (family, N, D, seed, subset) with several tuning trials its runs, best first.

    Trials are told apart by their number, or where the log has none by their learning rate: another rate is no
    repeat. The best is the one with the lowest ID loss, on `val` where the log has that split; a configuration whose
    trials have no ID loss keeps them all. OOD losses never rank.
    """
    found: dict[tuple, dict[str, tuple[int, float]]] = defaultdict(dict)
    trials: dict[tuple, set] = defaultdict(set)
    for r in table.rows:
        which = r["lr"] if r["trial"] is None else r["trial"]
        if r["domain"] != "id" or which is None:
            continue
        family = r["architecture"], r["paradigm"], r["input"], r["dataset"], r["metric"]
        cell = *family, r["n_params"], r["n_records"], str(r["seed"]), str(r["subset_offset"])
        score = (r["split"] != "val", r["value"])
        found[cell][r["run"]] = min(score, found[cell].get(r["run"], score))
        trials[cell].add(str(which))
    return [sorted(runs, key=runs.get) for cell, runs in found.items() if len(trials[cell]) > 1 and len(runs) > 1]


def _run_set(key: SetKey, rows: Sequence[Mapping[str, Any]], beaten: set[str] = frozenset()) -> RunSet:
    passed: Counter[str] = Counter()
    lost = [r for r in rows if r["run"] in beaten]
    if lost and len(lost) < len(rows):
        passed["tuning trial that is not the best of its configuration"] += len(lost)
        rows = [r for r in rows if r["run"] not in beaten]
    rows, split = _prefer(rows, "split", SPLITS, passed)
    rows, selection = _prefer(rows, "selection", SELECTIONS, passed)
    by_run: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_run[row["run"], row["n_params"], row["n_records"], str(row["seed"])].append(row)
    kept, repeats = [], []
    for _, mine in sorted(by_run.items(), key=lambda item: (item[0][1:3], item[0][0], item[0][3])):
        last = max(r["step"] for r in mine)
        now = [r for r in mine if r["step"] == last]
        if len(now) < len(mine):
            passed["earlier step of the same run"] += len(mine) - len(now)
        if len(now) > 1:
            passed["probe seed averaged into its run"] += len(now) - 1
        repeats.append([r["value"] for r in now])
        kept.append(dict(now[0]) | {"value": float(np.mean([r["value"] for r in now]))})
    mixed = tuple(c for c in ("objective", "codebook", "pool") if len({str(r[c]) for r in kept}) > 1)

    def column(name: str) -> np.ndarray:
        return np.array([r[name] for r in kept], float)

    return RunSet(
        key=key,
        n_params=column("n_params"),
        n_records=column("n_records"),
        loss=column("value"),
        converged=np.array([r["status"] == "done" for r in kept]),
        floor=column("floor"),
        prior=column("prior"),
        runs=tuple(r["run"] for r in kept),
        status=tuple(r["status"] for r in kept),
        folders=tuple(r["_file"].parent for r in kept),
        split=split,
        selection=selection,
        passed_over=dict(passed),
        mixed=mixed,
        examples=np.array([_positive(r["examples_seen"]) for r in kept]),
        error=np.array([_error(r) for r in kept]),
        flops=np.array([_positive(r["flops"]) for r in kept]),
        spread=spread(kept, repeats),
    )


def spread(runs: Sequence[Mapping[str, Any]], repeats: Sequence[Sequence[float]]) -> dict[str, tuple[float, int]]:
    """Standard deviation of ln L and its degrees of freedom, by where the spread comes from, where the log tells.

    probe: probe seeds of one run; initialisation: seeds of one (N, D, subset offset); subset: offsets of one
    (N, D), what initialisation explains taken out. `repeats`: each run's losses over probe seeds.
    """
    found = {}
    values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        values[r["n_params"], r["n_records"]][str(r["subset_offset"])].append(float(np.log(r["value"])))
    groups = {
        "probe": [np.log(losses) for losses in repeats],
        "initialisation": [np.array(v) for cell in values.values() for v in cell.values()],
        "subset": [np.array([np.mean(v) for v in cell.values()]) for cell in values.values()],
    }
    for name, parts in groups.items():
        df = sum(len(part) - 1 for part in parts)
        if df > 0:
            found[name] = (float(np.sqrt(sum(((part - part.mean()) ** 2).sum() for part in parts) / df)), df)
    if "subset" in found and "initialisation" in found:
        draws = np.mean([len(v) for cell in values.values() if len(cell) > 1 for v in cell.values()])
        rest = found["subset"][0] ** 2 - found["initialisation"][0] ** 2 / draws
        found["subset"] = (float(np.sqrt(max(rest, 0.0))), found["subset"][1])
    return found


def _error(row: Mapping[str, Any]) -> float:
    """Standard error of ln L from the 95 % interval `ci_low` to `ci_high`."""
    low, high = _positive(row["ci_low"]), _positive(row["ci_high"])
    return float(np.log(high / low) / (2 * 1.959964)) if high > low else np.nan


def _positive(value: Any) -> float:
    try:
        return float(value) if float(value) > 0 else np.nan
    except (TypeError, ValueError):
        return np.nan


def _prefer(rows, column: str, order: Sequence[str], passed: Counter) -> tuple[list[Mapping[str, Any]], str]:
    """Rows of the most preferred value of `column`; the rest are counted."""
    present = {r[column] for r in rows}
    best = min(present, key=lambda v: (order.index(v) if v in order else len(order), v))
    for value in present - {best}:
        passed[f"{column} {value} ({best} is used)"] += sum(r[column] == value for r in rows)
    return [r for r in rows if r[column] == best], best
