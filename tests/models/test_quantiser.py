"""The quantiser: by definition, weights, chunks, and what each switch changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import quantiser

nearest = jax.jit(quantiser.nearest, static_argnames="by_angle")
tally = jax.jit(quantiser.tally, static_argnums=(3, 4))
moved = jax.jit(quantiser.moved)
draw = jax.jit(quantiser.draw, static_argnums=3)
kmeans = jax.jit(quantiser.kmeans)
seeds_of = jax.jit(quantiser.seeds, static_argnums=3)
refreshed = jax.jit(quantiser.refreshed)
upkeep = jax.jit(lambda usage: (quantiser.perplexity(usage), quantiser.dead(usage)))


def unit(shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def weights(shape, seed=2):
    return (np.random.default_rng(seed).random(shape) < 0.6).astype(np.float32)


def test_normalise_and_its_gradient_at_zero():
    x = np.float32([[3, 4], [0, 0], [1e-8, 0]])
    grad = jax.jit(jax.grad(lambda x, f: (quantiser.normalise(x, f) * np.float32([1, 2])).sum()), static_argnums=1)
    assert np.allclose(quantiser.normalise(x), [[0.6, 0.8], [0, 0], [0.01, 0]], atol=1e-7)
    assert np.allclose(quantiser.normalise(x, True), [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-7)
    ours, published = grad(x, False), grad(x, True)
    assert np.allclose(ours[0], [-0.064, 0.048], atol=1e-6) and np.array_equal(ours[1:], np.zeros((2, 2)))
    assert np.allclose(ours[0], published[0], atol=1e-6)
    assert np.allclose(published[1], [1e12, 2e12], rtol=1e-5)  # PyTorch's normalise has this there


def test_nearest_is_the_nearest_and_the_first_of_equals(monkeypatch):
    z = unit((3, 8, 5))
    codebook = 0.5 * unit((11, 5), 1) + unit((11, 5), 2)
    codebook[7] = codebook[2]
    distance = ((np.asarray(z)[:, :, None] - np.asarray(codebook)) ** 2).sum(-1)
    found = nearest(z, codebook)
    assert found.dtype == jnp.int32 and np.array_equal(found, distance.argmin(-1)) and 7 not in np.asarray(found)
    by_angle = nearest(z, codebook, by_angle=True)
    assert np.array_equal(by_angle, (np.asarray(z) @ np.asarray(codebook).T).argmax(-1))
    assert not np.array_equal(by_angle, found)
    monkeypatch.setitem(quantiser.SCORE_BYTES, "cpu", 4 * 3 * 11 * 2)  # two slots at a time
    assert "while" in str(jax.make_jaxpr(quantiser.nearest)(z, codebook)) or "scan" in str(
        jax.make_jaxpr(quantiser.nearest)(z, codebook)
    )
    assert np.array_equal(nearest(z, codebook), found)


def test_tally_and_its_integers():
    z, codes, weight = unit((3, 8, 5)), np.random.default_rng(1).integers(0, 4, (3, 8)), weights((3, 8))
    count, total = tally(z, codes, weight, 6)
    for j in range(6):
        mine = np.asarray(weight * (codes == j))
        assert count[j] == mine.sum() and np.allclose(
            total[j], (np.asarray(z) * mine[..., None]).sum((0, 1)), atol=1e-6
        )
    integers = tally(z, codes, weight, 6, True)
    assert np.array_equal(integers[0], count) and np.allclose(integers[1], total, atol=1e-6)
    order = np.asarray([2, 0, 1])
    again = tally(z[order], codes[order], weight[order], 6, True)
    assert np.array_equal(again[1], integers[1])  # to the bit, in any order
    ones = np.ones((64, 1024), np.float32)
    most = tally(ones[..., None], np.zeros((64, 1024), int), ones, 1, True)
    assert most[0] == most[1] == 65536  # no overflow


def test_the_moving_average():
    codebook, z = unit((4, 3)), unit((1, 6, 3), 1)
    codes = np.asarray([[0, 0, 1, 1, 1, 3]])
    count, total = tally(z, codes, np.ones((1, 6), np.float32), 4)
    new = np.asarray(moved(codebook, count, total, 0.9))
    mean = np.asarray(z)[0, :2].mean(0)
    wanted = 0.9 * np.asarray(codebook)[0] + 0.1 * mean / np.linalg.norm(mean)
    assert np.allclose(new[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    assert np.allclose(new[2], codebook[2], atol=1e-7) and np.allclose(np.linalg.norm(new, axis=1), 1, atol=1e-6)
    assert np.allclose(moved(codebook, count / 3, total / 3, 0.9), new, atol=1e-6)


def test_draw_takes_each_counted_sample_once():
    z = np.arange(1, 13, dtype=np.float32).reshape(2, 6, 1)
    weight = np.float32([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]])
    counted = {float(v) for v in z[weight > 0].ravel()}
    seen = set()
    for seed in range(5):
        drawn = draw(jax.random.key(seed), z, weight, 4).ravel().tolist()
        assert len(set(drawn)) == 4 and set(drawn) <= counted
        seen.add(tuple(drawn))
    assert len(seen) > 1
    more = draw(jax.random.key(0), z, weight, 14).ravel().tolist()
    assert all(more.count(v) == 2 for v in counted)
    assert np.all(np.asarray(draw(jax.random.key(0), z, 0 * weight, 4)) == 0)


def test_kmeans_finds_clusters_and_leaves_out_what_does_not_count():
    centres = np.eye(5)[:4]
    rng = np.random.default_rng(0)
    samples = centres[rng.integers(0, 4, (3, 20))] + rng.normal(0, 0.05, (3, 20, 5))
    samples = (samples / np.linalg.norm(samples, axis=2, keepdims=True)).astype(np.float32)
    weight = np.ones((3, 20), np.float32)
    samples[2], weight[2] = np.eye(5)[4], 0
    start = np.concatenate([samples[0, :3], centres + 0.3, -np.ones((1, 5))]).astype(np.float32)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    means, count = kmeans(samples, weight, start)
    used = np.asarray(count) > 0
    assert count.sum() == 40 and not used[-1] and np.allclose(means[-1], start[-1])
    assert np.allclose(np.linalg.norm(means, axis=1), 1, atol=1e-6)
    assert (np.asarray(means)[used] @ centres.T).max(1).min() > 0.97
    assert np.abs(np.asarray(means)[used][:, 4]).max() < 0.3
    every, all_of_them = kmeans(samples, np.ones_like(weight), start)
    assert all_of_them.sum() == 60 and np.abs(np.asarray(every)[:, 4]).max() > 0.9


def test_seeds_belong_to_records():
    z, keys = unit((4, 6, 3)), jax.random.split(jax.random.key(0), 4)
    weight = weights((4, 6))
    found = np.asarray(seeds_of(keys, z, weight, 5))
    rows = z[weight > 0]
    assert all((row == rows).all(1).any() for row in found) and len(np.unique(found, axis=0)) == 5
    order = np.asarray([3, 1, 0, 2])
    assert np.array_equal(seeds_of(keys[order], z[order], weight[order], 5), found)
    other = seeds_of(jax.random.split(jax.random.key(1), 4), z, weight, 5)
    assert not np.array_equal(other, found)
    weight[1:] = 0
    few = np.asarray(seeds_of(keys, z, weight, 20))
    assert (np.abs(few).sum(1) > 0).sum() == weight.sum() > 0


def test_rare_codes_are_put_on_seeds():
    codebook, seeds = unit((6, 3)), 0.7 * unit((3, 3), 1)
    usage = np.float32([0.5, 0.001, 0.3, 0.0, 0.19, 0.009])
    new, after = refreshed(codebook, usage, seeds, 0.1)
    put = np.asarray([1, 3, 5])
    assert np.allclose(new[put], seeds / 0.7, atol=1e-6)
    kept = np.asarray([0, 2, 4])
    assert np.array_equal(new[kept], codebook[kept]) and np.array_equal(after[kept], usage[kept])
    assert np.allclose(after[put], usage.sum() / 6)
    one, _ = refreshed(codebook, usage, seeds * [[1], [0], [0]], 0.1)  # one seed, and two places without any
    assert np.allclose(one[1], seeds[0] / 0.7, atol=1e-6) and np.array_equal(one[3], codebook[3])
    none, _ = refreshed(codebook, usage, seeds, 0.0)
    assert np.array_equal(none, codebook)


@pytest.mark.parametrize(
    ("usage", "perplexity", "dead"),
    [
        ([1, 1, 1, 1], 4, 0),
        ([5, 5, 0, 0], 2, 0.5),
        ([0.3, 0, 0, 0], 1, 0.75),
        ([0, 0, 0, 0], 1, 0),
        ([1e4, 1, 1, 1], 1, 0.75),
    ],
)
def test_perplexity_and_dead_codes(usage, perplexity, dead):
    found = upkeep(np.float32(usage))
    assert float(found[0]) == pytest.approx(perplexity, rel=5e-3) and float(found[1]) == dead
