"""The `logistic` probe: L2-penalised logistic regressions of all labels, settings of C and subsets of patients at once.

One column is one regression: a label, a C, a subset of the training records. Minimised is the mean BCE over its known
records plus |w|^2 / (2 C n), n being their number, the bias free: scikit-learn's objective over C n. All columns share
two matrix products a step. Features are turned into their principal axes first, where the curvature is nearly
diagonal, and scaled by it; L-BFGS then needs some tens of steps at any C. Float32 goes as far as it carries, float64
finishes; columns that are done make way. C is each label's own, by its validation loss; a label that has not both
classes on validation takes the C that is best for the others together. A label of one class in training is its
smoothed prevalence. Sees no test data. Invariant: a column's result does not depend on the others solved with it
(beyond rounding), and unknown labels have no say.

Legend: N records, R of a chunk, D features (padded), P columns, H pairs remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.evaluation import metrics
from ecg_jax.evaluation.linear import WIDTH, Split, check, moments

C_GRID = tuple(10.0 ** np.arange(-5, 3, 0.5))
TOLERANCE = 1e-6  # Euclidean norm of the gradient of the mean loss
ROWS = 1024  # records of a chunk: its logits stay in cache
MEMORY = 8
STEPS, BLOCK = 400, 8  # of each precision at most; between looks at who is done
COLUMNS = 16  # columns are padded to a multiple


@dataclass(frozen=True)
class Probe:
    """A fitted probe: mean, scale float64 [D]; weights float64 [D, K]; bias, c, gradient float64 [K].

    c is the chosen setting (NaN for a label of one class), gradient the norm at the solution, val_loss the macro BCE on
    validation in nats, edge whether some label chose an end of the grid.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    c: np.ndarray
    gradient: np.ndarray
    val_loss: float
    edge: bool

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K] of features [N, D]."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.weights + self.bias


@dataclass(frozen=True)
class Solution:
    """weights float64 [D, P], bias, gradient, loss float64 [P] (loss with its penalty), steps int [P]."""

    weights: np.ndarray
    bias: np.ndarray
    gradient: np.ndarray
    loss: np.ndarray
    steps: np.ndarray


def fit(
    train: Split, val: Split, *, subsets: Sequence[np.ndarray] | None = None, grid: Sequence[float] = C_GRID
) -> list[Probe]:
    """One probe for each of `subsets` (bool [N] over the training records; default all of them), C chosen on `val`.

    Features are standardised on all training records, whose features need no label. No randomness. Raises ValueError
    where a split has no labelled record or features are not finite.
    """
    check(train, val)
    subsets = [np.ones(len(train.labels), bool)] if subsets is None else list(subsets)
    k, n_grid = train.labels.shape[1], len(grid)
    mean, scale = moments(train.features)
    x = (train.features.astype(np.float64) - mean) / scale
    x_val = (val.features.astype(np.float64) - mean) / scale
    masked = np.stack([np.where(keep[:, None], train.labels, metrics.UNKNOWN) for keep in subsets])  # [S, N, K]
    both = (masked == 1).any(1) & (masked == 0).any(1)  # [S, K]
    columns = [(s, j, c) for s in range(len(subsets)) for j in range(k) if both[s, j] for c in grid]
    weights = np.zeros((len(subsets), k, n_grid, x.shape[1]))
    bias = np.repeat(np.stack([metrics.logit(metrics.prevalence(y)) for y in masked])[:, :, None], n_grid, 2)
    gradient = np.zeros(bias.shape)
    if columns:
        s, j, c = (np.array(part) for part in zip(*columns, strict=True))
        found = solve(x, masked, s, j, c)
        at = s, j, np.tile(np.arange(n_grid), len(columns) // n_grid)
        weights[at], bias[at], gradient[at] = found.weights.T, found.bias, found.gradient
    known = metrics.n_known(val.labels)
    told = (metrics.n_positive(val.labels) > 0) & (metrics.n_positive(val.labels) < known)
    probes = []
    for i in range(len(subsets)):
        loss = np.stack([metrics.bce(x_val @ weights[i, :, g].T + bias[i, :, g], val.labels) for g in range(n_grid)])
        own = told & both[i]
        shared = int(np.argmin(loss[:, own].mean(1))) if own.any() else int(np.argmin(np.nanmean(loss, axis=1)))
        chosen = np.where(own, np.argmin(np.where(np.isnan(loss), np.inf, loss), axis=0), shared)  # ties: the smaller C
        pick = np.arange(k), chosen
        probes.append(
            Probe(
                mean,
                scale,
                weights[i][pick].T,
                bias[i][pick],
                np.where(both[i], np.asarray(grid, np.float64)[chosen], np.nan),
                gradient[i][pick],
                metrics.macro(loss[chosen, np.arange(k)])[0],
                bool(np.isin(chosen[both[i]], (0, n_grid - 1)).any()),
            )
        )
    return probes


def solve(
    x: np.ndarray,
    labels: np.ndarray,
    subset: np.ndarray,
    label: np.ndarray,
    c: np.ndarray,
    tolerance: float = TOLERANCE,
) -> Solution:
    """The regressions of columns (subset, label, C), each int or float [P]; x float64 [N, D], labels int8 [S, N, K]."""
    n, width = x.shape
    # Principal axes: in them the mean curvature of every column is diagonal but for the weights of the records.
    spread, axes = np.linalg.eigh(x.T @ x / n)
    z_NxD = np.pad(x @ axes, ((0, -n % ROWS), (0, -width % WIDTH)))
    spread_D = np.pad(np.maximum(spread, 0.0), (0, -width % WIDTH))
    flat = labels.transpose(1, 0, 2).reshape(n, -1)
    y_NxJ = np.pad(flat, ((0, -n % ROWS), (0, 0)), constant_values=metrics.UNKNOWN)
    column = (subset * labels.shape[2] + label).astype(np.int32)
    number = metrics.n_known(flat)[column].astype(np.float64)
    prior = metrics.prevalence(flat)[column]
    penalty = 1 / (c * number)
    # One more row stands for the bias: its feature is 1, its penalty 0.
    curvature = np.concatenate([(prior * (1 - prior)) * spread_D[:, None] + penalty, (prior * (1 - prior))[None]])
    curvature = np.maximum(curvature, 1e-12)
    start = np.zeros_like(curvature)
    start[-1] = metrics.logit(prior)
    held = {"column": column, "number": number, "penalty": penalty, "scale": np.sqrt(curvature)}
    steps = np.zeros(len(column), np.int64)
    at, _, _, used = _run(z_NxD, y_NxJ, held, start * held["scale"], max(tolerance, 3e-5), np.float32)
    steps += used
    with jax.enable_x64(True):
        at, loss, gradient, used = _run(z_NxD, y_NxJ, held, at, tolerance, np.float64)
    steps += used
    w = at / held["scale"]
    return Solution(axes @ w[:width], w[-1], gradient, loss, steps)


def _run(z_NxD, y_NxJ, held, start, tolerance, dtype):
    """(parameters, loss, gradient norm, steps) of all columns in one precision; columns that are done make way."""
    total = len(held["column"])
    best, loss, norm, steps = start.copy(), np.zeros(total), np.full(total, np.inf), np.zeros(total, np.int64)
    data = (
        jax.device_put(z_NxD.reshape(-1, ROWS, z_NxD.shape[1]).astype(dtype)),
        jax.device_put(y_NxJ.reshape(-1, ROWS, y_NxJ.shape[1])),
    )
    alive, size, state = np.arange(total), 0, None
    for _ in range(0, STEPS, BLOCK):
        fresh = -(-len(alive) // COLUMNS) * COLUMNS
        if state is None or fresh * 4 <= size:
            keep = np.pad(alive, (0, fresh - len(alive)), mode="edge")
            size, owner = fresh, keep
            of = {
                name: values[..., keep].astype(values.dtype if name == "column" else dtype)
                for name, values in held.items()
            }
            state = jax.device_put(_begin(best[:, keep].astype(dtype)))
        state = _block(*data, of, state, np.asarray(tolerance, dtype))
        at, f, g = (np.asarray(part, np.float64) for part in (state["at"], state["loss"], state["norm"]))
        best[:, owner], loss[owner], norm[owner] = at, f, g
        stuck = np.zeros(total, bool)
        stuck[owner] = np.asarray(state["stuck"])
        steps[alive] += BLOCK
        alive = np.flatnonzero((norm > tolerance) & ~stuck)
        if not len(alive):
            break
    return best, loss, norm, steps


def _value(z_CxRxD, y_CxRxJ, of, at_DxP):
    """(loss [P], gradient [D, P] in scaled parameters, its norm in those of the features [P])."""
    w_DxP = at_DxP / of["scale"]
    features_DxP, bias_P = w_DxP[:-1], w_DxP[-1]

    def chunk(sums, part):
        z_RxD, y_RxJ = part
        logits = jnp.matmul(z_RxD, features_DxP, precision="highest") + bias_P
        y = y_RxJ[:, of["column"]]
        known, positive = y >= 0, y == 1
        small = jnp.exp(-jnp.abs(logits))
        p = jnp.where(logits >= 0, 1.0, small) / (1 + small)
        loss = jnp.maximum(logits, 0) + jnp.log1p(small) - jnp.where(positive, logits, 0)
        wrong = jnp.where(known, p - positive, 0)
        total, slope, offset = sums
        slope = slope + jnp.matmul(z_RxD.T, wrong, precision="highest")
        return (total + jnp.where(known, loss, 0).sum(0), slope, offset + wrong.sum(0)), None

    zero = jnp.zeros_like(bias_P)
    (total, slope, offset), _ = jax.lax.scan(chunk, (zero, jnp.zeros_like(features_DxP), zero), (z_CxRxD, y_CxRxJ))
    number, penalty = of["number"], of["penalty"]
    gradient = jnp.concatenate([slope / number + penalty * features_DxP, (offset / number)[None]])
    loss = total / number + 0.5 * penalty * (features_DxP**2).sum(0)
    return loss, gradient / of["scale"], jnp.sqrt((gradient**2).sum(0))


def _begin(at_DxP: np.ndarray) -> dict[str, np.ndarray]:
    """The state before anything is known; the first step stands still and takes loss and gradient."""
    none, nowhere = np.zeros(at_DxP.shape[1], at_DxP.dtype), np.zeros_like(at_DxP)
    pairs = np.zeros((2, MEMORY, *at_DxP.shape), at_DxP.dtype)
    state = {"at": at_DxP, "loss": none + np.inf, "gradient": nowhere, "norm": none + np.inf, "way": nowhere}
    state |= {"pairs": pairs, "weight": np.zeros((MEMORY, len(none)), at_DxP.dtype), "step": none + 1}
    return state | {"stuck": np.zeros(len(none), bool)}


@partial(jax.jit, donate_argnums=3)
def _block(z_CxRxD, y_CxRxJ, of, state, tolerance):
    """BLOCK steps of L-BFGS, each column with its own step length; a step that does not descend is halved instead."""
    tiny = jnp.finfo(state["loss"].dtype).eps

    def advance(_, s):
        going = (s["norm"] > tolerance) & ~s["stuck"]
        move_DxP = s["step"] * s["way"]
        at = s["at"] + jnp.where(going, move_DxP, 0)
        loss, gradient, norm = _value(z_CxRxD, y_CxRxJ, of, at)
        before, after = (s["gradient"] * s["way"]).sum(0), (gradient * s["way"]).sum(0)
        # Armijo's rule, or near the solution, where the loss has no digits left, its form in gradients (Hager, Zhang).
        enough = loss <= s["loss"] + 1e-4 * s["step"] * before
        flat = (loss <= s["loss"] * (1 + 4 * tiny)) & (after <= -0.8 * before)
        taken = going & (enough | flat) & jnp.isfinite(loss)
        change = gradient - s["gradient"]
        bent = (move_DxP * change).sum(0)
        useful = taken & (bent > tiny * jnp.sqrt((move_DxP**2).sum(0) * (change**2).sum(0)))
        rolled = jnp.roll(s["pairs"], 1, axis=1).at[:, 0].set(jnp.stack([move_DxP, change]))
        weight = jnp.roll(s["weight"], 1, axis=0).at[0].set(1 / jnp.where(useful, bent, 1))
        pairs, weight = jnp.where(useful, rolled, s["pairs"]), jnp.where(useful, weight, s["weight"])
        new = {name: jnp.where(taken, b, s[name]) for name, b in (("at", at), ("loss", loss), ("norm", norm))}
        new["gradient"] = jnp.where(taken, gradient, s["gradient"])
        way = _direction(new["gradient"], pairs, weight)
        way = jnp.where((way * new["gradient"]).sum(0) < 0, way, -new["gradient"])
        step = jnp.where(taken, 1.0, s["step"] * 0.5).astype(loss.dtype)
        stuck = s["stuck"] | (going & (step < 1e-9 if loss.dtype == jnp.float64 else step < 1e-4))
        way = jnp.where(taken, way, s["way"])
        return new | {"way": way, "pairs": pairs, "weight": weight, "step": step, "stuck": stuck}

    return jax.lax.fori_loop(0, BLOCK, advance, state)


def _direction(gradient_DxP, pairs, weight_HxP):
    """The two loops of L-BFGS for all columns; pairs [2, H, D, P] newest first, weight 1 / (s . y), 0 where unused."""
    moves, changes = pairs

    def back(q, pair):
        move, change, weight = pair
        alpha = weight * (move * q).sum(0)
        return q - alpha * change, alpha

    def forth(q, pair):
        move, change, weight, alpha = pair
        return q + move * (alpha - weight * (change * q).sum(0)), None

    q, alphas = jax.lax.scan(back, gradient_DxP, (moves, changes, weight_HxP))
    newest = (changes[0] ** 2).sum(0) * weight_HxP[0]
    q = q / jnp.where(newest > 0, newest, 1)
    return -jax.lax.scan(forth, q, (moves, changes, weight_HxP, alphas), reverse=True)[0]
