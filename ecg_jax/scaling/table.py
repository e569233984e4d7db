"""Reads eval logs, JSONL or CSV, ours or anyone's, into checked rows; a row that is not used is counted
with its reason.

Sources are files, run folders (`evals.jsonl` inside) or folders of run folders. Columns are renamed by
`columns` (`{"n_params": "N"}`, ours to theirs; `{"architecture": "=resnet"}` gives one value to all rows).
Wide tables are melted by `melt`: each named column becomes rows whose task is the column's name; one that ends
in `_id` holds the ID loss.

It does not group or fit (`families`). Invariant: every input row is either in `Table.rows` or counted in
`Table.left_out`; nothing is dropped in silence, and nothing is guessed: a wrong number stops with file,
line, column and remedy.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecg_jax.errors import DataError, UsageError, did_you_mean

SCHEMA_VERSION = 1
REQUIRED = ("run", "architecture", "paradigm", "n_params", "n_records", "dataset", "task", "metric", "value")
DEFAULTS: dict[str, Any] = {  # of optional columns; the report's checklist states those that were used
    "input": "signal",
    "domain": None,  # id for the task "pretrain", else ood_unseen
    "label": "macro",
    "split": "test",
    "selection": "best-val",
    "probe": "",
    "label_fraction": 1.0,
    "probe_seed": 0,
    "seed": 0,
    "step": 0,
    "status": "done",
    "unit": "nats",
    "floor": math.nan,
    "prior": math.nan,
}
CARRIED = (
    "objective",
    "codebook",
    "pool",
    "trial",
    "lr",
    "n_patients",
    "n_params_total",
    "n_params_nonembedding",
    "examples_seen",
    "epochs",
    "subset_offset",
    "flops",
    "lineage",
    "ci_low",
    "ci_high",
    "n_examples",
    "n_labels",
    "schema_version",
)
NUMBERS = {"n_params", "n_records", "value", "label_fraction", "step", "floor", "prior"}
WORDS = {
    "domain": ("id", "ood_seen", "ood_unseen", "contaminated"),
    "status": ("done", "unconverged", "diverged", "interrupted"),
    "unit": ("nats", "bits"),
}
NOT_A_LOSS = (
    "auroc",
    "auc",
    "ap",
    "auprc",
    "average_precision",
    "f1",
    "accuracy",
    "acc",
    "precision",
    "recall",
    "sensitivity",
    "specificity",
    "threshold",
    "mcc",
    "balanced_accuracy",
)
DUPLICATE_KEY = (
    "run",
    "dataset",
    "task",
    "label",
    "split",
    "metric",
    "probe",
    "label_fraction",
    "probe_seed",
    "step",
    "domain",
    "selection",
)


@dataclass(frozen=True)
class Table:
    """Checked rows: required and optional columns filled in, numbers as floats, `_where` = "file, line n",
    `_file`."""

    rows: list[dict[str, Any]]
    read: int  # rows in all sources, after melting
    left_out: dict[str, int]  # reason -> number of rows
    defaults: tuple[str, ...]  # optional columns that no source had
    sources: tuple[Path, ...]
    runs: tuple[Path, ...]  # run folders among the sources, for loss trajectories
    notes: tuple[str, ...] = field(default=())


def find_sources(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files to read and run folders, in a stable order. Raises DataError for what does not exist or holds
    no log."""
    files: list[Path] = []
    runs: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            logs = sorted(path.rglob("evals.jsonl"))
            if not logs:
                raise DataError(
                    f"{path}: no evals.jsonl in it or below it; give an eval log or run folders that were probed"
                )
            files += logs
            runs += [log.parent for log in logs]
        elif path.is_file():
            files.append(path)
            if path.name == "evals.jsonl" and (path.parent / "metrics.jsonl").is_file():
                runs.append(path.parent)
        else:
            raise DataError(f"{path}: no such file or folder")
    if not files:
        raise UsageError("nothing to fit: give at least one eval log (JSONL or CSV) or run folder")
    return list(dict.fromkeys(files)), list(dict.fromkeys(runs))


def read(
    paths: Sequence[Path],
    *,
    columns: Mapping[str, str] | None = None,
    melt: Sequence[str] = (),
    metric: str | None = None,
) -> Table:
    """Read and check eval logs.

    columns: our name -> theirs, or `=value` for a constant. melt: value columns of a wide table, one task
    each. metric: fit this metric only; None takes every metric but the known scores that are no losses
    (`NOT_A_LOSS`). Raises DataError (missing column, bad number, duplicate, unknown word, newer schema),
    UsageError (unknown name).
    """
    columns = dict(columns or {})
    known = (*REQUIRED, *DEFAULTS, *CARRIED)
    for name in columns:
        if name not in known:
            raise UsageError(f"--columns {name}=...: no such column of an eval log{did_you_mean(name, known)}")
    files, runs = find_sources(paths)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    total = 0
    for file in files:
        for line, row in _melted(_renamed(raw_records(file), file, columns, melt), file, melt):
            seen.update(k for k, v in row.items() if v is not None)
            total += 1
            where = f"{file}, line {line}"
            reason = _not_wanted(row, metric, where)
            if reason:
                left_out[reason] += 1
            else:
                rows.append(_checked(row, where) | {"_file": file})
    if not total:
        raise DataError(f"{files[0]}: no rows" + (f" (nor in {len(files) - 1} other files)" if len(files) > 1 else ""))
    if not rows:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in left_out.items())
        raise DataError(f"{files[0]}: none of the {total} rows can be fitted: {reasons}")
    _refuse_duplicates(rows)
    finite = [r for r in rows if math.isfinite(r["value"])]
    for r in rows:
        if not math.isfinite(r["value"]):
            left_out[f"loss is not finite ({r['status']})"] += 1
    if not finite:
        raise DataError(f"{files[0]}: no row has a finite loss")
    return Table(
        rows=finite,
        read=total,
        left_out=dict(left_out),
        defaults=tuple(k for k in DEFAULTS if k not in seen),
        sources=tuple(files),
        runs=tuple(runs),
        notes=tuple(_notes(rows, finite)),
    )


def raw_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and raw record. JSONL where the first character is `{`, else CSV with a header."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"{file}: not UTF-8 text (byte {err.start}); an eval log is JSONL or CSV") from None
    except OSError as err:
        raise DataError(f"{file}: cannot be read: {err.strerror}") from None
    lines = text.splitlines()
    if text.lstrip()[:1] == "{":
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as err:
                raise DataError(f"{file}, line {number}: no JSON object ({err.msg}); delete or mend the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number}: a JSON {type(record).__name__}, not an object")
            yield number, record
        return
    reader = csv.DictReader(lines)
    if reader.fieldnames is None:
        return
    names = [n.strip() for n in reader.fieldnames if n is not None]
    repeated = [n for n, k in Counter(names).items() if k > 1]
    if repeated:
        raise DataError(f"{file}, line 1: column {repeated[0]!r} occurs twice")
    reader.fieldnames = names
    for record in reader:
        if None in record or None in record.values():
            raise DataError(f"{file}, line {reader.line_num}: the header has {len(names)} columns, this row has not")
        yield reader.line_num, {k: v if v.strip() else None for k, v in record.items()}


def _renamed(records, file: Path, columns: Mapping[str, str], melt: Sequence[str]):
    """Rows with our column names; the first row shows whether the required ones are there."""
    constants = {ours: theirs[1:] for ours, theirs in columns.items() if theirs.startswith("=")}
    renames = {ours: theirs for ours, theirs in columns.items() if not theirs.startswith("=")}
    for line, record in records:
        for ours, theirs in renames.items():
            if theirs not in record:
                have = ", ".join(list(record)[:12])
                raise DataError(
                    f"{file}, line {line}: no column {theirs!r} (--columns {ours}={theirs}); there is {have}"
                )
        row = {k: v for k, v in record.items() if k not in renames.values()}
        row |= {ours: record[theirs] for ours, theirs in renames.items()} | constants
        for name in REQUIRED:
            if name not in row and not (melt and name in ("task", "value", "metric")):
                raise DataError(
                    f"{file}, line {line}: no column {name!r}; name the one that holds it by --columns "
                    f"{name}=THEIRS, "
                    f"or give all rows one value by --columns {name}==VALUE"
                )
        yield line, row


def _melted(rows, file: Path, melt: Sequence[str]):
    for line, row in rows:
        if not melt:
            yield line, row
            continue
        for column in melt:
            if column not in row:
                raise DataError(f"{file}, line {line}: no column {column!r} (--melt)")
            rest = {k: v for k, v in row.items() if k not in melt}
            home = {"domain": "id"} if column.endswith("_id") else {}
            yield line, {"metric": "loss"} | home | rest | {"task": column, "value": row[column]}


def _not_wanted(row: Mapping[str, Any], metric: str | None, where: str) -> str | None:
    """Why this row takes no part in any law, before its numbers are looked at; None where it does."""
    version = row.get("schema_version")
    if version is not None and plain_number(version, "schema_version", where) > SCHEMA_VERSION:
        raise DataError(f"{where}: schema_version {version} is newer than {SCHEMA_VERSION}; update ecg_jax")
    name = str(row.get("metric") or "").lower()
    if metric is not None and name != metric.lower():
        return f"metric is not {metric}"
    if metric is None and name in NOT_A_LOSS:
        return "metric is a score, not a loss"
    if str(row.get("domain") or "") == "contaminated":
        return "contaminated (the encoder's lineage has seen the data)"
    if str(row.get("paradigm") or "").lower() == "untrained":
        return "untrained encoder (a reference, not a run)"
    if str(row.get("paradigm") or "").lower() == "baseline":
        return "baseline without an encoder (a reference, not a run)"
    if row.get("label") not in (None, "macro"):
        return "single label (laws are fitted to macro rows)"
    return None


def _checked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {"_where": where}
    for name in REQUIRED:
        if row.get(name) is None and not (name == "value" and row.get("status") == "diverged"):
            raise DataError(f"{where}: column {name!r} is empty")
        out[name] = row.get(name)
    for name, default in DEFAULTS.items():
        out[name] = default if row.get(name) is None else row[name]
    for name in CARRIED:
        out[name] = row.get(name)
    out["domain"] = out["domain"] or ("id" if out["task"] == "pretrain" else "ood_unseen")
    out["value"] = math.nan if out["value"] is None else out["value"]
    for name in NUMBERS:
        out[name] = plain_number(out[name], name, where)
    for name, words in WORDS.items():
        if out[name] not in words:
            raise DataError(
                f"{where}: {name} {out[name]!r} is none of {', '.join(words)}{did_you_mean(str(out[name]), words)}"
            )
    for name in (
        "run",
        "architecture",
        "paradigm",
        "input",
        "dataset",
        "task",
        "metric",
        "probe",
        "selection",
        "split",
    ):
        out[name] = str(out[name])
    for name in ("n_params", "n_records"):
        if not (math.isfinite(out[name]) and out[name] > 0):
            raise DataError(f"{where}: {name} is {out[name]:g}; it must be a positive count")
    if math.isfinite(out["value"]) and out["value"] <= 0:
        raise DataError(
            f"{where}: value {out['value']:g} of metric {out['metric']!r} is not positive; a loss in nats is"
        )
    if out["unit"] == "bits":
        for name in ("value", "floor", "prior"):
            out[name] *= math.log(2.0)
    return out


def plain_number(value: Any, name: str, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} is no number: {value!r}; write plain digits, without units") from None


def _refuse_duplicates(rows: Sequence[Mapping[str, Any]]) -> None:
    first: dict[tuple, str] = {}
    for row in rows:
        key = tuple(str(row[k]) for k in DUPLICATE_KEY)
        if key in first:
            what = ", ".join(f"{k} {row[k]}" for k in ("run", "dataset", "task", "split", "metric", "step"))
            raise DataError(f"{row['_where']}: the same result as {first[key]} ({what}); keep one of the two")
        first[key] = row["_where"]


def _notes(rows: Sequence[Mapping[str, Any]], finite: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Things a reader should know that stop nothing."""
    largest = max(r["n_params"] for r in rows)
    if largest < 1000:
        yield (
            f"n_params never exceeds {largest:g}: counts in millions? Exponents stay right, A and the "
            f"multipliers' sizes do not."
        )
    if len(finite) < len(rows):
        names = sorted({r["run"] for r in rows if not math.isfinite(r["value"])})
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield f"No finite loss, so not fitted: {', '.join(names[:5])}{more}."
    if any(r["unit"] == "bits" for r in rows):
        yield "Losses given in bits were turned into nats."
