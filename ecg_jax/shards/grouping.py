"""Which split, which shard and which place on the subset circle a patient gets: a pure function of names.

Three salted blake2b-64 hashes of (data set, group) decide, so that neither the order of files nor the number
of workers nor the other patients matter. Reads no signal. Invariant: everything of one group lies in one
split and in one shard, and inside a shard the groups follow their place on the circle.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ecg_jax.datasets.source import Item
from ecg_jax.errors import DataError, UsageError
from ecg_jax.shards.schema import FRAME_EXTRA, LEAD_NAMES, LENGTH, Leads

LANES = 8
SPLITS = ("train", "val", "test")
_EDGES = {"train": 0.90, "val": 0.95}  # upper edges on [0, 1); test is the rest
SHARD_BYTES = 128 << 20  # a shard of the automatic count is at most this long, and longer than half of it
Salt = Literal["split", "shard", "order", "group", "record"]


def hash64(salt: Salt, dataset: str, group: str) -> int:
    """blake2b of `dataset` and `group`, 8 bytes, little-endian, salted: unsigned 64-bit, the same
    everywhere."""
    data = f"{dataset}\0{group}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=salt.encode()).digest(), "little")


def split_of(dataset: str, group: str) -> str:
    """train, val or test, 90/5/5 of the groups, for a source without an official split."""
    place = hash64("split", dataset, group)
    for split, edge in _EDGES.items():
        if place < int(edge * 2.0**64):
            return split
    return "test"


def shard_of(dataset: str, group: str, shards: int) -> int:
    """Number of the shard, in [0, shards); its lane is this number mod 8."""
    return hash64("shard", dataset, group) % shards


def record_bytes(leads: Leads) -> int:
    """About how many bytes one record takes in a shard."""
    return 2 * LENGTH * len(LEAD_NAMES[leads]) + FRAME_EXTRA + 700


def shard_count(records: int, leads: Leads) -> int:
    """Shards for so many records: the smallest power of two, at least 8, that keeps a shard below 128 MiB."""
    count = LANES
    while records * record_bytes(leads) > count * SHARD_BYTES:
        count *= 2
    return count


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: `number` of `count` of `split`, from these items (in the order of the source)."""

    split: str
    number: int
    count: int
    items: tuple[Item, ...]

    def file_name(self, dataset: str) -> str:
        return shard_name(dataset, self.split, self.number, self.count)


def shard_name(dataset: str, split: str, number: int, count: int) -> str:
    """TFDS's pattern. TFDS allows no hyphen in a data set's name."""
    return f"{dataset.replace('-', '_')}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def official_splits(items: Sequence[Item]) -> dict[str, str]:
    """group -> its official split. Raises DataError naming a patient that the source puts into two."""
    official: dict[str, tuple[str, str]] = {}
    for item in items:
        if item.split is None:
            continue
        if item.split not in SPLITS:
            raise DataError(f"record {item.record_id}: split {item.split!r} is none of {', '.join(SPLITS)}")
        split, first = official.setdefault(item.group, (item.split, item.record_id))
        if split != item.split:
            raise DataError(
                f"patient {item.group} is in two splits: record {first} in {split}, record {item.record_id} "
                f"in {item.split}; training would see test patients: correct the source's splits"
            )
    return {group: split for group, (split, _) in official.items()}


def plan(
    dataset: str, items: Sequence[Item], leads: Leads, shards: int | None, key: Callable[[str], str] = str
) -> list[ShardPlan]:
    """Every shard of the data folder, empty ones included, train first.

    `shards` fixes the number for train (a multiple of 8; the other splits get at most as many), None goes by
    size. `key` maps a group to the name that is hashed (its pseudonym). Splits without records get no shard.
    """
    if shards is not None and (shards < LANES or shards % LANES):
        near = max(LANES, round(shards / LANES) * LANES)
        raise UsageError(f"--shards {shards}: must be a multiple of {LANES} (one lane each), for example {near}")
    official = official_splits(items)
    place: dict[str, tuple[str, int]] = {}
    members: dict[str, list[tuple[int, Item]]] = {split: [] for split in SPLITS}
    for item in items:
        if item.group not in place:
            name = key(item.group)
            split = official.get(item.group) or split_of(dataset, name)
            place[item.group] = split, hash64("shard", dataset, name)
        split, value = place[item.group]
        members[split].append((value, item))
    plans = []
    for split, chosen in members.items():
        if not chosen:
            continue
        count = shard_count(len(chosen), leads)
        if shards is not None:
            count = shards if split == "train" else min(count, shards)
        buckets: list[list[Item]] = [[] for _ in range(count)]
        for value, item in chosen:
            buckets[value % count].append(item)
        plans += [ShardPlan(split, number, count, tuple(bucket)) for number, bucket in enumerate(buckets)]
    return plans


def circle(order_hash: np.ndarray, offset: float) -> np.ndarray:
    """Distance uint64 [n] from `offset` (a share of the circle) forward to each order hash, mod 2^64."""
    start = np.uint64(int(offset * 2.0**64) & 0xFFFFFFFFFFFFFFFF)
    return np.asarray(order_hash, np.uint64) - start
