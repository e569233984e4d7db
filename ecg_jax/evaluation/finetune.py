"""Fine-tuning, the option beside frozen features: encoder and head trained together, deeper layers faster.

Starts from the encoder and a head that is the `logistic` probe of its features (Kumar et al. 2022), so that the first
steps do not tear the features apart. Adam; the rate of a layer is `lr` times `decay` to the power of its distance from
the head; running statistics of BatchNorm, dropout and crops stay as in evaluation. After every epoch the validation
loss is read and the lowest is kept (epoch 0, the probe itself, counts). Sees no test data, and is never a law's loss:
what is scaled there is the frozen encoder. Invariant: with a rate of 0 the result is the logistic probe.
"""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ecg_jax import progress
from ecg_jax.errors import DivergedError
from ecg_jax.evaluation import features, linear, logistic, metrics

LR, DECAY, BATCH = 1e-4, 0.7, 32
EPOCHS, PATIENCE = 50, 5


def fit(
    encoder: features.Encoder,
    train: Any,
    val: Any,
    start: logistic.Probe,
    *,
    seed: int = 0,
    lr: float = LR,
    decay: float = DECAY,
    batch: int = BATCH,
    epochs_max: int = EPOCHS,
    patience: int = PATIENCE,
) -> tuple[features.Encoder, linear.Probe]:
    """(the tuned encoder, its head) from tables (`shards.tables.Table`) and `start`, the probe of the untuned features.

    Randomness: the order of the records in each epoch, from `seed`. Raises DivergedError for a loss that is not finite.
    """
    front = features.front_of(encoder)
    names = ["signal", "valid"] + ["rpeaks"] * front.on_beats
    held = {
        which: {name: features.peaks(t, front.mode) if name == "rpeaks" else getattr(t, name) for name in names}
        for which, t in (("train", train), ("val", val))
    }
    mean, scale = jnp.asarray(start.mean, jnp.float32), jnp.asarray(start.scale, jnp.float32)
    running = [name for name in encoder.params["encoder"] if "_running_" in name]
    rates = layer_rates({n: v for n, v in encoder.params["encoder"].items() if n not in running}, lr, decay)
    head = jnp.asarray(start.weights, jnp.float32), jnp.asarray(start.bias, jnp.float32)
    frozen = {name: jnp.asarray(encoder.params["encoder"][name]) for name in running}
    params = {"encoder": {n: jnp.asarray(encoder.params["encoder"][n]) for n in rates}, "head": head}
    rates = {"encoder": rates, "head": jax.tree.map(lambda leaf: np.float32(lr), head)}
    labelled = np.flatnonzero((train.labels != metrics.UNKNOWN).any(1))
    known = metrics.n_known(train.labels)
    # The mean over labels of each label's own mean, as in the other probes.
    weight = jnp.asarray(np.where(known > 0, len(labelled) / np.maximum(known, 1), 0) / max((known > 0).sum(), 1))
    optimiser = optax.scale_by_adam()

    def logits(params: Any, part: dict[str, jax.Array]) -> jax.Array:
        x = front.features({"encoder": params["encoder"] | frozen}, part)
        return jnp.matmul((x - mean) / scale, params["head"][0], precision="highest") + params["head"][1]

    @jax.jit
    def step(params: Any, state: Any, part: dict[str, jax.Array], labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            z = logits(params, part)
            nats = jax.nn.softplus(jnp.where(labels == 1, -z, z))
            return (jnp.where(labels == metrics.UNKNOWN, 0, nats) * weight).sum(1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        direction, state = optimiser.update(gradient, state)
        return jax.tree.map(lambda p, d, r: p - r * d, params, direction, rates), state, value

    forward, state = jax.jit(logits), optimiser.init(params)

    def validation(params: Any) -> float:
        found = [
            np.asarray(forward(params, {n: v[rows] for n, v in held["val"].items()}))
            for rows in _batches(np.arange(len(val.labels)), batch)
        ]
        return metrics.macro(metrics.bce(np.concatenate(found)[: len(val.labels)], val.labels))[0]

    labelled = labelled[np.argsort(train.record_hash[labelled], kind="stable")]
    best, best_loss, best_epoch = params, validation(params), 0
    curve = [best_loss]
    for epoch in progress.track(range(1, epochs_max + 1), "fine-tuning", unit="epochs"):
        order = np.random.default_rng([seed, epoch]).permutation(labelled)
        for rows in _batches(order, batch):
            params, state, value = step(
                params, state, {n: v[rows] for n, v in held["train"].items()}, train.labels[rows]
            )
            if not np.isfinite(float(value)):
                raise DivergedError(f"fine-tuning diverged in epoch {epoch}: lower its rate")
        curve.append(validation(params))
        if curve[-1] < best_loss:
            best, best_loss, best_epoch = params, curve[-1], epoch
        if epoch - best_epoch >= patience:
            break
    best = jax.device_get(best)
    tree = {"encoder": best["encoder"] | {name: encoder.params["encoder"][name] for name in running}}
    tuned = replace(encoder, params=tree, digest=features.digest_of(encoder.config, tree, encoder.info))
    weights, bias = (np.asarray(part, np.float64) for part in best["head"])
    ended = len(curve) - 1 - best_epoch >= patience
    return tuned, linear.Probe(start.mean, start.scale, weights, bias, best_epoch, best_loss, np.array(curve), ended)


def _batches(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    """Batches of one shape; the last is filled up from the front of `rows`."""
    filled = np.resize(rows, -(-len(rows) // batch) * batch)
    return list(filled.reshape(-1, batch))


def layer_rates(encoder: dict[str, Any], lr: float, decay: float) -> dict[str, np.ndarray]:
    """Of each leaf its rate, float32, shaped to multiply it: stem and embeddings lowest, what stands last highest.

    Depths are read off the names: stages and units of a ResNet, the leading axis of a Transformer's stacked layers.
    """
    stages = sorted({m.groups() for name in encoder if (m := re.match(r"stage(\d+)_unit(\d+)", name))}, key=_numbers)
    stacked = {name: np.shape(leaf) for name, leaf in encoder.items() if name.startswith("layers_")}
    layers = max((shape[0] for shape in stacked.values()), default=0)
    deepest = max(len(stages), layers)
    rates = {}
    for name, leaf in encoder.items():
        found = re.match(r"stage(\d+)_unit(\d+)", name)
        if name in stacked:
            depth = np.arange(1, layers + 1).reshape(-1, *[1] * (np.ndim(leaf) - 1))
        elif found:
            depth = 1 + stages.index(found.groups())
        else:
            depth = deepest if name.startswith("norm_") else 0
        rates[name] = np.asarray(lr * decay ** (deepest - np.asarray(depth, np.float64)), np.float32)
    return rates


def _numbers(words: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(word) for word in words)
