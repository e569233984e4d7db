"""`ecg-jax probe`: linear probes of one encoder on one task, from data folders to rows of the eval log.

The order of things is the point of this file: features of train and validation; probes fitted, their settings (C, or
the epoch) and thresholds chosen, for the trained and the untrained encoder, the baselines, every label fraction and
seed; the choice recorded (`openings`); only then is the test split read, and every probe predicts it once. All probes
share one set of patient resamples, so that what training added is a paired difference. `logistic` is the law's OOD
loss, `adam` the study's way beside it, `finetune` an option; the projection to 64 dimensions, the crop to 7.3 s and
the baselines have `logistic` alone. Writes below `out`: `features/`, `probes/<dataset>-<task>.json` and the predictions
beside it, and `evals.jsonl`. Rules: for metrics and macros in `metrics`, `bootstrap` and `scoring`, for domains in
`tasks`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError, UsageError
from ecg_jax.evaluation import bootstrap as resampling
from ecg_jax.evaluation import compare, evalog, features, finetune, linear, logistic, metrics, sources, tasks
from ecg_jax.evaluation.openings import Openings
from ecg_jax.evaluation.scoring import LEAST, ScoredSet
from ecg_jax.evaluation.sources import Model

PROBES = ("logistic", "adam", "finetune")  # the first is the law's; the last is an option
RESAMPLING_SEED = 0  # one set of resamples per test set, whatever is probed: that is what makes runs comparable
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Chosen:
    """A probe after selection: thresholds are logits [K] chosen on validation; about, what was chosen how."""

    model: Model
    kind: str  # of PROBES
    seed: int
    fraction: float
    probe: linear.Probe | logistic.Probe
    thresholds: np.ndarray
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the probe, in the eval log."""
        if not self.model.name.startswith("trained "):
            return self.kind
        return self.kind + (f"@{sources.PROJECTED}" if self.model.name.endswith("-d") else f"@{sources.SHORT / 100:g}s")

    def place(self, run: str, where: str) -> str:
        """What the test split is opened for, in the record of openings."""
        return f"{run}: {self.model.name} on {where} by {self.name}, seed {self.seed}, fraction {self.fraction:g}"


def probe_run(
    run_dir: Path | None,
    data: Path | Sequence[Path],
    task: str,
    *,
    out: Path | None = None,
    features_file: Path | None = None,
    probes: Sequence[str] = PROBES[:2],
    seeds: Sequence[int] = (0,),
    fractions: Sequence[float] = (1.0,),
    baselines: bool = True,
    crop_seconds: float | None = None,
    epochs_max: int = 500,
    batch: int = 64,
    bootstrap: int = 1000,
    level: float = 0.95,
    reopen: bool = False,
    tables: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Probe an encoder on `task` of the data folder(s) `data`; what it found, as it is written to JSON.

    The encoder is that of `run_dir`, or whatever made `features_file` (`sources.External`; then `out` is needed).
    probes: of `PROBES`. fractions: shares of the training *patients*, nested for one seed; validation and test never
    shrink. baselines: also the untrained encoder (run `<run>:untrained`), the trained one in 64 random dimensions and
    on the middle 7.3 s, and `sources.BASELINES`, with paired differences. crop_seconds: only so much of the middle of
    every record, as data set `<name>@<seconds>s`. bootstrap: patient resamples, level: of the intervals. reopen: score
    the test split again with another choice than before. tables: the splits, where already in memory. Randomness:
    `seeds` (order of training, patients of a fraction); resamples and the projection have seeds of their own. Raises
    DataError for a run without encoder, a unit that the encoder cannot take, or a split without labels; UsageError for
    settings and for a test split that another choice has opened.
    """
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UsageError(f"label fractions {list(fractions)}: each must lie in (0, 1]")
    if bootstrap < 1 or not seeds:
        raise UsageError("a probe needs at least one bootstrap resample and one seed")
    if not probes or set(probes) - set(PROBES):
        raise UsageError(f"probes {list(probes)}: known are {', '.join(PROBES)}")
    if (run_dir is None) == (features_file is None):
        raise UsageError("a probe needs a run folder or a file of features, not both")
    if run_dir is None and out is None:
        raise UsageError("--features needs --out, the folder for the results")
    out = Path(out or run_dir)
    source: Any = sources.External(features_file) if run_dir is None else sources.Run(Path(run_dir), out / "features")
    splits = Splits([Path(data)] if isinstance(data, str | Path) else list(map(Path, data)), task, tables, crop_seconds)
    encoders = source.models(untrained=baselines)
    if "finetune" in probes and run_dir is None:
        raise UsageError("features made elsewhere cannot be fine-tuned")
    plan = [(model, kind) for kind in probes for model in encoders]
    if baselines and "logistic" in probes:
        more = [sources.projected(encoders[0]), *(source.shortened() if crop_seconds is None else [])]
        plan += [(model, "logistic") for model in (*more, *sources.baseline_models())]

    chosen = _select(plan, splits, seeds, fractions, epochs_max, batch)

    where = f"{splits.dataset} {task}"
    data_of = {name: features.data_hash(splits[name])[:16] for name in ("train", "val")}
    data_of["labels"] = features.array_hash(splits["train"].labels, splits["val"].labels)
    Openings(out / "probes").settle({c.place(source.name, where): c.about["choice"] | data_of for c in chosen}, reopen)
    test = splits["test"]  # opened here, after every choice
    test_digest = features.data_hash(test)
    split_hash = tasks.split_hash([splits[name].record_hash for name in SPLITS])
    x = {model.digest: model.features(test, "test") for model in {c.model.digest: c.model for c in chosen}.values()}
    logits = [c.probe.logits(x[c.model.digest]) for c in chosen]

    names = list(test.label_names)
    drawn = resampling.draw(test.group_hash, bootstrap, RESAMPLING_SEED)
    domains = tasks.domains(names, source.labels, splits.lineage, source.lineage or (), task, source.task)
    scored = ScoredSet(test, names, domains, metrics.prevalence(splits["train"].labels), level, LEAST)
    spreads = [
        resampling.spreads(z, test.labels, c.thresholds, drawn, scored.shift)
        for c, z in zip(chosen, logits, strict=True)
    ]
    stem = f"{splits.dataset}-{task}" + "".join(f"-f{fraction:g}" for fraction in fractions if fraction < 1)
    results, rows = [], []
    for c, z, spread in zip(chosen, logits, spreads, strict=True):
        share = f"-f{c.fraction:g}" if c.fraction < 1 else ""
        saved = f"{splits.dataset}-{task}{share}-{c.model.name.replace(' ', '_')}-{c.name}-s{c.seed}.npz"
        compare.save_predictions(out / "probes" / saved, test.record_ids, test.group_hash, test.labels, z, names)
        result = {"model": c.model.name, "probe": c.name, "seed": c.seed, "label_fraction": c.fraction}
        result |= {name: value for name, value in c.about.items() if name != "choice"}
        results.append(result | {"predictions": saved} | scored.report(spread, c.thresholds, z))
        known = source.fields(c.model.name)
        if known is not None:
            known |= {"dataset": splits.dataset, "task": task, "split": "test", "probe": c.name}
            rows += scored.rows(results[-1], known | {"probe_seed": c.seed, "label_fraction": c.fraction})
    report = {
        "run": source.name,
        "dataset": splits.dataset,
        "task": task,
        "law": f"{PROBES[0]}, macro bce",
        "records": {name: len(splits[name].record_ids) for name in SPLITS},
        "patients": {name: len(np.unique(splits[name].group_hash)) for name in SPLITS},
        "split_hash": split_hash,
        "split": tasks.check_split(splits.dataset, splits.version, split_hash),
        "test_data": test_digest,
        "lineage": None
        if source.lineage is None
        else list(dict.fromkeys(entry["dataset"] for entry in source.lineage)),
        "encoders": {model.name: model.digest for model in encoders},
        "intervals": {"resamples": bootstrap, "level": level, "unit": "patient", "seed": RESAMPLING_SEED},
        "left_out": scored.left_out(),
        "results": results,
        "difference": _differences(chosen, spreads, scored),
    }
    if rows:
        evalog.append(out / evalog.NAME, rows)
    path = out / "probes" / f"{stem}.json"
    files.write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report | {"path": str(path), "evals": str(out / evalog.NAME) if rows else None}


class Splits:
    """The tables of one task of some data folders, each loaded when first asked for, cropped where asked."""

    def __init__(
        self, folders: Sequence[Path], task: str, tables: Mapping[str, Any] | None, crop_seconds: float | None = None
    ) -> None:
        from ecg_jax.shards import catalog

        if crop_seconds is not None and not 2.5 <= crop_seconds <= 10:
            raise UsageError(f"--crop-seconds {crop_seconds:g}: between 2.5 and 10")
        cards = [catalog.open_folder(folder).card for folder in folders]
        self.folders, self.task, self.given, self.crop = folders, task, dict(tables or {}), crop_seconds
        self.dataset = "+".join(dict.fromkeys(card["name"] for card in cards))
        self.version = "+".join(dict.fromkeys(card.get("version", "") for card in cards))
        if crop_seconds is not None:
            self.dataset += f"@{crop_seconds:g}s"
        self.lineage = [entry for card in cards for entry in card["lineage"]]
        self.tables: dict[str, Any] = {}

    def __getitem__(self, split: str) -> Any:
        if split not in self.tables:
            from ecg_jax.shards import tables

            table = self.given.get(split)
            if table is None:
                table = tables.load(self.folders, split, self.task)
            self.tables[split] = table if self.crop is None else features.cropped(table, round(self.crop * 100))
        table = self.tables[split]
        where = f"{', '.join(map(str, self.folders))}: {split} split of task {self.task!r}"
        if not len(table.record_ids) or not (table.labels != metrics.UNKNOWN).any():
            raise DataError(f"{where}: no record with a known label")
        if split == "train":
            tasks.check(self.dataset, self.task, table.label_names)
        elif tuple(table.label_names) != tuple(self["train"].label_names):
            raise DataError(f"{where}: other labels than in train")
        return table


def _select(
    plan: Sequence[tuple[Model, str]],
    splits: Splits,
    seeds: Sequence[int],
    fractions: Sequence[float],
    epochs_max: int,
    batch: int,
) -> list[Chosen]:
    """Fit on train, choose C or epoch, and thresholds, on validation. Does not touch the test split."""
    train, val = splits["train"], splits["val"]
    held: dict[str, tuple[linear.Split, linear.Split]] = {}
    chosen = []
    for model, kind in plan:
        if model.name not in held:
            held[model.name] = tuple(
                linear.Split(model.features(table, name), table.labels, table.record_hash)
                for name, table in (("train", train), ("val", val))
            )
        fitted, held_out = held[model.name]
        is_baseline = model.name in sources.BASELINES
        # A convex problem has one solution: with all labels the seed decides nothing.
        cells = [
            (fraction, seed)
            for fraction in fractions
            for seed in (seeds[:1] if kind == "logistic" and fraction == 1 else seeds)
            if fraction == 1 or not is_baseline
        ]
        if not cells:
            continue
        keeps = [
            thin(train.group_hash, fraction, seed) & (train.labels != metrics.UNKNOWN).any(1)
            for fraction, seed in cells
        ]
        for (fraction, _), keep in zip(cells, keeps, strict=True):
            if not keep.any():
                raise DataError(f"label_fraction {fraction:g} leaves no labelled patient to train on: take more")
        found: list[Any]
        models = [model] * len(cells)
        if kind in ("logistic", "finetune"):
            found = logistic.fit(fitted, held_out, subsets=keeps)
            choice = {"c": list(logistic.C_GRID), "tolerance": logistic.TOLERANCE}
        if kind == "finetune":
            tuned = [
                finetune.fit(model.encoder, _only(train, keep), val, start, seed=seed)
                for start, keep, (_, seed) in zip(found, keeps, cells, strict=True)
            ]
            found, models = [head for _, head in tuned], [_tuned(model, encoder) for encoder, _ in tuned]
            choice |= {"lr": finetune.LR, "decay": finetune.DECAY, "epochs_max": finetune.EPOCHS}
        elif kind == "adam":
            found = [
                linear.fit(_taken(fitted, keep), held_out, seed=seed, epochs_max=epochs_max, batch=batch)
                for (_, seed), keep in zip(cells, keeps, strict=True)
            ]
            choice = {"epochs_max": epochs_max, "batch": batch}
        for (fraction, seed), used, probe in zip(cells, models, found, strict=True):
            on_val = held_out.features if used is model else used.features(val, "val")
            thresholds = metrics.best_f1_threshold(probe.logits(on_val), val.labels)
            about = {"val_loss": probe.val_loss, **_how(probe), "choice": choice | {"encoder": model.digest[:16]}}
            chosen.append(Chosen(used, kind, seed, fraction, probe, thresholds, about))
    return chosen


def _only(table: Any, keep: np.ndarray) -> Any:
    """`table` with no label known outside `keep`."""
    return replace(table, labels=np.where(keep[:, None], table.labels, metrics.UNKNOWN).astype(np.int8))


def _tuned(model: Model, encoder: features.Encoder) -> Model:
    return Model(model.name, encoder.digest, lambda table, split: features.extract(encoder, table, split))


def _taken(split: linear.Split, keep: np.ndarray) -> linear.Split:
    return linear.Split(split.features[keep], split.labels[keep], split.record_hash[keep])


def _how(probe: linear.Probe | logistic.Probe) -> dict[str, Any]:
    if isinstance(probe, logistic.Probe):
        c = [float(value) if np.isfinite(value) else None for value in probe.c]
        return {"c": c, "gradient": float(probe.gradient.max()), "stopped_by": "c_grid" if probe.edge else "validation"}
    return {"epoch": probe.epoch, "stopped_by": "validation" if probe.converged else "epochs_max"}


def thin(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [n]: the records of a share `fraction` of the patients (uint64 [n] hashes), smaller inside larger."""
    if fraction >= 1:
        return np.ones(len(groups), bool)
    # SplitMix64's finaliser, so that the draw has nothing to do with anything else that hashes decide.
    x = groups ^ np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) < np.uint64(int(fraction * 2**64))


def _differences(
    chosen: Sequence[Chosen], spreads: Sequence[dict[str, resampling.Spread]], scored: ScoredSet
) -> list[dict[str, Any]]:
    """Trained minus every other model with the same probe, seed and fraction, on the same patients; macros without the
    labels that are too few, over all labels and per domain.
    """
    several = len(scored.groups) > 1
    groups = {f"macro {domain}": members & ~scored.few for domain, members in scored.groups.items() if several}
    found = {(c.model.name, c.kind, c.seed, c.fraction): spread for c, spread in zip(chosen, spreads, strict=True)}
    out = []
    for (model, *cell), spread in found.items():
        first = found.get(("trained", *cell))
        if model == "trained" or first is None:
            continue
        gap = compare.difference(first, spread, scored.names, groups=groups, level=scored.level, keep=~scored.few)
        kind, seed, fraction = cell
        out.append({"against": model, "probe": kind, "seed": seed, "label_fraction": fraction, "metrics": gap})
    return sorted(out, key=lambda entry: entry["against"] != "untrained")
