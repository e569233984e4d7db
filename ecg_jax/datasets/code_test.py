"""The CODE test set (Zenodo 3765780, version 1.0.3): ecg_tracings.hdf5, attributes.csv and annotations/*.csv.

The 827 recordings have no ids; attributes and annotations belong to them by row alone, so a file with more or fewer
rows is refused. On disk the limb leads lie in the order I II III aVL aVF aVR, unlike in every other set of the group:
the order is checked on the data and refused where another one fits. The values are 2 x mV, which is checked as well.
Everything is split `test`. Options (`--option key=value`):

    annotator=gold_standard   whose labels: gold_standard, cardiologist1, cardiologist2, cardiology_residents,
                              emergency_residents, medical_students, dnn
    scale=2                   what the stored values are divided by to give mV

Task: code6 (1dAVb RBBB LBBB SB AF ST, by name). Invariant: 827 items, test0000 to test0826, in the order of the file.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.datasets import check_options
from ecg_jax.datasets import code_labels as code
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.datasets.table import Table, age, need_columns, read_table
from ecg_jax.errors import DataError, UsageError, did_you_mean
from ecg_jax.records.record import Record, Refused

OPTIONS = ("annotator", "scale")
ANNOTATORS = (
    "gold_standard",
    "cardiologist1",
    "cardiologist2",
    "cardiology_residents",
    "emergency_residents",
    "medical_students",
    "dnn",
)
ROWS = 827
ORDER = ("I", "II", "III", "aVL", "aVF", "aVR", "V1", "V2", "V3", "V4", "V5", "V6")
R_LEVEL = 1.48  # median R amplitude of lead II as stored (ECGBench)
POSITIVES = (28, 34, 30, 16, 13, 37)  # of the published gold standard, in the order of CODE6
_SAMPLED = 128


def open_code_test(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that data.zip unpacks to, or the one around it; the module's docstring lists the options.

    Raises `UsageError` for options, `DataError` where a file is missing or has not exactly 827 rows, and where lead
    order or amplitude are not those of the published file.
    """
    check_options("code-test", options, OPTIONS)
    scale = code.scale_of("code-test", options)
    annotator = options.get("annotator", ANNOTATORS[0])
    if annotator not in ANNOTATORS:
        hint = did_you_mean(annotator, list(ANNOTATORS))
        raise UsageError(f"code-test: annotator={annotator!r}{hint}: known are {', '.join(ANNOTATORS)}")
    folder = source_dir if (source_dir / "ecg_tracings.hdf5").exists() else source_dir / "data"
    if not (folder / "ecg_tracings.hdf5").exists():
        raise DataError(f"there is no {source_dir / 'ecg_tracings.hdf5'}; give the folder that data.zip unpacks to")
    tracings = code.open_tracings(folder / "ecg_tracings.hdf5")
    attributes = read_table(folder / "attributes.csv")
    need_columns(attributes, ("age", "sex"))
    annotations = read_table(folder / "annotations" / f"{annotator}.csv")
    need_columns(annotations, code.CODE6)
    for path, rows in (
        (tracings.path, tracings.rows),
        (attributes.path, len(attributes.rows)),
        (annotations.path, len(annotations.rows)),
    ):
        if rows != ROWS:
            raise DataError(f"{path} has {rows} rows, the CODE test set has {ROWS}; rows are matched by number alone")
    sample = (raw for raw in code.read_rows(tracings.path, code.spread(ROWS, _SAMPLED)) if not isinstance(raw, Refused))
    facts = code.examine(str(tracings.path), sample, ORDER, R_LEVEL, options.get("scale"))
    items = pack(_items(attributes, annotations))
    labels = np.array([code.labels_of(item.where[3]) for item in items])
    about: dict[str, Any] = {
        "tables_sha256": {
            "attributes.csv": attributes.digest(),
            f"annotations/{annotator}.csv": annotations.digest(),
        },
        "files": {"ecg_tracings.hdf5": tracings.size},
        "annotator": annotator,
        "positives": dict(zip(code.CODE6, (labels == 1).sum(axis=0).tolist(), strict=True)),
        "positives_published": dict(zip(code.CODE6, POSITIVES, strict=True)) if annotator == ANNOTATORS[0] else None,
        "scale": scale,
        "scale_policy": code.SCALE_POLICY,
        **facts,
        "split_policy": "everything is test",
        "licence": "CC BY 4.0",
        "doi": "10.5281/zenodo.3765780",
    }
    read = partial(_read, tracings.path, scale)
    return Source("code-test", "1.0.3", "mV", {"code6": code.CODE6}, items, read, about)


def _items(attributes: Table, annotations: Table) -> Iterator[Item]:
    """`where` is (row, age, sex, flags of the six)."""
    for i in range(ROWS):
        person = attributes.row(i)
        where = (i, age(person.number("age")), code.sex(person, "sex"), code.flags(annotations.row(i), code.CODE6))
        yield Item(f"test{i:04d}", f"test{i:04d}", "test", where)


def _read(path: Path, scale: float, items: Sequence[Item]) -> Iterator[Record | Refused]:
    rows = code.read_rows(path, [item.where[0] for item in items])
    for item, raw in zip(items, rows, strict=True):
        if isinstance(raw, Refused):
            yield raw
            continue
        source = code.source_of(raw, item.record_id)
        _, years, sex, packed = item.where
        yield Record(
            signal=code.millivolt(raw, scale, ORDER),
            rate=code.RATE,
            record_id=item.record_id,
            group=item.group,
            age=years,
            sex=sex,
            labels={"code6": code.labels_of(packed)},
            source=source,
            split="test",
            meta={"leads": list(ORDER)},
        )
