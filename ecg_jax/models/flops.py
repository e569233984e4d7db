"""Analytic FLOPs of the encoders, per record, at 2 per multiply-add.

Counted are the products of convolutions, matrices and attention, as if every convolution were direct and
without crediting zeros of padding; norms, activations, softmax, pools and heads are left out (a few percent
at the small rungs). So the number does not depend on how a layer is computed, and equals a plain formula
anyone can check.

MFU (model FLOPs utilisation) is `training_flops` x records a second / `peak_flops`: what the definition of the
network asks for, whatever the program makes of it (recomputation earns nothing, a formulation with fewer
multiplications may pass 1), over the dense peak of the device at that precision.
"""

from ecg_jax.models.ladder import Config, ResNet1dConfig, TransformerConfig

TRAINING = 3  # forward, gradient of the input, gradient of the weights

# Dense peaks in TFLOP/s at 2 per multiply-add, without sparsity, by the start of JAX's `device_kind`; the longest
# start that fits counts. "float32" is what float32 products run at by default: TF32 on these GPUs (their plain
# float32 units reach 19.5 on A100, 51 to 67 on Hopper); no figure is published for TPUs.
# Sources: NVIDIA data sheets "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023), "H200 Tensor Core GPU"
# (2024), whose Hopper figures are with sparsity and so halved here; cloud.google.com/tpu/docs/v4, /v5e, /v5p.
PEAKS_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA A100": {"bfloat16": 312.0, "float32": 156.0},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4, "float32": 494.7},
    "NVIDIA H100 NVL": {"bfloat16": 835.5, "float32": 417.5},
    "NVIDIA H100 PCIe": {"bfloat16": 756.0, "float32": 378.0},
    "NVIDIA H200": {"bfloat16": 989.4, "float32": 494.7},
    "NVIDIA H200 NVL": {"bfloat16": 835.5, "float32": 417.5},
    "TPU v4": {"bfloat16": 275.0},
    "TPU v5 lite": {"bfloat16": 197.0},  # v5e
    "TPU v5e": {"bfloat16": 197.0},
    "TPU v5": {"bfloat16": 459.0},  # what JAX calls v5p
    "TPU v5p": {"bfloat16": 459.0},
}
NO_PEAK = ("TPU v4 lite",)  # begins like a known one and is another


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s at "bfloat16" or "float32"; None for a device or precision not in the table.

    `device_kind` as `jax.devices()[0].device_kind` gives it. A part of a GPU (MIG) has no peak of its own here.
    """
    starts = [known for known in PEAKS_TFLOPS if device_kind.startswith(known)]
    if not starts or device_kind.startswith(NO_PEAK) or "MIG" in device_kind:
        return None
    tflops = PEAKS_TFLOPS[max(starts, key=len)].get(dtype)
    return None if tflops is None else tflops * 1e12


def mfu(per_record: float, records_per_second: float, device_kind: str, dtype: str) -> float | None:
    """Model FLOPs utilisation of training, see above: `per_record` FLOPs of forward and backward, records a second of
    each device; None where its peak is not known.
    """
    peak = peak_flops(device_kind, dtype)
    return None if peak is None else per_record * records_per_second / peak


def forward_flops(config: Config, length: int = 1000) -> int:
    """FLOPs of one forward pass over one record of `length` samples (padded to whole frames first)."""
    return 2 * macs(config, length)


def training_flops(config: Config, length: int = 1000) -> int:
    """FLOPs of forward and backward over one record."""
    return TRAINING * forward_flops(config, length)


def macs(config: Config, length: int = 1000) -> int:
    """Multiply-adds of one forward pass over one record (what fvcore prints as FLOPs); on the beats input `length` is
    the number of tokens, padding included.
    """
    if isinstance(config, ResNet1dConfig):
        return _resnet(config, config.padded(length))
    beats = config.input == "beats"
    return transformer_macs(config, length if beats else config.lead_groups * config.padded(length) // config.patch)


def _resnet(config: ResNet1dConfig, length: int) -> int:
    before = config.width
    total = length * config.kernel * config.leads * before
    for width, stage_stride in zip(config.widths, config.strides, strict=True):
        for unit in range(config.units):
            total += length * config.kernel * before * width
            length = -(-length // stage_stride) if unit == 0 else length
            total += length * config.kernel * width * width
            total += length * before * width if before != width else 0
            before = width
    return total


def transformer_macs(config: TransformerConfig, tokens: int) -> int:
    """Multiply-adds over `tokens` tokens; cls comes on top of them."""
    d, seen = config.width, tokens + 1
    layer = seen * (4 * d * d + 2 * config.mlp * d * d) + 2 * seen * seen * d
    return tokens * config.patch * config.leads_per_token * d + config.layers * layer
