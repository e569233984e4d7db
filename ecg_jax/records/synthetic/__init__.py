"""A vectorised simulator of 12-lead ECG whose irreducible loss is known.

What it does: `generate` returns, for any set of record numbers, 12-lead signals at 100 Hz in mV, labels, and
the exact probability of each label given the record's latent state. What it does not: write files
(`datasets.synthetic` makes a data set of it). Invariant: a record is a pure function of (settings, record
number): any subset, in any order and any batch, comes out the same to the bit on one machine under one NumPy.

Random numbers are counter-based per record (a hash for the state, Philox for the noise samples), so the
granularity is one record; nothing is generated that was not asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ecg_jax.records.leads import expand_matrix
from ecg_jax.records.synthetic import labels as labelling
from ecg_jax.records.synthetic import noise, patients, population, render, rhythm
from ecg_jax.records.synthetic.population import State
from ecg_jax.records.synthetic.settings import (
    CODE_LABELS,
    LABELS,
    NEW_LABELS,
    NOMINAL,
    OOD_LABELS,
    RATE,
    SEEN,
    TASKS,
    Settings,
)

__all__ = [
    "BLOCK",
    "CODE_LABELS",
    "LABELS",
    "NEW_LABELS",
    "NOMINAL",
    "OOD_LABELS",
    "RATE",
    "SEEN",
    "TASKS",
    "Batch",
    "Settings",
    "State",
    "batches",
    "generate",
    "labelling",
    "patients",
    "signals",
    "states",
]

CHUNK = 24  # records rendered together: their beats' windows fit a core's cache
BLOCK = 2048  # records whose states are drawn together


@dataclass(frozen=True)
class Batch:
    """Simulated records, in the order asked for. `probability` and `labels` are [n, 9] in the order LABELS,
    whatever the population; a task's columns are those of `TASKS[population]`."""

    signal: list[np.ndarray]  # float32 [730 or 1024, 12] each, mV
    labels: np.ndarray  # int8
    probability: np.ndarray  # float64, P(label = 1 | state), exact
    state: State


def states(settings: Settings, index: np.ndarray, patient: np.ndarray) -> tuple[State, np.ndarray]:
    """States of the records `index` of `patient` (both [n]; see `patients.assign`) and the probabilities [n,
    9] of their labels, without signals: some 20 us a record."""
    state = population.draw(settings, np.asarray(index, np.int64), np.asarray(patient, np.int64))
    return state, labelling.probabilities(settings, state)


def signals(settings: Settings, state: State) -> list[np.ndarray]:
    """float32 [T, 12] in mV for each record of `state`, noise included."""
    found: list[np.ndarray | None] = [None] * len(state.index)
    for length in np.unique(state.length):
        rows = np.flatnonzero(state.length == length)
        for first in range(0, len(rows), CHUNK):
            some = rows[first : first + CHUNK]
            for row, signal in zip(some.tolist(), _render(settings, state.take(some)), strict=True):
                found[row] = signal
    return found


def _render(settings: Settings, state: State) -> np.ndarray:
    clean = render.clean(settings, state, rhythm.beats(settings, state))
    signal = clean + noise.noise(settings, state, clean)
    swapped = state.swapped
    if swapped.any():  # arm electrodes exchanged: I turns over, II shows III
        one, two = signal[swapped, :, 0], signal[swapped, :, 1]
        signal[swapped, :, 0], signal[swapped, :, 1] = -one, two - one
    return np.matmul(signal, expand_matrix())


def generate(settings: Settings, index: np.ndarray, patient: np.ndarray) -> Batch:
    """The records `index` [n] (any order) of the patients `patient` [n]."""
    state, probability = states(settings, index, patient)
    return Batch(signals(settings, state), labelling.draw(settings, state, probability), probability, state)


def batches(settings: Settings, index: np.ndarray, patient: np.ndarray) -> Iterator[Batch]:
    """As `generate`, in blocks of 2,048 records, so that any number of records needs little memory."""
    for first in range(0, len(index), BLOCK):
        part = slice(first, first + BLOCK)
        yield generate(settings, index[part], patient[part])
