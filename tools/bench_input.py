"""Speed of the shards: encoding, loading a table, the resident order, the stream. ECG a second, wall and CPU.

    python tools/bench_input.py [--data DIR] [--records 4096] [--seconds 5]

Without --data it converts random recordings into a temporary folder first. All is read from the page cache,
so the numbers are those of the code, not of the disk; the plain read of the same bytes stands beside them.
"""

import argparse
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ecg_jax.datasets.source import Item, Source
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record
from ecg_jax.shards import schema, tables
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.resident import Order, lane_layout

LABELS = ("a", "b", "c", "d", "e", "f")


def read(items: Sequence[Item]) -> Iterator[Record]:
    """Random walks, ten seconds at 100 Hz: the content does not matter here."""
    for item in items:
        rng = np.random.default_rng(item.where)
        signal = np.cumsum(rng.normal(0, 0.05, (1000, 12)), axis=0).astype(np.float32)
        labels = {"main": rng.integers(0, 2, len(LABELS)).astype(np.int8)}
        yield Record(signal, 100.0, item.record_id, item.group, item.group, labels=labels, split=item.split)


def random_folder(out: Path, records: int) -> Path:
    items = tuple(Item(f"r{i:06d}", f"p{i}", "train", i) for i in range(records))
    source = Source("bench", "1.0.0", "mV", {"main": LABELS}, items, read)
    return Path(convert(source, out, workers=len(os.sched_getaffinity(0)))["path"])


def cpu() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def measure(name: str, work: Callable[[], int], seconds: float) -> None:
    """Call `work` (it returns how many ECGs it did) once to warm up, then for `seconds`."""
    work()
    done, wall, used = 0, time.perf_counter(), cpu()
    while time.perf_counter() - wall < seconds:
        done += work()
    wall, used = time.perf_counter() - wall, cpu() - used
    print(f"{name:28} {done / wall:12,.0f} {done / max(used, 1e-9):12,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data folder; default: random recordings")
    parser.add_argument("--records", type=int, default=4096, help="of the random recordings")
    parser.add_argument("--seconds", type=float, default=5.0, help="per line")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_folder(args.data or random_folder(Path(scratch), args.records))
        task = next(iter(folder.card["tasks"]))
        shards = folder.shards("train")
        print(f"{folder.path.parent.name}: {sum(s.records for s in shards):,} train records, batch {args.batch}")
        print(f"{'':28} {'ECG/s':>12} {'per CPU s':>12}")

        (prepared,) = prepare_many(list(read([Item("r", "p", "train", 0)])))
        chunk = [prepared[0]] * 1000

        def encode() -> int:
            for p in chunk:
                schema.frame(schema.encode_indexed(p).payload)
            return len(chunk)

        measure("encode and frame", encode, args.seconds)

        def plain() -> int:
            for shard in shards:
                np.fromfile(shard.path, np.uint8)
            return sum(s.records for s in shards)

        measure("np.fromfile, same bytes", plain, args.seconds)
        measure("tables.load", lambda: len(tables.load([folder.path], "train", task)), args.seconds)

        table = tables.load([folder.path], "train", task)
        lanes = lane_layout(table)
        order, step = Order(lanes.counts, args.batch, 0), 0
        lane = np.arange(8)[:, None]

        def resident() -> int:
            nonlocal step
            for index in order.span(step, 16)[0]:
                lanes.signal[lane, index]
            step += 16
            return 16 * args.batch

        measure("resident, gathered by NumPy", resident, args.seconds)

        from ecg_jax.shards.stream import batches

        with contextlib.redirect_stderr(io.StringIO()):  # TensorFlow's greetings
            source = batches([folder.path], "train", task, args.batch, 0)
            next(source)
        measure("stream", lambda: sum(len(next(source)["signal"]) for _ in range(16)), args.seconds)


if __name__ == "__main__":
    sys.exit(main())
