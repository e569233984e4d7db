"""Which slots of a record are hidden, and which of the hidden ones are to be predicted.

The number is exact in every record, so a loss never depends on luck in how much was hidden. One typed key per record
decides; the caller folds seed, record and epoch into it (in evaluation the record's hash alone). No signal, no codes.

Invariants: a record's mask depends on its own slots and key only, not on its place in the batch; without `padding`
every hidden slot is a target and keeps off the outer half second.

Shapes: B records, S slots, N places for beats, K places for targets (the most there can be).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models.beats import LEADS, Slots
from ecg_jax.records.windows import MAX_PEAKS, SLOTS

MASKINGS = ("token", "beat")
LAST = np.uint32(0xFFFFFFFF)  # noise of what may not be drawn, above all that may


class Masked(NamedTuple):
    """hidden bool [B, S]; the targets in slot order: index int32 [B, K] of their slots, and there bool [B, K], False
    after the last (whose index is then S - 1).
    """

    hidden: jax.Array
    index: jax.Array
    there: jax.Array


def draw(keys_B: jax.Array, slots: Slots, *, mode: str, masking: str, ratio: float, padding: bool = False) -> Masked:
    """Masks of B records, `keys` [B] typed; `mode` is that of the slots.

      token    round(ratio * n) of the n inner slots of a record, each set of them as likely as any other
      beat     round(ratio * n) of the n beats that have inner slots, at least one if there is any: all leads of them
      padding  int(ratio * S) of all S slots, wherever they lie, as HeartLang does; only with `token`

    Halves are rounded to even. Raises UsageError for choices that do not exist or do not go together.
    """
    number = slots.there.shape[1]
    check(masking, ratio, padding)
    if padding:
        count_B = jnp.full(len(keys_B), int(ratio * number))
        hidden = _chosen(keys_B, jnp.ones_like(slots.there), count_B)
    elif masking == "token":
        hidden = _chosen(keys_B, slots.inner, _share(ratio, slots.inner))
    else:
        beat_N = jnp.arange(_most_beats(number, mode))
        inner_BxN = (slots.inner[:, None] & (slots.beat[:, None] == beat_N[:, None])).any(2)
        count_B = jnp.maximum(_share(ratio, inner_BxN), inner_BxN.any(1))
        chosen_BxN = _chosen(keys_B, inner_BxN, count_B)
        hidden = slots.inner & jnp.take_along_axis(chosen_BxN, jnp.minimum(slots.beat, len(beat_N) - 1), axis=1)
    index, there = positions(hidden, most_targets(number, mode, masking, ratio, padding))
    return Masked(hidden, index, there)


def check(masking: str, ratio: float, padding: bool) -> None:
    """Raises UsageError for choices that `draw` would refuse."""
    if masking not in MASKINGS:
        raise UsageError(f"unknown masking {masking!r}{did_you_mean(masking, MASKINGS)}; known: {', '.join(MASKINGS)}")
    if not 0 < ratio < 1:
        raise UsageError(f"mask ratio {ratio} is not between 0 and 1")
    if padding and masking != "token":
        raise UsageError(f"padding is hidden slot by slot: use masking 'token', not {masking!r}")


def most_targets(number: int, mode: str, masking: str, ratio: float, padding: bool = False) -> int:
    """K: the most targets that a record of `number` slots can have, whatever its beats."""
    if padding:
        return max(1, int(ratio * number))
    if masking == "token":
        return max(1, round(ratio * number))
    most = 0
    for n in range(1, _most_beats(number, mode) + 1):
        chosen, leads = max(1, round(ratio * n)), min(LEADS, number // n)
        rest = number - leads * n if leads < LEADS else 0  # slots of a lead that is cut
        most = max(most, chosen * leads + min(chosen, rest))
    return most


def most_per_lead(number: int, mode: str, masking: str, ratio: float, padding: bool = False) -> int:
    """The most targets that one lead of a record can have, whatever its beats."""
    beats = _most_beats(number, mode)
    if padding or masking == "token":
        return min(beats, most_targets(number, mode, masking, ratio, padding))
    return max(1, round(ratio * beats))


def _most_beats(number: int, mode: str) -> int:
    return number // LEADS if mode == "robust" else min(number, MAX_PEAKS)


def positions(chosen_BxS: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Places of the chosen slots in ascending order: (index int32 [B, most], there bool [B, most])."""
    before_BxS = jnp.cumsum(chosen_BxS, axis=1, dtype=jnp.int32)
    # The place of target k is how many slots have seen at most k of them: compares and sums, no sort, no scatter.
    index = (before_BxS[:, None, :] <= jnp.arange(most)[:, None]).sum(2, dtype=jnp.int32)
    return jnp.minimum(index, chosen_BxS.shape[1] - 1), jnp.arange(most) < before_BxS[:, -1:]


def _share(ratio: float, candidate_BxS: jax.Array) -> jax.Array:
    # From a table made in double precision, as `most_targets` counts.
    counts = np.array([round(ratio * n) for n in range(candidate_BxS.shape[1] + 1)], np.int32)
    return jnp.asarray(counts)[candidate_BxS.sum(1)]


def _chosen(keys_B: jax.Array, candidate_BxS: jax.Array, count_B: jax.Array) -> jax.Array:
    """`count` of each record's candidates, uniformly: those with the least noise."""
    size = candidate_BxS.shape[1]
    # Drawn for all places that there can be: a mask does not depend on how many slots a run has.
    noise_BxS = jax.vmap(lambda key: jax.random.bits(key, (SLOTS,), jnp.uint32))(keys_B)[:, :size]
    # The place in the last bits makes every noise unique, so that one sort of values says who is in.
    noise_BxS = (noise_BxS >> 1 & ~np.uint32(SLOTS - 1)) | jnp.arange(size, dtype=jnp.uint32)
    noise_BxS = jnp.where(candidate_BxS, noise_BxS, LAST)
    last_Bx1 = jnp.take_along_axis(jnp.sort(noise_BxS, axis=1), jnp.maximum(count_B - 1, 0)[:, None], axis=1)
    return candidate_BxS & (noise_BxS <= last_Bx1) & (count_B > 0)[:, None]
