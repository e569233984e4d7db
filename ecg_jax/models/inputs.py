"""From stored int16 to what an encoder sees: cast, crop, lead expansion and scale, all on the device.

Statistics of scale belong to the record (all its valid samples), not to the crop, so that two crops of a
record are scaled alike. What it does not do: filter or resample (that was done once, in conversion).
Invariant: samples outside `valid` are exactly zero on the way out, whatever was stored there.

Shapes: B records, T stored samples (100 Hz), L stored leads (12, or the 8 independent ones), P samples out.
"""

import jax
import jax.numpy as jnp

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.records.leads import expand_matrix

LSB = 1e-3  # one stored step in mV (or z)
RATE = 100  # samples a second
SCALES = ("gain", "mv", "zscore")
SMALLEST_GAIN = 1e-3  # one stored step; a flat record stays flat
SMALLEST_SD = 1e-3


def to_input(
    signal_BxTxL: jax.Array,
    valid_Bx2: jax.Array,
    *,
    scale: str = "gain",
    crop: int = 1000,
    keys: jax.Array | None = None,
    length: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stored records -> (x float32 [B, P, 12], valid int32 [B, 2] within x, log gain float32 [B]).

    signal int16 [B, T, L] in steps of 1 uV (or 0.001 z), valid int32 [B, 2] as (start, length) in samples.
    `crop` samples are kept: with `keys` ([B] typed keys, one per record) from a place drawn uniformly within
    the valid span if that is longer than the crop, else around the middle of the valid span. Zeros follow up
    to P = max(crop, `length`). Scales:

      gain    divided by one robust gain per record, see `robust_gain`; its natural log is returned, the
              others return 0
      mv      as stored
      zscore  each lead to mean 0 and standard deviation 1 over its valid samples
    """
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}{did_you_mean(scale, SCALES)}; known: {', '.join(SCALES)}")
    stored = signal_BxTxL.shape[1]
    crop_in = min(crop, stored)
    x_BxTxC = expand(signal_BxTxL.astype(jnp.float32) * LSB)
    inside_BxTx1 = _inside(valid_Bx2, stored)
    x_BxTxC = jnp.where(inside_BxTx1, x_BxTxC, 0)
    log_gain_B = jnp.zeros(x_BxTxC.shape[0])
    shift_Bx1xC, factor = 0.0, 1.0
    if scale == "gain":
        gain_B = robust_gain(x_BxTxC, valid_Bx2)
        factor, log_gain_B = (1.0 / gain_B)[:, None, None], jnp.log(gain_B)
    elif scale == "zscore":
        samples_Bx1x1 = jnp.maximum(inside_BxTx1.sum(1, keepdims=True), 1)
        shift_Bx1xC = x_BxTxC.sum(1, keepdims=True) / samples_Bx1x1
        spread = jnp.where(inside_BxTx1, x_BxTxC - shift_Bx1xC, 0)
        sd_Bx1xC = jnp.sqrt((spread**2).sum(1, keepdims=True) / samples_Bx1x1)
        factor = 1.0 / jnp.maximum(sd_Bx1xC, SMALLEST_SD)
    if crop_in < stored:
        start_B = crop_start(valid_Bx2, crop_in, stored, keys)
        x_BxTxC = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, crop_in))(x_BxTxC, start_B)
        left_B = jnp.maximum(valid_Bx2[:, 0] - start_B, 0)
        right_B = jnp.minimum(valid_Bx2.sum(1) - start_B, crop_in)
        valid_Bx2 = jnp.stack([left_B, jnp.maximum(right_B - left_B, 0)], 1)
        inside_BxTx1 = _inside(valid_Bx2, crop_in)
    x_BxPxC = jnp.where(inside_BxTx1, (x_BxTxC - shift_Bx1xC) * factor, 0)
    padding = max(crop, length or 0) - crop_in
    return jnp.pad(x_BxPxC, ((0, 0), (0, padding), (0, 0))), valid_Bx2.astype(jnp.int32), log_gain_B


def expand(x_BxTxL: jax.Array) -> jax.Array:
    """Twelve leads out of the eight independent ones; twelve pass through."""
    if x_BxTxL.shape[2] == 12:
        return x_BxTxL
    # Full precision: on accelerators the default of a product would cost III its microvolts.
    return jnp.einsum("btl,lc->btc", x_BxTxL, expand_matrix(), precision="highest")


def crop_start(valid_Bx2: jax.Array, crop: int, stored: int, keys_B: jax.Array | None) -> jax.Array:
    """First sample of the crop, int32 [B], such that as much of the valid span as fits is inside.

    Random (uniform over the valid span) where there are keys and the span is longer than the crop, else
    centred.
    """
    start_B, slack_B = valid_Bx2[:, 0], valid_Bx2[:, 1] - crop
    offset_B = slack_B // 2
    if keys_B is not None:
        drawn_B = jax.vmap(lambda key, slack: jax.random.randint(key, (), 0, slack + 1))(
            keys_B, jnp.maximum(slack_B, 0)
        )
        offset_B = jnp.where(slack_B > 0, drawn_B, offset_B)
    return jnp.clip(start_B + offset_B, 0, stored - crop)


def robust_gain(x_BxTxC: jax.Array, valid_Bx2: jax.Array) -> jax.Array:
    """One gain per record, float32 [B], in the unit of x, at least SMALLEST_GAIN.

    The median, over one-second blocks, of the mean of |x| over all leads and the block's valid samples;
    blocks that are less than half valid are left out (all count where there is no better one). A burst of
    noise or a pop moves it little, and a common gain keeps lead ratios and Einthoven's law. x must be zero
    outside `valid`.
    """
    batch, length, _ = x_BxTxC.shape
    blocks = -(-length // RATE)
    seconds = jnp.pad(jnp.abs(x_BxTxC).mean(2), ((0, 0), (0, blocks * RATE - length)))
    samples_BxN = _inside(valid_Bx2, blocks * RATE)[:, :, 0].reshape(batch, blocks, RATE).sum(2)
    mean_BxN = seconds.reshape(batch, blocks, RATE).sum(2) / jnp.maximum(samples_BxN, 1)
    counted_BxN = samples_BxN * 2 >= RATE
    counted_BxN = jnp.where(counted_BxN.any(1, keepdims=True), counted_BxN, samples_BxN > 0)
    ordered = jnp.sort(jnp.where(counted_BxN, mean_BxN, jnp.inf), axis=1)
    n_Bx1 = jnp.maximum(counted_BxN.sum(1, keepdims=True), 1)
    middle = jnp.concatenate([(n_Bx1 - 1) // 2, n_Bx1 // 2], axis=1)
    median_B = jnp.take_along_axis(ordered, middle, axis=1).mean(1)
    return jnp.where(jnp.isfinite(median_B), jnp.maximum(median_B, SMALLEST_GAIN), 1.0)


def _inside(valid_Bx2: jax.Array, length: int) -> jax.Array:
    """Bool [B, length, 1]: which samples are valid."""
    t = jnp.arange(length)
    start_Bx1, span_Bx1 = valid_Bx2[:, :1], valid_Bx2[:, 1:]
    return ((t >= start_Bx1) & (t < start_Bx1 + span_Bx1))[:, :, None]
