"""The compiled programs of a run: init, train step, evaluation, copy.

B examples of a batch, L lanes, M micro-batches of an update, k steps of one dispatch, K columns of a loss (labels,
say). All of them are built once per (objective, mesh, batch) and process, whatever the learning rate, seed,
recipe or number of records, which are arguments; so runs of one shape share their compilations. What is learned
is the objective's affair: see `Objective`. No I/O, no host reads, no schedule.

Invariant: what happens to an example depends on (seed, hash of its record, epoch), never on its place in the
batch or on the device that holds it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import optim

INIT, EXAMPLE = 0, 1  # named streams of the root key


class Objective(Protocol):
    """What an objective must offer to be trained: supervised labels, masked codes or a codebook alike.

    A frozen, hashable value (programs are shared between equal ones) of pure, traceable functions. `params` is any
    tree of float arrays. `batch` is a dictionary of arrays [B, ...]: the rows of the placed table, without `hash`
    in training.

    fields   the fields of the table that `batch` must hold
    columns  names of the K columns of `sums`
    start    shapes of what `init` wants to know of the data, by name
    """

    fields: tuple[str, ...]
    columns: tuple[str, ...]
    start: dict[str, jax.ShapeDtypeStruct]

    def init(self, key: jax.Array, start: dict[str, jax.Array]) -> Any:
        """Starting params. `start` as announced: the prevalence of each label, say, or a codebook."""

    def at_width(self, width: int) -> "Objective":
        """The same at another width of the network; needed for `optim.base_width` only."""

    def loss(self, params: Any, batch: dict[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """(float32 [] to be minimised, aux); all randomness from `keys` [B], typed, one per record and epoch.

        The loss is a mean over the terms that count (known labels, masked beats), and `aux["known"]` says over how
        many: float32 [], their number or share; micro-batches are weighted by it. The other leaves of aux are means
        over the records of the batch: scalars for the log, and arrays under names that `absorb` takes out.
        """

    def absorb(self, params: Any, aux: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(params, aux) with what is not learned by gradient moved from aux to params: running statistics of a
        norm, moving averages of a codebook. Their arrays get gradient zero and are not decayed (`optim.decayed`).
        """

    def sums(self, params: Any, batch: dict[str, jax.Array], weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evaluation: (sum of the loss, number of terms), float32 [K] each, records weighted by `weight` [B].
        What is drawn here is drawn from the records' `hash`, so that every evaluation sees the same.
        """

    def mean(self, sums: np.ndarray) -> float:
        """The loss that [2, K] of such sums and numbers amount to, on the host: what runs are selected by."""

    def logits(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """What is kept of each record in evaluation, [B, ...] float32."""


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
    columns: int  # K
    one: Callable[..., Any]  # the jitted programs behind `step`, for tests and benchmarks: a single step
    many: Callable[..., Any]  # and several


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


def split(mesh: Mesh, tree: Any, lanes: int, parts: int) -> Any:
    """Arrays [B, ...] in lane order as [M, B/M, ...]: each micro-batch holds as many records of every lane, in lane
    order, so no device sends a record to another.
    """

    def leaf(x_B: jax.Array) -> jax.Array:
        batch, *rest = x_B.shape
        x = x_B.reshape(lanes, parts, batch // (lanes * parts), *rest).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x.reshape(parts, batch // parts, *rest), mesh_lib.lanes_second(mesh))

    return jax.tree.map(leaf, tree)


def gradient(
    objective: Objective, params: Any, batch: dict, keys: jax.Array, unroll: bool = False
) -> tuple[jax.Array, dict[str, Any], Any]:
    """(loss, aux, gradients) of a batch [B, ...] with `keys` [B], or of micro-batches [M, B/M, ...] with keys
    [M, B/M], one after another.

    Micro-batches give the loss and the gradient of the whole batch up to rounding, since each is weighted by the
    number of its terms that count, and the randomness belongs to the record. Only BatchNorm differs: its statistics
    are those of a micro-batch, and the running ones absorb their mean.

    Args:
        unroll: no loop in the program. For CPU, where convolutions inside a loop are many times slower; it saves no
            memory there, since XLA keeps the micro-batches' activations side by side.
    """
    slope = jax.value_and_grad(objective.loss, has_aux=True)
    if keys.ndim == 1:
        (loss, aux), grads = slope(params, batch, keys)
        return loss, aux, grads

    def add(total: Any, part: tuple[dict, jax.Array]) -> tuple[Any, tuple[jax.Array, dict]]:
        (loss, aux), grads = slope(params, *part)
        return jax.tree.map(lambda t, g: t + aux["known"] * g, total, grads), (loss, aux)

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (loss_M, aux_M) = jax.lax.scan(add, zeros, (batch, keys), unroll=unroll)
    known = jnp.maximum(aux_M["known"].sum(), jnp.finfo(jnp.float32).tiny)
    loss = (loss_M * aux_M["known"]).sum() / known
    return loss, jax.tree.map(lambda a_M: a_M.mean(0), aux_M), jax.tree.map(lambda t: t / known, total)


def update(objective: Objective, state: State, slope: tuple, lr: jax.Array, hyper: optim.Hyper):
    """Clipping, AdamW, and the guard: what is not finite leaves the state as it was. `slope` is what `gradient` gave.

    Returns (state, metrics); metrics are float32 [] by name, `row` the count of non-finite steps in a row.
    """
    loss, aux, grads = slope
    norm = optim.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    learned, mu, nu = optim.adamw(state.params, grads, state.mu, state.nu, state.count, norm, lr, hyper, finite)
    params, aux = objective.absorb(learned, aux)  # running statistics, where the model has any
    params = jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), params, learned)
    bad = (~finite).astype(jnp.int32)
    row = bad * (state.row + 1)
    clipped = ((hyper.clip > 0) & (norm > hyper.clip)).astype(jnp.float32)
    metrics = {"loss": loss, "grad_norm": norm, "clipped": clipped, "skipped": bad, "row": row, **aux}
    state = State(params, mu, nu, state.count + 1 - bad, state.skipped + bad, row)
    return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


@functools.lru_cache(maxsize=64)
def build(objective: Objective, mesh: Mesh, eval_batch: int, lanes: int, scan: bool, accumulate: int = 1) -> Programs:
    """The programs of one objective on one mesh. Memoised: equal arguments give the same compiled functions.

    init(seed, start) -> State, made in place on the devices that will hold it; `start` as the objective announces.

    step(state, rows, inputs, rates, hyper, seed) -> (state, metrics). `rows` are resident arrays
    [L, capacity, ...] and an input is {"index", "epoch"} int32 [L, B/L]; or `rows` is empty and an input is the
    batch itself, with "hash" and "epoch". `inputs` and `rates` hold one entry per step; with `scan` they are
    stacked and run as one program. The state that went in is donated.

    take(rows, counts [L], start) -> (batch, weight [eval_batch]): the records start..start + eval_batch/L of each
    lane, weight 0 where a lane has no more.

    score(params, batch, weight, sums [2, K]) -> (sums plus those of the batch: loss in nats and number of terms, per
    column; what `logits` keeps, float32 [eval_batch, ...] in lane order). One program for every table.

    copy(state) -> the same state in new buffers.

    Args:
        scan: several steps per dispatch as one program. Not on CPU, where convolutions inside a loop are many
            times slower.
        accumulate: micro-batches per update, see `gradient`; L * accumulate divides the batch.
    """
    whole, per_lane = mesh_lib.replicated(mesh), mesh_lib.lanes_first(mesh)

    def init(seed: jax.Array, start: dict[str, jax.Array]) -> State:
        params = objective.init(jax.random.fold_in(jax.random.key(seed), INIT), start)
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
        if accumulate > 1:
            batch, keys = split(mesh, (batch, keys), lanes, accumulate)
        slope = gradient(objective, state.params, batch, keys, unroll=mesh_lib.on_cpu(mesh))
        return update(objective, state, slope, lr, hyper)

    def many(state: State, rows: Any, entries: dict, rates: jax.Array, hyper: optim.Hyper, seed: jax.Array):
        return jax.lax.scan(lambda s, x: one(s, rows, x[0], x[1], hyper, seed), state, (entries, rates))

    def take(rows: dict, counts: jax.Array, start: jax.Array) -> tuple[dict, jax.Array]:
        at = start + jnp.arange(eval_batch // lanes)
        index = jnp.broadcast_to(jnp.minimum(at, rows["hash"].shape[1] - 1), (lanes, at.size))
        batch = gather(mesh, rows, index)
        return batch, (at < counts[:, None]).reshape(-1).astype(jnp.float32)

    def score(params: Any, batch: dict, weight: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = objective.logits(params, batch).astype(jnp.float32)
        return sums + jnp.stack(objective.sums(params, batch, weight)), logits

    shapes = jax.eval_shape(init, jnp.uint32(0), objective.start)
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
        take=jax.jit(take, out_shardings=per_lane),
        score=jax.jit(score, donate_argnums=3, out_shardings=(whole, per_lane)),
        copy=jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=places),
        abstract=abstract,
        eval_batch=eval_batch,
        columns=len(objective.columns),
        one=one_step,
        many=many_steps,
    )


def evaluate(programs: Programs, params: Any, placed: Any, mesh: Mesh) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Send the evaluation of a placed table (`feed.Placed`), batch by batch; nothing is waited for.

    Yields:
        (sums float32 [2, K] over the records so far, logits float32 [eval_batch, K] of this batch). The sums
        are given up to the next batch: only the last ones may be read.
    """
    everywhere, per_lane = mesh_lib.replicated(mesh), programs.eval_batch // len(placed.counts)
    sums = mesh_lib.put(np.zeros((2, programs.columns), np.float32), everywhere)
    for start in range(0, int(placed.counts.max()), per_lane):
        there = mesh_lib.put(np.int32(start), everywhere)
        batch, weight = programs.take(placed.rows, placed.counts_there, there)
        sums, logits = programs.score(params, batch, weight, sums)
        if mesh_lib.on_cpu(mesh) and mesh.size > 1:
            jax.block_until_ready(logits)  # unbounded queues deadlock the collectives of simulated devices
        yield sums, logits
