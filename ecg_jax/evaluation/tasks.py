"""Task cards (`cards/*.toml`) and what a label of a probe's task is to the encoder: seen, unseen, or contaminated.

A card says of a data set: label order, split rule, licence, traps, and what its labels mean where the name alone would
mislead. The rule for domains, fixed before anything is scored and the same for every data set:

1. a data set in the lineage of the encoder makes every label `contaminated`: kept out of laws;
2. else a label is `ood_seen` if one of its meanings is a meaning of a pre-training label. A label means what its card
   says (CODE's ST is sinus tachycardia; CD holds bundle branch blocks), or else its name, case and blanks apart; where
   one of the two sets has no card for its label, the same name is the same thing;
3. else it is `ood_unseen`, which is every label for an encoder that was pre-trained without labels.

The fourth, `id`, is for the test split of a run's own data (`training`), never for a probe. Macros are taken within one
domain, never across. Invariant: a domain depends on names and cards alone, never on a score.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, UsageError, did_you_mean

DOMAINS = ("id", "ood_seen", "ood_unseen", "contaminated")
PRESETS = "presets.toml"


@cache
def cards() -> dict[str, dict[str, Any]]:
    """Every task card, by data set: dataset, licence, split (its rule), split_hashes? {version: `split_hash`}, traps,
    tasks {task: {labels?, means?}}.
    """
    folder = resources.files("ecg_jax.evaluation") / "cards"
    found = (
        tomllib.loads(f.read_text("utf-8")) for f in folder.iterdir() if f.name.endswith(".toml") and f.name != PRESETS
    )
    return {card["dataset"]: card for card in sorted(found, key=lambda card: card["dataset"])}


def preset(name: str) -> list[dict[str, Any]]:
    """The columns of a preset: [{name, tasks ["dataset:task", ...], label?}]. Raises UsageError for an unknown one."""
    text = (resources.files("ecg_jax.evaluation") / "cards" / PRESETS).read_text("utf-8")
    known = tomllib.loads(text)
    if name not in known:
        raise UsageError(f"no preset {name!r}{did_you_mean(name, list(known))}; presets: {', '.join(known)}")
    return known[name]


def check(dataset: str, task: str, labels: Sequence[str]) -> None:
    """Raises DataError where a data folder's labels are not those, in that order, of the card (if the card has any)."""
    fixed = cards().get(dataset.partition("@")[0], {}).get("tasks", {}).get(task, {}).get("labels")
    if fixed is not None and list(labels) != fixed:
        odd = [name for name in labels if name not in fixed] or [name for name in fixed if name not in labels]
        what = f"first difference {odd[0]!r}" if odd else "in another order"
        raise DataError(f"{dataset}: labels of task {task} are not those of its task card ({what}); convert it again")


def split_hash(record_hashes: Sequence[np.ndarray]) -> str:
    """16 hex digits that name which records are in train, val and test: uint64 hashes of their ids, in any order."""
    digest = hashlib.sha256()
    for hashes in record_hashes:
        ordered = np.sort(hashes).astype("<u8")
        digest.update(len(ordered).to_bytes(8, "little") + ordered.tobytes())
    return digest.hexdigest()[:16]


def check_split(dataset: str, version: str, found: str) -> str:
    """In words what a data folder's split is, by its task card. Raises DataError where the card of this version has
    another `split_hash`: numbers on it are not those of others on the same name.
    """
    card = cards().get(dataset.partition("@")[0])
    if card is None:
        return f"split {found}, no task card"
    fixed = card.get("split_hashes", {}).get(version)
    if fixed not in (None, found):
        raise DataError(
            f"{dataset} {version}: its split has the hash {found}, its task card says {fixed}; convert all of it, with "
            "the default split"
        )
    return f"split {found} ({card['split']}{'' if fixed else '; the card has no hash to compare'})"


def meanings(label: str, task: str | None, datasets: Iterable[str]) -> frozenset[str] | None:
    """What `label` of `task` means, by the card of the first of `datasets` that has that task; None without a card."""
    for dataset in datasets:
        means = cards().get(dataset, {}).get("tasks", {}).get(task or "", {}).get("means", {})
        if label in means:
            return frozenset(_plain(name) for name in means[label])
    return None


def domains(
    labels: Sequence[str],
    pretraining_labels: Iterable[str],
    probed: Iterable[Mapping[str, Any]],
    lineage: Iterable[Mapping[str, Any]],
    task: str | None = None,
    pretraining_task: str | None = None,
) -> list[str]:
    """The domain of each of `labels`, of `task`.

    probed, lineage: entries as a data folder's card has them under "lineage" (`dataset`, `contains`,
    digests), of the data probed and of all data that the encoder has met. Sets that are contained in one
    another share a name.
    """
    probed, lineage = list(probed), list(lineage)
    if _sets(probed) & _sets(lineage):
        return ["contaminated"] * len(labels)
    trained_on, here = ([entry["dataset"] for entry in entries] for entries in (lineage, probed))
    met = [(name, meanings(name, pretraining_task, trained_on)) for name in pretraining_labels]

    def seen(label: str) -> bool:
        means = meanings(label, task, here)
        return any(_same(label, means, name, theirs) for name, theirs in met)

    return ["ood_seen" if seen(label) else "ood_unseen" for label in labels]


def _same(label: str, means: frozenset[str] | None, name: str, theirs: frozenset[str] | None) -> bool:
    """Whether two labels, each with what a card says of it, mean the same."""
    if means is not None and theirs is not None:
        return bool(means & theirs)
    plain = (means or frozenset()) | {_plain(label)}, (theirs or frozenset()) | {_plain(name)}
    return bool(plain[0] & plain[1])


def _sets(lineage: Iterable[Mapping[str, Any]]) -> set[str]:
    return {_plain(name) for entry in lineage for name in (entry["dataset"], *entry.get("contains", ()))}


def by_domain(of_labels: Sequence[str]) -> dict[str, np.ndarray]:
    """bool [K] masks of the labels of each domain that occurs, in the order of `DOMAINS`."""
    got = np.asarray(of_labels)
    return {domain: got == domain for domain in DOMAINS if (got == domain).any()}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
