"""Speed of `ecg-jax convert`: raw archives in the page cache to shards, records per core-second, beside a plain loop.

    python tools/bench_convert.py [--only wfdb|hdf5] [--records 600] [--repeats 7] [--json FILE]

Two archives are made up in a temporary folder: WFDB records of 10 s, 12 leads, 500 Hz, format 16 with a labels table
(data set `wfdb`), and CODE-15 %'s HDF5 layout at 400 Hz (data set `code15`). Each repetition measures in turn, in an
order that changes: the plain loop (wfdb.rdrecord, scipy's resample_poly and sosfiltfilt, rounding, bytes appended to a
file: no checks, R peaks, signatures, checksums, index or shards), and whole conversions of N and of 4 N records,
opening and finishing included, with one worker and with two. Core-seconds are those of the process and its children;
medians over the repetitions. "per further record" is the difference between N and 4 N, which is what an archive costs
once the processes are up. Memory is the peak of fresh processes: the parent's and its workers' added up.

What is asked: WFDB at least 3 times the plain loop's rate per core, two workers at least 1.8 times as fast as one,
memory flat in N and below 2 GB; HDF5 at least 1,500 records per core-second.

PREDICTION, CHANGE, RESULT
    Prediction: reading by the wfdb package, 3 to 6 ms a record, bounds the conversion; a direct reader of the common
    formats brings it to about 0.4 ms, a third of it sha256, and preparation (resampling, filter, R peaks) is left.
    Change: `records/readers/wfdb_direct.py`; `records/resample.py` and `chain.py` (matrix products whose sums are
    exact); one BLAS thread in `prepare_many`, since threads that share small matrices wait by spinning: with all cores
    given to BLAS the same conversion took 2.5 ms of CPU a record instead of 1.3.
    Result, two quiet cores of an Intel Xeon with AVX-512, medians of 7, further records per core-second:
    WFDB 774, 4.2 times the plain loop (4.2 to 4.8); read 0.50 | prepare 0.72 | encode and checksum 0.02 | write 0.02 |
    the rest 0.06 ms. HDF5 1,163, short of the 1,500 asked: read 0.20, half of it the sha256 of the row | prepare 0.64 |
    0.02 | 0.03 | 0.04. Two workers 2.1 (HDF5 2.0) times as fast as one per further record; each costs 2 s of CPU to
    start, nearly all of it the import of scipy.signal. Memory 290 MB with one worker and 621 with two, at N and at 4 N.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import signal as dsp

from ecg_jax.datasets import open_source
from ecg_jax.datasets.code_labels import CODE6
from ecg_jax.datasets.source import Source
from ecg_jax.records.leads import LEADS, expand_matrix
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.shards import schema
from ecg_jax.shards.convert import convert
from ecg_jax.shards.writer import CHUNK, write_atomic

OPTIONS = {"wfdb": {"tasks": "dx"}, "code15": {}}
STAGED = 512  # records of the table of stages
PLAIN = 100  # records of the plain loop in each repetition
PER_PART = 20_000  # exams of an HDF5 part
CHEST = expand_matrix()


def made_up(rng: np.random.Generator, rate: int, seconds: float) -> np.ndarray:
    """float32 [T, 12] in mV: QRS and T at an uneven rhythm, drift, noise; R of about 0.9 mV in lead II."""
    t = np.arange(round(rate * seconds)) / rate
    at = 0.3 + np.cumsum(rng.normal(60 / rng.uniform(50, 110), 0.03, int(seconds * 2.2)))
    one = np.arange(-0.12, 0.5, 1 / rate)
    beat = np.exp(-((one / 0.014) ** 2)) - 0.25 * np.exp(-(((one - 0.03) / 0.012) ** 2))
    beat += 0.25 * np.exp(-(((one - 0.3) / 0.06) ** 2))
    train = np.zeros(len(t) + len(one))
    for place in (at[at < seconds] * rate).astype(int):
        train[place : place + len(one)] += beat
    gains = np.array([0.6, 0.9, 0.3, 0.6, 0.9, 1.2, 1.1, 0.8]) * rng.uniform(0.8, 1.2, 8)
    # Every lead drifts in its own way: a drift in common would make the recordings alike to their signatures.
    drift = 0.1 * np.sin(2 * np.pi * rng.uniform(0.1, 0.6, 8) * t[:, None] + rng.uniform(0, 6, 8))
    eight = train[: len(t), None] * gains + drift
    eight = eight.astype(np.float32) + rng.standard_normal((len(t), 8), np.float32) * np.float32(0.01)
    return eight @ CHEST


def make_wfdb(folder: Path, records: int) -> None:
    rows = ["record,patient_id,age,sex,dx"]
    for i in range(records):
        digital = np.rint(made_up(np.random.default_rng(i), 500, 10) * 1000).astype("<i2")
        place = folder / f"{i // 1000:02d}"
        place.mkdir(exist_ok=True, parents=True)
        (place / f"r{i:06d}.dat").write_bytes(digital.tobytes())
        totals = digital.sum(axis=0, dtype=np.int64) % 65536
        lines = [f"r{i:06d} 12 500 {len(digital)}"]
        for lead, first, total in zip(LEADS, digital[0], totals, strict=True):
            lines.append(f"r{i:06d}.dat 16 1000.0(0)/mV 16 0 {first} {total} 0 {lead}")
        (place / f"r{i:06d}.hea").write_text("\n".join(lines) + "\n")
        rows.append(f"r{i:06d},p{i},{20 + i % 70},{'MF'[i % 2]},{('norm', 'af', 'af;mi')[i % 3]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def make_code15(folder: Path, exams: int) -> None:
    folder.mkdir(parents=True)
    columns = ["exam_id", "age", "is_male", "nn_predicted_age", *CODE6, "patient_id", "normal_ecg", "death", "timey"]
    rows = [",".join([*columns, "trace_file"])]
    for part, first in enumerate(range(0, exams, PER_PART)):
        ids = np.arange(first, min(first + PER_PART, exams)) + 1000
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            tracings = file.create_dataset("tracings", (len(ids) + 1, 4096, 12), "f4")
            file["exam_id"] = np.append(ids, 0)  # the last row is filler, as published
            for row, exam in enumerate(ids.tolist()):
                signal = np.zeros((4096, 12), np.float32)
                n = 2934 if exam % 2 else 4096  # the two groups of lengths in the published set
                start = (4096 - n) // 2
                signal[start : start + n] = 2 * made_up(np.random.default_rng(exam), 400, n / 400)
                tracings[row] = signal
                flags = ["True" if exam % 7 == k else "False" for k in range(6)]
                fields = [exam, 50, "True", 50, *flags, exam, "False", "", "", f"exams_part{part}.hdf5"]
                rows.append(",".join(map(str, fields)))
    (folder / "exams.csv").write_text("\n".join(rows) + "\n")


def plain_loop(folder: Path, out: Path, records: int) -> int:
    """What one would write in an afternoon; the sections are those of our chain."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wfdb
    high = dsp.butter(1, 0.67, "highpass", fs=100, output="sos")
    low = dsp.butter(5, 40, "lowpass", fs=100, output="sos")
    sections = np.concatenate([high, low])
    paths = sorted(folder.rglob("*.hea"))[:records]
    with out.open("wb") as file:
        for path in paths:
            at_100 = dsp.resample_poly(wfdb.rdrecord(str(path.with_suffix(""))).p_signal, 1, 5, axis=0)
            clean = dsp.sosfiltfilt(sections, at_100, axis=0)
            file.write(np.rint(clean * 1000).astype(np.int16).tobytes())
    return len(paths)


def source_of(name: str, folder: Path) -> Source:
    return open_source(name, folder, OPTIONS[name])


def run(name: str, folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """One whole conversion; its card."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # progress
        return convert(source_of(name, folder), out, workers=workers)


def used() -> float:
    """CPU seconds of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall seconds, core-seconds) of one call."""
    wall, cpu = time.perf_counter(), used()
    work()
    return time.perf_counter() - wall, used() - cpu


def stages(name: str, folder: Path, scratch: Path) -> dict[str, float]:
    """Stage -> core milliseconds a record, one process, the stages' functions called one after the other."""
    source = source_of(name, folder)
    items = source.items[:STAGED]
    spent = dict.fromkeys(["read", "prepare", "encode and checksum", "write"], 0.0)
    encoded = []
    records = source.read(items)
    for _ in range(0, len(items), CHUNK):
        start = time.process_time()
        chunk = [record for record, _ in zip(records, range(CHUNK), strict=False)]
        read = time.process_time()
        prepared = [p for windows in prepare_many(chunk) if isinstance(windows, list) for p in windows]
        ready = time.process_time()
        encoded += [b"".join(schema.frame_parts(schema.encode_indexed(p).payload)) for p in prepared]
        done = time.process_time()
        spent["read"] += read - start
        spent["prepare"] += ready - read
        spent["encode and checksum"] += done - ready
    start = time.process_time()
    write_atomic(scratch / "stage", encoded)
    spent["write"] = time.process_time() - start
    return {stage: 1e3 * seconds / len(encoded) for stage, seconds in spent.items()}


def peak(name: str, folder: Path, out: Path, workers: int) -> float:
    """MB of a conversion in a fresh process: its own peak, and that of its largest worker for each of them."""
    command = [sys.executable, __file__, "--peak", name, str(folder), str(out), str(workers)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(found.strip().splitlines()[-1])


def peak_here(name: str, folder: str, out: str, workers: str) -> None:
    run(name, Path(folder), Path(out), int(workers))
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print((own + (int(workers) * child if int(workers) > 1 else 0)) / 1024)


def measure(name: str, scratch: Path, records: int, repeats: int) -> dict[str, Any]:
    sizes = {"N": records, "4N": 4 * records}
    folders = {}
    for label, size in sizes.items():
        folders[label] = scratch / f"{name}_{label.lower()}"
        (make_wfdb if name == "wfdb" else make_code15)(folders[label], size)
    numbers = count()

    def converting(label: str, workers: int) -> Callable[[], None]:
        def work() -> None:
            card = run(name, folders[label], scratch / f"out{next(numbers)}", workers)
            stored = sum(split["records"] for split in card["splits"].values())
            if stored != sizes[label]:
                raise SystemExit(f"{name}: {stored} of {sizes[label]} records came through: {card['refused']}")

        return work

    work: dict[str, Callable[[], Any]] = {
        f"{label} {workers}": converting(label, workers) for label in sizes for workers in (1, 2)
    }
    done = {key: sizes[key.split()[0]] for key in work}
    if name == "wfdb":
        work["plain"] = lambda: plain_loop(folders["N"], scratch / "plain.bin", PLAIN)
        done["plain"] = min(PLAIN, records)
        work["plain"]()  # imports
    work["N 1"]()
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in work}
    for repeat in range(repeats):
        keys = list(work) if repeat % 2 else list(work)[::-1]
        for key in keys:
            times[key].append(timed(work[key]))
        for old in scratch.glob("out*"):
            subprocess.run(["rm", "-r", str(old)], check=True)
    wall = {key: statistics.median(w for w, _ in values) for key, values in times.items()}
    cpu = {key: statistics.median(c for _, c in values) for key, values in times.items()}
    further = 3 * records
    found: dict[str, Any] = {
        "records": sizes,
        "repeats": repeats,
        "wall_s": wall,
        "core_s": cpu,
        "records_per_core_second": {key: done[key] / cpu[key] for key in work},
        "further_per_core_second": {w: further / (cpu[f"4N {w}"] - cpu[f"N {w}"]) for w in (1, 2)},
        "scaling_whole": wall["4N 1"] / wall["4N 2"],
        "scaling_further": (wall["4N 1"] - wall["N 1"]) / (wall["4N 2"] - wall["N 2"]),
        "stages_ms": stages(name, folders["4N"], scratch),
        "peak_mb": {
            f"{label} {w}": peak(name, folders[label], scratch / f"peak_{label}_{w}", w)
            for w in (1, 2)
            for label in sizes
        },
    }
    if name == "wfdb":
        pairs = zip(times["plain"], times["4N 1"], strict=True)
        ratios = [(plain / done["plain"]) / (ours / done["4N 1"]) for (_, plain), (_, ours) in pairs]
        found["times_the_plain_loop"] = statistics.median(ratios)
        found["times_the_plain_loop_range"] = [min(ratios), max(ratios)]
    return found


def report(name: str, found: dict[str, Any]) -> None:
    rate, sizes = found["records_per_core_second"], found["records"]
    print(f"\n{name}: N = {sizes['N']}, 4N = {sizes['4N']}, medians of {found['repeats']}")
    print(f"{'':28} {'wall s':>8} {'core s':>8} {'records per core-second':>24}")
    for key in found["wall_s"]:
        size, _, workers = key.partition(" ")
        label = f"{size}, {workers} worker{'s' * (workers != '1')}" if workers else "plain loop"
        print(f"{label:28} {found['wall_s'][key]:8.2f} {found['core_s'][key]:8.2f} {rate[key]:24,.0f}")
    for workers, value in found["further_per_core_second"].items():
        print(f"{f'per further record, {workers}':28} {'':17} {value:24,.0f}")
    if "times_the_plain_loop" in found:
        low, high = found["times_the_plain_loop_range"]
        print(f"{'times the plain loop':28} {found['times_the_plain_loop']:8.1f} ({low:.1f} to {high:.1f}), asked: 3")
    else:
        print(f"{'asked':28} {'':17} {1500:24,}")
    print(f"{'two workers over one':28} {found['scaling_whole']:8.2f} whole run at 4N, ", end="")
    print(f"{found['scaling_further']:.2f} per further record, asked: 1.8")
    peaks = ", ".join(f"{key.replace(' ', ' with ')}: {value:,.0f}" for key, value in found["peak_mb"].items())
    print(f"{'peak memory, MB':28} {peaks}, asked: 2,000")
    spent = found["stages_ms"]
    total = 1e3 * found["core_s"]["4N 1"] / sizes["4N"]
    spent = spent | {"the rest": total - sum(spent.values()), "whole run": total}
    print(f"{'core ms a record':28} " + " | ".join(f"{stage} {value:.2f}" for stage, value in spent.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["wfdb", "hdf5"])
    parser.add_argument("--records", type=int, default=600, help="N; 4 N are made, 120 kB (HDF5: 200 kB) each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        peak_here(*args.peak)
        return
    names = {"wfdb": ["wfdb"], "hdf5": ["code15"], None: ["wfdb", "code15"]}[args.only]
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = measure(name, Path(scratch), args.records, args.repeats)
        report(name, results[name])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
