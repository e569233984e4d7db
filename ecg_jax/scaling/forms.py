"""Laws that are no sum of power terms: Kaplan, coupled, shifted, broken, M3, M4, data-constrained, transfer.

    kaplan     L = E + ((A/N)^(alpha/beta) + B/D)^beta                        Kaplan et al. 2020, with a floor
    kaplan0    the same with E = 0
    coupled    L = E + (A N^-alpha + B D^-beta)^k
    shifted    L = E + A (x + s)^-alpha
    broken     L = E + A x^-alpha (1 + (x/turn)^(1/f))^(-(late - alpha) f)     Caballero et al. 2022, one break;
               `late` is the exponent far beyond the turn
    m3         L = A (1/x + gamma)^alpha                                      M1-M4: Alabdulmohsin et al. 2022
    m4         (L - E) / (E0 - L)^q = A x^-alpha
    data-constrained   L = E + A N'^-alpha + B D'^-beta with the effective sizes N', D' of Muennighoff et al. 2023:
               D examples seen, U of them distinct, D' = U + U RD (1 - exp(-(D/U - 1)/RD)), N' likewise against
               the size that is compute-optimal for U
    transfer   g = A N^-alpha + B D^-beta; L = E + g where T = 0 (ID), L = Eo + K g^kappa where T = 1 (OOD)

m1 and m2 are `power0` and `power`. Each law is written once with `jets`, which carry its exact gradient and
Hessian. Inside, parameters are those that the data determine nearly independently of each other: excess at the
design's centre, effective exponents, logs of scales; `raw` turns them into the formula's own.

Same interface as `laws.Law`; no fitting. Invariant: at k = 1 `coupled` is the Hoffmann law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling import jets, laws
from ecg_jax.scaling.jets import Jet
from ecg_jax.scaling.laws import EXPONENT_RANGE, SMALLEST_LOG_SHARE, Bounds

JOINT = laws.get("hoffmann", ("N", "D"))
LOG_K, LOG_F, LOG_Q = (np.log(0.05), np.log(20.0)), (np.log(0.05), np.log(3.0)), (np.log(0.05), np.log(20.0))
REPEATS = (np.log(1e-2), np.log(1e5))  # RD and RN: from "a repeat is worthless" to "as good as new"


@dataclass(frozen=True)
class Formula:
    """A law given by `curve(parameters, z by variable)`; `kinds` gives each parameter's role, which sets its
    bounds."""

    name: str
    variables: tuple[str, ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    formula: str
    curve: Callable[[list[Jet], list[np.ndarray]], Jet]
    to_raw: Callable[..., Sequence[np.ndarray]]
    base: laws.Law  # whose starts are taken
    spread: Callable[..., np.ndarray]  # starts of the base law -> starts of this one
    centred: bool = True  # False: the formula needs ln of the variables themselves

    batch = 40  # replicates at a time: Hessians of every row are held
    cheap = False  # draws leave the Hessian's second part out

    @property
    def size(self) -> int:
        return len(self.names)

    def forward(self, theta_RxP: np.ndarray, z_nxV: np.ndarray, curved: bool = True):
        """Loss [R, n], and what `backward` needs: its gradient [R, P, n] and Hessian."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            jet = self.curve(jets.parameters(theta_RxP, curved), list(z_nxV.T))
        shape = (len(theta_RxP), self.size, len(z_nxV))
        value = np.broadcast_to(jet.value, (shape[0], shape[2]))
        return value, (np.broadcast_to(jet.slope, shape).copy(), jet.bend)

    def evaluate(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss [R, n] and its gradient [R, P, n]."""
        value, (slope, _) = self.forward(theta_RxP, z_nxV, False)
        return value, slope

    def aids(self, z_nxV: np.ndarray) -> None:
        """Nothing: see `laws.Law.aids`."""

    def backward(self, inside, pred, z_nxV, aids, pull, bend, metric, *, gauss: bool, curved: bool):
        """See `laws.Law.backward`."""
        jac, second = inside
        if pred is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                jac /= pred[:, None]
                pull_of_loss = pull / pred
        else:
            pull_of_loss = pull
        gradient = (jac @ pull[:, :, None])[:, :, 0]
        model = None
        if gauss or not curved:
            model = (jac * metric[:, None]) @ jac.transpose(0, 2, 1)
            scale = np.einsum("rii->ri", model)
        else:
            scale = (jac * jac * metric[:, None]).sum(axis=2)
        hessian = model
        if curved:
            hessian = (jac * bend[:, None]) @ jac.transpose(0, 2, 1)
            if second is not None:
                full = np.broadcast_to(second, (*hessian.shape, len(z_nxV)))
                hessian = hessian + np.einsum("rpqn,rn->rpq", full, pull_of_loss)
        model = np.zeros_like(hessian) if model is None else model
        return gradient, hessian, model, np.sqrt(np.maximum(scale, 0.0))

    def loss_at(self, theta_RxP: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
        """Loss at centred ln x given by variable, each [n] or [R, m]."""
        bare = [Jet(theta_RxP[:, [i]], np.zeros((1, 0, 1)), None, False) for i in range(self.size)]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self.curve(bare, columns).value

    def predict(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """Loss, [R, n]."""
        value = self.loss_at(theta_RxP, list(z_nxV.T))
        return np.broadcast_to(value, (len(theta_RxP), len(z_nxV))).copy()

    def raw(self, theta: np.ndarray, centre_V: np.ndarray) -> np.ndarray:
        """Parameters of the printed formula, [..., P] in the order of `names`."""
        with np.errstate(over="ignore"):
            return np.stack(self.to_raw(*np.moveaxis(np.asarray(theta, float), -1, 0), *centre_V), axis=-1)

    def bounds(self, y_n: np.ndarray, z_nxV: np.ndarray) -> Bounds:
        """Box of `theta` by the role of each parameter."""
        y, z = np.log([y_n.min(), y_n.max()]), z_nxV[:, 0]
        box = {
            "floor": (y[0] - SMALLEST_LOG_SHARE, y[1]),
            "amplitude": (y[0] - SMALLEST_LOG_SHARE, y[1] + 5.0),
            "exponent": EXPONENT_RANGE,
            "early": (-2.0, EXPONENT_RANGE[1]),
            "place": (z.min() - 12.0, z.max() + 3.0),
            "turn": (z.min(), z.max()),
            "free": (-60.0, 60.0),
            "k": LOG_K, "f": LOG_F, "q": LOG_Q, "repeats": REPEATS,
        }  # fmt: skip
        low, high = np.array([box[k] for k in self.kinds]).T
        return Bounds(low, high)

    def edge_words(self, theta: np.ndarray, at_bound: np.ndarray) -> tuple[str, ...]:
        """Words for the parameters on the box's edge."""
        return tuple(
            f"{n} = 0" if k == "floor" else f"{n} at the edge of its range"
            for n, k, edge in zip(self.names, self.kinds, at_bound, strict=True)
            if edge
        )

    def zeroable(self) -> np.ndarray:
        """Which parameters at their lower bound are exactly zero."""
        return np.array([k == "floor" for k in self.kinds])

    def draw_values(self, theta_BxP: np.ndarray, raw_BxP: np.ndarray, j: int) -> np.ndarray:
        """Draws of parameter j [B], +inf where an exponent has run into its upper bound."""
        at_edge = (self.kinds[j] == "exponent") & (theta_BxP[:, j] >= EXPONENT_RANGE[1] - 1e-9)
        return np.where(at_edge, np.inf, raw_BxP[:, j])

    def pin(self, name: str, value: float, centre_V: np.ndarray) -> tuple[int, float, dict[int, float]]:
        """See `laws.Law.pin`; ValueError for a parameter that the inner ones do not hold affinely."""
        j = self.names.index(name)
        if self.kinds[j] == "floor" or (not self.centred and self.kinds[j] in ("free", "repeats")):
            return j, float(np.log(value)) if value > 0 else -np.inf, {}
        if self.kinds[j] == "exponent" and self.name != "coupled":
            return j, value, {}
        if self.name == "coupled" and name == "k":
            return j, float(np.log(value)), {}
        raise ValueError(f"{name} of {self.formula} cannot be fixed")

    def starts(self, z_nxV: np.ndarray, y_n: np.ndarray, weights_n: np.ndarray, *, robust: bool, count: int):
        """Starting points [K, P]: those of the simpler law, spread over what this one has more."""
        columns = [self.variables.index(v) for v in self.base.variables]
        rows = z_nxV[:, -1] == 0 if "T" in self.variables else slice(None)  # ID rows alone, where both kinds are
        some = self.base.starts(z_nxV[rows][:, columns], y_n[rows], weights_n[rows], robust=robust, count=count)
        return self.spread(some, z_nxV, y_n)


def get(name: str, variables: tuple[str, ...]) -> "laws.Law | Formula":
    """The law called `name`; ValueError where the name does not go with the variables."""
    name = {"m1": "power0", "m2": "power"}.get(name, name)
    if name in PAIRS and variables == ("N", "D"):
        return PAIRS[name]
    if name in SINGLES and len(variables) == 1:
        return SINGLES[name](variables[0])
    if name == "data-constrained" and variables == ("N", "D", "U"):
        return CONSTRAINED
    if name == "transfer" and variables == ("N", "D", "T"):
        return TRANSFER
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


def _with(levels: Sequence[float]):
    """Starts with one more parameter at each of `levels`."""
    return lambda some, z, y: np.concatenate([np.column_stack([some, np.full(len(some), x)]) for x in levels])


def _drop_floor(some, z, y):
    return some[:, 1:]


PAIR = ("floor", "amplitude", "amplitude", "exponent", "exponent")
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
        "E + (A N^-alpha + B D^-beta)^k", _coupled, _coupled_raw, JOINT, _with((-1.2, 0.0, 1.2)),
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
                base, lambda some, z, y: _with(np.quantile(z, [0.0, 0.3]) + np.array([-2.0, 0.0]))(some, z, y),
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


# --------------------------------------------------------------- repeated data, and transfer to OOD


def _data_constrained(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, log_rd, log_rn = p
    n, d, u = z
    log_g = (jets.log(alpha) + a - jets.log(beta) - b) / (alpha + beta)
    best = (log_g + u) * beta / alpha + log_g  # ln of the size that is compute-optimal for U
    smaller = best.value < n
    useful = best * (1.0 * smaller) + n * (1.0 * ~smaller)
    terms = [_effective(useful, n - useful, log_rn) * -alpha + a]
    terms.append(_effective(log_rd * 0.0 + u, log_rd * 0.0 + (d - u), log_rd) * -beta + b)
    return jets.exp(e) + jets.exp(terms[0]) + jets.exp(terms[1])


def _effective(log_once: Jet, log_times: Jet, log_r: Jet) -> Jet:
    """ln of once (1 + R* (1 - exp(-(times - 1) / R*)))."""
    repeats = jets.exp(log_times) - 1.0
    star = jets.exp(log_r)
    return log_once + jets.log(star * (1.0 - jets.exp(-(repeats / star))) + 1.0)


def _transfer(p: list[Jet], z: list[np.ndarray]) -> Jet:
    e, a, b, alpha, beta, e_ood, k, kappa = p
    log_g = jets.log(jets.exp(a - alpha * z[0]) + jets.exp(b - beta * z[1]))
    centre = jets.log(jets.exp(a) + jets.exp(b))
    ood = z[2] > 0
    at_home = jets.exp(e) + jets.exp(log_g)
    abroad = jets.exp(e_ood) + jets.exp(k + kappa * (log_g - centre))
    return at_home * (1.0 - ood) + abroad * (1.0 * ood)


CONSTRAINED = Formula(
    "data-constrained", ("N", "D", "U"), ("E", "A", "B", "alpha", "beta", "RD", "RN"),
    ("floor", "free", "free", "exponent", "exponent", "repeats", "repeats"),
    "E + A N'^-alpha + B D'^-beta",
    _data_constrained, lambda e, a, b, alpha, beta, rd, rn, *_: [
        np.exp(e), np.exp(a), np.exp(b), alpha, beta, np.exp(rd), np.exp(rn)],
    JOINT, lambda some, z, y: np.concatenate([
        np.column_stack([some[:3], np.full((len(some[:3]), 2), np.log([rd, rn]))])
        for rd in (3.0, 20.0, 120.0) for rn in (2.0, 8.0, 40.0)
    ]), centred=False,
)  # fmt: skip


def _transfer_starts(some: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ID part from the ID rows; OOD part by non-negative least squares for a few exponents kappa."""
    out = []
    ood = z[:, 2] > 0
    for theta in some[:4]:
        e, a, b, alpha, beta = theta
        log_g = np.logaddexp(a - alpha * z[ood, 0], b - beta * z[ood, 1]) - np.logaddexp(a, b)
        for kappa in (0.15, 0.4, 0.8, 1.3):
            basis = np.stack([np.ones(ood.sum()), np.exp(kappa * log_g)], axis=1) / y[ood, None]
            level = np.linalg.lstsq(basis, np.ones(ood.sum()), rcond=None)[0]
            level = np.log(np.maximum(level, 1e-3 * y[ood].min()))
            out.append([e, a, b, alpha, beta, level[0], level[1], kappa])
    return np.array(out)


TRANSFER = Formula(
    "transfer", ("N", "D", "T"), ("E", "A", "B", "alpha", "beta", "Eo", "K", "kappa"),
    (*PAIR, "floor", "amplitude", "exponent"), "E + g; Eo + K g^kappa, g = A N^-alpha + B D^-beta",
    _transfer, lambda e, a, b, alpha, beta, eo, k, kappa, n, d, *_: [
        np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta, np.exp(eo),
        np.exp(k - kappa * np.logaddexp(a, b)), kappa],
    JOINT, _transfer_starts,
)  # fmt: skip
