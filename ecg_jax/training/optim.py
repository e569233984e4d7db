"""AdamW as one function of arrays, and the global gradient norm.

Every hyper-parameter is an argument that may be traced, so a sweep over rates costs no compilation; schedules
are computed on the host (`recipe.py`). No optimizer objects. Invariant: with one rate for all arrays, equal to
`optax.chain(clip_by_global_norm, adamw)` (tested).
"""

from collections.abc import Callable
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
    factors: jax.typing.ArrayLike  # float32 [number of arrays] in the order of the tree, or []: factor on the rate


def hyper(config: OptimConfig, objective: Any = None) -> Hyper:
    """The optimizer section of a configuration as float32 scalars, and the rate factors of `width_factors`.

    Args:
        objective: needed where `config.base_width` is set.
    """
    scalars = (np.float32(getattr(config, name)) for name in Hyper._fields[:-1])
    return Hyper(*scalars, width_factors(objective, config.base_width) if config.base_width else np.float32(1))


def width_factors(objective: Any, base_width: int) -> np.ndarray:
    """Factor on the learning rate of each array, float32 [number of arrays], in the order of the parameters' tree.

    `fan-in at base_width / fan-in` for matrices and convolutions whose fan-in grows with the width of the
    network, 1 for all others: biases, norms, tables, and the first layer, whose fan-in is that of the data. This
    is the rule for Adam of muP (Yang et al., Tensor Programs V, arXiv:2203.03466, tables 3 and 8): one step then
    moves every activation by an amount that does not depend on the width, so the best rate hardly does. What is
    not muP here: starting values stay as they are at every width, so the head's shrink as 1 / sqrt(fan-in) instead
    of 1 / fan-in. They are small, and the change of the logits still grows a little: measured over widths 8 to 128,
    as the power 0.1 to 0.3 of the width, without scaling 0.6 to 1.0 (features: 0.0, without 0.4 to 0.8).

    The fan-in is read off axis -2, by laying out the same objective at `base_width`; so it needs no names. Depth is not
    corrected for.
    """
    base, own = shapes(objective.at_width(base_width)), shapes(objective)
    pairs = zip(jax.tree.leaves(base), jax.tree.leaves(own), strict=True)
    return np.array([b.shape[-2] / o.shape[-2] if o.ndim >= 2 else 1.0 for b, o in pairs], np.float32)


def shapes(objective: Any) -> Any:
    """Shapes of an objective's parameters, without making them."""
    return jax.eval_shape(objective.init, jax.random.key(0), objective.start)


def decayed(params: Any) -> Any:
    """Which arrays are decayed (tree of bool): those of two and more dimensions, no bias, no norm's scale, and no
    codebook, which is not learned by gradient.

    By name as well as by dimensions, because the biases of stacked layers have two.
    """

    def rule(path: tuple, leaf: jax.Array) -> bool:
        return leaf.ndim >= 2 and not str(path[-1].key).endswith(("bias", "scale", "codebook"))

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
    finite: jax.Array | bool = True,
) -> tuple[Any, Any, Any]:
    """One AdamW update with clipping; returns (params, mu, nu), all of the shapes that came in.

    Args:
        count: int32 [], number of updates made before this one.
        norm: the gradients' global norm, for clipping.
        finite: bool []; where it is false, everything comes back as it went in.
        lr: float32 [], this step's rate. Decay is `lr * weight_decay`, as in Loshchilov and Hutter 2019
            (and optax), and not multiplied by `hyper.factors`: how long an array remembers should not depend on
            the width (Wang and Aitchison, arXiv:2405.13698).
    """
    weight_decay, b1, b2, eps, clip, factors = hyper
    scale = jnp.where((clip > 0) & (norm > clip), clip / norm, 1.0)
    after = (count + 1).astype(jnp.float32)
    bias1, bias2 = 1 - b1**after, 1 - b2**after

    def moments(m: jax.Array, v: jax.Array, g: jax.Array):
        g = g * scale
        return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g

    def moved(p: jax.Array, m: jax.Array, v: jax.Array, decay: bool, factor: jax.Array):
        direction = factor * (m / bias1) / (jnp.sqrt(v / bias2) + eps)
        return p - lr * (direction + weight_decay * p if decay else direction)

    tree = jax.tree.structure(params)
    p, g, m, v = (jax.tree.leaves(one) for one in (params, grads, mu, nu))
    decay, factor = jax.tree.leaves(decayed(params)), list(jnp.broadcast_to(factors, tree.num_leaves))
    m, v = _if(finite, lambda m, v: zip(*map(moments, m, v, g), strict=True), m, v)
    (p,) = _if(finite, lambda p: (map(moved, p, m, v, decay, factor),), p)
    return tuple(jax.tree.unflatten(tree, one) for one in (p, m, v))


def _if(finite: jax.Array | bool, function: Callable[..., Any], *old: list[jax.Array]) -> tuple[list[jax.Array], ...]:
    """`function` of some lists of arrays, or those lists themselves where `finite` is false.

    On a CPU as a loop that runs once or not at all, which works in place. Fused into the update of the parameters, the
    new moments would be made a second time from the old ones, of which XLA-CPU then keeps a copy: half as much memory
    traffic again, and all of it on one core.
    """
    if jax.default_backend() == "cpu":
        times = jnp.asarray(finite, jnp.int32)
        return jax.lax.fori_loop(0, times, lambda _, x: tuple(map(list, function(*x))), old)
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), tuple(map(list, function(*old))), old)
