"""What a probe found, for a reader: lines for the terminal, and tables of encoders x tasks in Markdown and CSV.

Tables are made of what `probe` wrote below run folders. The best encoder of a column is bold; those whose paired
difference to it (same test records, same patient resamples) holds zero are marked =. Fits nothing. Invariant: encoders
that were scored on other splits of a data set are never put into one column.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax import files
from ecg_jax.errors import DataError
from ecg_jax.evaluation import bootstrap, compare, tasks
from ecg_jax.evaluation.scoring import LEAST

SHOWN = ("bce", "auroc", "ap")
LOWER = ("bce", "brier", "bce_corrected")  # is better


def result_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `probe_run`: one line per label and macro of the trained encoder, a macro line for the others."""
    counts = ", ".join(f"{n} {name}" for name, n in report["records"].items())
    drawn, patients = report["intervals"], report["patients"]["test"]
    lines = [f"{report['run']} on {report['dataset']} {report['task']}: {counts} records"]
    lines.append(report["split"])
    lines.append(f"{drawn['level']:.0%} intervals, {drawn['resamples']} resamples of {patients} patients")
    seen = "unknown data" if report["lineage"] is None else ", ".join(report["lineage"]) or "no data"
    lines.append(f"the encoder, with its codebook if it has one, was trained on {seen}")
    for result in report["results"]:
        lines.append(_heading(result))
        if result["model"] == "trained":
            for name, entry in result["labels"].items():
                few = ", too few" if entry.get("too_few") else ""
                lines.append(_line(f"{name} ({entry['n_positive']}/{entry['n_examples']}{few})", entry["metrics"]))
        for domain, entry in result["macro"].items():
            more = entry["metrics"].get("bce_corrected")
            after = f"  at the test prevalence {more['value']:.4f}" if more else ""
            lines.append(_line(f"macro {domain}", entry["metrics"]) + after)
            if not entry["metrics"]:
                lines.append("    no label with enough positives: no macro")
    for entry in report["difference"]:
        macros = {metric: rows["macro"] for metric, rows in entry["metrics"].items() if "macro" in rows}
        what = f"trained minus {entry['against']}, {entry['probe']}, seed {entry['seed']}{_share(entry)}, paired"
        lines.append(what)
        lines.append(_line("macro", {name: row | {"value": row["difference"]} for name, row in macros.items()}, "+"))
    lines += [f"note: {name}: {reason}" for name, reason in report["left_out"].items()]
    evals = (
        f"rows in {report['evals']}"
        if report["evals"]
        else (
            "no rows in the eval log: the features do not say architecture, paradigm, n_params, n_records and lineage"
        )
    )
    return [*lines, f"wrote {report['path']}", evals]


def _share(entry: Mapping[str, Any]) -> str:
    return "" if entry["label_fraction"] == 1 else f", {entry['label_fraction']:.0%} of the labels"


def _heading(result: Mapping[str, Any]) -> str:
    note = "" if result["stopped_by"] == "validation" else ", still improving at the last: raise epochs_max"
    if "epoch" in result:
        how = f"epoch {result['epoch']}{note}"
    else:
        known = [c for c in result["c"] if c is not None]
        how = f"C {min(known):g} to {max(known):g}, gradient {result['gradient']:.0e}" if known else "prevalence alone"
    return f"{result['model']}, {result['probe']} probe, seed {result['seed']}{_share(result)}, {how}"


def _line(name: str, values: Mapping[str, Mapping[str, float | None]], sign: str = "") -> str:
    cells = []
    for metric in (m for m in SHOWN if m in values):
        ends = (values[metric]["ci_low"], values[metric]["ci_high"])
        shown = ", ".join("?" if end is None else f"{end:{sign}.4f}" for end in ends)
        cells.append(f"{metric} {values[metric]['value']:{sign}.4f} [{shown}]")
    return f"  {name:<28} " + "  ".join(cells)


# ------------------------------------------------------------------------------------------------ encoders x tasks


def table(
    runs: Sequence[Path],
    out: Path,
    *,
    metric: str = "auroc",
    probe: str = "logistic",
    preset: str | None = None,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Encoders x tasks of the probes below `runs`, written to `out` as table-<metric>.md and .csv.

    Columns are the tasks found, or those of `preset` with their mean (only where all are there). Rows: the trained
    encoder of each run, the untrained one, its projection and crop, and the baselines, at all labels and the first
    seed. Macros are over all labels that are not too few, whatever their domain; domains have their own rows in the
    eval log. "too few": no label of the task has enough positives. Raises DataError where nothing was probed, or two
    runs were scored on other records.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    splits: dict[str, str] = {}
    for run in map(Path, runs):
        for path in sorted((run / "probes").glob("*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            task = f"{report['dataset']}:{report['task']}"
            if splits.setdefault(task, report["split_hash"]) != report["split_hash"]:
                raise DataError(f"{path}: scored on another split of {task} than the runs before; probe them alike")
            for result in report["results"]:
                name = _row_name(report["run"], result)
                if result["probe"].partition("@")[0] == probe and result["label_fraction"] == 1 and name:
                    cells.setdefault(name, {}).setdefault(
                        task, {"file": run / "probes" / result["predictions"]} | result
                    )
    if not cells:
        raise DataError(f"{', '.join(map(str, runs))}: no {probe} probe in any of them; run `ecg-jax probe` first")
    known = sorted({task for row in cells.values() for task in row})
    columns = tasks.preset(preset) if preset else [{"name": task, "tasks": [task]} for task in known]
    cache: dict[Any, Any] = {}
    shown = [_column(column, cells, metric, resamples, cache) for column in columns]
    probed = [{row for row, have in cells.items() if all(task in have for task in c["tasks"])} for c in columns]
    missing = [column["name"] for column, rows in zip(columns, probed, strict=True) if not rows]
    lines = _markdown(cells, columns, shown, probed, metric, bool(preset))
    out = Path(out)
    files.write(out / f"table-{metric}.md", "\n".join(lines) + "\n")
    files.write(out / f"table-{metric}.csv", _csv(cells, columns, shown, metric))
    return {"lines": lines, "missing": missing, "path": str(out / f"table-{metric}.md"), "rows": list(cells)}


def _row_name(run: str, result: Mapping[str, Any]) -> str:
    if result["model"] == "trained":
        return run
    own = result["model"].startswith("trained ") or result["model"] == "untrained"
    return f"{run}: {result['model']}" if own else result["model"]


def _spread(file: Path, label: str | None, metric: str, resamples: int, cache: dict) -> bootstrap.Estimate | Any:
    """The spread of one prediction file over the labels of a macro (or of `label`), and which those are."""
    if file not in cache:
        held = compare.load_predictions(file)
        drawn = cache.setdefault((held["groups"].tobytes(), resamples), bootstrap.draw(held["groups"], resamples))
        nowhere = np.full(held["labels"].shape[1], np.nan)
        cache[file] = bootstrap.spreads(held["logits"], held["labels"], nowhere, drawn)[metric], held
    spread, held = cache[file]
    names = held["label_names"].tolist()
    keep = (held["labels"] == 1).sum(0) >= LEAST if label is None else np.array([n == label for n in names])
    return spread, keep & np.isfinite(spread.point)


def _column(column: Mapping[str, Any], cells, metric: str, resamples: int, cache: dict) -> dict[str, dict[str, Any]]:
    """Of each row that has every task of the column: value, ci_low, ci_high (one task only), best and tied."""
    found: dict[str, dict[str, Any]] = {}
    spreads: dict[str, list[tuple[Any, np.ndarray]]] = {}
    for row, have in cells.items():
        if all(task in have for task in column["tasks"]):
            parts = [_spread(have[t]["file"], column.get("label"), metric, resamples, cache) for t in column["tasks"]]
            if all(keep.any() for _, keep in parts):
                spreads[row] = parts
                values = [spread.macro(keep) for spread, keep in parts]
                ends = bootstrap.interval(metric, values[0]) if len(parts) == 1 else (None, None)
                found[row] = {"value": float(np.mean([v.point for v in values])), "ci_low": ends[0], "ci_high": ends[1]}
    if not found:
        return {}
    best = (min if metric in LOWER else max)(found, key=lambda row: found[row]["value"])
    for row, entry in found.items():
        entry["best"] = row == best
        entry["tied"] = row != best and _tied(spreads[best], spreads[row])
    return found


def _tied(first: list[tuple[Any, np.ndarray]], second: list[tuple[Any, np.ndarray]]) -> bool:
    """Whether the paired difference of the means over tasks holds zero; tasks are resampled on their own."""
    gaps = [a.minus(b).macro(keep & other) for (a, keep), (b, other) in zip(first, second, strict=True)]
    if len(gaps) == 1:
        low, high = bootstrap.difference_interval(gaps[0])
    else:
        point = float(np.mean([gap.point for gap in gaps]))
        low, high = bootstrap.percentile(point, np.mean([gap.draws for gap in gaps], axis=0))
    return bool(low <= 0 <= high)


def _mean(shown: Sequence[Mapping[str, Any]], row: str) -> float | None:
    return float(np.mean([column[row]["value"] for column in shown])) if all(row in c for c in shown) else None


def _markdown(cells, columns, shown, probed, metric: str, with_mean: bool) -> list[str]:
    names = [column["name"] for column in columns] + ["mean"] * with_mean
    lines = [f"| {metric} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in cells:
        texts = []
        for column, there in zip(shown, probed, strict=True):
            entry = column.get(row)
            if entry is None:
                texts.append("too few" if row in there else "-")
                continue
            value = f"**{entry['value']:.3f}**" if entry["best"] else f"{entry['value']:.3f}" + " =" * entry["tied"]
            ends = "" if entry["ci_low"] is None else f" [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"
            texts.append(value + ends)
        if with_mean:
            mean = _mean(shown, row)
            texts.append("-" if mean is None else f"{mean:.3f}")
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return [
        *lines,
        "",
        "bold: best of its column; =: not told from it (95 % interval of the paired difference holds 0).",
    ]


def _csv(cells, columns, shown, metric) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "encoder", "column", "value", "ci_low", "ci_high", "best", "tied"])
    for row in cells:
        for column, found in zip(columns, shown, strict=True):
            if row in found:
                entry = found[row]
                values = (entry[k] for k in ("value", "ci_low", "ci_high", "best", "tied"))
                writer.writerow([metric, row, column["name"], *values])
    return text.getvalue()
