"""Who the patients are: which records belong to which patient, and the patient's morphology mode.

What it does: numbers patients and their 1 to 38 records, cheaply, for any number of records. What it does
not: draw anything of the signal. Invariant: the first n records are the same records of the same patients
whatever the total.
"""

from functools import cache

import numpy as np

from ecg_jax.records.synthetic import hashing
from ecg_jax.records.synthetic.settings import MODES, TAIL_FROM, ZIPF, Settings

SINGLE = 0.714  # patients with one record, as in CODE-15 % (66,929 of 233,770 have more)
MOST = 38
REPEAT_POWER = 3.5  # P(r) ~ r^-3.5 for r in 2..38: mean 2.69 (CODE-15 %: 2.67)


def _repeat_cdf() -> np.ndarray:
    """float64 [38], the distribution function of the number of records of a patient."""
    weight = np.arange(2, MOST + 1.0) ** -REPEAT_POWER
    return np.cumsum(np.concatenate([[SINGLE], (1 - SINGLE) * weight / weight.sum()]))


def _counts(settings: Settings, patients: int) -> np.ndarray:
    u = hashing.uniforms(hashing.key("repeats", settings.population, settings.seed), np.arange(patients), 1)[:, 0]
    return np.minimum(np.searchsorted(_repeat_cdf(), u), MOST - 1) + 1


def assign(settings: Settings, records: int) -> np.ndarray:
    """int64 [records], the patient number of each record; a patient's records follow one another."""
    patients = records  # at most one patient a record
    owner = np.repeat(np.arange(patients), _counts(settings, patients))
    return owner[:records]


def records_of(settings: Settings, patients: int) -> int:
    """How many records the first `patients` patients have together."""
    return int(_counts(settings, patients).sum())


@cache
def mode_cdf(population: int) -> np.ndarray:
    """float64 [65536], distribution function of the morphology modes. Population 1: Zipf, k^-1.4. Population
    2: each mode beyond the 64 commonest is four times as frequent as there, the 64 share what is left in
    proportion."""
    weight = np.arange(1, MODES + 1.0) ** -ZIPF
    weight /= weight.sum()
    if population == 2:
        weight[TAIL_FROM:] *= 4
        weight[:TAIL_FROM] *= (1 - weight[TAIL_FROM:].sum()) / weight[:TAIL_FROM].sum()
    return np.cumsum(weight)


def modes(settings: Settings, patient: np.ndarray) -> np.ndarray:
    """int64 [n], the morphology mode (0 is the commonest) of each patient number in `patient`."""
    u = hashing.uniforms(hashing.key("mode", settings.population, settings.seed), patient, 1)[:, 0]
    return np.minimum(np.searchsorted(mode_cdf(settings.population), u, side="right"), MODES - 1)
