"""From an encoder's frames to the codes of hidden beats: one module at every rung and in both worlds.

Each target reads READ features off the frames: on the signal, of every source (the stages of a ResNet of stride 16 and
more, or the patches of a Transformer in the target's own lead) the mean over the beat's window, projected and summed;
on beats, the projected frame of its own slot. A matrix of its lead and GELU follow, then either a projection into the
space of the codebook and the inner product with its frozen rows ("factorised"), or a matrix of its own ("full"), with a
bias per code. Only targets get that far. Not part of an encoder, and counted apart from its N.

Invariants: places without a target change no result and no gradient, and are not told codes of; the loss and its
gradient never hold more logits than CHUNK_BYTES says, or those of GROUPS targets.

Shapes: B records, K targets, F frames, D channels of a frame, R = READ, L leads, M targets of a lead (or of a group of
records), G groups, C targets scored at once, N codes, d features of a code.
"""

import dataclasses
import functools
import math
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
GROUPS = 8  # of neighbouring records, whose targets are put together: as many as the lanes that devices share
CHUNK_BYTES = {"cpu": 4 << 20}  # of logits, by backend: on CPU what stays near the cores
MOST_BYTES = 32 << 20  # elsewhere


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
    `precision`. Where `weight` is 0 the other two are.
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
    points . rows + bias; the last two are 0 where `weight` is.

    Places of weight 0 are not computed: most records have about half the beats that there is room for. The gradient of
    the sum is made in the same pass, while the logits are there, so nothing is kept or computed again; it needs
    `weight` beforehand, which is why that is an argument. To `points`, `bias` and, with `learned`, `rows`.
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


def turn_size(groups: int, places: int, codes: int) -> int:
    """How many places of each group are scored at once."""
    most = CHUNK_BYTES.get(jax.default_backend(), MOST_BYTES)  # asked here: on import it would settle JAX's devices
    return max(1, min(places, most // (4 * groups * codes)))


def _in_turns(precision, points_BxKxd, rows_Nxd, bias_N, code_BxK, weight_BxK, learned: bool | None):
    """(results, slopes of their total): no slopes where `learned` is None, none to the rows where it is False.

    Groups of neighbouring records put their places of weight first, and all groups go through theirs side by side, as
    far as the fullest needs: records of different groups may lie on different devices.
    """
    groups = math.gcd(len(points_BxKxd), GROUPS)
    product = functools.partial(jnp.einsum, precision=precision)
    weight_GxM = weight_BxK.reshape(groups, -1)
    places = weight_GxM.shape[1]
    order_GxM = jnp.argsort(weight_GxM == 0, axis=1, stable=True)
    back_GxM = jnp.argsort(order_GxM, axis=1)
    size = turn_size(groups, places, len(rows_Nxd))
    number = (jnp.max((weight_GxM != 0).sum(1)) + size - 1) // size

    def laid(x: jax.Array) -> jax.Array:
        x = x.reshape(groups, places, *x.shape[2:])
        x = jnp.take_along_axis(x, order_GxM.reshape(groups, places, *(1,) * (x.ndim - 2)), axis=1)
        return jnp.pad(x, ((0, 0), (0, -places % size)) + ((0, 0),) * (x.ndim - 2))

    def returned(x: jax.Array) -> jax.Array:
        x = jnp.take_along_axis(x, back_GxM.reshape(groups, places, *(1,) * (x.ndim - 2)), axis=1)
        return x.reshape(*weight_BxK.shape, *x.shape[2:])

    points_GxMxd, code_GxM, weight_GxM = map(laid, (points_BxKxd, code_BxK, weight_BxK))

    def turn(carry):
        at, found, sums = carry
        points, code, weight = (
            jax.lax.dynamic_slice_in_dim(x, at * size, size, axis=1) for x in (points_GxMxd, code_GxM, weight_GxM)
        )
        logits_GxCxN = product("gcd,nd->gcn", points, rows_Nxd) + bias_N
        top = logits_GxCxN.max(-1, keepdims=True)
        share = jnp.exp(logits_GxCxN - top)
        total = share.sum(-1, keepdims=True)
        own = jnp.take_along_axis(logits_GxCxN, code[:, :, None], axis=2)
        scored = weight != 0
        ce = jnp.where(scored, (jnp.log(total) + top - own)[:, :, 0], 0)
        parts = [ce, (scored & (own >= top)[:, :, 0]).astype(jnp.float32)]
        if learned is not None:
            # `where`, not a product: a place of weight 0 may hold anything.
            is_code = jnp.arange(len(rows_Nxd)) == code[:, :, None]
            slope_GxCxN = jnp.where(scored[:, :, None], (share / total - is_code) * weight[:, :, None], 0)
            parts.append(product("gcn,nd->gcd", slope_GxCxN, rows_Nxd))
            new = [slope_GxCxN.sum(1)]
            if learned:
                own_points = jnp.where(scored[:, :, None], points, 0)
                new.append(product("gcn,gcd->gnd", slope_GxCxN, own_points))
            sums = [old + more for old, more in zip(sums, new, strict=True)]
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at * size, axis=1)
        return at + 1, [put(old, part) for old, part in zip(found, parts, strict=True)], sums

    found = [jnp.zeros(weight_GxM.shape, jnp.float32)] * 2
    sums: list[jax.Array] = []
    if learned is not None:
        found.append(jnp.zeros(points_GxMxd.shape, jnp.float32))
        sums = [jnp.zeros((groups, len(rows_Nxd)))]  # by group, so that devices add up once, at the end
        if learned:
            sums.append(jnp.zeros((groups, *rows_Nxd.shape)))
    _, found, sums = jax.lax.while_loop(lambda carry: carry[0] < number, turn, (0, found, sums))
    ce, right, *to_points = map(returned, found)
    results = ((ce * weight_BxK).sum(), ce, right)
    if learned is None:
        return results, None
    to_rows = sums[1].sum(0) if learned else jnp.zeros_like(rows_Nxd)
    return results, (*to_points, to_rows, sums[0].sum(0), code_BxK, weight_BxK)


def macs(readout: Readout, length: int, targets: int) -> int:
    """Multiply-adds of one forward pass over one record of `length` samples (or slots) and `targets` targets, as
    `models.flops` counts.
    """
    total = readout.leads * readout.per_lead * READ * READ
    for width, samples in readout.sources:
        frames = readout.groups * -(-length // samples) if samples else targets
        total += frames * width * READ + (targets * frames * READ if samples else 0)
    inputs = readout.code_dim if readout.head == "factorised" else READ
    total += targets * READ * readout.code_dim if readout.head == "factorised" else 0
    return total + targets * inputs * readout.codes
