"""Choice of form by extrapolation, claims beyond one ratio, allocation, profiles and transfer on known truths."""

from pathlib import Path

import fake_log
import numpy as np
import pytest

from ecg_jax.scaling import allocation, choice, claims, families, forms, identify, laws, multipliers, profile
from ecg_jax.scaling.analysis import LawResult
from ecg_jax.scaling.choice import Score
from ecg_jax.scaling.fit import fit
from ecg_jax.scaling.solve import fit_law

JOINT = laws.get("hoffmann", ("N", "D"))


def runs(n, d, loss, name="resnet1d", domain="id", task="pretrain"):
    key = families.SetKey(name, "SL", "signal", "x", task, domain, "loss", "", 1.0)
    nan, rows = np.full(len(n), np.nan), tuple(str(i) for i in range(len(n)))
    return families.RunSet(
        key, n, d, loss, np.ones(len(n), bool), nan, nan, rows, ("done",) * len(n), (Path(),) * len(n),
        "test", "best-val", {}, (), nan,
    )  # fmt: skip


def curve(loss, points=12, noise=0.002):
    d = np.geomspace(100, 1e5, points)
    return runs(np.full(points, 5.0), d, loss(d) * np.exp(noise * np.random.default_rng(0).normal(size=points)))


@pytest.mark.parametrize(
    "loss, good",
    [
        (lambda d: 3 * d**-0.4, {"power0", "power"}),
        (lambda d: 0.1 + 3 * d**-0.4, {"power", "m3"}),
        (lambda d: 3 * d**-0.1 * (1 + (d / 2000) ** 5) ** (-0.1), {"broken"}),
    ],
)
def test_chosen_form_extrapolates_tenfold(loss, good):
    one = curve(loss, points=14)
    chosen = choice.choose([one], ("D",), loss="log-huber")
    assert chosen.form in good and {s.form for s in chosen.scores} == set(choice.ONE)
    law = forms.get(chosen.form, ("D",))
    fit = fit_law(law, one.log_x(("D",)), one.loss)
    assert abs(np.log(fit.predict(np.log([[1e6]]))[0] / loss(1e6))) < 0.08


def test_the_simplest_form_within_one_standard_error_wins_and_margins_are_kept():
    close = [
        Score("power", ((0.010, 0.012, 0.011, 0.010),), (0.01,)),
        Score("broken", ((0.011, 0.010, 0.012, 0.009),), (0.0099,)),
    ]
    assert choice.pick(close)[0] == "power"
    clear = [close[0], Score("broken", ((0.005, 0.006, 0.005, 0.005),), (0.005,))]
    assert choice.pick(clear)[0] == "broken"
    slight = [close[0], Score("broken", ((0.0095, 0.0115, 0.0105, 0.0095),), (0.01,))]
    assert choice.pick(slight)[0] == "broken" and choice.pick(slight, margin=0.15)[0] == "power"
    alone = [Score("power", ((np.nan, np.nan, np.nan, 0.01),), (0.01,))]
    assert choice.pick(alone) is None


def test_few_points_are_not_held_out():
    assert choice.choose([curve(lambda d: 3 * d**-0.4, points=3)], ("D",), loss="ls-log") is None


def result(name, n, d, loss, domain="id", task="pretrain"):
    one = runs(n, d, loss, name, domain, task)
    made = fit_law(JOINT, one.log_x(("N", "D")), loss)
    return LawResult(one, JOINT, made, None, {}, identify.Identification(()), None, None, ())


def pair(scale=1.9, alpha=0.3):
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(2e4, 2e7, 5), np.geomspace(1e3, 1e6, 5), indexing="ij"))
    one = result("resnet1d", n, d, 0.05 + 2.0 * n**-0.3 + 3.0 * d**-0.4)
    return one, result("transformer", n, d, 0.05 + 2.0 * scale**alpha * n**-alpha + 3.0 * d**-0.4)


def test_compute_at_equal_loss_is_the_closed_form():
    one, two = pair()
    m = claims.compute(one, two, 0.95)
    # With E, B, beta, alpha equal, C ~ A^(1/alpha) to all but a constant power: C_T / C_R = 1.9.
    assert m.value == pytest.approx(1.9, rel=1e-6) and m.kind == "M_C" and m.denominator.startswith("resnet1d")


def test_allocation_reaches_the_loss_it_promises():
    p = {"E": 0.05, "A": 2.0, "B": 3.0, "alpha": 0.3, "beta": 0.4}
    got = allocation.optimum(p, np.array([1e9, 1e11]))
    assert got.n_params * got.n_records == pytest.approx([1e9, 1e11], rel=1e-9) and got.a + got.b == 1.0
    assert allocation.cost_of_loss(p, got.loss) == pytest.approx(np.log([1e9, 1e11]), rel=1e-9)
    for shift in (0.9, 1.1):
        off = 0.05 + 2.0 * (shift * got.n_params) ** -0.3 + 3.0 * (got.n_records / shift) ** -0.4
        assert (off > got.loss).all()
    assert np.isinf(allocation.cost_of_loss(p, np.array([0.04]))[0])


def test_isoflop_refuses_what_has_no_minimum():
    x = np.array([1e3, 1e4, 1e5] * 3)
    budget = np.repeat([1e8, 1e9, 1e10], 3)
    loss = np.concatenate([(np.log(x[:3]) - 9) ** 2, -((np.log(x[:3]) - 9) ** 2), (np.log(x[:3]) - 10) ** 2])
    got = allocation.isoflop(budget, x, loss)
    assert got.log_x == pytest.approx([9.0, 10.0]) and len(got.refused) == 1 and "no minimum" in got.refused[0]


def test_crossing_is_found_inside_the_sizes_or_said_to_be_out_of_range():
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e4, 1e7, 5), np.geomspace(1e3, 1e6, 5), indexing="ij"))
    one = result("resnet1d", n, d, 0.05 + 2.0 * n**-0.2 + 3.0 * d**-0.4)
    two = result("transformer", n, d, 0.05 + 2.0 * (3e5) ** 0.2 * n**-0.4 + 3.0 * d**-0.4)  # equal at N = 3e5
    assert claims.crossing(one, two, 0.95).value == pytest.approx(3e5, rel=1e-3)
    never = claims.crossing(*pair(), 0.95)
    assert never.value is None and "not in range" in never.note


def test_up_to_is_the_maximum_with_the_median_beside_it():
    def ratio(task, log_value, draws):
        one, two = (r for r in pair())
        away = runs(one.runs.n_params, one.runs.n_records, one.runs.loss, "resnet1d", "ood_unseen", task)
        away = LawResult(away, JOINT, one.fit, None, {}, one.identification, None, None, ())
        m = multipliers.between("M_N", two, away, None, None, {}, "", 0.95)
        return multipliers.replace(m, value=float(np.exp(log_value)), draws=draws, task=task, domain="ood_unseen")

    rng = np.random.default_rng(0)
    found = [ratio(f"t{i}", 0.5, 0.5 + 0.2 * rng.normal(size=2000)) for i in range(5)]
    (top,) = claims.largest(found, level=0.95)
    assert top.kind == "max M_N" and top.at["median"] == pytest.approx(np.exp(0.5)) and top.at["tasks"] == 5
    assert top.interval[0] > np.exp(0.5) * 0.95  # the maximum of five equal ratios lies above each of them
    assert sum(k.startswith("without") for k in top.at) == 5
    runs_needed = claims.seeds_to_tell(found[0])
    assert runs_needed == np.ceil((2.8 * 0.2 / np.log(1.3)) ** 2)


def test_profile_ends_lie_where_the_sum_of_squares_says():
    d = np.geomspace(10, 1e4, 20)
    y = 2.0 * d**-0.3 * np.exp(0.01 * np.random.default_rng(3).normal(size=20))
    law = forms.get("power0", ("D",))
    made = fit_law(law, np.log(d)[:, None], y, loss="ls-log")
    got = profile.profile(made, np.log(d)[:, None], y, "beta")
    z = np.log(d) - np.log(d).mean()
    half = 2.101 * np.sqrt(made.objective / 18 / (z**2).sum())  # linear regression: the t interval exactly
    assert [got.low, got.high] == pytest.approx([made.raw[1] - half, made.raw[1] + half], rel=1e-4) and got.words == ""


def test_wide_table_of_id_and_ood_losses_gives_transfer_and_its_ratio(tmp_path):
    lines = ["run,architecture,paradigm,n_params,n_records,dataset,loss_id,loss_ood"]
    rng = np.random.default_rng(1)
    for paradigm, kappa in (("SL", 0.4), ("SSL", 0.9)):
        for n in np.geomspace(1e4, 1e7, 4).round():
            for d in np.geomspace(1e3, 1e6, 4).round():
                g = 1.0 * n**-0.25 + 3.0 * d**-0.4
                noise = np.exp(0.002 * rng.normal(size=2))
                row = (0.1 + g) * noise[0], (0.2 + 0.5 * g**kappa) * noise[1]
                lines.append(f"{paradigm}{n:.0f}-{d:.0f},resnet,{paradigm},{n:.0f},{d:.0f},x,{row[0]:.8f},{row[1]:.8f}")
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(lines) + "\n")
    out = fit(path, tmp_path / "out", melt=["loss_id", "loss_ood"], form="hoffmann", bootstrap=50)
    entry = next(m for m in out["multipliers"] if m["kind"] == "rho_T")
    assert entry["numerator"].split(" / ")[1] == "SL" or entry["value"] > 1
    low, high = entry["interval"]
    assert low < 0.4 / 0.9 < high or low < 0.9 / 0.4 < high
    text = (tmp_path / "out" / "transfer.json").read_text()
    assert text.count('"kappa_two_step"') == 2 and (tmp_path / "out" / "figures" / "forest-multipliers.svg").is_file()
    assert "arXiv 2203.15556" in (tmp_path / "out" / "report.html").read_text()


def test_options_of_the_fit_reach_the_files(tmp_path):
    entries = [r for r in fake_log.rows() if r["task"] == "pretrain" and r["architecture"] == "resnet1d"]
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", entries)
    (law,) = fit(log, tmp_path / "a", form="kaplan", loss="student-t", bootstrap=0)["laws"]
    assert (
        law["form"] == "kaplan" and law["loss"] == "student-t" and law["parameters"].keys() == {*"EAB", "alpha", "beta"}
    )
    (law,) = fit(log, tmp_path / "b", form="hoffmann", fixed={"E": 0.0712, "beta": "alpha"}, bootstrap=50)["laws"]
    assert law["parameters"]["E"] == pytest.approx(0.0712) and law["parameters"]["alpha"] == law["parameters"]["beta"]
    assert law["fixed"] == {"E": 0.0712, "beta": "alpha"}
