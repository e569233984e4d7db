"""AdamW as one function of arrays, and the global gradient norm.

Every hyper-parameter is an argument that may be traced, so a sweep over rates costs no compilation; schedules
are computed on the host (`recipe.py`). No optimizer objects. Invariant: equal to
`optax.chain(clip_by_global_norm, adamw)` (tested).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.config import OptimConfig


class Hyper(NamedTuple):
    """Traced scalars of the optimizer, float32. The learning rate is not among them: it changes at every
    step.
    """

    weight_decay: jax.typing.ArrayLike
    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    clip: jax.typing.ArrayLike  # largest global norm of the gradient; 0: no clipping


def hyper(config: OptimConfig) -> Hyper:
    """The optimizer section of a configuration as float32 scalars."""
    return Hyper(*(np.float32(getattr(config, name)) for name in Hyper._fields))


def decayed(params: Any) -> Any:
    """Which arrays are decayed (tree of bool): those of two and more dimensions, no bias and no norm's scale.

    By name as well as by dimensions, because the biases of stacked layers have two.
    """

    def rule(path: tuple, leaf: jax.Array) -> bool:
        return leaf.ndim >= 2 and not str(path[-1].key).endswith(("bias", "scale"))

    return jax.tree_util.tree_map_with_path(rule, params)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all arrays of a tree, float32 []."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def adamw(
    params: Any,
    grads: Any,
    mu: Any,
    nu: Any,
    count: jax.Array,
    norm: jax.Array,
    lr: jax.Array,
    hyper: Hyper,
) -> tuple[Any, Any, Any]:
    """One AdamW update with clipping; returns (params, mu, nu), all of the shapes that came in.

    Args:
        count: int32 [], number of updates made before this one.
        norm: the gradients' global norm, for clipping.
        lr: float32 [], this step's rate. Decay is `lr * weight_decay`, as in Loshchilov and Hutter 2019
            (and optax).
    """
    weight_decay, b1, b2, eps, clip = hyper
    scale = jnp.where((clip > 0) & (norm > clip), clip / norm, 1.0)
    after = (count + 1).astype(jnp.float32)
    bias1, bias2 = 1 - b1**after, 1 - b2**after

    def update(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, decay: bool) -> tuple[jax.Array, ...]:
        g = g * scale
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        direction = (m / bias1) / (jnp.sqrt(v / bias2) + eps)
        return p - lr * (direction + weight_decay * p if decay else direction), m, v

    updated = jax.tree.map(update, params, grads, mu, nu, decayed(params))
    return jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), updated)
