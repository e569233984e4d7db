"""Simulated populations as a data set (`ecg-jax convert synthetic`): see `records.synthetic` for the
simulator.

What it does: numbers the records and patients of a population without generating a signal, and generates any
of them when asked. What it does not: keep files; there is no source folder. Invariant: record i is the same
whatever the number of records, the order of reading and the process that reads; each carries its labels'
Bayes probabilities in `meta["bayes"][task]`, rounded to six significant digits.

Options (all `--option name=value`):
    population   1 (default; task "code", six labels), or 2 (out of distribution; task "ood", four of these
    labels
                 and three new ones)
    records      how many (default 10,000), or instead
    patients     how many patients, with all their records
    val, test    so many records, rounded up to whole patients, form the official validation and test split;
    the
                 rest trains, so that more `records` only add training records. Default: no official split
    prevalence   "code" (default), or "balanced": the diagnoses near 14 % each, for demonstrations only
    seed         default 0
    noise        factor on all noise (default 1); 0 for clean signals
    teacher      logit standard deviation of the nonlinear morphology term (default 1.6)
    tail         logit standard deviation of the morphology modes' offsets (default 1.6)
    mode_size    size of the modes in the waveform (default 1)
    label_noise  factor on the probit widths of the definitions (default 1)
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.errors import UsageError
from ecg_jax.records import synthetic
from ecg_jax.records.record import Record
from ecg_jax.records.synthetic.settings import FALSE, LABELS, MISSED, MIXTURES, NOMINAL, TASKS, Settings

VERSION = "1.0.0"
NAMES = {1: "synthetic", 2: "synthetic_ood"}
DEFAULT_RECORDS = 10_000
NUMBERS = ("noise", "teacher", "tail", "mode_size", "label_noise")
OPTIONS = ("population", "records", "patients", "val", "test", "prevalence", "seed", *NUMBERS)
SURVEYED = 1 << 16  # records whose states give the card's prior and Bayes entropy
READ_BLOCK = 256  # records generated together: some 12 MB


@dataclass(frozen=True)
class Reader:
    """`Source.read` of a simulated population; pickles."""

    settings: Settings

    def __call__(self, items: Sequence[Item]) -> Iterator[Record]:
        """One `Record` per item, in order."""
        for first in range(0, len(items), READ_BLOCK):
            yield from _generate(self.settings, items[first : first + READ_BLOCK])


def _generate(settings: Settings, items: Sequence[Item]) -> Iterator[Record]:
    where = np.array([item.where for item in items], np.int64)
    batch = synthetic.generate(settings, where[:, 0], where[:, 1])
    task, names = TASKS[settings.population]
    columns = [LABELS.index(name) for name in names]
    row_key = json.dumps(asdict(settings), sort_keys=True)
    for row, item in enumerate(items):
        bayes = [float(f"{p:.6g}") for p in batch.probability[row, columns]]
        yield Record(
            signal=batch.signal[row],
            rate=float(synthetic.RATE),
            record_id=item.record_id,
            group=item.group,
            patient_id=item.group,
            age=float(batch.state.age[row]),
            sex=float(batch.state.male[row]),
            labels={task: batch.labels[row, columns]},
            device=f"simulator, {len(batch.signal[row]) / synthetic.RATE:g} s",
            source=hashlib.sha256(f"{row_key} {item.where[0]}".encode()).digest(),
            split=item.split,
            unit="mV",
            meta={"bayes": {task: bayes}},
        )


def open_synthetic(source_dir: Path | None, options: dict[str, str]) -> Source:
    """The population that `options` describe (see the module's head); `source_dir` is not used.

    Raises `UsageError` for an unknown option or a value that is out of range.
    """
    check_options("synthetic", options, OPTIONS)
    settings = _settings(options)
    records = _records(settings, options)
    patient = synthetic.patients.assign(settings, records)
    split = _splits(patient, _whole(options, "val", 0, 0), _whole(options, "test", 0, 0), records)
    prefix = f"sim{settings.population}-{settings.prevalence[0]}{settings.seed}"
    items = pack(
        Item(f"{prefix}-{index:07d}", f"{prefix}-p{owner:07d}", official, (index, owner))
        for index, (owner, official) in enumerate(zip(patient.tolist(), split, strict=True))
    )
    task, names = TASKS[settings.population]
    return Source(
        name=NAMES[settings.population],
        version=VERSION,
        unit="mV",
        tasks={task: names},
        items=items,
        read=Reader(settings),
        about=_about(settings, patient, names),
    )


def _settings(options: dict[str, str]) -> Settings:
    population = _whole(options, "population", 1, 1)
    if population not in TASKS:
        raise UsageError(f"synthetic: population={population}: give 1 (training) or 2 (out of distribution)")
    prevalence = options.get("prevalence", "code")
    if prevalence not in MIXTURES:
        raise UsageError(f"synthetic: prevalence={prevalence!r}: give one of {', '.join(MIXTURES)}")
    numbers = {name: _number(options[name], name) for name in NUMBERS if name in options}
    return Settings(population=population, prevalence=prevalence, seed=_whole(options, "seed", 0, 0), **numbers)


def _whole(options: dict[str, str], name: str, default: int, least: int) -> int:
    text = options.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"synthetic: {name}={text!r} is not a whole number") from None
    if not least <= value < 1 << 40:
        raise UsageError(f"synthetic: {name}={value} is out of range; give {least} or more")
    return value


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"synthetic: {name}={text!r} is not a number") from None
    if not (math.isfinite(value) and 0 <= value <= 100):
        raise UsageError(f"synthetic: {name}={text} is out of range; give 0 to 100")
    return value


def _records(settings: Settings, options: dict[str, str]) -> int:
    if "patients" in options:
        if "records" in options:
            raise UsageError("synthetic: give either records or patients, not both")
        return synthetic.patients.records_of(settings, _whole(options, "patients", 0, 1))
    return _whole(options, "records", DEFAULT_RECORDS, 1)


def _splits(patient: np.ndarray, val: int, test: int, records: int) -> list[str | None]:
    """The first patients until `test` records are reached, then until `val` are; the rest train."""
    if not val and not test:
        return [None] * records
    if val + test >= records:
        raise UsageError(f"synthetic: val={val} and test={test} leave nothing of {records} records to train on")
    starts = np.flatnonzero(np.diff(patient, prepend=-1))  # first record of each patient
    ends = np.append(starts, records)
    first = int(ends[np.searchsorted(ends, test)])
    second = int(ends[np.searchsorted(ends, first + val)]) if val else first
    return ["test"] * first + ["val"] * (second - first) + ["train"] * (records - second)


def _about(settings: Settings, patient: np.ndarray, names: tuple[str, ...]) -> dict[str, object]:
    """What the card says of the population. Prior: the labels' mean Bayes probability over the first 65,536
    records; `bayes_entropy`: the loss of a reader who knows every record's state, the floor of any model's
    loss, in nats."""
    some = min(len(patient), SURVEYED)
    total, floor = np.zeros(len(LABELS)), np.zeros(len(LABELS))
    for first in range(0, some, synthetic.BLOCK):
        index = np.arange(first, min(first + synthetic.BLOCK, some))
        _, probability = synthetic.states(settings, index, patient[index])
        total += probability.sum(axis=0)
        floor += synthetic.labelling.entropy(probability).sum(axis=0)
    columns = [LABELS.index(name) for name in names]
    prior, floor = total[columns] / some, floor[columns] / some
    entropy = synthetic.labelling.entropy(prior)

    def named(values: np.ndarray) -> dict[str, float]:
        return {name: float(f"{value:.6g}") for name, value in zip(names, values, strict=True)}

    return {
        "licence": "simulated, no person's data",
        "simulator": asdict(settings),
        "demonstration": settings.prevalence != "code",
        "records": len(patient),
        "patients": int(patient[-1]) + 1,
        "surveyed": some,
        "labels_seen_in_training": [name for name in names if name in synthetic.CODE_LABELS],
        "nominal_prevalence": named(np.array(NOMINAL)[columns]),
        "prior": named(prior),
        "prior_entropy": {**named(entropy), "macro": float(f"{entropy.mean():.6g}")},
        "bayes_entropy": {**named(floor), "macro": float(f"{floor.mean():.6g}")},
        "missed": MISSED,
        "false": FALSE,
    }
