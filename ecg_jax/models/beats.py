"""Beat windows on the device: which slots a record has, their tokens, blanked windows, and the frames they cover.

A slot is one beat in one lead. Slots lie lead by lead without gaps: with n beats, slot = lead * n + beat, and what
comes after is padding. Only R peaks and the valid span come in; tokens are gathered from the signal inside the
compiled step and stored nowhere. What it does not do: find peaks or read files (`records.windows` holds the same
rules for one record in NumPy, and the tests compare the two).

Invariants: shapes are static; a record's slots do not depend on the other records; padding slots hold zeros.

Shapes: B records, P places for peaks, N places for beats, S slots, K chosen slots, T samples, W = 96 samples
of a token, C = 12 leads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.records.windows import EDGE, HALF, MAX_PEAKS, MODES, MOST, SLOTS, WINDOW

LEADS = 12
SECOND = 100  # samples of a time index


class Slots(NamedTuple):
    """Slots of B records, int32 or bool [B, S]; everything is 0 (False) where `there` is False.

    lead    0 to 11
    beat    place among the record's kept beats, 0 to n - 1
    time    R peak // 100, from 0
    peak    R peak in samples of the stored record
    start, end  window [start, end) in samples of the stored record
    offset  place of sample `start` in the token
    code    place in the record's 256 stored codes
    there   whether the slot holds a beat
    inner   whether its window keeps off the outer half second of the valid span: only such slots are targets
    n       int32 [B], beats kept
    """

    lead: jax.Array
    beat: jax.Array
    time: jax.Array
    peak: jax.Array
    start: jax.Array
    end: jax.Array
    offset: jax.Array
    code: jax.Array
    there: jax.Array
    inner: jax.Array
    n: jax.Array


def slots(
    peaks_BxP: jax.Array,
    valid_Bx2: jax.Array,
    number: int,
    *,
    mode: str,
    crop: tuple[jax.Array, int] | None = None,
) -> Slots:
    """The S = `number` slots of each record.

    peaks: sample positions in the stored record, ascending, -1 after the last, at least one place; valid: (start,
    length). Modes, as in `records.windows`:

      robust     at most `number // 12` beats (and no more than the 21 that have codes), the middle ones, in all leads
      heartlang  all beats; the sequence is cut at `number` slots, so leads at its end are lost

    `crop` = (first [B], length) in samples keeps only beats whose windows lie wholly inside [first, first + length):
    one run of neighbours. Positions stay those of the stored record. Raises UsageError for an unknown mode, or
    more slots than there are codes.
    """
    if mode not in MODES:
        raise UsageError(f"unknown beats {mode!r}{did_you_mean(mode, MODES)}; known: {', '.join(MODES)}")
    if not 0 < number <= SLOTS:
        raise UsageError(f"{number} slots asked for; a record has 1 to {SLOTS}")
    peaks_BxP = peaks_BxP.astype(jnp.int32)
    valid_Bx2 = valid_Bx2.astype(jnp.int32)
    start_BxP, end_BxP, offset_BxP, all_B = windows(peaks_BxP, valid_Bx2)

    # Beats first to first + coded have codes; those that stay are a run of them, shown to shown + n.
    coded_B = jnp.minimum(all_B, MOST) if mode == "robust" else all_B
    first_B = (all_B - coded_B) // 2
    shown_B, stop_B = first_B, first_B + coded_B
    if crop is not None:
        left_B, length = crop
        place_P = jnp.arange(peaks_BxP.shape[1])
        real_BxP = place_P < all_B[:, None]
        early_BxP = real_BxP & (start_BxP < left_B[:, None])
        late_BxP = real_BxP & (end_BxP > left_B[:, None] + length)
        shown_B = jnp.maximum(shown_B, jnp.where(early_BxP, place_P + 1, 0).max(1))
        stop_B = jnp.minimum(stop_B, jnp.where(late_BxP, place_P, peaks_BxP.shape[1]).min(1))
    n_B = jnp.maximum(stop_B - shown_B, 0)
    if mode == "robust":
        most = number // LEADS
        shown_B = shown_B + jnp.maximum(n_B - most, 0) // 2
        n_B = jnp.minimum(n_B, most)

    slot_S = jnp.arange(number)
    per_lead_Bx1 = jnp.maximum(n_B, 1)[:, None]
    lead_BxS = slot_S // per_lead_Bx1
    beat_BxS = slot_S % per_lead_Bx1
    code_BxS = lead_BxS * coded_B[:, None] + (shown_B - first_B)[:, None] + beat_BxS
    there_BxS = (slot_S < LEADS * n_B[:, None]) & (code_BxS < SLOTS)
    at_BxS = jnp.minimum(shown_B[:, None] + beat_BxS, peaks_BxP.shape[1] - 1)
    packed_BxPx4 = jnp.stack([peaks_BxP, start_BxP, end_BxP, offset_BxP], axis=2)
    packed_BxSx4 = jnp.take_along_axis(packed_BxPx4, at_BxS[:, :, None], axis=1)
    peak, start, end, offset, lead, beat, code = (
        jnp.where(there_BxS, values, 0) for values in (*jnp.moveaxis(packed_BxSx4, 2, 0), lead_BxS, beat_BxS, code_BxS)
    )
    left_Bx1, right_Bx1 = valid_Bx2[:, :1] + EDGE, valid_Bx2.sum(1, keepdims=True) - EDGE
    inner = there_BxS & (start >= left_Bx1) & (end <= right_Bx1)
    return Slots(lead, beat, peak // SECOND, peak, start, end, offset, code, there_BxS, inner, n_B)


def windows(peaks_BxP: jax.Array, valid_Bx2: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(start, end, offset int32 [B, P], number of peaks int32 [B]); places without a peak mean nothing.

    The rule of HeartLang's QRS tokenizer: a window reaches half way to both neighbours, 48 samples at the ends of
    the record; where that is more than 96 samples, it is the 96 around the peak. Source: J. Jin et al., "Reading Your
    Heart: Learning ECG Words and Sentences via Pre-training ECG Language Model" (2025), and its repository.
    """
    places = peaks_BxP.shape[1]
    n_B = (peaks_BxP >= 0).sum(1)
    place_P = jnp.arange(places)
    low_Bx1, high_Bx1 = valid_Bx2[:, :1], valid_Bx2.sum(1, keepdims=True)
    before_BxP = jnp.pad(peaks_BxP[:, :-1], ((0, 0), (1, 0)))
    after_BxP = jnp.pad(peaks_BxP[:, 1:], ((0, 0), (0, 1)))
    is_first_P, is_last_BxP = place_P == 0, place_P == n_B[:, None] - 1
    early_BxP = jnp.maximum(peaks_BxP - HALF, low_Bx1)
    whole_BxP = jnp.minimum(early_BxP + WINDOW, high_Bx1)
    start_BxP = jnp.where(is_first_P, early_BxP, (peaks_BxP + before_BxP) // 2)
    end_BxP = jnp.where(is_last_BxP, jnp.minimum(peaks_BxP + HALF, high_Bx1), (peaks_BxP + after_BxP) // 2)
    around_BxP = (end_BxP - start_BxP > WINDOW) | (n_B[:, None] == 1)
    start_BxP = jnp.where(around_BxP, early_BxP, start_BxP)
    end_BxP = jnp.where(around_BxP, whole_BxP, end_BxP)
    offset_BxP = jnp.maximum(HALF - (peaks_BxP - start_BxP), 0)
    return start_BxP, end_BxP, offset_BxP, n_B


def tokens(x_BxTxC: jax.Array, slots: Slots, shift_B: jax.Array | int = 0) -> jax.Array:
    """Tokens float32 [B, S, 96]: the samples of each window, the peak at place 48, zeros around and in padding.

    `x` starts at sample `shift` of the stored record; what lies outside it reads as zero.
    """
    length = x_BxTxC.shape[1]
    lead_first_BxCxT = jnp.pad(x_BxTxC.transpose(0, 2, 1), ((0, 0), (0, 0), (WINDOW, WINDOW)))
    first_BxS = jnp.clip(slots.start - slots.offset - _column(shift_B) + WINDOW, 0, length + WINDOW)

    def cut(x_CxT: jax.Array, lead: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x_CxT, (lead, first), (1, WINDOW))[0]

    # Whole runs of samples: a gather of single samples needs an index for each, and takes longer.
    samples_BxSxW = jax.vmap(jax.vmap(cut, (None, 0, 0)))(lead_first_BxCxT, slots.lead, first_BxS)
    place_W = jnp.arange(WINDOW)
    stop_BxS = slots.end - slots.start + slots.offset
    used_BxSxW = (place_W >= slots.offset[:, :, None]) & (place_W < stop_BxS[:, :, None]) & slots.there[:, :, None]
    return jnp.where(used_BxSxW, samples_BxSxW, 0).astype(jnp.float32)


def blank(
    x_BxTxC: jax.Array, slots: Slots, hidden_BxS: jax.Array, value_C: jax.Array, shift_B: jax.Array | int = 0
) -> jax.Array:
    """x with every sample inside a hidden slot's window, in that slot's lead, replaced by the lead's value.

    `x` starts at sample `shift` of the stored record.
    """
    bits_BxN, start_BxN, end_BxN = _by_beat(slots, hidden_BxS & slots.there)
    shift_Bx1 = _column(shift_B)
    at_Tx1 = jnp.arange(x_BxTxC.shape[1])[:, None]
    inside_BxTxN = (at_Tx1 >= (start_BxN - shift_Bx1)[:, None]) & (at_Tx1 < (end_BxN - shift_Bx1)[:, None])
    own_BxTxN = jnp.where(inside_BxTxN, bits_BxN[:, None], 0)
    bits_BxT = jax.lax.reduce(own_BxTxN, np.int32(0), jax.lax.bitwise_or, (2,))
    covered_BxTxC = (bits_BxT[:, :, None] >> jnp.arange(LEADS)) & 1 > 0
    return jnp.where(covered_BxTxC, value_C.astype(x_BxTxC.dtype), x_BxTxC)


def _by_beat(slots: Slots, hidden_BxS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden leads of each beat as bits of an int32, and its window (start, end): [B, N] each, N beats at most.

    All leads share the windows, so a sample looks at tens of beats instead of hundreds of slots.
    """
    number = hidden_BxS.shape[1]
    beat_N = jnp.arange(min(number, MAX_PEAKS))
    slot_BxCxN = jnp.arange(LEADS)[:, None] * slots.n[:, None, None] + beat_N
    real_BxCxN = (beat_N < slots.n[:, None, None]) & (slot_BxCxN < number)
    at_BxM = jnp.minimum(slot_BxCxN, number - 1).reshape(len(hidden_BxS), -1)
    hidden_BxCxN = jnp.take_along_axis(hidden_BxS, at_BxM, axis=1).reshape(slot_BxCxN.shape) & real_BxCxN
    bits_BxN = (hidden_BxCxN.astype(jnp.int32) << jnp.arange(LEADS)[:, None]).sum(1)
    return bits_BxN, slots.start[:, : len(beat_N)], slots.end[:, : len(beat_N)]


def overlap(start_BxK: jax.Array, end_BxK: jax.Array, frames: int, stride: int) -> jax.Array:
    """Share of each window [start, end) that lies in each frame of `stride` samples, float32 [B, K, frames].

    Rows sum to 1 (0 for an empty window, or one that no frame touches). Positions in samples of the framed signal.
    """
    left_F = jnp.arange(frames) * stride
    inside_BxKxF = jnp.minimum(end_BxK[:, :, None], left_F + stride) - jnp.maximum(start_BxK[:, :, None], left_F)
    inside_BxKxF = jnp.maximum(inside_BxKxF, 0).astype(jnp.float32)
    return inside_BxKxF / jnp.maximum(inside_BxKxF.sum(2, keepdims=True), 1)


def _column(shift_B: jax.Array | int) -> jax.Array:
    return jnp.asarray(shift_B, jnp.int32).reshape(-1, 1)
