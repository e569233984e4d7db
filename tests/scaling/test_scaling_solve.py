"""Laws and their derivatives, the solver on noiseless, noisy, dirty and degenerate data, and the public
numbers."""

import csv
import json

import numpy as np
import pytest

from ecg_jax.scaling import bootstrap, laws
from ecg_jax.scaling.newton import Criterion, _evaluate
from ecg_jax.scaling.solve import fit_law
from ecg_jax.scaling.starts import _nonnegative

JOINT = laws.get("hoffmann", ("N", "D"))


def grid(sizes=6, data=5):
    n, d = np.meshgrid(np.geomspace(2e4, 6e7, sizes), np.geomspace(2e4, 2e6, data), indexing="ij")
    return n.ravel(), d.ravel()


def joint(n, d, e=0.03, a=0.167, b=0.68, alpha=0.22, beta=0.35):
    return e + a * n**-alpha + b * d**-beta


@pytest.mark.parametrize("name, variables", [("hoffmann", ("N", "D")), ("power", ("N",)), ("power0", ("D",))])
@pytest.mark.parametrize("criterion", [Criterion(True, 0.01), Criterion(True, np.inf), Criterion(False, np.inf)])
def test_derivatives_agree_with_finite_differences(name, variables, criterion):
    law = laws.get(name, variables)
    rng = np.random.default_rng(1)
    z = rng.normal(size=(12, len(variables)))
    theta = np.concatenate([rng.normal(-1, 0.3, law.n_terms), rng.uniform(0.2, 0.6, len(variables))])
    y = law.predict(theta[None], z)[0] * np.exp(0.01 * rng.normal(size=12))
    target = np.log(y) if criterion.logarithmic else y
    weights = rng.uniform(0.5, 2.0, (1, 12))

    def at(t):
        return _evaluate(law, z, target[None], weights, t[None], criterion)

    here, h = at(theta), 1e-5
    for i in range(law.size):
        step = h * np.eye(law.size)[i]
        up, down = at(theta + step), at(theta - step)
        slope = (up.value[0] - down.value[0]) / (2 * h)
        assert slope == pytest.approx(here.gradient[0, i], rel=1e-4, abs=1e-6 * abs(here.gradient).max())
        bend = (up.gradient[0] - down.gradient[0]) / (2 * h)
        assert bend == pytest.approx(here.hessian[0, i], rel=1e-3, abs=1e-4 * abs(here.hessian).max())


def test_raw_and_centred_parameters_are_inverse():
    centre, raw = np.array([12.0, 9.0]), np.array([0.1, 30.0, 7.0, 0.3, 0.4])
    assert JOINT.raw(JOINT.centred(raw, centre), centre) == pytest.approx(raw, rel=1e-13)


@pytest.mark.parametrize("loss", ["log-huber", "lad", "ls", "ls-log"])
def test_noiseless_truth_is_recovered(loss):
    n, d = grid()
    fit = fit_law(JOINT, laws.design(JOINT, n, d), joint(n, d), loss=loss)
    assert fit.raw == pytest.approx([0.03, 0.167, 0.68, 0.22, 0.35], rel=1e-9)
    assert fit.certificate.converged and not fit.certificate.boundary


@pytest.mark.parametrize("name, truth", [("power", [0.2, 3.0, 0.3]), ("power0", [3.0, 0.3])])
def test_one_variable_law_with_and_without_floor(name, truth):
    law = laws.get(name, ("D",))
    d = np.geomspace(100, 1e5, 6)
    y = 3.0 * d**-0.3 + (0.2 if law.floor else 0.0)
    fit = fit_law(law, laws.design(law, d, d), y)
    assert fit.raw == pytest.approx(truth, rel=1e-9)


def test_a_floor_of_zero_is_a_reported_boundary():
    n, d = grid()
    fit = fit_law(JOINT, laws.design(JOINT, n, d), joint(n, d, e=0.0))
    assert fit.parameters["E"] == 0.0 and fit.certificate.boundary == ("E = 0",)
    assert fit.raw[1:] == pytest.approx([0.167, 0.68, 0.22, 0.35], rel=1e-8)


def test_log_huber_resists_diverged_runs_and_least_squares_does_not():
    n, d = grid()
    y = joint(n, d) * np.exp(0.003 * np.random.default_rng(0).normal(size=len(n)))
    y[[4, 21]] = 0.7
    x = laws.design(JOINT, n, d)
    robust, squares = fit_law(JOINT, x, y), fit_law(JOINT, x, y, loss="ls-log")
    assert abs(robust.parameters["alpha"] - 0.22) < 0.03
    assert abs(squares.parameters["alpha"] - 0.22) > 0.1


def test_delta_follows_the_noise_and_changes_the_objective_only_as_asked():
    n, d = grid(8, 8)
    y = joint(n, d) * np.exp(0.01 * np.random.default_rng(3).normal(size=len(n)))
    x = laws.design(JOINT, n, d)
    free, fixed = fit_law(JOINT, x, y), fit_law(JOINT, x, y, delta=1e-3)
    assert 0.009 < free.delta < 0.02 and fixed.delta == 1e-3
    small = np.abs(free.residuals)
    by_hand = np.where(small <= free.delta, 0.5 * small**2, free.delta * (small - free.delta / 2)).sum()
    assert free.objective == pytest.approx(by_hand, rel=1e-12)


def test_too_few_rows_and_unknown_losses_are_refused():
    n, d = grid(2, 2)
    with pytest.raises(ValueError, match="4 rows"):
        fit_law(JOINT, laws.design(JOINT, n, d), joint(n, d))
    with pytest.raises(ValueError, match="unknown loss"):
        fit_law(JOINT, laws.design(JOINT, *grid()), joint(*grid()), loss="l3")


def test_nonnegative_least_squares_equals_scipy():
    from scipy.optimize import nnls

    rng = np.random.default_rng(2)
    basis = rng.normal(size=(40, 3, 15)) + 0.4
    ours = _nonnegative(basis, np.ones((40, 15)))
    for b, x in zip(basis, ours, strict=True):
        assert x == pytest.approx(nnls(b.T, np.ones(15))[0], abs=1e-8)


# --------------------------------------------------------------------------------- public numbers


@pytest.fixture(scope="module")
def chinchilla(shared_data):
    folder = shared_data / "scaling"
    if not (folder / "epoch_chinchilla_svg.csv").is_file():
        pytest.skip("no public scaling measurements")
    with open(folder / "epoch_chinchilla_svg.csv") as file:
        rows = list(csv.DictReader(file))
    n, c, y = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    return folder, n, c / (6 * n), c, y


def test_published_log_huber_fit(chinchilla):
    _, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    fit = fit_law(JOINT, laws.design(JOINT, n[keep], d[keep]), y[keep], delta=1e-3)
    p = fit.parameters
    assert fit.n == 240 and fit.objective <= 0.0010182740180
    assert (p["A"], p["B"]) == (pytest.approx(477.8259, rel=1e-4), pytest.approx(2143.4174, rel=1e-4))
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([1.8172181, 0.3473105, 0.3671724], abs=1e-6)
    everything = fit_law(JOINT, laws.design(JOINT, n, d), y, delta=1e-3)
    assert everything.objective == pytest.approx(0.00182601052307, rel=1e-10)
    assert everything.parameters["B"] == pytest.approx(12845.61, rel=1e-4)


def test_published_least_absolute_deviations(chinchilla):
    _, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    p = fit_law(JOINT, laws.design(JOINT, n[keep], d[keep]), y[keep], loss="lad").parameters
    assert [p["A"], p["B"]] == pytest.approx([482.00, 2085.4], rel=2e-4)
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([1.81686, 0.347813, 0.365854], abs=1e-5)


@pytest.mark.parametrize(
    "rows, truth, rss",
    [
        (217, [1.905092, 4.000522, 1.050948, 0.351058, 0.458742], 0.06241429288),
        (240, [1.8828136, 4.0598408, 1.0744587, 0.3576151, 0.4276206], 0.08320380769),
    ],
)
def test_published_least_squares(chinchilla, rows, truth, rss):
    _, n, d, c, y = chinchilla
    keep = (y < np.sort(y)[-5]) & ((c < 1e21) | (rows == 240))
    fit = fit_law(JOINT, laws.design(JOINT, n[keep] / 1e6, d[keep] / 1e9), y[keep], loss="ls")
    assert fit.n == rows
    assert fit.raw == pytest.approx(truth, rel=1e-6)
    assert fit.objective == pytest.approx(rss, rel=1e-9)


def test_published_bootstrap(chinchilla):
    folder, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    n, d, y = n[keep], d[keep], y[keep]
    x = laws.design(JOINT, n, d)
    fit = fit_law(JOINT, x, y, delta=1e-3)
    counts = np.load(folder / "epoch_bootstrap_counts.npz")["counts"]
    drawn = bootstrap.draw(fit, x, y, bootstrap.cell_keys(n, d), counts=counts)
    se = drawn.raw.std(axis=0, ddof=1)
    assert se[[0, 1, 3, 4]] == pytest.approx([0.025677, 124.475, 0.015396, 0.020629], rel=0.002)
    assert se[2] == pytest.approx(1312.118, rel=0.016)
    low, high = np.quantile(drawn.raw, [0.025, 0.975], axis=0)
    assert low == pytest.approx([1.76935, 286.085, 1042.366, 0.316823, 0.331261], rel=1e-3)
    assert high == pytest.approx([1.871228, 743.610, 5810.359, 0.373283, 0.415375], rel=1e-3)


def test_synthetic_truth_to_nine_digits(shared_data):
    path = shared_data / "scaling" / "synthetic_noiseless.csv"
    if not path.is_file():
        pytest.skip("no synthetic measurements")
    truth = json.loads((path.parent / "synthetic_truth.json").read_text())["families"]
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for family, expected in truth.items():
        mine = [r for r in rows if r["family"] == family]
        n, d, y = (np.array([float(r[k]) for r in mine]) for k in ("n_params", "n_records", "loss_id"))
        p = fit_law(JOINT, laws.design(JOINT, n, d), y).parameters
        found = [p["E"], p["A"] * 1e6 ** -p["alpha"], p["alpha"], p["B"] * 1e5 ** -p["beta"], p["beta"]]
        assert found == pytest.approx(expected, rel=1e-9)
