"""Scaling laws that are sums of a floor and power terms, with analytic first and second derivatives.

    hoffmann   L = E + A N^-alpha + B D^-beta
    power      L = E + A N^-alpha      or      L = E + B D^-beta      (the variable that varies)
    power0     the same without the floor E

Every law is worked on in centred coordinates: z = ln x - mean(ln x) over the runs, log amplitudes at that
centre, and E = exp(e). Raw amplitudes are almost collinear with their exponents (bootstrap correlation of
ln A with alpha 0.9993 on public data); centred ones are not, and Newton's method then needs a handful of
steps. E, A or B going to zero is a lower bound of its log (`Bounds`), and reaching it is reported, not
hidden.

It does not fit (see `solve`) and does not know about runs, seeds or families. A law of another kind needs
the same methods (`terms` only where it is such a sum): `predict`, `jacobian`, `curvature`, `raw`,
`centred`, `bounds`.

Shapes: R replicates (starts or bootstrap draws), n rows, V variables, T terms, P parameters. Invariant: the
order of `theta` is floor (if any), log amplitudes, exponents; `names` gives the raw names in that order.
"""

from dataclasses import dataclass

import numpy as np

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

    def terms(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """Value of every term, [R, T, n], floor first. `z` is ln x minus its centre."""
        t = self.n_terms
        log_terms = np.repeat(theta_RxP[:, :t, None], len(z_nxV), axis=2)
        log_terms[:, self.floor :] -= theta_RxP[:, t:, None] * z_nxV.T[None]
        return np.exp(log_terms)

    def predict(self, theta_RxP: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """Loss, [R, n]."""
        return self.terms(theta_RxP, z_nxV).sum(axis=1)

    def jacobian(self, terms_RxTxn: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        """dL / dtheta from the terms, [R, P, n]."""
        return np.concatenate([terms_RxTxn, -z_nxV.T[None] * terms_RxTxn[:, self.floor :]], axis=1)

    def curvature(self, terms_RxTxn: np.ndarray, z_nxV: np.ndarray, weight_Rxn: np.ndarray) -> np.ndarray:
        """sum_i weight_i d2 L_i / dtheta2, [R, P, P] (block by term: each term holds two parameters at
        most)."""
        out = np.zeros((len(terms_RxTxn), self.size, self.size))
        weighted = weight_Rxn[:, None, :] * terms_RxTxn
        first = weighted.sum(axis=2)
        for term in range(self.n_terms):
            out[:, term, term] = first[:, term]
        for v in range(len(self.variables)):
            term, slope = self.floor + v, self.n_terms + v
            z = z_nxV[:, v]
            out[:, term, slope] = out[:, slope, term] = -(weighted[:, term] @ z)
            out[:, slope, slope] = weighted[:, term] @ (z * z)
        return out

    def raw(self, theta: np.ndarray, centre_V: np.ndarray) -> np.ndarray:
        """Raw parameters [..., P] in the order of `names`: E, A, B and the exponents, for N and D in their
        own units."""
        out = np.array(theta, float)
        t = self.n_terms
        out[..., self.floor : t] += theta[..., t:] * centre_V
        with np.errstate(over="ignore"):  # A = infinity is a truthful answer for an exponent at its upper bound
            out[..., :t] = np.exp(out[..., :t])
        return out

    def centred(self, raw: np.ndarray, centre_V: np.ndarray) -> np.ndarray:
        """Inverse of `raw`. Zero amplitudes become minus infinity."""
        raw = np.asarray(raw, float)
        out = raw.copy()
        t = self.n_terms
        with np.errstate(divide="ignore"):
            out[..., :t] = np.log(raw[..., :t])
        out[..., self.floor : t] -= raw[..., t:] * centre_V
        return out

    def bounds(self, y_n: np.ndarray) -> Bounds:
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


LATER = ("kaplan", "kaplan0", "coupled", "shifted", "broken", "m1", "m2", "m3", "m4", "data-constrained")


def get(name: str, variables: tuple[str, ...]) -> Law:
    """The law called `name` over `variables` (`("N", "D")`, `("N",)` or `("D",)`).

    Raises ValueError where the name does not go with the number of variables; names of later versions are
    in `LATER`.
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
