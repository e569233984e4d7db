"""Your own recordings with a labels table: one CSV row per recording, every column declared.

The formats differ in how a file is read; the table, and how a row finds its file, are the same. Invariant: a table row
becomes exactly one item; what the options leave out, and recordings without a row, are counted; what neither the file
nor an option says (rate, unit, orientation) is asked for, never guessed.

The labels table (`--option key=value`, every format):
    labels=FILE       the table, relative to the source folder; default labels.csv. labels=none: every recording that is
                      found, without tasks, each its own patient, its id the path without the ending
    id=COLUMN         recording id; default record
    tasks=A,B         label columns, each a task; several labels in a cell are joined by ";"
    labels.A=X,Y      the labels of task A and their order; default all that occur, sorted
    binary=C,D        columns of 0, 1 or nothing, together the task "labels"
    patient=COLUMN    default patient_id      age=COLUMN   default age      sex=COLUMN   default sex
    sex_male=VALUE    what stands for male where the sex column holds numbers, or true and false
    split=COLUMN      train, val or test; default split
    fold=COLUMN       default strat_fold, with folds=1-8/9/10 (train/val/test); other folds are left out
    ignore=E,F        columns that are none of these
    path=TEMPLATE     the file of a row, relative to the source folder, with {column}, {column:05d}, {id} and
                      {thousand:05d} (the id rounded down to thousands); the ending may be left out. Default:
                      SOURCE/<id>, else the one recording in the tree whose name is the id or, for an id that is a
                      number, the id with leading zeros and an optional suffix after "_" or "-"
    name=, version=   of the converted set; default the folder's name, 1.0.0

What a file may not say (hdf5, npy, csv, mat); where it does, both must agree:
    rate=HZ           samples per second
    unit=mV|uV|V|z    z takes the numbers as they are: standardised or otherwise unit-less signals
    leads=I,II,...    names in the file's order; default I II III aVR aVL aVF V1-V6 where twelve are unnamed
    layout=           leads-first or samples-first, needed only where the shape fits both (not csv)

wfdb   (.hea) unit=mV|z; checksums=on|off compares the headers' checksums, default on; repairs=on|off reads a header
       whose first line has a suffix to the record's name, default on.
         convert wfdb --source DIR --option tasks=dx --option ignore=note
npy    (.npy) [12, T] or [T, 12] a file; batches [N, 12, T], [N, T, 12], [N, 1, T, 12] with row=COLUMN (row numbers from
       0) or rows=order (the table's order). rate= and unit= are needed.
         convert npy --source DIR --option rate=500 --option unit=uV --option path=x.npy --option row=index
hdf5   (.h5 .hdf5 .hdf) dataset=NAME, with ids=NAME2 (ids of its rows), row=COLUMN or rows=order for a batch;
       dataset={id} or {id}/ecg for an object a recording, which may be a group with a data set for each lead; neither
       for a file a recording. Attributes fs, unit and leads are read.
         convert hdf5 --source DIR --option dataset=tracings --option ids=exam_id --option rate=400 --option unit=mV
mat    (.mat, v4 to v7.3) variable=NAME, ECG.data within a struct; default the only matrix that can be it. Variables
       such as fs, unit and leads are read.
         convert mat --source DIR --option variable=val --option rate=500 --option unit=uV
csv    (.csv .tsv) a line a sample; comma, semicolon or tab; decimal=point|comma; header=on|off; a column "time (s)"
       gives the rate, "V1 (uV)" the unit.
         convert csv --source DIR --option decimal=comma --option path=signals/{id}.csv
xml    (.xml) Philips, HL7 aECG, GE MUSE; no options of its own.       convert xml --source DIR --option labels=none
dicom  (.dcm .dicom, others with path=) no options of its own; needs pydicom.
         convert dicom --source DIR --option binary=afib
"""

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ecg_jax.datasets import check_options
from ecg_jax.datasets.batches import Batches, Place, batches_of, place_all, place_rows
from ecg_jax.datasets.labels_table import FOLDS, LabelsTable, open_labels
from ecg_jax.datasets.labels_table import OPTIONS as LABEL_OPTIONS
from ecg_jax.datasets.locate import Tree, list_tree, locate, report, template_columns
from ecg_jax.datasets.own_read import read_files, read_hdf5_files, segments
from ecg_jax.datasets.source import Item, PackedItems, Source, pack
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.leads import canonical
from ecg_jax.records.readers.arrays import UNITS, Declared
from ecg_jax.records.readers.csv import Dialect, read_csv
from ecg_jax.records.readers.mat import read_mat
from ecg_jax.records.readers.npy import read_npy
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record, Refused

ENDINGS = {
    "wfdb": (".hea",),
    "hdf5": (".h5", ".hdf5", ".hdf"),
    "npy": (".npy",),
    "csv": (".csv", ".tsv"),
    "mat": (".mat",),
    "xml": (".xml",),
    "dicom": (".dcm", ".dicom"),
}
NO_LABELS = "none"
DECLARED = ("rate", "unit", "leads", "layout")
REPAIRS = ("record-name-suffix",)  # nothing but the name of the record is at stake
Read = Callable[[Sequence[Item]], Iterator[Record | Refused]]


def open_wfdb(source_dir: Path, options: dict[str, str]) -> Source:
    """WFDB records by their labels table; the module's docstring lists the options of this and of the other six.

    All of them raise `UsageError` for an option that cannot be (an unknown one, or a column that the table does not
    have) and `DataError` for the table. A row without recording becomes a refusal ("missing-file") when it is read.
    """
    _check("wfdb", options, "unit", "checksums", "repairs")
    unit = _one_of("wfdb", options, "unit", ("mV", "z")) or "mV"
    checksums = _one_of("wfdb", options, "checksums", ("on", "off")) != "off"
    repairs = REPAIRS if _one_of("wfdb", options, "repairs", ("on", "off")) != "off" else ()
    read_one = partial(read_wfdb, unit=unit, checksums=checksums, repairs=repairs)
    return _open("wfdb", source_dir, options, unit, partial(read_files, source_dir, unit, read_one))


def open_hdf5(source_dir: Path, options: dict[str, str]) -> Source:
    """HDF5: a batch, an object a recording, or a file a recording."""
    _check("hdf5", options, *DECLARED, "dataset", "ids", "row", "rows")
    declared, unit = _declared("hdf5", options)
    batches = batches_of("hdf5", options)
    dataset = None if batches else options.get("dataset")
    read = partial(read_hdf5_files, source_dir, unit, declared, dataset)
    return _open("hdf5", source_dir, options, unit, read, batches)


def open_npy(source_dir: Path, options: dict[str, str]) -> Source:
    """NumPy: a file a recording, or batches."""
    _check("npy", options, *DECLARED, "row", "rows")
    declared, unit = _declared("npy", options)
    for key in ("rate", "unit"):
        if key not in options:
            raise UsageError(f"npy: a .npy file says neither rate nor unit; say rate=HZ and unit={'|'.join(UNITS)}")
    read = partial(read_files, source_dir, unit, partial(read_npy, declared=declared))
    return _open("npy", source_dir, options, unit, read, batches_of("npy", options))


def open_csv(source_dir: Path, options: dict[str, str]) -> Source:
    """Text tables, a file a recording."""
    _check("csv", options, "rate", "unit", "leads", "header", "decimal")
    declared, unit = _declared("csv", options)
    header = _one_of("csv", options, "header", ("on", "off")) != "off"
    dialect = Dialect(header, _one_of("csv", options, "decimal", ("point", "comma")) or "point")
    read_one = partial(read_csv, declared=declared, dialect=dialect)
    return _open("csv", source_dir, options, unit, partial(read_files, source_dir, unit, read_one))


def open_mat(source_dir: Path, options: dict[str, str]) -> Source:
    """MATLAB files, a file a recording."""
    _check("mat", options, *DECLARED, "variable")
    declared, unit = _declared("mat", options)
    read_one = partial(read_mat, declared=declared, variable=options.get("variable"))
    return _open("mat", source_dir, options, unit, partial(read_files, source_dir, unit, read_one))


def open_xml(source_dir: Path, options: dict[str, str]) -> Source:
    """XML exports of devices, which say everything themselves."""
    from ecg_jax.records.readers.xml import read_xml

    _check("xml", options)
    return _open("xml", source_dir, options, "mV", partial(read_files, source_dir, "mV", read_xml))


def open_dicom(source_dir: Path, options: dict[str, str]) -> Source:
    """DICOM waveforms. `UsageError` without pydicom."""
    from ecg_jax.records.readers.dicom import read_dicom

    _check("dicom", options)
    if importlib.util.find_spec("pydicom") is None:
        raise UsageError("dicom: reading DICOM needs pydicom: pip install 'ecg-jax[dicom]'")
    return _open("dicom", source_dir, options, "mV", partial(read_files, source_dir, "mV", read_dicom))


def _check(kind: str, options: dict[str, str], *own: str) -> None:
    check_options(kind, options, (*LABEL_OPTIONS, "path", *own, "name", "version"))


def _one_of(kind: str, options: dict[str, str], key: str, known: Sequence[str]) -> str | None:
    value = options.get(key)
    if value is not None and value not in known:
        raise UsageError(f"{kind}: {key}={value!r}, known are {', '.join(known[:-1])} and {known[-1]}")
    return value


def _declared(kind: str, options: dict[str, str]) -> tuple[Declared, Any]:
    """What the options say of every file, and the unit of the converted set."""
    rate = None
    if "rate" in options:
        try:
            rate = float(options["rate"])
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise UsageError(f"{kind}: rate={options['rate']!r} is no number of samples per second")
    leads = tuple(part.strip() for part in options["leads"].split(",")) if "leads" in options else None
    if leads is not None:
        known = Counter(lead for name in leads if (lead := canonical(name)))
        if not known:
            raise UsageError(f"{kind}: leads={options['leads']!r} names none of the twelve leads")
        if twice := [lead for lead, times in known.items() if times > 1]:
            raise UsageError(f"{kind}: leads={options['leads']!r} names lead {twice[0]} twice")
    unit = _one_of(kind, options, "unit", UNITS)
    layout: Any = _one_of(kind, options, "layout", ("leads-first", "samples-first"))
    return Declared(rate, unit, leads, layout), "z" if unit == "z" else "mV"


def _name(kind: str, source_dir: Path, options: dict[str, str]) -> tuple[str, str]:
    name = options.get("name")
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "_", source_dir.resolve().name.lower()).strip("_")
        name = name if re.match("[a-z]", name) else f"{kind}_{name}".rstrip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"{kind}: name={name!r}: small letters, digits and _ only, a letter first")
    version = options.get("version", "1.0.0")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UsageError(f"{kind}: version={version!r} is not of the form 1.0.0")
    return name, version


def _open(
    kind: str, source_dir: Path, options: dict[str, str], unit: Any, read: Read, batches: Batches | None = None
) -> Source:
    name, version = _name(kind, source_dir, options)
    about: dict[str, Any] = {"options": dict(sorted(options.items()))}
    if options.get("labels") == NO_LABELS:
        items, skipped, more = _without_labels(kind, source_dir, options, batches)
        return Source(name, version, unit, {}, items, read, about | more, skipped)
    template = options.get("path")
    used = template_columns(kind, "path", template or "") | template_columns(kind, "dataset", _dataset(batches))
    if batches is not None and batches.row is not None:
        used.add(batches.row)
    path = source_dir / options.get("labels", "labels.csv")
    labels = open_labels(kind, path, options, used)
    if batches is not None and batches.row is not None and batches.row not in labels.table.columns:
        raise UsageError(f"{kind}: row= names column {batches.row!r}, which {path} does not have")
    tree = list_tree(source_dir, ENDINGS[kind], path)
    places, spare = _places(kind, tree, labels, template, batches)
    splits = [labels.split_of(labels.table.row(i)) for i in range(len(labels.ids))]
    outside = splits.count("")
    if outside == len(splits):
        folds = options.get("folds", FOLDS)
        raise DataError(f"{labels.table.path}: none of its {len(splits)} rows is in the folds {folds}")
    unlabelled: Counter[str] = Counter()

    def listed() -> Iterator[Item]:
        for i, (record_id, place, split) in enumerate(zip(labels.ids, places, splits, strict=True)):
            if split == "":
                continue
            where = labels.about(i)
            unlabelled.update(task for task, values in where["labels"].items() if (values < 0).all())
            yield Item(record_id, where["patient"] or record_id, split, where | _where(kind, tree, place))

    items = pack(listed())
    lost = [record_id for record_id, place in zip(labels.ids, places, strict=True) if place.path is None]
    digest = labels.table.digest()
    about |= {
        "table": path.name,
        "table_sha256": digest,
        "tables_sha256": {path.name: digest},
        "rows": len(labels.ids),
        "outside_folds": outside,
        "unlabelled": {task: unlabelled[task] for task in labels.tasks},
        "unlabelled_policy": "kept, labels of that task unknown (-1)",
        "splits": dict(Counter(split or "by hash of the patient" for split in splits if split != "")),
    }
    about |= report(template or (f"by {batches.kind} options" if batches else "by id"), lost, spare)
    skipped = {"outside folds": outside, "no row in the labels table": len(spare)}
    skipped = {reason: count for reason, count in skipped.items() if count}
    return Source(name, version, unit, labels.tasks, items, read, about, skipped)


def _dataset(batches: Batches | None) -> str:
    return (batches.dataset if batches else None) or ""


def _places(
    kind: str, tree: Tree, labels: LabelsTable, template: str | None, batches: Batches | None
) -> tuple[list[Place], list[str]]:
    if batches is not None:
        return place_rows(batches, tree, labels.table, labels.ids, template)
    paths = locate(kind, tree, labels.table, labels.ids, template, any_file=kind != "wfdb")
    there = set(paths)
    return [Place(path) for path in paths], [path for path in tree.recordings if path not in there]


def _where(kind: str, tree: Tree, place: Place) -> dict[str, Any]:
    """The entries of `Item.where` for a place."""
    path = tree.stem(place.path) if kind == "wfdb" and place.path is not None else place.path
    where: dict[str, Any] = {"path": path}
    if place.inside is not None:
        where["inside"] = place.inside
    if place.row is not None:
        where["row"] = place.row
    return where


def _without_labels(
    kind: str, source_dir: Path, options: dict[str, str], batches: Batches | None
) -> tuple[PackedItems, dict[str, int], dict[str, Any]]:
    """labels=none: every recording in the tree, without tasks."""
    for key in options:
        if (key in (*LABEL_OPTIONS, "path", "row") and key != "labels") or key.startswith("labels."):
            raise UsageError(f"{kind}: labels=none has no table, so {key}= means nothing")
    tree = list_tree(source_dir, ENDINGS[kind])
    if batches is not None:
        found = place_all(batches, tree)
    else:
        found = [(tree.stem(path), Place(path)) for path in tree.recordings]
    parts = segments(tree) if kind == "wfdb" else set()
    found = [(record_id, place) for record_id, place in found if record_id not in parts]
    if not found:
        raise DataError(f"{source_dir}: no recording; nothing in it ends in {' or '.join(ENDINGS[kind])}")
    ids = Counter(record_id for record_id, _ in found)
    for record_id, times in ids.most_common(1):
        if times > 1:
            raise DataError(f"{source_dir}: {record_id} is there {times} times; a labels table can tell them apart")
    blank = {"labels": {}, "patient": None, "age": math.nan, "sex": math.nan}
    items = pack(Item(key, key, None, blank | _where(kind, tree, place)) for key, place in found)
    about = {"table": None, "recordings": len(found), "patient_policy": "unknown, each recording its own"}
    return items, {"segment of another record": len(parts)} if parts else {}, about
