"""Codes of heartbeats, kept beside the shards they belong to: once per record, whatever is trained on them.

OUT/<name>/<version>/codes-<codebook8>-<beats8>/ holds per shard codes, the R peaks that the beats were cut at, and the
record ids, each as an .npy file, and `card.json`, written last. Writes and reads them; makes no codes (that is
`tokenize`). Invariant: what is read belongs to the records asked for, one by one, and to the shards as they are
today, or nothing is read.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.records import windows
from ecg_jax.records.windows import MAX_PEAKS, SLOTS
from ecg_jax.shards.catalog import DataFolder, Shard
from ecg_jax.shards.grouping import hash64
from ecg_jax.shards.schema import CARD

FORMAT = 1
STATE = "state.json"  # what an interrupted run goes on from
KINDS = ("codes", "peaks", "ids")
Files = dict[str, dict[str, Any]]  # shard's file name -> its digest, and the checksums of the three files


def expected_name(codebook: str, mode: str) -> str:
    """Name of the folder with the codes of the codebook of id `codebook` for beats of `mode`, cut as today."""
    return f"codes-{codebook}-{windows.beats_id(mode)}"


@dataclass(frozen=True)
class CodesFolder:
    """A complete folder of codes that fits its data folder."""

    path: Path
    card: dict[str, Any]

    @property
    def codebook(self) -> str:
        """Id of the codebook."""
        return self.card["codebook"]["id"]

    @property
    def mode(self) -> str:
        """Of `records.windows`: how the beats were cut."""
        return self.card["beats"]["mode"]

    @property
    def n_codes(self) -> int:
        """Codes of the codebook."""
        return self.card["codebook"]["config"]["codes"]

    def read(self, shard: Shard, rows: np.ndarray, dataset: str) -> tuple[np.ndarray, np.ndarray]:
        """(codes uint16 [n, 256], R peaks int16 [n, 50]) of the records `rows` (`schema.IndexRow`) of `shard`, a shard
        of the data set `dataset`.

        Raises DataError where a file is missing or damaged, or belongs to other records.
        """
        found = read_files(self.path, shard.path.name, self.card["files"][shard.path.name], shard.records)
        at = np.searchsorted(shard.index()["frame"], rows["frame"])
        stored = [record_id.decode() for record_id in found["ids"][at].tolist()]
        for record_id, wanted in zip(stored, rows["record"].tolist(), strict=True):
            if hash64("record", dataset, record_id) != wanted:
                raise DataError(
                    f"{self.path / _file(shard.path.name, 'ids')}: has {record_id!r} where the shard has another "
                    f"record; {_again(self.path)}"
                )
        return found["codes"][at], found["peaks"][at]


def open_codes(
    data: DataFolder, name: Path | str, *, codebook: str | None = None, mode: str | None = None
) -> CodesFolder:
    """The codes folder `name` (its name inside the data folder, or a path) of `data`.

    codebook, mode: id of the codebook and beat mode that it must have. Raises DataError, one line, where it is not
    there, unfinished, of another release, codebook, beat mode or detector, or where the shards are not those that the
    codes were made of.
    """
    path = data.path / name if len(Path(name).parts) == 1 else Path(name)
    if not path.is_dir():
        there = ", ".join(sorted(p.name for p in data.path.glob("codes-*"))) or "none"
        raise DataError(f"{path}: no such folder (codes beside these shards: {there}); {_again(path)}")
    if not (path / CARD).is_file():
        raise DataError(f"{path}: has no {CARD}, its tokenizing did not finish; {_again(path)}")
    card = _json(path / CARD)
    if not card:
        raise DataError(f"{path / CARD}: is damaged; {_again(path)}")
    if card.get("format") != FORMAT:
        raise DataError(f"{path / CARD}: format {card.get('format')!r}, this release reads {FORMAT}; {_again(path)}")
    try:
        found = CodesFolder(path, card)
        _check(data, found, codebook, mode)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / CARD}: is damaged ({error!r}); {_again(path)}") from None
    return found


def _check(data: DataFolder, codes: CodesFolder, codebook: str | None, mode: str | None) -> None:
    path = codes.path
    own = f"codes-{codes.codebook}-{codes.card['beats']['id']}"
    if path.name.startswith("codes-") and path.name != own:
        raise DataError(f"{path}: holds what belongs to {own}: of another codebook or other beats; {_again(path)}")
    if codebook is not None and codes.codebook != codebook:
        raise DataError(f"{path}: codes of codebook {codes.codebook}, wanted are those of {codebook}; {_again(path)}")
    if mode is not None and codes.mode != mode:
        raise DataError(f"{path}: codes of {codes.mode!r} beats, wanted is {mode!r}; {_again(path)}")
    beats = codes.card["beats"]
    if beats["id"] != windows.beats_id(codes.mode):
        today = windows.detector(codes.mode)
        raise DataError(
            f"{path}: codes of beats {beats['id']} (detector {beats['detector']}), this release cuts "
            f"{windows.beats_id(codes.mode)} ({today}); {_again(path)}"
        )
    for file in data.card["files"]:
        known = codes.card["files"].get(file["file"])
        if known is None or known["shard_sha256"] != file["sha256"]:
            raise DataError(
                f"{path}: not the codes of {data.path / file['file']} as it is now (other digest); {_again(path)}"
            )
    if codes.n_codes < 1:
        raise KeyError("codes")


def _again(path: Path) -> str:
    return f"run `ecg-jax tokenize --data {path.parent} --codebook DIR`"


# --------------------------------------------------------------------------------------------- one shard's files


def _file(shard: str, kind: str) -> str:
    return f"{shard}.{kind}.npy"


def write_files(
    path: Path, shard: Shard, codes: np.ndarray, peaks: np.ndarray, record_ids: Sequence[str]
) -> dict[str, Any]:
    """Write the three files of `shard`, each atomically; returns their entry for `files` of the card.

    codes uint16 [n, 256], peaks int16 [n, 50]. Raises MachineError where the disk fails.
    """
    arrays = {"codes": codes, "peaks": peaks, "ids": np.array([name.encode() for name in record_ids], np.bytes_)}
    entry: dict[str, Any] = {"records": shard.records, "shard_sha256": shard.sha256}
    for kind, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files.write(path / _file(shard.path.name, kind), buffer.getvalue())
        entry[f"{kind}_crc32c"] = google_crc32c.value(buffer.getvalue())
    return entry


def read_files(path: Path, shard: str, entry: dict[str, Any], records: int) -> dict[str, np.ndarray]:
    """codes uint16 [n, 256], peaks int16 [n, 50] and ids (bytes) [n] of the shard with file name `shard`, verified
    against its `entry`. Raises DataError naming the file that is missing or damaged."""
    out = {}
    for kind, shape in zip(KINDS, ((records, SLOTS), (records, MAX_PEAKS), (records,)), strict=True):
        file = path / _file(shard, kind)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}; {_again(path)}") from None
        if google_crc32c.value(content) != entry[f"{kind}_crc32c"]:
            raise DataError(f"{file}: is damaged or cut short (its checksum is not the card's); {_again(path)}")
        out[kind] = np.load(io.BytesIO(content), allow_pickle=False)
        if out[kind].shape != shape:
            raise DataError(f"{file}: holds {out[kind].shape}, not {shape}; {_again(path)}")
    return out


# ------------------------------------------------------------------------------------------ a folder in the making


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Make the folder `path` and hold it: two that write there would remove each other's temporary files. Raises
    UsageError where another process holds it, MachineError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise MachineError(f"cannot make {path}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: another `ecg-jax tokenize` is writing there; wait for it") from None
        except OSError:
            pass  # a file system without locks: the user has to take care
        yield
    finally:
        os.close(handle)


def begin(path: Path, shards: Sequence[Shard], how: dict[str, Any]) -> Files:
    """Open or make the folder `path` for codes made by `how` (JSON-able: batch, device, ...). Returns what of it is
    whole, made by the same `how` and of `shards` as they are today; the rest is to be made."""
    state = _json(path / STATE) or _json(path / CARD)
    done: Files = {}
    if state.get("format") == FORMAT and state.get("how") == how:
        for shard in shards:
            entry = state.get("files", {}).get(shard.path.name)
            if entry is None or entry.get("shard_sha256") != shard.sha256:
                continue
            try:
                read_files(path, shard.path.name, entry, shard.records)
            except (DataError, KeyError):
                continue
            done[shard.path.name] = entry
    return done


def note(path: Path, how: dict[str, Any], done: Files) -> None:
    """Remember that the files of `done` are whole, and that the folder is not yet: after a kill they are kept."""
    files.write(path / STATE, json.dumps({"format": FORMAT, "how": how, "files": done}))
    (path / CARD).unlink(missing_ok=True)


def finish(path: Path, card: dict[str, Any]) -> None:
    """Write the card (`how` and `files` in it): the folder is complete."""
    files.write(path / CARD, json.dumps({"format": FORMAT} | card, indent=1) + "\n")
    (path / STATE).unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    """The object that the file holds; empty where there is none, or another thing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
