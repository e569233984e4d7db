"""The `adam` probe: a linear classifier of all labels on frozen features, trained on the device in one
dispatch.

Features are standardised on the training split; the loss is the BCE in nats averaged over labels, unknown
labels masked; Adam with a constant rate; after every epoch the loss on the validation split is read, and the
parameters of its lowest point are kept (epoch 0, the training prevalences alone, counts too). Sees no test
data. Invariants: the result depends on the seed, the records and their hashes, not on the order of the rows;
zero columns that pad the features change nothing.

Legend: N records, M of a minibatch, D features (padded), K labels.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ecg_jax.evaluation import metrics

WIDTH = 64  # features are padded to a multiple, so that encoders of several widths share one compiled probe
RECORDS = 1024  # likewise records


@dataclass(frozen=True)
class Split:
    """features float32 [N, D]; labels int8 [N, K], -1 unknown; record_hash uint64 [N]."""

    features: np.ndarray
    labels: np.ndarray
    record_hash: np.ndarray


@dataclass(frozen=True)
class Probe:
    """A fitted probe: mean, scale float64 [D]; weights float64 [D, K]; bias float64 [K].

    epoch is the chosen one, val_loss its macro BCE in nats, curve float32 the validation loss of epochs 0, 1,
    ...
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    epoch: int
    val_loss: float
    curve: np.ndarray
    converged: bool  # patience ended it, not the number of epochs

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K] of features [N, D]."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.weights + self.bias


def check(train: Split, val: Split) -> None:
    """Raises ValueError for a split without a labelled record, or with features that are not finite."""
    for name, split in (("train", train), ("val", val)):
        if not len(split.features) or not (split.labels != metrics.UNKNOWN).any():
            raise ValueError(f"no labelled record in the {name} split")
        if not np.isfinite(split.features).all():
            raise ValueError(f"features of the {name} split are not finite")


def fit(
    train: Split,
    val: Split,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    batch: int = 64,
    epochs_max: int = 500,
    patience: int = 20,
) -> Probe:
    """Train on `train`, choose the epoch on `val`.

    Randomness: the order of the records in each epoch, from (seed, epoch, record hash). Raises ValueError
    where either split is empty or the features are not finite.
    """
    check(train, val)
    width = train.features.shape[1]
    mean, scale = moments(_sorted(train).features)
    x, y, key_hi, key_lo = _padded(_sorted(train), mean, scale)
    x_val, y_val, _, _ = _padded(_sorted(val), mean, scale)
    weights, bias, epoch, loss, curve = _train(
        x,
        y,
        (key_hi, key_lo),
        np.int32(len(train.features)),
        x_val,
        y_val,
        metrics.logit(metrics.prevalence(train.labels)).astype(np.float32),
        np.uint32(seed % 2**32),
        np.float32(lr),
        np.int32(patience),
        batch=batch,
        epochs_max=epochs_max,
    )
    curve = np.asarray(curve)
    curve = curve[np.isfinite(curve)]
    return Probe(
        mean,
        scale,
        np.asarray(weights, np.float64)[:width],
        np.asarray(bias, np.float64),
        int(epoch),
        float(loss),
        curve,
        len(curve) - 1 - int(epoch) >= patience,
    )


def _sorted(split: Split) -> Split:
    order = np.argsort(split.record_hash, kind="stable")
    return Split(split.features[order], split.labels[order], split.record_hash[order])


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, scale) float64 [D] of features [N, D]; a constant column has scale 1."""
    x = features.astype(np.float64)
    mean, spread = x.mean(0), x.std(0)
    # A column that is constant up to float32 rounding tells nothing: leave its (zero) deviation unscaled.
    return mean, np.where(spread > 1e-6 * np.abs(mean) + 1e-12, spread, 1.0)


def _padded(split: Split, mean: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ...]:
    """Standardised float32 [N', D'], labels int8 [N', K] (-1 in the padding), two uint32 [N'] of the hash."""
    n, width = split.features.shape
    rows, columns = -n % RECORDS, -width % WIDTH
    x = ((split.features.astype(np.float64) - mean) / scale).astype(np.float32)
    digest = np.pad(split.record_hash.astype(np.uint64), (0, rows))
    return (
        np.pad(x, ((0, rows), (0, columns))),
        np.pad(split.labels, ((0, rows), (0, 0)), constant_values=metrics.UNKNOWN),
        (digest >> np.uint64(32)).astype(np.uint32),
        (digest & np.uint64(0xFFFFFFFF)).astype(np.uint32),
    )


@partial(jax.jit, static_argnames=("batch", "epochs_max"))
def _train(x_NxD, y_NxK, keys, n, x_val, y_val, bias_K, seed, lr, patience, *, batch, epochs_max):
    known_NxK = (y_NxK != metrics.UNKNOWN).astype(jnp.float32)
    # Weights that make the mean over records an estimate of the mean over labels of each label's own mean.
    share_K = known_NxK.sum(0) / n
    weight_K = jnp.where(share_K > 0, 1.0 / jnp.maximum(share_K, 1e-12), 0.0) / jnp.maximum((share_K > 0).sum(), 1)
    optimiser = optax.adam(lr)
    padding_N = (jnp.arange(len(x_NxD)) >= n).astype(jnp.uint32)

    def losses(params, x_MxD, y_MxK):
        z_MxK = jnp.matmul(x_MxD, params[0], precision="highest") + params[1]
        return jnp.where(y_MxK == metrics.UNKNOWN, 0.0, jax.nn.softplus(jnp.where(y_MxK == 1, -z_MxK, z_MxK)))

    def validation(params):
        known_K = (y_val != metrics.UNKNOWN).sum(0)
        mean_K = losses(params, x_val, y_val).sum(0) / jnp.maximum(known_K, 1)
        return mean_K.sum() / jnp.maximum((known_K > 0).sum(), 1)

    def minibatch(i, state):
        params, moments, order_N = state
        at_M = i * batch + jnp.arange(batch)
        real_M = at_M < n
        rows_M = order_N[jnp.minimum(at_M, n - 1)]

        def loss(params):
            per_record_M = (losses(params, x_NxD[rows_M], y_NxK[rows_M]) * weight_K).sum(1)
            return jnp.where(real_M, per_record_M, 0.0).sum() / real_M.sum()

        update, moments = optimiser.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, update), moments, order_N

    def epoch(state):
        params, moments, done, best, best_loss, best_epoch, curve = state
        salt = _mix(seed ^ _mix(done.astype(jnp.uint32)))
        high = _mix(keys[0] ^ salt)
        low = _mix(keys[1] ^ high)
        order_N = jax.lax.sort((padding_N, low, high, jnp.arange(len(x_NxD))), num_keys=3)[3]
        params, moments, _ = jax.lax.fori_loop(0, -(-n // batch), minibatch, (params, moments, order_N))
        done = done + 1
        loss = validation(params)
        better = loss < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        best_loss, best_epoch = jnp.where(better, loss, best_loss), jnp.where(better, done, best_epoch)
        return params, moments, done, best, best_loss, best_epoch, curve.at[done].set(loss)

    def going(state):
        done, best_epoch = state[2], state[5]
        return (done < epochs_max) & (done - best_epoch < patience)

    params = (jnp.zeros((x_NxD.shape[1], y_NxK.shape[1])), bias_K)
    start = validation(params)
    curve = jnp.full(epochs_max + 1, jnp.nan).at[0].set(start)
    state = (params, optimiser.init(params), jnp.int32(0), params, start, jnp.int32(0), curve)
    *_, best, best_loss, best_epoch, curve = jax.lax.while_loop(going, epoch, state)
    return *best, best_epoch, best_loss, curve


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit moves every output bit (the finaliser of
    MurmurHash3).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
