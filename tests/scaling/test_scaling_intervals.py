"""Bootstrap draws and what is made of them: determinism, pairing, coverage, unbounded ends, multipliers."""

import csv

import fake_log
import numpy as np
import pytest

from ecg_jax.scaling import bootstrap, families, identify, intervals, laws, multipliers, table
from ecg_jax.scaling.analysis import Options, analyse
from ecg_jax.scaling.solve import fit_law

JOINT = laws.get("hoffmann", ("N", "D"))


def results(entries, tmp_path, **options):
    sets = families.group(table.read([fake_log.write_jsonl(tmp_path / "log.jsonl", entries)]))
    return [analyse(s, Options(**({"bootstrap": 200} | options)), families.seed_noise([s])) for s in sets]


def home(entries):
    return [e for e in entries if e["task"] == "pretrain"]


def small():
    n, d = np.meshgrid([2000.0, 10000.0, 60000.0], [512.0, 2048.0, 8192.0], indexing="ij")
    n, d = n.ravel(), d.ravel()
    y = fake_log.truth("resnet1d", n, d) * np.exp(0.004 * np.random.default_rng(5).normal(size=9))
    return n, d, y, laws.design(JOINT, n, d)


@pytest.mark.parametrize("kind", ["wild", "case"])
def test_draws_depend_on_the_seed_alone(kind):
    n, d, y, x = small()
    fit = fit_law(JOINT, x, y)
    keys = bootstrap.cell_keys(n, d)
    one, two, other = (bootstrap.draw(fit, x, y, keys, draws=60, seed=s, kind=kind) for s in (0, 0, 1))
    assert np.array_equal(one.theta, two.theta) and not np.array_equal(one.theta, other.theta)


def test_configurations_share_their_draws_whatever_else_is_fitted():
    keys = np.array(["0/512", "0/2048", "1/512"])
    all_three = bootstrap.wild_signs(keys, 500, seed=7)
    assert np.array_equal(bootstrap.wild_signs(keys[[2]], 500, seed=7)[:, 0], all_three[:, 2])
    assert abs(all_three.mean()) < 0.05 and all_three.std() == pytest.approx(1.0, abs=0.05)
    assert abs(np.corrcoef(all_three.T)[0, 1]) < 0.15
    assert (bootstrap.case_counts(keys, 50, seed=7).sum(axis=1) == 3).all()


def test_repeated_seeds_of_a_configuration_move_together():
    n, d, _, _ = small()
    keys = bootstrap.cell_keys(np.append(n, n[0]), np.append(d, d[0]))
    assert keys[0] == keys[-1] and len(set(keys)) == 9
    assert bootstrap.choose_kind(n, d) == "wild"
    many = np.random.default_rng(0).uniform(1, 2, (2, 240))
    assert bootstrap.choose_kind(*many) == "case"


def test_interval_ends_and_their_absence():
    draws = np.random.default_rng(0).normal(2.0, 0.1, 4000)
    t = intervals.interval(2.0, draws, level=0.95, method="t", df=1000)
    p = intervals.interval(2.0, draws, level=0.95, method="percentile", df=1000)
    assert t.pair() == pytest.approx([1.8, 2.2], abs=0.02) and p.pair() == pytest.approx([1.8, 2.2], abs=0.02)
    wide = intervals.interval(2.0, draws, level=0.95, method="t", df=4)
    assert wide.high - 2.0 == pytest.approx(0.1 * 2.776, rel=0.05)
    draws[:200] = np.inf  # 5 % of the draws know no upper end
    for method in ("t", "percentile"):
        got = intervals.interval(2.0, draws, level=0.95, method=method, df=10)
        assert got.high is None and got.low is not None and got.infinite == 0.05
    draws[:2000] = np.nan
    nothing = intervals.interval(2.0, draws, level=0.95, method="t", df=10)
    assert nothing.pair() == [None, None] and nothing.sd is None


def test_p_value_is_the_t_test():
    draws = np.random.default_rng(1).normal(0.5, 0.2, 20000)
    assert intervals.p_value(0.5, draws, null=0.0, df=10) == pytest.approx(0.0314, abs=0.004)
    assert intervals.p_value(0.5, np.full(50, np.inf), null=0.0, df=10) is None


def test_intervals_of_a_small_grid_cover_the_truth(tmp_path):
    e, _, alpha, _, beta = fake_log.TRUTH["resnet1d"]
    for seed in range(3):
        entries = [r for r in home(fake_log.rows(seed=seed)) if r["architecture"] == "resnet1d"]
        (result,) = results(entries, tmp_path)
        for name, value in (("E", e), ("alpha", alpha), ("beta", beta)):
            assert result.intervals[name].covers(value)
        assert result.identified and result.draws.kind == "wild"


# ---------------------------------------------------------------------------------- identification


def failing(result):
    return {c.name for c in result.identification.failed}


def test_two_sizes_refuse_the_exponent_and_three_do_not(tmp_path):
    entries = [r for r in home(fake_log.rows()) if r["architecture"] == "resnet1d"]
    few = [r for r in entries if r["n_params"] != fake_log.SIZES["resnet1d"][1]]
    (result,) = results(few, tmp_path)
    assert result.fit is None and not result.identified and "sizes of N" in failing(result)
    (result,) = results(entries, tmp_path)
    assert result.identified


@pytest.mark.parametrize(
    "change, condition",
    [
        (lambda r: {"prior": 0.12}, "learning"),
        (lambda r: {"value": 0.1 + 0.2 * r["n_params"] ** -0.2 + 1e-4 * r["n_records"] ** -0.1}, "over D"),
        (lambda r: {"value": 0.1 + 0.5 * r["n_records"] ** -0.3 + 1e-4 * r["n_params"] ** -0.1}, "over N"),
        (
            lambda r: {"value": r["value"] * np.exp(0.2 * (-1) ** r["seed"] * (r["n_records"] == 2048))},
            "over N",
        ),
    ],
)
def test_each_condition_stops_the_law_and_states_its_numbers(tmp_path, change, condition):
    entries = [r for r in home(fake_log.rows()) if r["architecture"] == "resnet1d" and r["label"] == "macro"]
    entries = [r for r in entries if r["metric"] == "bce"]
    for r in entries:
        r |= {"floor": 0.0712, "prior": 0.4} | change(r)
    (result,) = results(entries, tmp_path)
    assert not result.identified and condition in failing(result)
    failed = next(c for c in result.identification.failed if c.name == condition)
    assert failed.measured is not None and f"{failed.threshold:.4g}".strip("0.") in failed.text


def test_what_cannot_be_checked_does_not_count_against_the_law(tmp_path):
    entries = [r | {"prior": None, "floor": None} for r in home(fake_log.rows(repeats=0))]
    result = results(entries, tmp_path)[0]
    by_name = {c.name: c for c in result.identification.conditions}
    assert by_name["learning"].ok is None and "fitted E" in by_name["over D"].text
    assert "residual (no repeated seeds)" in by_name["over D"].text and result.identified


def test_sizes_and_data_in_step_are_refused(tmp_path):
    entries = []
    for i in range(8):
        n, d = 1000 * 2**i, 100 * 2**i
        row = fake_log._run(np.random.default_rng(i), "resnet1d", n, d, 0, 0.004)[0]
        entries.append(row)
    (result,) = results(entries, tmp_path)
    assert failing(result) == {"design"} and result.fit is None


def test_residual_sd_counts_degrees_of_freedom():
    _, _, y, x = small()
    fit = fit_law(JOINT, x, y, loss="ls-log")
    assert identify.residual_sd(fit) == pytest.approx(np.sqrt(fit.objective / 4))


# ------------------------------------------------------------------------------------- multipliers


def synthetic(path, tmp_path, **options):
    if not path.is_file():
        pytest.skip("no synthetic measurements")
    entries = []
    with open(path) as file:
        for i, r in enumerate(csv.DictReader(file)):
            architecture, paradigm = r["family"].split("-")
            row = {
                "run": f"r{i}",
                "architecture": architecture,
                "paradigm": paradigm,
                "dataset": "x",
                "metric": "loss",
            }
            row |= {"n_params": r["n_params"], "n_records": r["n_records"], "seed": r.get("seed", 0)}
            entries.append(row | {"task": "pretrain", "value": r["loss_id"]})
    return multipliers.compare_all(results(entries, tmp_path, **options), level=0.95)


def test_noiseless_multiplier_is_the_true_one(shared_data, tmp_path):
    found = synthetic(shared_data / "scaling" / "synthetic_noiseless.csv", tmp_path, bootstrap=0)
    m = {(m.kind, m.numerator.split(" / ")[1]): m for m in found}
    assert len(found) == 8  # two kinds, two variables, two paradigms; never across paradigms on ID losses
    assert m["M_N", "sl"].value == pytest.approx(1.9, rel=1e-6)
    assert m["M_N", "sl"].numerator.startswith("transformer") and m["M_N", "sl"].interval == (None, None)
    assert m["rho_N", "ssl"].value == pytest.approx(0.30 / 0.36, rel=1e-8)  # of resnet over transformer
    at = m["M_D", "sl"].at  # both laws by hand at the ends of the overlap: E, B, beta equal, A times 1.9^alpha
    for loss, ratio in zip(at["loss"], at["ratio at these losses"], strict=True):
        left = [loss - 0.03 - 0.008 * k**0.22 * (at["N"] / 1e6) ** -0.22 for k in (1.0, 1.9)]
        assert ratio == pytest.approx((left[0] / left[1]) ** (1 / 0.35), rel=1e-6)


def test_noisy_interval_covers_the_true_multiplier(shared_data, tmp_path):
    found = synthetic(shared_data / "scaling" / "synthetic_noisy.csv", tmp_path)
    m = next(
        m for m in found if m.kind == "M_N" and m.denominator.endswith("sl / signal") and "ssl" not in m.denominator
    )
    assert m.interval[0] < 1.9 < m.interval[1] < 2.6
    assert m.p < 1e-4 and m.p_holm == m.p


def test_families_without_common_losses_have_no_multiplier(tmp_path):
    entries = home(fake_log.rows())
    for r in entries:
        if r["architecture"] == "transformer":
            r["value"] *= 5
    found = multipliers.compare_all(results(entries, tmp_path), level=0.95)
    m = next(m for m in found if m.kind == "M_N")
    assert m.value is None and "no loss that both families reach" in m.note and m.p is None


def test_inputs_are_never_mixed(tmp_path):
    entries = home(fake_log.rows())
    for r in entries:
        if r["architecture"] == "transformer":
            r["input"] = "beats"
    assert multipliers.compare_all(results(entries, tmp_path), level=0.95) == []


def test_holm_is_step_down():
    assert multipliers.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
