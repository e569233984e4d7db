"""Resamples of patients, what they are worth, and differences of two models on the same resamples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.errors import DataError
from ecg_jax.evaluation import bootstrap, calibration, compare, influence
from ecg_jax.evaluation import metrics as m


def simulated(n=300, k=3, patients=200, seed=0, gap=1.5, rare=0.2):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < rare).astype(np.int8)
    labels[rng.random((n, k)) < 0.05] = m.UNKNOWN
    logits = rng.normal(size=(n, k)) + gap * labels - 1
    return logits, labels, rng.integers(0, patients, n).astype(np.uint64) * np.uint64(2654435761)


def test_a_resample_equals_the_metrics_of_the_records_written_out():
    logits, labels, groups = simulated(n=80, patients=30)
    drawn = bootstrap.draw(groups, 20, seed=3)
    assert (drawn.counts.sum(0) == len(np.unique(groups))).all()
    got = bootstrap.spreads(logits, labels, np.zeros(3), drawn)
    for r in range(20):
        rows = np.repeat(np.arange(80), drawn.counts[drawn.patient, r])
        want = m.evaluate(logits[rows], labels[rows], np.zeros(3))
        for name in m.METRICS:
            np.testing.assert_allclose(got[name].draws[r], want[name], atol=1e-12, err_msg=name)


def test_the_draw_knows_patients_and_seed_but_not_the_order_of_records():
    logits, labels, groups = simulated()
    order = np.random.default_rng(1).permutation(len(groups))
    one = bootstrap.spreads(logits, labels, np.zeros(3), bootstrap.draw(groups, 50, 7))
    two = bootstrap.spreads(logits[order], labels[order], np.zeros(3), bootstrap.draw(groups[order], 50, 7))
    other = bootstrap.spreads(logits, labels, np.zeros(3), bootstrap.draw(groups, 50, 8))
    for name in m.METRICS:
        np.testing.assert_allclose(one[name].draws, two[name].draws, atol=1e-12)
        assert (one[name].draws != other[name].draws).any()


def test_chunks_change_nothing(monkeypatch):
    logits, labels, groups = simulated()
    drawn = bootstrap.draw(groups, 50, 7)
    whole = bootstrap.spreads(logits, labels, np.zeros(3), drawn)
    monkeypatch.setattr(bootstrap, "CHUNK", 7)
    parts = bootstrap.spreads(logits, labels, np.zeros(3), drawn)
    for name in m.METRICS:
        np.testing.assert_allclose(whole[name].draws, parts[name].draws, rtol=1e-12)


def test_all_records_of_a_patient_come_together_and_widen_the_interval():
    logits, labels, _ = simulated(n=100, patients=100)
    copied, groups = np.tile(logits, (4, 1)), np.tile(np.arange(100), 4)
    labels = np.tile(labels, (4, 1))
    honest = bootstrap.spreads(copied, labels, np.zeros(3), bootstrap.draw(groups))
    naive = bootstrap.spreads(copied, labels, np.zeros(3), bootstrap.draw(np.arange(400)))
    ratio = honest["auroc"].draws.std(0) / naive["auroc"].draws.std(0)
    assert ((ratio > 1.6) & (ratio < 2.4)).all()  # four copies tell nothing new: the truth is 2


def test_a_resample_without_positives_drops_the_label_and_the_share_is_told():
    rng = np.random.default_rng(0)
    labels = np.zeros((50, 2), np.int8)
    labels[:2, 0] = 1  # two positives: (1 - 2/50)^50 = 13 % of resamples have neither
    labels[:25, 1] = 1
    spread = bootstrap.spreads(rng.normal(size=(50, 2)), labels, np.zeros(2), bootstrap.draw(np.arange(50), 4000))
    assert spread["auroc"].dropped[0] == pytest.approx(0.13, abs=0.02)
    assert spread["auroc"].dropped[1] == 0
    assert (spread["bce"].dropped == 0).all()
    assert np.isfinite(spread["auroc"].macro()[1]).all()


def test_the_macro_of_a_resample_does_not_jump_with_the_labels_it_kept():
    point, support = np.array([0.5, 0.9]), np.array([5, 5])
    spread = bootstrap.Spread(point, np.array([[0.5, 0.9], [np.nan, 0.9], [0.6, np.nan], [np.nan, np.nan]]), support)
    got = spread.macro()
    assert got.point == pytest.approx(0.7) and got.labels == 2
    np.testing.assert_allclose(got.draws, [0.7, 0.7, 0.8, np.nan])
    assert spread.macro(np.array([False, True])).point == pytest.approx(0.9)
    assert np.isnan(spread.macro(np.zeros(2, bool)).point)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40), st.floats(0, 6), st.sampled_from([0.05, 0.3]))
def test_the_point_lies_inside_its_interval(seed, n, gap, rare):
    logits, labels, groups = simulated(n, 2, max(2, n // 2), seed, gap, rare)
    got = bootstrap.spreads(np.round(logits, 1), labels, np.zeros(2), bootstrap.draw(groups, 60, seed))
    for name, spread in got.items():
        for found in (spread.label(0), spread.label(1), spread.macro()):
            low, high = bootstrap.interval(name, found, 0.95)
            assert np.isnan(found.point) or np.isnan(low) or low <= found.point <= high
            assert not low < 0 and (name == "bce" or not high > 1)


def test_perfect_ranking_is_not_certainty():
    labels = np.array([[1]] * 10 + [[0]] * 90, np.int8)
    spread = bootstrap.spreads(labels * 1.0, labels, np.zeros(1), bootstrap.draw(np.arange(100), 200))["auroc"]
    low, high = bootstrap.interval("auroc", spread.label(0), 0.95)
    assert spread.support[0] == 10 and high == 1 and low == pytest.approx(0.025**0.1)


def test_auroc_and_loss_intervals_cover_where_percentile_ones_do_not():
    """Binormal scores, AUROC 0.9, 20 positives, then BCE of 40 patients at 10 %: nominal 95 %. The full table is
    `tools/bench_coverage.py`'s.
    """
    rng = np.random.default_rng(5)
    labels = (np.arange(120) < 20).astype(np.int8)[:, None]
    hits = dict.fromkeys(("auroc", "auroc percentile", "bce", "bce percentile"), 0)
    probability = m.probability(m.logit(0.1) + 2 * rng.normal(size=100_000))
    truth = {
        "auroc": 0.9,
        "bce": -np.mean(probability * np.log(probability) + (1 - probability) * np.log1p(-probability)),
    }
    for i in range(200):
        scores = np.concatenate([rng.normal(1.8124, 1, 20), rng.normal(0, 1, 100)])[:, None]
        found = {"auroc": bootstrap.spreads(scores, labels, np.zeros(1), bootstrap.draw(np.arange(120), 200, i))}
        logits = m.logit(0.1) + 2 * rng.normal(size=(40, 1))
        drawn = (rng.random((40, 1)) < m.probability(logits)).astype(np.int8)
        found["bce"] = bootstrap.spreads(logits, drawn, np.zeros(1), bootstrap.draw(np.arange(40), 200, i))
        for name, spread in found.items():
            one = spread[name].label(0)
            low, high = bootstrap.interval(name, one)
            hits[name] += low <= truth[name] <= high
            low, high = bootstrap.percentile(one.point, one.draws)
            hits[f"{name} percentile"] += low <= truth[name] <= high
    share = {name: n / 200 for name, n in hits.items()}
    assert share["auroc"] >= 0.92 and share["bce"] >= 0.90, share
    assert share["auroc percentile"] < share["auroc"] and share["bce percentile"] < share["bce"], share


def test_influence_values_are_the_slope_of_the_metric_in_a_patients_weight():
    logits, labels, groups = simulated(n=60, patients=25)
    logits = np.round(logits, 1)  # ties
    patients, patient = np.unique(groups, return_inverse=True)
    known, number = labels != m.UNKNOWN, len(patients)
    shares = {
        "auroc": influence.of_auroc(logits, labels, patient, number).shares,
        "bce": influence.of_mean(m.losses(logits, labels), known, patient, number),
    }
    step = 1e-6
    for i in range(len(patients)):
        weight = np.ones((len(patients), 1))
        weight[i] += step
        for k in range(3):
            known = labels[:, k] != m.UNKNOWN
            ranking = m.Ranking(logits[known, k], labels[known, k] == 1, patient[known], len(patients))
            slope = (ranking.weighted(weight)[0][0] - m.auroc(logits, labels)[k]) / step
            assert shares["auroc"][i, k] == pytest.approx(slope * len(patients), abs=1e-3)
            w = weight[patient[known], 0]
            loss = m.losses(logits, labels)[known, k]
            slope = ((w * loss).sum() / w.sum() - loss.mean()) / step
            assert shares["bce"][i, k] == pytest.approx(slope * len(patients), abs=1e-3)
    for values in shares.values():
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-12)


def test_the_error_of_an_area_is_the_published_one_where_every_patient_has_one_record():
    rng = np.random.default_rng(2)
    labels = (np.arange(50) < 17).astype(np.int8)[:, None]
    scores = np.round(rng.normal(size=(50, 1)), 1) + labels
    area = influence.of_auroc(scores, labels, np.arange(50), 50)
    s, y = scores[:, 0], labels[:, 0] == 1
    wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
    delong = wins.mean(1).var() / 17 + wins.mean(0).var() / 33  # with n in place of n - 1, as an influence value has it
    assert (area.shares**2).mean() / 50 == pytest.approx(delong, rel=1e-12)
    twice = (wins.var() - wins.mean(1).var() - wins.mean(0).var()) / (17 * 33)
    unbiased = wins.mean(1).var(ddof=1) / 17 + wins.mean(0).var(ddof=1) / 33 - twice
    assert area.error[0] ** 2 == pytest.approx(unbiased, rel=1e-12)
    assert 5 < area.free[0] < 48


def test_an_area_is_as_unsure_as_its_placements_are_skewed():
    """The same 20 positives: at 0.6 the variance of their placements is well known, at 0.95 a few of them make it."""
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(220, 1)), (np.arange(220) < 20).astype(np.int8)[:, None]
    low, high = (influence.of_auroc(noise + gap * labels, labels, np.arange(220), 220) for gap in (0.36, 2.3))
    assert high.free[0] < 0.7 * low.free[0]
    copied = influence.of_auroc(*(np.tile(x, (3, 1)) for x in (noise, labels)), np.tile(np.arange(220), 3), 220)
    alone = influence.of_auroc(noise, labels, np.arange(220), 220)
    assert copied.error[0] == pytest.approx(alone.error[0], rel=0.01)
    assert copied.free[0] == pytest.approx(alone.free[0])


def test_the_corrected_loss_takes_a_shift_of_prevalence_away():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40_000)
    logits = m.logit(0.1) + 1.5 * x
    labels = (rng.random(40_000) < m.probability(logits)).astype(np.int8)
    train_share = m.prevalence(labels[:, None])
    kept = (labels == 1) | (rng.random(40_000) < 0.2)  # positives five times as common
    logits, labels = logits[kept, None], labels[kept, None]
    shift = calibration.prevalence_shift(labels, train_share)
    drawn = bootstrap.draw(np.arange(len(labels)), 200)
    got = bootstrap.spreads(logits, labels, np.zeros(1), drawn, shift)
    raw, corrected = got["bce"].point[0], got[bootstrap.CORRECTED].point[0]
    best = m.bce(logits + np.log(5), labels)[0]
    assert raw > corrected + 0.05 and corrected == pytest.approx(best, abs=0.003)
    low, high = bootstrap.interval(bootstrap.CORRECTED, got[bootstrap.CORRECTED].label(0))
    assert low < corrected < high and high - low < 0.05


def test_a_paired_difference_is_antisymmetric_zero_to_itself_and_sharper_than_two_intervals():
    logits, labels, groups = simulated(400, 3, 400)
    worse = logits + np.random.default_rng(9).normal(size=logits.shape) * 0.8
    names = ("a", "b", "c")
    ab = compare.paired(labels, logits, worse, groups, names, resamples=300)
    ba = compare.paired(labels, worse, logits, groups, names, resamples=300)
    same = compare.paired(labels, logits, logits, groups, names, resamples=100)
    for metric in compare.COMPARED:
        one, two, zero = ab[metric]["macro"], ba[metric]["macro"], same[metric]["macro"]
        assert one["difference"] == pytest.approx(-two["difference"])
        assert one["ci_low"] == pytest.approx(-two["ci_high"])
        assert zero["difference"] == zero["ci_low"] == zero["ci_high"] == 0 and not zero["excludes_zero"]
    got = ab["auroc"]["macro"]
    assert got["difference"] > 0 and got["excludes_zero"] and got["n_labels"] == 3
    spread = bootstrap.spreads(logits, labels, np.zeros(3), bootstrap.draw(groups, 300))["auroc"]
    low, high = bootstrap.interval("auroc", spread.macro(), 0.95)
    assert got["ci_high"] - got["ci_low"] < high - low


def test_saved_predictions_are_aligned_by_record_and_refused_when_they_differ(tmp_path):
    logits, labels, groups = simulated(60, 2, 50)
    ids, names = [f"r{i}" for i in range(60)], ["x", "y"]
    order = np.random.default_rng(0).permutation(60)
    compare.save_predictions(tmp_path / "a.npz", ids, groups, labels, logits, names)
    shuffled = [ids[i] for i in order]
    compare.save_predictions(tmp_path / "b.npz", shuffled, groups[order], labels[order], logits[order] * 2, names)
    got = compare.paired_files(tmp_path / "a.npz", tmp_path / "b.npz", resamples=50)
    assert got["auroc"]["macro"]["difference"] == 0 and got["bce"]["macro"]["difference"] != 0
    compare.save_predictions(tmp_path / "c.npz", ids[1:], groups[1:], labels[1:], logits[1:], names)
    compare.save_predictions(tmp_path / "d.npz", ids, groups, labels, logits, ["x", "z"])
    for other in ("c.npz", "d.npz", "missing.npz"):
        with pytest.raises(DataError):
            compare.paired_files(tmp_path / "a.npz", tmp_path / other)
