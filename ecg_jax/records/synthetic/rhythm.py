"""When the beats of each record fall, and what kind of beat each is.

What it does: RR intervals with respiratory and slow variability in sinus rhythm, independent ones in
fibrillation, premature beats with their pauses. What it does not: the shape of a beat. Invariant: the beats
cover the whole record and a second on both sides, so that no wave is missing at an edge.
"""

from dataclasses import dataclass

import numpy as np

from ecg_jax.records.synthetic import hashing
from ecg_jax.records.synthetic.population import FIBRILLATION, State
from ecg_jax.records.synthetic.settings import RATE, Settings

NORMAL, VENTRICULAR, ATRIAL = 0, 1, 2
BEATS = 48  # drawn per record: 13 s at the least mean RR in use, 0.36 s, are 36
LEAD_IN = 1.1  # seconds before the record in which the first beat falls at the earliest
LEAD_OUT = 0.5
MARGIN = 0.25  # a premature beat counts where it lies this far inside the record, seconds
MIN_RR = 0.29  # seconds, refractory
PVC_COUPLING, PVC_PAUSE = 0.64, 1.34
PAC_COUPLING, PAC_PAUSE = 0.72, 1.08


@dataclass(frozen=True)
class Beats:
    """`onset` [n, 48] QRS onsets in seconds from the record's start (a beat past the end is marked by
    `inside` False), `kind` [n, 48], `rr` [n, 48] the interval before the beat, `breath` [n, 48] sine of
    breathing at the beat, `premature` [n] ventricular beats well inside the record."""

    onset: np.ndarray
    kind: np.ndarray
    rr: np.ndarray
    breath: np.ndarray
    inside: np.ndarray
    premature: np.ndarray


def beats(settings: Settings, state: State) -> Beats:
    """The beats of the records in `state`."""
    normal = hashing.normals(hashing.key("rr", settings.population, settings.seed), state.index, BEATS + 2)
    chance = hashing.uniforms(hashing.key("beats", settings.population, settings.seed), state.index, BEATS + 2)
    mean = 60 / state.rate[:, None]
    cv = state.rr_cv[:, None]
    phase = 2 * np.pi * chance[:, BEATS:]
    about = np.arange(BEATS) * mean
    breath = np.sin(2 * np.pi * state.breathing[:, None] * about + phase[:, :1])
    slow = np.sin(2 * np.pi * 0.09 * about + phase[:, 1:])
    steady = 1 + cv * (1.0 * breath + 0.6 * slow + 0.35 * normal[:, :BEATS])
    wild = np.exp(cv * normal[:, :BEATS] - 0.5 * cv**2)
    rr = mean * np.where((state.rhythm == FIBRILLATION)[:, None], wild, steady)

    early = chance[:, :BEATS]
    kind = np.where(early < state.ectopy[:, None], VENTRICULAR, NORMAL)
    kind = np.where((kind == NORMAL) & (early > 1 - state.atrial[:, None]), ATRIAL, kind)
    kind[:, 1:][(kind[:, :-1] != NORMAL)] = NORMAL  # the beat after a premature one ends the pause
    kind[:, 0] = NORMAL
    factor = np.choose(kind, [1.0, PVC_COUPLING, PAC_COUPLING])
    factor[:, 1:] *= np.choose(kind[:, :-1], [1.0, PVC_PAUSE, PAC_PAUSE])
    rr = np.maximum(rr * factor, MIN_RR)

    first = -LEAD_IN - rr[:, :1] * state.start[:, None]
    onset = first + np.cumsum(rr, axis=1) - rr[:, :1]
    duration = state.length[:, None] / RATE
    inside = (onset > -LEAD_IN) & (onset < duration + LEAD_OUT)
    seen = (kind == VENTRICULAR) & (onset > MARGIN) & (onset < duration - MARGIN)
    return Beats(onset, kind, rr, breath, inside, seen.sum(axis=1))
