"""How many simulated records a second: wall and processor time of the whole simulator, signals and labels.

    python tools/bench_synthetic.py [--records 2000] [--repeats 7] [--processes 2]

Prints JSON. `records_per_cpu_second` is what one core does; `records_per_second` is what all processes did
together by the clock (other work on the machine lowers it). Medians over the repeats; the first, unmeasured
pass warms up.
"""

import argparse
import json
import os
import statistics
import time
from multiprocessing import get_context

import numpy as np


def once(job: tuple[int, int, str]) -> float:
    """Generate `count` records from number `first` on; returns the processor seconds of this process."""
    first, count, prevalence = job
    from ecg_jax.records import synthetic

    settings = synthetic.Settings(prevalence=prevalence)
    index = np.arange(first, first + count)
    start = time.process_time()
    for batch in synthetic.batches(settings, index, index):
        assert len(batch.signal)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=2000, help="records per process and repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prevalence", choices=("code", "balanced"), default="code")
    args = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    wall, processor = [], []
    with get_context("spawn").Pool(args.processes) as pool:
        jobs = [(i * args.records, args.records, args.prevalence) for i in range(args.processes)]
        pool.map(once, [(first, 100, args.prevalence) for first, _, _ in jobs], chunksize=1)
        for _ in range(args.repeats):
            start = time.perf_counter()
            processor += pool.map(once, jobs, chunksize=1)
            wall.append(time.perf_counter() - start)
    total = args.records * args.processes
    result = {
        "records": total,
        "processes": args.processes,
        "repeats": args.repeats,
        "records_per_second": round(total / statistics.median(wall)),
        "records_per_second_range": [round(total / max(wall)), round(total / min(wall))],
        "records_per_cpu_second": round(args.records / statistics.median(processor)),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
