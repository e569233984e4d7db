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
FEW = 50  # replicates; below it one call of LAPACK for each is quicker than all of them side by side
SMALLEST_PIVOT = 1e-11  # of the scaled Hessian; below it eigenvalues are looked at one by one
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
        near = np.minimum(size, 1.0)
        value, inside, weight = near * (size - 0.5 * near), (size <= 1.0).astype(float), 1.0 / np.maximum(size, 1.0)
        slope = u * weight
        if self.tilt == 0.5:
            return value, slope, inside, weight
        side = 2.0 * np.where(u > 0, 1.0 - self.tilt, self.tilt)
        return side * value, side * slope, side * inside, side * weight


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
    """Everything at one theta: value, gradient, Hessian, its Gauss-Newton part (zeros where it was not asked for),
    scale (the metric's diagonal) and the residuals' norm."""

    theta: np.ndarray
    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    gauss: np.ndarray
    scale: np.ndarray
    norm: np.ndarray

    def take(self, rows: np.ndarray) -> "_State":
        return _State(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def put(self, rows: np.ndarray, other: "_State", source: np.ndarray | slice = slice(None)) -> None:
        for field in self.__dataclass_fields__:
            getattr(self, field)[rows] = getattr(other, field)[source]


class _Problem:
    """What stays the same over all steps: law, data and criterion; evaluates any of the replicates, a cache-sized
    number at a time."""

    def __init__(self, law, z, target, weights, criterion: Criterion, curved: bool):
        self.law, self.z, self.criterion, self.curved = law, z, criterion, curved
        self.target, self.weights = target, weights
        self.aids = law.aids(z)
        self.chunk = max(16, min(law.batch, CACHE // len(z)))

    def at(self, theta: np.ndarray, rows: np.ndarray, *, gauss: bool = False) -> _State:
        """State of the replicates `rows` at their `theta`."""
        parts = [slice(i, i + self.chunk) for i in range(0, len(rows), self.chunk)]
        states = [self._chunk(theta[part], rows[part], gauss) for part in parts]
        if len(states) == 1:
            return states[0]
        return _State(*(np.concatenate([getattr(s, f) for s in states]) for f in _State.__dataclass_fields__))

    def _chunk(self, theta: np.ndarray, rows: np.ndarray, gauss: bool) -> _State:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self._evaluate(theta, rows, gauss)

    def _evaluate(self, theta: np.ndarray, rows: np.ndarray, gauss: bool) -> _State:
        criterion, law = self.criterion, self.law
        target = self.target if self.target.ndim == 1 else self.target[rows]
        weights = self.weights if self.weights.ndim == 1 else self.weights[rows]
        pred, inside = law.forward(theta, self.z, self.curved)
        delta = criterion.delta if np.isfinite(criterion.delta) else 1.0
        residual = np.log(pred) if criterion.logarithmic else np.array(pred)
        residual -= target
        residual *= 1.0 / delta
        value, slope, bend, metric = criterion.shape(residual)
        total = (weights * value).sum(axis=1)
        pull = weights * slope
        # Largest possible gradient for residuals of this size: the denominators of the cosine test.
        norm = np.sqrt((pull * residual).sum(axis=1))
        pull *= 1.0 / delta
        metric = weights * metric * (1.0 / delta**2)
        bend = metric if bend is metric else weights * bend * (1.0 / delta**2)
        if criterion.logarithmic and self.curved:  # d2 ln L = d2 L / L - (dL / L)(dL / L)^T
            bend = bend - pull
        gradient, hessian, model, scale = law.backward(
            inside, pred if criterion.logarithmic else None, self.z, self.aids, pull, bend, metric,
            gauss=gauss, curved=self.curved,
        )  # fmt: skip
        sound = np.isfinite(gradient).all(axis=1) & np.isfinite(hessian).all(axis=(1, 2)) & np.isfinite(total)
        if not sound.all():  # never stepped to
            total = np.where(sound, total, np.inf)
            gradient, hessian, model, scale = map(np.nan_to_num, (gradient, hessian, model, scale))
        return _State(theta, total, gradient, hessian, model, scale, norm)


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
    race: bool = False,
    hold: int | None = None,
) -> Solved:
    """Minimise from every row of `begin`.

    target, weights: [n] shared by all replicates, or [R, n]. stall: relative gain over `STALL` steps below which
    a replicate is left. curved: False leaves second derivatives of the law out. polish: steps still taken once
    all is quiet. Returns arrays in the order of `begin`.
    """
    count = len(begin_RxP)
    problem = _Problem(law, z_nxV, target, weights, criterion, curved)
    active = np.arange(count)
    now = problem.at(np.clip(begin_RxP, bounds.low, bounds.high), active)
    final = now.take(active)
    damping = np.full(count, 1e-3)
    bent = np.ones(count, bool)  # True: exact Hessian; False: its Gauss-Newton part
    calm = np.zeros(count, int)
    arrived = np.zeros(count, bool)
    iterations = np.zeros(count, int)
    # A sum this small is the rounding of the logarithms: nothing is left to gain.
    size = 1.0 if criterion.logarithmic else np.abs(target).max()
    unit = 1.0 if np.isinf(criterion.delta) else criterion.delta
    rounding = np.broadcast_to(weights.sum(axis=-1) * (2e-16 * size / unit) ** 2, count)
    earlier = now.value.copy()
    for turn in range(1, max_iter + 1):
        late = turn > PATIENT
        if turn == PATIENT + 1 and not np.any(now.gauss):
            now.gauss = problem.at(now.theta, active, gauss=True).gauss
        step, decrement = _newton_step(now, damping, bounds, bent, hold)
        trial = problem.at(np.clip(now.theta + step, bounds.low, bounds.high), active, gauss=late)
        quiet = decrement <= CALM * now.value
        limit = np.where(quiet, now.value * (1 + 1e-11), now.value)
        better = np.isfinite(trial.value) & (trial.value <= limit)
        with np.errstate(invalid="ignore"):
            gain = (now.value - trial.value) / np.maximum(decrement, 1e-300)
        if better.all():
            now = trial
        else:
            now.put(better, trial, better)
        damping = damping * _damping(better, gain, late)
        # In a bent valley one of the two models of the bottom serves and the other does not.
        if late:
            bent = np.where(better & (gain > 0.2) & (gain < 5.0) & ~quiet, bent, ~bent) | quiet
        calm = np.where(quiet, calm + 1, 0)
        done = (calm >= polish) | (damping > 1e12) | (now.value <= rounding[active])
        if turn % STALL == 0:  # a valley so flat that nothing is to be had; the certificate shows its gradient
            won = earlier - now.value
            done |= won <= stall * now.value
            if race and arrived.any():
                done |= won < 0.1 * (now.value - final.value[arrived].min())
            earlier = now.value.copy()
        if turn == max_iter:
            done[:] = True
        if done.any():
            rows = active[done]
            final.put(rows, now, done)
            iterations[rows], arrived[rows] = turn, calm[done] >= polish
            go = ~done
            if not go.any():
                break
            now, active = now.take(go), active[go]
            damping, bent, calm, earlier = damping[go], bent[go], calm[go], earlier[go]
    return _finish(final, bounds, hold, arrived, iterations, rounding)


def _damping(better: np.ndarray, gain: np.ndarray, late: bool) -> np.ndarray:
    """Factor of the damping: bold at first; in a long valley a step that merely served is not made bolder."""
    if late:
        return np.where(better, np.where(gain > 0.75, 0.1, np.where(gain > 0.25, 1.0, 2.0)), 3.0)
    return np.where(better, np.where(gain > 0.2, 0.1, 2.0), 10.0)


def _finish(state: _State, bounds: Bounds, hold, arrived, iterations, rounding) -> Solved:
    held = _held(state, bounds, hold)
    gradient = np.where(held, 0.0, state.gradient)
    cosine = np.abs(gradient) / np.maximum(state.scale * state.norm[:, None], 1e-300)
    scaled, _ = _scaled_hessian(state, held, np.ones(len(held), bool))
    diagonal = np.sqrt(np.maximum(np.abs(np.einsum("rii->ri", scaled)), 1e-300))
    unit = scaled / (diagonal[:, :, None] * diagonal[:, None, :])
    curvature = np.linalg.eigvalsh(unit)[:, 0]
    largest = cosine.max(axis=1)
    converged = arrived | (state.value <= rounding) | (largest < 1e-6)
    return Solved(state.theta, state.value, largest, curvature, converged, iterations)


def _held(state: _State, bounds: Bounds, hold: int | None) -> np.ndarray:
    """[R, P]: on the edge of the box, with the gradient pointing outward."""
    at_low = (state.theta <= bounds.low + 1e-12) & (state.gradient >= 0)
    at_high = (state.theta >= bounds.high - 1e-12) & (state.gradient <= 0)
    held = at_low | at_high
    if hold is not None:
        held[:, hold] = True
    return held


def _scaled_hessian(state: _State, held: np.ndarray, bent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(state.scale, 1e-14 * state.scale.max(axis=1, keepdims=True) + 1e-300)
    scaled = np.where(bent[:, None, None], state.hessian, state.gauss) / (scale[:, :, None] * scale[:, None, :])
    mask = held[:, :, None] | held[:, None, :]
    return np.where(mask, np.eye(scaled.shape[1]), scaled), scale


def _newton_step(
    state: _State, damping: np.ndarray, bounds: Bounds, bent: np.ndarray, hold: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Step [R, P] and the decrease it promises [R]."""
    held = _held(state, bounds, hold)
    scaled, scale = _scaled_hessian(state, held, bent)
    gradient = np.where(held, 0.0, state.gradient) / scale
    # mu below 1e-8 would only blur the quadratic end game.
    mu = np.where(damping > 1e-8, damping, 0.0)
    step, sound = _cholesky_step(scaled, mu, gradient)
    if not sound.all():
        odd = ~sound
        values, vectors = np.linalg.eigh(scaled[odd])
        along = np.einsum("rij,ri->rj", vectors, gradient[odd])
        positive = np.maximum(np.abs(values), 1e-13) + mu[odd, None]
        step[odd] = np.einsum("rij,rj->ri", vectors, along / positive)
    decrement = (step * gradient).sum(axis=1)
    step = -step / scale
    shrink = np.minimum(1.0, LONGEST_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))
    return step * shrink[:, None], decrement * shrink


def _cholesky_step(scaled: np.ndarray, mu: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scaled + mu)^-1 gradient [R, P], all replicates at once, and where that matrix is safely positive [R]."""
    size = scaled.shape[1]
    if len(scaled) < FEW:
        matrix = scaled + mu[:, None, None] * np.eye(size)
        try:
            np.linalg.cholesky(matrix)
            return np.linalg.solve(matrix, gradient[:, :, None])[:, :, 0], np.ones(len(scaled), bool)
        except np.linalg.LinAlgError:  # one of them is not positive
            return np.zeros_like(gradient), np.zeros(len(scaled), bool)
    a = scaled.transpose(1, 2, 0).copy()  # replicates last: every operation runs over all of them
    a[np.arange(size), np.arange(size)] += mu
    x = gradient.T.copy()
    sound = np.ones(len(scaled), bool)
    with np.errstate(all="ignore"):
        for k in range(size):  # Gauss without exchange of rows: as stable as Cholesky where all pivots are positive
            sound &= a[k, k] > SMALLEST_PIVOT
            factor = a[k + 1 :, k] / a[k, k]
            a[k + 1 :, k + 1 :] -= factor[:, None] * a[k, k + 1 :][None]
            x[k + 1 :] -= factor * x[k]
        for k in range(size - 1, -1, -1):
            x[k] = (x[k] - (a[k, k + 1 :] * x[k + 1 :]).sum(axis=0)) / a[k, k]
    return x.T.copy(), sound & np.isfinite(x).all(axis=0)
