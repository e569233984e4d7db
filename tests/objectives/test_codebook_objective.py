"""Codebook objective: which tokens it sees and counts, its start, sums, upkeep under the common step, learning."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import vqhbr
from ecg_jax.objectives import codebook
from ecg_jax.records import windows
from ecg_jax.training import optim

ARCH = vqhbr.Config(
    width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=8, mlp=24, codes=16, code_dim=8, slots=60
)
PEAKS = np.arange(90, 950, 170)  # 6 beats, one more than 60 slots hold


def batch(records=8, leads=8, seed=0):
    """Records of beats of two shapes in noise; the last has no beat, the one before a dead lead II and a short span."""
    rng = np.random.default_rng(seed)
    t = np.arange(-48, 48)
    shapes = np.stack([1000 * np.exp(-((t / 3) ** 2)), 600 * np.sin(t / 8) * np.exp(-((t / 20) ** 2))])
    signal, rpeaks = rng.normal(0, 20, (records, 1000, leads)), np.full((records, 50), -1)
    for i in range(records - 1):
        rpeaks[i, : len(PEAKS)] = PEAKS + i
        for q in PEAKS + i:
            signal[i, q - 48 : q + 48] += shapes[rng.integers(2)][:, None] * rng.choice([-1, 1], leads)
    valid = np.tile([0, 1000], (records, 1))
    signal[-2, :, 1], valid[-2], signal[-2, :60] = 0, (60, 900), 0
    rpeaks[-2] = np.where(rpeaks[-2] < 960, rpeaks[-2], -1)
    types = {"signal": (signal, jnp.int16), "valid": (valid, jnp.int32), "rpeaks": (rpeaks, jnp.int16)}
    return {name: jnp.asarray(value.round().astype(int), dtype) for name, (value, dtype) in types.items()}


def make(arch=ARCH, sample=8, **more):
    return codebook.make(arch, sample=sample, **more)


# As in training: everything compiled, the objective a static argument.
init = jax.jit(lambda objective, *args: objective.init(*args), static_argnums=0)
sentences = jax.jit(lambda objective, b: objective.sentences(b), static_argnums=0)
grads_of = jax.jit(lambda o, *args: jax.value_and_grad(o.loss, has_aux=True)(*args), static_argnums=0)
absorb = jax.jit(lambda objective, *args: objective.absorb(*args), static_argnums=0)
score = jax.jit(lambda o, p, b, w: (*o.sums(p, b, w), o.logits(p, b)), static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return init(make(), jax.random.key(0), batch())


def test_equal_arguments_make_equal_objectives_and_wrong_ones_are_refused():
    assert make() == make(dtype="float32") and hash(make()) == hash(make())  # auto on CPU
    assert make() != make(scale="gain") and make().at_width(32).arch.width == 32
    for wrong in ({"scale": "milli"}, {"mode": "xqrs"}, {"dtype": "float16"}):
        with pytest.raises(UsageError, match="unknown"):
            make(**wrong)
    with pytest.raises(UsageError, match="sample"):
        make(sample=0)
    with pytest.raises(UsageError, match="96 samples"):
        make(dataclasses.replace(ARCH, window=64))
    fields = make().fields, make().columns
    assert fields == (("signal", "valid", "rpeaks"), ("reconstruction", "commitment"))


def test_start_is_announced_as_it_comes():
    objective, data = make(), batch(leads=12)
    announced = objective.start
    assert {name: (one.shape, one.dtype) for name, one in announced.items()} == {
        name: (value.shape, value.dtype) for name, value in data.items()
    }
    shapes = jax.eval_shape(objective.init, jax.random.key(0), announced)
    assert jax.tree.structure(shapes) == jax.tree.structure(
        jax.eval_shape(lambda k: vqhbr.init(ARCH, k), jax.random.key(0))
    )


def test_tokens_are_those_of_the_records_and_which_count():
    data = batch(leads=12)
    seen = sentences(make(vqhbr.Config(**dataclasses.asdict(ARCH) | {"slots": 256})), data)
    assert seen.tokens.shape == (8, 256, 96)
    for i in range(8):
        span = int(data["valid"][i, 0]), int(data["valid"][i].sum())
        peaks = np.asarray(data["rpeaks"][i])
        peaks = peaks[peaks >= 0]
        tokens, lead, time, n = windows.tokens(np.asarray(data["signal"][i]) / 1000, peaks, span, "robust")
        there = np.asarray(seen.there[i])
        assert np.allclose(seen.tokens[i], tokens, atol=1e-6) and there.sum() == 12 * len(peaks)
        assert np.array_equal(seen.lead[i][there] + 1, lead[there]) and n == len(peaks)
        assert np.array_equal(seen.time[i][there] + 1, time[there])
        start, end, _ = windows.windows(peaks, span)
        inner = np.tile((start >= span[0] + 50) & (end <= span[1] - 50), 12)
        dead = np.repeat((np.arange(12) == 1) & (i == 6), len(peaks))
        assert np.array_equal(np.flatnonzero(seen.counted[i]), np.flatnonzero(inner & ~dead))
    assert not np.any(seen.counted[7]) and np.any(seen.there[6] & ~seen.counted[6])


def test_scale_and_indices():
    data = batch()
    power = {
        scale: float(np.abs(sentences(make(scale=scale), data).tokens).max()) for scale in ("mv", "gain", "zscore")
    }
    assert 1.5 < power["mv"] < 2.5 and power["gain"] > 2 * power["mv"] and power["zscore"] > 2 * power["mv"]
    assert sentences(make(indices=False), data).lead is None
    published = make(dataclasses.replace(ARCH, faithful=True), indices=False)
    assert sentences(published, data).lead is not None  # trained with them, whatever its codes are then made with


def test_the_codebook_starts_among_the_tokens(params):
    seen = sentences(make(), batch())
    z = np.asarray(jax.jit(vqhbr.encode, static_argnums=0)(ARCH, params, *seen[:4]))[np.asarray(seen.counted)]
    assert (z @ np.asarray(params["codebook"]).T).max(1).mean() > 0.8
    assert float(params["usage"].sum()) == pytest.approx(1, abs=1e-5)


def test_loss_sums_and_what_is_kept_agree(params):
    objective, data = make(), batch()
    (loss, aux), grads = grads_of(objective, params, data)
    sums, counts, kept = score(objective, params, data, jnp.ones(8))
    counted = np.asarray(sentences(objective, data).counted)
    assert counts.tolist() == [counted.sum()] * 2 and float(aux["known"]) == counted.sum()
    assert objective.mean(np.stack([sums, counts])) == pytest.approx(float(loss), rel=1e-5)
    assert float(sums[0] / counts[0]) == pytest.approx(float(aux["reconstruction"]), rel=1e-5)
    assert kept.shape == (8, 1) and kept[7] == 0
    assert float((kept[:, 0] * counted.sum(1)).sum()) == pytest.approx(float(sums[0]), rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)) and not np.any(grads["codebook"])
    without = jax.tree.map(lambda x: x.at[0].set(0), data), jnp.ones(8).at[0].set(0)
    part, fewer, _ = score(objective, params, *without)
    assert fewer[0] == counted[1:].sum() and float(part[0]) == pytest.approx(
        float(sums[0] - kept[0, 0] * counted[0].sum()), rel=1e-4
    )
    assert np.isnan(objective.mean(np.zeros((2, 2))))
    tilted = make(dataclasses.replace(ARCH, beta=0.5))
    assert tilted.mean(np.asarray([[2.0, 4.0], [2.0, 2.0]])) == 2.0


@pytest.mark.parametrize("refresh", [0.0, 0.3])
def test_it_learns_and_uses_its_codes(params, refresh):
    objective = make(dataclasses.replace(ARCH, refresh=refresh))
    hyper = optim.Hyper(*map(np.float32, (1e-4, 0.9, 0.99, 1e-8, 1.0, 1)))
    data = batch()

    @jax.jit
    def step(state, i):
        params, mu, nu = state
        keys = jax.random.split(jax.random.key(i), 8)
        (loss, aux), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, data, keys)
        new = optim.adamw(params, grads, mu, nu, i, optim.global_norm(grads), jnp.float32(3e-3), hyper)
        moved, scalars = objective.absorb(new[0], aux)
        return (moved, *new[1:]), loss, scalars

    zeros = jax.tree.map(jnp.zeros_like, params)
    state, losses = (params, zeros, zeros), []
    for i in range(60):
        state, loss, scalars = step(state, i)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0], losses[::10]
    assert set(scalars) == {"known", "reconstruction", "commitment", "perplexity", "dead"}
    assert all(np.shape(value) == () for value in scalars.values())
    assert 1 <= float(scalars["perplexity"]) <= 16 and 0 <= float(scalars["dead"]) < 1
    assert np.allclose(np.linalg.norm(state[0]["codebook"], axis=1), 1, atol=1e-5)
    assert np.abs(state[0]["codebook"] - params["codebook"]).max() > 0.05


def _step(objective, params, data, keys):
    """All that a training step takes from the objective."""
    (loss, aux), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, data, keys)
    moved, scalars = objective.absorb(params, aux)
    return {"loss": loss, "grads": grads, "codebook": moved["codebook"], "usage": moved["usage"], "scalars": scalars}


def _child():
    """Runs in a process of four simulated devices: the largest difference between them and one of them, by name."""
    jax.config.update("jax_disable_most_optimizations", True)
    objective, data = make(dataclasses.replace(ARCH, refresh=0.3)), batch()
    keys = jax.random.split(jax.random.key(0), 8)
    params = init(objective, jax.random.key(0), data)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    run = jax.jit(_step, static_argnums=0, out_shardings=None)
    alone = run(objective, params, data, keys)
    there = run(objective, *(jax.device_put(x, s) for x, s in ((params, whole), (data, split), (keys, split))))
    worst = {}
    for name, value in alone.items():
        pairs = zip(jax.tree.leaves(value), jax.tree.leaves(there[name]), strict=True)
        worst[name] = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    print(json.dumps({"devices": len(jax.devices()), **worst}))


def test_four_devices_do_what_one_does():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found.pop("devices") == 4
    assert max(found.values()) < 1e-4 and found["codebook"] < 1e-6, found


if __name__ == "__main__":
    _child()
