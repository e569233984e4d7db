"""The simulated diagnoses: prevalence, definitions, the exact Bayes probability, tail, teacher, population
2."""

import dataclasses

import numpy as np
import pytest
from scipy.special import ndtr

from ecg_jax.records import synthetic
from ecg_jax.records.synthetic import labelling, patients, population, rhythm
from ecg_jax.records.synthetic.population import FIBRILLATION, LEFT, RIGHT, SINUS
from ecg_jax.records.synthetic.settings import FALSE, LABELS, MISSED, MODES, NOMINAL, TAIL_FROM

COUNT = 40_000
CODE = [LABELS.index(name) for name in synthetic.CODE_LABELS]
NEW = [LABELS.index(name) for name in synthetic.NEW_LABELS]


def _states(**options):
    settings = synthetic.Settings(**options)
    owner = patients.assign(settings, COUNT)
    return settings, *synthetic.states(settings, np.arange(COUNT), owner)


@pytest.fixture
def quick_calibration(monkeypatch):
    """Calibrates on fewer records, for strengths whose exact prevalence does not matter to the test."""
    labelling.calibrate.cache_clear()
    monkeypatch.setattr(labelling, "REFERENCE", 1 << 14)
    yield
    labelling.calibrate.cache_clear()


@pytest.fixture(scope="module")
def code():
    return _states(seed=3)


@pytest.fixture(scope="module")
def ood():
    return _states(seed=3, population=2)


@pytest.fixture(scope="module")
def balanced():
    return _states(seed=3, prevalence="balanced")


def test_prevalences_are_those_of_code(code, ood):
    np.testing.assert_allclose(code[2].mean(axis=0)[CODE], np.array(NOMINAL)[CODE], rtol=0.12)
    np.testing.assert_allclose(ood[2].mean(axis=0)[NEW], np.array(NOMINAL)[NEW], rtol=0.10)
    assert synthetic.CODE_LABELS == ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")
    assert len(synthetic.OOD_LABELS) == 7 and set(synthetic.OOD_LABELS[:4]) < set(synthetic.CODE_LABELS)


def test_prior_entropy_is_that_of_code(code):
    entropy = labelling.entropy(code[2].mean(axis=0)[CODE]).mean()
    assert 0.088 < entropy < 0.100  # CODE's marginals: 0.0937 nats
    floor = labelling.entropy(code[2][:, CODE]).mean()
    assert 0.010 < floor < 0.5 * entropy


def test_stored_intercepts_are_what_calibration_finds():
    (strengths, stored), *_ = labelling.KNOWN_INTERCEPTS.items()
    default = synthetic.Settings()
    assert strengths == (default.teacher, default.tail, default.label_noise)
    np.testing.assert_allclose(labelling.calibrate(*strengths), stored, atol=2e-5)


def test_labels_follow_their_bayes_probability(balanced):
    settings, state, probability = balanced
    drawn = labelling.draw(settings, state, probability)
    assert drawn.dtype == np.int8 and set(np.unique(drawn)) == {0, 1}
    for column in range(len(LABELS)):
        p, y = probability[:, column], drawn[:, column]
        for low, high in ((0, 0.005), (0.005, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1)):
            rows = (p > low) & (p <= high)
            if rows.sum() > 50:
                sd = np.sqrt((p[rows] * (1 - p[rows])).sum()) / rows.sum()
                assert abs(y[rows].mean() - p[rows].mean()) < 4.5 * sd + 1e-9
    # The expected loss of the exact probabilities is their mean entropy.
    loss = -(drawn * np.log(probability) + (1 - drawn) * np.log1p(-probability))
    np.testing.assert_allclose(loss.mean(), labelling.entropy(probability).mean(), rtol=0.03)
    # Nothing is left to be told between labels once the probabilities are known.
    rest = drawn - probability
    correlation = np.corrcoef(rest.T) - np.eye(len(LABELS))
    assert np.abs(correlation).max() < 5 / np.sqrt(COUNT)


def test_without_teacher_and_tail_the_labels_are_the_probits(quick_calibration):
    settings, state, probability = _states(seed=4, teacher=0.0, tail=0.0)
    shift = np.array(labelling.intercepts(settings))
    assert np.abs(shift).max() < 1e-4  # nothing to make up for
    odds = np.log(probability - FALSE) - np.log(1 - MISSED - probability) - shift
    rule = 1 / (1 + np.exp(-odds))
    sinus = state.rhythm == SINUS
    expected = {
        "1dAVb": (sinus, ndtr((state.pr - 200) / 12)),
        "RBBB": (state.pattern == RIGHT, ndtr((state.qrs - 120) / 8)),
        "LBBB": (state.pattern == LEFT, ndtr((state.qrs - 120) / 8)),
        "SB": (sinus, ndtr((50 - state.rate) / 3)),
        "ST": (sinus, ndtr((state.rate - 100) / 3)),
    }
    for name, (rows, wanted) in expected.items():
        np.testing.assert_allclose(rule[rows, LABELS.index(name)], np.clip(wanted[rows], 3.2e-5, 1 - 3.2e-5), atol=1e-6)
        assert (rule[~rows, LABELS.index(name)] < 1e-4).all()
    assert (rule[state.rhythm != FIBRILLATION, LABELS.index("AF")] < 1e-4).all()
    certain = (state.rhythm == FIBRILLATION) & (state.rr_cv > 0.2)
    assert (rule[certain, LABELS.index("AF")] > 0.999).all()


def test_premature_beats_are_those_of_the_rhythm(balanced):
    settings, state, _ = balanced
    some = state.take(np.arange(3000))
    np.testing.assert_array_equal(labelling.premature_beats(settings, some), rhythm.beats(settings, some).premature)


def test_one_percent_is_missed_and_a_thousandth_false(balanced):
    probability = balanced[2]
    assert probability.max() <= 1 - MISSED + 1e-12
    assert probability.min() >= FALSE
    assert 0.985 < np.quantile(probability[:, LABELS.index("AF")], 0.95) <= 0.99
    assert np.median(probability[:, CODE]) < 0.0013


def test_wider_label_noise_raises_the_floor(code):
    floors = []
    for width in (0.3, 2.0):
        settings, state, _ = code
        margin = labelling.rule_margins(state, labelling.premature_beats(settings, state), width)
        floors.append(labelling.entropy(ndtr(margin)).mean())
    assert floors[1] > 2 * floors[0]


def test_balanced_raises_the_diagnoses_and_keeps_the_rule(balanced, code):
    settings, state, probability = balanced
    assert ((0.09 < probability.mean(axis=0)) & (probability.mean(axis=0) < 0.2)).all()
    as_code = dataclasses.replace(settings, prevalence="code")
    np.testing.assert_array_equal(labelling.probabilities(as_code, state), probability)
    entropy = labelling.entropy(probability.mean(axis=0)[CODE]).mean()
    assert entropy > 5 * labelling.entropy(probability[:, CODE]).mean()


def test_teacher_is_standardised_smooth_and_differs_by_label(code):
    morphology = code[1].morphology
    term = labelling.teacher_term(morphology)
    np.testing.assert_allclose(term.mean(axis=0), 0, atol=0.08)
    np.testing.assert_allclose(term.std(axis=0), 1, atol=0.08)
    assert np.abs(np.corrcoef(term.T) - np.eye(len(LABELS))).max() < 0.7
    hidden = morphology.copy()
    hidden[:, population.TEACHER_DIMS :] += 1
    np.testing.assert_array_equal(labelling.teacher_term(hidden), term)
    # Nonlinear: a straight line leaves much of it; and it pays beyond its first features.
    design = np.c_[np.ones(COUNT), morphology[:, : population.TEACHER_DIMS]]
    left = term - design @ np.linalg.lstsq(design, term, rcond=None)[0]
    assert (left.var(axis=0) > 0.15).all()
    _, _, _, weight = labelling._teacher_tables()
    size = np.sort(np.abs(weight), axis=0)[::-1]
    np.testing.assert_allclose(size[:, 0], np.arange(1, 257) ** -1.2)


def test_modes_follow_zipf_and_carry_their_own_offsets(code):
    cdf = patients.mode_cdf(1)
    share = np.diff(cdf, prepend=0)
    assert len(share) == MODES == 65536 and cdf[-1] == pytest.approx(1)
    np.testing.assert_allclose(share[[1, 9, 999]] / share[0], np.array([2.0, 10, 1000]) ** -1.4, rtol=1e-6)
    mode = code[1].mode
    assert (mode == 0).mean() == pytest.approx(share[0], rel=0.1)
    assert len(np.unique(mode)) > 800
    offset = labelling.tail_term(np.arange(20000))
    np.testing.assert_allclose(offset.std(axis=0), 1, atol=0.03)
    assert np.abs(np.corrcoef(offset.T) - np.eye(len(LABELS))).max() < 0.04


def test_knowing_teacher_and_tail_pays(code, quick_calibration):
    """What a model that knows the rules alone loses, against one that knows everything: what scaling can
    still win."""
    settings, state, probability = code
    floor = labelling.entropy(probability[:, CODE]).mean()
    lost = {}
    for known in ({"teacher": 0.0, "tail": 0.0}, {"teacher": 0.0}, {"tail": 0.0}):
        guess = labelling.probabilities(dataclasses.replace(settings, **known), state)
        loss = -(probability * np.log(guess) + (1 - probability) * np.log1p(-guess))[:, CODE].mean()
        lost[tuple(known)] = loss - floor
    assert lost["teacher", "tail"] > 0.15 * floor
    assert min(lost[("teacher",)], lost[("tail",)]) > 0.3 * lost["teacher", "tail"]


def test_second_population_differs_as_promised(code, ood):
    one, two = code[1], ood[1]
    np.testing.assert_allclose(two.gain.min(), 0.7, atol=0.01)
    np.testing.assert_allclose(two.gain.max(), 1.4, atol=0.01)
    assert (one.gain == 1).all()
    sinus = [s.rate[(s.rhythm == SINUS)] for s in (one, two)]
    assert np.median(sinus[1]) - np.median(sinus[0]) == pytest.approx(10, abs=0.7)
    shares = [np.diff(patients.mode_cdf(which), prepend=0)[TAIL_FROM:] for which in (1, 2)]
    np.testing.assert_allclose(shares[1] / shares[0], 4, rtol=1e-6)
    tail = [np.mean(s.mode >= TAIL_FROM) for s in (one, two)]
    assert tail[1] / tail[0] == pytest.approx(4, rel=0.15)
    assert np.median(two.snr_db) < np.median(one.snr_db) - 2


def test_patients_have_one_to_many_records_like_code15():
    settings = synthetic.Settings(seed=2)
    owner = patients.assign(settings, 60_000)
    assert (np.diff(owner) >= 0).all() and (np.diff(owner) <= 1).all()
    _, count = np.unique(owner[owner < owner[-1]], return_counts=True)
    assert count.min() == 1 and 15 < count.max() <= patients.MOST == 38
    assert (count > 1).mean() == pytest.approx(0.286, abs=0.01)
    assert count.mean() == pytest.approx(1.48, abs=0.03)
    np.testing.assert_array_equal(patients.assign(settings, 1000), owner[:1000])
    assert patients.records_of(settings, 500) == np.sum(owner < 500)


def test_records_of_a_patient_resemble_each_other(code):
    _, state, probability = code
    same = np.flatnonzero(np.diff(state.patient) == 0)
    for values in (state.pr, state.qrs, state.morphology[:, 0], state.local[:, 0], state.rate):
        together = np.corrcoef(values[same], values[same + 1])[0, 1]
        apart = np.corrcoef(values[:-500], values[500:])[0, 1]
        assert together > 0.45 and abs(apart) < 0.03
    assert (state.mode[same] == state.mode[same + 1]).all()
    assert (state.age[same] == state.age[same + 1]).all()
    assert (state.index[1:] > state.index[:-1]).all()
    right = probability[:, LABELS.index("RBBB")] > 0.5
    assert right[same + 1][right[same]].mean() > 0.5
