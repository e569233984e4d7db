"""The data of a run: which tables it needs, which loader carries them, what about them is worth remembering.

Reads shards through `shards.tables` (resident) or `shards.stream`; `val` and `test` are tables in both cases,
because they never shrink or grow with D. Puts nothing on a device. Invariant: number and digest of the training
records describe exactly those that training will see.
"""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecg_jax import objectives
from ecg_jax.config import Config
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import catalog
from ecg_jax.shards import codes as codes_lib
from ecg_jax.shards import tables as tables_lib
from ecg_jax.shards.tables import Table

BASELINE_RECORDS = 2048  # training records that the baselines of masked codes are fitted on, at most
Loader = Literal["resident", "stream"]


@dataclass(frozen=True)
class Data:
    """Tables (`train` is None when streamed), and what the run needs to know of them.

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
    stream: Callable[[int], Iterator[dict]] | None
    name: str
    records: int
    patients: int
    book: Any
    start: dict[str, np.ndarray]
    some: Table | None
    facts: dict[str, Any]
    lineage: list[dict[str, Any]]
    chain: str


def load(config: Config, tables: Mapping[str, Table] | None, mesh: Any, quiet: bool) -> Data:
    """Open the data of a run.

    Args:
        config: with nothing left to be resolved (`objectives.resolve`).
        tables: "train", "val" and "test" where the caller has them; then nothing is read, and the subset of
            the configuration is taken as applied.

    Raises:
        UsageError: no folders and no tables; a scale that the unit does not allow; tables that do not fit together;
            a loader that cannot carry beats.
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

    def read(split: str, **more: Any) -> Table:
        if tables is not None:
            return tables[split]
        return tables_lib.load(where, split, task, codes=codes, **limits, **more)

    loader = _loader(config, tables, folders, mesh, quiet, beats)
    filled = functools.partial(_filled, supervised=supervised)
    val, test = (filled(read(split), split) for split in (wanted.val_split, wanted.test_split))
    if loader == "resident":
        train = filled(read("train", subset=subset), "train")
        records, groups, digest, stream = len(train), train.group_hash, _digest(train), None
        known, positive = (train.labels >= 0).sum(0), (train.labels == 1).sum(0)
    else:
        train = None
        parts = tables_lib.choose(where, "train", wanted.task, subset=subset, **limits).parts
        rows = np.concatenate([rows for _, _, rows in parts])
        records, groups = len(rows), rows["group"]
        digest = hashlib.sha256(rows["record"].tobytes()).hexdigest()[:16]
        known, positive = _card_counts(folders, wanted.task, val.label_names)
        stream = _stream(config, where, subset, limits)
    patients = len(np.unique(groups))
    _fitting(config, [table for table in (train, val, test) if table is not None])
    if supervised and not np.any(known):
        raise DataError(f"no training record has a known label of task {wanted.task!r}; choose another task")
    facts = {"train": {"records": records, "patients": patients, "digest": digest}}
    for split, table in (("val", val), ("test", test)):
        counts = {"records": len(table), "patients": len(np.unique(table.group_hash))}
        facts[split] = counts | {"digest": _digest(table)}
    lineage = [entry for folder in folders for entry in folder.card.get("lineage", [])]
    if book:
        facts["codebook"] = book.id
        lineage += [entry for entry in book.info["lineage"] if entry not in lineage]
    return Data(
        loader=loader,
        train=train,
        val=val,
        test=test,
        stream=stream,
        name="+".join(dict.fromkeys(folder.card["name"] for folder in folders)) or "tables",
        records=records,
        patients=patients,
        book=book,
        start=_start(config, train, book, (positive + 0.5) / (known + 1.0)),
        some=None if supervised else _some(train, BASELINE_RECORDS),
        facts=facts,
        lineage=lineage,
        chain="+".join(dict.fromkeys(folder.card["chain"]["name"] for folder in folders)),
    )


def _start(config: Config, train: Table | None, book: Any, prior: np.ndarray) -> dict[str, np.ndarray]:
    """What the objective's `init` wants to know."""
    if config.objective.name == "supervised":
        return {"prior": prior.astype(np.float32)}
    if book is not None:
        counts = np.bincount(train.codes[train.codes != NO_CODE], minlength=book.config.codes) + 0.5
        return {"prior": (counts / counts.sum()).astype(np.float32), "codebook": book.params["codebook"]}
    some = _some(train, config.codebook.sample)
    at = np.arange(config.codebook.sample) % len(some)  # shapes do not depend on how many there are
    return {"signal": some.signal[at], "valid": some.valid[at], "rpeaks": some.rpeaks[at]}


def _some(table: Table, most: int) -> Table:
    """`most` records spread evenly over the table, or all."""
    at = np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).astype(int))
    each = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    cut = {name: value[at] for name, value in each.items() if isinstance(value, np.ndarray)}
    return dataclasses.replace(table, **cut, record_ids=[table.record_ids[i] for i in at])


def _filled(table: Table, split: str, supervised: bool) -> Table:
    if supervised and not (table.labels >= 0).any():
        raise DataError(f"the {split} split has no record with a known label; training needs train, val and test")
    return table


def _fitting(config: Config, tables: list[Table]) -> None:
    """Refuse splits of different labels or leads, and millivolt where there are none."""
    first = tables[0]
    for table in tables:
        if (table.label_names, table.leads) != (first.label_names, first.leads):
            raise UsageError("the splits have different labels or leads; load them with the same data.labels")
        if config.model.scale == "mv" and table.unit != "mV":
            raise UsageError(f"model.scale = 'mv', but the data are in unit {table.unit!r}; use gain or zscore")


def _digest(table: Table) -> str:
    """Of ids, labels, observed spans and a few signals: enough to notice other data, in milliseconds."""
    few = table.signal[:: max(1, len(table.signal) // 64)]
    digest = hashlib.sha256(repr((table.unit, tuple(table.leads), tuple(table.label_names))).encode())
    for part in (table.record_hash, table.labels, table.valid, few):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


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


def _stream(config: Config, folders: list[Path], subset: Any, limits: dict) -> Callable[[int], Iterator[dict]]:
    def batches(start_step: int) -> Iterator[dict]:
        from ecg_jax.shards import stream  # TensorFlow: only where it is needed

        task, batch, seed = config.data.task, config.train.batch, config.train.seed
        return stream.batches(folders, "train", task, batch, seed, start_step=start_step, subset=subset, **limits)

    return batches


def _loader(
    config: Config, tables: Any, folders: list[catalog.DataFolder], mesh: Any, quiet: bool, beats: bool
) -> Loader:
    """What `auto` means here: resident if the arrays fit half of the memory they have to live in, or need beats."""
    if beats and config.train.loader == "stream":
        raise UsageError("train.loader = 'stream' carries no R peaks and no codes; use train.loader=resident")
    if config.train.loader != "auto":
        if config.train.loader == "stream" and not folders:
            raise UsageError("train.loader = 'stream' reads data folders; name them in data.folders")
        return config.train.loader
    if tables is not None or beats:
        return "resident"
    splits = ("train", config.data.val_split, config.data.test_split)
    records = sum(folder.card["splits"].get(split, {}).get("records", 0) for folder in folders for split in splits)
    need = records * 1000 * 2 * max((len(folder.card["leads"]) for folder in folders), default=12) * 1.1
    have, where = _memory(mesh)
    loader: Loader = "resident" if need <= have / 2 else "stream"
    if not quiet:
        print(
            f"loader {loader}: {need / 2**30:.2f} GiB of signals, {have / 2**30:.1f} GiB {where}, "
            "half of it may be used",
            file=sys.stderr,
        )
    return loader


def _memory(mesh: Any) -> tuple[float, str]:
    devices = mesh.devices.flat
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
        return float(min(limits)) * len(limits), "on the devices"
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free / 2, "of memory for them (a table and its copy in lane order)"
