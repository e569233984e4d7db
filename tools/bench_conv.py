"""Measure every formulation of `conv1d` at the shapes of the ladder and write the table that chooses.

    python tools/bench_conv.py --rungs R4,R8 --write          rebuilds ecg_jax/models/conv_table.json for this backend
    python tools/bench_conv.py --rungs R8 --dtype bfloat16    only prints

One measurement is forward and both gradients of one convolution, with random input, kernel and cotangent (a
constant cotangent is many times slower in some formulations of XLA-CPU). Formulations take turns, the median of
at least seven rounds counts: process CPU time on a CPU, which a loaded machine disturbs least, wall time elsewhere.
A simpler formulation is kept unless another one beats it by 3 %. Small layers are not written. Rows of other
backends and dtypes stay as they are. It changes nothing but the table, and reads no data.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models import conv, ladder

TABLE = Path(conv.__file__).with_name("conv_table.json")
SHAPE = ("batch", "length", "taps", "channels", "out", "stride")
GAIN = 1.03  # what a less simple formulation must win by
# length x channels x out from which a measurement is written. Below it (the layers of R4) spectral windows win alone
# and lose in the network, in many small passes that two cores do not share: R4's step takes 91 to 95 ms with them and
# 77 to 81 without.
SMALLEST = 1 << 21
SLOW = 4.0  # a candidate this many times slower than the best after one round is dropped


def shapes(rungs: list[str], batch: int, length: int) -> list[dict[str, int]]:
    """The different convolutions with more than one tap of some ResNet rungs, as rows of `SHAPE`."""
    rows = []
    for name in rungs:
        config = ladder.get(name)
        at, before = config.padded(length), config.leads
        todo = [(config.leads, config.width, 1)]
        for width, stride in zip(config.widths, config.strides, strict=True):
            before = todo[-1][1]
            todo += [(before, width, 1), (width, width, stride)]
            todo += [(width, width, 1)] if config.units > 1 else []
        for channels, out, stride in todo:
            row = dict(zip(SHAPE, (batch, at, config.kernel, channels, out, stride), strict=True))
            at //= stride
            rows += [] if row in rows else [row]
    return rows


def candidates(row: dict[str, int]) -> list[tuple[str, int | None]]:
    """(formulation, size) to be measured at one shape, the simplest first."""
    stride = row["stride"]
    q = conv.folding(row["length"], row["taps"], stride, conv.narrow_block(row["out"])).taps
    todo: list[tuple[str, int | None]] = [("direct", None)]
    if stride > 1:
        todo.append(("polyphase", None))
    todo += [("blocked", size) for size in (2, 4, 8, 16) if size * row["out"] <= 96]
    todo.append(("patches", None))
    # Outputs of a window: 1, 2 and 4 times its overlap, which divides the lengths that are powers of two.
    windows = [(parts + 1) * (q - 1) for parts in (1, 2, 4) if q > 1]
    todo += [("spectral", size) for size in windows if size <= 3 * row["length"] // stride]
    return todo


def program(row: dict[str, int], impl: str, size: int | None, dtype: str) -> Callable[[], list[jax.Array]]:
    """A compiled forward and both gradients, that returns when they are there."""
    rng = np.random.default_rng(0)
    batch, length, taps, channels, out, stride = (row[name] for name in SHAPE)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    x, w = normal(batch, length, channels), normal(taps, channels, out, scale=(taps * channels) ** -0.5)
    cotangent = normal(batch, -(-length // stride), out)

    def run(x, w, cotangent):
        y, back = jax.vjp(lambda x, w: conv.conv1d(x, w, stride, impl, size), x, w)
        return y, *back(cotangent)

    compiled = jax.jit(run).lower(x, w, cotangent).compile()
    return lambda: jax.block_until_ready(compiled(x, w, cotangent))


def measure(row: dict[str, int], dtype: str, rounds: int) -> list[tuple[str, int | None, float, float, float]]:
    """(formulation, size, median wall ms, median process CPU ms, largest difference from direct, relative) each."""
    todo = [(*one, program(row, *one, dtype)) for one in candidates(row)]
    first = [np.asarray(leaf, np.float32) for leaf in todo[0][2]()]
    kept = []
    for impl, size, run in todo:
        got = [np.asarray(leaf, np.float32) for leaf in run()]
        apart = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, first, strict=True))
        kept.append((impl, size, run, apart, [], []))
    for number in range(rounds + 1):
        for _, _, run, _, wall, cpu in kept:
            start = time.perf_counter(), time.process_time()
            run()
            wall.append(1e3 * (time.perf_counter() - start[0]))
            cpu.append(1e3 * (time.process_time() - start[1]))
        if number == 0:
            best = min(cpu[0] for *_, cpu in kept)
            kept = [entry for entry in kept if entry[5][0] <= SLOW * best]
    med = statistics.median
    return [(impl, size, med(wall[1:]), med(cpu[1:]), apart) for impl, size, _, apart, wall, cpu in kept]


def main() -> None:
    """Parse the arguments, measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", default="R4,R8", help="ResNet rungs whose shapes are measured, comma-separated")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="samples of a record")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each formulation, at least 7")
    parser.add_argument("--write", action="store_true", help="put the winners into the table")
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error("--rounds must be at least 7")
    backend = jax.default_backend()
    clock = 3 if backend == "cpu" else 2
    print(f"{backend}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, {args.dtype}")
    print("length channels out stride | formulation: wall ms / CPU ms", flush=True)
    fresh = []
    for row in shapes(args.rungs.split(","), args.batch, args.length):
        results = measure(row, args.dtype, args.rounds)
        chosen = results[0]
        for one in results[1:]:
            if one[clock] * GAIN < chosen[clock]:
                chosen = one
        cells = [f"{impl}{size or ''} {wall:.1f}/{cpu:.1f}" for impl, size, wall, cpu, _ in results]
        apart = max(one[4] for one in results)
        place = " ".join(str(row[name]) for name in ("length", "channels", "out", "stride"))
        print(f"{place} | {', '.join(cells)} -> {chosen[0]}{chosen[1] or ''} (apart {apart:.0e})", flush=True)
        fresh.append({"backend": backend, "dtype": args.dtype, **row, "impl": chosen[0], "size": chosen[1]})
    if args.write:
        write(fresh)


def write(fresh: list[dict]) -> None:
    """Replace the rows of the same backend, dtype and shape; one row a line, in a fixed order."""
    key = ("backend", "dtype", "taps", "stride", "length", "channels", "out", "batch")
    large = [row for row in (*conv.measured(), *fresh) if row["length"] * row["channels"] * row["out"] >= SMALLEST]
    rows = {tuple(row[name] for name in key): row for row in large}
    lines = ",\n".join(json.dumps(rows[at]) for at in sorted(rows))
    TABLE.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    print(f"{len(rows)} rows in {TABLE}")


if __name__ == "__main__":
    main()
