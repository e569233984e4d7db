"""Analytic FLOPs of the encoders, per record, at 2 per multiply-add.

Counted are the products of convolutions, matrices and attention, as if every convolution were direct and
without crediting zeros of padding; norms, activations, softmax, pools and heads are left out (a few percent
at the small rungs). So the number does not depend on how a layer is computed, and equals a plain formula
anyone can check.
"""

from ecg_jax.models.ladder import Config, ResNet1dConfig, TransformerConfig
from ecg_jax.models.layers import same_padding

TRAINING = 3  # forward, gradient of the input, gradient of the weights


def forward_flops(config: Config, length: int = 1000) -> int:
    """FLOPs of one forward pass over one record of `length` samples (padded to whole frames first)."""
    return 2 * macs(config, length)


def training_flops(config: Config, length: int = 1000) -> int:
    """FLOPs of forward and backward over one record."""
    return TRAINING * forward_flops(config, length)


def macs(config: Config, length: int = 1000) -> int:
    """Multiply-adds of one forward pass over one record (what fvcore prints as FLOPs)."""
    if isinstance(config, ResNet1dConfig):
        return _resnet(config, config.padded(length))
    return transformer_macs(config, config.lead_groups * config.padded(length) // config.patch)


def _resnet(config: ResNet1dConfig, length: int) -> int:
    before = config.width
    total = length * config.kernel * config.leads * before
    for width, stage_stride in zip(config.widths, config.strides, strict=True):
        for unit in range(config.units):
            total += length * config.kernel * before * width
            length = same_padding(length, config.kernel, stage_stride if unit == 0 else 1)[0]
            total += length * config.kernel * width * width
            total += length * before * width if before != width else 0
            before = width
    return total


def transformer_macs(config: TransformerConfig, tokens: int) -> int:
    """Multiply-adds over `tokens` tokens; cls comes on top of them."""
    d, seen = config.width, tokens + 1
    layer = seen * (4 * d * d + 2 * config.mlp * d * d) + 2 * seen * seen * d
    return tokens * config.patch * config.leads_per_token * d + config.layers * layer
