"""Softmax attention among the tokens of a record, in formulations that mean the same.

What it does not do: project queries, keys and values, or drop anything. Invariants: softmax is float32; a token that
is not seen changes no other token; all formulations agree to float rounding, gradients included, so a parameter set
may be trained with one and used with another.

Shapes: B records, S tokens, H heads, K features of a head, N records handled at once.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax import lax

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models.ladder import ATTENTIONS as IMPLS

HIDDEN = -1e30  # logit of a token that may not be attended to
CHUNK_BYTES_PER_CORE = 4 << 20  # scores of the records handled at once, float32; about a core's second-level cache


def available(dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[str, ...]:
    """The formulations that this process can run in `dtype`, "auto" left out."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return IMPLS[1:] if half and jax.default_backend() == "gpu" else IMPLS[1:-1]


def attention(qkv_BxSx3xHxK: jax.Array, seen_BxS: jax.Array, impl: str = "auto") -> jax.Array:
    """Attention of every token to the tokens that are `seen` (bool, at least one per record) -> [B, S, H, K].

    Queries, keys and values are packed along axis 2, as one product makes them.

      xla      `jax.nn.dot_product_attention` as XLA compiles it.
      cudnn    the same by cuDNN's fused kernel: NVIDIA GPUs in half precision only.
      matmul   the same in products laid out for XLA-CPU, differentiated automatically.
      chunked  the products of `matmul` a few records at a time, so that scores stay in the cache, with an explicit
               gradient that recomputes the scores from their log-sum-exp: memory is linear in S (Dao et al. 2022,
               arXiv:2205.14135, with whole records for blocks).
      auto     chunked on CPU, xla elsewhere.

    Raises UsageError for a formulation that does not exist or cannot run here.
    """
    if impl == "auto":
        impl = "chunked" if jax.default_backend() == "cpu" else "xla"
    if impl not in IMPLS:
        raise UsageError(f"unknown attention {impl!r}{did_you_mean(impl, IMPLS)}; known: {', '.join(IMPLS)}")
    if impl not in available(qkv_BxSx3xHxK.dtype):
        raise UsageError(
            f"attention {impl!r} needs an NVIDIA GPU and half precision; here is {jax.default_backend()} in "
            f"{qkv_BxSx3xHxK.dtype}: use one of {', '.join(available(qkv_BxSx3xHxK.dtype))}"
        )
    if impl in ("xla", "cudnn"):
        q, k, v = (qkv_BxSx3xHxK[:, :, i] for i in range(3))
        mask_BxHxSxS = seen_BxS[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask_BxHxSxS, implementation=impl)
    bias_BxS = jnp.where(seen_BxS, 0.0, HIDDEN)
    if impl == "matmul":
        return _forward(qkv_BxSx3xHxK, bias_BxS)[0]
    return _chunked(qkv_BxSx3xHxK, bias_BxS)


def _forward(qkv_NxSx3xHxK: jax.Array, bias_NxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(attention [N, S, H, K], log-sum-exp of the logits [N, H, S] float32)."""
    q, k, v = (_heads_first(qkv_NxSx3xHxK[:, :, i]) for i in range(3))
    logits = _times_transposed(q * q.shape[3] ** -0.5, k) + bias_NxS[:, None, None, :]
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    share = jnp.exp(logits - largest)
    total_NxHxSx1 = share.sum(-1, keepdims=True)
    # Divided after the product: H x S x K quotients in place of H x S x S.
    out_NxHxSxK = _times(share.astype(v.dtype), v) / total_NxHxSx1
    return _heads_first(out_NxHxSxK.astype(v.dtype)), (largest + jnp.log(total_NxHxSx1))[..., 0]


def _backward(
    qkv_NxSx3xHxK: jax.Array,
    bias_NxS: jax.Array,
    out_NxSxHxK: jax.Array,
    total_NxHxS: jax.Array,
    ct_NxSxHxK: jax.Array,
) -> jax.Array:
    """Cotangent of qkv, from that of the output and the log-sum-exp of the forward pass (`total`).

    Scores lie as [query, key] throughout. The gradients of keys and values, sums over queries, are made transposed,
    [K, S]: XLA-CPU is half as fast where the large factor of a product has to be turned.
    """
    dtype = qkv_NxSx3xHxK.dtype
    q, k, v = (_heads_first(qkv_NxSx3xHxK[:, :, i]) for i in range(3))
    scale = q.shape[3] ** -0.5
    q, ct = q * scale, _heads_first(ct_NxSxHxK)
    shift_NxHxSxS = bias_NxS[:, None, None, :] - total_NxHxS[..., None]
    share = jnp.exp(_times_transposed(q, k) + shift_NxHxSxS)
    product = ct_NxSxHxK.astype(jnp.float32) * out_NxSxHxK.astype(jnp.float32)
    delta_NxHxSx1 = product.sum(-1).swapaxes(1, 2)[..., None]
    ds = (share * (_times_transposed(ct, v) - delta_NxHxSx1)).astype(dtype)
    dq_NxHxSxK = _times(ds, k) * scale
    dk_NxHxKxS = _times(q.swapaxes(2, 3), ds)
    dv_NxHxKxS = _times(ct.swapaxes(2, 3), share.astype(dtype))
    dqkv = (_heads_first(dq_NxHxSxK), dk_NxHxKxS.transpose(0, 3, 1, 2), dv_NxHxKxS.transpose(0, 3, 1, 2))
    return jnp.stack([one.astype(dtype) for one in dqkv], axis=2)


@jax.custom_vjp
def _chunked(qkv_BxSx3xHxK: jax.Array, bias_BxS: jax.Array) -> jax.Array:
    return _chunked_forward(qkv_BxSx3xHxK, bias_BxS)[0]


def _chunked_forward(qkv: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, total = _by_chunks(_forward, qkv, bias)
    return out, (qkv, bias, out, total)


def _chunked_backward(saved: tuple[jax.Array, ...], ct: jax.Array) -> tuple[jax.Array, None]:
    return _by_chunks(_backward, *saved, ct), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _by_chunks(function, qkv_BxSx3xHxK: jax.Array, *others: jax.Array):
    """`function` of arrays whose first axis is records, a chunk of records at a time, in a loop."""
    batch, tokens, _, heads, _ = qkv_BxSx3xHxK.shape
    parts = jax.device_count()
    if batch % parts:  # on one of several devices, or divided unevenly: a loop might send records about
        return function(qkv_BxSx3xHxK, *others)
    chunk = chunk_records(batch // parts, 4 * heads * tokens**2)
    number = batch // (parts * chunk)
    if number == 1:
        return function(qkv_BxSx3xHxK, *others)

    def split(x):
        # A chunk holds as many records of every device, so none has to be sent to another.
        return x.reshape(parts, number, chunk, *x.shape[1:]).swapaxes(0, 1).reshape(number, -1, *x.shape[1:])

    def join(x):
        return x.reshape(number, parts, chunk, *x.shape[2:]).swapaxes(0, 1).reshape(batch, *x.shape[2:])

    results = lax.map(lambda one: function(*one), tuple(map(split, (qkv_BxSx3xHxK, *others))))
    return jax.tree.map(join, results)


@functools.cache
def chunk_records(batch: int, record_bytes: int) -> int:
    """Records of a device to handle at once: the most that divide its batch and fit CHUNK_BYTES_PER_CORE of the cores
    that it has, at least one.
    """
    most = CHUNK_BYTES_PER_CORE * max(os.cpu_count() or 1, 2) // (jax.device_count() * record_bytes)
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= max(most, 1))


def _heads_first(x: jax.Array) -> jax.Array:
    """[N, S, H, K] <-> [N, H, S, K]."""
    return x.swapaxes(1, 2)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """[N, H, I, J] times [N, H, J, L], summed in float32 -> float32."""
    batch = ((0, 1), (0, 1))
    return lax.dot_general(a, b, (((3,), (2,)), batch), preferred_element_type=jnp.float32)


def _times_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """[N, H, I, K] times the transpose of [N, H, J, K], summed in float32 -> float32."""
    batch = ((0, 1), (0, 1))
    return lax.dot_general(a, b, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
