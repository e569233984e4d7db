"""A law with some of its parameters fixed or tied, by name: `{"E": 0.3}`, `{"beta": "alpha"}`.

Inside a law parameters are logs and exponents, and fixing or tying a raw one is an affine equation in them
(ln A = a + alpha * centre). So a restricted law is the full one seen through theta_full = constant + free
theta, and its derivatives follow by the chain rule.

Same interface as `laws.Law`, with as many inner parameters as are free; `names` and `raw` stay complete.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling.laws import Bounds


@dataclass(frozen=True)
class Restricted:
    """`full` = `constant` + `free` @ `matrix`; `keep` are the columns of the full theta that stay free."""

    law: object
    constant: np.ndarray
    matrix: np.ndarray  # [F, P]
    keep: np.ndarray
    fixed: tuple[tuple[str, float | str], ...]

    def __getattr__(self, name: str):  # name, variables, names, formula, centred: as the full law has them
        if name.startswith("__") or name == "law":
            raise AttributeError(name)
        return getattr(self.law, name)

    @property
    def size(self) -> int:
        return len(self.keep)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.law.kinds[j] for j in self.keep)

    def whole(self, theta: np.ndarray) -> np.ndarray:
        """theta of the full law, [..., P]."""
        with np.errstate(invalid="ignore"):  # E fixed at 0 is a constant of minus infinity
            return self.constant + theta @ self.matrix

    def evaluate(self, theta_RxF: np.ndarray, z_nxV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pred, jac = self.law.evaluate(self.whole(theta_RxF), z_nxV)
        return pred, np.einsum("fp,rpn->rfn", self.matrix, jac)

    def forward(self, theta_RxF: np.ndarray, z_nxV: np.ndarray, curved: bool = True):
        return self.law.forward(self.whole(theta_RxF), z_nxV, curved)

    def backward(self, *state, gauss: bool, curved: bool):
        gradient, hessian, model, _ = self.law.backward(*state, gauss=True, curved=curved)
        hessian, model = (self.matrix @ h @ self.matrix.T for h in (hessian, model))
        scale = np.sqrt(np.maximum(np.einsum("rii->ri", model), 0.0))
        return gradient @ self.matrix.T, hessian, model, scale

    def predict(self, theta_RxF: np.ndarray, z_nxV: np.ndarray) -> np.ndarray:
        return self.law.predict(self.whole(theta_RxF), z_nxV)

    def raw(self, theta: np.ndarray, centre_V: np.ndarray) -> np.ndarray:
        return self.law.raw(self.whole(theta), centre_V)

    def bounds(self, y_n: np.ndarray, z_nxV: np.ndarray) -> Bounds:
        box = self.law.bounds(y_n, z_nxV)
        return Bounds(box.low[self.keep], box.high[self.keep])

    def edge_words(self, theta: np.ndarray, at_bound: np.ndarray) -> tuple[str, ...]:
        edge = np.zeros(len(self.law.names), bool)
        edge[self.keep] = at_bound
        return self.law.edge_words(self.whole(np.where(np.isfinite(theta), theta, 0.0)), edge)

    def zeroable(self) -> np.ndarray:
        return np.zeros(self.size, bool)  # exp(-25) of the smallest loss is zero enough

    def draw_values(self, theta_BxF: np.ndarray, raw_BxP: np.ndarray, j: int) -> np.ndarray:
        return self.law.draw_values(self.whole(theta_BxF), raw_BxP, j)

    def starts(self, z_nxV: np.ndarray, y_n: np.ndarray, weights_n: np.ndarray, *, robust: bool, count: int):
        some = self.law.starts(z_nxV, y_n, weights_n, robust=robust, count=count)[:, self.keep]
        return some[np.sort(np.unique(some, axis=0, return_index=True)[1])]  # without repeats, in their order


def restrict(law, fixed: Mapping[str, float | str], centre_V: np.ndarray):
    """`law` with raw parameters fixed at numbers or tied to another parameter of the same role.

    Raises ValueError for an unknown name, a tie between different roles, or a parameter that cannot be fixed.
    """
    if not fixed:
        return law
    size = law.size
    equations = {}
    for name, value in fixed.items():
        if name not in law.names or (isinstance(value, str) and value not in law.names):
            raise ValueError(f"{law.formula} has the parameters {', '.join(law.names)}, not {name} = {value}")
        if isinstance(value, str):
            j, i = law.names.index(name), law.names.index(value)
            if law.kinds[j] != law.kinds[i] or law.kinds[j] != "exponent":
                raise ValueError(f"{name} = {value}: exponents can be tied, nothing else")
            equations[j] = (0.0, {i: 1.0})
        else:
            j, constant, factors = law.pin(name, value, centre_V)
            equations[j] = (constant, factors)
    matrix, constant = np.eye(size), np.zeros(size)
    for _ in range(3):  # a fixed amplitude leans on an exponent that may itself be tied or fixed
        for j, (c, factors) in equations.items():
            matrix[:, j] = sum((f * matrix[:, i] for i, f in factors.items()), np.zeros(size))
            constant[j] = c + sum(f * constant[i] for i, f in factors.items())
    keep = np.array([j for j in range(size) if j not in equations], int)
    return Restricted(law, constant, matrix[keep], keep, tuple(fixed.items()))


def whole(law, theta: np.ndarray):
    """The full law and its theta behind a law that may be restricted."""
    return (law.law, law.whole(theta)) if isinstance(law, Restricted) else (law, theta)
