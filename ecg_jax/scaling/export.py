"""Results as plain JSON and CSV: `laws.json`, `multipliers.json`, `predictions.csv`.

Field names are a contract that others script against. Numbers of laws that are not identified stay in the
JSON with `identified: false`; where the design refuses a law, its parameters are null. Infinite or unknown
becomes null, never NaN.

It computes predictions, nothing else. Invariant: what is written parses as strict JSON.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.scaling import adequacy, allocation, identify, intervals
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.claims import seeds_to_tell
from ecg_jax.scaling.multipliers import Multiplier
from ecg_jax.scaling.restrict import whole
from ecg_jax.scaling.table import plain_number, raw_records

NAMES = ("E", "A", "B", "alpha", "beta")
PREDICTED = ("predicted", "low", "high", "law_low", "law_high", "identified")
IDENTITY = ("architecture", "paradigm", "input", "dataset", "task", "domain")


def law_json(result: LawResult, options: Options) -> dict[str, Any]:
    """One entry of `laws.json`."""
    runs, fit, key = result.runs, result.fit, result.runs.key
    names = result.law.names if result.law else NAMES
    known = runs.known_floor()
    out: dict[str, Any] = {f: getattr(key, f) for f in IDENTITY}
    out |= {
        "metric": key.metric,
        "probe": key.probe,
        "label_fraction": key.label_fraction,
        "split": runs.split,
    }
    out |= {
        "form": result.law.name if result.law else options.form,
        "formula": result.law.formula if result.law else None,
        "variables": list(result.law.variables) if result.law else [],
        "loss": options.loss,
        "delta": fit.delta if fit else options.delta,
        "n": runs.n,
        "fixed": dict(options.fixed),
        "choice": _choice_json(result),
        "configurations": int(runs.cells.max()) + 1,
        "objective": fit.objective if fit else None,
        "parameters": fit.parameters if fit else dict.fromkeys(names),
        "standard_errors": {k: result.intervals[k].sd if k in result.intervals else None for k in names},
        "intervals": {k: result.intervals[k].pair() if k in result.intervals else [None, None] for k in names},
        "level": options.level,
        "interval_method": intervals.method_of(result.draws) if result.draws else None,
        "bootstrap": _bootstrap_json(result, options),
        "reference": _reference(result),
        "allocation": allocation_of(result, options.level),
        "compute": compute_of(result),
        "certificate": asdict(fit.certificate) if fit else None,
        "lack_of_fit": [asdict(c) | {"rejected": c in adequacy.failed(result.tested)} for c in result.tested],
        "weights": options.weights,
        "identified": result.identified,
        "identification": [asdict(c) for c in result.identification.conditions],
        "weakly_identified": list(result.weak),
        "known_floor": known,
        "known_floor_covered": (
            result.intervals["E"].covers(known) if known is not None and "E" in result.intervals else None
        ),
        "residual_sd": identify.residual_sd(fit) if fit else None,
        "seed_noise": asdict(result.noise) if result.noise else None,
        "spread_of_ln_loss": {k: {"sd": sd, "df": df} for k, (sd, df) in runs.spread.items()},
        "held_out": asdict(result.held_out) if result.held_out else None,
        "sensitivity": [asdict(v) for v in result.variants],
        "flagged": [f"{r}: {s}" for r, s in zip(runs.runs, runs.status, strict=True) if s != "done"],
        "passed_over": runs.passed_over,
    }
    return clean(out)


def _choice_json(result: LawResult) -> dict[str, Any] | None:
    """Rolling-origin errors (root mean square of ln L) of every form that was tried."""
    c = result.chosen
    if c is None:
        return None
    return {"form": c.form, "one_standard_error": c.tolerance, "held_out": list(c.origins),
            "rolling_errors": {s.form: s.errors for s in c.scores},
            "residual_sd": {s.form: s.residual for s in c.scores}}  # fmt: skip


def _bootstrap_json(result: LawResult, options: Options) -> dict[str, Any] | None:
    if result.draws is None:
        return None
    d = result.draws
    return {"kind": d.kind, "draws": d.count, "seed": options.seed, "rechecked": d.rechecked,
            "improved": d.improved, "unconverged": d.unconverged}  # fmt: skip


def _reference(result: LawResult) -> dict[str, float] | None:
    """Amplitudes at the design's centre, where they mean something: excess loss that N (D) accounts for
    there."""
    if result.fit is None:
        return None
    fit = result.fit
    law, theta = whole(fit.law, fit.theta)
    amplitudes = amplitudes_of(law)
    out = {}
    for i, v in enumerate(law.variables):
        out[v] = float(np.exp(fit.centre[i]))
        if amplitudes:
            out[f"excess at {v}"] = float(np.exp(theta[amplitudes[i]]))
    return out


def allocation_of(result: LawResult, level: float) -> dict[str, Any] | None:
    """Compute-optimal exponents of N and D in the budget N D, and both at the largest budget that was run."""
    if result.fit is None or result.law.name != "hoffmann" or not min(result.fit.raw) > 0:
        return None
    budget = float((result.runs.n_params * result.runs.n_records).max())
    best = allocation.optimum(result.fit.parameters, np.array([budget]))
    out = {"a": best.a, "b": best.b, "budget": budget, "n_params": best.n_params[0], "n_records": best.n_records[0]}
    if result.draws is not None:
        alpha, beta = result.draws.raw[:, 3], result.draws.raw[:, 4]
        kind = intervals.method_of(result.draws)
        found = intervals.interval(best.a, beta / (alpha + beta), level=level, method=kind, df=result.df)
        out["a_interval"] = [found.low and max(found.low, 0.0), found.high and min(found.high, 1.0)]
    return out


def compute_of(result: LawResult) -> dict[str, Any] | None:
    """Without any surface: vertices of IsoFLOP parabolas and the envelope of the runs, over training FLOPs where all
    runs state them, else over N D. None where N or D does not vary."""
    runs = result.runs
    if len(runs.sizes) < 2 or len(runs.data) < 2:
        return None
    stated = runs.flops is not None and np.isfinite(runs.flops).all()
    cost = runs.flops if stated else runs.n_params * runs.n_records
    budget = allocation.budgets(cost)
    by_n, by_d = (allocation.isoflop(budget, x, runs.loss) for x in (runs.n_params, runs.n_records))
    hull = allocation.envelope(cost, runs.loss)
    slope = float(np.polyfit(np.log(cost[hull]), np.log(runs.n_params[hull]), 1)[0]) if len(hull) > 2 else None
    return {
        "cost": "flops" if stated else "N D",
        "isoflop": {"a": by_n.exponent, "b": by_d.exponent, "budgets": by_n.budget.tolist(),
                    "n_params": np.exp(by_n.log_x).tolist(), "refused": list(by_n.refused)},
        "envelope": {"runs": [runs.runs[i] for i in hull], "cost": cost[hull].tolist(),
                     "loss": runs.loss[hull].tolist(), "a": slope},
    }  # fmt: skip


def amplitudes_of(law) -> list[int]:
    """Indices of the excess that each variable leaves at the design's centre; empty where a law has no such
    pair."""
    found = [i for i, kind in enumerate(law.kinds) if kind == "amplitude"]
    return found if len(found) == len(law.variables) else []


def multiplier_json(multiplier: Multiplier) -> dict[str, Any]:
    """One entry of `multipliers.json`."""
    fields = asdict(replace(multiplier, draws=None)) | {"interval": list(multiplier.interval)}
    del fields["draws"]
    return clean(fields | {"runs_to_tell_1.3": seeds_to_tell(multiplier)})


def predictions(path: Path, results: Sequence[LawResult], columns: Mapping[str, str], options: Options) -> str:
    """CSV text: each row of the table at `path` with the value each matching law predicts.

    A row belongs to the laws whose architecture, paradigm, input, dataset, task and domain equal those that
    the row states; what it does not state matches all. `low, high`: interval of a new run (law and noise);
    `law_low, law_high`: of the law alone. Raises DataError for a missing or wrong N or D, and for a row
    that no law matches.
    """
    renames = {ours: theirs for ours, theirs in columns.items() if not theirs.startswith("=")}
    out = io.StringIO()
    writer = None
    for line, raw in raw_records(path):
        row = dict(raw)
        for ours, theirs in renames.items():
            if theirs in raw:
                row[ours] = raw[theirs]
        where = f"{path}, line {line}"
        matching = [r for r in results if all(row.get(f) in (None, getattr(r.runs.key, f)) for f in IDENTITY)]
        if not matching:
            stated = ", ".join(f"{f} {row[f]}" for f in IDENTITY if row.get(f) is not None)
            raise DataError(f"{where}: no law was fitted for {stated}")
        for result in matching:
            filled = row | {f: getattr(result.runs.key, f) for f in IDENTITY}
            filled |= dict(zip(PREDICTED, _predict(result, row, where, options), strict=True))
            if writer is None:
                writer = csv.DictWriter(out, list(filled), lineterminator="\n", extrasaction="ignore")
                writer.writeheader()
            writer.writerow({k: "" if v is None else v for k, v in filled.items()})
    if writer is None:
        raise DataError(f"{path}: no rows to predict")
    return out.getvalue()


def _predict(result: LawResult, row: Mapping[str, Any], where: str, options: Options) -> Iterator[Any]:
    if result.fit is None:
        return iter([None] * 5 + [False])
    values = []
    for v in result.law.variables:
        name = {"N": "n_params", "L": "id_loss"}.get(v, "n_records")
        if v == "D" and "U" in result.law.variables and row.get("examples_seen") is not None:
            name = "examples_seen"  # else every record is read once
        if row.get(name) is None:
            raise DataError(f"{where}: no {name}, which the law {result.law.formula} needs")
        value = plain_number(row[name], name, where)
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{where}: {name} is {value:g}; it must be positive")
        values.append(value)
    at = np.log([values])
    predicted = float(result.fit.predict(at)[0])
    if result.draws is None:
        return iter([predicted, None, None, None, None, result.identified])
    low, high = (float(x[0]) for x in intervals.band(result.fit, result.draws, at, level=options.level))
    noise = identify.residual_sd(result.fit) / (1.0 if result.fit.logarithmic else predicted)
    reach = noise * intervals.t_quantile(0.5 + options.level / 2, result.df)
    down = math.hypot(math.log(predicted / low) if low > 0 else math.inf, reach)
    up = math.hypot(math.log(high / predicted), reach)
    return iter([predicted, predicted * math.exp(-down), predicted * math.exp(up), low, high, result.identified])


def clean(value: Any) -> Any:
    """Plain JSON values: NumPy scalars unpacked, tuples as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
