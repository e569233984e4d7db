"""The compiled programs: an example's own randomness, the gather, the guard, several steps at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from ecg_jax.training import feed, optim, step
from ecg_jax.training import mesh as mesh_lib

K = len(tiny_run.LABELS)


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make()


@pytest.fixture(scope="module")
def objective():
    return tiny_run.Toy()


@pytest.fixture(scope="module")
def programs(mesh, objective):
    return step.build(objective, K, mesh, 64, 8, False)


def _start(programs, seed=0):
    return programs.init(jnp.uint32(seed), jnp.full(K, 0.3))


def _feed(tables, mesh, scan=False):
    return feed.ResidentFeed(feed.place(tables["train"], mesh), mesh, 16, 0, scan)


def _host(tree):
    return jax.tree.map(np.asarray, tree)


def test_keys_belong_to_seed_record_and_epoch():
    """Same record, same epoch: same key, wherever it stands; any of the three changed, the high word too: another."""
    base = jnp.array([[1, 2], [3, 4]], jnp.uint32), jnp.array([0, 5])
    keys = jax.random.key_data(step.example_keys(jnp.uint32(7), *base))
    again = jax.random.key_data(step.example_keys(jnp.uint32(7), base[0][::-1], base[1][::-1]))
    assert np.array_equal(keys, again[::-1])
    others = [
        keys,
        jax.random.key_data(step.example_keys(jnp.uint32(8), *base)),
        jax.random.key_data(step.example_keys(jnp.uint32(7), base[0].at[:, 0].add(1), base[1])),
        jax.random.key_data(step.example_keys(jnp.uint32(7), base[0], base[1] + 1)),
    ]
    assert len({np.asarray(found)[0].tobytes() for found in others}) == 4


def test_gather_takes_the_named_rows_in_lane_order(tables, mesh):
    placed = feed.place(tables["train"], mesh)
    index = np.array([[lane % 3, 1] for lane in range(8)], np.int32)
    got = step.gather(mesh, {"hash": placed.rows["hash"], "signal": placed.rows["signal"]}, index)
    rows = [placed.source[lane, at] for lane in range(8) for at in index[lane]]
    assert np.array_equal(got["signal"], tables["train"].signal[rows])
    words = np.asarray(got["hash"]).astype(np.uint64)
    assert np.array_equal(words[:, 0] << np.uint64(32) | words[:, 1], tables["train"].record_hash[rows])


def test_state_is_donated_and_copies_are_not(tables, mesh, programs):
    """A donated buffer that could not be used warns, and warnings are errors here."""
    state = _start(programs)
    kept = programs.copy(state)
    rows, inputs, rates = _feed(tables, mesh).take(0, np.full(1, 1e-3, np.float32))
    new, _ = programs.step(state, rows, inputs, rates, optim.hyper(tiny_run.config().optim), jnp.uint32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.mu, state.nu)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    assert int(new.count) == 1 and int(kept.count) == 0


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(tables, mesh, programs):
    state = _start(programs)
    before = _host(state)
    rows, inputs, rates = _feed(tables, mesh).take(0, np.full(2, 1e-3, np.float32))
    hyper = optim.hyper(tiny_run.config().optim)
    broken = rows | {"signal": rows["signal"]}
    state = state._replace(params=jax.tree.map(lambda p: p.at[...].set(jnp.nan), state.params))
    poisoned = _host(state.params)
    state, metrics = programs.step(state, broken, inputs, rates, hyper, jnp.uint32(0))
    assert [float(m["row"]) for m in metrics] == [1, 2] and int(state.skipped) == 2 and int(state.count) == 0
    for name in ("mu", "nu"):
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name)), strict=True):
            assert np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(poisoned), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    healed = state._replace(params=jax.tree.map(jnp.asarray, before.params))
    healed, metrics = programs.step(healed, rows, inputs, rates, hyper, jnp.uint32(0))
    assert float(metrics[0]["row"]) == 0 and int(healed.skipped) == 2 and int(healed.count) == 2


def test_scanned_steps_equal_single_steps(tables, mesh, objective, programs):
    scanned = step.build(objective, K, mesh, 64, 8, True)
    rates, hyper = np.array([1e-3, 2e-3, 3e-3], np.float32), optim.hyper(tiny_run.config().optim)
    one, a = programs.step(_start(programs), *_feed(tables, mesh).take(4, rates), hyper, jnp.uint32(0))
    args = _feed(tables, mesh, scan=True).take(4, rates)
    assert args[1]["index"].shape == (3, 8, 2), "three steps in one program"
    many, b = scanned.step(_start(scanned), *args, hyper, jnp.uint32(0))
    assert len(a) == 3 and len(b) == 1
    np.testing.assert_allclose([float(m["loss"]) for m in a], b[0]["loss"], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_evaluation_counts_every_record_once(tables, mesh, programs, objective):
    """Sums over padded lanes equal those over the table, and logits come back in its order."""
    state, table = _start(programs), tables["test"]
    placed = feed.place(table, mesh)
    assert placed.counts.min() != placed.counts.max(), "some lanes are padded"
    parts = list(step.evaluate(programs, state.params, placed, mesh))
    assert len(parts) > 1
    batch = {"signal": table.signal, "labels": table.labels, "valid": table.valid}
    total, known = objective.sums(state.params, batch, jnp.ones(len(table)))
    np.testing.assert_allclose(parts[-1][0], np.stack([total, known]), rtol=1e-5)
    by_place = np.concatenate([np.asarray(logits).reshape(8, -1, K) for _, logits in parts], axis=1)
    got, want = placed.in_table_order(by_place), objective.logits(state.params, batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_stream_and_resident_inputs_give_the_same_step(tables, mesh, programs):
    """The same records as whole batches instead of row numbers."""
    table, rates = tables["train"], np.full(1, 1e-3, np.float32)
    resident = _feed(tables, mesh)
    rows, inputs, there = resident.take(3, rates)
    index, epoch = np.asarray(inputs[0]["index"]), np.asarray(inputs[0]["epoch"])
    source = feed.place(table, mesh).source
    taken = np.array([source[lane, at] for lane in range(8) for at in index[lane]])
    hyper = optim.hyper(tiny_run.config().optim)
    _, a = programs.step(_start(programs), rows, inputs, there, hyper, jnp.uint32(0))

    def batches(start):
        assert start == 3
        fields = {name: getattr(table, name)[taken] for name in ("signal", "labels", "valid", "record_hash")}
        while True:
            yield fields | {"epoch": epoch.reshape(-1)}

    stream = feed.StreamFeed(batches, mesh, False)
    rows, inputs, there = stream.take(3, rates)
    _, b = programs.step(_start(programs), rows, inputs, there, hyper, jnp.uint32(0))
    stream.close()
    assert rows == {}
    np.testing.assert_allclose(float(a[0]["loss"]), float(b[0]["loss"]), rtol=1e-6)
