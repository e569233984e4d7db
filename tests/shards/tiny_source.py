"""A small `Source` of random recordings for the tests of the shards; its reader pickles, so pools can use
it."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.records.leads import LEADS
from ecg_jax.records.record import Record, Refused

TASKS = {"main": ("a", "b", "c"), "other": ("x", "y")}


def read(items: Sequence[Item]) -> Iterator[Record | Refused]:
    for item in items:
        where = item.where
        if where.get("refuse"):
            yield Refused(where["refuse"], f"{item.record_id} is not good")
            continue
        rng = np.random.default_rng(where["seed"])
        # Two seeds: copies share the signal and may differ in the rest.
        signal = np.cumsum(rng.normal(0, 0.05, (where["samples"], 12)), 0).astype(np.float32)
        if where.get("einthoven", True):
            one, two = signal[:, 0], signal[:, 1]
            signal[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], 1)
        for start, stop in where.get("break", ()):
            signal[start:stop, 2] += rng.normal(0, 0.3, stop - start)
        for start, stop in where.get("lost", ()):
            signal[start:stop] = np.nan
        absent = tuple(where.get("absent", ()))
        signal[:, [LEADS.index(lead) for lead in absent]] = np.nan
        other = np.random.default_rng(where["number"])
        labels = {task: other.integers(-1, 2, len(names)).astype(np.int8) for task, names in where["tasks"].items()}
        meta = {"bayes": {task: other.uniform(0.05, 0.95, len(n)) for task, n in where["tasks"].items()}}
        yield Record(
            signal=signal * where.get("gain", 1.0),
            rate=100.0,
            record_id=item.record_id,
            group=item.group,
            patient_id=item.group,
            age=float(other.integers(20, 90)) if where["number"] % 7 else float("nan"),
            sex=float(other.integers(0, 2)),
            labels=labels,
            time="2020-01-01T00:00:00",
            source=hashlib.sha256(item.record_id.encode()).digest(),
            split=item.split,
            unit=where["unit"],
            missing=absent,
            meta=meta if where["bayes"] else {},
        )


def source(
    n: int = 60,
    *,
    name: str = "tiny",
    unit: str = "mV",
    tasks: dict[str, tuple[str, ...]] = TASKS,
    splits: bool = False,
    bayes: bool = False,
    repeats: int = 3,
    change: dict[int, dict] | None = None,
    seed: int = 0,
    skipped: dict[str, int] | None = None,
    about: dict | None = None,
    **options,
) -> Source:
    """`n` recordings of about n / `repeats` patients.

    `change[i]` overrides fields of record i, or its group or split: refuse, gain, samples, absent (leads that it does
    not have), lost and break ([(start, stop), ...] of samples without values, or with a wrong lead III), ...
    """
    items = []
    for i in range(n):
        over = dict((change or {}).get(i, {}))
        group = over.pop("group", f"p{i // repeats}")
        split = over.pop("split", ("train", "val", "test")[i // repeats % 3] if splits else None)
        where = {
            "seed": 1000 * seed + i,
            "number": i,
            "samples": 1000,
            "tasks": tasks,
            "unit": unit,
            "bayes": bayes,
        }
        items.append(Item(over.pop("id", f"r{i:04d}"), group, split, where | options | over))
    return Source(name, "1.2.3", unit, tasks, pack(items), read, {"licence": "none"} | (about or {}), skipped or {})


def standard() -> Source:
    """240 recordings of 120 patients, Bayes probabilities; one refused, one a copy, one long, one short."""
    odd = {
        5: {"refuse": "not-good"},
        7: {"seed": 100, "gain": 2.5},
        11: {"samples": 3100},
        13: {"samples": 700},
    }
    return source(240, bayes=True, splits=True, repeats=2, change=odd)
