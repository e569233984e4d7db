"""Speed of the train step: ECG/s, ms a step, MFU, compile seconds, memory, input wait; alone or beside PyTorch.

    python tools/bench_step.py --rung R4 T4
    python tools/bench_step.py --rung R8 --against torch --pairs 9 --csv steps.csv
    python tools/bench_step.py --rung T12 --precision bf16 --batch 256 --steps-per-dispatch 4
    python tools/bench_step.py --rung R4 T4 --objective masked_codes
    python tools/bench_step.py --objective codebook --batch 4
    taskset -c 0 python tools/bench_step.py --rung R8 T8 --pairs 3 --profile

The step is the one that training runs (`training/step`): gather from resident int16 records, cast and scale, loss,
gradient, clipping, AdamW, guard. Records are random and wholly valid, with 12 beats and random codes. By default
ResNets see 12 x 1024 samples; Transformers 252 tokens: patches of 48 samples (12 leads x 21) when they learn labels,
beats when they learn codes.

`--against torch` builds the same network in PyTorch (`torch_nets.py`; install PyTorch beside this package), copies
our starting parameters into it, insists that loss and gradients agree to 1e-4, and then times both in turn, in the
same process and minutes. Its ratios are PyTorch's median over ours: above 1, ours is faster. Quiet the machine
first; where it cannot be quiet, set OMP_WAIT_POLICY=passive (PyTorch's threads else burn time waiting for a core) and
believe the ratio of CPU time.

Measured on two cores of an Intel Xeon with AVX-512, jax 0.10.2 and torch 2.13, float32, PyTorch's time over ours, wall
and CPU: R8, batch 32, 1.54 and 1.77 (478 ms beside 738); R4, batch 32, 1.42 and 1.57 (66 beside 94); T8, batch 16,
0.79 and 0.80 (1.20 s beside 0.95). What bounds T8, in CPU seconds a step on one core: its dense products take 1.20 in
XLA and 1.17 in PyTorch; attention takes 0.67 and 0.50. Of the 0.67, 0.29 are products, the rest passes over scores and
changes of layout, which PyTorch's fused kernel does in registers. T11, batch 4, five pairs: 0.73 and 0.79 (3.15 s
beside 2.29). Tried without gain: oneDNN in XLA (some products do not compile), Eigen in place of YNN (10 % slower),
vectors of 512 bits, probabilities kept for the gradient, softmax as one operation, bias and log-sum-exp as columns of
the products, chunks unrolled. Keeping freed memory with mallopt makes T8 4 % faster and R4 a quarter slower: left out.
Huge pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, where the kernel's are at "madvise"): T8 alone takes 989 ms in place
of 1,072, R4 the same; but beside PyTorch in one process ours takes 1,954 and PyTorch's 759, not understood: left out.

FLOPs are analytic at 2 per multiply-add and MFU stands against the dense peak of a known device, else it is not
given (`models/flops.py`). Memory is what XLA assigns to the program: arguments, results and temporaries. Needs
neither TensorFlow nor wfdb.
"""

import argparse
import csv
import dataclasses
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax import config as config_lib
from ecg_jax import objectives
from ecg_jax.config import OptimConfig
from ecg_jax.models import flops, ladder, vqhbr
from ecg_jax.models.inputs import to_input
from ecg_jax.models.ladder import Config, ResNet1dConfig
from ecg_jax.objectives import codebook, masked_codes, supervised
from ecg_jax.records.windows import MAX_PEAKS, SLOTS
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import optim, runtime, step

LABELS, CODES, CODE_DIM = 6, 512, 128
SAMPLES, BEATS = 1000, 12  # of a stored record
TOLERANCE = 1e-4  # of loss and gradients beside PyTorch
CHECKED, DRAWS = 2, 4  # records of a comparison, and comparisons of which one must agree: see `beside`
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
OPTIM = OptimConfig()


def network(args: argparse.Namespace, rung: str) -> tuple[Config, int, int]:
    """(configuration, samples, batch) of a rung, with the defaults of the benchmark."""
    if args.objective == "codebook":
        return vqhbr.Config(), SAMPLES, args.batch or 16
    world = args.input or ("signal" if args.objective == "supervised" else "auto")
    config = ladder.for_input(ladder.get(rung, norm=args.norm), world)
    if config.input == "beats":
        crop, batch = args.crop or SAMPLES, 32 if isinstance(config, ResNet1dConfig) else 16
    elif isinstance(config, ResNet1dConfig):
        crop, batch = args.crop or 1024, 32
    else:
        patch = args.patch or (48 if rung not in ladder.DEMO_RUNGS else config.patch)
        crop = args.crop or min(1008 // patch, config.times * config.patch // patch) * patch
        config = dataclasses.replace(config, patch=patch, times=max(config.times, -(-crop // patch)))
        batch = 16 if ladder.count(config) < 50e6 else 4
    return config, crop, args.batch or batch


def learning(args: argparse.Namespace, config: Config | vqhbr.Config, crop: int) -> Any:
    """The objective of a configuration."""
    dtype = PRECISIONS[args.precision]
    if args.objective == "codebook":
        return codebook.make(config, sample=64, dtype=dtype)
    if args.objective == "masked_codes":
        return masked_codes.make(config, CODES, CODE_DIM, masking="beat", crop=crop, dtype=dtype)
    return supervised.make(config, LABELS, crop=crop, dtype=dtype)


def records(samples: int, number: int, lanes: int) -> dict[str, np.ndarray]:
    """Random resident rows [lanes, number / lanes, ...]: smooth noise of a few hundred microvolt, wholly valid; every
    label is known; BEATS beats and random codes.
    """
    rng, shape = np.random.default_rng(0), (lanes, -(-number // lanes))
    noise = rng.normal(0, 150, (*shape, samples + 4, 12))
    smooth = sum(noise[:, :, i : i + samples] for i in range(5))
    rpeaks = np.full((*shape, MAX_PEAKS), -1, np.int16)
    rpeaks[..., :BEATS] = (np.arange(BEATS) + 0.5) * samples / BEATS
    return {
        "signal": smooth.astype(np.int16),
        "labels": rng.integers(0, 2, (*shape, LABELS)).astype(np.int8),
        "valid": np.broadcast_to(np.array([0, samples], np.int32), (*shape, 2)),
        "hash": rng.integers(0, 2**32, (*shape, 2), np.uint32),
        "rpeaks": rpeaks,
        "codes": rng.integers(0, CODES, (*shape, SLOTS), np.uint16),
    }


def beginning(objective: Any, host: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `objective.init` wants to know of the data: even priors, random directions as codebook, or records."""
    rng, given = np.random.default_rng(2), {}
    for name, wanted in objective.start.items():
        if name in host:
            flat = host[name].reshape(-1, *host[name].shape[2:])
            given[name] = flat[np.arange(wanted.shape[0]) % len(flat)]
        elif name == "prior":
            given[name] = np.full(wanted.shape, 0.5 if wanted.shape[0] == LABELS else 1 / wanted.shape[0], np.float32)
        else:
            rows = rng.normal(size=wanted.shape).astype(np.float32)
            given[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return given


class Ours:
    """The training step of a rung on resident records, compiled; `run` is timed."""

    def __init__(self, args: argparse.Namespace, config: Config, crop: int, batch: int):
        lanes = self.lanes = math.gcd(8, batch // args.accumulate)  # fewer than in training for a tiny batch
        self.mesh = mesh_lib.make(lanes, args.devices)
        self.per_dispatch = args.steps_per_dispatch
        scan = self.per_dispatch > 1 and not mesh_lib.on_cpu(self.mesh)
        self.scan, self.batch, self.rng = scan, batch, np.random.default_rng(1)
        self.objective = learning(args, config, crop)
        host = records(crop, max(args.records, batch), lanes)
        start = beginning(self.objective, host)
        host = {name: host[name] for name in (*self.objective.fields, "hash")}
        self.sample = {name: rows[:, : batch // lanes].reshape(batch, *rows.shape[2:]) for name, rows in host.items()}
        self.rows = jax.device_put(host, mesh_lib.lanes_first(self.mesh))
        programs = step.build(self.objective, self.mesh, batch, lanes, scan, args.accumulate)
        everywhere = mesh_lib.replicated(self.mesh)
        self.state = programs.init(*jax.device_put((np.uint32(0), start), everywhere))
        self.start = jax.tree.map(np.asarray, self.state.params)
        self.constants = jax.device_put((optim.hyper(OPTIM), np.uint32(0)), everywhere)
        inputs, rates = self.inputs()
        started = time.perf_counter()
        lowered = (programs.many if scan else programs.one).lower(self.state, self.rows, inputs, rates, *self.constants)
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - started
        memory = self.program.memory_analysis()
        self.program_mib = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        ) / 2**20
        self.waited = 0.0

    def inputs(self) -> tuple[dict[str, jax.Array], jax.Array]:
        """Row numbers, epochs and rates of one dispatch, on the device; of `per_dispatch` steps with scan."""
        shape, capacity = (self.lanes, self.batch // self.lanes), self.rows["hash"].shape[1]
        shape = (self.per_dispatch, *shape) if self.scan else shape
        entry = {"index": self.rng.integers(0, capacity, shape, np.int32), "epoch": np.zeros(shape, np.int32)}
        rates = np.full(self.per_dispatch, OPTIM.lr, np.float32) if self.scan else np.float32(OPTIM.lr)
        place = mesh_lib.lanes_second if self.scan else mesh_lib.lanes_first
        return jax.device_put(entry, place(self.mesh)), jax.device_put(rates, mesh_lib.replicated(self.mesh))

    def run(self, steps: int) -> None:
        """Train for `steps` steps; each dispatch is read after the next has been sent, the last at the end."""
        before = None
        for _ in range(max(1, steps // self.per_dispatch) if self.scan else steps):
            started = time.perf_counter()
            inputs, rates = self.inputs()
            self.waited += time.perf_counter() - started
            self.state, metrics = self.program(self.state, self.rows, inputs, rates, *self.constants)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(self.state)

    @functools.cached_property
    def slope(self) -> Callable[..., Any]:
        """Loss and gradients of starting parameters on CHECKED records, in full float32."""
        front = dataclasses.replace(self.objective.front, dtype="float32")
        objective = dataclasses.replace(self.objective, front=front)
        keys = jax.random.split(jax.random.key(0), CHECKED)
        return jax.jit(lambda params, batch: step.gradient(objective, params, batch, keys))

    def first(self, at: slice) -> tuple[float, Any]:
        """Loss and gradients of the starting parameters on these records of `sample`."""
        with jax.default_matmul_precision("highest"):
            loss, _, grads = self.slope(self.start, {name: x[at] for name, x in self.sample.items() if name != "hash"})
        return float(loss), jax.tree.map(np.asarray, grads)


def beside(args: argparse.Namespace, ours: Ours, config: Config) -> tuple[Any, str]:
    """The same network in PyTorch, proven to be the same, and what PyTorch runs on. Exits where it is not."""
    import torch_nets

    crop = ours.objective.front.crop
    if config.padded(crop) != crop:
        sys.exit(f"--crop {crop} is no multiple of the {config.frame} samples of a frame: give one beside torch")
    about = torch_nets.setup(os.cpu_count() or 1, tf32=False)
    given = {name: jnp.asarray(ours.sample[name]) for name in ("signal", "valid")}
    x, _, gain = to_input(given["signal"], given["valid"], scale=ours.objective.front.scale, crop=crop)
    batch = np.asarray(x), np.asarray(gain), ours.sample["labels"]
    planar = {"auto": None, "on": True, "off": False}[args.channels_last]
    bf16 = args.precision == "bf16"
    decay = optim.decayed(ours.start)
    theirs = torch_nets.Trainer(config, ours.start, decay, batch, OPTIM, bf16, planar, args.compile_mode)
    # A maximum or a ReLU that tips over by rounding moves a gradient by 1e-3, in whichever network; it is rare in a few
    # records. A network that is another one agrees in no draw.
    draws = range(0, min(DRAWS * CHECKED, ours.batch), CHECKED)
    apart = [_apart(ours, theirs, slice(at, at + CHECKED)) for at in draws]
    if not min(apart) <= TOLERANCE:
        sys.exit(f"loss and gradients differ by {min(apart):.1e} in PyTorch: not the same network")
    torch_nets.setup(os.cpu_count() or 1, tf32=True)
    return theirs, f"{about}; same loss and gradients to {min(apart):.0e}"


def _apart(ours: Ours, theirs: Any, at: slice) -> float:
    """Largest relative difference of loss and gradients, array by array, on a few records."""
    loss, grads = ours.first(at)
    loss_there, grads_there = theirs.first(at)
    worst = abs(loss_there - loss) / abs(loss)
    everything = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    for (part, name), there in grads_there.items():
        here = grads[part][name]
        if there.shape != here.shape:
            sys.exit(f"{part}/{name}: {here.shape} here, {there.shape} in PyTorch: not the same network")
        # An array that hardly matters (a key's bias) is held against a hundredth of the whole gradient.
        worst = max(worst, np.linalg.norm(there - here) / max(np.linalg.norm(here), 1e-2 * everything))
    return float(worst)


def once(run: Callable[[int], None], steps: int) -> tuple[float, float]:
    """(wall, process CPU) seconds a step, over `steps` steps."""
    time.sleep(0.2)  # the other side's threads stop spinning
    wall, cpu = time.perf_counter(), time.process_time()
    run(steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def calibrate(run: Callable[[int], None], seconds: float, multiple: int) -> int:
    """Steps that take about `seconds`, a multiple of `multiple`; the first call warms up."""
    run(multiple)
    wall, _ = once(run, multiple)
    return max(1, round(seconds / wall / multiple)) * multiple


def bench(args: argparse.Namespace, rung: str) -> dict[str, Any]:
    """One line of the table."""
    config, crop, batch = network(args, rung)
    book = args.objective == "codebook"
    ours = Ours(args, config, crop, batch)
    sides: dict[str, Callable[[int], None]] = {"ours": ours.run}
    if args.against:
        theirs, about = beside(args, ours, config)
        print(f"{rung}: {about}", flush=True)
        sides["torch"] = theirs.run
    steps = {
        side: calibrate(run, args.seconds, ours.per_dispatch if side == "ours" else 1) for side, run in sides.items()
    }
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    ours.waited = 0.0
    for pair in range(args.pairs):
        for side in sorted(sides, reverse=pair % 2 == 1):  # each begins every other pair
            times[side].append(once(sides[side], steps[side]))
    wall, cpu = (statistics.median(t[which] for t in times["ours"]) for which in (0, 1))
    dtype, device = PRECISIONS[args.precision], jax.devices()[0]
    per_record = objectives.training_flops(ours.objective)
    mfu = flops.mfu(per_record, batch / wall / ours.mesh.size, device.device_kind, dtype)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    line = {
        "rung": "VQ-HBR" if book else rung,
        "params": sum(x.size for x in jax.tree.leaves(ours.start)) if book else ladder.count(config),
        "objective": args.objective,
        "input": "beats" if book else config.input,
        "norm": args.norm if isinstance(config, ResNet1dConfig) else "layer",
        "samples": crop,
        "batch": batch,
        "accumulate": args.accumulate,
        "per_dispatch": ours.per_dispatch,
        "precision": args.precision,
        "ecg_per_s": round(batch / wall, 1),
        "ms_per_step": round(wall * 1e3, 3),
        "cpu_ms_per_step": round(cpu * 1e3, 2),
        "tflops": round(per_record * batch / wall / 1e12, 4),
        "mfu": None if mfu is None else round(mfu, 4),
        "compile_s": round(ours.compile_s, 2),
        "program_mib": round(ours.program_mib, 1),
        "device_peak_mib": None if peak is None else round(peak / 2**20, 1),
        "input_wait_ms": round(ours.waited / (args.pairs * steps["ours"]) * 1e3, 3),
        "device": mesh_lib.describe(ours.mesh),
        "jax": jax.__version__,
        "pairs": args.pairs,
    }
    if args.profile:
        import profile_step

        print("\n".join(profile_step.table(ours.program.as_text(), ours.run)), flush=True)
    if args.against:
        there = [statistics.median(t[which] for t in times["torch"]) for which in (0, 1)]
        pairs = sorted(t[0] / o[0] for o, t in zip(times["ours"], times["torch"], strict=True))
        line |= {
            "torch_ms_per_step": round(there[0] * 1e3, 3),
            "torch_cpu_ms_per_step": round(there[1] * 1e3, 2),
            "ratio_wall": round(there[0] / wall, 3),
            "ratio_cpu": round(there[1] / cpu, 3),
            "ratio_lowest_pair": round(pairs[0], 3),
            "ratio_highest_pair": round(pairs[-1], 3),
        }
    return line


def show(line: dict[str, Any]) -> None:
    """A table of two columns, what is not known left out."""
    for name, value in line.items():
        if value is not None:
            print(f"  {name:22} {value:,}" if isinstance(value, int | float) else f"  {name:22} {value}")
    sys.stdout.flush()


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a CSV file, with the header where there is none."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(line)


COLUMNS = (
    *("rung", "params", "objective", "input", "norm", "samples", "batch", "accumulate", "per_dispatch", "precision"),
    *("ecg_per_s", "ms_per_step", "cpu_ms_per_step", "tflops", "mfu", "compile_s", "program_mib", "device_peak_mib"),
    *("input_wait_ms", "device", "jax", "pairs", "torch_ms_per_step", "torch_cpu_ms_per_step"),
    *("ratio_wall", "ratio_cpu", "ratio_lowest_pair", "ratio_highest_pair"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rung", nargs="+", default=["R8"], help="one or several, as R4 T8")
    add("--objective", choices=["supervised", "masked_codes", "codebook"], default="supervised")
    add(
        "--input", choices=["signal", "beats"], help="(default: signal from labels; from codes, Transformers see beats)"
    )
    add("--batch", type=int, help="records a step (default: 32 ResNet, 16 Transformer, 4 from 50 M parameters)")
    add("--precision", choices=list(PRECISIONS), default="fp32")
    add("--crop", type=int, help="samples of a record")
    add("--patch", type=int, help="samples of a Transformer's token")
    add("--norm", choices=ladder.NORMS, default="group", help="of a ResNet")
    add("--accumulate", type=int, default=1, help="micro-batches a step")
    add("--devices", type=int, default=0, help="(default: all; on a CPU as many as training takes for the first rung)")
    add("--steps-per-dispatch", type=int, default=1, help="as one program; on a CPU one by one")
    add("--records", type=int, default=1024, help="resident")
    add("--pairs", type=int, default=9, help="repetitions, or pairs beside torch")
    add("--seconds", type=float, default=2.0, help="of each repetition")
    add("--against", choices=["torch"])
    add("--channels-last", choices=["auto", "on", "off"], default="auto", help="in torch; auto: on a GPU")
    add("--compile-mode", default="default", help="of torch.compile, on a GPU")
    add("--profile", action="store_true", help="where the time goes, by operation (CPU; on one core it is exact)")
    add("--csv", type=Path, help="file to append to")
    args = parser.parse_args(arguments)
    if args.against and (args.objective, args.input or "signal") != ("supervised", "signal"):
        sys.exit("--against torch is there for --objective supervised on the signal")
    if not args.devices:
        trained = ["objective.name=codebook"] if args.objective == "codebook" else [f"model.rung={args.rung[0]}"]
        runtime.spread(config_lib.override(config_lib.Config(), trained))
    for rung in ["VQ-HBR"] if args.objective == "codebook" else args.rung:
        if rung in ladder.RUNGS and ladder.get(rung).family == "transformer" and args.norm != "group":
            sys.exit(f"--norm {args.norm} is for ResNets, {rung} is a Transformer")
        batch = network(args, rung)[2]
        if batch < 1 or batch % args.accumulate or (args.against and batch % CHECKED):
            sys.exit(f"--batch {batch} must be a multiple of --accumulate {args.accumulate}, and even beside torch")
        line = bench(args, rung)
        show(line)
        if args.csv:
            append(args.csv, line)


if __name__ == "__main__":
    main()
