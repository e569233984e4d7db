"""Scaling laws that are sums of a floor and power terms, with analytic first and second derivatives.

    hoffmann   L = E + A N^-alpha + B D^-beta
    power      L = E + A N^-alpha      or      L = E + B D^-beta      (the variable that varies)
    power0     the same without the floor E

Every law is worked on in centred coordinates: z = ln x - mean(ln x) over the runs, log amplitudes at that
centre, and E = exp(e). Raw amplitudes are almost collinear with their exponents (bootstrap correlation of
ln A with alpha 0.9993 on public data); centred ones are not, and Newton's method then needs a handful of
steps. E, A or B going to zero is a lower bound of its log (`Bounds`), and reaching it is reported, not
hidden.

It does not fit (see `solve`) and does not know about runs, seeds or families. Laws of other kinds are in
`forms`, with the same methods (but `terms`).

Shapes: R replicates (starts or bootstrap draws), n rows, V variables, T terms, P parameters. Invariant: the
order of `theta` is floor (if any), log amplitudes, exponents; `names` gives the raw names in that order.
"""

from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling.starts import grid_starts

AMPLITUDE = {"N": "A", "D": "B"}
EXPONENT = {"N": "alpha", "D": "beta"}

SMALLEST_LOG_SHARE = 25.0  # a term below exp(-25) = 1.4e-11 of the smallest loss counts as zero
EXPONENT_RANGE = (1e-3, 10.0)


@dataclass(frozen=True)
class Bounds:
    """Box of `theta`, each [P]."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Law:
    """A floor and one power term per variable. Build it with `get`."""

    name: str
    variables: tuple[str, ...]
    floor: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Raw parameter names in the order of `theta`."""
        amplitudes = tuple(AMPLITUDE[v] for v in self.variables)
        return ("E",) * self.floor + amplitudes + tuple(EXPONENT[v] for v in self.variables)

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return int(self.floor) + 2 * len(self.variables)

    @property
    def n_terms(self) -> int:
        return int(self.floor) + len(self.variables)

    @property
    def formula(self) -> str:
        """For reading: `E + A N^-alpha + B D^-beta`."""
        power = [f"{AMPLITUDE[v]} {v}^-{EXPONENT[v]}" for v in self.variables]
        return " + ".join(["E"] * self.floor + power)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Role of each parameter: floor, amplitude or exponent."""
        v = len(self.variables)
        return ("floor",) * self.floor + ("amplitude",) * v + ("exponent",) * v

    centred = True  # works in ln x minus its mean
    batch = 512  # replicates at a time, at most
    cheap = True  # the exact Hessian costs little more than its Gauss-Newton part

    def terms(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """Value of every term, [T, R, n], floor first. `z` is ln x minus its centre."""
        t = self.n_terms
        out = np.empty((t, len(theta_RxP), len(z_nxV)))
        if self.floor:
            out[0] = np.exp(theta_RxP[:, :1])
        for v, i in enumerate(range(self.floor, t)):
            np.multiply(-theta_RxP[:, t + v, None], z_nxV[:, v], out=out[i])
            out[i] += theta_RxP[:, i, None]
            np.exp(out[i], out=out[i])
        return out

    def predict(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """Loss, [R, n]."""
        return self.terms(theta_RxP, z_nxV).sum(axis=0)

    def evaluate(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss [R, n] and its gradient [R, P, n]."""
        terms = self.terms(theta_RxP, z_nxV)
        jac = np.concatenate([terms, -z_nxV.T[:, None] * terms[self.floor :]])
        return terms.sum(axis=0), jac.transpose(1, 0, 2)

    def forward(self, theta_RxP: np.ndarray, z_nxV: np.ndarray, curved: bool = True):
        """Loss [R, n], and what `backward` needs: the terms."""
        terms = self.terms(theta_RxP, z_nxV)
        return terms.sum(axis=0), terms

    def aids(self, z_nxV: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same for every theta: products of the variables [n, K], and where in sums over them each entry of
        gradient and Hessian stands.

        Derivatives by a log amplitude are the term, by an exponent -z times the term: so every entry is plus or
        minus a sum over runs of weight x term x term x (1, z or z z).
        """
        t, v = self.n_terms, len(self.variables)
        columns = [np.ones(len(z_nxV)), *z_nxV.T]
        squares = [(i, j) for i in range(v) for j in range(i, v)]
        columns += [z_nxV[:, i] * z_nxV[:, j] for i, j in squares]
        term = np.array([*range(t), *range(self.floor, t)])
        factor = np.array([0] * t + list(range(1, v + 1)))  # column of `columns`
        place = np.zeros((v + 1, v + 1), int)
        place[0, 1:] = place[1:, 0] = np.arange(1, v + 1)
        for k, (i, j) in enumerate(squares):
            place[i + 1, j + 1] = place[j + 1, i + 1] = 1 + v + k
        low, high = np.minimum.outer(term, term), np.maximum.outer(term, term)
        pair = low * t - low * (low - 1) // 2 + high - low  # row of the upper triangle, row by row
        sign = np.where(factor > 0, -1.0, 1.0)
        features = np.stack(columns, axis=1)
        return (
            features,
            term,
            factor,
            sign,
            pair,
            place[factor][:, factor],
            np.outer(sign, sign),
            (np.equal.outer(term, term)),
        )

    def backward(self, terms, pred, z_nxV, aids, pull, bend, metric, *, gauss: bool, curved: bool):
        """Gradient [R, P], Hessian [R, P, P], its Gauss-Newton part and that part's root diagonal [R, P].

        pull [R, n] weighs first derivatives of the residual, bend their squares, metric those of the Gauss-Newton
        part. pred: the loss, where residuals are of ln L; None where they are of L.
        """
        features, term, factor, sign, pair, place, signs, same = aids
        t, (count, n) = self.n_terms, pull.shape
        shares = terms if pred is None else np.divide(terms, pred, out=terms)
        one = curved and bend is metric  # squares of L: the Hessian's first part is the Gauss-Newton part
        gauss, pairs = gauss or one or not curved, t * (t + 1) // 2
        wanted = [(bend, True), (metric, gauss)] if curved and not one else [(metric, True)]
        stack = np.empty((t + sum(pairs if full else t for _, full in wanted), count, n))
        np.multiply(pull, shares, out=stack[:t])
        at = t
        for weight, full in wanted:
            for i in range(t):
                weighted = weight * shares[i]
                for j in range(i, t if full else i + 1):
                    np.multiply(weighted, shares[j], out=stack[at])
                    at += 1
        sums = (stack.reshape(-1, n) @ features).reshape(len(stack), count, -1).transpose(1, 0, 2)
        first, rest = sums[:, :t], sums[:, t:]
        gradient = first[:, term, factor] * sign
        hessian = rest[:, pair, place] * signs if curved else None
        if curved:
            hessian += first[:, term, place] * (signs * same)
        if gauss:
            model = rest[:, -pairs:][:, pair, place] * signs
            scale = np.einsum("rii->ri", model)
        else:
            model = np.zeros_like(hessian)
            scale = rest[:, pairs + term, np.diagonal(place)]
        return gradient, hessian if curved else model, model, np.sqrt(np.maximum(scale, 0.0))

    def raw(self, theta: np.ndarray, centre_V: np.ndarray) -> np.ndarray:
        """Raw parameters [..., P] in the order of `names`: E, A, B and the exponents, for N and D in their
        own units."""
        out = np.array(theta, float)
        t = self.n_terms
        out[..., self.floor : t] += theta[..., t:] * centre_V
        with np.errstate(over="ignore"):  # A = infinity is a truthful answer for an exponent at its upper bound
            out[..., :t] = np.exp(out[..., :t])
        return out

    def bounds(self, y_n: np.ndarray, z_nxV: np.ndarray) -> Bounds:
        """Box that holds every law worth considering for losses `y` (> 0)."""
        t, v = self.n_terms, len(self.variables)
        low = np.full(self.size, np.log(y_n.min()) - SMALLEST_LOG_SHARE)
        high = np.full(self.size, np.log(y_n.max()) + 5.0)
        low[t:], high[t:] = np.repeat(EXPONENT_RANGE[0], v), np.repeat(EXPONENT_RANGE[1], v)
        return Bounds(low, high)

    def edge_words(self, theta: np.ndarray, at_bound: np.ndarray) -> tuple[str, ...]:
        """Words for the parameters on the box's edge, e.g. `("E = 0", "alpha at its upper bound 10")`."""
        words = []
        for i, name in enumerate(self.names):
            if at_bound[i]:
                upper = theta[i] > 0.5 * sum(EXPONENT_RANGE)
                edge = f"upper bound {EXPONENT_RANGE[1]:g}" if upper else f"lower bound {EXPONENT_RANGE[0]:g}"
                words.append(f"{name} = 0" if i < self.n_terms else f"{name} at its {edge}")
        return tuple(words)

    def zeroable(self) -> np.ndarray:
        """Which parameters at their lower bound are exactly zero."""
        return np.arange(self.size) < self.n_terms

    def draw_values(self, theta_BxP: np.ndarray, raw_BxP: np.ndarray, j: int) -> np.ndarray:
        """Draws of raw parameter j [B]: +inf at an exponent's upper bound, NaN for the exponent of a term
        that has vanished, 0 for its amplitude."""
        t = self.n_terms
        level = theta_BxP[:, :t].max(axis=1) - np.log(1e9)
        values = raw_BxP[:, j].copy()
        if j < self.floor:
            return np.where(theta_BxP[:, 0] <= level, 0.0, values)
        v = (j - self.floor) % len(self.variables)
        values[theta_BxP[:, t + v] >= EXPONENT_RANGE[1] - 1e-9] = np.inf
        values[theta_BxP[:, self.floor + v] <= level] = np.nan if j >= t else 0.0
        return values

    def pin(self, name: str, value: float, centre_V: np.ndarray) -> tuple[int, float, dict[int, float]]:
        """`name` fixed at `value` as an affine equation of theta: theta[j] = constant + sum of factor * theta[i]."""
        j, t = self.names.index(name), self.n_terms
        if j >= t:
            return j, value, {}
        log_value = float(np.log(value)) if value > 0 else -np.inf
        return j, log_value, {} if j < self.floor else {t + j - self.floor: -float(centre_V[j - self.floor])}

    def starts(self, z_nxV: np.ndarray, y_n: np.ndarray, weights_n: np.ndarray, *, robust: bool, count: int):
        """Starting points [K, P] from the grid of `starts`."""
        return grid_starts(z_nxV, y_n, weights_n, floor=self.floor, robust=robust, count=count)


def get(name: str, variables: tuple[str, ...]) -> Law:
    """The law called `name` over `variables` (`("N", "D")`, `("N",)` or `("D",)`).

    Raises ValueError where the name does not go with the number of variables.
    """
    if name == "hoffmann" and variables == ("N", "D"):
        return Law(name, variables, floor=True)
    if name in ("power", "power0") and len(variables) == 1:
        return Law(name, variables, floor=name == "power")
    raise ValueError(f"no law {name!r} over {' and '.join(variables) or 'no variable'}")


def design(law: Law, n_params: np.ndarray, n_records: np.ndarray) -> np.ndarray:
    """ln of the law's variables, [n, V]."""
    columns = {"N": n_params, "D": n_records}
    return np.log(np.stack([np.asarray(columns[v], float) for v in law.variables], axis=1))
