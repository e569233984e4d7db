"""Is one model better than another? Differences on the same records and the same patient resamples.

A difference of two models scored on the same patients is far surer than the two intervals suggest, because
hard patients are hard for both. Works on arrays or on two saved prediction files. Selects nothing. Invariant:
`paired(a, b)` is minus `paired(b, a)`, and the difference of a model to itself is 0 in [0, 0].
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError
from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.bootstrap import Estimate, Spread

COMPARED = ("bce", "auroc", "ap", "brier")


def paired(
    labels: np.ndarray,
    logits_a: np.ndarray,
    logits_b: np.ndarray,
    groups: np.ndarray,
    names: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict[str, dict]]:
    """Metric of a minus metric of b, `{metric: {label or "macro": {a, b, difference, ci_low, ci_high,
    excludes_zero}}}`.

    labels int8 [n, K] (-1 unknown), logits [n, K], groups uint64 [n] patient hashes, names of the K labels. A
    label without both classes has no AUROC and no AP and is in neither macro. Randomness: `seed` draws the
    resamples.
    """
    drawn = bootstrap.draw(groups, resamples, seed)
    nowhere = np.full(labels.shape[1], np.nan)
    a = bootstrap.spreads(logits_a, labels, nowhere, drawn)
    b = bootstrap.spreads(logits_b, labels, nowhere, drawn)
    return difference(a, b, names, level=level)


def difference(
    a: dict[str, Spread],
    b: dict[str, Spread],
    names: Sequence[str],
    *,
    metrics: Sequence[str] = COMPARED,
    groups: Mapping[str, np.ndarray] | None = None,
    keep: np.ndarray | None = None,
    level: float = 0.95,
) -> dict[str, dict[str, dict]]:
    """As `paired`, from spreads that were drawn on the same resamples (`bootstrap.spreads`).

    `groups` adds macros over some of the labels: name of the row -> bool [K]; `keep` bool [K] says which labels
    "macro" may hold (default all).
    """
    out: dict[str, dict[str, dict]] = {}
    for metric in metrics:
        gap = a[metric].minus(b[metric])
        shared = np.isfinite(gap.point)
        rows = {}
        for k, name in enumerate(names):
            if shared[k]:
                ends = float(a[metric].point[k]), float(b[metric].point[k])
                rows[name] = _row(*ends, gap.label(k), level)
        whole = np.ones(len(names), bool) if keep is None else keep
        for name, members in ({"macro": whole} | dict(groups or {})).items():
            held = shared & members
            if held.any():
                ends = a[metric].macro(held).point, b[metric].macro(held).point
                rows[name] = _row(*ends, gap.macro(held), level) | {"n_labels": int(held.sum())}
        out[metric] = rows
    return out


def _row(a: float, b: float, found: Estimate, level: float) -> dict:
    low, high = bootstrap.difference_interval(found, level)
    return {
        "a": a,
        "b": b,
        "difference": found.point,
        "ci_low": low,
        "ci_high": high,
        "excludes_zero": bool(low > 0 or high < 0),
    }


def save_predictions(
    path: Path,
    record_ids: Sequence[str],
    groups: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    names: Sequence[str],
) -> None:
    """Write what any later comparison needs: `record_ids groups labels logits label_names` as `.npz`,
    atomically.
    """
    content = io.BytesIO()
    np.savez_compressed(
        content,
        record_ids=np.asarray(record_ids, dtype=np.str_),
        groups=np.asarray(groups, np.uint64),
        labels=np.asarray(labels, np.int8),
        logits=np.asarray(logits, np.float64),
        label_names=np.asarray(names, dtype=np.str_),
    )
    files.write(path, content.getvalue())


def load_predictions(path: Path) -> dict[str, np.ndarray]:
    """What `save_predictions` wrote. Raises DataError where the file is missing or something else."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in ("record_ids", "groups", "labels", "logits", "label_names")}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: not a prediction file of a probe ({error})") from None


def paired_files(a: Path, b: Path, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
    """`paired` of two prediction files. Raises DataError unless they score the same records with the same
    labels.
    """
    first, second = load_predictions(a), load_predictions(b)
    if list(first["label_names"]) != list(second["label_names"]):
        raise DataError(f"{a} and {b}: other labels, {list(first['label_names'])} and {list(second['label_names'])}")
    order_a, order_b = np.argsort(first["record_ids"]), np.argsort(second["record_ids"])
    if not np.array_equal(first["record_ids"][order_a], second["record_ids"][order_b]):
        raise DataError(f"{a} and {b}: other records; a paired difference needs the same test set")
    labels = first["labels"][order_a]
    if not np.array_equal(labels, second["labels"][order_b]):
        raise DataError(f"{a} and {b}: the same records carry other labels")
    names = [str(name) for name in first["label_names"]]
    return paired(
        labels,
        first["logits"][order_a],
        second["logits"][order_b],
        first["groups"][order_a],
        names,
        resamples=resamples,
        seed=seed,
        level=level,
    )
