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
    """`open` is "module:function" below `ecg_jax.datasets`, called with (source_dir, options); the options stand in the
    module's docstring. `help` one line; `source` False: simulated.
    """

    open: str
    help: str
    source: bool = True


DATASETS: dict[str, DatasetEntry] = {
    "ptbxl": DatasetEntry("ptbxl:open_ptbxl", "PTB-XL, official folds, six label tasks"),
    "code15": DatasetEntry("code15:open_code15", "CODE-15 %, 345,779 exams of Brazilian telehealth"),
    "code": DatasetEntry("code:open_code", "CODE in full, 2.3 M exams"),
    "code-test": DatasetEntry("code_test:open_code_test", "CODE test set, 827 exams with a gold standard"),
    "samitrop": DatasetEntry("samitrop:open_samitrop", "SaMi-Trop, 1,631 exams of Chagas patients"),
    "code2": DatasetEntry("code2:open_code2", "CODE-II, by a manifest of your own"),
    "cpsc2018": DatasetEntry("cpsc2018:open_cpsc2018", "CPSC 2018, nine classes, both encodings"),
    "csn": DatasetEntry("csn:open_csn", "Chapman-Shaoxing-Ningbo, 45,152 exams"),
    "georgia": DatasetEntry("georgia:open_georgia", "Georgia 12-lead, 10,344 exams"),
    "sph": DatasetEntry("sph:open_sph", "Shandong Provincial Hospital, 25,770 exams"),
    "ludb": DatasetEntry("ludb:open_ludb", "Lobachevsky University Database, 200 exams"),
    "mimic-iv-ecg": DatasetEntry("mimic_iv_ecg:open_mimic_iv_ecg", "MIMIC-IV-ECG, 800,035 exams"),
    "mimic-icu": DatasetEntry("mimic_icu:open_mimic_icu", "ICU labels (MDS-ED) on MIMIC-IV-ECG"),
    "echonext": DatasetEntry("echonext:open_echonext", "EchoNext, structural heart disease, unit-less"),
    "synthetic": DatasetEntry("synthetic:open_synthetic", "simulated ECG with known Bayes probabilities", source=False),
    "wfdb": DatasetEntry("own:open_wfdb", "your own WFDB records with a labels table"),
    "hdf5": DatasetEntry("own:open_hdf5", "your own HDF5 files with a labels table"),
    "npy": DatasetEntry("own:open_npy", "your own NumPy files with a labels table"),
    "csv": DatasetEntry("own:open_csv", "your own CSV files with a labels table"),
    "mat": DatasetEntry("own:open_mat", "your own MATLAB files with a labels table"),
    "xml": DatasetEntry("own:open_xml", "your own Philips, HL7 aECG or GE MUSE exports with a labels table"),
    "dicom": DatasetEntry("own:open_dicom", "your own DICOM waveforms with a labels table (extra: dicom)"),
}


def open_source(name: str, source_dir: Path | None, options: dict[str, str]) -> Source:
    """Open data set `name` in `source_dir` with `options` (all strings, from `--option k=v`).

    Raises `UsageError` for an unknown name or option, `DataError` where the
    folder or a file in it is missing or malformed. `source_dir` may be None for a simulated set.
    """
    entry = DATASETS.get(name)
    if entry is None:
        raise UsageError(
            f"unknown data set {name!r}{did_you_mean(name, list(DATASETS))}: known are {', '.join(DATASETS)}"
        )
    if entry.source:
        if source_dir is None:
            raise UsageError(f"data set {name!r} needs --source DIR, the folder that holds it")
        source_dir = Path(source_dir)
        if not source_dir.exists():
            raise DataError(f"{source_dir}: no such folder; give the unpacked {name} folder as --source")
        if not source_dir.is_dir():
            raise DataError(f"{source_dir} is not a folder; give the unpacked {name} folder as --source")
    module, function = entry.open.split(":")
    return getattr(importlib.import_module(f"ecg_jax.datasets.{module}"), function)(source_dir, dict(options))


def check_options(dataset: str, options: dict[str, str], known: list[str] | tuple[str, ...]) -> None:
    """`UsageError` for an option that is none of `known`; a known `name.` allows `name.anything`."""
    exact = [key for key in known if not key.endswith(".")]
    prefixes = tuple(key for key in known if key.endswith("."))
    for key in options:
        if key in exact or (prefixes and key.startswith(prefixes) and key not in prefixes):
            continue
        shown = ", ".join(exact + [f"{prefix}*" for prefix in prefixes])
        raise UsageError(f"{dataset}: unknown option {key!r}{did_you_mean(key, exact)}: known are {shown}")
