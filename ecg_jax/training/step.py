"""The compiled programs of a run: init, train step, evaluation, copy.

B examples of a batch, L lanes, k steps of one dispatch, K labels. All of them are built once per (objective,
mesh, batch) and process, whatever the learning rate, seed, recipe or number of records, which are arguments;
so runs of one shape share their compilations. No I/O, no host reads, no schedule.

Invariant: what happens to an example depends on (seed, hash of its record, epoch), never on its place in the
batch or on the device that holds it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import optim

INIT, EXAMPLE = 0, 1  # named streams of the root key


class State(NamedTuple):
    """All that a step changes. `params` as the objective made them, `mu` and `nu` alike; int32 counters
    [].
    """

    params: Any
    mu: Any
    nu: Any
    count: jax.Array  # updates made
    skipped: jax.Array  # updates left out because a gradient or the loss was not finite
    row: jax.Array  # of those, how many at the end without a finite one between


class Programs(NamedTuple):
    """Compiled functions; see `build` for their arguments."""

    init: Callable[..., State]
    step: Callable[..., tuple[State, list[dict[str, jax.Array]]]]
    take: Callable[..., tuple[dict[str, jax.Array], jax.Array]]
    score: Callable[..., tuple[jax.Array, jax.Array]]
    copy: Callable[[State], State]
    abstract: State  # shapes, types and shardings, for restoring
    eval_batch: int  # records that `take` takes
    one: Callable[..., Any]  # the single jitted step, for tests and benchmarks


def example_keys(seed: jax.Array, hash_Bx2: jax.Array, epoch_B: jax.Array) -> jax.Array:
    """Typed random keys [B] from (seed, 64-bit record hash as two uint32, epoch)."""
    root = jax.random.fold_in(jax.random.key(seed), EXAMPLE)

    def key(words: jax.Array, epoch: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1]), epoch)

    return jax.vmap(key)(hash_Bx2, epoch_B)


def gather(mesh: Mesh, rows: Any, index_LxI: jax.Array) -> Any:
    """Rows [L, capacity, ...] at lane-local positions, as a batch [B, ...] in lane order; no device talks
    to another.
    """
    spec = PartitionSpec(mesh_lib.AXES)

    def local(rows: Any, index: jax.Array) -> Any:
        def take(lanes: jax.Array) -> jax.Array:
            taken = jax.vmap(lambda lane, at: lane.at[at].get(mode="promise_in_bounds"))(lanes, index)
            return taken.reshape(-1, *taken.shape[2:])

        return jax.tree.map(take, rows)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(rows, index_LxI)


def update(objective: Any, state: State, batch: dict, keys: jax.Array, lr: jax.Array, hyper: optim.Hyper):
    """Loss, gradient, clipping, AdamW, and the guard: what is not finite leaves the state as it was.

    Returns (state, metrics); metrics are float32 [] by name, `row` the count of non-finite steps in a row.
    """
    (loss, aux), grads = jax.value_and_grad(objective.loss, has_aux=True)(state.params, batch, keys)
    norm = optim.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = optim.adamw(state.params, grads, state.mu, state.nu, state.count, norm, lr, hyper)
    params, aux = objective.absorb(new[0], aux)  # running statistics, where the model has any
    new = params, *new[1:]
    old = state.params, state.mu, state.nu
    params, mu, nu = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    bad = (~finite).astype(jnp.int32)
    row = bad * (state.row + 1)
    clipped = ((hyper.clip > 0) & (norm > hyper.clip)).astype(jnp.float32)
    metrics = {"loss": loss, "grad_norm": norm, "clipped": clipped, "skipped": bad, "row": row, **aux}
    state = State(params, mu, nu, state.count + 1 - bad, state.skipped + bad, row)
    return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


@functools.lru_cache(maxsize=64)
def build(objective: Any, n_labels: int, mesh: Mesh, eval_batch: int, lanes: int, scan: bool) -> Programs:
    """The programs of one objective on one mesh. Memoised: equal arguments give the same compiled functions.

    init(seed, prior [K]) -> State, made in place on the devices that will hold it.

    step(state, rows, inputs, rates, hyper, seed) -> (state, metrics). `rows` are resident arrays
    [L, capacity, ...] and an input is {"index", "epoch"} int32 [L, B/L]; or `rows` is empty and an input is the
    batch itself, with "hash" and "epoch". `inputs` and `rates` hold one entry per step; with `scan` they are
    stacked and run as one program. The state that went in is donated.

    take(rows, counts [L], start) -> (batch, weight [eval_batch]): the records start..start + eval_batch/L of each
    lane, weight 0 where a lane has no more.

    score(params, batch, weight, sums [2, K]) -> (sums plus those of the batch: loss in nats and number of known
    labels, per label; logits float32 [eval_batch, K] in lane order). One program for every table.

    copy(state) -> the same state in new buffers.

    Args:
        scan: several steps per dispatch as one program. Not on CPU, where convolutions inside a loop are many
            times slower.
    """
    whole, split = mesh_lib.replicated(mesh), mesh_lib.lanes_first(mesh)

    def init(seed: jax.Array, prior: jax.Array) -> State:
        params = objective.init(jax.random.fold_in(jax.random.key(seed), INIT), prior)
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros((), jnp.int32)
        return State(params, zeros, jax.tree.map(jnp.zeros_like, params), zero, zero, zero)

    def one(state: State, rows: Any, entry: dict, lr: jax.Array, hyper: optim.Hyper, seed: jax.Array):
        batch = dict(entry)
        if rows:
            flat = batch.pop("index"), batch.pop("epoch")
            batch = gather(mesh, rows, flat[0]) | {"epoch": flat[1].reshape(-1)}
        keys = example_keys(seed, batch.pop("hash"), batch.pop("epoch"))
        return update(objective, state, batch, keys, lr, hyper)

    def many(state: State, rows: Any, entries: dict, rates: jax.Array, hyper: optim.Hyper, seed: jax.Array):
        return jax.lax.scan(lambda s, x: one(s, rows, x[0], x[1], hyper, seed), state, (entries, rates))

    def take(rows: dict, counts: jax.Array, start: jax.Array) -> tuple[dict, jax.Array]:
        at = start + jnp.arange(eval_batch // lanes)
        index = jnp.broadcast_to(jnp.minimum(at, rows["labels"].shape[1] - 1), (lanes, at.size))
        batch = gather(mesh, {name: rows[name] for name in rows if name != "hash"}, index)
        return batch, (at < counts[:, None]).reshape(-1).astype(jnp.float32)

    def score(params: Any, batch: dict, weight: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = objective.logits(params, batch).astype(jnp.float32)
        return sums + jnp.stack(objective.sums(params, batch, weight)), logits

    shapes = jax.eval_shape(init, jnp.uint32(0), jnp.zeros(n_labels, jnp.float32))
    places = mesh_lib.state_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
    one_step = jax.jit(one, donate_argnums=0, out_shardings=(places, whole))
    many_steps = jax.jit(many, donate_argnums=0, out_shardings=(places, whole))

    def step(state: State, rows: Any, inputs: Sequence[dict] | dict, rates: Any, hyper: Any, seed: Any):
        if scan:
            state, metrics = many_steps(state, rows, inputs, rates, hyper, seed)
            return state, [metrics]
        metrics = []
        for entry, lr in zip(inputs, rates, strict=True):
            state, values = one_step(state, rows, entry, lr, hyper, seed)
            metrics.append(values)
        return state, metrics

    return Programs(
        init=jax.jit(init, out_shardings=places),
        step=step,
        take=jax.jit(take, out_shardings=split),
        score=jax.jit(score, donate_argnums=3, out_shardings=(whole, split)),
        copy=jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=places),
        abstract=abstract,
        eval_batch=eval_batch,
        one=one_step,
    )


def evaluate(programs: Programs, params: Any, placed: Any, mesh: Mesh) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Send the evaluation of a placed table (`feed.Placed`), batch by batch; nothing is waited for.

    Yields:
        (sums float32 [2, K] over the records so far, logits float32 [eval_batch, K] of this batch). The sums
        are given up to the next batch: only the last ones may be read.
    """
    everywhere, per_lane = mesh_lib.replicated(mesh), programs.eval_batch // len(placed.counts)
    sums = jax.device_put(np.zeros((2, placed.rows["labels"].shape[-1]), np.float32), everywhere)
    for start in range(0, int(placed.counts.max()), per_lane):
        there = jax.device_put(np.int32(start), everywhere)
        batch, weight = programs.take(placed.rows, placed.counts_there, there)
        sums, logits = programs.score(params, batch, weight, sums)
        if mesh_lib.on_cpu(mesh) and mesh.size > 1:
            jax.block_until_ready(logits)  # unbounded queues deadlock the collectives of simulated devices
        yield sums, logits
