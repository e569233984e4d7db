"""Speed of the input: shards to memory, the three loaders, and other ways to keep ECG beside them. ECG a second.

    python tools/bench_input.py [--data DIR] [--records 8192] [--seconds 3] [--against torch] [--memory 10]

Without --data it converts random recordings into a temporary folder first. All is read from the page cache, so the
numbers are those of the code, not of the disk; the plain read of the same bytes stands beside them. Every line is the
median of --rounds rounds, taken in turn, in wall time and per second of this process's CPU.

--against torch: a shuffling PyTorch DataLoader (0 and 2 workers, the better one) over the same records as one WFDB or
.npy file each, and as rows of one HDF5 file. --memory N: anonymous memory after each of N epochs of host and stream;
the stream gives memory back twice a second, so take enough --records for an epoch to last that long (32768).
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ecg_jax.datasets.source import Item, Source
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record
from ecg_jax.shards import host, schema, tables
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.resident import Order, lane_layout

BEATS = ("signal", "valid", "rpeaks")
EVERY = (
    "signal",
    "labels",
    *BEATS[1:],
    "age",
    "sex",
    "quality",
    "record_id",
    "patient_id",
    "source",
    "signature",
    "meta",
)
WORKERS = ", 2 workers"
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


def anonymous() -> float:
    """MiB of this process's memory that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def compare(works: dict[str, Callable[[], int]], seconds: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians over `rounds` of (ECG a second, ECG a CPU second) of each; a work returns how many ECGs it did."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for work in works.values():
        with contextlib.redirect_stderr(io.StringIO()):  # TensorFlow's greetings
            work()
    for _ in range(rounds):
        for name, work in works.items():
            done, wall, used = 0, time.perf_counter(), cpu()
            while time.perf_counter() - wall < seconds:
                done += work()
            wall, used = time.perf_counter() - wall, cpu() - used
            found[name].append((done / wall, done / max(used, 1e-9)))
    medians = {name: tuple(map(statistics.median, zip(*rates, strict=True))) for name, rates in found.items()}
    for name, (wall, used) in medians.items():
        own = f"{used:12,.0f}" if not name.endswith(WORKERS) else f"{'':12}"  # theirs is not this process's time
        print(f"{name:48} {wall:12,.0f} {own}", flush=True)
    return medians


def torch_loaders(table: tables.Table, scratch: Path, batch: int, records: int) -> dict[str, Callable[[], int]]:
    """A work for each way to keep the first `records` of `table` for PyTorch; writes the files."""
    import h5py
    import torch
    import wfdb

    signal = table.signal[:records]
    for i, one in enumerate(signal):
        np.save(scratch / f"{i}.npy", one)
        about = {"fs": 100, "units": ["mV"] * 12, "sig_name": list(table.leads), "fmt": ["16"] * 12}
        wfdb.wrsamp(f"r{i}", d_signal=one, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(scratch), **about)
    with h5py.File(scratch / "rows.h5", "w") as file:
        file.create_dataset("signal", data=signal, chunks=(1, *signal.shape[1:]))

    class Records(torch.utils.data.Dataset):
        def __init__(self, kind: str) -> None:
            self.kind, self.file = kind, None

        def __len__(self) -> int:
            return len(signal)

        def __getitem__(self, i: int) -> np.ndarray:
            if self.kind == "npy":
                return np.load(scratch / f"{i}.npy")
            if self.kind == "wfdb":
                return wfdb.rdrecord(str(scratch / f"r{i}"), physical=False).d_signal.astype(np.int16)
            self.file = self.file or h5py.File(scratch / "rows.h5")["signal"]  # one handle per worker
            return self.file[i]

    def epochs(kind: str, workers: int) -> Iterator[int]:
        loader = torch.utils.data.DataLoader(
            Records(kind), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        while True:
            yield from (len(one) for one in loader)

    works = {}
    names = {"wfdb": "one WFDB file a record", "npy": "one .npy file a record", "hdf5": "rows of one HDF5 file"}
    for kind, name in names.items():
        works[f"DataLoader, {name}"] = epochs(kind, 0).__next__
        works[f"DataLoader, {name}{WORKERS}"] = epochs(kind, 2).__next__
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data folder; default: random recordings")
    parser.add_argument("--records", type=int, default=8192, help="of the random recordings")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--against", choices=["torch"])
    parser.add_argument("--memory", type=int, default=0, metavar="EPOCHS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = open_folder(args.data or random_folder(Path(scratch), args.records))
        task = next(iter(folder.card["tasks"]))
        shards = folder.shards("train")
        records = sum(s.records for s in shards)
        print(f"{folder.path.parent.name}: {records:,} train records, batch {args.batch}")
        print(f"{'':48} {'ECG/s':>12} {'per CPU s':>12}")

        table = tables.load([folder.path], "train", task)
        theirs = {}
        if args.against:  # before TensorFlow and its threads are there: a DataLoader forks
            theirs = compare(torch_loaders(table, Path(scratch), args.batch, 2048), args.seconds, args.rounds)
        if args.memory:
            _memory(folder.path, task, args.batch, args.memory)
        ours = compare(_works(folder, task, table, args.batch), args.seconds, args.rounds)
        for name, (rate, _) in theirs.items():
            print(f"host is {ours['host'][0] / rate:.1f}, stream {ours['stream'][0] / rate:.1f} times {name}")


def _works(folder, task: str, table: tables.Table, batch: int) -> dict[str, Callable[[], int]]:
    from ecg_jax.shards.stream import batches

    shards = folder.shards("train")
    (prepared,) = prepare_many(list(read([Item("r", "p", "train", 0)])))
    chunk = [prepared[0]] * 1000
    lanes = lane_layout(table)
    order, lane = Order(lanes.counts, batch, 0), np.arange(8)[:, None]
    steps = iter(range(0, 1 << 40, 16))

    def encode() -> int:
        for p in chunk:
            schema.frame(schema.encode_indexed(p).payload)
        return len(chunk)

    def plain() -> int:
        return sum(s.records for s in shards if len(np.fromfile(s.path, np.uint8)))

    def resident() -> int:
        return sum(lanes.signal[lane, index].shape[1] * 8 for index in order.span(next(steps), 16)[0])

    def mapped() -> Iterator[dict]:
        opened = tables.load([folder.path], "train", task, mapped=True)
        return host.batches(opened, order, (*tables.FIELDS, "rpeaks"), range(8))

    def first_epoch() -> int:
        source = mapped()
        return sum(len(next(source)["signal"]) for _ in range(len(table) // batch))

    def streamed(fields: Sequence[str]) -> Iterator[dict]:
        return batches([folder.path], "train", task, batch, 0, fields=fields)

    def sixteen(source: Iterator[dict]) -> Callable[[], int]:
        return lambda: sum(len(next(source)["signal"]) for _ in range(16))

    again = sixteen(mapped())
    for _ in range(2 * len(table) // (16 * batch) + 1):
        again()
    return {
        "encode and frame": encode,
        "np.fromfile, same bytes": plain,
        "tables.load": lambda: len(tables.load([folder.path], "train", task)),
        "resident, gathered by NumPy": resident,
        "host, opened, first epoch, checksums": first_epoch,
        "host": again,
        "stream": sixteen(streamed(tables.FIELDS)),
        "stream, beats": sixteen(streamed(BEATS)),
        "stream, every field of the schema": sixteen(streamed(EVERY)),
    }


def _memory(path: Path, task: str, batch: int, epochs: int) -> None:
    """Prints anonymous memory, MiB, after each epoch."""
    from ecg_jax.shards.stream import batches

    opened = tables.load([path], "train", task, mapped=True)
    order = Order(np.bincount(opened.lane, minlength=8), batch, 0)
    sources = {
        "host": host.batches(opened, order, tables.FIELDS, range(8)),
        "stream": batches([path], "train", task, batch, 0, fields=EVERY),
    }
    for name, source in sources.items():
        found = []
        for _ in range(epochs):
            for _ in range(len(opened) // batch):
                next(source)
            found.append(anonymous())
        print(f"{name}: MiB after each epoch: {' '.join(f'{mib:.0f}' for mib in found)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
