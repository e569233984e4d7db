"""Lead names, order and derivation."""

import pickle

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
    ],
)
def test_spellings(name, lead):
    assert canonical(name) == lead


@pytest.mark.parametrize("name", ["MLII", "", "V7", "DV1", "vx", "I I I I", "-aVR", "PLETH"])
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
    out, derived = arrange(signal, names)
    assert derived == set() and out.dtype == np.float32
    for i, lead in enumerate(LEADS):
        np.testing.assert_array_equal(out[:, i], signal[:, list(order).index(lead)])


def test_limb_leads_follow_from_two():
    signal = np.random.default_rng(0).standard_normal((50, 8))
    out, derived = arrange(signal, INDEPENDENT)
    assert derived == {"III", "aVR", "aVL", "aVF"}
    one, two = signal[:, 0], signal[:, 1]
    expected = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    np.testing.assert_allclose(out[:, 2:6], expected, atol=1e-6)
    np.testing.assert_allclose(signal @ expand_matrix(), out, atol=1e-6)


def test_a_stored_lead_is_not_derived():
    """A lead on disk is taken as it is, even where it contradicts I and II."""
    names = ["I", "II", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    signal = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    out, derived = arrange(signal, names)
    assert "aVF" not in derived
    np.testing.assert_array_equal(out[:, 5], signal[:, 2])


def test_missing_and_doubled_leads_are_refused():
    with pytest.raises(Refused) as refusal:
        arrange(np.zeros((5, 11)), [lead for lead in LEADS if lead != "V4"])
    assert refusal.value.reason == "missing-lead" and "V4" in refusal.value.detail
    with pytest.raises(Refused) as refusal:
        arrange(np.zeros((5, 13)), [*LEADS, "v4"])
    assert refusal.value.reason == "duplicate-lead" and "V4" in refusal.value.detail
    with pytest.raises(Refused, match="bad-shape"):
        arrange(np.zeros((5, 11)), LEADS)


def test_refusals_pickle_and_stay_on_one_line():
    refusal = pickle.loads(pickle.dumps(Refused("some-reason", "two\nlines")))
    assert (refusal.reason, refusal.detail) == ("some-reason", "two lines")
    assert str(refusal) == "some-reason: two lines"
