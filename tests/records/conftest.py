"""A small ECG generator for tests: Gaussian waves on twelve leads that obey Einthoven; and XML files read back."""

import numpy as np
import pytest

from ecg_jax.records.leads import expand_matrix
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.xml import read_xml
from ecg_jax.records.record import Record, Refused


def make_signal(seconds: float = 10.0, rate: float = 500.0, bpm: float = 72.0, seed: int = 0) -> np.ndarray:
    """float32 [T, 12] in mV: QRS of 1 mV or so and T waves, irregular by a few per cent, over slow drift."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    beats, at = [], 0.4
    while at < seconds:
        beats.append(at)
        at += 60 / bpm * (1 + 0.03 * rng.standard_normal())
    gains = rng.uniform(0.5, 1.5, (2, 8)) * rng.choice([-1.0, 1.0], (2, 8))
    signal = np.zeros((len(t), 8))
    for beat in beats:
        qrs = np.exp(-(((t - beat) / 0.012) ** 2)) - 0.3 * np.exp(-(((t - beat - 0.03) / 0.012) ** 2))
        wave = 0.25 * np.exp(-(((t - beat - 0.28) / 0.05) ** 2))
        signal += qrs[:, None] * gains[0] + wave[:, None] * gains[1]
    phase = rng.uniform(0, 6, 8)
    signal += 0.1 * np.sin(2 * np.pi * rng.uniform(0.1, 0.4, 8) * t[:, None] + phase)
    return (signal @ expand_matrix().astype(float)).astype(np.float32)


def make_record(signal: np.ndarray, rate: float = 500.0, record_id: str = "r", **more) -> Record:
    return Record(signal, rate, record_id, more.pop("group", record_id), **more)


@pytest.fixture(scope="session")
def ecg():
    """The generator: ecg(seconds, rate, bpm, seed) -> float32 [T, 12]."""
    return make_signal


@pytest.fixture(scope="session")
def record():
    """record(signal, rate, id, ...) -> Record."""
    return make_record


@pytest.fixture(scope="module")
def steps(ecg) -> np.ndarray:
    """int [1000, 12]: 2 s at 500 Hz, one step 5 uV, limb leads to within rounding as devices store them."""
    return np.rint(ecg(seconds=2.0, rate=500.0) / 0.005).astype(int)


@pytest.fixture
def read(tmp_path):
    """read(text or bytes of an XML file) -> Reading."""

    def write_and_read(document: str | bytes) -> Reading:
        file = tmp_path / "ecg.xml"
        file.write_bytes(document if isinstance(document, bytes) else document.encode())
        return read_xml(file)

    return write_and_read


@pytest.fixture
def refusal(read):
    """refusal(text or bytes of an XML file) -> the reason for which it is refused, by name."""

    def reason(document: str | bytes) -> str:
        with pytest.raises(Refused, match=r"ecg\.xml") as caught:
            read(document)
        return caught.value.reason

    return reason
