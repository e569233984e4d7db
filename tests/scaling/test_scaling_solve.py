"""The solver on noiseless, noisy, dirty and degenerate data."""

import numpy as np
import pytest

from ecg_jax.scaling import laws
from ecg_jax.scaling.solve import fit_law
from ecg_jax.scaling.starts import _nonnegative

JOINT = laws.get("hoffmann", ("N", "D"))


def grid(sizes=6, data=5):
    n, d = np.meshgrid(np.geomspace(2e4, 6e7, sizes), np.geomspace(2e4, 2e6, data), indexing="ij")
    return n.ravel(), d.ravel()


def joint(n, d, e=0.03, a=0.167, b=0.68, alpha=0.22, beta=0.35):
    return e + a * n**-alpha + b * d**-beta


@pytest.mark.parametrize("loss", ["log-huber", "lad", "ls", "ls-log", "student-t", "envelope"])
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
