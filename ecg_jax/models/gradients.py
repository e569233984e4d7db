"""Layer norm and GELU with gradients written out, which keep less than automatic differentiation does.

Forward values are those of `layers.layer_norm` and `jax.nn.gelu(approximate=True)`. Kept for the gradient are the
input and, of the norm, two numbers a position; automatic differentiation inside a loop keeps five arrays of the size
of the hidden layer for one GELU. No second derivatives in forward mode. Invariant: gradients equal those of the plain
functions to float rounding, arithmetic is float32 inside and results come in the dtype of the input.

Shapes: leading axes are free, D features last.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.models import layers

GELU_SLOPE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`layers.layer_norm`, over the last axis, with statistics in float32."""
    return layers.layer_norm(x, scale_D, bias_D)


def _norm_forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.maximum((y * y).mean(-1, keepdims=True) - mean**2, 0.0)
    rate = lax.rsqrt(variance + layers.NORM_EPS)
    return layers.layer_norm(x, scale_D, bias_D), (x, mean, rate, scale_D)


def _norm_backward(saved: tuple[jax.Array, ...], ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, rate, scale_D = saved
    ct = ct.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * rate
    scaled = ct * scale_D
    along = (scaled * normed).mean(-1, keepdims=True)
    dx = rate * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    every = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (ct * normed).sum(every), ct.sum(every)


layer_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`jax.nn.gelu(x, approximate=True)`, the form with tanh."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.gelu(x, approximate=True), x


def _gelu_backward(x: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
    # The argument of tanh is factored otherwise than in the forward pass: an equal one would be shared by the compiler,
    # which then stores the tanh, and that costs more than a second evaluation.
    y = x.astype(jnp.float32)
    square = y * y
    tanh = jnp.tanh(y * (GELU_SLOPE + GELU_SLOPE * GELU_CUBIC * square))
    inner = (0.5 * GELU_SLOPE) * y * (1 + 3 * GELU_CUBIC * square)
    slope = 0.5 + 0.5 * tanh + inner * (1 - tanh * tanh)
    return ((ct.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
