"""VQ-HBR: what counts and what does not, invariances, the switches, upkeep of the codebook."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import vqhbr
from ecg_jax.models.vqhbr import Sentences

CONFIG = vqhbr.Config(
    width=16,
    encoder_layers=2,
    decoder_layers=1,
    heads=2,
    head_size=6,
    mlp=20,
    codes=24,
    code_dim=8,
    slots=20,
    window=12,
    beta=0.5,
)
FAITHFUL = dataclasses.replace(CONFIG, faithful=True)
REFRESH = dataclasses.replace(CONFIG, refresh=0.5)

# Compiled, the configuration a static argument, as in training.
init = jax.jit(vqhbr.init, static_argnums=0)
encode = jax.jit(vqhbr.encode, static_argnums=0)
decode = jax.jit(vqhbr.decode, static_argnums=0)
losses = jax.jit(vqhbr.losses, static_argnums=0)
loss_of = jax.jit(vqhbr.loss, static_argnums=0)
slope = jax.jit(jax.value_and_grad(vqhbr.loss, argnums=1, has_aux=True), static_argnums=0)
absorb = jax.jit(vqhbr.absorb, static_argnums=0)
started = jax.jit(vqhbr.started, static_argnums=0)
started_at = jax.jit(
    lambda config, params, z, counted: vqhbr.started(config, params, z, counted, jax.random.key(3)), static_argnums=0
)


def sentences(beats=(12, 17, 8, 14), slots=20, seed=0):
    """(tokens, lead, time, there, counted): records of so many tokens; of the counted ones the first is left out."""
    rng = np.random.default_rng(seed)
    there = np.arange(slots) < np.asarray(beats)[:, None]
    tokens = np.where(there[:, :, None], rng.normal(0, 0.3, (len(beats), slots, 12)), 0).astype(np.float32)
    lead, time = rng.integers(0, 12, there.shape), rng.integers(0, 10, there.shape)
    counted = there.copy()
    counted[:, 0] = False
    return Sentences(tokens, lead * there, time * there, there, counted)


@pytest.fixture(scope="module")
def params():
    found = init(CONFIG, jax.random.key(0))
    # off the singular start, where all heads' biases are 0 and dead tokens have no direction
    for head in ("encode_head", "decode_head"):
        found[head] = {
            name: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)) for name, leaf in found[head].items()
        }
    return found


def cut(data, slots):
    return [x[:, :slots] for x in data]


def test_sizes():
    def count(config):
        shapes = jax.eval_shape(lambda key: vqhbr.init(config, key), jax.random.key(0))
        return {name: sum(leaf.size for leaf in jax.tree.leaves(group)) for name, group in shapes.items()}

    found = count(vqhbr.Config())
    assert found["encoder"] == 14_628_608 and found["decoder"] == 7_611_136
    assert found["encode_head"] == 689_024 and found["decode_head"] == 664_416
    assert found["codebook"] == 8192 * 128 and found["usage"] == 8192
    assert sum(found[name] for name in ("encoder", "decoder", "encode_head", "decode_head")) == 23_593_184
    tokens, layer = 256, 768 * (3 * 128 + 128 + 2 * 2048)
    wanted = 256 * 3 * 96 * 768 + 4 * (257 * layer + 2 * 257**2 * 128) + tokens * (768 * 768 + 768 * 128 + 128 * 8192)
    assert vqhbr.encode_macs(vqhbr.Config(), tokens) == wanted
    assert 8.3e9 < 2 * wanted < 8.5e9
    assert 3 * wanted < vqhbr.training_macs(vqhbr.Config(), tokens) < 5 * wanted


@pytest.mark.parametrize(
    "wrong", [{"codes": 0}, {"slots": -1}, {"decay": 1.0}, {"refresh": 1.0}, {"refresh": -0.1}, {"heads": 0}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(UsageError, match=f"codebook: .*{next(iter(wrong))}"):
        vqhbr.Config(**wrong)


def test_the_start():
    one, same, other = (init(CONFIG, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(one["encoder"]["token_kernel"], other["encoder"]["token_kernel"])
    assert np.allclose(np.linalg.norm(one["codebook"], axis=1), 1, atol=1e-6)
    assert (
        np.std(one["encoder"]["position_table"])
        < 0.1
        < 0.9
        < np.std(init(FAITHFUL, jax.random.key(0))["encoder"]["position_table"])
    )


def test_a_code_does_not_depend_on_the_number_of_slots(params):
    data = sentences(beats=(12, 17, 8, 14))[:4]
    long, short = encode(CONFIG, params, *data), encode(CONFIG, params, *cut(data, 17))
    there = data[3][:, :17]  # record 1 fills them: the ends of its sentence do not touch
    assert np.allclose(long[:, :17][there], short[there], atol=1e-6)
    drawn = decode(CONFIG, params, long, *data[1:]), decode(CONFIG, params, short, *cut(data, 17)[1:])
    assert np.allclose(drawn[0][:, :17][there], drawn[1][there], atol=1e-5)
    changed = (np.where(data[3][:, :, None], data[0], 7.0), *data[1:])
    assert np.allclose(encode(CONFIG, params, *changed)[data[3]], long[data[3]], atol=1e-6)


def test_as_published_padding_is_seen_and_the_ends_touch(params):
    data = sentences()[:4]
    found = encode(FAITHFUL, params, *data)
    there = data[3]
    assert np.abs(found - encode(CONFIG, params, *data))[there].max() > 1e-3
    first = data[0].copy()
    first[1, 19] = 1.0  # the last slot is the neighbour of the first
    assert np.abs(encode(FAITHFUL, params, first, *data[1:]) - found)[1, 0].max() > 1e-3
    with pytest.raises(UsageError, match="17 slots for a codebook or model of 20"):
        encode(FAITHFUL, params, *cut(data, 17))
    for config in (CONFIG, FAITHFUL):
        with pytest.raises(UsageError, match="24 slots"):
            encode(config, params, *sentences(slots=24)[:4])


def test_lead_and_time_change_codes(params):
    tokens, lead, time, there, _ = sentences()
    found = encode(FAITHFUL, params, tokens, lead, time, there)
    assert np.allclose(np.linalg.norm(found, axis=2), 1, atol=1e-5)
    for other in ((None, None), (lead, None), ((lead + 1) % 12, time), (lead, (time + 1) % 10)):
        assert np.abs(encode(FAITHFUL, params, tokens, *other, there) - found)[there].max() > 1e-3


def test_only_counted_tokens_count(params):
    data = sentences()
    counted = data[4]
    (loss, aux), _ = slope(CONFIG, params, data)
    each = losses(CONFIG, params, data)
    for name in ("reconstruction", "commitment"):
        assert float(aux[name]) == pytest.approx(float(each[name][counted].mean()), rel=1e-5)
    assert float(aux["known"]) == counted.sum() and aux["count"].sum() == counted.sum()
    assert np.array_equal(aux["count"], np.bincount(each["codes"][counted], minlength=24))
    assert float(loss) == pytest.approx(float(aux["reconstruction"] + 0.5 * aux["commitment"]), rel=1e-6)
    (every, aux), _ = slope(FAITHFUL, params, data)
    assert float(aux["known"]) == aux["count"].sum() == 4 * 20
    each = losses(FAITHFUL, params, data)
    assert float(every) == pytest.approx(
        float(each["reconstruction"].mean() + 0.5 * each["commitment"].mean()), rel=1e-5
    )


def test_gradients_at_the_start_and_the_published_trap():
    params = init(CONFIG, jax.random.key(0))
    data = sentences()
    data.tokens[0, 3:6], data.counted[0, 3:6] = 0, False  # a dead lead
    data.there[2], data.counted[2], data.tokens[2] = False, False, 0  # a record without a beat
    (loss, aux), grads = slope(CONFIG, params, data)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["encode_head"]["out_bias"]).max() < 10
    assert not np.any(grads["codebook"]) and not np.any(grads["encoder"]["mask_vector"])
    moved = {path for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if np.any(leaf)}
    assert len(moved) == len(jax.tree.leaves(grads)) - 4  # all but the codebook, its usage and two mask vectors
    _, published = slope(FAITHFUL, params, data)
    assert np.abs(published["encode_head"]["out_bias"]).max() > 1e6
    nothing = data._replace(counted=np.zeros_like(data.counted))
    (loss, aux), grads = slope(CONFIG, params, nothing)
    new, _ = absorb(CONFIG, params, aux)
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert np.allclose(new["codebook"], params["codebook"], atol=1e-6)


def test_kmeans_start_takes_counted_tokens_only(params):
    data = sentences(beats=(19, 17, 18, 14))
    z = encode(CONFIG, params, *data[:4])
    found = started_at(CONFIG, params, z, data[4])
    assert float(found["usage"].sum()) == pytest.approx(1, abs=1e-6) and np.all(found["usage"] >= 0)
    assert np.allclose(np.linalg.norm(found["codebook"], axis=1), 1, atol=1e-5)
    moved = jnp.where(data[4][:, :, None], z, -z)
    assert np.array_equal(started_at(CONFIG, params, moved, data[4])["codebook"], found["codebook"])
    faithful = started_at(FAITHFUL, params, moved, data[4])
    assert not np.array_equal(faithful["codebook"], found["codebook"]) and not np.any(faithful["usage"])
    nearest = np.max(np.asarray(z[data[4]]) @ np.asarray(found["codebook"]).T, axis=1).mean()
    assert nearest > np.max(np.asarray(z[data[4]]) @ np.asarray(params["codebook"]).T, axis=1).mean() + 0.05
    none = started_at(CONFIG, params, z, np.zeros_like(data[4]))
    assert np.allclose(none["codebook"], params["codebook"], atol=1e-6) and not np.any(none["usage"])


def test_micro_batches_move_the_codebook_as_their_batch_does(params):
    data = sentences()
    params = params | {"usage": jnp.full(24, 1 / 24)}
    whole = absorb(CONFIG, params, loss_of(CONFIG, params, data)[1])
    halves = [loss_of(CONFIG, params, Sentences(*(x[i : i + 2] for x in data)))[1] for i in (0, 2)]
    mean = jax.tree.map(lambda *x: sum(x) / 2, *halves)  # what `training.step.gradient` makes of aux
    parts = absorb(CONFIG, params, mean)
    for name in ("codebook", "usage"):
        assert np.allclose(parts[0][name], whole[0][name], atol=1e-6)
        assert np.abs(whole[0][name] - params[name]).max() > 1e-4
    assert float(parts[1]["perplexity"]) == pytest.approx(float(whole[1]["perplexity"]), rel=1e-4)
    assert set(whole[1]) == {"known", "reconstruction", "commitment", "perplexity", "dead"}


def test_refresh_puts_rare_codes_on_tokens_of_the_batch(params):
    data = sentences()
    usage = jnp.full(24, 1 / 24).at[5:9].set(0)
    params = params | {"usage": usage}
    keys = jax.random.split(jax.random.key(7), 4)
    aux = loss_of(REFRESH, params, data, keys)[1]
    new, scalars = absorb(REFRESH, params, aux)
    plain, _ = absorb(CONFIG, params, loss_of(CONFIG, params, data)[1])
    changed = np.flatnonzero(np.any(new["codebook"] != plain["codebook"], axis=1))
    assert set(changed) <= {5, 6, 7, 8} and len(changed) > 0
    z = np.asarray(losses(CONFIG, params, data)["z"])[data[4]]
    assert (np.asarray(new["codebook"])[changed] @ z.T).max(1).min() > 1 - 1e-5
    assert np.all(new["usage"][changed] > 0.03) and "seeds" not in scalars
    again = absorb(REFRESH, params, loss_of(REFRESH, params, data, jax.random.split(jax.random.key(8), 4))[1])[0]
    assert not np.array_equal(again["codebook"], new["codebook"])
    with pytest.raises(UsageError, match="refresh"):
        loss_of(REFRESH, params, data)
