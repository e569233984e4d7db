"""Feeds training from shards on disk through tf.data, for data that fits no memory. Imports TensorFlow;
nothing else does.

Bytes stay bytes: chunks of the chosen runs in a new order per epoch, sixteen of them interleaved, serialized
examples shuffled in a buffer, then a whole batch parsed at once into int16. No augmentation here, that is the
device's. Invariants: the order is a function of (selection, seed, epoch) under one TensorFlow release; in
every epoch each chosen record comes exactly once; batch `s` is the same whether the run began at 0 or at `s`;
TensorFlow never sees a GPU.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.records.leads import expand_matrix
from ecg_jax.records.windows import MAX_PEAKS
from ecg_jax.shards import LANES, schema
from ecg_jax.shards.catalog import WHOLE, Subset
from ecg_jax.shards.host import to_twelve
from ecg_jax.shards.tables import FIELDS, Selection, choose, read_codes

CHUNK = 128  # records read in one go, 3 MB: long enough for a network disk, short enough to mix well
CYCLE, BLOCK = 16, 16  # chunks open at once, records taken from each in turn
READ_BYTES = 1 << 18
# Shape and type of the stored fields, labels (of one task) apart.
STORED: dict[str, tuple[list[int], str]] = {
    **dict.fromkeys(("signal", "rpeaks", "record_id", "patient_id", "source", "signature", "meta"), ([], "string")),
    **dict.fromkeys(("age", "sex"), ([], "float32")),
    "quality": ([], "int64"),
    "valid": ([2], "int64"),
}
MANY_EPOCHS = 1 << 40
TRIM_SECONDS = 0.5  # at least between two returns of memory; one takes 20 ms


def batches(
    folders: Sequence[Path],
    split: str,
    task: str,
    batch: int,
    seed: int,
    *,
    start_step: int = 0,
    steps: int | None = None,
    labels: Sequence[str] | None = None,
    subset: Subset = WHOLE,
    exclude: Collection[int] = frozenset(),
    codes: Sequence[Path | str] | None = None,
    lanes: Collection[int] = range(LANES),
    fields: Sequence[str] = FIELDS,
    buffer_records: int = 4096,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the chosen records (arguments as in `tables.load`) for ever, or `steps` of them, from
    `start_step` on.

    Each is a dict of `fields`, record_hash uint64 [B] and epoch int32 [B]. Epochs follow each other without a gap, so a
    batch may hold the end of one and the beginning of the next.

    fields          what a record is asked for, nothing else is parsed: signal int16 [B, 1000, L], labels int8 [B, K],
                    valid int32 [B, 2], rpeaks int16 [B, 50] and codes uint16 [B, 256] as a table has them, age, sex
                    float32 [B], quality int64 [B], and as bytes [B] record_id, patient_id, source, signature, meta

    lanes           only the shards of these are read, in an order of their own (by a process among several, which asks
                    for its part of the batch)
    buffer_records  serialized examples shuffled together, 24 kB each
    threads         of the pipeline; None: the cores that this process may use

    Raises UsageError for a bad batch, DataError for damaged shards (naming file and byte) besides those of
    `load`.
    """
    if batch < 1 or start_step < 0:
        raise UsageError(f"batch {batch} from step {start_step}: the batch must be positive, the step not negative")
    chosen = choose(folders, split, task, labels=labels, subset=subset, exclude=exclude)
    unknown = [name for name in fields if name not in (*STORED, "labels", "codes")]
    if unknown or ("codes" in fields and codes is None):
        raise UsageError(f"the stream carries no {unknown[0] if unknown else 'codes: name the folders of codes'}")
    if len(lanes) < LANES:
        chosen = replace(chosen, parts=tuple(part for part in chosen.parts if part[1].number % LANES in lanes))
        if not chosen.parts:
            raise DataError(f"no record of {split} lies in the shards of lanes {list(lanes)}: take a larger subset")
    finish = _Finish(chosen, fields, codes)
    threads = threads or len(os.sched_getaffinity(0))
    return _iterate(chosen, finish, batch, seed, start_step, steps, buffer_records, threads)


def _iterate(
    chosen: Selection,
    finish: "_Finish",
    batch: int,
    seed: int,
    start_step: int,
    steps: int | None,
    buffer_records: int,
    threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    tf = _tensorflow()
    first_epoch, skip = divmod(start_step * batch, chosen.records)
    dataset = _dataset(tf, chosen, finish.parsed, batch, seed, first_epoch, skip, buffer_records, threads)
    iterator = iter(dataset.as_numpy_iterator())
    trimmed, before = time.monotonic(), first_epoch
    for step in range(start_step, MANY_EPOCHS) if steps is None else range(start_step, start_step + steps):
        try:
            raw = next(iterator)
        except tf.errors.OpError as error:
            raise _explained(chosen, error) from None
        epoch = (np.arange(step * batch, (step + 1) * batch) // chosen.records).astype(np.int32)
        if epoch[-1] != before and time.monotonic() - trimmed > TRIM_SECONDS:
            _give_back()
            trimmed = time.monotonic()
        before = epoch[-1]
        yield finish(raw) | {"epoch": epoch}


def _give_back() -> None:
    """Have the C library give back memory that is free. Every epoch is read by new threads of TensorFlow, each of which
    fills a heap of its own with a whole shuffle buffer: glibc keeps all of them, as many as eight for each core.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    try:
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    except RuntimeError:  # TensorFlow is running already, so it has what it will ever have
        if any(device.device_type != "CPU" for device in tf.config.get_visible_devices()):
            raise MachineError(
                "TensorFlow was started with an accelerator before the stream loader could hide it: call "
                'tf.config.set_visible_devices([], "GPU") first'
            ) from None
    return tf


def chunks(chosen: Selection) -> tuple[list[str], np.ndarray]:
    """(paths, int64 [n, 3]: byte where it starts, records, place of the first one in the selection) of runs of at most
    CHUNK chosen records."""
    paths: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    before = 0
    for _, shard, rows in chosen.parts:
        end = rows["frame"] + rows["length"] + np.uint64(schema.FRAME_EXTRA)
        gaps = np.flatnonzero(rows["frame"][1:] != end[:-1]) + 1
        for a, b in zip([0, *gaps.tolist()], [*gaps.tolist(), len(rows)], strict=True):
            for start in range(a, b, CHUNK):
                paths.append(str(shard.path))
                numbers.append((int(rows["frame"][start]), min(CHUNK, b - start), before + start))
        before += len(rows)
    return paths, np.array(numbers, np.int64)


def _dataset(
    tf: Any,
    chosen: Selection,
    parsed: Sequence[str],
    batch: int,
    seed: int,
    first_epoch: int,
    skip: int,
    buffer_records: int,
    threads: int,
) -> Any:
    names, numbers = chunks(chosen)
    paths, numbers = tf.constant(names), tf.constant(numbers)

    def read(path: Any, number: Any) -> Any:
        # The public TFRecordDataset cannot begin inside a file; the operation beneath it can.
        raw = tf.raw_ops.TFRecordDatasetV2(
            filenames=path[None], compression_type="", buffer_size=READ_BYTES, byte_offsets=number[:1]
        )
        records = tf.data.experimental.from_variant(raw, tf.TensorSpec([], tf.string)).take(number[1])
        return tf.data.Dataset.zip((records, tf.data.Dataset.range(number[2], number[2] + number[1])))

    def epoch(number: Any) -> Any:
        key = tf.stack([tf.constant(seed, tf.int64), number])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(names)), seed=key)
        chunk_list = tf.data.Dataset.from_tensor_slices((tf.gather(paths, order), tf.gather(numbers, order)))
        records = chunk_list.interleave(
            read,
            cycle_length=CYCLE,
            block_length=BLOCK,
            num_parallel_calls=min(CYCLE, threads),
            deterministic=True,
        )
        shuffle_seed = tf.random.stateless_uniform([], key, minval=None, maxval=None, dtype=tf.int64)
        return records.shuffle(min(buffer_records, chosen.records), shuffle_seed, reshuffle_each_iteration=False)

    wanted = {name: tf.io.FixedLenFeature(shape, getattr(tf, kind)) for name, (shape, kind) in STORED.items()}
    wanted[f"labels/{chosen.task}"] = tf.io.FixedLenFeature([], tf.string)
    features = {name: wanted[name] for name in parsed}
    decoded = "signal" in features and len({folder.leads for folder in chosen.folders}) == 1

    def parse(serialized: Any, row: Any) -> dict[str, Any]:
        found = tf.io.parse_example(serialized, features) if features else {}
        if decoded:
            found["signal"] = tf.io.decode_raw(found["signal"], tf.int16)
        return found | {"row": row}

    dataset = tf.data.Dataset.range(first_epoch, MANY_EPOCHS).flat_map(epoch).skip(skip)
    dataset = dataset.batch(batch, drop_remainder=True).map(parse, num_parallel_calls=threads, deterministic=True)
    options = tf.data.Options()
    options.autotune.enabled = False  # it takes half of the memory if it may
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.inject_prefetch = False
    return dataset.prefetch(2).with_options(options)


class _Finish:
    """Parsed bytes of a batch to arrays: labels aligned by name, leads expanded where folders differ, codes joined.

    What the index says of a record (hash, observed span) is looked up by its place in the selection, as are codes and
    the R peaks that they were cut at. `parsed`: what is left to be parsed.
    """

    def __init__(self, chosen: Selection, fields: Sequence[str], codes: Sequence[Path | str] | None) -> None:
        self.chosen, self.fields = chosen, tuple(fields)
        self.expand = expand_matrix()
        self.index = chosen.index[["record", "valid"]]
        self.folder = np.concatenate([np.full(len(rows), f) for f, _, rows in chosen.parts])
        self.beside: dict[str, np.ndarray] = {}
        if codes is not None and {"codes", "rpeaks"} & set(fields):
            self.beside = dict(zip(("codes", "rpeaks"), read_codes(chosen, codes), strict=True))
        looked_up = {"valid", *self.beside}
        self.parsed = [f"labels/{chosen.task}" if f == "labels" else f for f in fields if f not in looked_up]

    def __call__(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        row = raw["row"]
        return {name: self._field(name, raw, row) for name in self.fields} | {"record_hash": self.index["record"][row]}

    def _field(self, name: str, raw: dict[str, np.ndarray], row: np.ndarray) -> np.ndarray:
        if name in self.beside:
            return self.beside[name][row]
        match name:
            case "valid":
                return self.index["valid"][row].astype(np.int32)
            case "signal":
                return self._signal(raw["signal"])
            case "labels":
                return self._labels(raw[f"labels/{self.chosen.task}"], self.folder[row])
            case "rpeaks":
                return _peaks(raw["rpeaks"])
            case _:
                return raw[name]

    def _labels(self, stored: np.ndarray, folder: np.ndarray) -> np.ndarray:
        labels = np.full((len(folder), len(self.chosen.label_names)), -1, np.int8)
        for number, columns in enumerate(self.chosen.columns):
            rows = np.flatnonzero(folder == number)
            found = np.frombuffer(b"".join(stored[rows]), np.int8).reshape(len(rows), len(columns))
            used = columns >= 0
            labels[np.ix_(rows, columns[used])] = found[:, used]
        return labels

    def _signal(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype == np.int16:
            return samples.reshape(len(samples), schema.LENGTH, -1)
        out = np.empty((len(samples), schema.LENGTH, len(schema.LEAD_NAMES[self.chosen.leads])), np.int16)
        for i, data in enumerate(samples):
            found = np.frombuffer(data, "<i2").reshape(schema.LENGTH, -1)
            out[i] = found if found.shape[1] == out.shape[2] else to_twelve(found, self.expand)
        return out


def _peaks(stored: np.ndarray) -> np.ndarray:
    """int16 [B, 50] as `peaks.fitted`, without a loop over arrays: -1 beyond the last, of more than 50 the middle."""
    length = np.fromiter(map(len, stored), np.int64, len(stored)) // 2
    joined = np.frombuffer(b"".join(stored) + b"\xff\xff", "<i2")
    first = np.cumsum(length) - length + np.maximum(length - MAX_PEAKS, 0) // 2
    at = np.arange(MAX_PEAKS)
    there = at < np.minimum(length, MAX_PEAKS)[:, None]
    return np.where(there, joined[np.where(there, first[:, None] + at, 0)], np.int16(-1)).astype(np.int16)


def _explained(chosen: Selection, error: Exception) -> DataError:
    """TensorFlow says that a record is broken, not where: read the shards again until it is found."""
    for _, shard, _ in chosen.parts:
        try:
            for _ in islice(schema.read_frames(shard.path), None):
                pass
        except DataError as found:
            return found
    return DataError(f"{chosen.folders[0].path}: TensorFlow cannot read the shards ({str(error).splitlines()[0]})")
