"""What a law written as one formula is: parameters with their roles, exact derivatives, bounds, starts.

Each law is written once with `jets`, which carry its exact gradient and Hessian. Inside, parameters are those that
the data determine nearly independently of each other: excess at the design's centre, effective exponents, logs of
scales; `raw` turns them into the formula's own.

Same interface as `laws.Law`; the laws themselves stand in `forms` and `relations`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling import jets, laws
from ecg_jax.scaling.jets import Jet
from ecg_jax.scaling.laws import EXPONENT_RANGE, SMALLEST_LOG_SHARE, Bounds

JOINT = laws.get("hoffmann", ("N", "D"))
LOG_K, LOG_F, LOG_Q = (np.log(0.05), np.log(20.0)), (np.log(0.05), np.log(3.0)), (np.log(0.05), np.log(20.0))
PAIR = ("floor", "amplitude", "amplitude", "exponent", "exponent")
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
            "k": LOG_K, "f": LOG_F, "q": LOG_Q, "repeats": REPEATS, "c": (-5.0, 7.0), "ratio": (-12.0, 12.0),
            "below": (z.min() - 12.0, z.min() - 1e-7),
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
        if self.kinds[j] == "c":
            return j, value, {}
        if self.kinds[j] == "below":  # a floor of the other loss, inside relative to its centre
            return j, float(np.log(value)) - float(centre_V[0]) if value > 0 else -np.inf, {}
        if self.kinds[j] in ("floor", "ratio") or (not self.centred and self.kinds[j] in ("free", "repeats")):
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


def with_levels(levels: Sequence[float]):
    """Starts with one more parameter at each of `levels`."""
    return lambda some, z, y: np.concatenate([np.column_stack([some, np.full(len(some), x)]) for x in levels])
