"""The device mesh and where arrays lie on it.

One mesh `("data", "fsdp")` for every run; both axes split the batch, `fsdp` also splits large parameters.
Says nothing about what is computed. Invariant: the lanes of the data are split evenly, so the batch that a
step sees does not depend on the number of devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ecg_jax.errors import UsageError

AXES = ("data", "fsdp")
FSDP_BYTES = 4 << 20  # smaller arrays are kept whole on every device: splitting them costs more than it saves


def make(lanes: int = 8, devices: int = 0, fsdp: int = 1) -> Mesh:
    """A mesh over the first `devices` devices (0: all), `fsdp` of which share a copy of the large arrays.

    Raises:
        UsageError: more devices than there are, or a number that does not divide the lanes; names the ones
        that work.
    """
    present = jax.devices()
    count = devices or len(present)
    few = len(present) if jax.process_count() > 1 else 1  # a process without a device has nothing to do
    valid = [n for n in range(few, lanes + 1) if lanes % n == 0 and n <= len(present)]
    if count not in valid:
        raise UsageError(
            f"train.devices = {count} ({len(present)} present) does not divide the {lanes} lanes of the "
            f"data; set train.devices to one of {', '.join(map(str, valid)) or 'none of these'}"
        )
    if count % fsdp:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise UsageError(
            f"train.fsdp = {fsdp} does not divide the {count} devices; use one of {', '.join(map(str, divisors))}"
        )
    # Auto stated: since jax 0.9 the default is Explicit, which wants shardings inside the models.
    return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=present[:count])


def lanes_first(mesh: Mesh) -> NamedSharding:
    """First axis (lanes, or examples in lane order) over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def lanes_second(mesh: Mesh) -> NamedSharding:
    """Second axis over all devices: inputs of several steps, stacked."""
    return NamedSharding(mesh, PartitionSpec(None, AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def own_lanes(mesh: Mesh, lanes: int) -> range:
    """The lanes whose records lie on this process's devices: all of them where it is alone."""
    each = lanes // mesh.size
    mine = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return range(mine[0] * each, (mine[-1] + 1) * each)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of NumPy arrays that every process has whole, onto the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def leaf(value: Any) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])

    return jax.tree.map(leaf, tree)


def put_parts(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of NumPy arrays of which every process has its own equal part, along the axis that `sharding` splits."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), tree)


def state_shardings(abstract: Any, mesh: Mesh) -> Any:
    """For a tree of abstract arrays: large ones split over `fsdp` along their largest divisible axis,
    others whole.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or leaf.size * leaf.dtype.itemsize < FSDP_BYTES or not axes:
            return replicated(mesh)
        widest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * widest, "fsdp"))

    return jax.tree.map(place, abstract)


def on_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is made of (possibly simulated) CPU devices."""
    return mesh.devices.flat[0].platform == "cpu"


def describe(mesh: Mesh) -> str:
    """The devices in words, as `4 x NVIDIA H200` or `1 x cpu`."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
