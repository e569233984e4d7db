"""`ecg-jax probe`: a linear probe of one encoder on one task, from data folders to rows of the eval log.

The order of things is the point of this file: features of train and validation; probes fitted, their epochs
and thresholds chosen, for the trained and the untrained encoder and every seed; only then is the test split
read, and every probe predicts it once. All probes share one set of patient resamples, so that what training
added is a paired difference. Writes below `out`: `features/`, `probes/<dataset>-<task>.json` and the
predictions beside it, and `evals.jsonl`. Rules: for metrics and macros in `metrics` and `bootstrap`, for
domains in `tasks`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError, UsageError
from ecg_jax.evaluation import bootstrap as resampling
from ecg_jax.evaluation import compare, evalog, features, linear, metrics, tasks
from ecg_jax.evaluation.scoring import ScoredSet

PROBE = "adam"
RESAMPLING_SEED = 0  # one set of resamples per test set, whatever is probed: that is what makes runs comparable
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Chosen:
    """A probe after selection: thresholds are logits [K] chosen on validation."""

    model: str  # "trained" or "untrained"
    seed: int
    probe: linear.Probe
    thresholds: np.ndarray


def probe_run(
    run_dir: Path,
    data: Path | Sequence[Path],
    task: str,
    *,
    out: Path | None = None,
    seeds: Sequence[int] = (0,),
    epochs_max: int = 500,
    batch: int = 64,
    label_fraction: float = 1.0,
    untrained_baseline: bool = True,
    bootstrap: int = 1000,
    level: float = 0.95,
    tables: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Probe the encoder of `run_dir` on `task` of the data folder(s) `data`; what it found, as it is written
    to JSON.

    out: default the run folder. label_fraction: share of the training *patients*, nested for one seed;
    validation and test never shrink. untrained_baseline: the same for fresh parameters, as run
    `<run>:untrained`, and the paired difference. bootstrap: patient resamples, level: of the intervals.
    tables: the splits, where already in memory. Randomness: `seeds` (order of training, patients of a
    fraction); resamples have a seed of their own. Raises DataError for a run without encoder, a unit that the
    encoder cannot take, or a split without labels.
    """
    if not 0 < label_fraction <= 1:
        raise UsageError(f"label_fraction is {label_fraction}, not in (0, 1]")
    if bootstrap < 1 or not seeds:
        raise UsageError("a probe needs at least one bootstrap resample and one seed")
    run_dir, out = Path(run_dir), Path(out or run_dir)
    splits = Splits([Path(data)] if isinstance(data, str | Path) else [Path(d) for d in data], task, tables)
    run = Run(run_dir)
    encoders = {"trained": run.encoder}
    if untrained_baseline:
        encoders["untrained"] = features.untrained(run.encoder, run.seed)

    chosen = _select(encoders, splits, out / "features", seeds, label_fraction, epochs_max, batch)

    test = splits["test"]  # opened here, after every choice
    digest = features.data_hash(test)
    x = {m: features.extract(e, test, "test", cache=out / "features", data=digest) for m, e in encoders.items()}
    logits = [c.probe.logits(x[c.model]) for c in chosen]

    names = list(test.label_names)
    drawn = resampling.draw(test.group_hash, bootstrap, RESAMPLING_SEED)
    spreads = [resampling.spreads(z, test.labels, c.thresholds, drawn) for c, z in zip(chosen, logits, strict=True)]
    domains = tasks.domains(names, run.labels, splits.lineage, run.lineage)
    scored = ScoredSet(test, names, domains, metrics.prevalence(splits["train"].labels), level)
    stem = f"{splits.dataset}-{task}" + (f"-f{label_fraction:g}" if label_fraction < 1 else "")
    results, rows = [], []
    for c, z, spread in zip(chosen, logits, spreads, strict=True):
        saved = out / "probes" / f"{stem}-{c.model}-s{c.seed}.npz"
        compare.save_predictions(saved, test.record_ids, test.group_hash, test.labels, z, names)
        result = {"model": c.model, "seed": c.seed, "epoch": c.probe.epoch, "val_loss": c.probe.val_loss}
        result |= {"stopped_by": "validation" if c.probe.converged else "epochs_max"}
        results.append(result | {"predictions": saved.name} | scored.report(spread, c.thresholds))
        common = run.fields(c.model) | {
            "dataset": splits.dataset,
            "task": task,
            "split": "test",
            "probe": PROBE,
        }
        rows += scored.rows(results[-1], common | {"probe_seed": c.seed, "label_fraction": label_fraction})
    report = {
        "run": run.name,
        "dataset": splits.dataset,
        "task": task,
        "probe": PROBE,
        "label_fraction": label_fraction,
        "records": {name: len(splits[name].record_ids) for name in SPLITS},
        "patients": {name: len(np.unique(splits[name].group_hash)) for name in SPLITS},
        "test_data": digest,
        "lineage": list(dict.fromkeys(entry["dataset"] for entry in run.lineage)),
        "encoders": {model: encoder.digest for model, encoder in encoders.items()},
        "intervals": {"resamples": bootstrap, "level": level, "unit": "patient", "seed": RESAMPLING_SEED},
        "left_out": scored.left_out(),
        "results": results,
        "difference": _differences(chosen, spreads, scored),
    }
    evalog.append(out / evalog.NAME, rows)
    path = out / "probes" / f"{stem}.json"
    files.write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report | {"path": str(path), "evals": str(out / evalog.NAME)}


class Run:
    """What a probe needs of a run folder: its encoder, what that has seen, and the run's columns of the eval
    log.
    """

    def __init__(self, run_dir: Path) -> None:
        self.name = run_dir.resolve().name
        self.encoder = features.load(run_dir)
        try:
            self.summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{run_dir}: no readable summary.json ({error}); train the run first") from None
        self.labels = tuple(self.encoder.info.get("labels") or ())
        self.lineage = list(self.encoder.info.get("lineage") or ())
        self.seed = int(self.summary.get("seed") or 0)

    def fields(self, model: str) -> dict[str, Any]:
        """Columns of the eval log that belong to the run; for the untrained encoder those of a run that saw
        nothing.
        """
        known = {name: self.summary[name] for name in evalog.RUN_FIELDS if self.summary.get(name) is not None}
        known |= {"run": self.summary.get("run", self.name)}
        known["lineage"] = "+".join(dict.fromkeys(entry["dataset"] for entry in self.lineage)) or None
        if model == "trained":
            return known
        seen = ("n_records", "n_patients", "examples_seen", "epochs", "flops", "step")
        untrained = {
            "run": f"{known['run']}:untrained",
            "paradigm": "untrained",
            "status": "done",
            "selection": "none",
        }
        return known | dict.fromkeys(seen, 0) | dict.fromkeys(("lr", "lineage", "objective", "codebook")) | untrained


class Splits:
    """The tables of one task of some data folders, each loaded when first asked for."""

    def __init__(self, folders: Sequence[Path], task: str, tables: Mapping[str, Any] | None) -> None:
        from ecg_jax.shards import catalog

        cards = [catalog.open_folder(folder).card for folder in folders]
        self.folders, self.task, self.tables = folders, task, dict(tables or {})
        self.dataset = "+".join(dict.fromkeys(card["name"] for card in cards))
        self.lineage = [entry for card in cards for entry in card["lineage"]]

    def __getitem__(self, split: str) -> Any:
        if split not in self.tables:
            from ecg_jax.shards import tables

            self.tables[split] = tables.load(self.folders, split, self.task)
        table = self.tables[split]
        where = f"{', '.join(map(str, self.folders))}: {split} split of task {self.task!r}"
        if not len(table.record_ids) or not (table.labels != metrics.UNKNOWN).any():
            raise DataError(f"{where}: no record with a known label")
        if split != "train" and tuple(table.label_names) != tuple(self["train"].label_names):
            raise DataError(f"{where}: other labels than in train")
        return table


def _select(
    encoders: Mapping[str, features.Encoder],
    splits: Splits,
    cache: Path,
    seeds: Sequence[int],
    fraction: float,
    epochs_max: int,
    batch: int,
) -> list[Chosen]:
    """Fit on train, choose epoch and thresholds on validation. Does not touch the test split."""
    train, val = splits["train"], splits["val"]
    digests = {"train": features.data_hash(train), "val": features.data_hash(val)}
    chosen = []
    for model, encoder in encoders.items():
        x_train = features.extract(encoder, train, "train", cache=cache, data=digests["train"])
        x_val = features.extract(encoder, val, "val", cache=cache, data=digests["val"])
        held = linear.Split(x_val, val.labels, val.record_hash)
        for seed in seeds:
            keep = thin(train.group_hash, fraction, seed) & (train.labels != metrics.UNKNOWN).any(1)
            if not keep.any():
                raise DataError(f"label_fraction {fraction:g} leaves no labelled patient to train on: take more")
            fitted = linear.Split(x_train[keep], train.labels[keep], train.record_hash[keep])
            probe = linear.fit(fitted, held, seed=seed, epochs_max=epochs_max, batch=batch)
            thresholds = metrics.best_f1_threshold(probe.logits(x_val), val.labels)
            chosen.append(Chosen(model, seed, probe, thresholds))
    return chosen


def thin(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [n]: the records of a share `fraction` of the patients (uint64 [n] hashes), smaller inside
    larger.
    """
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
    """Trained minus untrained on the same patients, one entry per seed; macros over all labels and per
    domain.
    """
    found = {(c.model, c.seed): spread for c, spread in zip(chosen, spreads, strict=True)}
    several = len(scored.groups) > 1
    groups = {f"macro {domain}": members for domain, members in scored.groups.items() if several}
    return [
        {
            "seed": seed,
            "metrics": compare.difference(
                spread, found["untrained", seed], scored.names, groups=groups, level=scored.level
            ),
        }
        for (model, seed), spread in found.items()
        if model == "trained" and ("untrained", seed) in found
    ]


def result_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `probe_run` for a reader: one line per label and macro, then what training added."""
    counts = ", ".join(f"{report['records'][name]} {name}" for name in SPLITS)
    drawn, patients = report["intervals"], report["patients"]["test"]
    lines = [f"{report['run']} on {report['dataset']} {report['task']}: {counts} records"]
    lines.append(f"{drawn['level']:.0%} intervals, {drawn['resamples']} resamples of {patients} patients")
    seen = ", ".join(report["lineage"]) or "unknown data"
    lines.append(f"the encoder, with its codebook if it has one, was trained on {seen}")
    for result in report["results"]:
        note = "" if result["stopped_by"] == "validation" else ", still improving at the last: raise epochs_max"
        lines.append(f"{result['model']} encoder, probe seed {result['seed']}, epoch {result['epoch']}{note}")
        for name, entry in result["labels"].items():
            lines.append(_line(f"{name} ({entry['n_positive']}/{entry['n_examples']})", entry["metrics"]))
        for domain, entry in result["macro"].items():
            lines.append(_line(f"macro {domain}", entry["metrics"]))
    for entry in report["difference"]:
        lines.append(f"trained minus untrained, probe seed {entry['seed']}, paired")
        macros = {metric: rows["macro"] for metric, rows in entry["metrics"].items() if "macro" in rows}
        lines.append(
            _line("macro", {metric: row | {"value": row["difference"]} for metric, row in macros.items()}, "+")
        )
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return [*lines, f"wrote {report['path']}", f"rows in {report['evals']}"]


def _line(name: str, values: Mapping[str, Mapping[str, float | None]], sign: str = "") -> str:
    cells = []
    for metric in (m for m in ("bce", "auroc", "ap") if m in values):
        ends = (values[metric]["ci_low"], values[metric]["ci_high"])
        shown = ", ".join("?" if end is None else f"{end:{sign}.4f}" for end in ends)
        cells.append(f"{metric} {values[metric]['value']:{sign}.4f} [{shown}]")
    return f"  {name:<28} " + "  ".join(cells)
