"""Vector quantisation on the unit sphere: nearest code, its moving average, the k-means that starts it, its upkeep.

Pure functions of arrays; gradients, and what counts as a sample, are the caller's affair. A code is a unit vector. It
follows the mean direction of the samples nearest to it by an exponential moving average; nothing else moves it, apart
from `refreshed`. Invariants: a sample of weight 0 changes nothing; all sums are over the whole batch, so that under
`jit` a sharded batch gives the result of one device up to rounding.

Source: HeartLang's quantiser (github.com/PKUDigitalHealth/HeartLang), that of BEiT v2 (Peng et al., arXiv:2208.06366);
spherical k-means after Dhillon and Modha, Machine Learning 42, 2001.

Shapes: B records, S slots, M samples, N codes, d features of a code, R seeds.
"""

import jax
import jax.numpy as jnp
from jax import lax

FLOOR = 1e-6  # shorter vectors have no direction
PUBLISHED_FLOOR = 1e-12
SCORE_BYTES = {"cpu": 8 << 20}  # of similarities held at once: on CPU about what its caches hold
SCORE_BYTES_ELSEWHERE = 256 << 20
DEAD = 0.01  # a code that is used less than this share of an even use is called dead


def normalise(x: jax.Array, faithful: bool = False) -> jax.Array:
    """x over its length, along the last axis.

    Below FLOOR x is divided by FLOOR and has no gradient: the direction of such a vector is rounding, and its gradient
    would be up to 1 / |x|. With `faithful` as published: x over the larger of its length and 1e-12, so that at 0 the
    gradient of x is 1e12 times what comes in.
    """
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    floor = PUBLISHED_FLOOR if faithful else FLOOR
    long = square > floor**2
    if not faithful:
        x = jnp.where(long, x, lax.stop_gradient(x))
    # The root of a constant where x is short: that of 0 has no derivative.
    return x / jnp.sqrt(jnp.where(long, square, floor**2))


def nearest(z_BxSxd: jax.Array, codebook_Nxd: jax.Array, by_angle: bool = False) -> jax.Array:
    """The code nearest to each vector, int32 [B, S], the first of equals; full precision.

    `by_angle` takes the largest dot product instead, which differs where codes are not of one length.
    """
    shift_N = 0.0 if by_angle else -0.5 * jnp.sum(codebook_Nxd**2, axis=1)
    batch, slots, _ = z_BxSxd.shape
    codes = len(codebook_Nxd)

    def of(z_BxCxd: jax.Array) -> jax.Array:
        scores = jnp.einsum("bsd,nd->bsn", z_BxCxd, codebook_Nxd, precision=lax.Precision.HIGHEST) + shift_N
        # A maximum and a minimum: XLA-CPU does argmax one number at a time.
        best = scores.max(-1, keepdims=True)
        return jnp.where(scores == best, jnp.arange(codes), codes - 1).min(-1).astype(jnp.int32)

    # Slots, not records, are taken in turns: records may lie on different devices.
    most = max(SCORE_BYTES.get(jax.default_backend(), SCORE_BYTES_ELSEWHERE) // (4 * batch * codes), 1)
    turn = max(n for n in range(1, slots + 1) if slots % n == 0 and n <= most)
    if turn == slots:
        return of(z_BxSxd)
    turns_TxBxCxd = z_BxSxd.reshape(batch, slots // turn, turn, -1).swapaxes(0, 1)
    return lax.map(of, turns_TxBxCxd).swapaxes(0, 1).reshape(batch, slots)


def tally(
    z_BxSxd: jax.Array, codes_BxS: jax.Array, weight_BxS: jax.Array, codes: int, integers: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """(weight of the samples of each code [N], their weighted sum [N, d]), float32; weights in [0, 1].

    Args:
        integers: add up fixed-point numbers, of steps as small as int32 holds for this many samples (6e-5 for 65,536).
            On GPU sums of floats come in no fixed order, and a run could not be repeated. Default: not on CPU.
    """
    samples = codes_BxS.size
    values = jnp.concatenate([z_BxSxd, jnp.ones_like(z_BxSxd[..., :1])], axis=-1) * weight_BxS[..., None]
    unit = 1.0
    if integers if integers is not None else jax.default_backend() != "cpu":
        unit = 2.0 ** (30 - samples.bit_length())
        values = jnp.round(values * unit).astype(jnp.int32)
    total = jax.ops.segment_sum(values.reshape(samples, -1), codes_BxS.reshape(-1), codes)
    total = total.astype(jnp.float32) / unit
    return total[:, -1], total[:, :-1]


def moved(
    codebook_Nxd: jax.Array, count_N: jax.Array, total_Nxd: jax.Array, decay: float, faithful: bool = False
) -> jax.Array:
    """The codebook after one step of the moving average; codes without a sample stay where they are.

    `count` and `total` of `tally`; any common factor cancels.
    """
    used_Nx1 = (count_N > 0)[:, None]
    mean_Nxd = normalise(total_Nxd / jnp.where(used_Nx1, count_N[:, None], 1), faithful)
    target_Nxd = jnp.where(used_Nx1, mean_Nxd, codebook_Nxd)
    return normalise(decay * codebook_Nxd + (1 - decay) * target_Nxd, faithful)


def draw(key: jax.Array, z_BxSxd: jax.Array, weight_BxS: jax.Array, number: int) -> jax.Array:
    """`number` random samples, [number, d], each weighted one at most once; where there are too few, all in turns.

    Zeros without any.
    """
    flat = z_BxSxd.reshape(-1, z_BxSxd.shape[-1])
    there = weight_BxS.reshape(-1) > 0
    order = jnp.argsort(jnp.where(there, jax.random.uniform(key, there.shape), 2.0))
    at = order[jnp.arange(number) % jnp.maximum(there.sum(), 1)]
    return jnp.where(there.any(), flat[at], 0)


def kmeans(
    z_BxSxd: jax.Array, weight_BxS: jax.Array, means_Nxd: jax.Array, iterations: int = 10, faithful: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means from given means: (means [N, d], weight of the members of each in the last assignment [N]).

    Samples go to the largest dot product; a mean without a member stays. Published: every position is a sample, from
    random rows, 10 iterations.
    """

    def step(_, state):
        means, _ = state
        codes = nearest(z_BxSxd, means, by_angle=True)
        count, total = tally(z_BxSxd, codes, weight_BxS, len(means))
        used = (count > 0)[:, None]
        new = normalise(total / jnp.where(used, count[:, None], 1), faithful)
        return jnp.where(used, new, means), count

    return lax.fori_loop(0, iterations, step, (means_Nxd, jnp.zeros(len(means_Nxd), means_Nxd.dtype)))


def seeds(keys_B: jax.Array, z_BxSxd: jax.Array, weight_BxS: jax.Array, number: int) -> jax.Array:
    """Candidates for `refreshed`: random counted samples, float32 [number, d], zeros where there are too few.

    `keys` [B] typed keys, one per record: what is drawn does not depend on the order of the records.
    """
    slots = z_BxSxd.shape[1]
    chance_BxS = jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(keys_B)
    best_R, at_R = lax.top_k(jnp.where(weight_BxS > 0, chance_BxS, -1.0).reshape(-1), number)
    return jnp.where(best_R[:, None] >= 0, z_BxSxd.reshape(-1, z_BxSxd.shape[-1])[at_R], 0)


def refreshed(
    codebook_Nxd: jax.Array, usage_N: jax.Array, seeds_Rxd: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """(codebook, usage) with codes used less than `share` of an even use put on a seed each, as far as there are seeds.

    Their usage becomes the even one, so that each has about ln(1 / share) / (1 - decay) updates to find samples.
    """
    even = usage_N.sum() / len(usage_N)
    rare_N = usage_N < share * even
    order_N = jnp.cumsum(rare_N) - 1
    seed_Nxd = normalise(seeds_Rxd)[jnp.clip(order_N, 0, len(seeds_Rxd) - 1)]
    put_N = rare_N & (order_N < len(seeds_Rxd)) & (jnp.sum(seed_Nxd**2, axis=1) > 0.5)
    return jnp.where(put_N[:, None], seed_Nxd, codebook_Nxd), jnp.where(put_N, even, usage_N)


def perplexity(usage_N: jax.Array) -> jax.Array:
    """Exponential of the entropy of a distribution over codes, given up to a factor: codes in even use, so to say."""
    share_N = usage_N / jnp.maximum(usage_N.sum(), jnp.finfo(jnp.float32).tiny)
    return jnp.exp(-jnp.sum(jnp.where(share_N > 0, share_N * jnp.log(jnp.where(share_N > 0, share_N, 1)), 0)))


def dead(usage_N: jax.Array) -> jax.Array:
    """Share of the codes that are used less than DEAD of an even use."""
    return jnp.mean(usage_N < DEAD * usage_N.sum() / len(usage_N), dtype=jnp.float32)
