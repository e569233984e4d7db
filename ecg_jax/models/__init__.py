"""Encoders of one signal record: ResNet1d and Transformer, their size ladders, inputs and analytic FLOPs.

Every encoder has one call: `module.apply(variables, x [B, T, 12], valid [B, 2]) -> (frames [B, S, D], weight
[B, S])`; `layers.pool` makes one vector of the frames. A table of parameters (`parameters`) is the one source
of names, shapes and starting values. Heads belong to objectives.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.models.ladder import Config, ResNet1dConfig
from ecg_jax.models.layers import Parameter, unit_normal


def build(config: Config, dtype: jnp.dtype = jnp.float32) -> nn.Module:
    """The Linen module of a configuration, computing in `dtype` (parameters, statistics and output are float32)."""
    if isinstance(config, ResNet1dConfig):
        from ecg_jax.models.resnet1d import ResNet1d

        return ResNet1d(config, dtype)
    from ecg_jax.models.transformer import Transformer

    return Transformer(config, dtype)


def parameters(config: Config) -> dict[str, Parameter]:
    """Every parameter of an encoder: name -> shape and starting value."""
    if isinstance(config, ResNet1dConfig):
        from ecg_jax.models import resnet1d as family
    else:
        from ecg_jax.models import transformer as family
    return family.parameters(config)


def statistics(config: Config) -> dict[str, Parameter]:
    """Running statistics that an encoder keeps beside its parameters (BatchNorm); usually none."""
    if isinstance(config, ResNet1dConfig):
        from ecg_jax.models import resnet1d

        return resnet1d.statistics(config)
    return {}


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    """Starting parameters {name: float32 array}, as `module.init(...)["params"]` but from a single random draw.

    One draw for all leaves compiles in a fraction of the time of one draw per leaf (a ResNet has twenty).
    Traceable; equal keys give equal parameters, other values than `module.init` with that key.
    """
    table = parameters(config)
    drawn = {name: math.prod(one.shape) for name, one in table.items() if one.start == "normal"}
    noise = unit_normal(key, (sum(drawn.values()),))
    values, at = {}, 0
    for name, one in table.items():
        if one.start == "normal":
            values[name] = one.std * noise[at : at + drawn[name]].reshape(one.shape)
            at += drawn[name]
        else:
            values[name] = jnp.full(one.shape, float(one.start == "ones"), jnp.float32)
    return values
