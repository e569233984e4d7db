"""Opens a data folder: its card, its shards, their indexes, and the subset of patients that an arc selects.

Reads no signal. Invariants: a folder without a card is refused; an index is used only if it is the one that
the card names; a smaller subset lies inside a larger one at the same offset, in whole groups, and is one run
(two where the circle closes) of every shard.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.shards import schema
from ecg_jax.shards.grouping import circle, shard_name
from ecg_jax.shards.schema import CARD, CARD_FORMAT, SIGNATURES, STATE


@dataclass(frozen=True)
class Shard:
    """One file of a split. `number` mod 8 is its lane."""

    path: Path
    number: int
    records: int
    bytes: int
    sha256: str
    index_sha256: str

    def index(self) -> np.ndarray:
        """`schema.IndexRow` [records]. Raises DataError where index or shard are not those of the card."""
        path = self.path.with_name(self.path.name + schema.INDEX_SUFFIX)
        try:
            data = path.read_bytes()
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}; {schema.REPAIR}") from None
        if hashlib.sha256(data).hexdigest() != self.index_sha256:
            raise DataError(f"{path}: is not the index that {CARD} names; {schema.REPAIR}")
        if size != self.bytes:
            raise DataError(f"{self.path}: has {size} bytes, {CARD} names {self.bytes}; {schema.REPAIR}")
        return np.load(io.BytesIO(data), allow_pickle=False)


@dataclass(frozen=True)
class DataFolder:
    """A complete data folder, `OUT/<name>/<version>`."""

    path: Path
    card: dict[str, Any]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.card["splits"])

    @property
    def leads(self) -> schema.Leads:
        return "8" if len(self.card["leads"]) == 8 else "12"

    def shards(self, split: str) -> list[Shard]:
        """The shards of `split` by number. Raises DataError where the folder has no such split."""
        if split not in self.splits:
            counts = ", ".join(f"{name} ({found['records']} records)" for name, found in self.card["splits"].items())
            raise DataError(f"{self.path}: has no split {split!r}, only {counts}")
        fields = ("number", "records", "bytes", "sha256", "index_sha256")
        mine = [file for file in self.card["files"] if file["split"] == split]
        return [Shard(self.path / file["file"], *(file[field] for field in fields)) for file in mine]

    def index(self, split: str) -> np.ndarray:
        """`schema.IndexRow` of all shards of `split`, by shard number, then in file order."""
        return np.concatenate([shard.index() for shard in self.shards(split)])

    def labels(self, task: str) -> tuple[str, ...]:
        """Label names of `task`. Raises DataError naming the tasks there are."""
        tasks = self.card["tasks"]
        if task not in tasks:
            known = ", ".join(tasks) or "none"
            raise DataError(f"{self.path}: has no task {task!r}{did_you_mean(task, list(tasks))}; its tasks: {known}")
        return tuple(tasks[task])

    def signatures(self) -> np.ndarray:
        """Sorted content signatures uint64 [n, 2] of all records, to find them again in other data sets."""
        return np.load(self.path / SIGNATURES, allow_pickle=False)


def open_folder(path: Path) -> DataFolder:
    """The data folder at `path`: `OUT/<name>/<version>`, or a folder above it that holds only this one.

    Raises DataError for a missing or unfinished folder, or one of another format.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; convert a data set into it with `ecg-jax convert`")
    folder = _descend(path)
    try:
        card = json.loads((folder / CARD).read_bytes())
    except ValueError:
        raise DataError(f"{folder / CARD}: is damaged; run the same `ecg-jax convert` again") from None
    except OSError as error:
        raise DataError(f"{folder / CARD}: {error.strerror}") from None
    if card.get("format") != CARD_FORMAT:
        raise DataError(f"{folder}: card format {card.get('format')}, this release reads {CARD_FORMAT}: convert again")
    return DataFolder(folder, card)


def _descend(path: Path) -> Path:
    found = [path] if (path / CARD).is_file() else sorted(p.parent for p in _below(path, CARD))
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path}: holds several data folders, name one: {', '.join(map(str, found))}")
    begun = [p.parent for p in [path / STATE, *_below(path, STATE)] if p.is_dir()]
    if begun:
        out, name = begun[0].parents[1], begun[0].parent.name
        raise DataError(
            f"{begun[0]}: has no {CARD}, its conversion did not finish: run the same command again to finish "
            f"it (`ecg-jax convert {name} --source ... --out {out}`)"
        )
    raise DataError(f"{path}: is no data folder (no {CARD}); name OUT/<name>/<version> of an `ecg-jax convert`")


def _below(path: Path, name: str) -> Iterable[Path]:
    # Not those inside a data folder: its codes have a card of their own.
    return [p for p in [*path.glob(f"*/{name}"), *path.glob(f"*/*/{name}")] if not (p.parent.parent / CARD).is_file()]


# ------------------------------------------------------------------------------------------------ the subsets


@dataclass(frozen=True)
class Subset:
    """A nested part of the train patients: the arc [offset, offset + fraction) of the order circle, or the
    longest arc from `offset` that holds at most `records` records."""

    fraction: float = 1.0
    records: int | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"subset fraction {self.fraction}: must be above 0 and at most 1")
        if not 0 <= self.offset < 1:
            raise UsageError(f"subset offset {self.offset}: must be in [0, 1)")
        if self.records is not None and (self.records < 1 or self.fraction != 1):
            raise UsageError(f"subset records {self.records}: must be at least 1, and not given beside a fraction")


WHOLE = Subset()


def select(index: np.ndarray, subset: Subset = WHOLE, exclude: frozenset[int] = frozenset()) -> np.ndarray:
    """bool [n]: the rows of `index` (one folder's, or several concatenated) in `subset` and of no group in
    `exclude`.

    A number of records counts after the exclusion. Whole groups always: where the next group does not fit,
    the arc ends.
    """
    keep = np.ones(len(index), bool)
    if exclude:
        keep = ~np.isin(index["group"], np.fromiter(exclude, np.uint64, len(exclude)))
    away = circle(index["order_hash"], subset.offset)
    if subset.records is not None:
        where, count = np.unique(away[keep], return_counts=True)
        inside = np.searchsorted(np.cumsum(count), subset.records, side="right")
        return keep & (away < where[inside] if inside < len(where) else True)
    if subset.fraction < 1:
        keep &= away < np.uint64(int(subset.fraction * 2.0**64))
    return keep


def read_exclude(path: Path) -> frozenset[int]:
    """Group hashes never to train on: one per line, hexadecimal as `group_hex` writes them; '#' begins a
    comment."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of group hashes ({error})") from None
    found = set()
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        if len(text) != 16 or not set(text.lower()) <= set("0123456789abcdef"):
            raise DataError(f"{path}: line {number}: {text[:40]!r} is no group hash (16 hexadecimal digits)")
        found.add(int(text, 16))
    return frozenset(found)


def group_hex(group_hash: int) -> str:
    """A group hash as the exclude list holds it."""
    return f"{int(group_hash):016x}"


# ------------------------------------------------------------------------------------------------------- TFDS


def write_tfds(
    folder: Path,
    name: str,
    version: str,
    leads: schema.Leads,
    tasks: dict[str, tuple[str, ...]],
    splits: dict[str, list[tuple[int, int]]],
) -> None:
    """Write features.json and dataset_info.json: then `tfds.builder_from_directory(folder)` opens the shards.

    `splits` gives (records, bytes) of every shard. Loads no TensorFlow. Raises OSError where the disk fails.
    """
    import tensorflow_datasets as tfds  # half a second

    features, byte = tfds.features, tfds.features.Encoding.BYTES

    def raw(shape: tuple[int | None, ...], dtype: Any, doc: str | None = None) -> Any:
        return features.Tensor(shape=shape, dtype=dtype, encoding=byte, doc=doc)

    fields = {
        "signal": raw((schema.LENGTH, len(schema.LEAD_NAMES[leads])), np.int16),
        "valid": features.Tensor(shape=(2,), dtype=np.int64),
        "record_id": features.Text(),
        "patient_id": features.Text(),
        "age": features.Scalar(dtype=np.float32),
        "sex": features.Scalar(dtype=np.float32),
        "quality": features.Scalar(dtype=np.int64),
        "rpeaks": raw((None,), np.int16),
        "source": raw((schema.SOURCE_BYTES,), np.uint8),
        "signature": raw((schema.SIGNATURE_BYTES,), np.uint8),
        "meta": features.Text(),
    }
    if tasks:
        # TFDS has no multi-label feature with an unknown state, so the label names stand in the documentation.
        fields["labels"] = {
            task: raw((len(names),), np.int8, f"1 present, 0 absent, -1 unknown, of {json.dumps(names)}")
            for task, names in tasks.items()
        }
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[records for records, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=name.replace("-", "_"), split=split, filetype_suffix="tfrecord"
            ),
        )
        for split, shards in splits.items()
    ]
    # Written aside and renamed: a full disk must not leave half a file that TFDS would open. TFDS wants files named
    # like shards where it writes, and finds empty ones.
    aside = folder / STATE / "tfds"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    stand_ins = [aside / shard_name(name, split, 0, len(shards)) for split, shards in splits.items()]
    for path in stand_ins:
        path.touch()
    tfds.folder_dataset.write_metadata(
        data_dir=aside,
        features=features.FeaturesDict(fields),
        split_infos=infos,
        version=version,
        check_data=False,
        description=f"{name} {version}: 10 s ECGs at {schema.RATE} Hz, written by ecg-jax.",
    )
    for path in sorted(set(aside.iterdir()) - set(stand_ins)):
        path.replace(folder / path.name)
    shutil.rmtree(aside)
