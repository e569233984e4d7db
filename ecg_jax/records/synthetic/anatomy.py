"""From the latent state to the waves of a beat: when each comes, how wide it is, how large in each lead.

What it does: a beat is 14 Gaussian waves. Each has a 3-D dipole, projected on the 8 independent leads by
Dower's matrix (the person's axis, chest and electrode positions altering it), and a small local part that no
dipole explains, largest in the chest leads near the heart. What it does not: place beats in time. Invariant:
leads are I, II, V1..V6 in that order; limb leads III, aVR, aVL, aVF follow from I and II and are never
modelled.

Axes: x to the left, y to the feet, z to the back; mV, seconds from the QRS onset.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ecg_jax.records.synthetic import hashing
from ecg_jax.records.synthetic.population import FIBRILLATION, LEFT, MORPHOLOGY, RIGHT, SINUS, State
from ecg_jax.records.synthetic.settings import MODE_DIMS, WORLD, Settings

# Dower's lead vectors (Dower, Machado & Osborne 1980) for I, II, V1..V6 on x, y, z.
DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
NEARNESS = np.array([0.30, 0.30, 0.75, 1.2, 1.3, 1.1, 0.8, 0.6])  # weight of the local part in each lead

WAVES = ("p_right", "p_left", "septal", "early", "main", "late", "basal", "terminal")
WAVES += ("st", "t_rise", "t_peak", "t_notch", "early_notch", "late_notch")
P_WAVES, QRS_WAVES, T_WAVES = slice(0, 2), slice(2, 8), slice(8, 12)
LOCAL_SIZE = 0.235  # of the local part, relative to a wave's own size
MODE_SIZE = 0.05  # of a mode's dipole in the notch waves, mV
BAND = 0.0045  # seconds; widening by the recorder's low pass, which keeps the waves free of aliases at 100 Hz

# Dipoles of each wave: plain conduction, right and left bundle branch block, ventricular premature beat.
PLAIN_DIPOLES = np.array(
    [
        [0.035, 0.075, -0.035],  # p_right
        [0.085, 0.060, 0.050],  # p_left
        [-0.16, -0.02, -0.24],  # septal
        [0.36, 0.26, -0.40],  # early: apex, anterior wall
        [0.92, 0.50, 0.28],  # main: free wall
        [0.26, 0.12, 0.55],  # late: posterior wall
        [-0.22, -0.20, 0.26],  # basal
        [0.0, 0.0, 0.0],  # terminal
        [0.018, 0.015, -0.03],  # st
        [0.115, 0.078, -0.085],  # t_rise
        [0.19, 0.13, -0.12],  # t_peak
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
)
RIGHT_CHANGE = {
    "main": [0.72, 0.42, 0.16],
    "late": [0.16, 0.10, 0.30],
    "basal": [-0.12, -0.06, 0.00],
    "terminal": [-0.40, -0.02, -0.56],
    "st": [0.02, 0.01, 0.03],
    "t_rise": [0.14, 0.09, 0.06],
    "t_peak": [0.18, 0.10, 0.10],
}
LEFT_CHANGE = {
    "septal": [0.05, 0.02, -0.04],
    "early": [0.60, 0.28, 0.20],
    "main": [0.52, 0.24, 0.90],
    "late": [0.82, 0.06, 0.88],
    "basal": [0.16, -0.14, 0.20],
    "st": [-0.10, -0.02, -0.22],
    "t_rise": [-0.16, -0.01, -0.24],
    "t_peak": [-0.22, -0.01, -0.26],
}
# Centre and width of the QRS waves as a share of the QRS duration.
PLAIN_TIMES = np.array([[0.19, 0.085], [0.35, 0.085], [0.49, 0.095], [0.64, 0.095], [0.81, 0.085], [0.9, 0.08]])
LEFT_TIMES = np.array([[0.09, 0.05], [0.24, 0.10], [0.45, 0.105], [0.68, 0.105], [0.85, 0.075], [0.9, 0.08]])
HEALTHY_QRS = 0.088  # seconds; in right block the first part of the QRS keeps a healthy pace


@dataclass(frozen=True)
class Waves:
    """Per record: centre and width [n, 14] in seconds, `weight` [n, 14, 8] mV in the leads, `sway` [n, 14, 8]
    its derivative when the heart turns (mV per radian). float32."""

    centre: np.ndarray
    width: np.ndarray
    weight: np.ndarray
    sway: np.ndarray


def _changed(base: np.ndarray, change: dict[str, list[float]]) -> np.ndarray:
    dipoles = base.copy()
    for name, vector in change.items():
        dipoles[WAVES.index(name)] = vector
    return dipoles


DIPOLES = np.stack([PLAIN_DIPOLES, _changed(PLAIN_DIPOLES, RIGHT_CHANGE), _changed(PLAIN_DIPOLES, LEFT_CHANGE)])


@lru_cache(maxsize=1)
def _local_tables() -> tuple[np.ndarray, np.ndarray]:
    """[24, 14 * 8] from a place in the modes' space to the local parts, and [24, 3 * 3] to the dipoles of the
    three notch waves; fixed by WORLD."""
    dims = np.arange(MODE_DIMS)
    local = hashing.normals(hashing.key("local", WORLD), dims, len(WAVES) * 8) / np.sqrt(MODE_DIMS)
    notch = hashing.normals(hashing.key("notch", WORLD), dims, 9) / np.sqrt(MODE_DIMS)
    return local, notch


def _turn(vectors: np.ndarray, axis: int, angle: np.ndarray) -> np.ndarray:
    """[n, k, 3] turned about the axis z (2: frontal plane) or y (1: horizontal plane) by `angle` [n, 1 or
    k]."""
    a, b = ((0, 1), (0, 2))[axis == 1]
    turned = vectors.copy()
    cos, sin = np.cos(angle), np.sin(angle)
    turned[..., a] = cos * vectors[..., a] - sin * vectors[..., b]
    turned[..., b] = sin * vectors[..., a] + cos * vectors[..., b]
    return turned


def _dipoles(state: State, z: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [n, 14, 3] in mV, before the device's gain."""
    dipoles = DIPOLES[state.pattern]
    # An incomplete right block has a smaller terminal wave; a wider one a larger and later one.
    fullness = np.clip((state.qrs - 90) / 45, 0.25, 1.2)
    dipoles[:, WAVES.index("terminal")] *= np.where(state.pattern == RIGHT, fullness, 1.0)[:, None]
    partial = (state.pattern == RIGHT) * (1 - np.clip((state.qrs - 100) / 25, 0, 1))
    for wave in ("t_rise", "t_peak", "st", "main", "late", "basal"):
        k = WAVES.index(wave)
        dipoles[:, k] += partial[:, None] * (PLAIN_DIPOLES[k] - dipoles[:, k])
    scale = np.ones(dipoles.shape[:2])
    voltage = np.exp(0.24 * z["voltage"])
    scale[:, QRS_WAVES] *= voltage[:, None]
    scale[:, WAVES.index("septal")] *= np.exp(0.45 * z["septal"])
    scale[:, WAVES.index("basal")] *= np.exp(0.45 * z["basal"])
    scale[:, 9:11] *= (voltage**0.5 * np.exp(0.34 * z["t_voltage"]))[:, None]
    scale[:, P_WAVES] *= np.exp(0.25 * z["p_voltage"])[:, None]
    scale[:, 1] *= np.exp(0.25 * z["p_terminal"])
    scale[:, P_WAVES] *= (state.rhythm == SINUS)[:, None]
    dipoles *= scale[..., None]
    dipoles[:, 12] = 0.11 * (z["early_notch"] * voltage)[:, None] * np.array([0.5, -0.6, 0.6])
    dipoles[:, 13] = 0.11 * (z["late_notch"] * voltage)[:, None] * np.array([-0.3, 0.7, 0.6])
    frontal = np.zeros(scale.shape)
    frontal[:, 2:9] = frontal[:, 12:] = (0.34 * z["axis"])[:, None]
    frontal[:, 9:12] = (0.17 * z["axis"] + 0.26 * z["t_axis"])[:, None]
    frontal[:, P_WAVES] = (0.2 * z["p_axis"])[:, None]
    level = np.zeros(scale.shape)
    level[:, 2:9] = level[:, 12:] = (0.22 * z["turn"])[:, None]
    level[:, 9:12] = (0.10 * z["turn"] + 0.28 * z["t_turn"])[:, None]
    dipoles = _turn(_turn(dipoles, 1, level), 2, frontal)
    # The ST level is defined along the lateral wall, as recorded.
    dipoles[:, 8] += (state.st / state.gain)[:, None] * np.array([0.75, 0.35, -0.05])
    return dipoles


def _times(state: State, z: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Centres and widths [n, 14] in seconds from the QRS onset."""
    qrs, pr = state.qrs / 1000, state.pr / 1000
    share = np.where((state.pattern == LEFT)[:, None, None], LEFT_TIMES, PLAIN_TIMES)
    pace = np.where(state.pattern == RIGHT, np.minimum(HEALTHY_QRS, qrs), qrs)
    centre, width = np.empty((len(qrs), len(WAVES))), np.empty((len(qrs), len(WAVES)))
    centre[:, QRS_WAVES] = share[:, :, 0] * pace[:, None]
    width[:, QRS_WAVES] = share[:, :, 1] * pace[:, None]
    late = np.maximum(qrs - 0.070, 0.012) / 4.4  # width of the right ventricle's late wave, two of which end the QRS
    right = state.pattern == RIGHT
    width[:, 7] = np.where(right, late, width[:, 7])
    centre[:, 7] = np.where(right, qrs - 1.9 * late, centre[:, 7])
    centre[:, 0], width[:, 0] = -pr + 0.038, 0.0165
    centre[:, 1], width[:, 1] = -pr + 0.072, 0.0175
    qt = qt_interval(state.qtc, 60 / state.rate)
    peak = qt - 0.068 * (qt / 0.4) ** 0.5
    shape = np.exp(0.16 * z["t_shape"])
    centre[:, 8], width[:, 8] = qrs + 0.45 * (peak - qrs - 0.02), 0.30 * (peak - qrs)
    centre[:, 9], width[:, 9] = peak - 0.042 * shape, 0.046 * shape
    centre[:, 10], width[:, 10] = peak, 0.033
    centre[:, 11], width[:, 11] = peak - 0.02, 0.018
    centre[:, 12], width[:, 12] = 0.40 * pace, 0.009 + 0.02 * (pace - 0.09)
    centre[:, 13], width[:, 13] = 0.72 * pace, 0.010 + 0.02 * (pace - 0.09)
    return centre, np.sqrt(width**2 + BAND**2)


def qt_interval(qtc: np.ndarray, rr: np.ndarray) -> np.ndarray:
    """QT in seconds from QTc in ms (Fridericia) and RR in seconds; bounded at fast rates (T ends
    before the next QRS)."""
    return np.minimum(qtc / 1000 * np.cbrt(rr), 0.15 + 0.45 * rr + 0.0002 * (qtc - 400))


def _leads(state: State) -> np.ndarray:
    """float64 [n, 8, 3]: Dower's vectors with the chest electrodes moved along the row."""
    moved = np.zeros_like(DOWER)
    moved[2:] = np.gradient(DOWER[2:], axis=0)
    return DOWER + state.shift[:, None, None] * moved


def waves(state: State) -> Waves:
    """The waves of the records' ordinary beats."""
    z = dict(zip(MORPHOLOGY, state.morphology.T, strict=True))
    centre, width = _times(state, z)
    dipoles = _dipoles(state, z)
    local_table, notch_table = _local_tables()
    place = state.local[:, None, :]
    notch = MODE_SIZE * np.matmul(place, notch_table).reshape(-1, 3, 3)
    dipoles[:, 11:14] += notch * np.array([0.6, 1.0, 1.0])[:, None]
    leads = _leads(state)
    weight = np.matmul(dipoles, leads.transpose(0, 2, 1))
    size = np.sqrt((dipoles**2).sum(axis=2))
    size[:, 11] += 0.06
    size[:, 12:] += 0.12
    local = np.matmul(place, local_table).reshape(-1, len(WAVES), 8)
    weight += LOCAL_SIZE * size[:, :, None] * NEARNESS * local
    swayed = np.stack([-dipoles[..., 1] - 0.7 * dipoles[..., 2], dipoles[..., 0], 0.7 * dipoles[..., 0]], axis=2)
    sway = np.matmul(swayed, leads.transpose(0, 2, 1))
    gain = state.gain[:, None, None]
    return Waves(*(a.astype(np.float32) for a in (centre, width, weight * gain, sway * gain)))


def premature_waves(settings: Settings, state: State) -> Waves:
    """The waves of the records' ventricular premature beats: wide, from one place a person, T against the
    QRS, no P."""
    source = hashing.normals(hashing.key("pvc", settings.population, settings.seed), state.patient, 4)
    n = len(source)
    direction = source[:, :3] * np.array([0.7, 1.0, 0.8])
    direction *= 1.25 / np.linalg.norm(direction, axis=1, keepdims=True)
    duration = 0.150 + 0.012 * source[:, 3]
    centre, width = np.zeros((n, len(WAVES))), np.full((n, len(WAVES)), 0.03)
    dipoles = np.zeros((n, len(WAVES), 3))
    start = _turn(direction[:, None, :], 2, np.full((n, 1), 0.9))[:, 0]
    for wave, share, vector in (
        (3, 0.24, 0.45 * start),
        (4, 0.45, 0.95 * direction),
        (5, 0.70, 0.75 * direction),
    ):
        centre[:, wave], width[:, wave] = share * duration, 0.125 * duration
        dipoles[:, wave] = vector
    peak = duration + 0.19
    centre[:, 8], width[:, 8], dipoles[:, 8] = duration + 0.07, 0.045, -0.16 * direction
    centre[:, 9], width[:, 9], dipoles[:, 9] = peak - 0.03, 0.058, -0.25 * direction
    centre[:, 10], width[:, 10], dipoles[:, 10] = peak, 0.040, -0.18 * direction
    local, _ = _local_tables()
    size = np.sqrt((dipoles**2).sum(axis=2))[:, :, None]
    weight = np.matmul(dipoles, _leads(state).transpose(0, 2, 1))
    weight += 1.5 * LOCAL_SIZE * size * NEARNESS * np.matmul(state.local[:, None, :], local).reshape(n, -1, 8)
    parts = (centre, width, weight * state.gain[:, None, None], np.zeros_like(weight))
    return Waves(*(a.astype(np.float32) for a in parts))


def fibrillating(state: State) -> np.ndarray:
    """bool [n], where there are fibrillatory waves instead of P waves."""
    return state.rhythm == FIBRILLATION
