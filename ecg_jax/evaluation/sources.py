"""What a probe is put on: the encoder of a run, its untrained twin, features made elsewhere, and rows that give a table
its meaning (`BASELINES`: prevalence alone, age and sex, these with rate, PR, QRS and QT, the length of the recording).

A source gives features for a table of records and says what it has seen; it fits nothing. Rate and its spread are those
of the stored R peaks, the intervals are measured on the stored signal (`records.delineate`); what is not to be measured
is 0 with an indicator. Invariant: a `Model`'s digest is a hash of everything that decides its features.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ecg_jax import progress
from ecg_jax.errors import DataError
from ecg_jax.evaluation import evalog
from ecg_jax.evaluation import features as frozen
from ecg_jax.records import delineate

PROJECTED = 64  # dimensions that all rungs are projected to
SHORT = 730  # samples at 100 Hz, the length of most of CODE's recordings
ABOUT = ("run", "architecture", "paradigm", "n_params", "n_records", "lineage")  # what F.npz may say of its maker


@dataclass(frozen=True)
class Model:
    """features(table, split) -> float [n, D] of the records of a `shards.tables.Table`; encoder: for tuning."""

    name: str
    digest: str
    features: Callable[[Any, str], np.ndarray]
    encoder: frozen.Encoder | None = None


class Run:
    """A run folder: its encoder, what that has seen, and the run's columns of the eval log."""

    def __init__(self, run_dir: Path, cache: Path) -> None:
        self.name, self.cache = run_dir.resolve().name, cache
        self.encoder = frozen.load(run_dir)
        try:
            self.summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{run_dir}: no readable summary.json ({error}); train the run first") from None
        info = self.encoder.info
        self.labels, self.task = tuple(info.get("labels") or ()), info.get("task")
        self.lineage: list[dict[str, Any]] | None = list(info.get("lineage") or ())
        self.seed = int(self.summary.get("seed") or 0)

    def models(self, untrained: bool) -> list[Model]:
        """The encoder and, where asked for, the same with fresh parameters."""
        found = [self._model("trained", self.encoder)]
        return [*found, self._model("untrained", frozen.untrained(self.encoder, self.seed))] if untrained else found

    def _model(self, name: str, encoder: frozen.Encoder) -> Model:
        def extract(table: Any, split: str) -> np.ndarray:
            return frozen.extract(encoder, table, split, cache=self.cache)

        return Model(name, encoder.digest, extract, encoder)

    def shortened(self) -> list[Model]:
        """The encoder on the middle `SHORT` samples of every record: what is left when no set can be told by length."""

        def extract(table: Any, split: str) -> np.ndarray:
            return frozen.extract(self.encoder, frozen.cropped(table, SHORT), split, cache=self.cache)

        return [Model(f"trained on {SHORT / 100:g} s", f"{self.encoder.digest}@{SHORT}", extract)]

    def fields(self, model: str) -> dict[str, Any] | None:
        """Columns of the eval log that belong to the run; for the untrained encoder those of a run that saw nothing."""
        known = {name: self.summary[name] for name in evalog.RUN_FIELDS if self.summary.get(name) is not None}
        known |= {"run": self.summary.get("run", self.name)}
        known["lineage"] = "+".join(dict.fromkeys(entry["dataset"] for entry in self.lineage)) or None
        if model in BASELINES:
            return _fields_of_baseline(known["run"], model)
        if model != "untrained":
            return known
        seen = ("n_records", "n_patients", "examples_seen", "epochs", "flops", "step")
        untrained = {
            "run": f"{known['run']}:untrained",
            "paradigm": "untrained",
            "status": "done",
            "selection": "none",
        }
        return known | dict.fromkeys(seen, 0) | dict.fromkeys(("lr", "lineage", "objective", "codebook")) | untrained


class External:
    """Features that another tool made: an .npz with `record_id` [n] and `features` [n, D], and what it says of itself
    (`ABOUT`, each optional, `lineage` a list of data set names).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.labels, self.task = Path(path), (), None
        try:
            content = self.path.read_bytes()
            with np.load(self.path, allow_pickle=False) as file:
                ids, values = file["record_id"], np.asarray(file["features"], np.float32)
                self.about = {name: file[name].tolist() for name in ABOUT if name in file.files}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise DataError(f"{path}: not a feature file with record_id [n] and features [n, D] ({error})") from None
        if values.ndim != 2 or ids.shape != (len(values),) or not values.size:
            raise DataError(f"{path}: record_id {ids.shape} and features {values.shape} must be [n] and [n, D]")
        self.rows = {str(name): row for row, name in enumerate(ids.tolist())}
        if len(self.rows) < len(ids):
            raise DataError(f"{path}: {len(ids) - len(self.rows)} record ids are there twice; one row a record")
        bad = ~np.isfinite(values).all(1)
        if bad.any():
            raise DataError(f"{path}: features of {bad.sum()} records are not finite, first {ids[np.argmax(bad)]!r}")
        self.values, self.digest = values, hashlib.sha256(content).hexdigest()
        self.name = str(self.about.get("run", self.path.stem))
        said = self.about.get("lineage")
        self.lineage = (
            None if said is None else [{"dataset": name} for name in ([said] if isinstance(said, str) else said)]
        )

    def models(self, untrained: bool) -> list[Model]:
        """The one model; there is no untrained twin to be had."""
        return [Model("trained", self.digest, self._features)]

    def shortened(self) -> list[Model]:
        """None: the features are given."""
        return []

    def _features(self, table: Any, split: str) -> np.ndarray:
        missing = [name for name in table.record_ids if name not in self.rows]
        if missing:
            raise DataError(
                f"{self.path}: no features of {len(missing)} of {len(table.record_ids)} {split} records, first "
                f"{missing[0]!r}; record_id must be the ids of the data folder"
            )
        return self.values[[self.rows[name] for name in table.record_ids]]

    def fields(self, model: str) -> dict[str, Any] | None:
        """Columns of the eval log; None, and so no rows, where the file does not say all that a law needs."""
        if not all(name in self.about for name in ("architecture", "paradigm", "n_params", "n_records", "lineage")):
            return None
        if model in BASELINES:
            return _fields_of_baseline(self.name, model)
        known = {name: self.about[name] for name in ABOUT[1:5]}
        return known | {"run": self.name, "lineage": "+".join(e["dataset"] for e in self.lineage) or None}


def projected(model: Model, width: int = PROJECTED) -> Model:
    """`model` standardised on the first table that it is asked for (training) and projected at random to `width`: wide
    rungs against narrow ones at equal size of the probe. Randomness: a seed of its own, the same for all encoders.
    """
    state: dict[str, np.ndarray] = {}

    def extract(table: Any, split: str) -> np.ndarray:
        x = np.asarray(model.features(table, split), np.float64)
        if not state:
            spread = x.std(0)
            state["mean"], state["scale"] = x.mean(0), np.where(spread > 1e-6, spread, 1.0)
            state["matrix"] = np.random.default_rng(64).normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1])
        return ((x - state["mean"]) / state["scale"] @ state["matrix"]).astype(np.float32)

    return Model(f"{model.name} in {width}-d", f"{model.digest}@{width}", extract)


def _filled(column: np.ndarray) -> np.ndarray:
    """[n, 2]: the values with unknown ones at 0, and whether they are known."""
    known = np.isfinite(column)
    return np.stack([np.where(known, column, 0.0), known], axis=1)


def _age_sex(table: Any) -> np.ndarray:
    age = np.asarray(table.age, np.float64) / 100
    return np.concatenate([_filled(age), _filled(age**2), _filled(np.asarray(table.sex, np.float64))], axis=1)


def _rhythm(table: Any) -> np.ndarray:
    """Rate in Hz; mean, SD, shortest, longest and median RR interval in seconds, of the stored R peaks; PR, QRS, QT,
    and QT corrected after Fridericia (1920), in seconds. Each with its indicator; 0 where there is none.
    """
    out = np.full((len(table.record_ids), 10), np.nan)
    if table.rpeaks is None:
        return np.concatenate([_filled(column) for column in out.T], axis=1)
    for i, peaks in progress.track(list(enumerate(np.asarray(table.rpeaks, np.int64))), "intervals", unit="records"):
        gaps = np.diff(peaks[peaks >= 0]) / 100
        if len(gaps):
            start, length = table.valid[i]
            wave = np.array(delineate.intervals(table.signal[i], peaks, start, length)) / 1000
            out[i, :6] = 1 / gaps.mean(), gaps.mean(), gaps.std(), gaps.min(), gaps.max(), np.median(gaps)
            out[i, 6:] = *wave, wave[2] / np.cbrt(np.median(gaps))
    return np.concatenate([_filled(column) for column in out.T], axis=1)


BASELINES: Mapping[str, Callable[[Any], np.ndarray]] = {
    "prevalence": lambda table: np.zeros((len(table.record_ids), 1)),
    "age and sex": _age_sex,
    "age, sex, rate, PR, QRS, QT": lambda table: np.concatenate([_age_sex(table), _rhythm(table)], axis=1),
    "valid length": lambda table: _length(table),
}


def _length(table: Any) -> np.ndarray:
    length = np.asarray(table.valid)[:, 1] / 1000
    return np.stack([length, length**2, length >= 0.9], axis=1).astype(np.float64)


def _fields_of_baseline(run: str, model: str) -> dict[str, Any]:
    """Columns of the eval log of a baseline that was probed beside `run`: nothing of an encoder."""
    return {"run": f"{run}:{model}", "architecture": "none", "paradigm": "baseline", "n_params": 0, "n_records": 0}


def baseline_models() -> list[Model]:
    """`BASELINES` as models, in their order."""
    return [
        Model(name, name, lambda table, split, make=make: make(table).astype(np.float32))
        for name, make in BASELINES.items()
    ]
