"""What labels say before anybody trains: prevalence, the loss of predicting it, the loss of the Bayes probabilities.

Pure functions of label arrays. Invariant: a label that nobody looked for (-1) counts nowhere.
"""

from typing import Any

import numpy as np

from ecg_jax.shards.catalog import Subset, select

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50, 1.0)
OFFSETS = (0.0, 1 / 3, 2 / 3)  # independent draws; a share above a third would overlap the next one


def _entropy(share: np.ndarray) -> np.ndarray:
    p = np.clip(share, 1e-300, 1.0)
    q = np.clip(1.0 - share, 1e-300, 1.0)
    return -(share * np.log(p) + (1.0 - share) * np.log(q))


def label_statistics(labels: np.ndarray) -> dict[str, Any]:
    """int8 [n, K] -> known, positives, prevalence [K] (None where nobody looked) and the mean entropy in nats
    of predicting each label's prevalence, over the labels that were looked for."""
    known, positive = (labels >= 0).sum(0), (labels == 1).sum(0)
    seen = known > 0
    share = positive / np.maximum(known, 1)
    entropy = float(_entropy(share[seen]).mean()) if seen.any() else None
    return {
        "known": known.tolist(),
        "positives": positive.tolist(),
        "prevalence": [float(s) if k else None for s, k in zip(share, seen, strict=True)],
        "entropy": entropy,
    }


def bayes_statistics(labels: np.ndarray, bayes: np.ndarray) -> dict[str, float]:
    """The loss (BCE in nats, mean over labels) of the Bayes probabilities on these labels, and its
    expectation."""
    mask = labels >= 0
    p = np.clip(bayes, 1e-12, 1 - 1e-12)
    loss = np.where(mask, -np.where(labels == 1, np.log(p), np.log1p(-p)), 0.0)
    expected = np.where(mask, _entropy(bayes), 0.0)
    count, seen = np.maximum(mask.sum(0), 1), mask.any(0)
    return {
        "loss": float((loss.sum(0) / count)[seen].mean()),
        "entropy": float((expected.sum(0) / count)[seen].mean()),
    }


def subset_table(group: np.ndarray, order: np.ndarray, labels: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Per nested subset and independent draw of the train records: records, patients, positives and label entropy.

    group, order: uint64 [n]; labels: task -> int8 [n, K].
    """
    index = np.zeros(len(group), [("order_hash", "<u8"), ("group", "<u8")])
    index["order_hash"], index["group"] = order, group
    table = []
    for offset in OFFSETS:
        for fraction in FRACTIONS:
            if offset and fraction > 1 / 3:
                continue
            inside = select(index, Subset(fraction, offset=offset))
            found = {task: label_statistics(values[inside]) for task, values in labels.items()}
            table.append(
                {
                    "fraction": fraction,
                    "offset": offset,
                    "records": int(inside.sum()),
                    "patients": len(np.unique(group[inside])),
                    "positives": {task: one["positives"] for task, one in found.items()},
                    "label_entropy": {task: one["entropy"] for task, one in found.items()},
                }
            )
    return table
