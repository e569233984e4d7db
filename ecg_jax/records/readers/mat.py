"""MATLAB files: versions 4 to 7 (`mat_levels`) and 7.3 (HDF5).

The samples are one numeric matrix, by name or the only one that has an axis of the leads' length; rate, unit and lead
names are taken from variables beside it. Invariant: where two matrices could be meant, none is read.
"""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ecg_jax.records.readers.arrays import (
    Declared,
    Facts,
    facts_of,
    is_fact,
    lead_axis,
    lead_count,
    numeric,
    one_recording,
    reading_of,
    refusing,
)
from ecg_jax.records.readers.hdf5 import FEW, check_stored, open_hdf5_file
from ecg_jax.records.readers.mat_levels import load_mat
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.record import Refused

DEPTH = 3  # of structs in structs
MEMBERS = 1000  # of a struct; links that run in circles multiply
_HDF5 = b"\x89HDF\r\n\x1a\n"


def read_mat(path: Path, declared: Declared, variable: str | None = None) -> Reading:
    """One recording of a `.mat` file.

    variable  name of the matrix, [12, T] or [T, 12], with dots into structs ("ECG.data"); None: the only one that
              can be it
    `source` is the sha256 of the file. Rate, unit and lead names are looked for in the struct of the matrix, then
    around it. Refuses with missing-file, unreadable-signal, no-signals, ambiguous-signals, wrong-type, missing-samples,
    and what `reading_of` refuses.
    """
    with refusing(path):
        content = Path(path).read_bytes()
    digest = hashlib.sha256(content).digest()
    # MATLAB puts 512 bytes of its own before the HDF5 file; h5py and others write none.
    if content[:8] == _HDF5 or content[512:520] == _HDF5:
        with open_hdf5_file(path) as file, refusing(path):
            return _read(path, _tree_of_hdf5(file), declared, variable, digest)
    try:
        tree = load_mat(content)
    except Refused as refusal:
        raise Refused(refusal.reason, f"{path}: {refusal.detail}") from None
    return _read(path, tree, declared, variable, digest)


def _tree_of_hdf5(group: h5py.Group, depth: int = 0) -> dict[str, Any]:
    """Name -> data set, or such a dict for a struct. No samples are read."""
    tree: dict[str, Any] = {}
    if len(group) > MEMBERS:
        raise Refused("unreadable-signal", f"{group.file.filename}:{group.name} holds more than {MEMBERS} variables")
    for name in group:
        if name.startswith("#") or group.get(name, getlink=True).__class__ is not h5py.HardLink:
            continue
        found = group[name]
        if isinstance(found, h5py.Dataset):
            tree[name] = found
        elif isinstance(found, h5py.Group) and depth < DEPTH:
            tree[name] = _tree_of_hdf5(found, depth + 1)
    return tree


def _read(path: Path, tree: dict[str, Any], declared: Declared, variable: str | None, digest: bytes) -> Reading:
    candidates: dict[str, tuple[Any, Facts]] = {}
    _collect(path, tree, declared, variable, {}, "", candidates)
    if not candidates:
        there = ", ".join(_names(tree)[:8]) or "nothing"
        what = f"variable {variable!r}" if variable else "matrix of leads and samples"
        raise Refused("no-signals", f"{path} has no {what}; it holds {there}; say variable=NAME")
    if len(candidates) > 1:
        raise Refused("ambiguous-signals", f"{path} may mean any of {', '.join(candidates)}; say variable=NAME")
    ((name, (value, facts)),) = candidates.items()
    where = f"{path}:{name}"
    if isinstance(value, dict):
        raise Refused("wrong-type", f"{where} is a struct; say variable={name}.FIELD")
    if isinstance(value, str):
        raise Refused("wrong-type", f"{where} is a text")
    if isinstance(value, h5py.Dataset):
        check_stored(where, value, None)
        raw = one_recording(where, value, None, lead_count(declared, facts)).T  # as MATLAB shows it
    else:
        raw = one_recording(where, value, None, lead_count(declared, facts))
    return reading_of(where, raw, declared, facts, digest)


def _names(tree: dict[str, Any]) -> list[str]:
    return [
        f"{name}.{field}" if isinstance(value, dict) else name
        for name, value in tree.items()
        for field in (value if isinstance(value, dict) else [""])
    ]


def _collect(
    path: Path,
    tree: dict[str, Any],
    declared: Declared,
    variable: str | None,
    around: dict[str, Any],
    prefix: str,
    candidates: dict[str, tuple[Any, Facts]],
) -> None:
    """Into `candidates`: full name -> (array or data set, what is said around it)."""
    facts = {name: _plain(value) for name, value in tree.items() if is_fact(name)}
    said = around | {name: value for name, value in facts.items() if value is not None}
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if variable == full:
            candidates[full] = value, facts_of(f"{path}:{full}", said)
        elif isinstance(value, dict):
            _collect(path, value, declared, variable, said, f"{full}.", candidates)
        elif isinstance(value, str):
            continue
        elif variable is None and numeric(value.dtype) and value.shape is not None:
            shape = tuple(value.shape)
            while len(shape) > 2 and 1 in (shape[0], shape[-1]):
                shape = shape[1:] if shape[0] == 1 else shape[:-1]
            found = facts_of(f"{path}:{full}", said) if len(shape) == 2 and max(shape) > 1 else Facts()
            if lead_axis(shape, lead_count(declared, found)) and max(shape) > 1:
                candidates[full] = value, found


def _plain(value: Any) -> Any:
    """What a variable says if it is small: a number, a text, an array of them; else None."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) or value.shape is None or not 0 < value.size <= FEW:
        return None
    if not isinstance(value, h5py.Dataset):
        return value
    check_stored(value.name, value, None)
    kind = value.attrs.get("MATLAB_class", b"")
    if kind == b"char" and value.dtype.kind == "u":
        return _text(value)
    if value.dtype.kind == "O" and h5py.check_ref_dtype(value.dtype) is h5py.Reference:
        found = [value.file[reference] for reference in value[()].ravel()]
        return np.array([_text(cell) if isinstance(cell, h5py.Dataset) else "" for cell in found], object)
    return value[()]


def _text(value: h5py.Dataset) -> str:
    if value.dtype.kind != "u" or value.shape is None or value.size > FEW:
        return ""
    check_stored(value.name, value, None)
    return "".join(chr(code) for code in value[()].T.ravel())
