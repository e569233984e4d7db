"""Feeds training from shards on disk through tf.data, for data that fits no memory. Imports TensorFlow;
nothing else does.

Bytes stay bytes: chunks of the chosen runs in a new order per epoch, sixteen of them interleaved, serialized
examples shuffled in a buffer, then a whole batch parsed at once into int16. No augmentation here, that is the
device's. Invariants: the order is a function of (selection, seed, epoch) under one TensorFlow release; in
every epoch each chosen record comes exactly once; batch `s` is the same whether the run began at 0 or at `s`;
TensorFlow never sees a GPU.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.records.leads import expand_matrix
from ecg_jax.shards import schema
from ecg_jax.shards.catalog import WHOLE, Subset
from ecg_jax.shards.grouping import hash64
from ecg_jax.shards.tables import Selection, choose, to_twelve

CHUNK = 128  # records read in one go, 3 MB: long enough for a network disk, short enough to mix well
CYCLE, BLOCK = 16, 16  # chunks open at once, records taken from each in turn
READ_BYTES = 1 << 18
MANY_EPOCHS = 1 << 40


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
    buffer_records: int = 4096,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the chosen records (arguments as in `tables.load`) for ever, or `steps` of them, from
    `start_step` on.

    Each is a dict: signal int16 [B, 1000, L], labels int8 [B, K], valid int32 [B, 2], record_hash uint64 [B],
    epoch int32 [B]. Epochs follow each other without a gap, so a batch may hold the end of one and the
    beginning of the next.

    buffer_records  serialized examples shuffled together, 24 kB each
    threads         of the pipeline; None: the cores that this process may use

    Raises UsageError for a bad batch, DataError for damaged shards (naming file and byte) besides those of
    `load`.
    """
    if batch < 1 or start_step < 0:
        raise UsageError(f"batch {batch} from step {start_step}: the batch must be positive, the step not negative")
    chosen = choose(folders, split, task, labels=labels, subset=subset, exclude=exclude)
    return _iterate(chosen, batch, seed, start_step, steps, buffer_records, threads or len(os.sched_getaffinity(0)))


def _iterate(
    chosen: Selection,
    batch: int,
    seed: int,
    start_step: int,
    steps: int | None,
    buffer_records: int,
    threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    tf = _tensorflow()
    first_epoch, skip = divmod(start_step * batch, chosen.records)
    dataset = _dataset(tf, chosen, batch, seed, first_epoch, skip, buffer_records, threads)
    iterator = iter(dataset.as_numpy_iterator())
    finish = _Finish(chosen)
    for step in range(start_step, MANY_EPOCHS) if steps is None else range(start_step, start_step + steps):
        try:
            raw = next(iterator)
        except tf.errors.OpError as error:
            raise _explained(chosen, error) from None
        position = np.arange(step * batch, (step + 1) * batch)
        yield finish(raw) | {"epoch": (position // chosen.records).astype(np.int32)}


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
    """(paths, int64 [n, 3]: byte where it starts, records, folder) of runs of at most CHUNK chosen
    records."""
    paths: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    for folder, shard, rows in chosen.parts:
        end = rows["frame"] + rows["length"] + np.uint64(schema.FRAME_EXTRA)
        gaps = np.flatnonzero(rows["frame"][1:] != end[:-1]) + 1
        for a, b in zip([0, *gaps.tolist()], [*gaps.tolist(), len(rows)], strict=True):
            for start in range(a, b, CHUNK):
                paths.append(str(shard.path))
                numbers.append((int(rows["frame"][start]), min(CHUNK, b - start), folder))
    return paths, np.array(numbers, np.int64)


def _dataset(
    tf: Any,
    chosen: Selection,
    batch: int,
    seed: int,
    first_epoch: int,
    skip: int,
    buffer_records: int,
    threads: int,
) -> Any:
    names, numbers = chunks(chosen)
    paths, numbers = tf.constant(names), tf.constant(numbers)
    several = len(chosen.folders) > 1

    def read(path: Any, number: Any) -> Any:
        # The public TFRecordDataset cannot begin inside a file; the operation beneath it can.
        raw = tf.raw_ops.TFRecordDatasetV2(
            filenames=path[None], compression_type="", buffer_size=READ_BYTES, byte_offsets=number[:1]
        )
        records = tf.data.experimental.from_variant(raw, tf.TensorSpec([], tf.string)).take(number[1])
        folder = tf.data.Dataset.from_tensors(number[2]).repeat()
        return tf.data.Dataset.zip((records, folder)) if several else records

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

    fields = {
        "signal": tf.io.FixedLenFeature([], tf.string),
        "valid": tf.io.FixedLenFeature([2], tf.int64),
        "record_id": tf.io.FixedLenFeature([], tf.string),
        f"labels/{chosen.task}": tf.io.FixedLenFeature([], tf.string),
    }
    same_leads = len({folder.leads for folder in chosen.folders}) == 1

    def parse(serialized: Any, folder: Any = None) -> dict[str, Any]:
        found = tf.io.parse_example(serialized, fields)
        if same_leads:
            found["signal"] = tf.io.decode_raw(found["signal"], tf.int16)
        found["folder"] = tf.zeros([batch], tf.int64) if folder is None else folder
        return found

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
    """Parsed bytes of a batch to arrays: labels aligned by name, leads expanded where folders differ, ids
    hashed."""

    def __init__(self, chosen: Selection) -> None:
        self.chosen = chosen
        self.names = [folder.card["name"] for folder in chosen.folders]
        self.expand = expand_matrix()

    def __call__(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        chosen, folder = self.chosen, raw["folder"]
        labels = np.full((len(folder), len(chosen.label_names)), -1, np.int8)
        for number, columns in enumerate(chosen.columns):
            rows = np.flatnonzero(folder == number)
            found = np.frombuffer(b"".join(raw[f"labels/{chosen.task}"][rows]), np.int8).reshape(
                len(rows), len(columns)
            )
            used = columns >= 0
            labels[np.ix_(rows, columns[used])] = found[:, used]
        ids = zip(folder.tolist(), raw["record_id"].tolist(), strict=True)
        hashes = [hash64("record", self.names[number], record_id.decode()) for number, record_id in ids]
        return {
            "signal": self._signal(raw["signal"]),
            "labels": labels,
            "valid": raw["valid"].astype(np.int32),
            "record_hash": np.array(hashes, np.uint64),
        }

    def _signal(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype == np.int16:
            return samples.reshape(len(samples), schema.LENGTH, -1)
        out = np.empty((len(samples), schema.LENGTH, len(schema.LEAD_NAMES[self.chosen.leads])), np.int16)
        for i, data in enumerate(samples):
            found = np.frombuffer(data, "<i2").reshape(schema.LENGTH, -1)
            out[i] = found if found.shape[1] == out.shape[2] else to_twelve(found, self.expand)
        return out


def _explained(chosen: Selection, error: Exception) -> DataError:
    """TensorFlow says that a record is broken, not where: read the shards again until it is found."""
    for _, shard, _ in chosen.parts:
        try:
            for _ in islice(schema.read_frames(shard.path), None):
                pass
        except DataError as found:
            return found
    return DataError(f"{chosen.folders[0].path}: TensorFlow cannot read the shards ({str(error).splitlines()[0]})")
