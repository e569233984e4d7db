"""Transformer encoder on patches of the signal: pre-LN, GELU, learned lead and time tables, a cls token.

The record is cut into patches of `config.patch` samples per lead, lead by lead, so token (lead, patch) stands at
lead * patches + patch, after cls (with several leads per token, read "group of leads" for lead). Tokens without a
valid sample are hidden from attention and have weight 0. The parameters of the layers are stacked, [layers, ...], and
the same whether the layers run in `lax.scan` or unrolled. Row 0 of either table is kept for padding tokens of inputs
that have such, and the mask vector for masked-prediction objectives. No head.

Shapes: B records, T samples, P patches per lead, N = lead groups * P tokens, S = N + 1 with cls, D width, H heads.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecg_jax.errors import UsageError
from ecg_jax.models import gradients, layers
from ecg_jax.models.attention import attention
from ecg_jax.models.ladder import TransformerConfig
from ecg_jax.models.layers import Parameter

# Up to here layers run unrolled on CPU: a training step of T4 and T8 takes 7 % less time than in a scan, whose loop has
# to stack and unstack what the gradient needs. Deeper networks gain less (T11: 3 %) and compile longer.
UNROLLED_LAYERS = 8

TABLE_STD = 0.2  # against content of order one: at the usual 0.02, lead and time are learned late


def parameters(config: TransformerConfig) -> dict[str, Parameter]:
    """Every parameter by name. Weights that write into the residual stream start smaller with depth, so that
    its variance stays of order one.
    """
    n, d, hidden = config.layers, config.width, config.width * config.mlp
    inputs = config.patch * config.leads_per_token
    into_residual = 0.5 / n

    def table(*shape):
        return Parameter(shape, "normal", TABLE_STD)

    def ones(*shape):
        return Parameter(shape, "ones")

    def zeros(*shape):
        return Parameter(shape, "zeros")

    return {
        "patch_kernel": layers.matrix((inputs, d), inputs),
        "patch_bias": zeros(d),
        "lead_table": table(config.lead_groups + 1, d),
        "time_table": table(config.times + 1, d),
        "cls": table(d),
        "mask_vector": table(d),
        "layers_norm1_scale": ones(n, d),
        "layers_norm1_bias": zeros(n, d),
        "layers_qkv_kernel": layers.matrix((n, d, 3 * d), d),
        "layers_qkv_bias": zeros(n, 3 * d),
        "layers_out_kernel": layers.matrix((n, d, d), d, into_residual),
        "layers_out_bias": zeros(n, d),
        "layers_norm2_scale": ones(n, d),
        "layers_norm2_bias": zeros(n, d),
        "layers_mlp1_kernel": layers.matrix((n, d, hidden), d),
        "layers_mlp1_bias": zeros(n, hidden),
        "layers_mlp2_kernel": layers.matrix((n, hidden, d), hidden, into_residual),
        "layers_mlp2_bias": zeros(n, d),
        "norm_scale": ones(d),
        "norm_bias": zeros(d),
    }


class Transformer(nn.Module):
    """Encoder: `apply(variables, x, valid, train=False, keys=None) -> (frames [B, N, D] float32, weight [B, N])`.

    x float [B, T, leads], zero outside `valid` ((start, length) in samples, int [B, 2]); T is zero-padded to
    whole patches here if it is not yet. `keys` [B] typed keys, needed for dropout only. `masked` bool [B, N]:
    tokens whose content is replaced by the mask vector before lead and time are added. `with_cls` returns cls
    as frame 0, of weight 0.

    On the beats input x is the tokens themselves, [B, N, samples of a token], and `place` their rows in the lead and
    in the time table, int [B, N] each, 0 for padding; `valid` is then bool [B, N], which tokens there are.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        train: bool = False,
        keys: jax.Array | None = None,
        masked: jax.Array | None = None,
        with_cls: bool = False,
        place: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        config, d = self.config, self.config.width
        p = {name: self.param(name, one.init, one.shape) for name, one in parameters(config).items()}

        def cast(name):
            return p[name].astype(self.dtype)

        if place is None:
            patches = config.padded(x.shape[1]) // config.patch
            if patches > config.times:
                raise UsageError(
                    f"{x.shape[1]} samples make {patches} patches of {config.patch}, the time table holds "
                    f"{config.times}: use a shorter crop or a longer patch"
                )
            x = _to_patches(x, patches, config)
            place_NxD = (cast("lead_table")[1:, None] + cast("time_table")[None, 1 : patches + 1]).reshape(-1, d)
            weight_BxN = jnp.tile(layers.position_weight(valid, patches, config.patch), (1, config.lead_groups))
        else:
            # Products with ones and zeros: the gradient of a lookup is a scatter, which is slow on CPU and in no fixed
            # order on GPU.
            which = zip(place, ("lead_table", "time_table"), strict=True)
            place_NxD = sum(jax.nn.one_hot(rows, len(p[name]), dtype=self.dtype) @ cast(name) for rows, name in which)
            weight_BxN = valid.astype(jnp.float32)
        # As in `block`, records and tokens are one axis while they meet a matrix.
        h = x.astype(self.dtype).reshape(-1, x.shape[2]) @ cast("patch_kernel") + cast("patch_bias")
        h = h.reshape(*x.shape[:2], d)
        if masked is not None:
            h = jnp.where(masked[:, :, None], cast("mask_vector"), h)
        cls_Bx1xD = jnp.broadcast_to(cast("cls"), (h.shape[0], 1, d))
        h = jnp.concatenate([cls_Bx1xD, h + place_NxD], axis=1)

        seen_BxS = jnp.pad(weight_BxN > 0, ((0, 0), (1, 0)), constant_values=True)  # cls is always seen
        stack = {name.removeprefix("layers_"): p[name] for name in p if name.startswith("layers_")}
        h = run_layers(h, stack, seen_BxS, config, keys if train else None)
        h = layers.layer_norm(h, p["norm_scale"], p["norm_bias"]).astype(jnp.float32)
        if with_cls:
            return h, jnp.pad(weight_BxN, ((0, 0), (1, 0)))
        return h[:, 1:], weight_BxN


def use_scan(config: TransformerConfig) -> bool:
    """Whether the layers run in `lax.scan`: as configured, else by backend and depth; always to save memory, since
    XLA-CPU's schedule of unrolled layers was seen to keep what should be recomputed."""
    if config.scan is not None:
        return config.scan
    shallow = config.layers <= UNROLLED_LAYERS
    return config.remat != "none" or jax.default_backend() != "cpu" or not shallow


def run_layers(
    h_BxSxD: jax.Array,
    stack: dict[str, jax.Array],
    seen_BxS: jax.Array,
    config: TransformerConfig,
    keys_B: jax.Array | None,
) -> jax.Array:
    """All layers, from stacked parameters; `seen` says which tokens may be attended to.

    What is kept for the gradient follows `config.remat`; values do not depend on it.
    """

    def one(h, p, number):
        return block(h, p, seen_BxS, config, keys_B, number)

    scan = use_scan(config)
    if config.remat != "none":
        # A loop keeps the recomputation apart from the forward pass by itself.
        one = jax.checkpoint(one, policy=_POLICIES[config.remat], prevent_cse=not scan)
    if scan:
        numbers = jnp.arange(config.layers)
        return jax.lax.scan(lambda h, x: (one(h, *x), None), h_BxSxD, (stack, numbers))[0]
    # One split per array: the gradient is then one concatenation, where indexing would add up padded arrays.
    layer = {name: jax.lax.split(value, [1] * config.layers) for name, value in stack.items()}
    for i in range(config.layers):
        h_BxSxD = one(h_BxSxD, {name: parts[i][0] for name, parts in layer.items()}, i)
    return h_BxSxD


_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def block(
    h_BxSxD: jax.Array,
    p: dict[str, jax.Array],
    seen_BxS: jax.Array,
    config: TransformerConfig,
    keys_B: jax.Array | None,
    number: jax.Array | int,
) -> jax.Array:
    """One pre-LN layer: h + attention(norm(h)), then h + MLP(norm(h)). Softmax and norm statistics are float32."""
    batch, tokens, d = h_BxSxD.shape
    dtype = h_BxSxD.dtype
    # Measured on CPU only; elsewhere automatic differentiation stays until somebody has measured there.
    explicit = jax.default_backend() == "cpu"
    norm = gradients.layer_norm if explicit else layers.layer_norm
    gelu = gradients.gelu if explicit else functools.partial(jax.nn.gelu, approximate=True)

    def linear(x_MxI, name):
        return x_MxI @ p[f"{name}_kernel"].astype(dtype) + p[f"{name}_bias"].astype(dtype)

    def dropped(x_MxD, salt):
        return layers.dropout(x_MxD.reshape(batch, tokens, d), config.dropout, keys_B, salt).reshape(-1, d)

    # Records and tokens are one axis, M = B * S. Products of matrices then read the cotangent as it lies: with three
    # axes XLA-CPU turns it for the gradient of every weight, and each turned copy sums up anew what all layers above
    # gave, at a cost quadratic in depth.
    h_MxD = h_BxSxD.reshape(-1, d)
    x = norm(h_MxD, p["norm1_scale"], p["norm1_bias"])
    qkv_BxSx3xHxK = linear(x, "qkv").reshape(batch, tokens, 3, config.heads, -1)
    x = linear(attention(qkv_BxSx3xHxK, seen_BxS, config.attention).reshape(-1, d), "out")
    h_MxD = h_MxD + dropped(x, 2 * number)
    x = norm(h_MxD, p["norm2_scale"], p["norm2_bias"])
    x = linear(gelu(linear(x, "mlp1")), "mlp2")
    return (h_MxD + dropped(x, 2 * number + 1)).reshape(h_BxSxD.shape)


def _to_patches(x_BxTxC: jax.Array, patches: int, config: TransformerConfig) -> jax.Array:
    """[B, T, C] -> [B, N, samples of a token], lead (or group of leads) by lead, T zero-padded to whole patches."""
    batch, length, _ = x_BxTxC.shape
    groups, together, size = config.lead_groups, config.leads_per_token, config.patch
    x = jnp.pad(x_BxTxC, ((0, 0), (0, patches * size - length), (0, 0)))
    x = x.reshape(batch, patches, size, groups, together).transpose(0, 3, 1, 4, 2)
    return x.reshape(batch, groups * patches, together * size)
