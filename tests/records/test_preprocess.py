"""Raw records to stored windows."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy import signal as dsp

from ecg_jax.records.audit import Quality, names
from ecg_jax.records.preprocess import CHAINS, prepare_many
from ecg_jax.records.record import Prepared, Refused
from ecg_jax.records.resample import ratio


def one(record, **options) -> Prepared:
    (windows,) = prepare_many([record], **options)
    assert not isinstance(windows, Refused), windows
    (window,) = windows
    return window


def reason(record) -> str:
    (refusal,) = prepare_many([record])
    assert isinstance(refusal, Refused)
    return refusal.reason


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True) if isinstance(x, np.ndarray | float) else x == y
        for x, y in (
            (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Prepared) if f.name != "labels"
        )
    )


def test_ten_seconds(ecg, record):
    labels = {"task": np.array([1, 0, -1], np.int8)}
    source = record(
        ecg(10),
        record_id="a",
        group="p",
        patient_id="p",
        labels=labels,
        age=40.0,
        time="2020",
        meta={"bayes": [0.5]},
    )
    out = one(source)
    assert out.signal.shape == (1000, 12) and out.signal.dtype == np.int16 and out.valid == (0, 1000)
    assert (out.record_id, out.group, out.patient_id, out.age) == ("a", "p", "p", 40.0)
    assert out.quality == 0 and len(out.signature) == 16 and out.rpeaks.dtype == np.int16
    assert out.labels["task"].tolist() == [1, 0, -1] and out.labels["task"].dtype == np.int8
    assert out.meta["bayes"] == [0.5] and out.meta["rate"] == 500 and out.meta["length"] == 5000
    assert out.meta["time"] == "2020" and out.meta["leads"][3] == "aVR" and out.meta["derived"] == []
    assert 10 <= len(out.rpeaks) <= 13


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from([100.0, 257.0, 400.0, 500.0]),
            st.sampled_from([7.3, 10.0, 10.24, 21.0]),
            st.integers(0, 9),
        ),
        min_size=1, max_size=9,
    ),
    spoil=st.integers(0, 8),
)  # fmt: skip
def test_a_record_does_not_depend_on_its_batch(ecg, record, kinds, spoil):
    """Bit for bit the same alone, in company, and in any order."""
    records = []
    for i, (rate, seconds, seed) in enumerate(kinds):
        signal = ecg(seconds, rate, seed=seed).copy()
        if i == spoil:
            signal[100:150, 3] = np.nan
            signal[60, 7] += 30
            signal[:40] = 0
        records.append(record(signal, rate, f"r{i}"))
    together = prepare_many(records)
    backwards = prepare_many(records[::-1])[::-1]
    for source, a, b in zip(records, together, backwards, strict=True):
        (alone,) = prepare_many([source])
        assert len(alone) == len(a) == len(b)
        for x, y, z in zip(alone, a, b, strict=True):
            assert equal(x, y) and equal(x, z)


@pytest.mark.parametrize("rate", [100.0, 128.0, 250.0, 257.0, 360.0, 400.0, 500.0, 1000.0])
def test_resampling_keeps_time_and_size(record, rate):
    """An 8 Hz wave comes out with its amplitude and its phase, whatever the rate."""
    t = np.arange(round(10 * rate)) / rate
    wave = np.repeat(np.sin(2 * np.pi * 8 * t + 0.5)[:, None], 12, axis=1).astype(np.float32)
    out = one(record(wave, rate), chain=CHAINS["none"])
    expected = np.sin(2 * np.pi * 8 * np.arange(out.valid[1]) / 100 + 0.5)
    assert abs(out.valid[1] - 1000) <= 1
    inner = slice(out.valid[0] + 20, out.valid[0] + out.valid[1] - 20)
    error = out.signal[inner, 0] / 1000 - expected[20 : out.valid[1] - 20]
    assert np.abs(error).max() < 0.01


@pytest.mark.parametrize("rate", [100, 257, 400, 499.8, 62.4725 * 4, 999.56])
def test_ratio(rate):
    up, down = ratio(rate)
    assert abs(up / down * rate / 100 - 1) < 1e-5


@pytest.mark.parametrize(("hertz", "kept"), [(0.05, 0.0), (5.0, 1.0), (20.0, 1.0), (60.0, 0.0), (90.0, 0.0)])
def test_the_band(record, hertz, kept):
    t = np.arange(5000) / 500
    wave = np.repeat(np.sin(2 * np.pi * hertz * t + 1)[:, None], 12, axis=1).astype(np.float32)
    out = one(record(wave)).signal[200:800, 0] / 1000
    assert np.sqrt(2 * np.mean(out**2)) == pytest.approx(kept, abs=0.02)


def test_the_filter_is_the_documented_one(ecg, record):
    """At 100 Hz: order 1 at 0.67 Hz and order 5 at 40 Hz, forwards and backwards, odd extension, then
    rounding.
    """
    signal = ecg(10, 100)
    sections = np.concatenate(
        [
            dsp.butter(1, 0.67, "highpass", fs=100, output="sos"),
            dsp.butter(5, 40, "lowpass", fs=100, output="sos"),
        ]
    )
    expected = dsp.sosfiltfilt(sections, signal.astype(float), axis=0, padtype="odd", padlen=300)
    stored = one(record(signal, 100)).signal
    assert np.abs(stored - expected * 1000).max() < 0.6  # rounded, and then 0.1 uV for another way to add
    assert np.mean(stored != np.rint(expected * 1000)) < 0.002


SCRIPT = """
import hashlib, sys
import numpy as np
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.record import Record
rng = np.random.default_rng(5)
records = [
    Record(np.cumsum(rng.standard_normal((length, 12)), axis=0).astype(np.float32) / 30, rate, str(i), str(i))
    for i, (length, rate) in enumerate([(5000, 500.0), (2934, 400.0), (1000, 100.0), (9000, 257.0), (5000, 499.8)] * 3)
]
digest = hashlib.sha256()
for windows in prepare_many(records):
    for w in windows:
        digest.update(w.signal.tobytes() + w.rpeaks.tobytes() + w.signature + repr((w.quality, w.meta)).encode())
print(digest.hexdigest())
"""


def test_threads_and_processors_change_nothing():
    """The same bytes from one thread, from two, and from the kernels of another processor."""
    settings = (
        {"OPENBLAS_NUM_THREADS": "1"},
        {"OPENBLAS_NUM_THREADS": "2"},
        {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott"},
    )
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=os.environ | more, stdout=subprocess.PIPE, text=True)
        for more in settings
    ]
    found = {process.communicate()[0] for process in started}
    assert len(found) == 1 and len(found.pop()) == 65


def test_chains_differ_and_say_so(ecg, record):
    stored = {name: one(record(ecg(10)), chain=chain).signal for name, chain in CHAINS.items()}
    assert set(stored) == {"default", "heartlang", "none"}
    assert not np.array_equal(stored["default"], stored["heartlang"])
    assert not np.array_equal(stored["default"], stored["none"])
    assert len({chain.digest() for chain in CHAINS.values()}) == 3
    changed = dataclasses.replace(CHAINS["default"], highpass=(1, 0.5))
    assert changed.digest() != CHAINS["default"].digest() and changed.describe()["highpass"] == (1, 0.5)


def test_short_records_are_centred(ecg, record):
    out = one(record(ecg(7.3, 400), 400))
    assert out.valid == (135, 730)
    assert not out.signal[:135].any() and not out.signal[865:].any() and out.signal[135:865].any(axis=0).all()
    assert ((out.rpeaks >= 135) & (out.rpeaks < 865)).all() and len(out.rpeaks)


def test_padding_is_stripped_before_filtering(ecg, record):
    """Zeros around a recording change nothing but the mark that they were there, and where it began."""
    inner = ecg(7.3, 400) + 0.5
    padded = np.zeros((4096, 12), np.float32)
    padded[588 : 588 + len(inner)] = inner
    a, b = one(record(inner, 400)), one(record(padded, 400))
    np.testing.assert_array_equal(a.signal, b.signal)
    assert a.signature == b.signature and not a.quality and names(b.quality) == ["stripped"]
    assert b.meta["start"] == pytest.approx(1.47)


def test_little_more_than_ten_seconds_is_cropped_in_the_middle(ecg, record):
    signal = ecg(12, 100)
    out = one(record(signal, 100, "a"), chain=CHAINS["none"])
    assert out.valid == (0, 1000) and out.record_id == "a" and out.meta["start"] == 1.0
    np.testing.assert_array_equal(out.signal, np.rint(signal[100:1100].astype(float) * 1000))


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [(15, [1000, 500]), (14.9, [1000]), (24.9, [1000, 1000]), (38, [1000] * 3 + [800])],
)
def test_long_records_are_cut(ecg, record, seconds, lengths):
    signal = ecg(seconds, 100)
    (windows,) = prepare_many([record(signal, 100, "a", group="p")], chain=CHAINS["none"])
    assert [w.valid[1] for w in windows] == lengths
    if len(lengths) > 1:
        assert [w.record_id for w in windows] == [f"a#{i}" for i in range(len(lengths))]
        for i, window in enumerate(windows):
            start, n = window.valid
            np.testing.assert_array_equal(
                window.signal[start : start + n],
                np.rint(signal[i * 1000 : i * 1000 + n].astype(float) * 1000),
            )
        (first,) = prepare_many([record(signal, 100, "a")], windows="first")
        assert [w.record_id for w in first] == ["a#0"]
    assert {w.group for w in windows} == {"p"}


def test_a_fault_marks_only_its_window(ecg, record):
    signal = ecg(30, 500).copy()
    signal[6000:6100, 2] = np.nan
    signal[11000, 8] += 40
    (windows,) = prepare_many([record(signal)])
    assert [names(w.quality) for w in windows] == [[], ["nan_repaired"], ["spike_repaired"]]


def test_a_bad_window_is_refused_and_the_others_are_not(ecg, record):
    signal = ecg(30, 100).copy()
    signal[1000:2000, 4] = np.nan
    (windows,) = prepare_many([record(signal, 100, "a")])
    assert [w.record_id for w in (windows[0], windows[2])] == ["a#0", "a#2"]
    assert isinstance(windows[1], Refused) and windows[1].reason == "mostly-missing"
    assert windows[1].detail.startswith("a#1: more than half of the samples are missing in lead aVL (100%)")
    (refusal,) = prepare_many([record(signal[1000:], 100, "a")], windows="first")
    assert isinstance(refusal, Refused) and refusal.reason == "mostly-missing" and "#" not in refusal.detail
    signal[::3, 4] = signal[1::3, 4] = np.nan
    (refusal,) = prepare_many([record(signal, 100, "a")])
    assert isinstance(refusal, Refused) and refusal.reason == "mostly-missing"


def test_a_lead_that_is_not_there_is_not_dead(ecg, record):
    """Stored as zeros and marked so, and by no other mark; without them nothing is left of a constant rest."""
    signal = ecg(10).copy()
    signal[:, 6:] = np.nan
    lacking = record(signal, missing=("V1", "V2", "V3", "V4", "V5", "V6"))
    (refusal,) = prepare_many([lacking])
    assert refusal.reason == "missing-lead"
    out = one(lacking, missing_leads="zero")
    assert names(out.quality) == ["missing_lead"] and not out.signal[:, 6:].any() and out.signal[:, :6].any()
    assert out.meta["amplitude"] == one(record(np.tile(signal[:, :6], 2))).meta["amplitude"]
    signal[:, :6] = 0.5
    (refusal,) = prepare_many([lacking], missing_leads="zero")
    assert refusal.reason == "no-signal"


def test_amplitude(ecg, record):
    """The typical QRS from peak to peak: scales with the gain, and not with an artefact, a dead lead, a pause."""
    signal = ecg(10)
    amplitude = one(record(signal)).meta["amplitude"]
    assert 0.3 < amplitude < 2.5 and round(amplitude, 4) == amplitude
    assert one(record(signal * 4)).meta["amplitude"] == pytest.approx(4 * amplitude, rel=0.01)
    spoilt = signal.copy()
    spoilt[1000:1100] += 5
    assert one(record(spoilt)).meta["amplitude"] == pytest.approx(amplitude, rel=0.1)
    spoilt[:, [6, 8]] = 0
    assert one(record(spoilt)).meta["amplitude"] > 0.3


def test_missing_samples_are_bridged(ecg, record):
    signal = ecg(10, 500).copy()
    whole = one(record(signal))
    signal[2000:2010, 5] = np.inf
    out = one(record(signal))
    assert names(out.quality) == ["nan_repaired"]
    assert np.abs(out.signal.astype(int) - whole.signal).max() < 400


def test_a_spike_is_repaired_and_a_qrs_is_not(ecg, record):
    clean = ecg(10, 500)
    assert one(record(clean * 3)).quality == 0  # 4 mV of QRS within 50 ms stays
    signal = clean.copy()
    signal[2500, 1] += 8
    signal[4000, 6] -= 12
    out, whole = one(record(signal)), one(record(clean))
    assert names(out.quality) == ["spike_repaired"]
    assert np.abs(out.signal.astype(int) - whole.signal).max() < 100


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda x: x.__setitem__((slice(None), 7), 0), {"dead_lead", "flat"}),
        (lambda x: x.__setitem__((slice(1000, 1600), 7), 0.2), {"flat"}),
        (lambda x: np.clip(x * 4, -1.1, 1.1, out=x), {"rail"}),
        (lambda x: np.multiply(x, 12, out=x), {"high"}),
        (lambda x: np.multiply(x, 0.01, out=x), {"low"}),
        (lambda x: x.__setitem__((slice(None), [3, 4, 5]), x[:, [4, 5, 3]]), {"einthoven"}),
    ],
)
def test_quality_bits(ecg, record, spoil, expected):
    noise = 1e-3 * np.random.default_rng(0).standard_normal((5000, 8)) @ np.ones((8, 12))
    signal = (ecg(10, 500, seed=3) * 1.7 + noise).astype(np.float32)
    assert one(record(signal)).quality == 0
    spoil(signal)
    found = set(names(one(record(signal)).quality))
    assert expected <= found, found
    assert found - expected <= {"einthoven"} if "rail" in expected else found == expected


def test_amplitude_means_nothing_without_a_unit(ecg, record):
    signal = ecg(10, 500).copy()
    signal[:, 2] *= 2
    assert names(one(record(signal)).quality) == ["einthoven"]
    assert one(record(signal * 4, unit="z")).quality == 0


def test_saturation_is_marked(ecg, record):
    out = one(record(ecg(10, 500) * 60, unit="z"))
    assert out.quality & Quality.CLIPPED and np.abs(out.signal.astype(int)).max() == 32767


def test_bits_of_the_reader_stay(ecg, record):
    out = one(record(ecg(10), quality=int(Quality.DERIVED), meta={"derived": ["aVR"]}))
    assert names(out.quality) == ["derived"] and out.meta["derived"] == ["aVR"]


@pytest.mark.parametrize(
    ("signal", "rate", "expected"),
    [
        (np.full((5000, 12), np.nan), 500, "all-nan"),
        (np.zeros((5000, 12)), 500, "all-zero"),
        (np.ones((5000, 12)), 500, "no-signal"),
        (np.ones((0, 12)), 500, "too-short"),
        (np.random.default_rng(0).standard_normal((240, 12)), 100, "too-short"),
        (np.random.default_rng(0).standard_normal((1000, 11)), 100, "bad-shape"),
        (np.random.default_rng(0).standard_normal(1000), 100, "bad-shape"),
        (np.random.default_rng(0).standard_normal((1000, 12)), 0, "bad-rate"),
        (np.random.default_rng(0).standard_normal((1000, 12)), 50, "bad-rate"),
        (np.random.default_rng(0).standard_normal((1000, 12)), np.nan, "bad-rate"),
    ],
)
def test_refusals(record, signal, rate, expected):
    assert reason(record(signal.astype(np.float32), rate)) == expected


def test_a_lead_mostly_missing_is_refused(ecg, record):
    signal = ecg(10).copy()
    signal[:2600, 9] = np.nan
    (refusal,) = prepare_many([record(signal)])
    assert refusal.reason == "mostly-missing" and "V4 (52%)" in refusal.detail


def test_a_bad_record_does_not_hurt_its_neighbours(ecg, record):
    good = record(ecg(10))
    results = prepare_many([record(np.full((5000, 12), np.nan, np.float32)), good, record(np.zeros((1, 12)))])
    assert isinstance(results[0], Refused) and isinstance(results[2], Refused)
    assert equal(results[1][0], one(good))
    assert prepare_many([]) == []


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 1600),
    st.sampled_from([80.0, 100.0, 213.7]),
    st.sampled_from([np.nan, np.inf, 0.0, 1e30, -1e30]),
    st.floats(0, 1),
)
@example(0, 1308, 80.0, np.nan, 0.46875)  # of two windows one misses more than half
def test_anything_is_prepared_or_refused(record, seed, length, rate, value, share):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((length, 12)).astype(np.float32)
    signal[rng.random((length, 12)) < share] = value
    (result,) = prepare_many([record(signal, rate)])
    if not isinstance(result, Refused):
        kept = [w for w in result if not isinstance(w, Refused)]
        assert kept and all(w.signal.shape == (1000, 12) and sum(w.valid) <= 1000 for w in kept)
        # A window that cannot be used is named among those of its recording.
        assert all(w.detail.startswith(f"r#{k}: ") for k, w in enumerate(result) if isinstance(w, Refused))
