"""What can be asked of the simulator, and the numbers that make its two populations what they are.

What it does: names the knobs and the conditions' frequencies. What it does not: draw anything. Invariant: two
equal `Settings` give bit-identical records on one machine; record i does not depend on how many records are
asked for.
"""

from dataclasses import dataclass

RATE = 100  # Hz
LENGTHS = (730, 1024)  # samples: the 7.3 s and 10.24 s of CODE's two groups of devices
SHORT = 0.58  # share of the shorter length

CODE_LABELS = ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")
NEW_LABELS = (
    "PVC",
    "LQT",
    "STD",
)  # premature ventricular beats; QTc above 460 ms; ST depression beyond 0.1 mV
LABELS = CODE_LABELS + NEW_LABELS
OOD_LABELS = ("RBBB", "LBBB", "AF", "ST", *NEW_LABELS)
SEEN = OOD_LABELS[:4]
TASKS = {1: ("code", CODE_LABELS), 2: ("ood", OOD_LABELS)}

NOMINAL = (0.015, 0.027, 0.017, 0.016, 0.018, 0.021, 0.05, 0.06, 0.07)  # of LABELS; the first six are CODE's
MISSED = 0.01  # chance that a true diagnosis is not in the report
FALSE = 0.001  # chance of a diagnosis that is not there

MODES = 65536
ZIPF = 1.4
TAIL_FROM = 64  # modes beyond this many of the commonest are "the tail", four times as frequent in population 2
MODE_DIMS = 24  # of the morphology space that the modes' directions live in

WORLD = 1958  # key of the fixed anatomy, mode codes, teacher and label offsets: one world for all seeds


@dataclass(frozen=True)
class Mixture:
    """How often a record's underlying condition is drawn, before any label noise (rates of the components;
    the continuous tails of the healthy add to them)."""

    fibrillation: float
    organised: float  # fibrillation of nearly regular rate: an open case between AF and not
    junctional: float  # regular, and no P wave: never AF
    slow: float
    fast: float
    long_pr: float
    right: float
    part_right: float  # incomplete right bundle branch block
    left: float
    part_left: float
    slow_muscle: float  # wide QRS of neither pattern
    ventricular: float
    long_qt: float
    ischaemic: float


CODE_MIX = Mixture(
    fibrillation=0.0166,
    organised=0.002,
    junctional=0.003,
    slow=0.0014,
    fast=0.0095,
    long_pr=0.0058,
    right=0.0248,
    part_right=0.025,
    left=0.0138,
    part_left=0.012,
    slow_muscle=0.006,
    ventricular=0.0645,
    long_qt=0.0544,
    ischaemic=0.074,
)
BALANCED_MIX = Mixture(
    fibrillation=0.15,
    organised=0.01,
    junctional=0.03,
    slow=0.17,
    fast=0.17,
    long_pr=0.20,
    right=0.15,
    part_right=0.04,
    left=0.15,
    part_left=0.03,
    slow_muscle=0.03,
    ventricular=0.15,
    long_qt=0.14,
    ischaemic=0.15,
)
MIXTURES = {"code": CODE_MIX, "balanced": BALANCED_MIX}


@dataclass(frozen=True)
class Acquisition:
    """How a population's devices record."""

    snr_db: float  # median of the signal-to-noise ratio
    snr_sd: float  # its standard deviation, dB
    drift: float  # logit of the median share of drift in the noise power
    pink: float  # share of 1/f electrode noise in the fast part of the noise; the rest is muscle
    mains: int  # Hz
    pops: float  # share of records with an electrode pop
    swaps: float  # share of records with the arm electrodes swapped
    gain: tuple[float, float]  # range of the device's gain error (log-uniform)
    faster: float  # beats a minute added to every rate


ACQUISITION = {
    1: Acquisition(18.0, 4.0, 1.2, 0.5, 60, 0.05, 0.01, (1.0, 1.0), 0.0),
    2: Acquisition(15.0, 4.0, 0.6, 0.25, 50, 0.08, 0.01, (0.7, 1.4), 10.0),
}


@dataclass(frozen=True)
class Settings:
    """A population of simulated recordings. See the fields' comments; the defaults are the study's
    population."""

    population: int = 1  # 1: the training population; 2: the out-of-distribution one
    prevalence: str = "code"  # "code": as in CODE; "balanced": diagnoses ten times as frequent (demonstration only)
    seed: int = 0
    noise: float = 1.0  # factor on the amplitude of all noise, drift and pops; 0 gives the clean signal
    teacher: float = 1.6  # standard deviation, in logits, of the nonlinear morphology term
    tail: float = 1.6  # standard deviation, in logits, of the morphology modes' offsets
    mode_size: float = 1.0  # size of the modes' changes of the waveform; 0 makes the tail's offsets unlearnable
    label_noise: float = 1.0  # factor on the probit widths (12 ms, 8 ms, 3/min, ...)
