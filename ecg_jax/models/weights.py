"""Published weights of the CODE group as parameters of `legacy`: PyTorch, safetensors and Keras HDF5 files.

Nothing in a file is executed, and nothing is guessed: the architecture is taken from the shapes (and from the settings
that lie beside a torch file or inside a Keras file), then every expected key must be there with its shape, finite, and
no other. Invariant: what is returned has exactly the names and shapes of `legacy.parameters`, `statistics` and `head`.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ecg_jax.errors import DataError, UsageError
from ecg_jax.models import keras_file, legacy, torch_file
from ecg_jax.models.legacy import PRESETS, LegacyConfig
from ecg_jax.models.torch_file import short

FILE_BYTES = 1 << 31
SETTINGS_BYTES = 1 << 20
SETTINGS = ("config.json", "args.json")  # beside a torch file: the published one, and the one the public code writes
BLOCK = re.compile(r"resblock1d_(\d{1,3})\.conv2\.weight")
Arrays = dict[str, np.ndarray]


def load(path: Path, settings: Path | None = None) -> tuple[LegacyConfig, Arrays, Arrays]:
    """(architecture, encoder with its running statistics, head), float32, of a file of published weights.

    The kind of file is told by its first bytes. `settings` is the JSON beside a torch file (lengths, dropout); without
    it `config.json` or `args.json` of the same folder is taken, and without those the published values. Raises
    DataError, one line that names the file and the key, for whatever is not exactly such a network.
    """
    path = Path(path)
    data = _read(path, FILE_BYTES)
    try:
        if keras_file.is_hdf5(data):
            if settings is not None:
                raise _Wrong(f"a Keras file, which takes no settings ({settings})")
            layers, said = keras_file.read(data, str(path))
            config, arrays = _keras(layers, said)
            names = keras_names(config)
        else:
            arrays = torch_file.state_dict(data, str(path)) if torch_file.is_torch_file(data) else _safetensors(data)
            config = _torch(arrays, _settings(path, settings))
            names = torch_names(config)
        return config, *_fill(config, names, arrays)
    except (_Wrong, UsageError) as error:
        raise DataError(f"{path}: {short(error)}") from None


def torch_names(config: LegacyConfig) -> dict[str, str]:
    """Our name -> key of the published state dict. The head's names begin with `head/`."""
    norms = {"scale": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    table = {"stem_kernel": "conv1.weight"} | {f"stem_norm_{ours}": f"bn1.{theirs}" for ours, theirs in norms.items()}
    for number, (before, after, stride) in enumerate(config.units, 1):
        block = f"resblock1d_{number - 1}"
        for part in (1, 2):
            table[f"unit{number}_conv{part}_kernel"] = f"{block}.conv{part}.weight"
            table |= {f"unit{number}_norm{part}_{ours}": f"{block}.bn{part}.{leaf}" for ours, leaf in norms.items()}
        if before != after:  # after the max-pool, where there is one
            table[f"unit{number}_skip_kernel"] = f"{block}.skip_connection.{int(stride > 1)}.weight"
    return table | {"head/kernel": "lin.weight", "head/bias": "lin.bias"}


def keras_names(config: LegacyConfig) -> dict[str, str]:
    """Our name -> layer and variable as Keras names them when the public code builds the network."""
    norms = {"scale": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    convs, batch_norms = ["stem"], ["stem_norm"]
    for number, (before, after, _) in enumerate(config.units, 1):
        convs += [f"unit{number}_skip"] * (before != after) + [f"unit{number}_conv1", f"unit{number}_conv2"]
        batch_norms += [f"unit{number}_norm1", f"unit{number}_norm2"]
    table = {f"{ours}_kernel": f"{keras_file.numbered('conv1d', i)}/kernel" for i, ours in enumerate(convs)}
    for i, name in enumerate(batch_norms):
        layer = keras_file.numbered("batch_normalization", i)
        table |= {f"{name}_{ours}": f"{layer}/{theirs}" for ours, theirs in norms.items()}
    return table | {"head/kernel": "dense/kernel", "head/bias": "dense/bias"}


class _Wrong(ValueError):
    """Not such a network; the message lacks the file's name."""


def _read(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise DataError(f"{path}: {path.stat().st_size} bytes, more than such a file ever has")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or short(error)})") from None


def _safetensors(data: bytes) -> Arrays:
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise _Wrong(f"neither torch, nor HDF5, nor safetensors, or damaged ({short(error)})") from None


def _settings(path: Path, given: Path | None) -> dict[str, Any]:
    """The JSON beside the weights, {} where there is none."""
    beside = [path.parent / name for name in SETTINGS if (path.parent / name).is_file()]
    found = given or (beside[0] if beside else None)
    if found is None:
        return {}
    try:
        said = json.loads(_read(Path(found), SETTINGS_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{found}: not JSON ({short(error)})") from None
    if not isinstance(said, dict):
        raise DataError(f"{found}: holds no settings")
    return said


def _torch(arrays: Arrays, said: dict[str, Any]) -> LegacyConfig:
    """The architecture of a state dict."""
    stem, bias = _get(arrays, "conv1.weight", 3), _get(arrays, "lin.bias", 1)
    blocks = sorted(int(found[1]) for key in arrays if (found := BLOCK.fullmatch(key)))
    if blocks != list(range(len(blocks))):
        raise _Wrong(f"its blocks are not numbered from 0 on, but {blocks[:8]}")
    filters = tuple(_get(arrays, f"resblock1d_{i}.conv2.weight", 3).shape[0] for i in blocks)
    published = PRESETS["legacy_age"]
    dropout = said.get("dropout_rate", published.dropout)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise _Wrong(f"dropout_rate of its settings is {short(dropout)}, not a number")
    # The public code spells the key without its t; copies of the file have both.
    lengths = said.get("net_seq_lengh", said.get("net_seq_length"))
    if lengths is None and len(filters) != len(published.lengths):
        raise _Wrong(f"{len(filters)} blocks, not the published {len(published.lengths)}: give the settings (JSON)")
    config = LegacyConfig(
        "torch",
        outputs=bias.shape[0],
        kernel=stem.shape[2],
        dropout=float(dropout),
        filters=filters,
        lengths=_integers("net_seq_lengh", published.lengths if lengths is None else lengths),
        leads=stem.shape[1],
        samples=_integers("seq_length", [said.get("seq_length", published.samples)])[0],
    )
    for key, mine in (("net_filter_size", config.filters), ("kernel_size", (config.kernel,))):
        if key in said and _integers(key, said[key] if isinstance(said[key], list) else [said[key]]) != mine:
            raise _Wrong(f"{key} of its settings does not agree with the shapes of the weights, {mine}")
    return config


def _keras(layers: keras_file.Layers, said: keras_file.Graph | None) -> tuple[LegacyConfig, Arrays]:
    """The architecture of a Keras file, and its arrays under the names of `keras_names`.

    BatchNorms are told apart by their order, convolutions by their shapes: some files number the latter by use.
    """
    norms, convs, dense = (layers[kind] for kind in ("batch_normalization", "conv1d", "dense"))
    if len(dense) != 1 or len(norms) < 3 or len(norms) % 2 == 0:
        raise _Wrong(f"{len(dense)} dense layers and {len(norms)} BatchNorms are not the published network's")
    widths = [_get(norm, "gamma", 1).shape[0] for norm in norms]
    filters = (widths[0], *widths[1::2])
    stems = [_get(conv, "kernel", 3).shape for conv in convs if _get(conv, "kernel", 3).shape[2] == filters[0]]
    if len(stems) != 1 or list(filters) != sorted(set(filters)) or widths[1::2] != widths[2::2]:
        raise _Wrong(f"convolutions and BatchNorms of widths {widths[:16]} are not the published network's")
    published = PRESETS["legacy_diagnosis"]
    lengths, dropout = (said.lengths, said.dropout) if said else (published.lengths, published.dropout)
    if len(filters) != len(lengths):
        raise _Wrong(f"{len(filters)} widths for {len(lengths)} lengths")
    config = LegacyConfig(
        "keras",
        outputs=_get(dense[0], "bias", 1).shape[0],
        kernel=stems[0][0],
        dropout=dropout,
        filters=filters,
        lengths=lengths,
        leads=stems[0][1],
        samples=lengths[0],
    )
    arrays = {f"dense/{leaf}": array for leaf, array in dense[0].items()}
    for i, norm in enumerate(norms):
        arrays |= {f"{keras_file.numbered('batch_normalization', i)}/{leaf}": array for leaf, array in norm.items()}
    by_shape = {one.shape: name for name, one in legacy.parameters(config).items() if name.endswith("_kernel")}
    names = keras_names(config)
    for conv in convs:
        shape = conv["kernel"].shape
        if shape not in by_shape or names[by_shape[shape]] in arrays:
            raise _Wrong(f"a convolution has shape {shape}, which the published network has not, or not twice")
        arrays[names[by_shape[shape]]] = conv["kernel"]
    return config, arrays


def _fill(config: LegacyConfig, names: dict[str, str], arrays: Arrays) -> tuple[Arrays, Arrays]:
    """Every array checked, turned into our layout and float32: (encoder, head)."""
    tables = legacy.parameters(config) | legacy.statistics(config)
    tables |= {f"head/{name}": one for name, one in legacy.head(config).items()}
    unknown = set(arrays) - set(names.values())
    unknown = sorted(key for key in unknown if not key.endswith(".num_batches_tracked"))
    if unknown:
        raise _Wrong(f"key {short(unknown[0])} is none of the published network's ({len(unknown)} such)")
    encoder, head = {}, {}
    for name, one in tables.items():
        key, shape = names[name], one.shape
        theirs = _their_shape(config, name, shape)
        array = _get(arrays, key, len(theirs))
        if array.shape != theirs:
            raise _Wrong(f"key {key} has shape {array.shape}, not {theirs}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all() or (name.endswith("_running_var") and (array < 0).any()):
            raise _Wrong(f"key {key} is not finite, or a negative variance")
        if config.source == "torch":
            if name == "head/kernel":  # flattened channel by channel
                array = array.reshape(shape[::-1])
            array = array.T
        folder, leaf = (head, name.removeprefix("head/")) if name.startswith("head/") else (encoder, name)
        folder[leaf] = np.ascontiguousarray(array.reshape(shape))
    return encoder, head


def _their_shape(config: LegacyConfig, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "head/kernel":
        shape = (shape[0] * shape[1], shape[2])
    return shape[::-1] if config.source == "torch" else shape


def _get(arrays: Arrays, key: str, axes: int) -> np.ndarray:
    found = arrays.get(key)
    if found is None:
        raise _Wrong(f"key {key} is missing")
    if found.ndim != axes or found.dtype.kind != "f":
        raise _Wrong(f"key {key} is {found.dtype} with {found.ndim} axes, not floating-point with {axes}")
    return found


def _integers(key: str, values: Any) -> tuple[int, ...]:
    values = values if isinstance(values, list | tuple) else [None]
    if not all(type(value) is int and 0 < value < 1 << 31 for value in values):
        raise _Wrong(f"{key} of its settings is not made of positive integers")
    return tuple(values)
