"""What recording adds: drift, electrode and muscle noise, mains, electrode pops.

What it does: draws noise for each of the nine electrodes in the frequency domain and forms the leads from
them, so that limb-electrode noise reaches the leads it would. What it does not: touch the clean signal.
Invariant: a record's total noise (pops apart) has the power that its `snr_db` says, relative to the clean
signal's variance over the 8 independent leads.

The signal is thought of as decimated to 100 Hz by a recorder's imperfect filter. 50 Hz mains then sits at the
folding frequency, half gone, and beats there with its own deviation; 60 Hz folds back to 40 Hz, mostly
suppressed.
"""

import numpy as np

from ecg_jax.records.synthetic import hashing
from ecg_jax.records.synthetic.population import State
from ecg_jax.records.synthetic.settings import ACQUISITION, RATE, Settings

# I, II, V1..V6 from the electrodes RA, LA, LL, V1..V6 (chest leads against Wilson's terminal).
ELECTRODES = 9
FROM_ELECTRODES = np.zeros((8, ELECTRODES), np.float32)
FROM_ELECTRODES[0, [0, 1]] = -1, 1
FROM_ELECTRODES[1, [0, 2]] = -1, 1
FROM_ELECTRODES[2:, :3] = -1 / 3
FROM_ELECTRODES[2:, 3:] = np.eye(6)

FFT_LENGTH = {730: 900, 1024: 1280}  # longer than the record: the noise must not close on itself
UNEVEN = 0.55  # log-sd of the electrodes' noise levels
DRIFT_CORNER = 0.22  # Hz
MAINS_PASS = {50: 0.5, 60: 0.12}  # what the decimator leaves of the mains' amplitude
MAINS_SD = 0.03  # Hz
POP_SIZE = 0.5  # mV, median


def _spectra(length: int, pink: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [F] each: power of drift and of fast noise over frequency, each of sum 1."""
    frequency = np.arange(length // 2 + 1) * RATE / length
    drift = 1 / (1 + (frequency / DRIFT_CORNER) ** 4)
    edge = 1 / (1 + (frequency / 46) ** 24)  # the recorder's filter
    muscle = frequency**2 / (frequency**2 + 12**2) * edge
    electrode = 1 / (0.4 + frequency) * edge
    drift[0] = muscle[0] = electrode[0] = 0
    fast = pink * electrode / electrode.sum() + (1 - pink) * muscle / muscle.sum()
    return (drift / drift.sum()).astype(np.float32), fast.astype(np.float32)


def noise(settings: Settings, state: State, clean: np.ndarray) -> np.ndarray:
    """float32 [n, T, 8] in mV to be added to `clean` [n, T, 8], records of one length T."""
    if settings.noise == 0:
        return np.zeros_like(clean)
    device = ACQUISITION[settings.population]
    count, length = clean.shape[:2]
    size = FFT_LENGTH[length]
    bins = size // 2 + 1
    stream = hashing.key("noise", settings.population, settings.seed)
    draws = np.empty((count, ELECTRODES, bins, 2), np.float32)
    for row, index in enumerate(state.index.tolist()):
        hashing.generator(stream, index).standard_normal(dtype=np.float32, out=draws[row])
    level = hashing.normals(hashing.key("levels", settings.population, settings.seed), state.index, 3 * ELECTRODES + 4)
    uneven = np.exp(UNEVEN * level[:, : 3 * ELECTRODES]).reshape(-1, 3, ELECTRODES, 1).astype(np.float32)
    slow, fast = _spectra(size, device.pink)
    share = state.drift.astype(np.float32)[:, None, None]
    power = share * uneven[:, 0] * slow + (1 - share) * uneven[:, 1] * fast
    spectrum = draws.view(np.complex64)[..., 0] * np.sqrt(power)
    electrodes = np.fft.irfft(spectrum, size)[..., :length] * np.float32(size / 2)
    electrodes += _mains(device.mains, state, level[:, 3 * ELECTRODES :], uneven[:, 2], length)
    leads = np.matmul(electrodes.transpose(0, 2, 1), FROM_ELECTRODES.T)
    leads *= (settings.noise * _scale(clean, leads, state.snr_db))[:, None, None]
    _add_pops(settings, state, leads)
    return leads


def _scale(clean: np.ndarray, noise_: np.ndarray, snr_db: np.ndarray) -> np.ndarray:
    """float32 [n], the factor that brings the noise to the wanted ratio."""
    power = []
    for part in (clean, noise_):
        centred = part - part.mean(axis=1, keepdims=True)
        power.append(np.square(centred).mean(axis=(1, 2)))
    return np.sqrt(power[0] / power[1] / 10 ** (snr_db / 10)).astype(np.float32)


def _mains(hertz: int, state: State, level: np.ndarray, uneven: np.ndarray, length: int) -> np.ndarray:
    """float32 [n, 9, T] before scaling, in units where drift and fast noise together have unit power."""
    frequency = hertz + MAINS_SD * level[:, 0]
    time = np.arange(length) / RATE
    wave = np.sin(2 * np.pi * frequency[:, None] * time + 20 * level[:, 1:2])
    wave *= MAINS_PASS[hertz] * np.sqrt(2 * state.mains)[:, None]
    return np.sqrt(uneven) * wave[:, None, :].astype(np.float32)


def _add_pops(settings: Settings, state: State, leads: np.ndarray) -> None:
    """Adds to `leads` [n, T, 8] in place: an electrode's potential jumps and settles again, once or twice."""
    length = leads.shape[1]
    for row in np.flatnonzero(state.pops).tolist():
        draw = hashing.generator(hashing.key("pop", settings.population, settings.seed), int(state.index[row]))
        for _ in range(int(draw.integers(1, 3))):
            electrode, first = int(draw.integers(ELECTRODES)), int(draw.integers(length - 10))
            size = POP_SIZE * np.exp(0.7 * draw.standard_normal()) * draw.choice([-1.0, 1.0])
            fade = 0.03 * np.exp(3 * draw.random())  # seconds
            course = size * np.exp(-np.arange(length - first) / RATE / fade)
            leads[row, first:] += settings.noise * (course[:, None] * FROM_ELECTRODES[:, electrode]).astype(np.float32)
