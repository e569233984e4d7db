"""Numbers that carry their exact first and second derivatives with respect to a law's parameters.

A `Jet` holds a value, its gradient and its Hessian; sums, products, quotients, `exp`, `log` and `softplus` carry
all three along by the rules of calculus, so a law written once as a formula has its analytic Jacobian and
Hessian. No finite differences, no tape, no automatic-differentiation package.

Shapes: R replicates, n rows, P parameters: value [R, n], slope [R, P, n], bend [R, P, P, n]; any axis may be 1
(it broadcasts), and `bend` None is zero. Invariant: a jet is never changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Jet:
    value: np.ndarray
    slope: np.ndarray
    bend: np.ndarray | None = None
    curved: bool = True  # False: second derivatives are left out from here on

    __array_ufunc__ = None  # NumPy arrays on the left leave the operation to us

    def __add__(self, other: Jet | np.ndarray | float) -> Jet:
        if not isinstance(other, Jet):
            return Jet(self.value + other, self.slope, self.bend, self.curved)
        return Jet(self.value + other.value, self.slope + other.slope, _plus(self.bend, other.bend), self.curved)

    __radd__ = __add__

    def __neg__(self) -> Jet:
        return self * -1.0

    def __sub__(self, other: Jet | np.ndarray | float) -> Jet:
        return self + (-other)

    def __rsub__(self, other: np.ndarray | float) -> Jet:
        return -self + other

    def __mul__(self, other: Jet | np.ndarray | float) -> Jet:
        if not isinstance(other, Jet):
            factor = np.atleast_2d(other)
            bend = None if self.bend is None else self.bend * factor[:, None, None]
            return Jet(self.value * factor, self.slope * factor[:, None], bend, self.curved)
        a, b = self.value, other.value
        slope = self.slope * b[:, None] + other.slope * a[:, None]
        if not self.curved:
            return Jet(a * b, slope, None, False)
        cross = self.slope[:, :, None] * other.slope[:, None]
        bend = _plus(_scaled(self.bend, b), _scaled(other.bend, a))
        return Jet(a * b, slope, _plus(bend, cross + cross.transpose(0, 2, 1, 3)))

    __rmul__ = __mul__

    def __truediv__(self, other: Jet | np.ndarray | float) -> Jet:
        return self * (other.through(1 / other.value, -(other.value**-2), 2 * other.value**-3)
                       if isinstance(other, Jet) else 1.0 / np.asarray(other))  # fmt: skip

    def through(self, value: np.ndarray, first: np.ndarray, second: np.ndarray) -> Jet:
        """f(self), from f and its two derivatives at the value."""
        bend = _scaled(self.bend, first)
        if self.curved and np.any(second):
            bend = _plus(bend, second[:, None, None] * self.slope[:, :, None] * self.slope[:, None])
        return Jet(value, self.slope * first[:, None], bend, self.curved)


def _plus(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a + b


def _scaled(bend: np.ndarray | None, factor: np.ndarray) -> np.ndarray | None:
    return None if bend is None else bend * factor[:, None, None]


def exp(x: Jet) -> Jet:
    value = np.exp(x.value)
    return x.through(value, value, value)


def log(x: Jet) -> Jet:
    return x.through(np.log(x.value), 1 / x.value, -(x.value**-2))


def softplus(x: Jet) -> Jet:
    """ln(1 + e^x), without overflow."""
    share = np.exp(-np.logaddexp(0.0, -x.value))
    return x.through(np.logaddexp(0.0, x.value), share, share * (1.0 - share))


def parameters(theta_RxP: np.ndarray, curved: bool = True) -> list[Jet]:
    """One jet per column of `theta`: value [R, 1], gradient a unit vector."""
    unit = np.eye(theta_RxP.shape[1])[None, :, :, None]
    return [Jet(theta_RxP[:, [i]], unit[:, :, i], None, curved) for i in range(theta_RxP.shape[1])]
