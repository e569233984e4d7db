"""Damped Newton minimisation of a robust or Gaussian criterion, one batch of replicates at a time.

A replicate is a start or a bootstrap draw: its own weights, its own targets or both. All of them advance
together in NumPy; those that have arrived leave the batch. The Hessian is exact (Huber's kink taken as its
generalised derivative), scaled by the diagonal of the reweighted Gauss-Newton matrix, its eigenvalues made
positive, and damped until the sum goes down.

It keeps `theta` inside the law's box: a parameter on the edge whose gradient points outward is held there.
It does not choose starts (`starts`) or judge the optimum (`solve`). Deterministic. Invariant: the objective
of a replicate never rises by more than rounding from one accepted step to the next.
"""

from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling.laws import Bounds

LONGEST_STEP = 3.0  # in log amplitudes; a third of it in exponents would never be felt, they are scaled together
CACHE = 16384  # replicates x rows at a time: the working set stays in cache
STUDENT = 4.0  # degrees of freedom of the Student criterion
PATIENT = 12  # steps with the exact Hessian alone; most replicates have arrived by then
STALL = 20  # steps after which a replicate that has gained next to nothing is left where it is
CALM = 1e-9  # relative Newton decrement below which only polishing is left


@dataclass(frozen=True)
class Criterion:
    """sum_i w_i h(r_i / delta), h Huber's function with unit corner; delta = inf: sum_i w_i r_i^2 / 2.

    r = ln L_pred - target where `logarithmic` (targets are ln L), else L_pred - target, and then delta is inf.
    student: h is Student's log density with 4 degrees of freedom instead. tilt: share of the weight that
    residuals above the target (r < 0) keep; 0.5 is symmetric, less draws the law towards the lower envelope.
    """

    logarithmic: bool
    delta: float
    student: bool = False
    tilt: float = 0.5

    def shape(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """h(u), h'(u), h''(u) and the weight h'(u)/u of reweighted least squares."""
        if self.student:
            below = STUDENT + u * u
            weight = (STUDENT + 1.0) / below
            value = 0.5 * (STUDENT + 1.0) * np.log1p(u * u / STUDENT)
            return value, weight * u, weight * (STUDENT - u * u) / below, weight
        if np.isinf(self.delta):
            one = np.ones_like(u)
            return 0.5 * u * u, u, one, one
        size = np.abs(u)
        inside = size <= 1.0
        side = 1.0 if self.tilt == 0.5 else 2.0 * np.where(u > 0, 1.0 - self.tilt, self.tilt)
        value = np.where(inside, 0.5 * u * u, size - 0.5)
        return side * value, side * np.clip(u, -1.0, 1.0), side * inside, side / np.maximum(size, 1.0)


@dataclass(frozen=True)
class Solved:
    """Where each replicate ended: theta [R, P], objective [R] (in units of `Criterion`), and its
    certificate."""

    theta: np.ndarray
    objective: np.ndarray
    scaled_gradient: np.ndarray
    smallest_curvature: np.ndarray
    converged: np.ndarray
    iterations: np.ndarray


@dataclass
class _State:
    """Everything at one theta: value, gradient, Hessian, its Gauss-Newton part, scale (the metric's diagonal)
    and the residuals' norm."""

    theta: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    gauss: np.ndarray  # the reweighted Gauss-Newton matrix
    scale: np.ndarray
    norm: np.ndarray

    def take(self, rows: np.ndarray) -> "_State":
        return _State(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def put(self, rows: np.ndarray, other: "_State", source: np.ndarray) -> None:
        for field in self.__dataclass_fields__:
            getattr(self, field)[rows] = getattr(other, field)[source]


def minimise(
    law,
    z_nxV: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    begin_RxP: np.ndarray,
    bounds: Bounds,
    criterion: Criterion,
    *,
    max_iter: int = 200,
    stall: float = 1e-7,
    curved: bool = True,
    polish: int = 2,
) -> Solved:
    """Minimise from every row of `begin`.

    target, weights: [n] shared by all replicates, or [R, n]. stall: relative gain over `STALL` steps below which
    a replicate is left. curved: False leaves second derivatives of the law out. polish: steps still taken once
    all is quiet. Returns arrays in the order of `begin`.
    """
    parts = []
    size = max(16, min(law.batch, CACHE // len(z_nxV)))
    for first in range(0, len(begin_RxP), size):
        rows = slice(first, first + size)
        t = target if target.ndim == 1 else target[rows]
        w = weights if weights.ndim == 1 else weights[rows]
        parts.append(_minimise(law, z_nxV, t, w, begin_RxP[rows], bounds, criterion, max_iter, stall, curved, polish))
    return Solved(*(np.concatenate([getattr(p, f) for p in parts]) for f in Solved.__dataclass_fields__))


def _minimise(law, z, target, weights, begin, bounds, criterion, max_iter, stall, curved, polish) -> Solved:
    count = len(begin)
    target = np.broadcast_to(target, (count, len(z)))
    weights = np.broadcast_to(weights, (count, len(z)))
    theta = np.clip(begin, bounds.low, bounds.high)
    state = _evaluate(law, z, target, weights, theta, criterion, curved=curved)
    damping = np.full(count, 1e-3)
    bent = np.ones(count, bool)  # True: exact Hessian; False: its Gauss-Newton part
    calm = np.zeros(count, int)
    iterations = np.zeros(count, int)
    # A sum this small is the rounding of the logarithms: nothing is left to gain.
    size = 1.0 if criterion.logarithmic else np.abs(target).max()
    unit = 1.0 if np.isinf(criterion.delta) else criterion.delta
    rounding = weights.sum(axis=1) * (2e-16 * size / unit) ** 2
    active = np.arange(count)
    earlier = state.value.copy()
    for turn in range(1, max_iter + 1):
        late = turn > PATIENT
        if turn == PATIENT + 1:
            again = _evaluate(
                law, z, target[active], weights[active], state.theta[active], criterion, gauss=True, curved=curved
            )
            state.gauss[active] = again.gauss
        now = state.take(active)
        step, decrement = _newton_step(now, damping[active], bounds, bent[active])
        trial_theta = np.clip(now.theta + step, bounds.low, bounds.high)
        trial = _evaluate(law, z, target[active], weights[active], trial_theta, criterion, gauss=late, curved=curved)
        quiet = decrement <= CALM * now.value
        limit = np.where(quiet, now.value * (1 + 1e-11), now.value)
        better = np.isfinite(trial.value) & (trial.value <= limit)
        state.put(active[better], trial, better)
        gain = (now.value - trial.value) / np.maximum(decrement, 1e-300)
        damping[active] *= _damping(better, gain, late)
        # In a bent valley one of the two models of the bottom serves and the other does not.
        if late:
            bent[active] = np.where(better & (gain > 0.2) & (gain < 5.0) & ~quiet, bent[active], ~bent[active])
            bent[active[quiet]] = True
        iterations[active] += 1
        calm[active] = np.where(quiet, calm[active] + 1, 0)
        done = (calm[active] >= polish) | (damping[active] > 1e12) | (state.value[active] <= rounding[active])
        if turn % STALL == 0:  # a valley so flat that nothing is to be had; the certificate shows its gradient
            done |= earlier[active] - state.value[active] <= stall * state.value[active]
            earlier[active] = state.value[active]
        active = active[~done]
        if not len(active):
            break
    return _finish(state, bounds, calm >= polish, iterations, rounding)


def _damping(better: np.ndarray, gain: np.ndarray, late: bool) -> np.ndarray:
    """Factor of the damping: bold at first; in a long valley a step that merely served is not made bolder."""
    if late:
        return np.where(better, np.where(gain > 0.75, 0.1, np.where(gain > 0.25, 1.0, 2.0)), 3.0)
    return np.where(better, np.where(gain > 0.2, 0.1, 2.0), 10.0)


def _finish(state: _State, bounds: Bounds, arrived, iterations, rounding) -> Solved:
    held = _held(state, bounds)
    gradient = np.where(held, 0.0, state.gradient)
    cosine = np.abs(gradient) / np.maximum(state.scale * state.norm[:, None], 1e-300)
    scaled, _ = _scaled_hessian(state, held, np.ones(len(held), bool))
    diagonal = np.sqrt(np.maximum(np.abs(np.einsum("rii->ri", scaled)), 1e-300))
    unit = scaled / (diagonal[:, :, None] * diagonal[:, None, :])
    curvature = np.linalg.eigvalsh(unit)[:, 0]
    largest = cosine.max(axis=1)
    converged = arrived | (state.value <= rounding) | (largest < 1e-6)
    return Solved(state.theta, state.value, largest, curvature, converged, iterations)


def _evaluate(law, z, target, weights, theta, criterion: Criterion, gauss: bool = False, curved: bool = True) -> _State:
    pred, jac, state = law.evaluate(theta, z, curved)
    delta = criterion.delta if np.isfinite(criterion.delta) else 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        residual = ((np.log(pred) if criterion.logarithmic else pred) - target) / delta
    if criterion.logarithmic:
        jac /= pred[:, None]
    value, slope, bend, metric = criterion.shape(residual)
    metric = weights * metric
    pull = weights * slope / delta
    bend = weights * bend / delta**2
    plain = not criterion.logarithmic  # squares of L: bend, metric and weights are one
    model = (jac * (metric / delta**2)[:, None]) @ jac.transpose(0, 2, 1) if gauss or plain or not curved else None
    if model is not None:
        scale = np.sqrt(np.maximum(np.einsum("rii->ri", model), 0.0))
    else:
        scale = np.sqrt(((jac * jac) * metric[:, None]).sum(axis=2)) / delta
    if not curved:
        hessian = model
    elif plain:
        hessian = model + law.curvature(state, z, pull)
    else:  # d2 ln L = d2 L / L - (dL / L)(dL / L)^T
        hessian = (jac * (bend - pull)[:, None]) @ jac.transpose(0, 2, 1)
        hessian += law.curvature(state, z, pull / pred)
        model = hessian if model is None else model
    # Largest possible gradient for residuals of this size: the denominators of the cosine test.
    norm = np.sqrt((pull * residual * delta).sum(axis=1))
    gradient = (jac @ pull[:, :, None])[:, :, 0]
    total = (weights * value).sum(axis=1)
    sound = np.isfinite(gradient).all(axis=1) & np.isfinite(hessian).all(axis=(1, 2)) & np.isfinite(total)
    if not sound.all():  # never stepped to
        total = np.where(sound, total, np.inf)
        gradient, hessian, model, scale = map(np.nan_to_num, (gradient, hessian, model, scale))
    return _State(theta, total, gradient, hessian, model, scale, norm)


def _held(state: _State, bounds: Bounds) -> np.ndarray:
    """[R, P]: on the edge of the box, with the gradient pointing outward."""
    at_low = (state.theta <= bounds.low + 1e-12) & (state.gradient >= 0)
    at_high = (state.theta >= bounds.high - 1e-12) & (state.gradient <= 0)
    return at_low | at_high


def _scaled_hessian(state: _State, held: np.ndarray, bent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(state.scale, 1e-14 * state.scale.max(axis=1, keepdims=True) + 1e-300)
    scaled = np.where(bent[:, None, None], state.hessian, state.gauss) / (scale[:, :, None] * scale[:, None, :])
    mask = held[:, :, None] | held[:, None, :]
    return np.where(mask, np.eye(scaled.shape[1]), scaled), scale


def _newton_step(state: _State, damping: np.ndarray, bounds: Bounds, bent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step [R, P] and the decrease it promises [R]."""
    held = _held(state, bounds)
    scaled, scale = _scaled_hessian(state, held, bent)
    values, vectors = np.linalg.eigh(scaled)
    gradient = np.where(held, 0.0, state.gradient) / scale
    along = np.einsum("rij,ri->rj", vectors, gradient)
    # mu below 1e-8 would only blur the quadratic end game.
    mu = np.where(damping > 1e-8, damping, 0.0)
    positive = np.maximum(np.abs(values), 1e-13) + mu[:, None]
    step = -np.einsum("rij,rj->ri", vectors, along / positive) / scale
    decrement = (along * along / positive).sum(axis=1)
    shrink = np.minimum(1.0, LONGEST_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))
    return step * shrink[:, None], decrement * shrink
