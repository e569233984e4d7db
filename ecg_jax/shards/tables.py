"""Loads a split of one or several data folders into memory as arrays.

No TensorFlow: the offset index says where the samples and the labels stand, so that only checksums are a loop
over records (R peaks, behind two ids of any length, are found by a walk over all records at once). Invariants:
every loaded record has passed its CRC32C; rows come by folder, shard and place on the circle; a smaller subset
reads only its own run of bytes in each shard.
"""

import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from ecg_jax.errors import DataError, did_you_mean
from ecg_jax.progress import track
from ecg_jax.records.leads import expand_matrix
from ecg_jax.records.windows import MAX_PEAKS, SLOTS
from ecg_jax.shards import LANES, peaks, schema
from ecg_jax.shards.catalog import WHOLE, DataFolder, Shard, Subset, open_folder, select
from ecg_jax.shards.codes import CodesFolder, open_codes
from ecg_jax.shards.grouping import hash64
from ecg_jax.shards.host import Mapped, MappedSignals, map_shard, to_twelve

FIELDS = ("signal", "labels", "valid")  # what supervised training wants of a record


@dataclass(frozen=True)
class Table:
    """A loaded split, n records.

    signal int16 [n, 1000, L], 1 LSB = 0.001 `unit`; labels int8 [n, K] in the order of label_names, -1
    unknown; valid int32 [n, 2] (start, length); lane int32 [n], the shard's number mod 8; record_hash,
    group_hash uint64 [n]; age, sex float32 [n], NaN unknown; bayes float32 [n, K], the simulator's true
    probabilities, or None; unit mV, z or mixed; capacity, the records of the largest lane of the whole split,
    whatever the subset; whole_lane int32, the lanes of all records of the
    selection where this table holds the shards of some lanes only (a process among several), else None. signal may be
    `host.MappedSignals`. rpeaks int16 [n, 50], positions of the R peaks in samples, ascending, -1 beyond the last:
    those of the shards, or, with codes, those that the coded beats were cut at. codes uint16 [n, 256], of
    `records.windows`' slots, NO_CODE where there is no beat; None where none were asked for.
    """

    signal: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    valid: np.ndarray
    lane: np.ndarray
    record_hash: np.ndarray
    group_hash: np.ndarray
    record_ids: list[str]
    age: np.ndarray
    sex: np.ndarray
    bayes: np.ndarray | None
    unit: str
    leads: tuple[str, ...]
    capacity: int
    rpeaks: np.ndarray | None = None
    codes: np.ndarray | None = None
    whole_lane: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def lanes_of_all(self) -> np.ndarray:
        """int32 [N]: the lane of every record of the selection, those of other processes' shards included."""
        return self.lane if self.whole_lane is None else self.whole_lane


@dataclass(frozen=True)
class Selection:
    """What a loader is to read: the folders, their label columns, and the chosen rows of every shard."""

    folders: tuple[DataFolder, ...]
    split: str
    task: str
    label_names: tuple[str, ...]
    columns: tuple[np.ndarray, ...]  # per folder int [K of the folder]: column in label_names, -1 not wanted
    leads: schema.Leads  # "12" as soon as one folder has twelve
    parts: tuple[tuple[int, Shard, np.ndarray], ...]  # (folder, shard, chosen IndexRow rows), empty ones left out
    capacity: int

    @property
    def records(self) -> int:
        return sum(len(rows) for _, _, rows in self.parts)

    @property
    def index(self) -> np.ndarray:
        """`schema.IndexRow` of all chosen records."""
        return np.concatenate([rows for _, _, rows in self.parts])


def choose(
    folders: Sequence[Path],
    split: str,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    subset: Subset = WHOLE,
    exclude: Collection[int] = frozenset(),
) -> Selection:
    """Settle folders, labels and rows, reading only cards and indexes. Arguments and errors as in `load`."""
    if not folders:
        raise DataError("no data folder given")
    opened = tuple(open_folder(Path(folder)) for folder in folders)
    tasks = [folder.labels(task) if task else () for folder in opened]
    every = tuple(dict.fromkeys(name for names in tasks for name in names))
    wanted = every if labels is None else tuple(labels)
    for name in wanted:
        if name not in every:
            raise DataError(
                f"task {task!r} has no label {name!r}{did_you_mean(name, every)}; it has {', '.join(every)}"
            )
    columns = tuple(np.array([wanted.index(n) if n in wanted else -1 for n in names], int) for names in tasks)
    # A small set among several may have no record in a split; that none has one is another matter.
    having = [f for f, folder in enumerate(opened) if split in folder.splits] or [0]
    pieces = [(f, shard, shard.index()) for f in having for shard in opened[f].shards(split)]
    whole = np.concatenate([index for _, _, index in pieces])
    keep = select(whole, subset if split == "train" else WHOLE, frozenset(int(g) for g in exclude))
    if not keep.any():
        raise DataError(f"{_names(opened)}: {split} has {len(whole)} records, none in the subset: take a larger one")
    edges = np.cumsum([0, *(len(index) for _, _, index in pieces)])
    chosen = [
        (f, shard, index[keep[a:b]])
        for (f, shard, index), a, b in zip(pieces, edges[:-1], edges[1:], strict=True)
        if keep[a:b].any()
    ]
    lanes = np.bincount(whole["shard"].astype(np.int64) % LANES, minlength=LANES)
    leads = "8" if all(folder.leads == "8" for folder in opened) else "12"
    return Selection(opened, split, task, wanted, columns, leads, tuple(chosen), int(lanes.max()))


def _names(folders: Sequence[DataFolder]) -> str:
    return ", ".join(str(folder.path) for folder in folders)


def load(
    folders: Sequence[Path],
    split: str,
    task: str,
    *,
    labels: Sequence[str] | None = None,
    subset: Subset = WHOLE,
    exclude: Collection[int] = frozenset(),
    codes: Sequence[Path | str] | None = None,
    lanes: Collection[int] = range(LANES),
    mapped: bool = False,
) -> Table:
    """The records of `split` of all `folders`, labels aligned by name.

    task     whose labels; "" for none, with K = 0
    labels   which labels, in this order; None: those of the first folder, then new ones of the others. A
             label that a folder does not have is unknown (-1) there
    subset   applies to "train" only: val and test never shrink
    exclude  group hashes to leave out, of whatever split is loaded
    codes    a folder of `ecg-jax tokenize` for each data folder, as name inside it or as path
    lanes    read the shards of these only; of the others nothing but their indexes is opened
    mapped   leave the samples in their files (`host.MappedSignals`); then damage is found when a record is first read

    A folder without such a split adds nothing where another has it. Deterministic. Raises DataError for a missing
    folder, split, task or label (naming those there are), an empty selection, a damaged shard (naming file and byte),
    or codes that are not those of these shards.
    """
    s = choose(folders, split, task, labels=labels, subset=subset, exclude=exclude)
    whole = (s.index["shard"] % LANES).astype(np.int32)
    parts = [part for part in s.parts if part[1].number % LANES in lanes]
    index = np.concatenate([s.parts[0][2][:0], *(rows for _, _, rows in parts)])
    n, k = len(index), len(s.label_names)
    with_bayes = (s.folders[f].card["splits"][split].get("bayes_loss", {}) for f in {f for f, _, _ in s.parts})
    has_bayes = bool(task) and all(task in known for known in with_bayes)
    signal = np.empty((0 if mapped else n, schema.LENGTH, len(schema.LEAD_NAMES[s.leads])), np.int16)
    maps: list[Mapped] = []
    out_labels = np.full((n, k), -1, np.int8)
    bayes = np.full((n, k), np.nan, np.float32) if has_bayes else None
    age, sex = np.empty(n, np.float32), np.empty(n, np.float32)
    rpeaks = np.empty((n, MAX_PEAKS), np.int16)
    coded = None if codes is None else _open_codes(s.folders, codes)
    out_codes = None if coded is None else np.empty((n, SLOTS), np.uint16)
    record_ids: list[str] = []
    # One buffer for all shards: fresh memory is as slow to touch as the file is to read.
    buffer = np.empty(0 if mapped else max((_chosen_bytes(rows) for _, _, rows in parts), default=0), np.uint8)
    at = 0
    for f, shard, chosen in track(parts, f"load {split}", unit="shards"):
        folder, here = s.folders[f], slice(at, at + len(chosen))
        if mapped:
            data, rows = map_shard(shard.path), chosen
            maps.append(Mapped(shard.path, data, rows, folder.leads))
        else:
            data, rows = _read(shard.path, chosen, buffer)
            _copy_signals(data, rows, folder.leads, signal[here])
        fixed = schema.fixed_offsets(folder.leads, tuple((t, len(v)) for t, v in folder.card["tasks"].items()))
        _check_layout(data, rows, fixed, shard.path, folder.card["name"])
        age[here] = _gather(data, rows, *fixed["age"]).view("<f4")[:, 0]
        sex[here] = _gather(data, rows, *fixed["sex"]).view("<f4")[:, 0]
        used = s.columns[f] >= 0
        if task:
            found = _gather(data, rows, *fixed[f"labels/{task}"]).view(np.int8)
            out_labels[here, s.columns[f][used]] = found[:, used]
        record_ids += _ids(data, rows)
        if coded is None:
            rpeaks[here] = peaks.read(data, rows, shard.path)
        else:
            out_codes[here], rpeaks[here] = coded[f].read(shard, chosen, folder.card["name"])
        if bayes is not None:
            from ecg_jax.shards.writer import bayes_of  # simulated data only: it brings scipy.signal, a second

            true = [bayes_of(_meta(data, row), task, len(used)) for row in rows]
            bayes[here, s.columns[f][used]] = np.array(true, np.float32)[:, used]
        at += len(rows)
    units = {folder.card["unit"] for folder in s.folders}
    return Table(
        signal=MappedSignals(maps, s.leads) if mapped else signal,
        labels=out_labels,
        label_names=s.label_names,
        valid=index["valid"].astype(np.int32),
        lane=(index["shard"] % LANES).astype(np.int32),
        record_hash=index["record"].astype(np.uint64),
        group_hash=index["group"].astype(np.uint64),
        record_ids=record_ids,
        age=age,
        sex=sex,
        bayes=bayes,
        unit=units.pop() if len(units) == 1 else "mixed",
        leads=schema.LEAD_NAMES[s.leads],
        capacity=s.capacity,
        rpeaks=rpeaks,
        codes=out_codes,
        whole_lane=whole if len(lanes) < LANES else None,
    )


def read_codes(chosen: Selection, codes: Sequence[Path | str]) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint16 [n, 256], R peaks int16 [n, 50] that they were cut at) of a selection, in its order, out of one
    folder of codes for each data folder. Raises DataError where they are not those of these records."""
    opened = _open_codes(chosen.folders, codes)
    names = [folder.card["name"] for folder in chosen.folders]
    found = [opened[f].read(shard, rows, dataset=names[f]) for f, shard, rows in chosen.parts]
    return np.concatenate([codes for codes, _ in found]), np.concatenate([peaks for _, peaks in found])


def _open_codes(folders: Sequence[DataFolder], codes: Sequence[Path | str]) -> list[CodesFolder]:
    if len(codes) != len(folders):
        raise DataError(f"{len(codes)} folders of codes for {len(folders)} data folders; give one for each")
    opened = [open_codes(folder, name) for folder, name in zip(folders, codes, strict=True)]
    for found in opened[1:]:
        if (found.codebook, found.mode) != (opened[0].codebook, opened[0].mode):
            raise DataError(
                f"{found.path}: codes of codebook {found.codebook}, {found.mode} beats; {opened[0].path} has codebook "
                f"{opened[0].codebook}, {opened[0].mode} beats: take one codebook and one mode for all data folders"
            )
    return opened


class ShardRecords(NamedTuple):
    """All records of one shard: signal int16 [n, 1000, L], valid int32 [n, 2], rpeaks int16 [n, 50], record_ids."""

    signal: np.ndarray
    valid: np.ndarray
    rpeaks: np.ndarray
    record_ids: list[str]


def read_shard(folder: DataFolder, shard: Shard) -> ShardRecords:
    """The records of `shard` as stored, in file order. Raises DataError where it is damaged."""
    index = shard.index()
    valid = index["valid"].astype(np.int32)
    signal = np.empty((len(index), schema.LENGTH, len(schema.LEAD_NAMES[folder.leads])), np.int16)
    if not len(index):  # so few patients that the shard got none
        return ShardRecords(signal, valid, peaks.fitted([]), [])
    data, rows = _read(shard.path, index, np.empty(_chosen_bytes(index), np.uint8))
    _copy_signals(data, rows, folder.leads, signal)
    return ShardRecords(signal, valid, peaks.read(data, rows, shard.path), _ids(data, rows))


# ------------------------------------------------------------------------------------------- bytes of a shard


def _read(path: Path, rows: np.ndarray, buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 part of `buffer` that now holds the chosen frames, verified; `rows` with places counted in it).

    Only the runs of chosen frames are read: one, or two where the arc passes the end of the circle, or more
    where groups are excluded. Raises DataError naming file and byte of a damaged record.
    """
    end = rows["frame"] + rows["length"] + np.uint64(schema.FRAME_EXTRA)
    gaps = np.flatnonzero(rows["frame"][1:] != end[:-1]) + 1
    local = rows.copy()
    taken = 0
    try:
        with path.open("rb", buffering=0) as file:
            for a, b in zip([0, *gaps.tolist()], [*gaps.tolist(), len(rows)], strict=True):
                start, size = int(rows["frame"][a]), int(end[b - 1]) - int(rows["frame"][a])
                file.seek(start)
                _read_exactly(file, memoryview(buffer)[taken : taken + size], path, start)
                skipped = np.uint64(start - taken)
                local["frame"][a:b] -= skipped
                local["signal"][a:b] -= skipped
                taken += size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {schema.REPAIR}") from None
    data = buffer[:taken]
    _verify(data, local, rows["frame"].tolist(), path)
    return data, local


def _chosen_bytes(rows: np.ndarray) -> int:
    return int(rows["length"].sum(dtype=np.int64)) + len(rows) * schema.FRAME_EXTRA


def _read_exactly(file: FileIO, target: memoryview, path: Path, start: int) -> None:
    done = 0
    while done < len(target):  # one call reads at most 2 GiB
        count = file.readinto(target[done:])
        if not count:
            raise schema.damaged(path, start + done, "the file ends here")
        done += count


def _verify(data: np.ndarray, rows: np.ndarray, offsets: list[int], path: Path) -> None:
    view, crc = memoryview(data), google_crc32c.value
    for frame, length, offset in zip(rows["frame"].tolist(), rows["length"].tolist(), offsets, strict=True):
        payload = frame + schema.HEADER
        head = bytes(view[frame:payload])
        stored_length, length_crc = struct.unpack("<QI", head)
        (payload_crc,) = struct.unpack_from("<I", view, payload + length)
        found = schema.mask(crc(bytes(view[payload : payload + length])))
        if stored_length != length or schema.masked_crc(head[:8]) != length_crc or found != payload_crc:
            raise schema.damaged(path, offset, "a checksum is wrong")


def _ids(data: np.ndarray, rows: np.ndarray) -> list[str]:
    places = zip((rows["frame"] + rows["id"]).tolist(), rows["id_length"].tolist(), strict=True)
    return [data[start : start + length].tobytes().decode() for start, length in places]


def _gather(data: np.ndarray, rows: np.ndarray, offset: int, size: int) -> np.ndarray:
    """uint8 [n, size]: the bytes at `offset` after the samples' start of each row."""
    start = rows["signal"].astype(np.int64) + offset
    return data[start[:, None] + np.arange(size)]


def _copy_signals(data: np.ndarray, rows: np.ndarray, leads: schema.Leads, out: np.ndarray) -> None:
    size = 2 * schema.LENGTH * len(schema.LEAD_NAMES[leads])
    expand = expand_matrix() if out.shape[2] > len(schema.LEAD_NAMES[leads]) else None
    for i, start in enumerate(rows["signal"].tolist()):
        samples = data[start : start + size].view("<i2").reshape(schema.LENGTH, -1)
        out[i] = samples if expand is None else to_twelve(samples, expand)


def _check_layout(data: np.ndarray, rows: np.ndarray, fixed: dict, path: Path, name: str) -> None:
    """One full decode a shard: it must be a shard of this data set, and the constant distances, and the walk to the R
    peaks, must lead to what the fields hold."""
    start, length = int(rows["frame"][0]) + schema.HEADER, int(rows["length"][0])
    try:
        stored = schema.decode(data[start : start + length].tobytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if hash64("record", name, stored["record_id"]) != int(rows["record"][0]):
        raise DataError(f"{path}: holds records of another data set ({stored['record_id']!r}); {schema.REPAIR}")
    found = {name: _gather(data, rows[:1], *place).tobytes() for name, place in fixed.items()}
    expected = {f"labels/{task}": labels.tobytes() for task, labels in stored["labels"].items()}
    expected["signature"] = stored["signature"]
    same = all(found.get(name) == value for name, value in expected.items())
    if not (same and np.array_equal(peaks.read(data, rows[:1], path), peaks.fitted([stored["rpeaks"]]))):
        raise DataError(f"{path}: its fields do not stand where its card says; convert again with this release")


def _meta(data: np.ndarray, row: np.void) -> dict:
    start = int(row["frame"]) + int(row["id"]) + int(row["id_length"])
    end = int(row["frame"]) + schema.HEADER + int(row["length"])
    return json.loads(schema.decode_tail(data[start:end].tobytes())["meta"])
