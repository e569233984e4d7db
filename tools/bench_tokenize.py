"""Speed of making codes, and what it saves to make them once: ECG/s, GFLOP/ECG, codes beforehand beside in the step.

    python tools/bench_tokenize.py --rung R4 T4
    python tools/bench_tokenize.py --rung T4 --precision bf16 --batch 256 --records 4096 --csv codes.csv

First the speed of `models/coder`, the device's part of `ecg-jax tokenize` (no disk), on simulated 10 s ECGs with the
peaks that our detector finds in them. Then two training steps of `objectives/masked_codes` that differ in one thing:
`beforehand` gathers the codes beside the records, `inside` encodes every batch with the frozen codebook. Both make the
same update from the same codes (checked on the first step: the losses must agree). They run in turn, in pairs, each
beginning every other pair; medians of wall and of process CPU time.

The codebook has random weights and, unless told otherwise, the published sizes (25.7 M parameters, 8192 codes); time
does not depend on the weights. Needs neither TensorFlow nor wfdb.
"""

import argparse
import csv
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecg_jax.config import OptimConfig
from ecg_jax.models import coder, ladder, vqhbr
from ecg_jax.objectives import masked_codes
from ecg_jax.records import beats, synthetic, windows
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import optim, step

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
INFO = {"scale": "gain", "indices": True}
OPTIM = OptimConfig()
LANES = 8
AGREE = 1e-3  # relative, of the first losses: a beat between two codes may get the other one in another program


def records(number: int) -> dict[str, np.ndarray]:
    """`number` simulated records as they are stored: signal int16 [n, 1000, 12], valid int32 [n, 2], rpeaks int16
    [n, 50], hash uint32 [n, 2]."""
    index = np.arange(number)
    signal, valid = np.zeros((number, 1000, 12), np.int16), np.zeros((number, 2), np.int32)
    for row, found in enumerate(synthetic.generate(synthetic.Settings(), index, index).signal):
        length = min(len(found), 1000)
        signal[row, :length] = np.clip(np.rint(found[:length] * 1000), -32767, 32767)
        valid[row] = 0, length
    rpeaks = np.full((number, windows.MAX_PEAKS), -1, np.int16)
    for row, found in zip(rpeaks, beats.stored_peaks(signal, valid), strict=True):
        row[: len(found)] = found[: windows.MAX_PEAKS]
    words = np.random.default_rng(0).integers(0, 2**32, (number, 2), np.uint32)
    return {"signal": signal, "valid": valid, "rpeaks": rpeaks, "hash": words}


class Side:
    """A training step on resident records, compiled; `run` is timed. `book`: (config, params) to make the codes of each
    batch with, None to gather those that are there."""

    def __init__(self, args: argparse.Namespace, objective: Any, host: dict, start: dict, book: Any):
        self.mesh, self.rng, self.batch = mesh_lib.make(devices=1), np.random.default_rng(1), args.batch
        unroll = mesh_lib.on_cpu(self.mesh)
        everywhere = mesh_lib.replicated(self.mesh)
        fields = [name for name in (*objective.fields, "hash") if name != "codes" or book is None]
        laid = {name: host[name].reshape(LANES, -1, *host[name].shape[1:]) for name in fields}
        self.rows = jax.device_put(laid, mesh_lib.lanes_first(self.mesh))
        programs = step.build(objective, self.mesh, args.batch, LANES, False)
        self.state = programs.init(*jax.device_put((np.uint32(0), start), everywhere))
        self.constants = jax.device_put((np.float32(OPTIM.lr), optim.hyper(OPTIM), np.uint32(0)), everywhere)
        self.frozen = (
            None if book is None else jax.device_put({name: book[1][name] for name in coder.PARTS}, everywhere)
        )
        code = None if book is None else coder.coding(book[0], *INFO.values(), objective.front.mode, windows.SLOTS)

        def one(state, frozen, rows, index, lr, hyper, seed):
            batch = step.gather(self.mesh, rows, index)
            if code is not None:
                batch["codes"] = code(frozen, batch["signal"], batch["valid"], batch["rpeaks"])
            keys = step.example_keys(seed, batch.pop("hash"), jax.numpy.zeros(args.batch, int))
            slope = step.gradient(objective, state.params, batch, keys, unroll)
            return step.update(objective, state, slope, lr, hyper)

        started = time.perf_counter()
        lowered = jax.jit(one, donate_argnums=0).lower(
            self.state, self.frozen, self.rows, self.index(), *self.constants
        )
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - started

    def index(self) -> jax.Array:
        """Row numbers of one batch, on the device."""
        capacity = self.rows["hash"].shape[1]
        found = self.rng.integers(0, capacity, (LANES, self.batch // LANES), np.int32)
        return jax.device_put(found, mesh_lib.lanes_first(self.mesh))

    def run(self, steps: int) -> Any:
        """`steps` training steps; each is read after the next has been sent. Metrics of the last one."""
        before = None
        for _ in range(steps):
            index = self.index()
            self.state, metrics = self.program(self.state, self.frozen, self.rows, index, *self.constants)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(self.state)
        return before


def once(run: Callable[[int], Any], steps: int) -> tuple[float, float]:
    """(wall, process CPU) seconds a step, over `steps` steps."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def calibrate(run: Callable[[int], Any], seconds: float) -> int:
    """Steps that take about `seconds`; the first call warms up."""
    run(1)
    return max(1, round(seconds / once(run, 1)[0]))


def tokenizing(args: argparse.Namespace, config: vqhbr.Config, params: Any, host: dict) -> tuple[dict, np.ndarray]:
    """(what is known of the speed of making codes, the codes)."""
    own = coder.Coder(config, params, INFO, args.beats, args.coder_batch)
    stored = host["signal"], host["valid"], host["rpeaks"]
    codes = own.encode(*stored)  # compiles
    own.records = own.macs = 0
    few = slice(0, max(args.coder_batch, min(len(codes), args.timed)))
    times = [once(lambda _: own.encode(*(part[few] for part in stored)), 1) for _ in range(args.pairs)]
    wall, cpu = (statistics.median(t[which] for t in times) for which in (0, 1))
    number = len(codes[few])
    return {
        "tokenize_ecg_per_s": round(number / wall, 2),
        "tokenize_cpu_ms_per_ecg": round(cpu / number * 1e3, 3),
        "gflop_per_ecg": round(2e-9 * own.macs / own.records, 4),
        "gflop_per_ecg_all_slots": round(2e-9 * vqhbr.encode_macs(config, windows.SLOTS), 4),
        "tokenize_compile_s": round(own.compile_seconds, 2),
    }, codes


def bench(args: argparse.Namespace, rung: str, config: vqhbr.Config, params: Any, host: dict) -> dict[str, Any]:
    """What is known of a rung's step, codes beforehand beside codes inside."""
    arch = ladder.for_input(ladder.get(rung), args.input)
    front = {"mode": args.beats, "dtype": PRECISIONS[args.precision]}
    objective = masked_codes.make(arch, config.codes, config.code_dim, masking=args.masking, **front)
    start = {"prior": np.full(config.codes, 1 / config.codes, np.float32), "codebook": params["codebook"]}
    sides = {
        "beforehand": Side(args, objective, host, start, None),
        "inside": Side(args, objective, host, start, (config, params)),
    }
    first = {name: float(side.run(1)["loss"]) for name, side in sides.items()}
    apart = abs(first["inside"] - first["beforehand"]) / abs(first["beforehand"])
    if not apart <= AGREE:
        sys.exit(f"{rung}: the first losses differ, {first}: not the same codes")
    steps = {name: calibrate(side.run, args.seconds) for name, side in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for pair in range(args.pairs):
        for name in sorted(sides, reverse=pair % 2 == 1):
            times[name].append(once(sides[name].run, steps[name]))
    line: dict[str, Any] = {
        "rung": rung,
        "input": arch.input,
        "params": ladder.count(arch),
        "masking": args.masking,
        "precision": args.precision,
        "batch": args.batch,
        "first_losses_apart": float(f"{apart:.1e}"),
    }
    for name, side in sides.items():
        wall, cpu = (statistics.median(t[which] for t in times[name]) for which in (0, 1))
        line |= {
            f"{name}_ecg_per_s": round(args.batch / wall, 2),
            f"{name}_cpu_ms_per_ecg": round(cpu / args.batch * 1e3, 3),
            f"{name}_compile_s": round(side.compile_s, 2),
        }
    for which, what in enumerate(("wall", "cpu")):
        pairs = [i[which] / b[which] for i, b in zip(times["inside"], times["beforehand"], strict=True)]
        line[f"ratio_{what}"] = round(statistics.median(pairs), 3)
        line[f"ratio_{what}_range"] = f"{min(pairs):.2f}-{max(pairs):.2f}"
    return line


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a CSV file, with the header where there is none."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        if new:
            writer.writeheader()
        writer.writerow(line)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rung", nargs="*", default=["T4"], help="one or several, as R4 T4; none: only the speed of making codes")
    add("--input", choices=ladder.WORLDS, default="auto", help="auto: signal for ResNets, beats for Transformers")
    add("--masking", choices=("token", "beat"), default="beat")
    add("--beats", choices=windows.MODES, default="robust")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="of the step; codes are made in fp32")
    add("--batch", type=int, default=16, help="records a step, a multiple of 8")
    add("--coder-batch", type=int, default=coder.BATCH, help="records encoded together")
    add("--records", type=int, default=256, help="resident, a multiple of 8")
    add("--timed", type=int, default=1 << 30, help="records of each repetition of making codes, at most")
    add("--pairs", type=int, default=9, help="repetitions, at least 7 for a figure to be quoted")
    add("--seconds", type=float, default=2.0, help="of each repetition of the steps")
    for field in dataclasses.fields(vqhbr.Config):
        if field.name in ("width", "encoder_layers", "heads", "head_size", "mlp", "codes", "code_dim"):
            add(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="of the codebook")
    add("--csv", type=Path, help="file to append to")
    args = parser.parse_args(arguments)
    if min(args.batch, args.records) < LANES or args.batch % LANES or args.records % LANES:
        sys.exit(f"--batch {args.batch} and --records {args.records} must be multiples of {LANES}")
    sizes = {f.name: getattr(args, f.name) for f in dataclasses.fields(vqhbr.Config) if hasattr(args, f.name)}
    config = vqhbr.Config(**sizes)
    params = jax.tree.map(np.asarray, jax.jit(lambda key: vqhbr.init(config, key))(jax.random.key(0)))
    host = records(args.records)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "pairs": args.pairs, **sizes}
    made, host["codes"] = tokenizing(args, config, params, host)
    lines = [bench(args, rung, config, params, host) for rung in args.rung] or [{}]
    for line in lines:
        line |= made | about
        print("\n".join(f"  {name:26} {value}" for name, value in line.items()), flush=True)
        if args.csv:
            append(args.csv, line)


if __name__ == "__main__":
    main()
