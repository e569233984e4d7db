"""Laws: derivatives against finite differences, noiseless recovery of every form, fixed and tied parameters."""

import numpy as np
import pytest
from scipy.optimize import brentq

from ecg_jax.scaling import forms
from ecg_jax.scaling.newton import Criterion, _Problem
from ecg_jax.scaling.restrict import restrict
from ecg_jax.scaling.solve import fit_law

PAIR, ONE = ("N", "D"), ("N",)
ALL = [
    *((f, PAIR) for f in ("hoffmann", "kaplan", "kaplan0", "coupled", "overfitting")),
    *((f, ONE) for f in ("power", "power0", "shifted", "broken", "m3", "m4")),
    ("data-constrained", ("N", "D", "U")),
    ("transfer", ("N", "D", "T")),
    ("ratio", ("N", "D", "T")),
    ("loss-to-loss", ("L",)),
]
MIDDLE = {"floor": -1.0, "amplitude": -0.5, "exponent": 0.4, "early": 0.2, "place": -1.0, "turn": 0.2, "free": 0.3,
          "c": 1.2, "ratio": 0.3, "below": -2.5, "k": 0.4, "f": -1.0, "q": 0.5, "repeats": 1.0}  # fmt: skip
CRITERIA = [
    Criterion(True, 0.05),
    Criterion(False, np.inf),
    Criterion(True, 0.05, student=True),
    Criterion(True, 0.02, tilt=0.1),
]


def somewhere(name, variables, rng):
    law = forms.get(name, variables)
    z = rng.normal(size=(14, len(variables)))
    if name == "transfer":
        z[:, 2] = np.arange(14) % 2
    if name == "data-constrained":
        z = np.column_stack([rng.uniform(1, 3, 14), rng.uniform(3, 4, 14), rng.uniform(1, 2.9, 14)])
    theta = np.array([MIDDLE[k] for k in law.kinds]) + 0.1 * rng.normal(size=law.size)
    return law, z, theta


@pytest.mark.parametrize("name, variables", ALL)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_derivatives_agree_with_finite_differences(name, variables, criterion):
    rng = np.random.default_rng(1)
    law, z, theta = somewhere(name, variables, rng)
    y = law.predict(theta[None], z)[0] * np.exp(0.05 * rng.normal(size=14))
    target = np.log(y) if criterion.logarithmic else y
    weights = rng.uniform(0.5, 2.0, (1, 14))

    def at(t):
        return _Problem(law, z, target[None], weights, criterion, True).at(t[None], np.arange(1))

    here, h = at(theta), 1e-5
    for i in range(law.size):
        up, down = at(theta + h * np.eye(law.size)[i]), at(theta - h * np.eye(law.size)[i])
        slope, bend = (up.value - down.value) / (2 * h), (up.gradient - down.gradient) / (2 * h)
        assert slope == pytest.approx(here.gradient[:, i], abs=1e-6 * abs(here.gradient).max())
        assert bend == pytest.approx(here.hessian[:, i], abs=1e-6 * abs(here.hessian).max())


def grid():
    n, d = np.meshgrid(np.geomspace(2e4, 6e7, 6), np.geomspace(2e4, 2e6, 5), indexing="ij")
    return n.ravel(), d.ravel()


def implicit(x, e, top, a, alpha, q):
    def gap(loss):
        return np.log(loss - e) - q * np.log(top - loss) - np.log(a * x**-alpha)

    return brentq(gap, e + 1e-14, top - 1e-14, xtol=1e-15, rtol=1e-14)


N, D = grid()
X = np.geomspace(10, 1e5, 25)
TRUTHS = {  # losses of each printed formula at its raw parameters
    "kaplan": ((0.03, 3e4, 2e3, 0.22, 0.35), lambda e, a, b, p, q: e + ((a / N) ** (p / q) + b / D) ** q),
    "kaplan0": ((3e4, 2e3, 0.22, 0.35), lambda a, b, p, q: ((a / N) ** (p / q) + b / D) ** q),
    "coupled": ((0.03, 0.167, 0.68, 0.22, 0.35, 1.7), lambda e, a, b, p, q, k: e + (a * N**-p + b * D**-q) ** k),
    "shifted": ((0.1, 2.0, 0.5, 300.0), lambda e, a, p, s: e + a * (X + s) ** -p),
    "broken": (
        (0.1, 2.0, 0.1, 0.6, 500.0, 0.4),
        lambda e, a, p, late, t, f: e + a * X**-p * (1 + (X / t) ** (1 / f)) ** (-(late - p) * f),
    ),
    "m3": ((2.0, 0.4, 1e-3), lambda a, p, g: a * (1 / X + g) ** p),
    "m4": ((0.1, 0.9, 3.0, 0.5, 1.4), lambda e, top, a, p, q: np.array([implicit(x, e, top, a, p, q) for x in X])),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_noiseless_truth_of_every_form(name):
    raw, loss = TRUTHS[name]
    pair = name in forms.PAIRS
    law = forms.get(name, PAIR if pair else ONE)
    fit = fit_law(law, np.log(np.column_stack([N, D]) if pair else X[:, None]), loss(*raw))
    assert fit.raw == pytest.approx(raw, rel=1e-9)
    assert fit.certificate.converged and fit.certificate.starts_agreeing >= 2


def test_coupled_with_k_of_one_is_hoffmann_and_m1_m2_are_powers():
    law, base = forms.get("coupled", PAIR), forms.get("hoffmann", PAIR)
    z, theta = np.random.default_rng(0).normal(size=(9, 2)), np.array([[-1.0, 0.2, -0.3, 0.4, 0.6]])
    got = law.predict(np.append(theta, [[0.0]], axis=1), z)
    assert got == pytest.approx(base.predict(theta, z), rel=1e-14)
    assert (forms.get("m1", ONE).name, forms.get("m2", ONE).name) == ("power0", "power")
    with pytest.raises(ValueError, match="no law 'kaplan' over N"):
        forms.get("kaplan", ONE)


def test_joint_fit_of_id_and_ood_finds_both_floors_and_kappa():
    raw = (0.03, 0.167, 0.68, 0.22, 0.35, 0.12, 0.1, 0.2)
    g = 0.167 * N**-0.22 + 0.68 * D**-0.35
    x = np.concatenate([np.log(np.column_stack([N, D, np.ones(30)])), np.log(np.column_stack([N, D, np.ones(30)]))])
    x[30:, 2] = 1.0
    fit = fit_law(forms.get("transfer", ("N", "D", "T")), x, np.concatenate([0.03 + g, 0.12 + 0.1 * g**0.2]))
    assert fit.raw == pytest.approx(raw, rel=1e-8)


@pytest.mark.parametrize(
    "fixed",
    [{"E": 0.05}, {"beta": "alpha"}, {"A": 0.2}, {"alpha": 0.3, "A": 0.5}, {"A": 0.2, "alpha": "beta"}, {"E": 0.0}],
)
def test_fixed_and_tied_parameters_keep_their_values_and_the_rest_is_optimal(fixed):
    y = (0.03 + 0.167 * N**-0.22 + 0.68 * D**-0.35) * np.exp(0.01 * np.random.default_rng(4).normal(size=30))
    law = forms.get("hoffmann", PAIR)
    x = np.log(np.column_stack([N, D]))
    fit = fit_law(law, x, y, loss="ls-log", fixed=fixed)
    p = fit.parameters
    for name, value in fixed.items():
        assert p[name] == pytest.approx(p[value] if isinstance(value, str) else value, rel=1e-12)
    assert fit.certificate.converged and fit.law.size == 5 - len(fixed)
    assert fit.objective > fit_law(law, x, y, loss="ls-log").objective
    free = fit_law(
        law, x, law.predict(law.starts(x - fit.centre, y, np.ones(30), robust=False, count=1), x - fit.centre)[0]
    )
    assert free.objective < 1e-12


def test_what_cannot_be_fixed_is_said():
    law, centre = forms.get("coupled", PAIR), np.zeros(2)
    for fixed, words in (({"gamma": 1.0}, "has the parameters"), ({"A": 1.0}, "cannot be fixed"), ({"B": "A"}, "tied")):
        with pytest.raises(ValueError, match=words):
            restrict(law, fixed, centre)
    assert restrict(law, {}, centre) is law
