"""The compiled programs: an example's own randomness, the gather, the guard, micro-batches, several steps at once,
and what does not compile again.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from ecg_jax.models import ladder
from ecg_jax.objectives import supervised
from ecg_jax.training import feed, optim, recipe, runtime, step
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
    return step.build(objective, mesh, 64, 8, False)


def _start(programs, seed=0):
    return programs.init(jnp.uint32(seed), {"prior": jnp.full(K, 0.3)})


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
    scanned = step.build(objective, mesh, 64, 8, True)
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

    stream = feed.BatchFeed(batches, mesh, False)
    rows, inputs, there = stream.take(3, rates)
    _, b = programs.step(_start(programs), rows, inputs, there, hyper, jnp.uint32(0))
    stream.close()
    assert rows == {}
    np.testing.assert_allclose(float(a[0]["loss"]), float(b[0]["loss"]), rtol=1e-6)


SMALL = ladder.ResNet1dConfig(4, kernel=3, strides=(8, 4), groups=2)


@pytest.mark.parametrize("arch", [SMALL, ladder.get("Td1")], ids=["resnet1d", "transformer"])
def test_micro_batches_give_the_update_of_the_batch(tables, mesh, arch, quick_compilation):
    """Gradient (as first moment, relative to its largest), loss, norm and parameters to 1e-6, with random crops,
    unknown labels and clipping.
    """
    objective = supervised.make(arch, K, crop=200, dtype="float32")
    hyper = optim.hyper(tiny_run.config("optim.eps=1e-3", "optim.clip=0.01").optim)
    rates, found, loops = np.full(1, 1e-3, np.float32), [], []
    for parts in (1, 2):
        programs = step.build(objective, mesh, 64, 8, False, parts)
        rows, inputs, there = _feed(tables, mesh).take(2, rates)
        args = rows, inputs[0], there[0], hyper, jnp.uint32(0)
        state = _start(programs)
        loops.append(programs.one.lower(state, *args).as_text().count("stablehlo.while"))
        state, metrics = programs.one(state, *args)
        found.append((_host(state), _host(metrics)))
    assert loops[0] == loops[1], "on CPU no convolution runs in a loop"
    (whole, a), (split, b) = found
    assert a.keys() == b.keys() and a["clipped"] == b["clipped"] == 1 and a["known"] < 1
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-6), name
    for name in ("mu", "params"):
        xs, ys = (jax.tree.leaves(getattr(state, name)) for state in (whole, split))
        largest = max(np.abs(x).max() for x in xs)
        for x, y in zip(xs, ys, strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6 * largest)


def test_micro_batches_hold_as_many_records_of_every_lane(mesh):
    lane = np.repeat(np.arange(8), 6)  # a batch of 48 in lane order
    parts = step.split(mesh, {"lane": lane, "number": np.arange(48)}, 8, 3)
    assert np.array_equal(parts["lane"], np.tile(np.repeat(np.arange(8), 2), (3, 1)))
    assert sorted(np.asarray(parts["number"]).ravel()) == list(range(48))


def test_a_micro_batch_counts_by_its_known_labels_and_spoils_the_update_alone(mesh):
    """Weights of micro-batches, and a single one that is not finite."""

    class Mean:
        def loss(self, params, batch, keys):
            known = batch["known"].sum()
            return (params["w"] * batch["x"] * batch["known"]).sum() / jnp.maximum(known, 1), {"known": known}

        def absorb(self, params, aux):
            return params, aux

    x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    batch = {"x": x, "known": np.array([[1, 0, 0], [1, 1, 1]], np.float32)}
    keys = jax.random.split(jax.random.key(0), (2, 3))
    params = {"w": jnp.float32(2)}
    loss, _, grads = step.gradient(Mean(), params, batch, keys)
    assert float(grads["w"]) == pytest.approx((1 + 4 + 5 + 6) / 4) and float(loss) == 2 * float(grads["w"])
    nothing, _, flat = step.gradient(Mean(), params, batch | {"known": np.zeros((2, 3), np.float32)}, keys)
    assert float(nothing) == 0 and float(flat["w"]) == 0
    zero = jnp.int32(0)
    state = step.State(params, {"w": jnp.float32(0)}, {"w": jnp.float32(0)}, zero, zero, zero)
    broken = step.gradient(Mean(), params, batch | {"x": x * np.array([[np.inf], [1]], np.float32)}, keys)
    after, metrics = step.update(Mean(), state, broken, jnp.float32(1), optim.hyper(tiny_run.config().optim))
    assert float(after.params["w"]) == 2 and int(after.skipped) == 1 and float(metrics["skipped"]) == 1


def test_batch_norm_learns_statistics_from_micro_batches(tables, mesh, quick_compilation):
    """The gradient is another one with BatchNorm; the running statistics absorb the mean of the micro-batches'."""
    objective = supervised.make(dataclasses.replace(SMALL, norm="batch"), K, crop=200, dtype="float32")
    hyper, rates = optim.hyper(tiny_run.config().optim), np.full(1, 1e-3, np.float32)
    means = []
    for parts in (1, 2):
        programs = step.build(objective, mesh, 64, 8, False, parts)
        rows, inputs, there = _feed(tables, mesh).take(2, rates)
        state, _ = programs.step(_start(programs), rows, inputs, there, hyper, jnp.uint32(0))
        means.append(np.asarray(state.params["encoder"]["stem_norm_running_mean"]))
    assert np.abs(means[0]).max() > 1e-4
    np.testing.assert_allclose(means[1], means[0], rtol=1e-4, atol=1e-7)  # the stem's input is the same


def test_a_sweep_compiles_once(tables, mesh):
    """Peak rate, decay, clipping, betas, horizon, warm-up and seed are values; another batch is another program."""
    runtime.compiles.listen()
    programs = step.build(tiny_run.Toy(), mesh, 64, 8, False)
    source = _feed(tables, mesh)

    def train(*overrides):
        config = tiny_run.config(*overrides)
        control = recipe.Controller(recipe.plan(config, 160, 64))
        hyper, seed, used = optim.hyper(config.optim), np.uint32(config.train.seed), []
        state = programs.init(seed, {"prior": np.full(K, 0.3, np.float32)})
        while control.phase != "end":
            rates = control.rates()
            state, _ = programs.step(state, *source.take(control.step, rates), hyper, seed)
            used.append(float(rates[0]))
            control.advance()
            if control.phase_over():
                control.end_phase()
        return used

    first = train()
    size, compiled = programs.one._cache_size(), runtime.compiles.programs
    assert size >= 1
    runs = [
        train("optim.lr=0.003"),
        train("optim.weight_decay=0.3", "optim.clip=0", "optim.b1=0.5", "optim.b2=0.9"),
        train("recipe.steps=40"),
        train("optim.warmup_steps=9", "train.seed=3"),
    ]
    assert len(runs[2]) == 40 != len(first) and runs[0][-1] < first[-1], "the runs do differ"
    assert programs.one._cache_size() == size and runtime.compiles.programs == compiled
    wider = feed.ResidentFeed(feed.place(tables["train"], mesh), mesh, 32, 0, False)
    inputs = wider.take(0, np.ones(1, np.float32))
    programs.step(_start(programs), *inputs, optim.hyper(tiny_run.config().optim), np.uint32(0))
    assert programs.one._cache_size() == size + 1, "the counter counts"
