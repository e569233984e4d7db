"""Codes of all beats of data folders: every record once, kept beside the shards for whatever is trained later.

The host reads shard n + 1 while the device works on shard n; codes, peaks and ids of a shard are written when all of
it is done. Trains nothing. Beats that do not fit are dropped as `records.windows` says, and counted.

Invariant: the codes of a shard are a function of the shard, the codebook, the beat mode, the batch, the kind of device
and the release of JAX. A killed run that is run again ends with the bytes of one that was not. Another batch or device
may round otherwise, and a beat that lies between two codes may then get the other one; so a folder begun with another
batch or device is made anew. Record order, and which other records there are, matter in that way only.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecg_jax import codebook as codebook_lib
from ecg_jax.codebook import Codebook
from ecg_jax.errors import DataError, InterruptedRun, MachineError, UsageError, did_you_mean
from ecg_jax.models import vqhbr
from ecg_jax.models.coder import BATCH, Coder, most_beats
from ecg_jax.progress import track
from ecg_jax.records import windows, xqrs
from ecg_jax.records.windows import MODES, NO_CODE, SLOTS
from ecg_jax.shards import codes as codes_lib
from ecg_jax.shards import peaks, refresh, tables
from ecg_jax.shards.catalog import DataFolder, Shard, open_folder
from ecg_jax.shards.tables import ShardRecords
from ecg_jax.training import runtime


def tokenize(
    data: Sequence[Path],
    codebook: Path,
    *,
    beats: str | None = None,
    batch: int = BATCH,
    cache_dir: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the codes of all splits of all `data` folders; what is there already is kept.

    codebook: a folder of `ecg-jax codebook`. beats: mode of `records.windows`, None for the codebook's own. batch:
    records encoded together. cache_dir: of compiled programs, as in `runtime.setup`. Deterministic, see above. Returns
    a JSON-able report: what was made and how fast, and for each data folder counts per split (see `_split_counts`).

    Raises UsageError for a batch below 1, unknown beats, or data in a unit that the codebook does not take; DataError
    for damaged folders and for R peaks of another detector; MachineError where disk or device memory do not suffice;
    InterruptedRun at Ctrl-C.
    """
    if batch < 1:
        raise UsageError(f"batch {batch}: must be at least 1")
    if not data:
        raise UsageError("no data folder given; name one or several with --data")
    book = codebook_lib.load(codebook)
    mode = beats or book.info["beats"]
    if mode not in MODES:
        raise UsageError(f"unknown beats {mode!r}{did_you_mean(mode, MODES)}; known: {', '.join(MODES)}")
    folders = [open_folder(Path(folder)) for folder in data]
    notes = [note for folder in folders for note in _check(folder, book, mode)]
    runtime.setup(cache_dir)
    if not quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    coder = Coder(book.config, book.params, book.info, mode, batch)
    start = time.monotonic()
    try:
        reports = [_folder(folder, book, coder, quiet) for folder in folders]
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; run the same command again to go on after the last finished shard") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MachineError(f"{coder.device} has not enough memory for batch {batch}: use a smaller one") from None
    spent = time.monotonic() - start
    working = max(spent - coder.compile_seconds, 1e-9)
    return {
        "codebook": book.id,
        "beats": mode,
        "detector": windows.detector(mode),
        "codes": book.config.codes,
        "batch": batch,
        "device": coder.device,
        "notes": notes,
        "data": reports,
        "records_encoded": coder.records,
        "seconds": spent,
        "compile_seconds": coder.compile_seconds,
        "ecg_per_second": coder.records / working,
        "gflop_per_ecg": 2e-9 * coder.macs / max(coder.records, 1),
        "gflop_per_ecg_all_slots": 2e-9 * vqhbr.encode_macs(book.config, SLOTS),
    }


def _check(folder: DataFolder, book: Codebook, mode: str) -> list[str]:
    """Refuse data that the codebook cannot take; returns what a reader should know besides."""
    if book.info["scale"] == "mv" and folder.card["unit"] != "mV":
        raise UsageError(
            f"{folder.path}: is in unit {folder.card['unit']!r}, and codebook {book.path} takes mV; use one that was "
            "trained with scale gain or zscore"
        )
    if mode == "robust":
        refresh.check_detector(folder.card, folder.path)
    notes = []
    trained, chain = book.info["chain"], folder.card["chain"]["name"]
    if chain not in str(trained).split("+"):
        notes.append(f"{folder.path} is filtered by chain {chain!r}, the codebook was trained on {trained!r}")
    if mode == book.info["beats"] and book.info["detector"] != windows.detector(mode):
        notes.append(
            f"the codebook was trained on beats of {book.info['detector']}, these are {windows.detector(mode)}"
        )
    return notes


# -------------------------------------------------------------------------------------------------- one data folder


def _folder(folder: DataFolder, book: Codebook, coder: Coder, quiet: bool) -> dict[str, Any]:
    """Make what is missing of the codes of one data folder, then the card; returns its report."""
    mode, beats_id = coder.mode, windows.beats_id(coder.mode)
    path = folder.path / codes_lib.expected_name(book.id, mode)
    shards = [shard for split in folder.splits for shard in folder.shards(split)]
    how = {"codebook": book.id, "beats": beats_id, "batch": coder.batch, "device": coder.device, "jax": version("jax")}
    with codes_lib.held(path), ThreadPoolExecutor(1) as reader:
        done = codes_lib.begin(path, shards, how)
        missing = [shard for shard in shards if shard.path.name not in done]
        unfinished = bool(missing) or not (path / codes_lib.CARD).is_file()
        if unfinished:
            codes_lib.note(path, how, done)
        work = _ahead(reader, folder, missing, mode)
        if not quiet:
            work = track(work, f"tokenize {folder.card['name']}", total=len(missing), unit="shards")
        for shard, records in work:
            codes = coder.encode(records.signal, records.valid, records.rpeaks)
            done[shard.path.name] = codes_lib.write_files(path, shard, codes, records.rpeaks, records.record_ids)
            codes_lib.note(path, how, done)
        done = {shard.path.name: done[shard.path.name] for shard in shards}  # in one order, whatever was made when
        sizes = book.config.codes, most_beats(book.config, mode)
        counts = {split: _split_counts(path, folder.shards(split), done, *sizes) for split in folder.splits}
        if unfinished:
            codes_lib.finish(path, _card(folder, book, mode, how, done, counts))
    made = {"path": str(path), "shards_made": len(missing), "shards_kept": len(shards) - len(missing)}
    plain = {split: {k: v for k, v in found.items() if k != "usage"} for split, found in counts.items()}
    return made | {"all": _summary(list(counts.values())), "splits": plain}


def _ahead(
    reader: ThreadPoolExecutor, folder: DataFolder, shards: list[Shard], mode: str
) -> Iterator[tuple[Shard, ShardRecords]]:
    """Each shard with its records and the peaks to cut at, read one ahead."""

    def read(shard: Shard) -> ShardRecords:
        records = tables.read_shard(folder, shard)
        if mode == "robust":
            return records
        found = xqrs.peaks(records.signal, records.valid)  # lead I is the first of eight as of twelve
        return records._replace(rpeaks=peaks.fitted(found))

    coming = [reader.submit(read, shard) for shard in shards[:1]]
    for number, shard in enumerate(shards):
        records = coming.pop().result()
        coming += [reader.submit(read, following) for following in shards[number + 1 : number + 2]]
        yield shard, records


def _split_counts(path: Path, shards: list[Shard], done: codes_lib.Files, codes: int, most: int) -> dict[str, Any]:
    """Of one split, from the files: records, those without a beat (without_beats) and those with dropped ones
    (dropped: they have more than `most`), tokens with a code, codes used and their perplexity, usage (counts of each
    code)."""
    usage = np.zeros(codes, np.int64)
    records = without = dropped = 0
    for shard in shards:
        found = codes_lib.read_files(path, shard.path.name, done[shard.path.name], shard.records)
        beats_n = (found["peaks"] >= 0).sum(1)
        records += shard.records
        without += int((beats_n == 0).sum())
        dropped += int((beats_n > most).sum())
        used = found["codes"][found["codes"] != NO_CODE]
        if len(used) and used.max() >= codes:
            raise DataError(f"{path}: {shard.path.name} has code {used.max()} of {codes}; delete the folder")
        usage += np.bincount(used, minlength=codes)
    counts = {"records": records, "without_beats": without, "dropped": dropped, "usage": usage.tolist()}
    return counts | _use(usage)


def _summary(splits: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(found[key] for found in splits) for key in ("records", "without_beats", "dropped")}
    share = {"dropped_share": sums["dropped"] / max(sums["records"], 1)}
    return sums | share | _use(np.sum([found["usage"] for found in splits], axis=0))


def _use(usage: np.ndarray) -> dict[str, Any]:
    total = int(usage.sum())
    share = usage[usage > 0] / max(total, 1)
    return {
        "tokens": total,
        "used": int((usage > 0).sum()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _card(
    folder: DataFolder, book: Codebook, mode: str, how: dict[str, Any], done: codes_lib.Files, counts: dict[str, Any]
) -> dict[str, Any]:
    about = {key: value for key, value in book.info.items() if key not in ("usage", "lineage")}
    return {
        "codebook": {"id": book.id, "config": dataclasses.asdict(book.config), "info": about},
        "beats": {"mode": mode, "id": windows.beats_id(mode), "detector": windows.detector(mode)},
        "data": {"name": folder.card["name"], "version": folder.card["version"]},
        "how": how,
        "splits": counts,
        "files": done,
        "lineage": book.info["lineage"],
    }


def result_lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    lines = []
    for found in report["data"]:
        every = found["all"]
        lines += [
            f"{found['path']}: {found['shards_made']} shards made, {found['shards_kept']} kept",
            f"  {every['records']:,} ECGs, {every['without_beats']:,} without a beat, {every['dropped']:,} with beats "
            f"dropped ({every['dropped_share']:.2%}); {every['tokens']:,} codes",
            f"  {every['used']:,} of {report['codes']:,} codes used, perplexity {every['perplexity']:.1f}",
        ]
    beats = f"codebook {report['codebook']}, {report['beats']} beats ({report['detector']}), {report['device']}"
    if report["records_encoded"]:
        beats += f": {report['ecg_per_second']:,.1f} ECG/s, {report['gflop_per_ecg']:.3g} GFLOP/ECG"
        beats += f", {report['compile_seconds']:.1f} of {report['seconds']:.1f} s compiling"
    return [*lines, beats]
