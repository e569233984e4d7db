"""Where the time of a compiled step goes: a table by kind of operation, from XLA's own trace. For CPU.

What `bench_step.py --profile` prints. One line is a kind of operation with the shape that it makes: its milliseconds a
step, summed over devices, its share, how often it runs, what is fused into it. Loops are left out, what runs in them is
counted. Products that Eigen runs (plain `dot` and `convolution`) are handed to other threads, where the trace does not
see them: on one core (`taskset -c 0`) they count in full, and every line is CPU time.
"""

import collections
import glob
import re
import tempfile
from collections.abc import Callable

import jax

OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^)]*\)|\S+) ([\w\-]+)\(", re.M)
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
CALLS = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?calls=%?([\w.\-]+)", re.M)
CLASSES = {
    "products": ("dot", "convolution"),
    "sums": ("reduce",),
    "copies and turns": ("transpose", "copy", "concatenate", "pad", "dynamic-update-slice"),
}
PLAIN = {"parameter", "constant", "bitcast", "broadcast", "tuple", "get-tuple-element"}
LOOPS = {"while", "conditional", "call"}


def table(hlo: str, run: Callable[[int], None], steps: int = 3, lines: int = 24) -> list[str]:
    """The `lines` most expensive kinds of operation of `run(steps)`, whose compiled text is `hlo`."""
    made = {name: (re.sub(r"\{[^}]*\}", "", shape)[:40], kind) for name, shape, kind in OPERATION.findall(hlo)}
    inside = {name: [kind for _, _, kind in OPERATION.findall(body)] for name, body in COMPUTATION.findall(hlo)}
    fused = {name: inside.get(called, []) for name, called in CALLS.findall(hlo)}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        events = [(event.name, event.duration_ns) for plane in planes for line in plane.lines for event in line.events]
    spent: collections.Counter = collections.Counter()
    times: collections.Counter = collections.Counter()
    for name, nanoseconds in events:
        if name in made and made[name][1] not in LOOPS:
            contents = " ".join(kind for kind in dict.fromkeys(fused.get(name, ())) if kind not in PLAIN)
            key = re.sub(r"[.\d]+$", "", name), made[name][0], contents[:60]
            spent[key] += nanoseconds / 1e6 / steps
            times[key] += 1
    total, classes = sum(spent.values()), collections.Counter()
    for key, ms in spent.items():
        classes[_class(f"{key[0]} {key[2]}")] += ms / total
    rows = [f"{total:8.1f} ms of operations a step; ms, share, times a step, operation, what it makes, what is in it"]
    for key, ms in spent.most_common(lines):
        rows.append(f"{ms:8.1f} {ms / total:6.1%} {times[key] / steps:5.0f}  " + "  ".join(key))
    rows[:0] = [", ".join(f"{name} {share:.0%}" for name, share in classes.most_common())]
    return rows


def _class(about: str) -> str:
    """What sort of work an operation is, by its name and what is fused into it."""
    for name, words in CLASSES.items():
        if any(word in about for word in words):
            return name
    return "elementwise"
