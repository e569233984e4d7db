"""Which split, which shard and which place on the subset circle a patient gets: a pure function of names.

Three salted blake2b-64 hashes of (data set, group) decide, so that neither the order of files nor the number
of workers nor the other patients matter. Reads no signal. Invariant: everything of one group lies in one
split and in one shard, and inside a shard the groups follow their place on the circle.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ecg_jax.datasets.source import Item, PackedItems, pack
from ecg_jax.errors import DataError, UsageError
from ecg_jax.progress import track
from ecg_jax.shards import LANES
from ecg_jax.shards.schema import FRAME_EXTRA, LEAD_NAMES, LENGTH, Leads

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
    items: PackedItems

    def file_name(self, dataset: str) -> str:
        return shard_name(dataset, self.split, self.number, self.count)


def shard_name(dataset: str, split: str, number: int, count: int) -> str:
    """TFDS's pattern. TFDS allows no hyphen in a data set's name."""
    return f"{dataset.replace('-', '_')}-{split}.tfrecord-{number:05d}-of-{count:05d}"


class Listing(NamedTuple):
    """All items of a source and where each belongs, a few bytes each."""

    items: PackedItems
    split: np.ndarray  # int8 [n], index into SPLITS
    place: np.ndarray  # uint64 [n], hash of the group that decides the shard
    digest: str  # of ids, groups and official splits, in order


def survey(dataset: str, items: Sequence[Item], key: Callable[[str], str] = str) -> Listing:
    """Look at every item once, holding 20 bytes of each.

    `key` maps a group to the name that is hashed (its pseudonym). An official split wins over the hash, and goes for
    all recordings of its patient. Raises DataError naming a record id that is listed twice, an unknown split, or a
    patient that the source puts into two splits.
    """
    items = items if isinstance(items, PackedItems) else pack(items)
    identity, place = np.empty(len(items), np.uint64), np.empty(len(items), np.uint64)
    official, hashed = np.empty(len(items), np.int8), np.empty(len(items), np.int8)
    digest = hashlib.sha256()
    for i, item in enumerate(track(items, "listing", unit="records")):
        if item.split is not None and item.split not in SPLITS:
            raise DataError(f"record {item.record_id}: split {item.split!r} is none of {', '.join(SPLITS)}")
        name = key(item.group)
        identity[i] = hash64("record", dataset, item.record_id)
        place[i] = hash64("shard", dataset, name)
        official[i] = -1 if item.split is None else SPLITS.index(item.split)
        hashed[i] = SPLITS.index(split_of(dataset, name))
        digest.update(json.dumps([item.record_id, item.group, item.split]).encode() + b"\n")
    _refuse_repeated(dataset, items, identity)
    return Listing(items, _settle(items, place, official, hashed), place, digest.hexdigest()[:16])


def _refuse_repeated(dataset: str, items: PackedItems, identity: np.ndarray) -> None:
    order = np.argsort(identity, kind="stable")
    same = identity[order][1:] == identity[order][:-1]
    seen: set[str] = set()
    for i in order[np.flatnonzero(np.append(same, False) | np.append(False, same))]:  # hashes may also collide
        record_id = items[int(i)].record_id
        if record_id in seen:
            raise DataError(f"{dataset}: record id {record_id!r} is listed twice: ids must be unique")
        seen.add(record_id)


def _settle(items: PackedItems, place: np.ndarray, official: np.ndarray, hashed: np.ndarray) -> np.ndarray:
    """int8 [n]: the split of each item. Items with one `place` are one patient's."""
    known = np.flatnonzero(official >= 0)
    order = known[np.argsort(place[known], kind="stable")]
    same = place[order][1:] == place[order][:-1]
    for at in np.flatnonzero(same & (official[order][1:] != official[order][:-1]))[:1]:
        one, other = (items[int(i)] for i in order[at : at + 2])
        raise DataError(
            f"patient {other.group} is in two splits: record {one.record_id} in {one.split}, record {other.record_id} "
            f"in {other.split}; training would see test patients: correct the source's splits"
        )
    split = np.where(official >= 0, official, hashed)
    if 0 < len(known) < len(items):
        at = np.minimum(np.searchsorted(place[order], place), len(order) - 1)
        split = np.where(place[order][at] == place, official[order][at], split)
    return split.astype(np.int8)


def check_shards(shards: int | None) -> None:
    """Raise UsageError for a number of shards that does not fill the lanes."""
    if shards is not None and (shards < LANES or shards % LANES):
        near = max(LANES, round(shards / LANES) * LANES)
        raise UsageError(f"--shards {shards}: must be a multiple of {LANES} (one lane each), for example {near}")


def plan(listing: Listing, leads: Leads, shards: int | None) -> list[ShardPlan]:
    """Every shard of the data folder, empty ones included, train first.

    `shards` fixes the number for train (a multiple of 8; the other splits get at most as many), None goes by
    size. Splits without records get no shard.
    """
    check_shards(shards)
    plans = []
    for number, split in enumerate(SPLITS):
        chosen = np.flatnonzero(listing.split == number)
        if not len(chosen):
            continue
        count = shard_count(len(chosen), leads)
        if shards is not None:
            count = shards if split == "train" else min(count, shards)
        shard = (listing.place[chosen] % np.uint64(count)).astype(np.int32)
        order = np.argsort(shard, kind="stable")  # inside a shard, the order of the source
        edges = np.searchsorted(shard[order], np.arange(count + 1))
        for i in range(count):
            plans.append(ShardPlan(split, i, count, listing.items.take(chosen[order[edges[i] : edges[i + 1]]])))
    return plans


def circle(order_hash: np.ndarray, offset: float) -> np.ndarray:
    """Distance uint64 [n] from `offset` (a share of the circle) forward to each order hash, mod 2^64."""
    start = np.uint64(int(offset * 2.0**64) & 0xFFFFFFFFFFFFFFFF)
    return np.asarray(order_hash, np.uint64) - start
