"""Beat windows and sentences against a plain reading of HeartLang's tokenizer, beat by beat and sample by sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.records import beats, windows, xqrs
from ecg_jax.records.windows import SLOTS, WINDOW, beats_id, kept, tokens


def cut(q: list[int], n: int) -> list[tuple[int, int]]:
    """(start, end) of every beat of a record of n samples, by the table."""
    out = []
    for i, peak in enumerate(q):
        if len(q) == 1:
            start = max(peak - 48, 0)
            end = min(start + 96, n)
        else:
            start = max(peak - 48, 0) if i == 0 else (peak + q[i - 1]) // 2
            end = min(peak + 48, n) if i == len(q) - 1 else (peak + q[i + 1]) // 2
        if end - start > 96:
            start = max(peak - 48, 0)
            end = min(start + 96, n)
        out.append((start, end))
    return out


def sentence(x: np.ndarray, q: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HeartLang's, of a record [n, 12] without padding."""
    rows, lead, time = [], [], []
    for channel in range(12):
        for peak, (start, end) in zip(q, cut(q, len(x)), strict=True):
            row = np.zeros(96)
            offset = max(48 - (peak - start), 0)
            for place in range(min(end - start, 96 - offset)):
                row[offset + place] = x[start + place, channel]
            rows.append(row)
            lead.append(channel + 1)
            time.append(peak // 100 + 1)
    room = max(0, 256 - len(rows))
    rows += [np.zeros(96)] * room
    return np.array(rows[:256]), np.array((lead + [0] * room)[:256]), np.array((time + [0] * room)[:256])


def some_peaks(seed: int, n: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(n, count, replace=False))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 1500), st.integers(0, 40))
def test_heartlangs_sentence(seed, n, count):
    q = some_peaks(seed, n, min(n, count))
    x = np.random.default_rng(seed).standard_normal((n, 12))
    found, lead, time, beats_ = tokens(x, q, (0, n), "heartlang")
    expected = sentence(x, q.tolist())
    assert found.dtype == np.float32 and lead.dtype == time.dtype == np.int32 and beats_ == len(q)
    np.testing.assert_array_equal(found, expected[0].astype(np.float32))
    np.testing.assert_array_equal(lead, expected[1])
    np.testing.assert_array_equal(time, expected[2])
    start, end, offset = windows.windows(q, (0, n))
    assert list(zip(start.tolist(), end.tolist(), strict=True)) == cut(q.tolist(), n)
    assert ((offset == 0) | (offset == 48 - (q - start))).all() and (offset >= 0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 700), st.integers(0, 300), st.integers(0, 30))
def test_the_limits_are_those_of_the_span(seed, n, first, count):
    """A padded record has the windows of the record without its padding, further on; the time is the stored place's."""
    q = some_peaks(seed, n, min(n, count))
    x = np.random.default_rng(seed).standard_normal((n, 12))
    wide = np.full((first + n + 50, 12), 1e9)
    wide[first : first + n] = x
    for mode in windows.MODES:
        bare, lead, _, beats_ = tokens(x, q, (0, n), mode)
        found, lead_, time, _ = tokens(wide, q + first, (first, first + n), mode)
        np.testing.assert_array_equal(found, bare)
        np.testing.assert_array_equal(lead_, lead)
        if beats_:
            there = (q + first)[kept(len(q), mode)] // 100 + 1
            np.testing.assert_array_equal(time[lead == 1], there[: min(beats_, SLOTS)])
    start, end, _ = windows.windows(q + first, (first, first + n))
    assert not len(q) or (start.min() >= first and end.max() <= first + n and (end - start).max() <= WINDOW)


def test_the_peak_stands_at_48_unless_the_beat_before_is_far():
    q = np.array([60, 160, 220, 300, 420, 900])
    x = np.zeros((1000, 12))
    x[q] = 1 + np.arange(6)[:, None]
    found = tokens(x, q, (0, 1000), "heartlang")[0]
    assert [int(row.argmax()) for row in found[:6]] == [48, 50, 48, 48, 48, 48]
    start, end, offset = windows.windows(q, (0, 1000))
    assert start.tolist() == [12, 110, 190, 252, 372, 852] and end.tolist() == [108, 190, 260, 348, 468, 948]
    assert offset.tolist() == [0, 0, 18, 0, 0, 0]


@pytest.mark.parametrize(
    ("n", "first", "most"), [(0, 0, 0), (1, 0, 1), (21, 0, 21), (22, 0, 21), (23, 1, 21), (30, 4, 21)]
)
def test_tachycardia_loses_the_outer_beats_in_all_leads(n, first, most):
    assert range(n)[kept(n, "robust")] == range(first, first + most)
    assert range(n)[kept(n, "heartlang")] == range(n)
    q = 20 + np.arange(n) * 30
    x = np.random.default_rng(0).standard_normal((1000, 12)) + 10
    found, lead, time, beats_ = tokens(x, q, (0, 1000), "robust")
    assert beats_ == most and [(lead == k).sum() for k in range(1, 13)] == [most] * 12
    assert (found[: 12 * most].any(axis=1)).all() and not found[12 * most :].any() and not time[12 * most :].any()
    np.testing.assert_array_equal(time[:most], q[first : first + most] // 100 + 1)
    if n > 22:  # a neighbour that is left out bounds the window all the same: it begins half way to it
        assert not found[0, :33].any() and found[0, 33:63].all() and not found[0, 63:].any()
    lost = tokens(x, q, (0, 1000), "heartlang")[1]
    assert (lost > 0).sum() == min(12 * n, SLOTS)


def test_the_id_tells_modes_and_detectors_apart(monkeypatch):
    ids = {beats_id(mode) for mode in windows.MODES}
    assert len(ids) == 2 and all(len(one) == 8 and int(one, 16) >= 0 for one in ids)
    assert windows.detector("robust") == beats.DETECTOR and windows.detector("heartlang") == xqrs.DETECTOR
    monkeypatch.setattr(beats, "DETECTOR", "robust-0")
    assert beats_id("robust") not in ids and beats_id("heartlang") in ids
    for name in ("WINDOW", "MOST", "EDGE"):
        with monkeypatch.context() as patch:
            patch.setattr(windows, name, 7)
            assert beats_id("heartlang") not in ids


def test_room():
    assert 12 * windows.MOST <= SLOTS < windows.NO_CODE and windows.HALF * 2 == WINDOW
