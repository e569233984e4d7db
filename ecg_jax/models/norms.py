"""GroupNorm, ReLU and the mask of padding in one step with its gradient written out, for CPU.

Values and gradients are those of `layers.group_norm`, `nn.relu` and a mask one after the other, to float rounding;
`resnet1d` chooses. Kept for the gradient are what goes in and what comes out, both of which the convolutions beside it
keep anyhow, and two numbers per record and channel. No gradient reaches `weight`, and there are no second derivatives.

Shapes: B records, T positions in time, C channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.models import layers


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def group_norm(
    x_BxTxC: jax.Array, weight_BxT: jax.Array, scale_C: jax.Array, bias_C: jax.Array, most: int, relu: bool
) -> jax.Array:
    """`layers.group_norm`, then ReLU if `relu`, then zeros where `weight` is 0."""
    return _forward(x_BxTxC, weight_BxT, scale_C, bias_C, most, relu)[0]


def _forward(x_BxTxC, weight_BxT, scale_C, bias_C, most, relu):
    mean_BxC, variance_BxC = layers.group_moments(x_BxTxC, weight_BxT, most)
    gain_BxC = scale_C * lax.rsqrt(variance_BxC + layers.NORM_EPS)
    y_BxTxC = x_BxTxC * gain_BxC[:, None] + (bias_C - mean_BxC * gain_BxC)[:, None]
    y_BxTxC = jnp.where(weight_BxT[:, :, None] > 0, jnp.maximum(y_BxTxC, 0) if relu else y_BxTxC, 0)
    y_BxTxC = y_BxTxC.astype(x_BxTxC.dtype)
    return y_BxTxC, (x_BxTxC, y_BxTxC, weight_BxT, mean_BxC, variance_BxC, scale_C)


def _backward(most, relu, kept, ct_BxTxC):
    x_BxTxC, y_BxTxC, weight_BxT, mean_BxC, variance_BxC, scale_C = kept
    rate_BxC = lax.rsqrt(variance_BxC + layers.NORM_EPS)
    active = y_BxTxC > 0 if relu else weight_BxT[:, :, None] > 0
    ct_BxTxC = jnp.where(active, ct_BxTxC, 0)
    ones_BxT = jnp.ones_like(weight_BxT)
    bias_BxC = jnp.einsum("btc,bt->bc", ct_BxTxC, ones_BxT)
    gain_BxC = rate_BxC * (jnp.einsum("btc,bt->bc", ct_BxTxC * x_BxTxC, ones_BxT) - mean_BxC * bias_BxC)
    # Each position moves the group's mean and variance by its share of the weight.
    groups = layers.group_count(x_BxTxC.shape[2], most)
    by_mean_BxC = layers.over_groups(scale_C * bias_BxC, groups)
    by_rate_BxC = jnp.where(variance_BxC > 0, layers.over_groups(scale_C * gain_BxC, groups), 0)
    share_BxT = weight_BxT / jnp.maximum(weight_BxT.sum(1, keepdims=True), 1e-6)
    slope_BxC = -by_rate_BxC * rate_BxC**2
    level_BxC = -by_mean_BxC * rate_BxC - slope_BxC * mean_BxC
    inner = level_BxC[:, None] + slope_BxC[:, None] * x_BxTxC
    dx = ct_BxTxC * (scale_C * rate_BxC)[:, None] + share_BxT[:, :, None] * inner
    return dx.astype(x_BxTxC.dtype), jnp.zeros_like(weight_BxT), gain_BxC.sum(0), bias_BxC.sum(0)


group_norm.defvjp(_forward, _backward)
