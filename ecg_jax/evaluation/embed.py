"""Features of raw recordings: the stored preprocessing and the encoder in one call, for those who have a signal.

`ecg_jax.load(run).embed(signal, rate, leads)` gives what `ecg-jax probe` would see of the same recording after
`convert`: the chain that the run names (else the default one), 10 s from the middle (of 15 s and more the first 10 s),
the scale and crop of training. Nothing is cached or fitted. Invariant: for a recording that lies in a data folder, the
features of its raw signal are those of its stored one.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError, UsageError
from ecg_jax.evaluation import features
from ecg_jax.records import preprocess
from ecg_jax.records.chain import CHAINS
from ecg_jax.records.leads import LEADS, arrange
from ecg_jax.records.readers.arrays import Declared
from ecg_jax.records.record import Record, Refused
from ecg_jax.shards import peaks as stored_peaks
from ecg_jax.shards.tables import Table

BATCH = 128
UNITS = {"mV": 1.0, "uV": 1e-3, "V": 1e3, "z": 1.0}  # factor to what is stored
ENDINGS = (".hea", ".npy", ".xml")


class Embedder:
    """The encoder of a run, ready for raw recordings. `info` is what `encoder.json` says."""

    def __init__(self, run_dir: Path | str) -> None:
        self.encoder = features.load(Path(run_dir))
        self.info = self.encoder.info
        name = self.info.get("chain", "default")
        if name not in CHAINS:
            raise DataError(f"{run_dir}: the encoder was trained on chain {name!r}; known are {', '.join(CHAINS)}")
        self.chain = CHAINS[name]

    def embed(self, signal: np.ndarray, rate: float, leads: Sequence[str] = LEADS, unit: str = "mV") -> np.ndarray:
        """Features float32 [D] of one recording [T, n], or [B, D] of several of one length [B, T, n].

        rate in Hz; leads, the names of the n channels in their order (limb leads that two others give are derived);
        unit of the samples, one of `UNITS` ("z": none). The log gain comes last. No randomness. Raises DataError for a
        signal that the encoder cannot take: another unit, a missing lead, a rate below 80 Hz, less than 2.5 s.
        """
        signal = np.asarray(signal)
        if signal.ndim not in (2, 3) or signal.shape[-1] != len(leads):
            raise DataError(
                f"signal of shape {signal.shape} with {len(leads)} leads: [samples, leads] or [records, ...]"
            )
        if unit not in UNITS:
            raise DataError(f"unit {unit!r}: one of {', '.join(UNITS)}")
        many = signal if signal.ndim == 3 else signal[None]
        records = [self._record(one, rate, leads, unit, str(i)) for i, one in enumerate(many)]
        found = self.of_records(records)
        return found if signal.ndim == 3 else found[0]

    def _record(self, signal: np.ndarray, rate: float, leads: Sequence[str], unit: str, name: str) -> Record:
        try:
            arranged, _, missing = arrange(signal * UNITS[unit], list(leads), derive=unit != "z")
        except Refused as refusal:
            raise DataError(f"record {name}: {refusal}") from None
        kind = "z" if unit == "z" else "mV"
        return Record(arranged, float(rate), name, name, unit=kind, missing=tuple(sorted(missing)))

    def of_records(self, records: Sequence[Record]) -> np.ndarray:
        """Features float32 [n, D] of records as the readers give them. Raises DataError naming the first refused."""
        rows = []
        for record, windows in zip(records, preprocess.prepare_many(records, self.chain, "first"), strict=True):
            refusal = windows if isinstance(windows, Refused) else windows[0]
            if isinstance(refusal, Refused):
                raise DataError(f"record {record.record_id}: {refusal}")
            rows.append(refusal)
        units = {record.unit for record in records}
        return features.extract(self.encoder, _table(rows, units.pop() if len(units) == 1 else "mixed"), "source")


def _table(rows: Sequence[Any], unit: str) -> Table:
    n = len(rows)
    nothing = np.zeros(n, np.uint64)
    return Table(
        signal=np.stack([row.signal for row in rows]),
        labels=np.zeros((n, 0), np.int8),
        label_names=(),
        valid=np.array([row.valid for row in rows], np.int32),
        lane=np.zeros(n, np.int32),
        record_hash=nothing,
        group_hash=nothing,
        record_ids=[row.record_id for row in rows],
        age=np.array([row.age for row in rows], np.float32),
        sex=np.array([row.sex for row in rows], np.float32),
        bayes=None,
        unit=unit,
        leads=LEADS,
        capacity=n,
        rpeaks=stored_peaks.fitted([row.rpeaks for row in rows]),
    )


def embed_source(
    run_dir: Path,
    source: Sequence[Path],
    out: Path,
    *,
    rate: float | None = None,
    unit: str | None = None,
    leads: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Features of data folders (all splits) or of files (.hea, .xml, .npy with `rate`, `unit` and `leads`), as .npz.

    The file has record_id [n], features float32 [n, D], split [n] ("" for files) and what `ecg-jax probe --features`
    asks of its maker. Raises DataError for what cannot be read or taken, UsageError for no source.
    """
    embedder = Embedder(run_dir)
    if not source:
        raise UsageError("--source: give data folders, folders of recordings, or files")
    ids: list[str] = []
    parts: list[np.ndarray] = []
    splits: list[str] = []
    for path in source:
        for names, found, split in _each(embedder, Path(path), Declared(rate, unit, tuple(leads) if leads else None)):
            ids += names
            parts.append(found)
            splits += [split] * len(names)
    if len(set(ids)) < len(ids):
        raise DataError(f"{len(ids) - len(set(ids))} record ids are there twice: embed one data set at a time")
    info = embedder.info
    lineage = sorted({entry["dataset"] for entry in info.get("lineage") or ()})
    content = io.BytesIO()
    kept = {"record_id": np.array(ids), "features": np.concatenate(parts), "split": np.array(splits)}
    np.savez(
        content, **kept, run=Path(run_dir).resolve().name, encoder=embedder.encoder.digest, lineage=np.array(lineage)
    )
    files.write(Path(out), content.getvalue())
    return {
        "records": len(ids),
        "features": int(parts[0].shape[1]),
        "encoder": embedder.encoder.digest,
        "path": str(out),
    }


def _each(embedder: Embedder, path: Path, declared: Declared) -> Iterator[tuple[list[str], np.ndarray, str]]:
    from ecg_jax.shards import catalog, tables

    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir() and any(path.rglob(catalog.CARD)):
        folder = catalog.open_folder(path)
        for split in folder.splits:
            if folder.card["splits"][split]["records"]:
                table = tables.load([path], split, "")
                yield table.record_ids, features.extract(embedder.encoder, table, split), split
        return
    found = sorted(p for p in path.rglob("*") if p.suffix in ENDINGS) if path.is_dir() else [path]
    if not found:
        raise DataError(f"{path}: neither a data folder nor a folder with {', '.join(ENDINGS)} files")
    for first in range(0, len(found), BATCH):
        some = found[first : first + BATCH]
        names = [str(p.relative_to(path).with_suffix("")) if path.is_dir() else p.stem for p in some]
        records = [_read(p, declared, name) for p, name in zip(some, names, strict=True)]
        yield names, embedder.of_records(records), ""


def _read(path: Path, declared: Declared, name: str) -> Record:
    from ecg_jax.records.readers import npy, wfdb, xml

    try:
        if path.suffix == ".hea":
            reading = wfdb.read_wfdb(path.with_suffix(""))
        elif path.suffix == ".xml":
            reading = xml.read_xml(path)
        elif path.suffix == ".npy":
            if declared.rate is None or declared.unit is None:
                raise UsageError(f"{path}: a .npy file says neither rate nor unit; give --rate and --unit")
            reading = npy.read_npy(path, declared)
        else:
            raise DataError(f"{path}: not one of {', '.join(ENDINGS)}")
    except Refused as refusal:
        raise DataError(f"{path}: {refusal}") from None
    unit = "z" if declared.unit == "z" else "mV"
    return Record(reading.signal, reading.rate, name, name, unit=unit, missing=reading.missing, quality=reading.quality)
