"""Lack of fit, families on one footing, shifts, weights, kinds of draws, tuning trials, envelope."""

import itertools

import fake_log
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.scaling import adequacy, allocation, bootstrap, families, forms, laws, paired, shift, tuning
from ecg_jax.scaling.fit import fit, result_lines
from ecg_jax.scaling.solve import fit_law

JOINT = laws.get("hoffmann", ("N", "D"))


def runs(loss, n, d, *, paradigm="SL"):
    key = families.SetKey("net", paradigm, "signal", "x", "pretrain", "id", "loss", "", 1.0)
    nan, words = np.full(len(n), np.nan), ("done",) * len(n)
    names = tuple(map(str, range(len(n))))
    return families.RunSet(key, n, d, loss, np.ones(len(n), bool), nan, nan, names, words, names, "test", "best",
                           {}, (), nan)  # fmt: skip


def grid(sizes=6, data=5):
    n, d = np.meshgrid(np.geomspace(2e4, 6e7, sizes), np.geomspace(2e4, 2e6, data), indexing="ij")
    return n.ravel(), d.ravel()


def terms(n, d):
    return 0.008 * (n / 1e6) ** -0.22, 0.012 * (d / 1e5) ** -0.35


def noise(n, sd, seed=0):
    return np.exp(sd * np.random.default_rng(seed).normal(size=len(n)))


def test_lack_of_fit_is_found_where_the_terms_do_not_add_and_only_there():
    n, d = grid()
    a, b = terms(n, d)
    right = adequacy.checks(runs((0.03 + a + b) * noise(n, 0.002), n, d), JOINT)
    assert [c.name for c in right] == ["coupling", "overfitting"] and not adequacy.failed(right)
    wrong = adequacy.checks(runs((0.03 + 0.02**-0.5 * (a + b) ** 1.5) * noise(n, 0.002), n, d), JOINT)
    assert {c.name for c in adequacy.failed(wrong)} == {"coupling", "overfitting"}
    assert next(c.estimate for c in wrong if c.name == "coupling") == pytest.approx(1.5, abs=0.4)
    exact = adequacy.checks(runs(0.03 + a + b, n, d), JOINT)
    assert not adequacy.failed(exact)


def test_misfit_is_measured_against_repeated_seeds():
    n, d = (np.repeat(x, 3) for x in grid(4, 4))
    a, b = terms(n, d)
    bump = 1 + 0.05 * np.sin(3 * np.log(n)) * np.cos(2 * np.log(d))
    for factor, rejected in ((1.0, False), (bump, True)):
        found = adequacy.checks(runs((0.03 + a + b) * factor * noise(n, 0.004, 2), n, d), JOINT)
        assert ("seeds" in [c.name for c in adequacy.failed(found)]) == rejected


def test_one_factor_between_families_its_test_and_the_answer_without_a_form():
    n, d = grid()
    loss = [0.03 + sum(terms(n / ratio, d)) for ratio in (1.0, 1.9)]
    one, two = (runs(y * noise(n, 0.002, i), n, d) for i, y in enumerate(loss))
    got = paired.shared(one, two, 0.95)
    assert got.m == pytest.approx(1.9, rel=0.05) and got.interval[0] < 1.9 < got.interval[1]
    assert got.p_one_law < 1e-6 < 0.01 < got.p_ratio_only
    assert paired.swapped(one, two, 0) < 0.01 < paired.swapped(one, one, 0)
    assert paired.form_free(one, two, "N", d.max()) == pytest.approx(1.9, rel=0.15)
    steeper = runs((0.03 + terms(n, d)[0] ** 1.3 + terms(n, d)[1]) * noise(n, 0.002, 3), n, d)
    assert paired.shared(one, steeper, 0.95).p_ratio_only < 1e-6


def test_pooled_neighbours_never_rise():
    assert paired.falling(np.array([3.0, 1.0, 2.0, 0.5])) == pytest.approx([3.0, 1.5, 1.5, 0.5], abs=1e-8)


@pytest.mark.parametrize("form, extra", [("m2", {}), ("m4", {"E0": 1.2, "q": 0.7})])
def test_shift_without_its_jacobian_ends_lower_in_its_own_sum_and_both_find_noiseless_truth(form, extra):
    x = np.geomspace(10, 1e6, 24)
    if form == "m2":
        y = 0.2 + 2.0 * x**-0.4
    else:
        law = forms.get("m4", ("N",))
        theta = [np.log(0.2), 0.0, np.log(2.0), 0.4, np.log(0.7)]
        y = law.predict(np.array([theta]), np.log(x)[:, None])[0]
    for jacobian in (False, True):
        got = shift.fit_shift(np.log(x), y, form=form, jacobian=jacobian)
        assert got["E"] == pytest.approx(0.2, rel=1e-3) and got["alpha"] == pytest.approx(0.4, rel=1e-2)
        assert all(got[k] == pytest.approx(v, rel=0.02) for k, v in extra.items())
    noisy = y * noise(x, 0.03)
    plain, mended = (shift.fit_shift(np.log(x), noisy, form=form, jacobian=j) for j in (False, True))
    assert plain["E"] != pytest.approx(mended["E"], rel=1e-4)
    with pytest.raises(ValueError, match="no shift"):
        shift.fit_shift(np.log(x), y, form="m3", jacobian=True)


@pytest.mark.parametrize("kind", ["residual", "parametric", "wild"])
def test_every_kind_of_draw_spreads_like_the_noise(kind):
    n, d = grid()
    y = (0.03 + sum(terms(n, d))) * noise(n, 0.01, 5)
    x = laws.design(JOINT, n, d)
    made = fit_law(JOINT, x, y, loss="ls-log")
    keys = bootstrap.cell_keys(n, d)
    drawn = bootstrap.draw(made, x, y, keys, draws=300, kind=kind, seed=1)
    again = bootstrap.draw(made, x, y, keys, draws=300, kind=kind, seed=1)
    assert np.array_equal(drawn.theta, again.theta) and drawn.kind == kind
    jac = JOINT.evaluate(made.theta[None], x - made.centre)
    slope = (jac[1][0] / jac[0][0]).T
    sd = np.sqrt((made.residuals**2).sum() / 25 * np.diag(np.linalg.inv(slope.T @ slope)))
    assert drawn.theta.std(axis=0) == pytest.approx(sd, rel=0.5)


def test_weights_follow_the_evaluation_and_are_refused_without_its_interval(tmp_path):
    entries = [r for r in fake_log.rows() if r["task"] == "pretrain" and r["architecture"] == "resnet1d"]
    for i, r in enumerate(entries):
        half = 0.10 if i % 3 == 0 else 0.002
        r["ci_low"], r["ci_high"] = r["value"] * np.exp(-half), r["value"] * np.exp(half)
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", entries)
    plain, heavy = (fit(log, tmp_path / w, weights=w, bootstrap=0)["laws"][0] for w in ("equal", "variance"))
    assert plain["weights"] == "equal" and heavy["parameters"]["alpha"] != plain["parameters"]["alpha"]
    assert "one over the variance" in (tmp_path / "variance" / "report.html").read_text()
    for r in entries:
        del r["ci_low"]
    log = fake_log.write_jsonl(tmp_path / "bare.jsonl", entries)
    with pytest.raises(UsageError, match="have no interval of their loss"):
        fit(log, tmp_path / "out", weights="variance")


def test_runs_at_other_learning_rates_are_trials_not_repeats(tmp_path):
    entries = [r | {"trial": None} for r in fake_log.rows() if r["task"] == "pretrain"]
    worse = [r | {"run": r["run"] + "-lr", "lr": 0.03, "value": r["value"] * 1.2} for r in entries]
    result = fit(fake_log.write_jsonl(tmp_path / "log.jsonl", entries + worse), tmp_path / "out", bootstrap=0)
    assert [law["n"] for law in result["laws"]] == [11, 11]
    assert all("tuning trial that is not the best of its configuration" in law["passed_over"] for law in result["laws"])


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_best_of_k_trials_is_the_mean_over_all_draws(n):
    loss = np.sort(np.random.default_rng(n).normal(size=n))
    for k in range(1, n + 1):
        drawn = np.mean([min(some) for some in itertools.combinations(loss, k)])
        assert tuning.shares(n, k) @ loss == pytest.approx(drawn, abs=1e-12)
    assert tuning.shares(n, n + 3).tolist() == [1.0] + [0.0] * (n - 1), "no more than there are"
    assert tuning.shares(n, tuning.MEDIAN) @ loss == pytest.approx(np.median(loss), abs=1e-12)


def test_a_family_that_wins_by_more_trials_does_not_win_at_the_same_number(tmp_path):
    """Four trials of one family spread around the loss of the other, whose two are alike."""
    lines = ["run,architecture,paradigm,n_params,n_records,dataset,trial,loss_id"]
    n, d = grid(4, 4)
    loss = 0.02 + 4 * sum(terms(n, d))
    loss = loss * np.exp(1e-3 * np.random.default_rng(0).normal(size=len(loss)))
    for name, factors in (("plain", (1.0, 1.0)), ("tuned", (1.06, 0.94, 0.98, 1.02))):
        for i, (size, data, here) in enumerate(zip(n, d, loss, strict=True)):
            for t, factor in enumerate(factors):
                lines.append(f"{name}{i}-{t},{name},SL,{size:.0f},{data:.0f},x,{t},{here * factor:.12f}")
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(lines) + "\n")
    result = fit(path, tmp_path / "out", melt=["loss_id"], form="hoffmann", bootstrap=60)
    (m,) = (m for m in result["multipliers"] if m["kind"] == "M_N")
    by_k = m["at"]["best of k trials"]
    assert list(by_k) == ["1", "2", "median"]
    assert by_k["1"][0] == pytest.approx(1, abs=1e-6) and by_k["median"][0] == pytest.approx(1, abs=1e-6)
    assert abs(np.log(m["value"])) > abs(np.log(by_k["2"][0])) > 0.05, "two trials help less than four"
    assert m["at"]["told from 1 at every k"] is False
    assert "best of k trials, 1: 1" in (tmp_path / "out" / "report.html").read_text()


def test_envelope_and_budgets():
    cost, loss = np.array([1.0, 1.01, 10.0, 10.1, 100.0, 100.0, 1000.0]), np.array([4.0, 5, 1.9, 3, 1.8, 1.0, 1.5])
    assert np.unique(allocation.budgets(cost)).tolist() == pytest.approx([1.005, 10.05, 100, 1000], rel=1e-2)
    assert allocation.envelope(cost, loss).tolist() == [0, 2, 5]


def test_a_clear_misfit_is_printed_and_a_loss_to_loss_law_is_fitted(tmp_path):
    lines = ["run,architecture,paradigm,n_params,n_records,dataset,loss_id,loss_ood"]
    n, d = grid(4, 4)
    a, b = terms(n, d)
    for i, (size, data, g) in enumerate(zip(n, d, 0.02**-1 * (a + b) ** 2, strict=True)):
        lines.append(f"r{i},net,SL,{size:.0f},{data:.0f},x,{0.03 + g:.9f},{0.1 + 0.5 * g**0.7:.9f}")
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(lines) + "\n")
    result = fit(path, tmp_path / "out", melt=["loss_id", "loss_ood"], form="loss-to-loss", bootstrap=50)
    home, away = result["laws"]
    assert any(line.startswith("    LACK OF FIT  coupling") for line in result_lines(result))
    assert home["form"] == "hoffmann" and home["compute"]["cost"] == "N D" and away["form"] == "loss-to-loss"
    assert "Lack of fit" in (tmp_path / "out" / "report.html").read_text()
    found = [away["parameters"][k] for k in ("Eo", "K", "kappa", "E")]
    assert found == pytest.approx([0.1, 0.5, 0.7, 0.03], rel=2e-2)
