"""From states to clean signals in the 8 independent leads.

What it does: evaluates the waves of every beat in a window around its QRS onset and adds the windows up; adds
fibrillatory waves. What it does not: noise. Invariant: every operation works on one record's or one beat's
row by itself, so a record comes out the same to the bit in whatever company it is rendered.
"""

import numpy as np

from ecg_jax.records.synthetic import anatomy, hashing, rhythm
from ecg_jax.records.synthetic.population import State
from ecg_jax.records.synthetic.rhythm import ATRIAL, VENTRICULAR, Beats
from ecg_jax.records.synthetic.settings import RATE, Settings

BEFORE, WINDOW = 42, 128  # samples of a beat's window before the onset, and in all
PAD = 160  # samples of room on both sides for beats at the edges
AMPLITUDE_SD = 0.03  # of a wave's size from beat to beat
P_JITTER = 0.004  # seconds
T_JITTER = 0.004
T_STRETCH = 0.22  # how much of a beat's own RR deviation its T wave follows
ATRIAL_DIRECTION = np.array([[-0.35, 0.55, -0.75], [-0.1, 0.75, -0.25]])  # dipoles of the two fibrillatory sources
PAC_P = (0.75, -0.5)  # size of the two halves of a premature P wave


def clean(settings: Settings, state: State, beats: Beats) -> np.ndarray:
    """float32 [n, T, 8] in mV, for records of one length T."""
    length = int(state.length[0])
    waves = anatomy.waves(state)
    row, beat = np.nonzero(beats.inside)
    shape, start = _beat_shapes(settings, state, beats, waves, row, beat)
    signal = np.zeros((len(state.index), length + 2 * PAD, 8), np.float32)
    for number, (record, first) in enumerate(zip(row.tolist(), (start + PAD).tolist(), strict=True)):
        signal[record, first : first + WINDOW] += shape[number]
    signal = signal[:, PAD : PAD + length]
    atrial = np.flatnonzero(anatomy.fibrillating(state))
    if len(atrial):
        signal[atrial] += _fibrillation(settings, state.take(atrial), length)
    return signal


def _beat_shapes(
    settings: Settings, state: State, beats: Beats, waves: anatomy.Waves, row: np.ndarray, beat: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [b, 128, 8] and the first sample [b] of each beat's window."""
    kind, onset = beats.kind[row, beat], beats.onset[row, beat]
    centre, width = waves.centre[row], waves.width[row]
    breath = (state.sway[row] * beats.breath[row, beat]).astype(np.float32)
    weight = waves.weight[row] + breath[:, None, None] * waves.sway[row]
    early = np.flatnonzero(kind == VENTRICULAR)
    if len(early):
        which, place = np.unique(row[early], return_inverse=True)
        special = anatomy.premature_waves(settings, state.take(which))
        centre[early], width[early] = special.centre[place], special.width[place]
        weight[early] = special.weight[place]

    stream = hashing.key("jitter", settings.population, settings.seed)
    jitter = hashing.normals(stream, state.index[row] * rhythm.BEATS + beat, 6).astype(np.float32)
    centre[:, anatomy.P_WAVES] += P_JITTER * jitter[:, :1]
    usual = 60 / state.rate[row]
    delay = T_STRETCH * np.clip(beats.rr[row, beat] - usual, -0.15, 0.15).astype(np.float32)
    centre[:, anatomy.T_WAVES] += (delay + T_JITTER * jitter[:, 1])[:, None]
    size = np.ones(centre.shape, np.float32)
    size[:, anatomy.P_WAVES] += AMPLITUDE_SD * 2 * jitter[:, 2:3]
    size[:, anatomy.QRS_WAVES] += AMPLITUDE_SD * jitter[:, 3:4]
    size[:, anatomy.T_WAVES] += AMPLITUDE_SD * jitter[:, 4:5]
    size[:, 5:7] += AMPLITUDE_SD * jitter[:, 5:6]
    atrial = kind == ATRIAL
    size[atrial, :2] *= np.array(PAC_P, np.float32)

    first = np.floor(onset * RATE).astype(np.int64) - BEFORE
    offset = (first / RATE - onset).astype(np.float32)
    scale = np.float32(np.sqrt(0.5)) / width
    time = np.arange(WINDOW, dtype=np.float32) / RATE + offset[:, None]
    phase = time[:, None, :] * scale[:, :, None]
    phase -= (centre * scale)[:, :, None]
    np.multiply(phase, phase, out=phase)
    np.negative(phase, out=phase)
    np.maximum(phase, np.float32(-60), out=phase)  # exp underflows slowly
    np.exp(phase, out=phase)
    return np.matmul(phase.transpose(0, 2, 1), weight * size[:, :, None]), first


def _fibrillation(settings: Settings, state: State, length: int) -> np.ndarray:
    """float32 [n, T, 8]: two wandering saw-tooth sources at 4 to 9 Hz, largest in V1."""
    stream = hashing.key("fibrillation", settings.population, settings.seed)
    normal = hashing.normals(stream, state.index, 48).reshape(-1, 2, 24)
    time = np.arange(length) / RATE
    slow = 2 * np.pi * np.array([0.11, 0.23, 0.37, 0.53, 0.71, 0.97])
    basis = np.concatenate([np.sin(slow[:, None] * time), np.cos(slow[:, None] * time)])
    wander, swell = np.matmul(normal[..., :12], basis), np.matmul(normal[..., 12:], basis)
    pace = np.array([1.0, 0.86])[:, None] * state.atrial_rate[:, None, None]
    phase = 2 * np.pi * pace * time + 0.55 * wander + normal[..., :1] * 3
    source = np.sin(phase) + 0.4 * np.sin(2 * phase + 0.8) + 0.15 * np.sin(3 * phase + 1.6)
    source *= state.atrial_size[:, None, None] * np.exp(0.10 * swell) * np.array([1.0, 0.6])[:, None]
    leads = np.matmul(ATRIAL_DIRECTION, anatomy.DOWER.T) * state.gain[:, None, None]
    return np.matmul(source.transpose(0, 2, 1), leads).astype(np.float32)
