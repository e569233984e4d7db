"""Slots, tokens, blanks and overlaps on the device against the NumPy rules for one record."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.errors import UsageError
from ecg_jax.models import beats
from ecg_jax.records import windows as rules

PLACES, LENGTH = rules.MAX_PEAKS, 1000
RECORDS = 4  # of a batch: one compiled shape for all examples


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _slots(peaks, valid, number, mode, length=None, first=None):
    return beats.slots(peaks, valid, number, mode=mode, crop=None if length is None else (first, length))


_tokens = jax.jit(beats.tokens)
_blank = jax.jit(beats.blank)


def _padded(peaks):
    return np.concatenate([peaks, np.full(PLACES - len(peaks), -1)]).astype(np.int16)


@st.composite
def _record(draw):
    """(peaks, (start, length)): any rhythm, ectopy and pauses included, anywhere in a span of any length."""
    start = draw(st.integers(0, 400))
    length = draw(st.integers(1, LENGTH - start))
    rr = draw(st.lists(st.integers(20, draw(st.sampled_from([25, 45, 110, 300]))), max_size=PLACES - 1))
    at = start + draw(st.integers(0, min(150, length - 1))) + np.cumsum([0, *rr])
    keep = at[at < start + length]
    return (keep if draw(st.integers(0, 9)) else keep[:0]), (start, length)


_batches = st.lists(_record(), min_size=RECORDS, max_size=RECORDS)
_SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def _stack(records):
    return (
        jnp.asarray([_padded(peaks) for peaks, _ in records]),
        jnp.asarray([span for _, span in records], jnp.int32),
    )


@pytest.mark.parametrize("mode", rules.MODES)
@_SETTINGS
@given(records=_batches, seed=st.integers(0, 9))
def test_tokens_are_those_of_one_record_at_a_time(mode, records, seed):
    x = np.random.default_rng(seed).normal(size=(RECORDS, LENGTH, 12)).astype(np.float32)
    found = _slots(*_stack(records), rules.SLOTS, mode)
    tokens = np.asarray(_tokens(x, found))
    for b, (peaks, (start, length)) in enumerate(records):
        span = (start, start + length)
        wanted, lead, time, n = rules.tokens(x[b], peaks, span, mode)
        there = lead > 0
        assert found.n[b] == n and np.array_equal(found.there[b], there)
        assert np.array_equal(tokens[b], wanted)
        assert np.array_equal(np.where(there, found.lead[b] + 1, 0), lead)
        assert np.array_equal(np.where(there, found.time[b] + 1, 0), time)
        assert np.array_equal(found.code[b], np.where(there, np.arange(rules.SLOTS), 0))
        first, last, _ = (a[rules.kept(len(peaks), mode)] for a in rules.windows(peaks, span))
        inner = (first >= start + rules.EDGE) & (last <= start + length - rules.EDGE)
        beat = np.asarray(found.beat[b])[there]
        assert np.array_equal(np.asarray(found.inner[b])[there], inner[beat])
        assert np.array_equal(np.asarray(found.peak[b])[there], peaks[rules.kept(len(peaks), mode)][beat])
        assert np.array_equal(np.asarray(found.start[b])[there], first[beat])
        assert np.array_equal(np.asarray(found.end[b])[there], last[beat])
        assert not np.asarray(found.inner[b])[~there].any()


@pytest.mark.parametrize("mode", rules.MODES)
@_SETTINGS
@given(
    records=_batches,
    firsts=st.lists(st.integers(0, 500), min_size=RECORDS, max_size=RECORDS),
)
def test_a_crop_keeps_a_run_of_whole_windows_and_their_codes(mode, records, firsts):
    peaks, valid = _stack(records)
    whole = _slots(peaks, valid, rules.SLOTS, mode)
    cut = _slots(peaks, valid, 96, mode, 500, jnp.asarray(firsts))
    for b, first in enumerate(firsts):
        there = np.asarray(cut.there[b])
        n = int(cut.n[b])
        assert np.array_equal(there, np.arange(96) < there.sum())  # compact
        lead, beat, code = (np.asarray(getattr(cut, name)[b])[there] for name in ("lead", "beat", "code"))
        assert np.array_equal(lead * n + beat, np.arange(len(lead)))
        assert mode == "heartlang" or len(lead) == 12 * n <= 96
        for name in (
            "lead",
            "time",
            "peak",
            "start",
            "end",
            "offset",
            "inner",
            "there",
        ):  # `code` points at the same window
            assert np.array_equal(
                np.asarray(getattr(cut, name)[b])[there], np.asarray(getattr(whole, name)[b])[code]
            ), name
        start, end = np.asarray(cut.start[b])[there], np.asarray(cut.end[b])[there]
        assert np.all((start >= first) & (end <= first + 500))
        # No run of neighbours inside the crop is longer, but for the cap on beats.
        own = np.asarray(whole.there[b]) & (np.asarray(whole.lead[b]) == 0)
        inside = [
            first <= s and e <= first + 500
            for s, e in zip(np.asarray(whole.start[b])[own], np.asarray(whole.end[b])[own], strict=True)
        ]
        ordered = np.all(np.diff(np.asarray(whole.start[b])[own]) >= 0) & np.all(
            np.diff(np.asarray(whole.end[b])[own]) >= 0
        )
        if ordered:
            assert n == (min(sum(inside), 8) if mode == "robust" else sum(inside))


def test_the_middle_beats_stay_where_there_is_no_room():
    at = np.arange(60, 940, 40)  # 22 beats, 0 dropped at the front, 1 at the end
    found = _slots(*_stack([(at, (0, 1000))] * RECORDS), 252, "robust")
    assert found.n[0] == 21 and found.time[0, 0] == 0 and found.there.all()
    few = _slots(*_stack([(at, (0, 1000))] * RECORDS), 60, "robust")
    assert few.n[0] == 5 and few.code[0, :5].tolist() == [8, 9, 10, 11, 12] and few.code[0, 5] == 21 + 8
    cut = _slots(*_stack([(at, (0, 1000))] * RECORDS), 60, "heartlang")
    assert cut.n[0] == 22 and cut.lead[0, -1] == 2 and cut.there.all()


def test_the_crops_signal_gives_the_tokens_of_the_stored_one():
    x = np.random.default_rng(0).normal(size=(RECORDS, LENGTH, 12)).astype(np.float32)
    records = [(np.arange(70, 990, 85), (0, 1000)), (np.arange(333, 800, 40), (300, 555)), ([], (0, 9)), ([5], (0, 9))]
    first = jnp.asarray([40, 300, 0, 0])
    found = _slots(*_stack(records), 96, "robust", 500, first)
    cropped = np.stack([one[at : at + 500] for one, at in zip(x, first, strict=True)])
    assert np.array_equal(_tokens(cropped, found, first), _tokens(x, found))
    assert found.n.tolist()[2:] == [0, 1] and found.there.sum() == 12 * found.n.sum()
    hidden = jnp.asarray(np.random.default_rng(1).random((RECORDS, 96)) < 0.5)
    value = jnp.arange(12.0) + 100
    whole = np.asarray(_blank(x, found, hidden, value))
    assert np.array_equal(
        _blank(cropped, found, hidden, value, first),
        np.stack([one[at : at + 500] for one, at in zip(whole, first, strict=True)]),
    )


@pytest.mark.parametrize("mode", rules.MODES)
@_SETTINGS
@given(records=_batches, seed=st.integers(0, 9))
def test_blank_hides_windows_and_nothing_else(mode, records, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(RECORDS, LENGTH, 12)).astype(np.float32)
    found = _slots(*_stack(records), rules.SLOTS, mode)
    hidden = rng.random((RECORDS, rules.SLOTS)) < 0.3
    value = jnp.arange(12.0) + 100
    wanted = x.copy()
    for b, s in np.argwhere(hidden & np.asarray(found.there)):
        wanted[b, found.start[b, s] : found.end[b, s], found.lead[b, s]] = value[found.lead[b, s]]
    assert np.array_equal(_blank(x, found, jnp.asarray(hidden), value), wanted)


def test_blank_teaches_its_values():
    records = [(np.arange(70, 990, 85), (0, 1000))] * RECORDS
    found = _slots(*_stack(records), 132, "robust")
    hidden = jnp.zeros((RECORDS, 132), bool).at[:, [13, 14]].set(True)  # lead II, beats 2 and 3

    def total(x, value):
        return _blank(x, found, hidden, value).sum()

    x = jnp.ones((RECORDS, LENGTH, 12))
    to_x, to_value = jax.grad(total, argnums=(0, 1))(x, jnp.zeros(12))
    assert to_value.tolist() == [0, 2 * 85 * RECORDS] + [0] * 10
    assert float(to_x.sum()) == x.size - 2 * 85 * RECORDS


def test_overlap_shares_sum_to_one():
    start, end = jnp.asarray([[0, 10, 30, 5, 60]]), jnp.asarray([[16, 40, 30, 200, 90]])
    share = np.asarray(beats.overlap(start, end, 4, 16))[0]
    assert np.allclose(share[0], [1, 0, 0, 0]) and np.allclose(share[1], np.array([6, 16, 8, 0]) / 30)
    assert np.all(share[2] == 0) and np.allclose(share[3], np.array([11, 16, 16, 16]) / 59)
    assert np.allclose(share[4], [0, 0, 0, 1])


def test_unknown_choices_are_refused():
    peaks, valid = _stack([([100], (0, 1000))] * RECORDS)
    with pytest.raises(UsageError, match="did you mean 'robust'"):
        beats.slots(peaks, valid, 252, mode="robus")
    with pytest.raises(UsageError, match="1 to 256"):
        beats.slots(peaks, valid, 257, mode="robust")
