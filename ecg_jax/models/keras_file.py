"""Layers out of Keras HDF5 files, without Keras: whole models (`model.save`), weights alone, of Keras 2 and 3.

What it does not do: build a network of the configuration in the file. It reads the variables of convolutions,
BatchNorms and dense layers, and checks the configuration, where there is one, against the published diagnosis network.
Invariants: only numbers that lie in this file uncompressed are read (no links, no external or virtual data), so memory
is bounded by its size; every refusal is a DataError of one line.
"""

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.models import legacy
from ecg_jax.models.torch_file import short

START = b"\x89HDF\r\n\x1a\n"
DEPTH, OBJECTS = 8, 5000  # of groups in groups, and in all: hard links can run in circles
LAYERS = 500  # of a configuration
LAYER = re.compile(r"(conv1d|batch_normalization|dense)(?:_(\d{1,6}))?")
# Variables of a layer, in the order in which files of weights alone number them.
LEAVES = {
    "conv1d": ("kernel",),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
WEIGHTS = ("model_weights", "layers")  # where a whole model, and Keras 3, keep them
Layers = dict[str, list[dict[str, np.ndarray]]]  # kind -> layers by their number -> variable -> array


@dataclasses.dataclass(frozen=True)
class Graph:
    """What the configuration in the file says beyond the shapes."""

    lengths: tuple[int, ...]  # positions after the stem and after each unit
    dropout: float


class _Wrong(ValueError):
    """The message lacks the file's name."""


def is_hdf5(data: bytes) -> bool:
    """Whether `data` starts like an HDF5 file."""
    return data.startswith(START)


def numbered(kind: str, index: int) -> str:
    """Name of the layer of a kind that was built `index`-th."""
    return f"{kind}_{index}" if index else kind


def read(data: bytes, path: str) -> tuple[Layers, Graph | None]:
    """(layers, what the configuration says or None where there is none) of the bytes of an HDF5 file.

    `path` is for messages only. Raises DataError for a file that is damaged or not Keras', and for a configuration
    that is not the published network's.
    """
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            root = next((file[name] for name in WEIGHTS if _is_group(file, name)), file)
            layers = _layers(root)
            said = file.attrs.get("model_config")
            return layers, None if said is None else _graph(said)
    except _Wrong as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a Keras file of this network, or damaged ({short(error)})") from None


def _is_group(file: h5py.File, name: str) -> bool:
    return isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Group)


def _layers(root: h5py.Group) -> Layers:
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {kind: {} for kind in LEAVES}
    for where, dataset in _datasets(root):
        *folders, leaf = where.split("/")
        named = [match for folder in folders if (match := LAYER.fullmatch(folder))]
        if not named:
            raise _Wrong(f"{short(where)} belongs to no layer of the published network")
        kind, number = named[-1][1], int(named[-1][2] or 0)
        leaf = leaf.removesuffix(":0")
        if leaf.isdecimal() and int(leaf[:3]) < len(LEAVES[kind]):
            leaf = LEAVES[kind][int(leaf[:3])]
        variables = found[kind].setdefault(number, {})
        if leaf not in LEAVES[kind] or leaf in variables:
            raise _Wrong(f"{short(where)} is not expected in a layer {kind}, or is there twice")
        variables[leaf] = _array(where, dataset)
    for kind, layers in found.items():
        for number, variables in layers.items():
            missing = [leaf for leaf in LEAVES[kind] if leaf not in variables]
            if missing:
                raise _Wrong(f"layer {numbered(kind, number)} has no {missing[0]}")
    return {kind: [layers[number] for number in sorted(layers)] for kind, layers in found.items()}


def _datasets(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    seen, pending = 0, [(root, "", 0)]
    while pending:
        group, prefix, depth = pending.pop()
        for name in group:
            seen += 1
            if seen > OBJECTS or depth > DEPTH:
                raise _Wrong("groups in groups without end")
            if depth == 0 and name in ("optimizer_weights", "top_level_model_weights"):
                continue
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise _Wrong(f"{short(prefix + name)} is a link to elsewhere")
            found = group[name]
            if isinstance(found, h5py.Dataset):
                yield prefix + name, found
            elif isinstance(found, h5py.Group):
                pending.append((found, f"{prefix}{name}/", depth + 1))


def _array(where: str, dataset: h5py.Dataset) -> np.ndarray:
    if dataset.dtype.kind != "f" or dataset.is_virtual or dataset.external or dataset.chunks:
        raise _Wrong(f"{short(where)} is not stored as Keras stores numbers (plain floating-point)")
    if dataset.id.get_storage_size() != dataset.nbytes:
        raise _Wrong(f"{short(where)} claims {dataset.nbytes} bytes and has {dataset.id.get_storage_size()}")
    return dataset[()]


def _graph(said: Any) -> Graph:
    """Check the configuration of a model against the published network, as far as shapes do not show it."""
    layers = json.loads(said)["config"]["layers"]
    if len(layers) > LAYERS:
        raise _Wrong(f"its configuration has {len(layers)} layers")
    by_name = {str(layer["config"]["name"]): layer for layer in layers}
    kinds = {name: str(layer["class_name"]) for name, layer in by_name.items()}
    strides, rates, samples = {}, set(), []
    for name, layer in by_name.items():
        kind, config = kinds[name], layer["config"]
        inputs = {kinds[word] for word in _words(layer["inbound_nodes"]) if word in kinds}
        match kind:
            case "InputLayer":
                samples.append((config.get("batch_shape") or config["batch_input_shape"])[1])
                good = True
            case "Conv1D":
                good = config["padding"] == "same" and not config["use_bias"] and config["activation"] == "linear"
                good = good and list(config["dilation_rate"]) == [1]
            case "BatchNormalization":
                # The second of a unit, an even one, comes after the sum of both streams.
                after = "Add" if _number(name) and _rank(kinds, name) % 2 == 0 else "Conv1D"
                good = config["epsilon"] == legacy.EPS["keras"] and inputs == {after}
            case "Activation":
                good = config["activation"] == "relu" and inputs == {"BatchNormalization"}
            case "MaxPooling1D":
                good = list(config["pool_size"]) == list(config["strides"])
                strides[_number(name)] = int(config["strides"][0])
            case "Dropout":
                rates.add(round(float(config["rate"]), 6))
                good = True
            case "Dense":
                good = config["activation"] in ("sigmoid", "linear") and inputs == {"Flatten"}
            case _:
                good = kind in ("Add", "Flatten")
        if not good:
            raise _Wrong(f"layer {short(name)} is not as the published network has it")
    if len(samples) != 1 or len(rates) > 1 or type(samples[0]) is not int or min(strides.values(), default=0) < 1:
        raise _Wrong("its configuration is not the published network's")
    lengths = [samples[0]]
    for number in sorted(strides):
        lengths.append(lengths[-1] // strides[number])
    return Graph(tuple(lengths), rates.pop() if rates else 0.0)


def _number(name: str) -> int:
    found = re.search(r"_(\d{1,6})$", name)
    return int(found[1]) if found else 0


def _rank(kinds: dict[str, str], name: str) -> int:
    """Place of a layer among those of its kind."""
    return sum(kind == kinds[name] and _number(other) < _number(name) for other, kind in kinds.items())


def _words(tree: Any) -> Iterator[str]:
    """Every string in lists and dictionaries."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _words(part)
