"""The data of a run: which tables it needs, which loader carries them, what about them is worth remembering.

Reads shards through `shards.tables` (resident, host) or `shards.stream`; `val` and `test` are tables in all cases,
because they never shrink or grow with D. A process among several reads the shards of its own lanes. Puts nothing on a
device. Invariants: number and digest of the training records describe exactly those that training will see, and do
not depend on the number of processes.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ecg_jax import objectives
from ecg_jax.config import Config
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import LANES, catalog, host
from ecg_jax.shards import codes as codes_lib
from ecg_jax.shards import tables as tables_lib
from ecg_jax.shards.resident import Order
from ecg_jax.shards.tables import Table
from ecg_jax.training import hosts
from ecg_jax.training import mesh as mesh_lib

BASELINE_RECORDS = 2048  # training records that the baselines of masked codes are fitted on, at most
Loader = Literal["resident", "host", "stream"]
Batches = Callable[[int], Iterator[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Data:
    """Tables, and what the run needs to know of them; of several processes each has the records of its own lanes.

    train    None unless the loader is resident
    batches  (fields, number of processes) -> batches from a step on, for the other loaders

    book     the codebook whose codes are predicted, if any
    start    what the objective's `init` wants: "prior" float32 [K], prevalence of each label among the known ones of
             the training records (of the whole train split where they are streamed), kept off 0 and 1; or "prior" and
             "codebook" of the codes; or some records for k-means
    some     a few training records, for baselines
    facts    JSON-able: records, patients and digest of each split, for `data.json`
    lineage  JSON-able: what the cards of the folders say went in
    chain    names of the filter chains that the records went through
    """

    loader: Loader
    train: Table | None
    val: Table
    test: Table
    batches: Callable[[tuple[str, ...]], Batches] | None
    name: str
    records: int
    patients: int
    book: Any
    start: dict[str, np.ndarray]
    some: Table | None
    facts: dict[str, Any]
    lineage: list[dict[str, Any]]
    chain: str


def load(config: Config, tables: Mapping[str, Table] | None, mesh: Mesh, quiet: bool) -> Data:
    """Open the data of a run.

    Args:
        config: with nothing left to be resolved (`objectives.resolve`).
        tables: "train", "val" and "test" where the caller has them; then nothing is read, and the subset of
            the configuration is taken as applied.

    Raises:
        UsageError: no folders and no tables; a scale that the unit does not allow; tables that do not fit together;
            a loader that cannot; a number of processes that the shards cannot be split over.
        DataError: a folder or shard is missing or damaged; no such task or label; a split without known labels; no
            codes of this codebook, or codes of other beats or shards.
    """
    wanted, supervised = config.data, config.objective.name == "supervised"
    if tables is None and not wanted.folders:
        raise UsageError('data.folders is empty; name at least one folder, as data.folders=["OUT/ptbxl/1.0.3"]')
    folders = [catalog.open_folder(Path(folder)) for folder in wanted.folders]
    exclude = catalog.read_exclude(Path(wanted.exclude)) if wanted.exclude else frozenset()  # in no split
    subset = catalog.Subset(wanted.subset, wanted.subset_records, wanted.subset_offset)

    where = [folder.path for folder in folders]
    task = wanted.task if supervised else ""
    limits = {"labels": wanted.labels if supervised else None, "exclude": exclude}
    book = objectives.book(config)
    codes = [codes_lib.expected_name(book.id, config.model.beats)] * len(where) if book else None
    beats = config.model.input == "beats" or not supervised
    if beats and not codes:
        from ecg_jax.shards import refresh

        for folder in folders:
            refresh.check_detector(folder.card, folder.path)

    lanes = mesh_lib.own_lanes(mesh, LANES)

    def read(split: str, **more: Any) -> Table:
        if tables is not None:
            return tables[split]
        return tables_lib.load(where, split, task, codes=codes, lanes=lanes, **limits, **more)

    loader = _loader(config, tables, folders, mesh, quiet)
    for folder in folders if hosts.count() > 1 else ():
        hosts.check_count(hosts.count(), len(folder.shards("train")), f"training shards of {folder.path}")
    by_index = loader == "stream" and supervised  # nothing but the index is read: it may lie on a slow disk
    with hosts.together("shards"):  # what a process cannot read ends all of them, before they add up what they have
        val, test = (read(split) for split in (wanted.val_split, wanted.test_split))
        train = None if by_index else read("train", subset=subset, mapped=loader != "resident")
        digests = {id(table): _digests(table) for table in (train, val, test) if table is not None}
    about = {"val": _about(val, digests[id(val)]), "test": _about(test, digests[id(test)])}
    batches = some = start = None
    if by_index:
        index = tables_lib.choose(where, "train", wanted.task, subset=subset, **limits).index
        digest = hashlib.sha256(index["record"].tobytes()).hexdigest()[:16]
        known, positive = _card_counts(folders, wanted.task, val.label_names)
        about["train"] = _About(len(index), len(np.unique(index["group"])), digest, known, positive)
    else:
        about["train"] = _about(train, digests[id(train)])
        some = None if supervised else _some(train, BASELINE_RECORDS)
    for split in about if supervised else ():
        if not about[split].known.any():
            raise DataError(f"the {split} split has no record with a known label; training needs train, val and test")
    seen = about["train"]
    start = _start(config, train, book, (seen.positive + 0.5) / (seen.known + 1.0))
    if loader == "host":
        order = Order(np.bincount(train.lanes_of_all, minlength=LANES), config.train.batch, config.train.seed)
        mapped = train

        def batches(fields: tuple[str, ...]) -> Batches:
            return lambda step: host.batches(mapped, order, fields, lanes, step)

    elif loader == "stream":
        batches = _stream(config, where, subset, limits, task, codes, lanes)
    _fitting(config, [table for table in (train, val, test) if table is not None])
    train = train if loader == "resident" else None
    facts = {
        split: {"records": found.records, "patients": found.patients, "digest": found.digest}
        for split, found in about.items()
    }
    if loader == "stream" and hosts.count() > 1:
        facts["stream processes"] = hosts.count()  # each has an order of its own, so another number is another order
    lineage = [entry for folder in folders for entry in folder.card.get("lineage", [])]
    if book:
        facts["codebook"] = book.id
        lineage += [entry for entry in book.info["lineage"] if entry not in lineage]
    return Data(
        loader=loader,
        train=train,
        val=val,
        test=test,
        batches=batches,
        name="+".join(dict.fromkeys(folder.card["name"] for folder in folders)) or "tables",
        records=seen.records,
        patients=seen.patients,
        book=book,
        start=start,
        some=some,
        facts=facts,
        lineage=lineage,
        chain="+".join(dict.fromkeys(folder.card["chain"]["name"] for folder in folders)),
    )


class _About(NamedTuple):
    """Of a split, all processes together: records, patients, digest, and per label int [K] known and positive."""

    records: int
    patients: int
    digest: str
    known: np.ndarray
    positive: np.ndarray


def _digests(table: Table) -> np.ndarray:
    """int64 [8, 32], lane by lane, so that any number of processes comes to the same: of ids, labels, observed spans
    and a few signals, enough to notice other data in milliseconds."""
    digests = np.zeros((LANES, 32), np.int64)
    about = repr((table.unit, tuple(table.leads), tuple(table.label_names))).encode()
    for lane in np.unique(table.lane).tolist():
        rows = np.flatnonzero(table.lane == lane)
        few = table.signal[rows[:: max(1, len(rows) // 8)]]
        digest = hashlib.sha256(about)
        for part in (table.record_hash[rows], table.labels[rows], table.valid[rows], few):
            digest.update(np.ascontiguousarray(part).tobytes())
        digests[lane] = np.frombuffer(digest.digest(), np.uint8)
    return digests


def _about(table: Table, digests: np.ndarray) -> _About:
    """What all processes together have of a split; `digests` as `_digests`."""
    digests = _all_of(table, digests)
    counts = np.stack([(table.labels >= 0).sum(0), (table.labels == 1).sum(0)])
    known, positive = _all_of(table, counts)
    patients = int(_all_of(table, np.array(len(np.unique(table.group_hash)))))
    digest = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
    return _About(len(table.lanes_of_all), patients, digest, known, positive)


def _all_of(table: Table, own: np.ndarray) -> np.ndarray:
    """The sum over the processes, where each has a part of the table."""
    return own if table.whole_lane is None else hosts.total(own)


def whole(table: Table, signals: bool = False) -> Table:
    """A table of which every process has the records of its lanes, on every process; with samples only if asked for."""
    if table.whole_lane is None:
        return table
    own = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    ids = np.array([name.encode() for name in table.record_ids], np.bytes_)
    width = max(int(n) for n in np.concatenate(hosts.gather(np.array([ids.dtype.itemsize]))))
    columns = {name: value for name, value in own.items() if isinstance(value, np.ndarray) and name != "whole_lane"}
    columns["signal"] = np.asarray(table.signal[:]) if signals else np.zeros((len(table), 0, 0), np.int16)
    columns["record_ids"] = ids.astype(f"S{width}")
    joined = {name: np.concatenate(hosts.gather(values)) for name, values in columns.items()}
    # Inside a lane the order is the selection's; lanes come to their places in it.
    order = np.empty(len(table.whole_lane), np.int64)
    for lane in range(LANES):
        order[table.whole_lane == lane] = np.flatnonzero(joined["lane"] == lane)
    joined = {name: values[order] for name, values in joined.items()}
    names = [name.decode() for name in joined.pop("record_ids").tolist()]
    return dataclasses.replace(table, **joined, record_ids=names, whole_lane=None)


def _start(config: Config, train: Table | None, book: Any, prior: np.ndarray) -> dict[str, np.ndarray]:
    """What the objective's `init` wants to know."""
    if config.objective.name == "supervised":
        return {"prior": prior.astype(np.float32)}
    if book is not None:
        counts = np.bincount(train.codes[train.codes != NO_CODE], minlength=book.config.codes)
        counts = _all_of(train, counts) + 0.5
        return {"prior": (counts / counts.sum()).astype(np.float32), "codebook": book.params["codebook"]}
    some = _some(train, config.codebook.sample, signals=True)
    at = np.arange(config.codebook.sample) % len(some)  # shapes do not depend on how many there are
    return {"signal": some.signal[at], "valid": some.valid[at], "rpeaks": some.rpeaks[at]}


def _some(table: Table, most: int, signals: bool = False) -> Table:
    """`most` records spread evenly over the table, or all; on every process."""
    lanes = table.lanes_of_all
    at = np.unique(np.linspace(0, len(lanes) - 1, min(most, len(lanes))).astype(int))
    own = np.arange(len(table)) if table.whole_lane is None else np.flatnonzero(np.isin(lanes, np.unique(table.lane)))
    rows = np.flatnonzero(np.isin(own, at))
    each = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    cut = {name: value[rows] for name, value in each.items() if isinstance(value, np.ndarray) and name != "whole_lane"}
    if signals:
        cut["signal"] = np.asarray(table.signal[rows])
    elif not isinstance(table.signal, np.ndarray):
        cut["signal"] = np.zeros((len(rows), 0, 0), np.int16)
    cut |= {"record_ids": [table.record_ids[i] for i in rows]}
    if table.whole_lane is not None:
        cut["whole_lane"] = lanes[at]
    return whole(dataclasses.replace(table, **cut), signals)


def _fitting(config: Config, tables: list[Table]) -> None:
    """Refuse splits of different labels or leads, and millivolt where there are none."""
    first = tables[0]
    for table in tables:
        if (table.label_names, table.leads) != (first.label_names, first.leads):
            raise UsageError("the splits have different labels or leads; load them with the same data.labels")
        if config.model.scale == "mv" and table.unit != "mV":
            raise UsageError(f"model.scale = 'mv', but the data are in unit {table.unit!r}; use gain or zscore")


def _card_counts(folders: list[catalog.DataFolder], task: str, names: Any) -> tuple[np.ndarray, np.ndarray]:
    """(known, positive) int [K] over the whole train split, as the cards have them."""
    known, positive = np.zeros((2, len(names)), np.int64)
    for folder in folders:
        of_card = folder.labels(task)
        for k, name in enumerate(names):
            if name in of_card:
                known[k] += folder.card["known"][task]["train"][of_card.index(name)]
                positive[k] += folder.card["positives"][task]["train"][of_card.index(name)]
    return known, positive


def _stream(
    config: Config,
    folders: list[Path],
    subset: Any,
    limits: dict,
    task: str,
    codes: list[str] | None,
    lanes: Sequence[int],
) -> Callable[[tuple[str, ...]], Batches]:
    how = {"subset": subset, "codes": codes, "lanes": lanes, **limits}

    def batches(fields: tuple[str, ...], start_step: int) -> Iterator[dict]:
        from ecg_jax.shards import stream  # TensorFlow: only where it is needed

        batch, seed = config.train.batch * len(lanes) // LANES, config.train.seed
        return stream.batches(folders, "train", task, batch, seed, fields=fields, start_step=start_step, **how)

    return lambda fields: functools.partial(batches, fields)


def _loader(config: Config, tables: Any, folders: list[catalog.DataFolder], mesh: Mesh, quiet: bool) -> Loader:
    """What `auto` means here: `resident` where the records fit half of the memory of the devices, `host` where they fit
    that of the machines, so that a shuffled read costs no disk, else `stream`.
    """
    loader = config.train.loader
    if loader in ("stream", "host") and not folders:
        raise UsageError(f"train.loader = {loader!r} reads data folders; name them in data.folders")
    if loader != "auto":
        return loader
    if tables is not None:
        return "resident"
    splits = ("train", config.data.val_split, config.data.test_split)
    records = sum(folder.card["splits"].get(split, {}).get("records", 0) for folder in folders for split in splits)
    need = records * 1000 * 2 * max((len(folder.card["leads"]) for folder in folders), default=12) * 1.1
    have, where = _memory(mesh)
    # All have to come to the same, by the machine that has least.
    have, free = np.min(hosts.gather(np.array([[have, _free_memory() * hosts.count()]])), (0, 1)).tolist()
    chosen: Loader = "resident" if need <= have / 2 else "host" if need <= free else "stream"
    if not quiet:
        why = {
            "resident": f"half of the {have / 2**30:.1f} GiB {where} holds them",
            "host": f"more than half of the {have / 2**30:.1f} GiB {where}, but the machine's memory holds them",
            "stream": f"more than the {free / 2**30:.1f} GiB of memory that are free",
        }
        hosts.say(f"loader {chosen}: {need / 2**30:.2f} GiB of signals, {why[chosen]}")
    return chosen


def _memory(mesh: Any) -> tuple[float, str]:
    devices = mesh.devices.flat
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
        return float(min(limits)) * len(limits), "on the devices"
    return _free_memory() / 2, "of memory for them (a table and its copy in lane order)"


def _free_memory() -> float:
    """Bytes that this machine could give, files in its cache included."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024.0
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
