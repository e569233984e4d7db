"""Frozen features of a trained or an untrained encoder on a table of records, computed once on all devices and cached.

The encoder sees what it saw in training: the same scale, the same crop length (centre crop), no randomness,
float32. Nothing is fitted here and no label is read. The cache is named by the content of the encoder and of
the records, so it can never serve another encoder, another filter chain or another split. Invariant: the
features of a record do not depend on the batch it came in (beyond float rounding).
"""

import hashlib
import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ecg_jax import files, progress
from ecg_jax.errors import DataError, DivergedError

DIGITS = 16  # hex digits of a hash in a file name


@dataclass(frozen=True)
class Encoder:
    """config: the architecture's; params: what the objective's `features` needs, {"encoder": tree} (running
    statistics of BatchNorm included); info: what `training.export` stored with it; digest: hash of everything that
    decides the features.
    """

    config: Any
    params: dict[str, Any]
    info: dict[str, Any]
    digest: str


def load(run_dir: Path) -> Encoder:
    """The encoder that the run in `run_dir` exported. Raises DataError where there is none."""
    from ecg_jax.training.export import load_encoder

    config, tree, info = load_encoder(run_dir)
    params = {"encoder": tree}
    return Encoder(config, params, info, digest_of(config, params, info))


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same architecture and input with fresh parameters: the baseline of every claim that training helped.

    Randomness: `seed` only.
    """
    key = jax.random.split(jax.random.key(seed))[0]  # the other half is a head's
    params = {"encoder": front_of(encoder).init(key)}
    return replace(encoder, params=params, digest=digest_of(encoder.config, params, encoder.info))


def extract(
    encoder: Encoder,
    table: Any,
    split: str,
    *,
    cache: Path | None = None,
    batch: int = 128,
    data: str | None = None,
) -> np.ndarray:
    """Features float32 [n, D] of the records of `table` (`shards.tables.Table`), the log gain last.

    Every device of the process takes `batch` records at a time. split names the cache file,
    `cache/<encoder>-<data>-<split>.npz` (record_ids, record_hash, group_hash, features); data is `data_hash(table)`
    where the caller has it. Raises DataError for a unit that the
    encoder cannot take, DivergedError for features that are not finite.
    """
    check_unit(encoder, table)
    data = data or data_hash(table)
    path = cache / f"{encoder.digest[:DIGITS]}-{data[:DIGITS]}-{split}.npz" if cache else None
    if path and path.exists():
        found = _cached(path, table)
        if found is not None:
            return found
    features = _compute(encoder, table, split, batch)
    bad = ~np.isfinite(features).all(1)
    if bad.any():
        first = table.record_ids[int(np.argmax(bad))]
        raise DivergedError(f"features of {int(bad.sum())} records are not finite, first {first!r}: encoder unusable")
    if path:
        _store(path, table, features)
    return features


def check_unit(encoder: Encoder, table: Any) -> None:
    """Raises DataError where an encoder that reads millivolt would be given anything else."""
    if encoder.info["scale"] == "mv" and table.unit != "mV":
        raise DataError(
            f"the encoder reads millivolt (model.scale mv), the records are in unit {table.unit!r}: "
            "probe a data folder in mV, or train with model.scale gain or zscore"
        )


def data_hash(table: Any) -> str:
    """Hash of the records, in their order: ids, samples, observed span, R peaks, unit and leads; no label."""
    digest = hashlib.sha256(repr((table.unit, tuple(table.leads), table.signal.shape)).encode())
    peaks = [] if table.rpeaks is None else [table.rpeaks]
    for part in (table.record_hash, table.valid, table.signal, *peaks):
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def array_hash(*arrays: np.ndarray) -> str:
    """16 hex digits of arrays, their types and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:DIGITS]


def cropped(table: Any, length: int) -> Any:
    """`table` (`shards.tables.Table`) with only the middle `length` samples of what each record observed, zeros around
    them where they lie, and R peaks outside dropped: recordings of several lengths made equal.
    """
    start, valid = table.valid[:, 0], table.valid[:, 1]
    kept = np.minimum(valid, length)
    first = start + (valid - kept) // 2
    place = np.arange(table.signal.shape[1])
    inside = (place >= first[:, None]) & (place < (first + kept)[:, None])
    peaks = table.rpeaks
    if peaks is not None:
        there = (peaks >= first[:, None]) & (peaks < (first + kept)[:, None])
        order = np.argsort(~there, axis=1, kind="stable")
        peaks = np.take_along_axis(np.where(there, peaks, -1), order, axis=1).astype(peaks.dtype)
    signal = np.where(inside[:, :, None], table.signal, 0).astype(table.signal.dtype)
    span = np.stack([first, kept], axis=1).astype(table.valid.dtype)
    return replace(table, signal=signal, valid=span, rpeaks=peaks)


def digest_of(config: Any, params: Any, info: dict[str, Any]) -> str:
    """sha256 in hex of everything that decides the features of an encoder."""
    seen = config, info["scale"], info["crop"], info.get("beats", "robust"), info.get("slots", 0)
    digest = hashlib.sha256(repr(seen).encode())
    for path, leaf in sorted((jax.tree_util.keystr(p), v) for p, v in jax.tree_util.tree_leaves_with_path(params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def front_of(encoder: Encoder) -> Any:
    """The encoder behind its input (`objectives.front`): float32, no randomness, `features(params, batch)`."""
    from ecg_jax.objectives import front

    info = encoder.info
    beats = {"mode": info.get("beats", "robust"), "slots": info.get("slots", 0)}
    return front.make(encoder.config, scale=info["scale"], crop=info["crop"], dtype="float32", **beats)


@lru_cache(maxsize=32)
def _forward(front):
    return jax.jit(front.features)


def peaks(table: Any, mode: str) -> np.ndarray:
    """R peaks int16 [n, 50] of the beats that an encoder of this `mode` sees, -1 beyond the last: those of the shards,
    or what HeartLang's detector finds on lead I of the stored signal.
    """
    if mode == "robust":
        return table.rpeaks
    from ecg_jax.records import xqrs
    from ecg_jax.shards.peaks import fitted

    return fitted(xqrs.peaks(table.signal, table.valid))


def _compute(encoder: Encoder, table: Any, split: str, batch: int) -> np.ndarray:
    n, devices = len(table.record_ids), np.array(jax.local_devices())
    if not n:
        raise DataError(f"no record in the {split} split: nothing to probe")
    mesh = Mesh(devices, ("records",))
    whole, split_up = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("records")))
    front = front_of(encoder)
    forward, params = _forward(front), jax.device_put(encoder.params, whole)
    held = {"signal": table.signal, "valid": table.valid}
    if front.on_beats:
        held["rpeaks"] = peaks(table, front.mode)
    done, pending, batch = [], None, batch * len(devices)
    for start in progress.track(range(0, n, batch), f"features of {split}", unit="batches"):
        rows = np.minimum(np.arange(start, start + batch), n - 1)  # one shape, so one compile
        part = jax.device_put({name: values[rows] for name, values in held.items()}, split_up)
        dispatched = forward(params, part)
        if pending is not None:
            done.append(np.asarray(pending, np.float32))  # read the step before, while this one runs
        pending = dispatched
    return np.concatenate([*done, np.asarray(pending, np.float32)])[:n]


def _cached(path: Path, table: Any) -> np.ndarray | None:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if np.array_equal(file["record_hash"], table.record_hash):
                return file["features"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # a torn file of a full disk: compute again and replace it
    return None


def _store(path: Path, table: Any, features: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        record_ids=np.asarray(table.record_ids, dtype=np.str_),
        record_hash=table.record_hash,
        group_hash=table.group_hash,
        features=features,
    )
    files.write(path, content.getvalue())
