"""A codebook as a folder: `codebook.safetensors` (all arrays of VQ-HBR) and `codebook.json` (what they are).

Written by the training of a codebook, or out of HeartLang's published weights; trains nothing and encodes nothing. The
id of a codebook is a hash of its arrays, its configuration and of how a record is brought to it, so codes that bear the
same id mean the same. Invariant: `load` gives bit for bit what `save` was given, or refuses.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ecg_jax import files
from ecg_jax.errors import DataError, UsageError
from ecg_jax.models import vqhbr
from ecg_jax.models.inputs import SCALES
from ecg_jax.records import windows
from ecg_jax.records.leads import LEADS

ARRAYS, ABOUT = "codebook.safetensors", "codebook.json"
FORMAT = 1
INFO = ("scale", "beats", "detector", "chain", "indices", "leads", "unit", "usage", "lineage", "source")
CODING = ("scale", "indices")  # of those, what changes the code of a beat that was cut already
SOURCES = ("trained", "heartlang")
AGAIN = "copy the codebook folder again, or make it again with `ecg-jax codebook`"


class Codebook(NamedTuple):
    """config: the architecture; params: nested dictionaries of float32 arrays; info: see `save`; id: 8 hex digits;
    path: where it was read."""

    config: vqhbr.Config
    params: dict[str, Any]
    info: dict[str, Any]
    id: str
    path: Path


def save(folder: Path, config: vqhbr.Config, params: Any, info: dict[str, Any]) -> str:
    """Write both files, each atomically, the description last. Returns the codebook's id.

    params: nested dictionaries of arrays on the host. info: JSON-able, with exactly the keys of INFO (more are kept):
    scale of the signal ("mv", "gain" or "zscore"), beats (the mode of `records.windows`), detector and chain that it
    was trained on, indices (whether lead and time go in when codes are made), leads, unit, usage (counts per code in
    training), lineage (the data sets that went in), source ("trained" or "heartlang"). Raises ValueError for other
    info, MachineError where the disk fails.
    """
    missing = [key for key in INFO if key not in info]
    if missing or (wrong := _wrong(info)):
        raise ValueError(f"info of the codebook lacks {missing}" if missing else wrong)
    arrays = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in _flat(params)}
    plain = json.loads(json.dumps(info, default=lambda value: value.tolist()))
    about = {"format": FORMAT, "id": _id(arrays, config, plain), "config": dataclasses.asdict(config), "info": plain}
    files.write(Path(folder) / ARRAYS, safetensors.numpy.save(arrays))
    files.write(Path(folder) / ABOUT, json.dumps(about, indent=1) + "\n")
    return about["id"]


def load(folder: Path) -> Codebook:
    """The codebook in `folder`. Raises DataError, one line that names the file, where there is none, where a file is
    damaged or of another release, or where the arrays are not those that the description was written for."""
    folder = Path(folder)
    about, arrays = _read(folder)
    where = folder / ABOUT
    try:
        if about["format"] != FORMAT:
            raise DataError(f"{where}: format {about['format']!r}, this release reads {FORMAT}; {AGAIN}")
        said, info, identity = about["config"], dict(about["info"]), str(about["id"])
        config = vqhbr.Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in said.items()})
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{where}: is no description of a codebook ({what}); {AGAIN}") from None
    missing = [key for key in INFO if key not in info]
    if missing or (wrong := _wrong(info)):
        raise DataError(f"{where}: {f'lacks {missing[0]!r}' if missing else wrong}; {AGAIN}")
    if _id(arrays, config, info) != identity:
        raise DataError(f"{folder}: {ARRAYS} is not what {ABOUT} describes (id {identity}): damaged or mixed; {AGAIN}")
    want = {
        name: leaf.shape for name, leaf in _flat(jax.eval_shape(lambda k: vqhbr.init(config, k), jax.random.key(0)))
    }
    found = {name: array.shape for name, array in arrays.items()}
    if want != found:
        name = next(name for name in sorted(want | found) if want.get(name) != found.get(name))
        shapes = f"{found.get(name, 'not there')}, not {want.get(name, 'expected')}"
        raise DataError(f"{folder / ARRAYS}: array {name!r} is {shapes}: made by another release; {AGAIN}")
    return Codebook(config, _nested(arrays), info, identity, folder)


def import_published(path: Path, folder: Path) -> dict[str, Any]:
    """Write HeartLang's published VQ-HBR checkpoint `path` as the codebook `folder`; nothing in the file is executed.

    What it was trained on is said by its paper and repository (see `records.windows`): MIMIC-IV-ECG in mV at 100 Hz.
    Codes are made with lead and time, as it was trained; its released pre-training leaves them out. Returns id, codes
    and code_dim. Raises DataError where the file is not exactly such a checkpoint, MachineError where the disk fails.
    """
    from ecg_jax.models import heartlang

    config, params = heartlang.import_heartlang(path)
    seen = {"dataset": "mimic-iv-ecg", "version": None, "id_space": "mimic", "contains": ["mimic-icu"]}
    info = {
        "scale": "mv",
        "beats": "heartlang",
        "detector": windows.detector("heartlang"),
        "chain": "heartlang",
        "indices": True,
        "leads": list(LEADS),
        "unit": "mV",
        "usage": params["usage"],
        "lineage": [seen | dict.fromkeys(("records", "patients", "signatures"))],
        "source": "heartlang",
    }
    return {"id": save(folder, config, params, info), "codes": config.codes, "code_dim": config.code_dim}


def _read(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    for name in (ABOUT, ARRAYS):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: is no codebook (no {name}); name the --out folder of an `ecg-jax codebook`")
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / ABOUT}: cannot be read ({_short(error)}); {AGAIN}") from None
    try:
        arrays = safetensors.numpy.load((folder / ARRAYS).read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{folder / ARRAYS}: cannot be read ({_short(error)}); {AGAIN}") from None
    return about, arrays


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _wrong(info: dict[str, Any]) -> str:
    """What of `info` is impossible, or nothing."""
    known = {"scale": SCALES, "beats": windows.MODES, "indices": (True, False), "source": SOURCES}
    for key, values in known.items():
        if info[key] not in values:
            return f"{key} is {info[key]!r}, not one of {', '.join(map(str, values))}"
    return ""


def _id(arrays: dict[str, np.ndarray], config: vqhbr.Config, info: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    about = [dataclasses.asdict(config), {key: info[key] for key in CODING}]
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:8]


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for key in sorted(tree) for pair in _flat(tree[key], f"{prefix}/{key}" if prefix else key)]


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        at = out
        for part in folders:
            at = at.setdefault(part, {})
        at[leaf] = array
    return out
