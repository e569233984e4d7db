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

from ecg_jax.scaling.laws import Bounds, Law

CHUNK = 256  # replicates at a time: the working set of one chunk stays in cache
LONGEST_STEP = 3.0  # in log amplitudes; a third of it in exponents would never be felt, they are scaled together
CALM = 1e-9  # relative Newton decrement below which only polishing is left


@dataclass(frozen=True)
class Criterion:
    """sum_i w_i h(r_i / delta), h Huber's function with unit corner; delta = inf: sum_i w_i r_i^2 / 2.

    r = ln L_pred - target where `logarithmic` (targets are ln L), else L_pred - target.
    """

    logarithmic: bool
    delta: float


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
    """Everything at one theta: value, gradient, Hessian, scale (the metric's diagonal) and the residuals'
    norm."""

    theta: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    scale: np.ndarray
    norm: np.ndarray

    def take(self, rows: np.ndarray) -> "_State":
        return _State(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def put(self, rows: np.ndarray, other: "_State", source: np.ndarray) -> None:
        for field in self.__dataclass_fields__:
            getattr(self, field)[rows] = getattr(other, field)[source]


def minimise(
    law: Law,
    z_nxV: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    begin_RxP: np.ndarray,
    bounds: Bounds,
    criterion: Criterion,
    *,
    max_iter: int = 200,
) -> Solved:
    """Minimise from every row of `begin`.

    target, weights: [n] shared by all replicates, or [R, n]. Returns arrays in the order of `begin`.
    """
    parts = []
    for first in range(0, len(begin_RxP), CHUNK):
        rows = slice(first, first + CHUNK)
        t = target if target.ndim == 1 else target[rows]
        w = weights if weights.ndim == 1 else weights[rows]
        parts.append(_minimise(law, z_nxV, t, w, begin_RxP[rows], bounds, criterion, max_iter))
    return Solved(*(np.concatenate([getattr(p, f) for p in parts]) for f in Solved.__dataclass_fields__))


def _minimise(law, z, target, weights, begin, bounds, criterion, max_iter) -> Solved:
    count = len(begin)
    target = np.broadcast_to(target, (count, len(z)))
    weights = np.broadcast_to(weights, (count, len(z)))
    theta = np.clip(begin, bounds.low, bounds.high)
    state = _evaluate(law, z, target, weights, theta, criterion)
    damping = np.full(count, 1e-3)
    calm = np.zeros(count, int)
    iterations = np.zeros(count, int)
    # A sum this small is the rounding of the logarithms: nothing is left to gain.
    size = 1.0 if criterion.logarithmic else np.abs(target).max()
    unit = 1.0 if np.isinf(criterion.delta) else criterion.delta
    rounding = weights.sum(axis=1) * (2e-16 * size / unit) ** 2
    active = np.arange(count)
    for _ in range(max_iter):
        now = state.take(active)
        step, decrement = _newton_step(now, damping[active], bounds)
        trial_theta = np.clip(now.theta + step, bounds.low, bounds.high)
        trial = _evaluate(law, z, target[active], weights[active], trial_theta, criterion)
        quiet = decrement <= CALM * now.value
        limit = np.where(quiet, now.value * (1 + 1e-11), now.value)
        better = np.isfinite(trial.value) & (trial.value <= limit)
        state.put(active[better], trial, better)
        gain = (now.value - trial.value) / np.maximum(decrement, 1e-300)
        damping[active] *= np.where(better, np.where(gain > 0.2, 0.1, 2.0), 10.0)
        iterations[active] += 1
        calm[active] = np.where(quiet, calm[active] + 1, 0)
        done = (calm[active] >= 2) | (damping[active] > 1e12) | (state.value[active] <= rounding[active])
        active = active[~done]
        if not len(active):
            break
    return _finish(state, bounds, calm, iterations, rounding)


def _finish(state: _State, bounds: Bounds, calm, iterations, rounding) -> Solved:
    held = _held(state, bounds)
    gradient = np.where(held, 0.0, state.gradient)
    cosine = np.abs(gradient) / np.maximum(state.scale * state.norm[:, None], 1e-300)
    scaled, _ = _scaled_hessian(state, held)
    diagonal = np.sqrt(np.maximum(np.abs(np.einsum("rii->ri", scaled)), 1e-300))
    unit = scaled / (diagonal[:, :, None] * diagonal[:, None, :])
    curvature = np.linalg.eigvalsh(unit)[:, 0]
    largest = cosine.max(axis=1)
    converged = (calm >= 2) | (state.value <= rounding) | (largest < 1e-6)
    return Solved(state.theta, state.value, largest, curvature, converged, iterations)


def _evaluate(law: Law, z, target, weights, theta, criterion: Criterion) -> _State:
    terms = law.terms(theta, z)
    pred = terms.sum(axis=1)
    jac = law.jacobian(terms, z)
    huber = np.isfinite(criterion.delta)
    delta = criterion.delta if huber else 1.0
    if criterion.logarithmic:
        residual = (np.log(pred) - target) / delta
        jac /= pred[:, None]
    else:
        residual = (pred - target) / delta
    size = np.abs(residual)
    if huber:
        inside = size <= 1.0
        slope = np.clip(residual, -1.0, 1.0)
        value = np.where(inside, 0.5 * residual * residual, size - 0.5)
        bend = weights * inside
        metric = weights / np.maximum(size, 1.0)
    else:
        slope, value = residual, 0.5 * residual * residual
        bend = metric = weights
    pull = weights * slope / delta
    bend = bend / delta**2
    curvature_weight = pull
    if criterion.logarithmic:  # d2 ln L = d2 L / L - (dL / L)(dL / L)^T
        bend = bend - pull
        curvature_weight = pull / pred
    hessian = (jac * bend[:, None]) @ jac.transpose(0, 2, 1)
    hessian += law.curvature(terms, z, curvature_weight)
    # Largest possible gradient for residuals of this size: the denominators of the cosine test.
    norm = np.sqrt((weights * slope * slope * np.maximum(size, 1.0) if huber else weights * slope * slope).sum(1))
    scale = np.sqrt(((jac * jac) * metric[:, None]).sum(axis=2)) / delta
    gradient = (jac * pull[:, None]).sum(axis=2)
    return _State(theta, (weights * value).sum(axis=1), gradient, hessian, scale, norm)


def _held(state: _State, bounds: Bounds) -> np.ndarray:
    """[R, P]: on the edge of the box, with the gradient pointing outward."""
    at_low = (state.theta <= bounds.low + 1e-12) & (state.gradient >= 0)
    at_high = (state.theta >= bounds.high - 1e-12) & (state.gradient <= 0)
    return at_low | at_high


def _scaled_hessian(state: _State, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(state.scale, 1e-14 * state.scale.max(axis=1, keepdims=True) + 1e-300)
    scaled = state.hessian / (scale[:, :, None] * scale[:, None, :])
    mask = held[:, :, None] | held[:, None, :]
    return np.where(mask, np.eye(scaled.shape[1]), scaled), scale


def _newton_step(state: _State, damping: np.ndarray, bounds: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Step [R, P] and the decrease it promises [R]."""
    held = _held(state, bounds)
    scaled, scale = _scaled_hessian(state, held)
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
