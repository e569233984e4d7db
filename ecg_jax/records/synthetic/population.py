"""The latent state of each record: rhythm, intervals, conduction, morphology, acquisition.

What it does: draws every quantity that labels or waveforms depend on, for any set of record numbers at once.
What it does not: labels (`labels`) or waveforms (`anatomy`, `rhythm`, `noise`). Invariant: a record's state
is a function of (settings, record number, patient number) alone. A patient's records share a personal effect:
a trait is sqrt(stability) * patient + sqrt(1 - stability) * record.
"""

from dataclasses import dataclass, fields

import numpy as np
from scipy.special import ndtr

from ecg_jax.records.synthetic import hashing, patients
from ecg_jax.records.synthetic.settings import (
    ACQUISITION,
    LENGTHS,
    MIXTURES,
    MODE_DIMS,
    SHORT,
    WORLD,
    Acquisition,
    Mixture,
    Settings,
)

SINUS, JUNCTIONAL, FIBRILLATION = 0, 1, 2
PLAIN, RIGHT, LEFT = 0, 1, 2  # pattern of conduction

# Visible morphology: standard normal each. The first TEACHER_DIMS enter the teacher term.
MORPHOLOGY = ("axis", "turn", "t_voltage", "t_axis", "t_turn", "septal", "basal", "t_shape", "early_notch")
MORPHOLOGY += ("late_notch", "voltage", "p_voltage", "p_terminal", "p_axis")
TEACHER_DIMS = 10
MORPHOLOGY_STABILITY = 0.85

# Other traits, with how much of their variance is the patient's.
TRAITS = {
    "rhythm": 0.8,
    "speed": 0.6,  # which component the sinus rate is from
    "rate": 0.6,
    "delay": 0.8,  # AV conduction: which component PR is from
    "pr": 0.8,
    "conduction": 0.9,
    "qrs": 0.85,
    "ventricular": 0.6,
    "long_qt": 0.7,
    "qt": 0.7,
    "ischaemia": 0.6,
    "st": 0.5,
    "irregularity": 0.5,
    "breathing": 0.5,
    "sway": 0.5,
    "shift": 0.3,  # chest electrodes placed along the row
}
AGED = ("rhythm", "delay", "conduction", "ischaemia")  # traits that come with age
AGE_EFFECT = 0.35
OWN = ("snr", "drift", "mains", "gain", "flutter_size", "flutter_rate", "ectopy")
OWN_UNIFORM = ("length", "swap", "pops", "atrial_ectopy", "start")
PATTERN_SPREAD = 0.5  # size of the people's spread in the modes' space, where a mode's own direction has size 1
PATTERN_STABILITY = 0.9


@dataclass(frozen=True)
class State:
    """Arrays over records, [n] unless said otherwise. Intervals in ms, rates per minute, voltages in mV."""

    index: np.ndarray  # record number
    patient: np.ndarray
    age: np.ndarray
    male: np.ndarray
    mode: np.ndarray  # morphology mode, 0 the commonest
    rhythm: np.ndarray  # SINUS, JUNCTIONAL, FIBRILLATION
    rate: np.ndarray
    rr_cv: np.ndarray  # coefficient of variation of RR
    pr: np.ndarray
    qrs: np.ndarray  # QRS duration
    pattern: np.ndarray  # PLAIN, RIGHT, LEFT
    qtc: np.ndarray
    st: np.ndarray  # ST level along the lateral wall as recorded, mV
    ectopy: np.ndarray  # share of beats that are ventricular and premature; 0 in most
    atrial: np.ndarray  # share of beats that are atrial and premature
    morphology: np.ndarray  # [n, 14] in the order MORPHOLOGY
    local: np.ndarray  # [n, 24] place in the modes' space: the mode's direction, and the person's spread
    breathing: np.ndarray  # Hz
    sway: np.ndarray  # radians that breathing turns the heart
    shift: np.ndarray  # misplacement of the chest electrodes, in electrode spacings
    atrial_size: np.ndarray  # amplitude of fibrillatory waves, mV
    atrial_rate: np.ndarray  # Hz
    snr_db: np.ndarray
    drift: np.ndarray  # share of the noise power
    mains: np.ndarray  # share of the noise power before the 100 Hz decimator
    gain: np.ndarray
    length: np.ndarray  # samples
    swapped: np.ndarray  # bool, arm electrodes exchanged
    pops: np.ndarray  # bool
    start: np.ndarray  # where in a beat the recording starts, 0..1

    def take(self, rows: np.ndarray) -> "State":
        """The records of these rows."""
        return State(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def mode_directions(mode: np.ndarray, settings: Settings) -> np.ndarray:
    """float64 [n, 24], where each mode stands in the modes' space; the commonest is the origin. Hashed, not
    stored; the same in both populations and for all seeds."""
    place = hashing.normals(hashing.key("direction", WORLD), mode, MODE_DIMS)
    return np.where(mode[:, None] == 0, 0.0, place * settings.mode_size)


def _traits(settings: Settings, index: np.ndarray, patient: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    names = (*MORPHOLOGY, *TRAITS)
    stability = np.array([MORPHOLOGY_STABILITY] * len(MORPHOLOGY) + list(TRAITS.values()))
    columns = len(names) + MODE_DIMS
    who, when = (hashing.key(what, settings.population, settings.seed) for what in ("patient", "record"))
    personal = hashing.normals(who, patient, columns + 1)
    own = hashing.normals(when, index, columns)
    age = personal[:, -1]
    for name in AGED:
        column = names.index(name)
        personal[:, column] = AGE_EFFECT * age + np.sqrt(1 - AGE_EFFECT**2) * personal[:, column]
    place = np.sqrt(PATTERN_STABILITY) * personal[:, len(names) : columns]
    place = place + np.sqrt(1 - PATTERN_STABILITY) * own[:, len(names) :]
    value = np.sqrt(stability) * personal[:, : len(names)] + np.sqrt(1 - stability) * own[:, : len(names)]
    drawn = {name: value[:, column] for column, name in enumerate(names)}
    return drawn | {"age": age}, place


def _choose(liability: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """int [n]: 0 for most; c + 1 for the share `shares[c]` of the records, taken from the top of the
    liability."""
    place = np.searchsorted(np.cumsum(shares), ndtr(-liability), side="right")
    return (place + 1) % (len(shares) + 1)


def draw(settings: Settings, index: np.ndarray, patient: np.ndarray) -> State:
    """The states of the records `index` [n] of the patients `patient` [n] (see `patients.assign`)."""
    mixture, device = MIXTURES[settings.prevalence], ACQUISITION[settings.population]
    trait, place = _traits(settings, index, patient)
    when = hashing.key("own", settings.population, settings.seed)
    own = dict(zip(OWN, hashing.normals(when, index, len(OWN)).T, strict=True))
    when = hashing.key("own uniform", settings.population, settings.seed)
    uniform = dict(zip(OWN_UNIFORM, hashing.uniforms(when, index, len(OWN_UNIFORM)).T, strict=True))
    mode = patients.modes(settings, patient)
    male = hashing.uniforms(hashing.key("sex", settings.population, settings.seed), patient, 1)[:, 0] < 0.4
    gain = _gain(device, own["gain"])
    ectopy, atrial = _ectopy(mixture, trait["ventricular"], own["ectopy"], uniform["atrial_ectopy"])
    rhythm = _rhythm(mixture, device, trait)
    return State(
        index=index,
        patient=patient,
        age=np.round(np.clip(53 + 19 * trait["age"], 17, 99)),
        male=male.astype(np.float64),
        mode=mode,
        **rhythm,
        **_intervals(mixture, trait, rhythm["rate"]),
        **_conduction(mixture, trait),
        st=_st_level(mixture, trait) * gain,
        ectopy=ectopy,
        atrial=np.where(rhythm["rhythm"] == SINUS, atrial, 0.0),
        morphology=np.stack([np.clip(trait[name], -3.2, 3.2) for name in MORPHOLOGY], axis=1),
        local=mode_directions(mode, settings) + PATTERN_SPREAD * place,
        breathing=0.26 * np.exp(0.2 * trait["breathing"]),
        sway=0.045 * np.exp(0.4 * trait["sway"]),
        shift=0.3 * trait["shift"],
        atrial_size=np.clip(0.05 * np.exp(0.45 * own["flutter_size"]), 0.012, 0.16),
        atrial_rate=np.clip(6.3 + 0.8 * own["flutter_rate"], 4.2, 8.8),
        snr_db=device.snr_db + device.snr_sd * own["snr"],
        drift=1 / (1 + np.exp(-device.drift - 0.8 * own["drift"])),
        mains=np.minimum(0.03 * np.exp(1.2 * own["mains"]), 0.5),
        gain=gain,
        length=np.where(uniform["length"] < SHORT, *LENGTHS),
        swapped=uniform["swap"] < device.swaps,
        pops=uniform["pops"] < device.pops,
        start=uniform["start"],
    )


def _gain(device: Acquisition, normal: np.ndarray) -> np.ndarray:
    low, high = np.log(device.gain)
    return np.exp(low + (high - low) * ndtr(normal))


def _rhythm(mixture: Mixture, device: Acquisition, trait: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """rhythm, rate and irregularity. The sinus rate is log-normal, with a slow and a fast component added."""
    kind = _choose(trait["rhythm"], (mixture.fibrillation, mixture.organised, mixture.junctional))
    rhythm = np.choose(kind, [SINUS, FIBRILLATION, FIBRILLATION, JUNCTIONAL])
    z, wobble = trait["rate"], np.exp(0.45 * trait["irregularity"])
    speed = _choose(trait["speed"], (mixture.fast, mixture.slow))
    sinus = np.choose(speed, [71 * np.exp(0.15 * z), 114 + 10 * z, 43.5 + 4 * z])
    rate = np.choose(kind, [sinus, 84 * np.exp(0.24 * z), 78 * np.exp(0.15 * z), 58 * np.exp(0.12 * z)])
    cv = np.choose(kind, [0.022 * wobble, 0.19 * wobble**0.4, 0.095 + 0.03 * trait["irregularity"], 0.012 * wobble])
    rate = np.clip(rate + device.faster, 34, np.where(rhythm == FIBRILLATION, 150, 165))
    return {"rhythm": rhythm, "rate": rate, "rr_cv": np.clip(cv, 0.004, np.where(kind == 0, 0.1, 0.33))}


def _intervals(mixture: Mixture, trait: dict[str, np.ndarray], rate: np.ndarray) -> dict[str, np.ndarray]:
    delayed = _choose(trait["delay"], (mixture.long_pr,))
    pr = np.where(delayed, 234 + 24 * trait["pr"], 153 + 16 * trait["pr"]) - 0.2 * (rate - 72)
    prolonged = _choose(trait["long_qt"], (mixture.long_qt,))
    qtc = np.where(prolonged, 496 + 18 * trait["qt"], 410 + 18 * trait["qt"])
    return {"pr": np.clip(pr, 100, 330), "qtc": np.clip(qtc, 340, 560)}


def _conduction(mixture: Mixture, trait: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shares = (mixture.right, mixture.left, mixture.slow_muscle, mixture.part_left, mixture.part_right)
    kind = _choose(trait["conduction"], shares)
    middle = np.array([91.0, 141.0, 151.0, 124.0, 112.0, 108.0])[kind]
    spread = np.array([7.5, 12.0, 13.0, 9.0, 7.5, 7.5])[kind]
    pattern = np.array([PLAIN, RIGHT, LEFT, PLAIN, LEFT, RIGHT])[kind]
    return {"qrs": np.clip(middle + spread * trait["qrs"], 68, 196), "pattern": pattern}


def _st_level(mixture: Mixture, trait: dict[str, np.ndarray]) -> np.ndarray:
    low = _choose(trait["ischaemia"], (mixture.ischaemic,))
    return np.where(low, -0.18 + 0.04 * trait["st"], 0.01 + 0.028 * trait["st"])


def _ectopy(mixture: Mixture, liability: np.ndarray, size: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of ventricular and of atrial premature beats."""
    ventricular = np.where(_choose(liability, (mixture.ventricular,)), 0.06 + 0.2 * ndtr(size), 0.0)
    atrial = np.where(u < 0.04, 0.06 + 0.1 * ndtr(-size), 0.0)
    return ventricular, atrial
