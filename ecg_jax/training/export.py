"""The encoder of a finished run as two plain files, and back: `encoder.safetensors` and `encoder.json`.

The first holds the float32 parameters under flat names (`encoder/stem/kernel`), the second what is needed to
use them: the architecture, the input (scale, crop, rate, leads, unit), the labels and data sets that it has
seen. Anyone can read both without this package. No head, no optimizer state. Invariant: `load_encoder` gives
bit for bit what `save_encoder` was given.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ecg_jax import files
from ecg_jax.errors import DataError
from ecg_jax.models import ladder, legacy

ARRAYS, ABOUT = "encoder.safetensors", "encoder.json"
FORMAT = 1
FAMILIES = {config.family: config for config in (ladder.ResNet1dConfig, ladder.TransformerConfig, legacy.LegacyConfig)}


def save_encoder(run_dir: Path, arch: ladder.Config, params: Any, info: dict[str, Any]) -> None:
    """Write both files, each atomically, the description last.

    Args:
        params: nested dictionaries of arrays, on the host.
        info: JSON-able; scale, crop, rate, leads, unit, labels, lineage, identity.
    """
    arrays = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in _flat(params, "encoder")}
    files.write(run_dir / ARRAYS, safetensors.numpy.save(arrays))
    about = {"format": FORMAT, "family": arch.family, "arch": dataclasses.asdict(arch)} | info
    files.write(run_dir / ABOUT, json.dumps(about, indent=2) + "\n")


def load_encoder(run_dir: Path) -> tuple[ladder.Config, dict[str, Any], dict[str, Any]]:
    """(architecture, parameters as nested dictionaries of float32 NumPy arrays, info) of a run folder.

    Raises:
        DataError: no exported encoder there, a damaged one, or one of a newer format.
    """
    run_dir = Path(run_dir)
    try:
        info = json.loads((run_dir / ABOUT).read_text(encoding="utf-8"))
        flat = safetensors.numpy.load_file(run_dir / ARRAYS)
    except FileNotFoundError as error:
        raise DataError(f"{run_dir} has no {Path(error.filename or ARRAYS).name}: finish its training first") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"the encoder in {run_dir} cannot be read: {error}") from None
    if info.get("format") != FORMAT or info.get("family") not in FAMILIES:
        raise DataError(f"{run_dir / ABOUT} has format {info.get('format')!r}, family {info.get('family')!r}: not ours")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in info["arch"].items()}
    params: dict[str, Any] = {}
    for name, array in flat.items():
        *folders, leaf = name.split("/")[1:]
        at = params
        for part in folders:
            at = at.setdefault(part, {})
        at[leaf] = array
    return FAMILIES[info["family"]](**fields), params, info


def _flat(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key in sorted(tree) for pair in _flat(tree[key], f"{prefix}/{key}")]
