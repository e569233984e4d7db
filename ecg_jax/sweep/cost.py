"""What a run will cost, before it is run: steps, FLOPs, hours on a named device, memory.

FLOPs are those of `models/flops.py`. The recipe decides while it trains how long it trains, so there are bounds:
`least`, its fewest epochs, and `most`, its budget. Speed is a share of a device's dense peak that is assumed per
architecture and band of rungs, and said to be assumed; or it comes from lines of `tools/bench_step.py --csv`, as FLOP/s
of the same rung. Memory is parameters and optimiser states, activations by a formula, and the records on the device.

Says nothing about a machine that it was not told of. Invariant: no array is made and no device is touched.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ecg_jax.config import Config
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.models import flops, ladder
from ecg_jax.records.windows import most_slots
from ecg_jax.sweep import cells
from ecg_jax.sweep.cells import Cell
from ecg_jax.sweep.spec import Sweep
from ecg_jax.training import recipe

BANDS = (4, 8, 12)  # last rung of each
# Assumed share of the dense bfloat16 peak that a training step reaches, per band of rungs. Not measured: small rungs
# have too few channels to fill the matrix units, large ones reach what is usual for convolutions and Transformers.
MFU = {"resnet1d": (0.01, 0.06, 0.20), "transformer": (0.03, 0.12, 0.35)}
STEPS_PER_SECOND = 500.0  # assumed limit of launching a step, whatever its size
OVERHEAD = 60.0  # assumed seconds of a run before its first step and after its last: data, programs, test; CPU: a tenth
DEVICES = {  # name: (start of JAX's device_kind, GiB)
    "h200": ("NVIDIA H200", 131.0),
    "h100": ("NVIDIA H100 80GB HBM3", 74.0),
    "a100": ("NVIDIA A100", 37.0),
    "tpu-v4": ("TPU v4", 32.0),
    "tpu-v5e": ("TPU v5e", 16.0),
    "tpu-v5p": ("TPU v5p", 95.0),
}
# Two cores of an Intel Xeon with AVX-512 in float32, in FLOP/s. Measured with `tools/bench_step.py`, 1e11: R2 0.47,
# R4 0.92, R8 2.6, T2 0.48, T4 0.90, T8 1.5, T11 1.8; of a band the geometric mean of those in it and at its edges.
CPU = "two-cores"
CPU_FLOPS = {"resnet1d": (0.66e11, 1.5e11, 2.6e11), "transformer": (0.66e11, 1.2e11, 1.6e11)}


@dataclass(frozen=True)
class Device:
    """Speed and memory of one device. measured: rung -> FLOP/s, instead of what is assumed."""

    name: str
    gib: float | None
    measured: Mapping[str, float]

    def flops_per_second(self, rung: str, architecture: str) -> float:
        if rung in self.measured:
            return self.measured[rung]
        number = rung[1:]
        band = next(i for i, last in enumerate(BANDS) if not number.isdigit() or int(number) <= last)
        if self.name == CPU:
            return CPU_FLOPS[architecture][band]
        return MFU[architecture][band] * flops.peak_flops(DEVICES[self.name][0], "bfloat16")

    @property
    def overhead(self) -> float:
        """Seconds around a run."""
        return OVERHEAD / 10 if self.name == CPU else OVERHEAD

    def about(self) -> str:
        """Where its numbers are from."""
        given = f"measured for {', '.join(self.measured)}; for the rest " if self.measured else ""
        if self.name == CPU:
            return given + "two cores of a Xeon with AVX-512, measured for R2, R4, R8, T2, T4, T8 and T11"
        shares = [f"{name} {', '.join(f'{share:.0%}' for share in bands)}" for name, bands in MFU.items()]
        assumed = f"assumed, not measured: of the bfloat16 peak, rungs to 4, 8, 12: {'; '.join(shares)}"
        return f"{given}{assumed}; at most {STEPS_PER_SECOND:g} steps/s; {OVERHEAD:g} s around every run"


def device(name: str, measured: Path | None = None) -> Device:
    """A device by name, with the lines of a CSV of `tools/bench_step.py` where given (of several lines of a rung the
    last).

    Raises UsageError for a name that is not known, DataError for a file that is no such table.
    """
    known = [*DEVICES, CPU]
    if name not in known:
        raise UsageError(f"--device {name!r} is not known{did_you_mean(name, known)}; known: {', '.join(known)}")
    speed: dict[str, float] = {}
    if measured is not None:
        try:
            with open(measured, newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    speed[line["rung"]] = float(line["tflops"]) * 1e12
        except (OSError, KeyError, TypeError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else f"no column or number {error}"
            raise DataError(f"{measured}: {what}; give the --csv file of tools/bench_step.py") from None
        if not all(math.isfinite(value) and value > 0 for value in speed.values()):
            raise DataError(f"{measured}: a speed that is not above 0 in column tflops; measure that rung again")
    return Device(name, None if name == CPU else DEVICES[name][1], speed)


@dataclass(frozen=True)
class Cost:
    """Of one run. steps, flops, hours: (least, most)."""

    n_params: int
    n_records: int
    epochs: tuple[float, float]
    steps: tuple[int, int]
    flops: tuple[float, float]
    hours: tuple[float, float]
    gib: float


def estimate(sweep: Sweep, one: Cell, on: Device) -> Cost:
    """What the run of a cell costs on a device. Raises UsageError for settings that no run can have."""
    config = cells.configure(sweep, one)
    return of(config, cells.counts(sweep.data[one.data])[0], cells.size(sweep, one), on)


def of(config: Config, records: Mapping[str, int], train_records: int, on: Device) -> Cost:
    """As `estimate`, of a configuration and numbers of records."""
    arch = ladder.for_input(ladder.get(config.model.rung, norm=config.model.norm), config.model.input)
    length = config.model.crop
    if arch.input == "beats":
        length = config.model.slots or most_slots(config.model.beats)
    plan = recipe.plan(config, train_records, records["val"])
    batch = config.train.batch
    steps = (plan.budget if plan.kind == "steps" else min(plan.min_steps, plan.budget), plan.budget)
    per_record = flops.training_flops(arch, length)
    rate = min(on.flops_per_second(config.model.rung, arch.family) / per_record, STEPS_PER_SECOND * batch)
    looked = records["val"] / plan.eval_every / 3  # records an evaluation costs, at a third of training's, per step
    hours = tuple((n * (batch + looked) + records["test"] / 3) / rate / 3600 + on.overhead / 3600 for n in steps)
    return Cost(
        n_params=ladder.count(arch),
        n_records=train_records,
        epochs=tuple(n * batch / train_records for n in steps),
        steps=steps,
        flops=tuple(float(n * batch * per_record) for n in steps),
        hours=hours,
        gib=_memory(config, arch, length, train_records + records["val"] + records["test"]) / 2**30,
    )


def _memory(config: Config, arch: ladder.Config, length: int, records: int) -> float:
    """Bytes on the device: 10 float32 copies of the parameters (parameters and two moments, of the current, the best
    and the evaluated state, and the gradient), activations of a micro-batch, int16 records.
    """
    batch = config.train.batch // config.train.accumulate
    return 40.0 * ladder.count(arch) + batch * _activations(arch, length) + records * 24_000 * 1.1


def _activations(arch: ladder.Config, length: int) -> float:
    """Bytes kept of a record for the gradient in bfloat16: of a Transformer 34 a token, channel and layer (Korthikanti
    et al. 2022, arXiv:2205.05198, attention's weights left out); of a ResNet eight maps a convolution.
    """
    if isinstance(arch, ladder.TransformerConfig):
        tokens = 1 + (length if arch.input == "beats" else arch.lead_groups * arch.padded(length) // arch.patch)
        return 34.0 * tokens * arch.width * arch.layers
    frames, total = arch.padded(length), 0
    for width, stride in zip(arch.widths, arch.strides, strict=True):
        for unit in range(arch.units):
            total += frames * width
            frames = -(-frames // stride) if unit == 0 else frames
            total += frames * width
    return 8.0 * 2 * total
