"""Encoders of one signal record: ResNet1d, Transformer, and the published ResNets of the CODE group (`legacy`).

Every encoder has one call: `module.apply(variables, x [B, T, 12], valid [B, 2]) -> (frames [B, S, D], weight
[B, S])`; `layers.pool` makes one vector of the frames. A table of parameters (`parameters`) is the one source
of names, shapes and starting values. Heads belong to objectives.

JAX is imported when a network is built, not before: sizes (`ladder`) and costs (`flops`) are known without it.
"""

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ecg_jax.models.ladder import Config

if TYPE_CHECKING:
    import flax.linen as nn
    import jax

    from ecg_jax.models.layers import Parameter

ENCODERS = {"resnet1d": "ResNet1d", "transformer": "Transformer", "legacy": "Legacy"}  # module -> class


def build(config: Config, dtype: Any = None) -> "nn.Module":
    """The Linen module of a configuration, computing in `dtype` (None: float32; parameters, statistics and output are
    float32).
    """
    import jax.numpy as jnp

    return getattr(_module(config), ENCODERS[config.family])(config, jnp.float32 if dtype is None else dtype)


def _module(config: Config) -> ModuleType:
    return importlib.import_module(f"ecg_jax.models.{config.family}")


def parameters(config: Config) -> "dict[str, Parameter]":
    """Every parameter of an encoder: name -> shape and starting value."""
    return _module(config).parameters(config)


def statistics(config: Config) -> "dict[str, Parameter]":
    """Running statistics that an encoder keeps beside its parameters (BatchNorm); usually none."""
    return _module(config).statistics(config) if config.family != "transformer" else {}


def init(config: Config, key: "jax.Array") -> "dict[str, jax.Array]":
    """Starting parameters {name: float32 array}, as `module.init(...)["params"]` but from a single random draw.

    Traceable; equal keys give equal parameters, other values than `module.init` with that key.
    """
    return _init()(config, key)


@functools.cache
def _init() -> Any:
    import jax

    from ecg_jax.models import layers

    return jax.jit(lambda config, key: layers.start({"": parameters(config)}, key)[""], static_argnums=0)
