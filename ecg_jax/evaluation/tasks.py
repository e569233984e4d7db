"""What a label of a probe's task is to the encoder at hand: seen in pre-training, unseen, or contaminated.

The rule, fixed before anything is scored and the same for every data set:

1. a data set in the lineage of the encoder makes every label `contaminated`: kept out of laws;
2. else a label whose name, case and blanks apart, is among the pre-training labels is `ood_seen`;
3. else it is `ood_unseen`, which is every label for an encoder that was pre-trained without labels.

The fourth, `id`, is for the test split of a run's own data (`training`), never for a probe.
Names are compared, not meanings; there is no synonym map here. Macros are taken within one domain, never
across.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

DOMAINS = ("id", "ood_seen", "ood_unseen", "contaminated")


def domains(
    labels: Sequence[str],
    pretraining_labels: Iterable[str],
    probed: Iterable[Mapping[str, Any]],
    lineage: Iterable[Mapping[str, Any]],
) -> list[str]:
    """The domain of each of `labels`.

    probed, lineage: entries as a data folder's card has them under "lineage" (`dataset`, `contains`,
    digests), of the data probed and of all data that the encoder has met. Sets that are contained in one
    another share a name.
    """
    if _sets(probed) & _sets(lineage):
        return ["contaminated"] * len(labels)
    seen = {_plain(name) for name in pretraining_labels}
    return ["ood_seen" if _plain(name) in seen else "ood_unseen" for name in labels]


def _sets(lineage: Iterable[Mapping[str, Any]]) -> set[str]:
    return {_plain(name) for entry in lineage for name in (entry["dataset"], *entry.get("contains", ()))}


def by_domain(of_labels: Sequence[str]) -> dict[str, np.ndarray]:
    """bool [K] masks of the labels of each domain that occurs, in the order of `DOMAINS`."""
    got = np.asarray(of_labels)
    return {domain: got == domain for domain in DOMAINS if (got == domain).any()}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
