"""Lead names, order and derivation."""

import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecg_jax.records.leads import INDEPENDENT, LEADS, arrange, canonical, expand_matrix
from ecg_jax.records.record import Refused


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("AVR", "aVR"),
        ("avf", "aVF"),
        (" v1 ", "V1"),
        ("DI", "I"),
        ("diii", "III"),
        ("II", "II"),
        ("V 2", "V2"),
        ("ECG I", "I"),
        ("ECG V6", "V6"),
        ("ecg_AVL", "aVL"),
        ("Lead II", "II"),
        ("MDC_ECG_LEAD_AVF", "aVF"),
    ],
)
def test_spellings(name, lead):
    assert canonical(name) == lead


@pytest.mark.parametrize(
    "name", ["MLII", "", "V7", "DV1", "vx", "I I I I", "-aVR", "PLETH", "ECG", "ECG 1", "lead", "ECGECG I"]
)
def test_other_names_are_no_leads(name):
    assert canonical(name) is None


@given(st.text())
def test_canonical_takes_any_text(name):
    assert canonical(name) in (None, *LEADS)


@given(st.permutations(LEADS), st.lists(st.text(), max_size=3), st.integers(0, 2**32))
def test_order_is_by_name(order, others, seed):
    """Whatever the order on disk, the case and the extra channels, a lead lands in its place."""
    rng = np.random.default_rng(seed)
    others = [name for name in others if canonical(name) is None]
    names = [name.upper() if rng.random() < 0.5 else name.lower() for name in order] + others
    signal = rng.standard_normal((5, len(names))).astype(np.float32)
    out, derived, missing = arrange(signal, names)
    assert derived == set() == missing and out.dtype == np.float32 and out.shape == (5, 12)
    for i, lead in enumerate(LEADS):
        np.testing.assert_array_equal(out[:, i], signal[:, list(order).index(lead)])


def test_limb_leads_follow_from_two():
    signal = np.random.default_rng(0).standard_normal((50, 8))
    out, derived, missing = arrange(signal, INDEPENDENT)
    assert derived == {"III", "aVR", "aVL", "aVF"} and missing == set()
    one, two = signal[:, 0], signal[:, 1]
    expected = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    np.testing.assert_allclose(out[:, 2:6], expected, atol=1e-6)
    np.testing.assert_allclose(signal @ expand_matrix(), out, atol=1e-6)


def test_a_stored_lead_is_not_derived():
    """A lead on disk is taken as it is, even where it contradicts I and II."""
    names = ["I", "II", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    signal = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    out, derived, _ = arrange(signal, names)
    assert derived == {"III", "aVR", "aVL"}
    np.testing.assert_array_equal(out[:, 5], signal[:, 2])


@pytest.mark.parametrize("pair", list(combinations(LEADS[:6], 2)))
def test_any_two_limb_leads_give_the_others(pair):
    truth = np.random.default_rng(1).standard_normal((20, 8)) @ expand_matrix()
    out, derived, missing = arrange(truth[:, [LEADS.index(lead) for lead in pair]], pair)
    assert derived == set(LEADS[:6]) - set(pair) and missing == set(LEADS[6:])
    np.testing.assert_allclose(out[:, :6], truth[:, :6], atol=1e-5)
    assert np.isnan(out[:, 6:]).all()


@given(st.sets(st.sampled_from(LEADS), min_size=1), st.booleans())
def test_every_lead_is_stored_derived_or_missing(there, derive):
    names = sorted(there)
    signal = np.arange(3.0 * len(names)).reshape(3, -1)
    out, derived, missing = arrange(signal, names, derive)
    limb = there & set(LEADS[:6])
    assert derived == (set(LEADS[:6]) - limb if derive and len(limb) >= 2 else set())
    assert missing == set(LEADS) - there - derived
    for i, lead in enumerate(LEADS):
        if lead in there:
            np.testing.assert_array_equal(out[:, i], signal[:, names.index(lead)])
        assert np.isnan(out[:, i]).all() == (lead in missing)


def test_a_missing_sample_is_missing_in_what_follows_from_it():
    signal = np.ones((4, 8))
    signal[2, 0] = np.nan
    out, _, _ = arrange(signal, INDEPENDENT)
    assert np.isnan(out[2]).tolist() == [True, False, True, True, True, True] + [False] * 6
    assert np.isfinite(np.delete(out, 2, axis=0)).all()


def test_the_signal_handed_in_is_neither_changed_nor_shared():
    signal = np.ones((4, 12), np.float32)
    out, _, _ = arrange(signal, LEADS)
    out[:] = 7
    assert (signal == 1).all()


def test_none_doubled_and_badly_shaped_leads_are_refused():
    with pytest.raises(Refused) as refusal:
        arrange(np.zeros((5, 2)), ["PLETH", "MLII"])
    assert refusal.value.reason == "missing-lead" and "PLETH MLII" in refusal.value.detail
    with pytest.raises(Refused) as refusal:
        arrange(np.zeros((5, 13)), [*LEADS, "v4"])
    assert refusal.value.reason == "duplicate-lead" and "V4" in refusal.value.detail
    with pytest.raises(Refused, match="bad-shape"):
        arrange(np.zeros((5, 11)), LEADS)
    with pytest.raises(Refused, match="bad-shape"):
        arrange(np.zeros(5), ["I"])


def test_refusals_pickle_and_stay_on_one_line():
    refusal = pickle.loads(pickle.dumps(Refused("some-reason", "two\nlines")))
    assert (refusal.reason, refusal.detail) == ("some-reason", "two lines")
    assert str(refusal) == "some-reason: two lines"
