"""Laws of N and D, or of one of them, that are no sum of power terms, and every law by its name (`get`).

    kaplan     L = E + ((A/N)^(alpha/beta) + B/D)^beta                        Kaplan et al. 2020, with a floor
    kaplan0    the same with E = 0
    coupled    L = E + (A N^-alpha + B D^-beta)^k
    shifted    L = E + A (x + s)^-alpha
    broken     L = E + A x^-alpha (1 + (x/turn)^(1/f))^(-(late - alpha) f)     Caballero et al. 2022, one break;
               `late` is the exponent far beyond the turn
    m3         L = A (1/x + gamma)^alpha                                      M1-M4: Alabdulmohsin et al. 2022
    m4         (L - E) / (E0 - L)^q = A x^-alpha
    overfitting  L = M (1 + B D^-beta M^-c), M = E + A N^-alpha: the extent of overfitting O = L/M - 1 is a power of
               X = D M^(1/beta) by definition at c = 1, where the law is Hoffmann's; a free c tests the fit

m1 and m2 are `power0` and `power`. No fitting. Invariant: at k = 1 `coupled`, and at c = 1 `overfitting`, is the
Hoffmann law.
"""

import numpy as np

from ecg_jax.scaling import jets, laws
from ecg_jax.scaling.formula import JOINT, PAIR, Formula, with_levels
from ecg_jax.scaling.jets import Jet
from ecg_jax.scaling.relations import OTHERS


def get(name: str, variables: tuple[str, ...]) -> "laws.Law | Formula":
    """The law called `name`; ValueError where the name does not go with the variables."""
    name = {"m1": "power0", "m2": "power"}.get(name, name)
    if name in PAIRS and variables == ("N", "D"):
        return PAIRS[name]
    if name in SINGLES and len(variables) == 1:
        return SINGLES[name](variables[0])
    if (name, variables) in OTHERS:
        return OTHERS[name, variables]
    return laws.get(name, variables)


# ------------------------------------------------------------------------------------ two variables


def _norm(first: Jet, second: Jet, k: Jet) -> Jet:
    """ln of (e^(first/k) + e^(second/k))^k."""
    return second + k * jets.softplus((first - second) / k)


def _kaplan(p: list[Jet], z: list[np.ndarray], floor: bool = True) -> Jet:
    a, b, alpha, beta = p[floor:]
    excess = jets.exp(_norm(a - alpha * z[0], b - beta * z[1], beta))
    return jets.exp(p[0]) + excess if floor else excess


def _kaplan_raw(*values):
    *e, a, b, alpha, beta, n, d = values
    return [*map(np.exp, e), np.exp(a / alpha + n), np.exp(b / beta + d), alpha, beta]


def _coupled(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, log_k = p
    return jets.exp(e) + jets.exp(_norm(a - alpha * z[0], b - beta * z[1], jets.exp(log_k)))


def _coupled_raw(e, a, b, alpha, beta, log_k, n, d):
    k = np.exp(log_k)
    return [np.exp(e), np.exp((a + alpha * n) / k), np.exp((b + beta * d) / k), alpha / k, beta / k, k]


def _overfitting(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, c = p
    m = jets.exp(e) + jets.exp(a - alpha * z[0])
    middle = jets.exp(e) + jets.exp(a)  # so that b stays the excess at the design's centre
    return m + jets.exp(b - beta * z[1] + (1.0 - c) * (jets.log(m) - jets.log(middle)))


def _overfitting_raw(e, a, b, alpha, beta, c, n, d):
    level = (c - 1.0) * np.log(np.exp(e) + np.exp(a))
    return [np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d + level), alpha, beta, c]


def _drop_floor(some, z, y):
    return some[:, 1:]


PAIRS = {
    "kaplan": Formula(
        "kaplan", ("N", "D"), ("E", "A", "B", "alpha", "beta"), PAIR, "E + ((A/N)^(alpha/beta) + B/D)^beta",
        _kaplan, _kaplan_raw, JOINT, lambda some, z, y: some,
    ),
    "kaplan0": Formula(
        "kaplan0", ("N", "D"), ("A", "B", "alpha", "beta"), PAIR[1:], "((A/N)^(alpha/beta) + B/D)^beta",
        lambda p, z: _kaplan(p, z, floor=False), _kaplan_raw, JOINT, _drop_floor,
    ),
    "coupled": Formula(
        "coupled", ("N", "D"), ("E", "A", "B", "alpha", "beta", "k"), (*PAIR, "k"),
        "E + (A N^-alpha + B D^-beta)^k", _coupled, _coupled_raw, JOINT, with_levels((-1.2, 0.0, 1.2)),
    ),
    "overfitting": Formula(
        "overfitting", ("N", "D"), ("E", "A", "B", "alpha", "beta", "c"), (*PAIR, "c"),
        "M (1 + B D^-beta M^-c), M = E + A N^-alpha", _overfitting, _overfitting_raw, JOINT,
        with_levels((0.0, 1.0, 2.0)),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------- one variable


def _shifted(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, alpha, s = p
    return jets.exp(e) + jets.exp(a - alpha * (jets.softplus(s - z[0]) + z[0]))


def _broken(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, alpha, late, turn, log_f = p
    f = jets.exp(log_f)
    return jets.exp(e) + jets.exp(a - alpha * z[0] - (late - alpha) * f * jets.softplus((-turn + z[0]) / f))


def _m3(p: list[Jet], z: list[np.ndarray]) -> Jet:
    a, alpha, g = p
    return jets.exp(a + alpha * (jets.softplus(g + z[0]) - z[0]))


def _m4(p: list[Jet], z: list[np.ndarray]) -> Jet:
    """With h = ln(E0 - E), L = E + e^h sigmoid(w) and b = ln A + q h, the amplitude of the tail, the law is
    q softplus(w) - softplus(-w) = b - alpha z - h.

    Newton finds w (the left side rises with a slope between 1 and q); two more steps on jets give the exact
    derivatives of the implicit function.
    """
    e, h, b, alpha, log_q = p
    q = jets.exp(log_q)
    t = b - alpha * z[0] - h
    w = np.where(t.value > 0, t.value / q.value, t.value)  # exact far out on either side
    for _ in range(50):
        share = np.exp(-np.logaddexp(0.0, -w))
        gap = -np.logaddexp(0.0, -w) + q.value * np.logaddexp(0.0, w) - t.value
        w = w - gap / (1.0 - share + q.value * share)
        if np.nanmax(np.abs(gap)) < 1e-13 * (1.0 + np.nanmax(np.abs(t.value))):
            break
    jet = Jet(w, np.zeros((1, t.slope.shape[1], 1)), None, t.curved)
    for _ in range(2 if t.curved else 1):
        share = jets.exp(-jets.softplus(-jet))
        gap = q * jets.softplus(jet) - jets.softplus(-jet) - t
        jet = jet - gap / (1.0 - share + q * share)
    return jets.exp(e) + jets.exp(h - jets.softplus(-jet))


def _single(name: str):
    """The one-variable law `name` over N or D: amplitude and exponent are called as in the joint law."""

    def make(v: str) -> Formula:
        amplitude, slope = laws.AMPLITUDE[v], laws.EXPONENT[v]
        base = laws.get("power", (v,))
        late = f"{slope}_late"
        if name == "shifted":
            return Formula(
                name, (v,), ("E", amplitude, slope, "s"), ("floor", "amplitude", "exponent", "place"),
                f"E + {amplitude} ({v} + s)^-{slope}", _shifted,
                lambda e, a, alpha, s, c: [np.exp(e), np.exp(a + alpha * c), alpha, np.exp(s + c)],
                base, lambda some, z, y: with_levels(np.quantile(z, [0.0, 0.3]) + np.array([-2.0, 0.0]))(some, z, y),
            )  # fmt: skip
        if name == "broken":
            return Formula(
                name, (v,), ("E", amplitude, slope, late, "turn", "f"),
                ("floor", "amplitude", "early", "exponent", "turn", "f"),
                f"E + {amplitude} {v}^-{slope} (1 + ({v}/turn)^(1/f))^(-({late} - {slope}) f)", _broken,
                lambda e, a, alpha, late, t, f, c: [
                    np.exp(e), np.exp(a + alpha * c), alpha, late, np.exp(t + c), np.exp(f)],
                base, _broken_starts,
            )  # fmt: skip
        if name == "m3":
            return Formula(
                name, (v,), (amplitude, slope, "gamma"), ("amplitude", "exponent", "free"),
                f"{amplitude} (1/{v} + gamma)^{slope}", _m3,
                lambda a, alpha, g, c: [np.exp(a + alpha * c), alpha, np.exp(g - c)],
                base, lambda some, z, y: np.column_stack([some[:, 1:], (some[:, 0] - some[:, 1]) / some[:, 2]]),
            )  # fmt: skip
        return Formula(
            name, (v,), ("E", "E0", amplitude, slope, "q"), ("floor", "amplitude", "free", "exponent", "q"),
            f"(L - E) / (E0 - L)^q = {amplitude} {v}^-{slope}", _m4,
            lambda e, h, b, alpha, q, c: [
                np.exp(e), np.exp(e) + np.exp(h), np.exp(b - np.exp(q) * h + alpha * c), alpha, np.exp(q)],
            base, _m4_starts,
        )  # fmt: skip

    return make


def _broken_starts(some: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = []
    for turn in np.quantile(z[:, 0], [0.25, 0.5, 0.75]):
        for early, late in ((0.5, 1.5), (1.5, 0.7), (0.0, 1.3)):
            for e, a, alpha in some[:3]:
                out.append([e, a + (early - 1.0) * alpha * turn, early * alpha, late * alpha, turn, np.log(0.3)])
    return np.array(out)


def _m4_starts(some: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = []
    for top in (1.03, 1.3, 3.0):
        for q in (0.5, 1.0, 2.0):
            for e, a, alpha in some[:3]:
                h = np.log(max(top * y.max() - np.exp(e), 0.05 * y.max()))
                out.append([e, h, a, alpha, np.log(q)])
    return np.array(out)


SINGLES = {name: _single(name) for name in ("shifted", "broken", "m3", "m4")}
