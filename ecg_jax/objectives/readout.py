"""From an encoder's frames to the codes of hidden beats: one module at every rung and in both worlds.

Each target reads READ features off the frames: on the signal, of every source (the stages of a ResNet of stride 16 and
more, or the patches of a Transformer in the target's own lead) the mean over the beat's window, projected and summed;
on beats, the projected frame of its own slot. A matrix of its lead and GELU follow, then either a projection into the
space of the codebook and the inner product with its frozen rows ("factorised"), or a matrix of its own ("full"), with a
bias per code. Only targets get that far. Not part of an encoder, and counted apart from its N.

Invariants: places without a target change no result and no gradient; the loss and its gradient never hold more logits
than CHUNK_BYTES, or those of one target of each record.

Shapes: B records, K targets, F frames, D channels of a frame, R = READ, L leads, M targets of a lead, N codes, d
features of a code.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import beats, layers
from ecg_jax.models.ladder import Config, ResNet1dConfig
from ecg_jax.models.layers import Parameter

READ = 128  # features that a target reads
COARSE = 16  # samples: stages of a ResNet at this stride and above are read
HEADS = ("factorised", "full")
START_GAIN = 0.01  # variance of the last matrix at the start, relative to 1 / inputs: first losses are the prior's
LEAST = 1e-3  # probability that the starting bias spreads evenly over all codes
CHUNK_BYTES = 16 << 20 if jax.default_backend() == "cpu" else 512 << 20  # of logits; on CPU, what stays near the cores


@dataclasses.dataclass(frozen=True)
class Readout:
    """What there is to read and to tell.

    sources: (channels, samples of a frame) of each set of frames; one frame a slot where samples is 0. groups: frames
    lie group of leads by group (a Transformer's patches), 1 where they see all leads. leads: matrices of the middle
    layer; per_lead: the most targets of one of them in a record.
    """

    sources: tuple[tuple[int, int], ...]
    groups: int
    codes: int
    code_dim: int
    head: str
    leads: int
    per_lead: int


class Targets(NamedTuple):
    """[B, K], those that are there first and by rising lead: window [start, end) in samples of the frames, slot, lead
    (0 to L - 1), there.
    """

    start: jax.Array
    end: jax.Array
    slot: jax.Array
    lead: jax.Array
    there: jax.Array


def make(arch: Config, codes: int, code_dim: int, *, on_beats: bool, head: str, leads: int, per_lead: int) -> Readout:
    """The readout of an encoder. Raises UsageError for an unknown head."""
    if head not in HEADS:
        raise UsageError(f"unknown head {head!r}{did_you_mean(head, HEADS)}; known: {', '.join(HEADS)}")
    if on_beats:
        sources, groups = ((arch.features, 0),), 1
    elif isinstance(arch, ResNet1dConfig):
        strides = np.cumprod(arch.strides).tolist()
        sources = tuple((w, s) for w, s in zip(arch.widths, strides, strict=True) if s >= COARSE)
        sources, groups = sources or ((arch.features, strides[-1]),), 1
    else:
        sources, groups = ((arch.width, arch.patch),), arch.lead_groups
    return Readout(sources, groups, codes, code_dim, head, leads, per_lead)


def parameters(readout: Readout) -> dict[str, Parameter]:
    """Every learned array by name; the codebook of the factorised head and `bias` come from the data, see `init`."""
    parts = len(readout.sources)
    table = {f"read{i}_kernel": layers.matrix((d, READ), parts * d) for i, (d, _) in enumerate(readout.sources)}
    table |= {
        "read_bias": Parameter((READ,), "zeros"),
        "lead_kernel": layers.matrix((readout.leads, READ, READ), READ, gain=2.0),
        "lead_bias": Parameter((readout.leads, READ), "zeros"),
    }
    outputs = readout.code_dim if readout.head == "factorised" else readout.codes
    return table | {"code_kernel": layers.matrix((READ, outputs), READ, START_GAIN)}


def init(readout: Readout, key: jax.Array, prior_N: jax.Array, codebook_Nxd: jax.Array) -> dict[str, jax.Array]:
    """Starting arrays, float32: logits at the log of `prior` (the codes' shares in training), a little evened out.

    The factorised head holds the rows of `codebook`, which get no gradient.
    """
    table = parameters(readout)
    keys = jax.random.split(key, len(table))
    head = {name: one.init(k, one.shape) for k, (name, one) in zip(keys, table.items(), strict=True)}
    head["bias"] = jnp.log((1 - LEAST) * prior_N / prior_N.sum() + LEAST / readout.codes)
    if readout.head == "factorised":
        head["codebook"] = codebook_Nxd.astype(jnp.float32)
    return head


def features(
    readout: Readout, head: dict[str, jax.Array], frames: tuple[jax.Array, ...], targets: Targets
) -> jax.Array:
    """What each target's logits are made of, float32 [B, K, R]: `frames` [B, F, D] of each source, in order."""
    read = head["read_bias"]
    for i, (source_BxFxD, (_, samples)) in enumerate(zip(frames, readout.sources, strict=True)):
        kernel = head[f"read{i}_kernel"]
        if not samples:
            own_BxKxD = jnp.take_along_axis(source_BxFxD, targets.slot[:, :, None], axis=1)
            read = read + own_BxKxD @ kernel
        else:
            share_BxKxF = _share(readout, targets, source_BxFxD.shape[1], samples)
            read = read + jnp.einsum("bkf,bfr->bkr", share_BxKxF, source_BxFxD @ kernel)
    return _by_lead(readout, head, read, targets)


def _share(readout: Readout, targets: Targets, frames: int, samples: int) -> jax.Array:
    """Share of each target's window in each frame, of its own group of leads."""
    each = frames // readout.groups
    share_BxKxF = beats.overlap(targets.start, targets.end, each, samples)
    if readout.groups == 1:
        return share_BxKxF
    group_BxK = targets.lead * readout.groups // beats.LEADS
    own_BxKxG = jax.nn.one_hot(group_BxK, readout.groups)
    return (own_BxKxG[:, :, :, None] * share_BxKxF[:, :, None, :]).reshape(*group_BxK.shape, -1)


def _by_lead(readout: Readout, head: dict[str, jax.Array], read_BxKxR: jax.Array, targets: Targets) -> jax.Array:
    """GELU of each target's features times the matrix of its lead.

    Targets are laid out lead by lead, so that every matrix is used once: a matrix picked for each target would have to
    be copied, and trying all leads for each takes twelve times the products.
    """
    batch, most = targets.there.shape
    leads, places = readout.leads, readout.per_lead
    lead_BxK = jnp.where(targets.there, targets.lead, leads)
    first_BxL = (lead_BxK[:, None] < jnp.arange(leads)[:, None]).sum(2, dtype=jnp.int32)
    at_BxG = jnp.minimum(first_BxL[:, :, None] + jnp.arange(places), most - 1).reshape(batch, -1)
    laid_BxLxMxR = jnp.take_along_axis(read_BxKxR, at_BxG[:, :, None], axis=1).reshape(batch, leads, places, READ)
    out = jnp.einsum("blmr,lrs->blms", laid_BxLxMxR, head["lead_kernel"]) + head["lead_bias"][:, None]
    rank_BxK = jnp.arange(most) - jnp.take_along_axis(first_BxL, jnp.minimum(lead_BxK, leads - 1), axis=1)
    back_BxK = jnp.where(targets.there, targets.lead * places + rank_BxK, 0)
    own_BxKxR = jnp.take_along_axis(out.reshape(batch, -1, READ), back_BxK[:, :, None], axis=1)
    return jax.nn.gelu(jnp.where(targets.there[:, :, None], own_BxKxR, 0))


def score(
    readout: Readout,
    head: dict[str, jax.Array],
    features_BxKxR: jax.Array,
    code_BxK: jax.Array,
    weight_BxK: jax.Array,
    *,
    precision: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weight x cross-entropy, cross-entropy [B, K] in nats, whether the most likely code is right [B, K]).

    Gradients flow through the first only, and not to the codebook or `weight`. Logits are float32, of products in
    `precision`. Where `weight` is 0 the other two mean nothing.
    """
    if readout.head == "factorised":
        points_BxKxd = jnp.dot(features_BxKxR, head["code_kernel"], precision=precision)
        rows = jax.lax.stop_gradient(head["codebook"])
    else:
        points_BxKxd, rows = features_BxKxR, head["code_kernel"].T
    learned = readout.head == "full"
    total, ce, right = cross_entropy(learned, precision, points_BxKxd, rows, head["bias"], code_BxK, weight_BxK)
    return total, jax.lax.stop_gradient(ce), jax.lax.stop_gradient(right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    learned: bool,
    precision: str,
    points_BxKxd: jax.Array,
    rows_Nxd: jax.Array,
    bias_N: jax.Array,
    code_BxK: jax.Array,
    weight_BxK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weight x cross-entropy, cross-entropy [B, K], most likely code is right float32 [B, K]) of logits
    points . rows + bias.

    A few targets of each record at a time. The gradient of the sum is made in the same pass, while the logits are
    there, so nothing is kept or computed again; it needs `weight` beforehand, which is why that is an argument. To
    `points`, `bias` and, with `learned`, `rows`.
    """
    return _in_turns(precision, points_BxKxd, rows_Nxd, bias_N, code_BxK, weight_BxK, None)[0]


def _forward(learned, precision, *args):
    return _in_turns(precision, *args, learned)


def _backward(learned, precision, slopes, cotangents):
    points, rows, bias, code, weight = slopes
    slope = cotangents[0]
    zero_code = np.zeros(code.shape, jax.dtypes.float0)
    return slope * points, slope * rows, slope * bias, zero_code, jnp.zeros_like(weight)


cross_entropy.defvjp(_forward, _backward)


def turns(batch: int, targets: int, codes: int) -> int:
    """In how many turns the targets of a batch are scored."""
    return min(targets, -(-4 * batch * targets * codes // CHUNK_BYTES))


def _in_turns(precision, points_BxKxd, rows_Nxd, bias_N, code_BxK, weight_BxK, learned: bool | None):
    """(results, slopes of their total): no slopes where `learned` is None, none to the rows where it is False."""
    batch, targets, _ = points_BxKxd.shape
    number = turns(batch, targets, len(rows_Nxd))
    size = -(-targets // number)
    product = functools.partial(jnp.einsum, precision=precision)

    def turn(sums, part):
        points_BxCxd, code_BxC, weight_BxC = part
        logits_BxCxN = product("bcd,nd->bcn", points_BxCxd, rows_Nxd) + bias_N
        top = logits_BxCxN.max(-1, keepdims=True)
        share = jnp.exp(logits_BxCxN - top)
        total = share.sum(-1, keepdims=True)
        own = jnp.take_along_axis(logits_BxCxN, code_BxC[:, :, None], axis=2)
        ce_BxC = (jnp.log(total) + top - own)[:, :, 0]
        right_BxC = (own >= top)[:, :, 0].astype(jnp.float32)
        if learned is None:
            return sums, (ce_BxC, right_BxC)
        is_code = jnp.arange(len(rows_Nxd)) == code_BxC[:, :, None]
        slope_BxCxN = (share / total - is_code) * weight_BxC[:, :, None]
        to_bias, to_rows = sums
        to_bias = to_bias + slope_BxCxN.sum((0, 1))
        if learned:
            to_rows = to_rows + product("bcn,bcd->nd", slope_BxCxN, points_BxCxd)
        return (to_bias, to_rows), (ce_BxC, right_BxC, product("bcn,nd->bcd", slope_BxCxN, rows_Nxd))

    # Turns go over targets, not records: records may lie on different devices.
    def split(x):
        x = jnp.pad(x, ((0, 0), (0, number * size - targets)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, number, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, number * size, *x.shape[3:])[:, :targets]

    sums = (jnp.zeros_like(bias_N), jnp.zeros_like(rows_Nxd) if learned else jnp.zeros((), jnp.float32))
    sums, parts = jax.lax.scan(turn, sums, tuple(map(split, (points_BxKxd, code_BxK, weight_BxK))))
    ce, right, *to_points = map(join, parts)
    results = (jnp.where(weight_BxK != 0, ce * weight_BxK, 0).sum(), ce, right)
    if learned is None:
        return results, None
    to_bias, to_rows = sums
    to_rows = to_rows if learned else jnp.zeros_like(rows_Nxd)
    return results, (*to_points, to_rows, to_bias, code_BxK, weight_BxK)


def macs(readout: Readout, length: int, targets: int) -> int:
    """Multiply-adds of one forward pass over one record, `length` samples (or slots) and `targets` places, as
    `models.flops` counts.
    """
    total = readout.leads * readout.per_lead * READ * READ
    for width, samples in readout.sources:
        frames = readout.groups * -(-length // samples) if samples else targets
        total += frames * width * READ + (targets * frames * READ if samples else 0)
    inputs = readout.code_dim if readout.head == "factorised" else READ
    total += targets * READ * readout.code_dim if readout.head == "factorised" else 0
    return total + targets * inputs * readout.codes
