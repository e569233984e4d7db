"""What a finished run has to show on its test split, by objective: losses, parts of the summary, rows of the eval log.

Called once at the end of a run, with what its objective keeps of every record (`logits`) under the selected and under
the last parameters. Reads no split and runs no network. Invariant: the value of a row labelled `macro` with selection
`best-val` is the law's ID loss, in nats.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ecg_jax.config import Config
from ecg_jax.evaluation import bootstrap, compare
from ecg_jax.evaluation import metrics as scores
from ecg_jax.evaluation.scoring import ScoredSet
from ecg_jax.records import windows

RESAMPLES, LEVEL = 400, 0.95  # of the intervals in the eval log
PREDICTIONS = "predictions.npz"  # on test, with the selected parameters: what a paired comparison of runs needs
METRICS = {"supervised": "bce", "masked_codes": "ce"}  # of the ID loss
LIMB, CHEST = 0, 1  # columns of masked codes


@dataclass(frozen=True)
class Outcome:
    """losses by name; further entries of the summary; rows of the eval log without the run's own columns, of the
    selected and, `last`, of the last parameters.
    """

    losses: dict[str, float]
    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def of(objective: str) -> Callable[..., Outcome]:
    """The function (run, params on the host, kept on val, kept on test, the same of the last parameters) -> Outcome."""
    return {"supervised": _labels, "masked_codes": _codes, "codebook": _codebook}[objective]


def choices(config: Config, book: Any) -> dict[str, Any]:
    """What the study leaves open and this run does one way: the switches by name, as they stood."""
    model, objective, recipe = config.model, config.objective, config.recipe
    common = {
        "input": model.input,
        "scale": model.scale,
        "pool": model.pool,
        "training_length": recipe.kind,
        "id_loss": f"mean {METRICS.get(objective.name, 'reconstruction')} on the test patients of the pre-training set",
    }
    if objective.name == "supervised":
        return common | {"norm": model.norm}
    if objective.name == "codebook":
        return common | {"beats": model.beats, "padding_counts": config.codebook.faithful}
    return common | {
        "norm": model.norm,
        "beats": model.beats,
        "masking": objective.masking,
        "mask_ratio": objective.ratio,
        "scored": "padding too" if objective.padding else "real beats outside the outer half second",
        "head": objective.head,
        "codes_read": "at the token" if model.input == "beats" else "over the beat's window, at stride 16 and coarser",
        "codes_made": "with lead and time indices" if book.info["indices"] else "without indices, as released",
        "codebook_from": book.info["source"],
        "tachycardia": "the middle 21 beats, all leads" if model.beats == "robust" else "the first 256 tokens",
        "n_counted": "encoder without head",
    }


def learned(params: dict[str, Any]) -> dict[str, Any]:
    """`params` without running statistics and codebooks, in the two parts "encoder" and "head"."""
    frozen = ("codebook", "usage")

    def without(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {k: without(v) for k, v in tree.items() if "_running_" not in k and not k.endswith(frozen)}

    kept = without(params)
    encoder = kept.pop("encoder")
    return {"encoder": encoder, "head": kept}


def _labels(run: Any, params: Any, on_val: np.ndarray, on_test: np.ndarray, on_test_last: np.ndarray) -> Outcome:
    data, table = run.data, run.data.test
    thresholds = scores.best_f1_threshold(on_val, data.val.labels)
    names = list(table.label_names)
    scored = ScoredSet(table, names, ["id"] * len(names), data.start["prior"], LEVEL)
    resamples = bootstrap.draw(table.group_hash, RESAMPLES)
    report = scored.report(bootstrap.spreads(on_test, table.labels, thresholds, resamples), thresholds)
    at_last = scores.macro(scores.bce(on_test_last, table.labels))[0]
    (macro,) = report["macro"].values()
    kept = (table.record_ids, table.group_hash, table.labels, on_test, names)
    compare.save_predictions(run.run_dir / PREDICTIONS, *kept)
    common = {"floor": macro["floor"], "prior": macro["prior"]}
    last = {"label": "macro", "metric": "bce", "domain": "id", "value": at_last, "n_examples": macro["n_examples"]}
    return Outcome(
        losses={"test": macro["metrics"]["bce"]["value"], "test_last": at_last},
        summary=common | {"test": {"labels": report["labels"], "macro": macro}},
        rows=scored.rows(report, {}),
        last=last | common | {"n_labels": macro["metrics"]["bce"]["n_labels"]},
    )


def _codes(run: Any, params: Any, on_val: np.ndarray, on_test: np.ndarray, on_test_last: np.ndarray) -> Outcome:
    """Cross-entropy over masked beats, limb and chest leads apart, beside the baselines that give it meaning."""
    table = run.data.test
    resamples = bootstrap.draw(table.group_hash, RESAMPLES)
    found = {label: _ratio(on_test[:, at], resamples) for label, at in CODE_COLUMNS.items()}
    at_last = _ratio(on_test_last[:, CODE_COLUMNS["macro"]], resamples)["ce"]["value"]
    baselines = _baselines(run)
    prior = baselines["unigram"]["all"]
    rows = []
    for label, metrics in found.items():
        for metric, value in metrics.items():
            row = {"label": label, "metric": metric, "domain": "id", "n_examples": len(table)} | value
            rows.append(row | ({"prior": prior} if (label, metric) == ("macro", "ce") else {}))
    np.savez_compressed(run.run_dir / PREDICTIONS, record_ids=np.asarray(table.record_ids, dtype=np.str_), kept=on_test)
    return Outcome(
        losses={"test": found["macro"]["ce"]["value"], "test_last": at_last},
        summary={"prior": prior, "test": {"codes": found, "baselines": baselines}},
        rows=rows,
        last={"label": "macro", "metric": "ce", "domain": "id", "value": at_last, "prior": prior},
    )


_known_baselines: dict[tuple, dict[str, Any]] = {}


def _baselines(run: Any) -> dict[str, Any]:
    """Of `evaluation/code_baselines`; once per process for all runs that are asked the same on the same records."""
    from ecg_jax.evaluation import code_baselines

    objective, data = run.objective, run.data
    asked = dataclasses.replace(objective.front, arch=None), objective.masking, objective.ratio, objective.padding
    digests = tuple(data.facts[split]["digest"] for split in ("train", "val", "test"))
    key = (asked, objective.front.on_beats, data.book.id, digests)
    if key not in _known_baselines:
        steps = run.config.objective.baseline_steps
        tables = data.some, data.val, data.test
        scored = code_baselines.score(objective, *tables, data.start["codebook"], steps=steps)
        _known_baselines[key] = scored
    return _known_baselines[key]


# Of what `masked_codes` keeps of a record: which (cross-entropy, targets, correct) make up a label of the eval log.
CODE_COLUMNS = {
    "macro": np.array([[0, 3], [1, 4], [2, 5]]),
    "limb": np.array([[0], [1], [2]]),
    "chest": np.array([[3], [4], [5]]),
}


def _ratio(kept_nx3xk: np.ndarray, resamples: bootstrap.Resamples) -> dict[str, dict[str, float | None]]:
    """{"ce": value with interval, "accuracy": ...} from [n, 3, k] (sum of losses, targets, correct) of each record."""
    sums_nx3 = kept_nx3xk.sum(2)
    by_patient = np.zeros((len(resamples.counts), 3))
    np.add.at(by_patient, resamples.patient, sums_nx3)
    drawn_Rx3 = resamples.counts.T.astype(np.float64) @ by_patient
    out = {}
    for name, column in (("ce", 0), ("accuracy", 2)):
        total, targets = sums_nx3[:, column].sum(), max(sums_nx3[:, 1].sum(), 1)
        draws = drawn_Rx3[:, column] / np.maximum(drawn_Rx3[:, 1], 1)
        low, high = bootstrap.percentile(total / targets, draws, LEVEL)
        out[name] = {"value": float(total / targets), "ci_low": low, "ci_high": high}
    return out


def _codebook(run: Any, params: Any, on_val: np.ndarray, on_test: np.ndarray, on_test_last: np.ndarray) -> Outcome:
    """A codebook folder in the run folder, with what became of its codes."""
    from ecg_jax import codebook

    losses = {"test": float(on_test.mean()), "test_last": float(on_test_last.mean())}  # of a record, on average
    model, table = run.config.model, run.data.test
    about = {
        "scale": model.scale,
        "beats": model.beats,
        "detector": windows.detector(model.beats),
        "chain": run.data.chain,
        "indices": run.config.codebook.indices,
        "leads": list(table.leads),
        "unit": table.unit,
        "usage": np.asarray(params["usage"]).tolist(),
        "lineage": run.data.lineage,
        "source": "trained",
    }
    identity = codebook.save(run.run_dir, run.objective.arch, params, about)
    share = np.asarray(params["usage"], np.float64) / max(float(np.sum(params["usage"])), 1e-12)
    there = share[share > 0]
    codes = {
        "codes": len(share),
        "used": int((share >= 0.01 / len(share)).sum()),  # at least a hundredth of an even use
        "perplexity": float(np.exp(-(there * np.log(there)).sum())),
    }
    return Outcome(losses=losses, summary={"codebook": identity, "codes": codes})
