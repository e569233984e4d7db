"""Every data set that `ecg-jax convert` knows, in one table. A module is imported only when its set is
opened.

Invariant: whatever is wrong with the name, the folder or the options is a one-line `UsageError` or
`DataError`.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from ecg_jax.datasets.source import Source
from ecg_jax.errors import DataError, UsageError, did_you_mean


@dataclass(frozen=True)
class DatasetEntry:
    """`open` is "module:function", called with (source_dir, options); `help` one line; `source` False:
    simulated.
    """

    open: str
    help: str
    available: bool = True
    source: bool = True


def _later(text: str) -> DatasetEntry:
    return DatasetEntry("", text, available=False)


DATASETS: dict[str, DatasetEntry] = {
    "ptbxl": DatasetEntry("ecg_jax.datasets.ptbxl:open_ptbxl", "PTB-XL, official folds, five label tasks"),
    "code15": _later("CODE-15 %, 345,779 exams of Brazilian telehealth"),
    "code": _later("CODE in full, 2.3 M exams"),
    "code-test": _later("CODE test set, 827 exams with a gold standard"),
    "samitrop": _later("SaMi-Trop, 1,631 exams of Chagas patients"),
    "code2": _later("CODE-II"),
    "cpsc2018": _later("CPSC 2018, nine classes"),
    "csn": _later("Chapman-Shaoxing-Ningbo, 45,152 exams"),
    "georgia": _later("Georgia 12-lead"),
    "sph": _later("Shandong Provincial Hospital"),
    "ludb": _later("Lobachevsky University Database, with wave annotations"),
    "mimic-iv-ecg": _later("MIMIC-IV-ECG, 800,035 exams"),
    "mimic-icu": _later("ICU labels on MIMIC-IV-ECG"),
    "echonext": _later("EchoNext, structural heart disease"),
    "synthetic": DatasetEntry(
        "ecg_jax.datasets.synthetic:open_synthetic",
        "simulated ECG with known Bayes probabilities",
        source=False,
    ),
    "wfdb": DatasetEntry("ecg_jax.datasets.wfdb:open_wfdb", "your own WFDB records with a labels table"),
    "hdf5": _later("your own HDF5 files with a labels table"),
    "npy": _later("your own NumPy files with a labels table"),
    "csv": _later("your own CSV files with a labels table"),
    "mat": _later("your own MATLAB files with a labels table"),
    "xml": _later("your own XML exports with a labels table"),
    "dicom": _later("your own DICOM waveforms with a labels table"),
}


def open_source(name: str, source_dir: Path | None, options: dict[str, str]) -> Source:
    """Open data set `name` in `source_dir` with `options` (all strings, from `--option k=v`).

    Raises `UsageError` for an unknown or not yet available name or an unknown option, `DataError` where the
    folder or a file in it is missing or malformed. `source_dir` may be None for a simulated set.
    """
    entry = DATASETS.get(name)
    if entry is None:
        known = [key for key, value in DATASETS.items() if value.available]
        raise UsageError(f"unknown data set {name!r}{did_you_mean(name, list(DATASETS))}: known are {', '.join(known)}")
    if not entry.available:
        raise UsageError(f"data set {name!r} ({entry.help}) is not there yet; `wfdb` takes any WFDB records")
    if entry.source:
        if source_dir is None:
            raise UsageError(f"data set {name!r} needs --source DIR, the folder that holds it")
        source_dir = Path(source_dir)
        if not source_dir.exists():
            raise DataError(f"{source_dir}: no such folder; give the unpacked {name} folder as --source")
        if not source_dir.is_dir():
            raise DataError(f"{source_dir} is not a folder; give the unpacked {name} folder as --source")
    module, function = entry.open.split(":")
    return getattr(importlib.import_module(module), function)(source_dir, dict(options))


def check_options(dataset: str, options: dict[str, str], known: list[str] | tuple[str, ...]) -> None:
    """`UsageError` for an option that is none of `known`; a known `name.` allows `name.anything`."""
    exact = [key for key in known if not key.endswith(".")]
    prefixes = tuple(key for key in known if key.endswith("."))
    for key in options:
        if key in exact or (prefixes and key.startswith(prefixes) and key not in prefixes):
            continue
        shown = ", ".join(exact + [f"{prefix}*" for prefix in prefixes])
        raise UsageError(f"{dataset}: unknown option {key!r}{did_you_mean(key, exact)}: known are {shown}")
