"""Faults of raw signals and of the limb leads' equations, planted here, and the real recordings without them."""

import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records.audit import Quality, extremes, inspect_raw, judge, names, observed
from ecg_jax.records.leads import LEADS
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record, Refused

RATES = st.sampled_from([100.0, 250.0, 257.0, 400.0, 500.0, 1000.0])


def noise(rate: float, seconds: float = 5.0, seed: int = 0) -> np.ndarray:
    """float32 [T, 12] in steps of 5 uV, so that neighbours are often equal."""
    t = np.arange(round(rate * seconds)) / rate
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * t[:, None] * rng.uniform(1, 3, 12)) + 0.02 * rng.standard_normal((len(t), 12))
    return (np.rint(wave * 200) / 200).astype(np.float32)


def bits(signal: np.ndarray, rate: float) -> list[tuple[str, int, int, int]]:
    return [(names(e.bit)[0], e.lead, e.start, e.stop) for e in inspect_raw(signal, rate).events]


@given(RATES, st.integers(0, 11), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_rail_is_found_wherever_it_is(rate, lead, place, more):
    x = noise(rate)
    need = max(4, int(np.ceil(0.03 * rate)))
    start = round(place * (len(x) - need - more))
    x[start : start + need + more, lead] = 2.5
    assert ("rail", lead, start, start + need + more) in bits(x, rate)
    x[start : start + need + more, lead] = 2.5 + 0.005 * np.arange(need + more)
    assert not [e for e in bits(x, rate) if e[0] == "rail"]


@given(RATES, st.integers(0, 11), st.floats(0, 1), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_flat_second_is_found_wherever_it_is(rate, lead, place, more):
    x = noise(rate)
    size = int(rate) + 1 + more
    start = 1 + round(place * (len(x) - size - 2))
    x[start - 1 : start + size + 1, lead] += [[0.5], *[[0.0]] * size, [0.5]][0]
    x[start : start + size, lead] = 0.2
    x[[start - 1, start + size], lead] = 0.6
    assert bits(x, rate) == [("flat", lead, start, start + size)]
    x[start + size // 2, lead] = 0.3
    assert bits(x, rate) == []


@given(RATES, st.integers(0, 11), st.floats(0, 1), st.sampled_from([-9.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_a_spike_is_found_wherever_it_is(rate, lead, place, height):
    x = noise(rate)
    at = 1 + round(place * (len(x) - 3))
    x[at, lead] += height
    before = x.copy()
    raw = inspect_raw(x, rate)
    assert [(e.bit, e.lead, e.start, e.stop) for e in raw.events] == [(Quality.SPIKE_REPAIRED, lead, at, at + 1)]
    np.testing.assert_array_equal(x, before)  # repaired in a copy
    assert abs(raw.signal[at, lead] - (x[at - 1, lead] + x[at + 1, lead]) / 2) < 1e-6
    np.testing.assert_array_equal(raw.high, raw.signal.max(axis=0))
    np.testing.assert_array_equal(raw.low, raw.signal.min(axis=0))


def test_missing_samples():
    x = noise(500.0)
    x[10:20, 3], x[-5:, 3], x[:, 7], x[40, 0] = np.nan, np.inf, np.nan, -np.inf
    raw = inspect_raw(x, 500.0)
    found = {(names(e.bit)[0], e.lead, e.start, e.stop) for e in raw.events}
    gone = {("nan_repaired", 3, 10, 20), ("nan_repaired", 3, 2495, 2500), ("nan_repaired", 0, 40, 41)}
    assert found == gone | {("nan_repaired", 7, 0, 2500), ("dead_lead", 7, 0, 2500)}
    np.testing.assert_array_equal(raw.missing, ~np.isfinite(x))
    assert np.isfinite(raw.signal).all() and not raw.signal[:, 7].any()
    assert (raw.signal[-5:, 3] == x[-6, 3]).all()


def test_clean_is_clean():
    x = noise(400.0)
    raw = inspect_raw(x, 400.0)
    assert not raw.events and raw.missing is None and raw.signal is x


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_extremes(length):
    x = np.random.default_rng(0).standard_normal((length, 12)).astype(np.float32)
    low, high = extremes(x)
    np.testing.assert_array_equal(low, x.min(axis=0))
    np.testing.assert_array_equal(high, x.max(axis=0))


@given(st.integers(0, 700), st.integers(0, 700), st.sampled_from([0.0, np.nan, -0.0]), st.sampled_from([1, 400, 1500]))
@settings(max_examples=60, deadline=None)
def test_padding_of_any_length(before, after, value, n):
    x = np.full((before + n + after, 12), value, np.float32)
    x[before, 11] = x[before + n - 1, 0] = 1e-3
    assert observed(x) == (before, before + n)
    x[:] = value
    with pytest.raises(Refused) as refusal:
        observed(x)
    assert refusal.value.reason == ("all-nan" if np.isnan(value) else "all-zero")


# ------------------------------------------------------------------------------------------------- limb leads


def swap(y: np.ndarray, *order: int) -> None:
    y[sorted(order)] = y[list(order)]


FAULTS = {
    "aVL and aVF swapped": lambda y: swap(y, 5, 4),
    "aVR, aVF, aVL (MIMIC) not undone": lambda y: swap(y, 3, 5, 4),
    "aVL first": lambda y: swap(y, 4, 3, 5),
    "aVR upside down": lambda y: np.negative(y[3], out=y[3]),
    "III upside down": lambda y: np.negative(y[2], out=y[2]),
} | {f"{LEADS[i]} doubled": lambda y, i=i: np.multiply(y[i], 2, out=y[i]) for i in range(6)}


def limb_bits(y: np.ndarray, ignore=()) -> list[str]:
    ((found,), _) = judge(np.ascontiguousarray(y, np.float32)[None], [True], [ignore])
    return [name for name in names(found) if name in ("einthoven", "limb_samples")]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_limb_lead_is_seen(ecg, fault):
    for seed in range(8):
        y = ecg(10, 100, seed=seed).T.copy()
        assert limb_bits(y) == []
        FAULTS[fault](y)
        assert limb_bits(y) == ["einthoven"], seed


def test_isolated_samples_are_no_wrong_lead(ecg):
    y = ecg(10, 100).T.copy()
    y[2, 300:310] += 3.0
    assert limb_bits(y) == ["limb_samples"]
    y[2, 310] += 3.0  # more than 1 %
    assert limb_bits(y) == ["einthoven"]
    assert limb_bits(y, [(300, 311)]) == [] and limb_bits(y, [(-5, 302), (303, 2000)]) == ["limb_samples"]


def test_small_numbers_do_not_count(ecg):
    """Rounding to 5 uV, and a lead that was rounded on its own, leave the equations alone."""
    y = ecg(10, 100).T * 0.2
    assert limb_bits(np.rint(y * 200) / 200 + np.random.default_rng(0).uniform(-0.005, 0.005, y.shape)) == []


def test_a_repair_is_no_contradiction(ecg, record):
    signal = ecg(10).copy()
    signal[1000:1100, 1] = np.nan
    signal[3000, 4] += 30
    ((window,),) = prepare_many([record(signal)])
    assert names(window.quality) == ["nan_repaired", "spike_repaired"]


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory) -> dict[str, list[np.ndarray]]:
    """Filtered windows [12, n] in mV of three public sources."""
    out = {}
    for name, archive in (("code15_samitrop", "records"), ("georgia", "records"), ("ptbxl", "records500")):
        folder = tmp_path_factory.mktemp(name)
        with tarfile.open(shared_data / name / f"{archive}.tar.xz") as packed:
            packed.extractall(folder, filter="data")
        readings = [read_wfdb(path.with_suffix("")) for path in sorted(folder.rglob("*.hea"))]
        done = prepare_many([Record(r.signal, r.rate, str(i), str(i)) for i, r in enumerate(readings)])
        out[name] = [p for windows in done for p in windows]
    return out


def test_real_limb_leads_agree(real):
    for name, windows in real.items():
        assert len(windows) > 20
        assert not [w.record_id for w in windows if w.quality & Quality.EINTHOVEN], name
        assert sum(bool(w.quality & Quality.LIMB_SAMPLES) for w in windows) <= 0.03 * len(windows), name
        assert 0.7 < np.median([w.meta["amplitude"] for w in windows]) < 2.1, name


def test_faults_in_real_limb_leads_are_seen(real):
    windows = [w for some in real.values() for w in some][::4]
    for fault, spoil in FAULTS.items():
        seen = 0
        for w in windows:
            y = w.signal[w.valid[0] : sum(w.valid)].T / 1000
            spoil(y)
            seen += limb_bits(y) == ["einthoven"]
        assert seen >= 0.97 * len(windows), fault
