"""The backbone of HeartLang: a pre-LN Transformer over a record's sentence of beat tokens.

Encoder and decoder of VQ-HBR (`vqhbr`) and the masked model (`heartlang`) are this network in three sizes. A token is
mixed with its two neighbours, gets the vectors of its lead, its second and its slot, and attends to all others; cls
comes first. No head, no loss. Two ways:

  plain     the published network: the convolution joins the sentence's ends, and padding is attended to as beats are
  bounded   (`config.bounded`) the convolution sees zeros beyond the ends and attention does not see padding, so that
            a token does not depend on how many padding slots follow

Invariant: with `bounded`, and zeros in padding, the first n slots of a record are the same for every number of slots
that is at least n.
Layers are stacked, [layers, ...], and run as in `transformer`. Differences from that network: no bias on queries, keys
and values; heads narrower than the width; exact GELU.

Source: J. Jin et al., "Reading Your Heart: Learning ECG Words and Sentences via Pre-training ECG Language Model"
(ICLR 2025, arXiv:2502.10707) and github.com/PKUDigitalHealth/HeartLang.

Shapes: B records, S slots, N = S + 1 with cls, C features of a token in, D width, H heads, K features of a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.errors import UsageError
from ecg_jax.models import gradients, layers
from ecg_jax.models.attention import HIDDEN, attention
from ecg_jax.models.layers import Parameter
from ecg_jax.models.transformer import UNROLLED_LAYERS

ROWS = 16  # of the lead and of the time table: 0 for padding, leads 1-12, seconds 1-15
HALF_WIDTH = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)
Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """Sizes of one backbone; `inputs` is the number of features of a token."""

    inputs: int
    width: int
    layers: int
    heads: int
    head_size: int
    mlp: int
    slots: int
    bounded: bool
    table_std: float = 1.0  # of cls and of the position, lead and time vectors at the start, 1 as published
    dropout: float = 0.0

    @property
    def inner(self) -> int:
        """Features of all heads together."""
        return self.heads * self.head_size


def parameters(config: SentenceConfig) -> dict[str, Parameter]:
    """Every parameter by name. Weights start with the variances of PyTorch's defaults, as published; biases at 0."""
    n, d, hidden = config.layers, config.width, config.mlp

    def table(*shape):
        return Parameter(shape, "normal", config.table_std)

    def ones(*shape):
        return Parameter(shape, "ones")

    def zeros(*shape):
        return Parameter(shape, "zeros")

    return {
        "token_kernel": layers.matrix((3, config.inputs, d), 3 * config.inputs, 2.0),
        "mask_vector": zeros(1, d),
        "cls": table(d),
        "position_table": table(config.slots + 1, d),
        "lead_table": table(ROWS, d),
        "time_table": table(ROWS, d),
        "layers_norm1_scale": ones(n, d),
        "layers_norm1_bias": zeros(n, d),
        "layers_qkv_kernel": layers.matrix((n, d, 3 * config.inner), d, 1 / 3),
        "layers_out_kernel": layers.matrix((n, config.inner, d), config.inner, 1 / 3),
        "layers_out_bias": zeros(n, d),
        "layers_norm2_scale": ones(n, d),
        "layers_norm2_bias": zeros(n, d),
        "layers_mlp1_kernel": layers.matrix((n, d, hidden), d, 1 / 3),
        "layers_mlp1_bias": zeros(n, hidden),
        "layers_mlp2_kernel": layers.matrix((n, hidden, d), hidden, 1 / 3),
        "layers_mlp2_bias": zeros(n, d),
        "norm_scale": ones(d),
        "norm_bias": zeros(d),
    }


def forward(
    config: SentenceConfig,
    p: Params,
    tokens_BxSxC: jax.Array,
    there_BxS: jax.Array,
    lead_BxS: jax.Array | None,
    time_BxS: jax.Array | None,
    *,
    masked_BxS: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """All tokens after the final norm, [B, S + 1, D] float32, cls first.

    Args:
        there: bool, slots that hold a beat; for the others lead and time are those of padding.
        lead, time: 0-11 and seconds from 0 (at most 14); None adds no such vector.
        masked: bool, slots whose content is replaced by the mask vector, after the convolution.
        keys: [B] typed keys, for dropout; without them nothing is dropped.
        dtype: of products and activations; norms, softmax and the result are float32.

    Raises UsageError for more slots than the position table has, or, unless `bounded`, for fewer.
    """
    batch, slots, _ = tokens_BxSxC.shape
    if slots > config.slots or (slots < config.slots and not config.bounded):
        raise UsageError(f"{slots} slots for a codebook or model of {config.slots}: use its number")
    h = _convolved(tokens_BxSxC.astype(dtype), p["token_kernel"].astype(dtype), config.bounded)
    if masked_BxS is not None:
        h = jnp.where(masked_BxS[:, :, None], p["mask_vector"].astype(dtype), h)
    for table, rows_BxS in ((p["lead_table"], lead_BxS), (p["time_table"], time_BxS)):
        if rows_BxS is not None:
            # A product with ones and zeros: the gradient of a lookup is a scatter, slow on CPU and on GPU in no order.
            rows_BxS = jnp.where(there_BxS, rows_BxS + 1, 0)
            h = h + jax.nn.one_hot(rows_BxS, ROWS, dtype=dtype) @ table.astype(dtype)
    cls_Bx1xD = jnp.broadcast_to(p["cls"].astype(dtype), (batch, 1, config.width))
    h = jnp.concatenate([cls_Bx1xD, h], axis=1) + p["position_table"][: slots + 1].astype(dtype)
    h = layers.dropout(h, config.dropout, keys_B, 0)
    seen_BxN = jnp.pad(there_BxS | (not config.bounded), ((0, 0), (1, 0)), constant_values=True)
    h = _run_layers(h, p, seen_BxN, config, keys_B)
    return _layer_norm(h, p["norm_scale"], p["norm_bias"]).astype(jnp.float32)


def macs(config: SentenceConfig, slots: int) -> int:
    """Multiply-adds of `forward` over one record: products of matrices, as `flops` counts them."""
    n, d = slots + 1, config.width
    layer = n * (4 * config.inner * d + 2 * d * config.mlp) + 2 * n * n * config.inner
    return 3 * slots * config.inputs * d + config.layers * layer


def linear(x: jax.Array, kernel_IxJ: jax.Array, bias_J: jax.Array | None = None) -> jax.Array:
    """x @ kernel + bias over the last axis, all other axes taken as one, in the dtype of x."""
    # Products of matrices, not of batches of them: XLA-CPU turns the cotangent of the latter for every weight.
    y = x.reshape(-1, x.shape[-1]) @ kernel_IxJ.astype(x.dtype)
    if bias_J is not None:
        y = y + bias_J.astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def _convolved(x_BxSxC: jax.Array, kernel_3xCxD: jax.Array, bounded: bool) -> jax.Array:
    """Convolution of three taps along the slots, without bias: y[s] = sum over k of x[s + k - 1] kernel[k]."""
    if bounded:
        padded = jnp.pad(x_BxSxC, ((0, 0), (1, 1), (0, 0)))
    else:
        padded = jnp.concatenate([x_BxSxC[:, -1:], x_BxSxC, x_BxSxC[:, :1]], axis=1)
    slots = x_BxSxC.shape[1]
    taps_BxSx3C = jnp.concatenate([padded[:, k : k + slots] for k in range(3)], axis=2)
    return linear(taps_BxSx3C, kernel_3xCxD.reshape(-1, kernel_3xCxD.shape[2]))


def _run_layers(
    h_BxNxD: jax.Array, p: Params, seen_BxN: jax.Array, config: SentenceConfig, keys_B: jax.Array | None
) -> jax.Array:
    stack = {name.removeprefix("layers_"): p[name] for name in p if name.startswith("layers_")}
    if jax.default_backend() != "cpu" or config.layers > UNROLLED_LAYERS:
        numbers = jnp.arange(config.layers)

        def one(h, x):
            return _block(h, x[0], seen_BxN, config, keys_B, x[1]), None

        return lax.scan(one, h_BxNxD, (stack, numbers))[0]
    # One split per array: the gradient is then one concatenation, where indexing would add up padded arrays.
    parts = {name: lax.split(value, [1] * config.layers) for name, value in stack.items()}
    for i in range(config.layers):
        h_BxNxD = _block(h_BxNxD, {name: part[i][0] for name, part in parts.items()}, seen_BxN, config, keys_B, i)
    return h_BxNxD


def _block(
    h_BxNxD: jax.Array,
    p: Params,
    seen_BxN: jax.Array,
    config: SentenceConfig,
    keys_B: jax.Array | None,
    number: jax.Array | int,
) -> jax.Array:
    """h + attention(norm(h)), then h + MLP(norm(h)); softmax and statistics float32."""
    batch, tokens, d = h_BxNxD.shape

    def dropped(x, salt):
        return layers.dropout(x.reshape(batch, tokens, -1), config.dropout, keys_B, 4 * number + salt).reshape(x.shape)

    h_MxD = h_BxNxD.reshape(-1, d)  # records and tokens as one axis, see `transformer.block`
    qkv = linear(_layer_norm(h_MxD, p["norm1_scale"], p["norm1_bias"]), p["qkv_kernel"])
    qkv_BxNx3xHxK = qkv.reshape(batch, tokens, 3, config.heads, -1)
    if config.dropout and keys_B is not None:
        x_BxNxHxK = _dropped_attention(qkv_BxNx3xHxK, seen_BxN, config.dropout, keys_B, 4 * number + 1)
    else:
        x_BxNxHxK = attention(qkv_BxNx3xHxK, seen_BxN)
    h_MxD = h_MxD + dropped(linear(x_BxNxHxK.reshape(-1, config.inner), p["out_kernel"], p["out_bias"]), 2)
    x = linear(_layer_norm(h_MxD, p["norm2_scale"], p["norm2_bias"]), p["mlp1_kernel"], p["mlp1_bias"])
    x = linear(dropped(gelu(x), 3), p["mlp2_kernel"], p["mlp2_bias"])
    return (h_MxD + dropped(x, 4)).reshape(h_BxNxD.shape)


def _layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    norm = gradients.layer_norm if jax.default_backend() == "cpu" else layers.layer_norm
    return norm(x, scale_D, bias_D)


def _dropped_attention(
    qkv_BxNx3xHxK: jax.Array, seen_BxN: jax.Array, rate: float, keys_B: jax.Array, salt: jax.Array | int
) -> jax.Array:
    """`attention` with dropout on its weights, which no fused formulation has."""
    q, k, v = (qkv_BxNx3xHxK[:, :, i] for i in range(3))
    logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
    share = jax.nn.softmax(logits + jnp.where(seen_BxN, 0.0, HIDDEN)[:, None, None, :])
    share = layers.dropout(share, rate, keys_B, salt).astype(v.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", share, v)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function of x (exact, not the form with tanh); keeps only x for the gradient."""
    return (x * 0.5 * (1 + lax.erf(x * HALF_WIDTH))).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, ct: jax.Array) -> tuple[jax.Array]:
    y = x.astype(jnp.float32)
    slope = 0.5 * (1 + lax.erf(y * HALF_WIDTH)) + y * DENSITY * jnp.exp(-0.5 * y * y)
    return ((ct.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
