"""The end of a run, whichever it is: test, exported encoder, rows of the eval log, last of all `summary.json`.

A run is finished when its summary says done, unconverged or diverged; everything else is on disk by then. The
test split is read here and nowhere else, once. Chooses nothing: the parameters were chosen on `val`.
Invariant: a summary never counts what the run did not see (steps and examples are those behind the selected
parameters).
"""

import functools
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ecg_jax import config as config_lib
from ecg_jax import files, objectives
from ecg_jax.config import Config
from ecg_jax.evaluation import evalog
from ecg_jax.models import flops
from ecg_jax.training import export, folder, hosts, metrics, outcomes, step
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training.data import Data, whole
from ecg_jax.training.feed import place
from ecg_jax.training.recipe import Controller
from ecg_jax.training.results import Results

PARADIGMS = {"supervised": "SL", "masked_codes": "SSL", "codebook": "codebook"}
LOOKED_UP = ("lead_table", "time_table", "cls", "mask_vector")  # parameters that are added, never multiplied
WRITING = 1800.0  # seconds that the first process may take for intervals and baselines, while the others wait
PACKAGES = ("ecg-jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")


@dataclass(frozen=True)
class Run:
    """What the end of a run needs to know of it."""

    config: Config
    run_dir: Path
    mesh: Mesh
    data: Data
    objective: step.Objective
    programs: step.Programs
    control: Controller
    results: Results
    clock: metrics.Clock
    resumes: int


def done(run: Run, last: step.State) -> dict[str, Any]:
    """Test the selected and the last parameters, write everything, return the summary."""
    best, data = run.results.selected(), run.data
    with run.clock.of("finish"):
        test, val = (place(table, run.mesh, run.objective.fields) for table in (data.test, data.val))
        on_test = _kept(run, best.params, test)
        same = run.control.best_update == run.control.update
        on_test_last = on_test if same else _kept(run, last.params, test)
        params = metrics.read(best.params)
        on_val = _kept(run, best.params, val)
        data = replace(data, val=whole(data.val), test=whole(data.test))
        run = replace(run, data=data)
    if not hosts.first():
        hosts.meet("written", seconds=WRITING)
        return folder.finished(run.run_dir) or {}
    with hosts.together("written"):
        with run.clock.of("finish"):
            found = outcomes.of(run.config.objective.name)(run, params, on_val, on_test, on_test_last)
            summary = _summary(run, run.control.status()) | {"losses": _losses(run) | found.losses} | found.summary
            if run.config.objective.name != "codebook":
                export.save_encoder(run.run_dir, run.objective.arch, params["encoder"], _about_encoder(run, summary))
                rows = [_columns(run, summary) | row for row in found.rows]
                evalog.append(run.run_dir / folder.EVALS, [*rows, _last_row(run, summary, found)])
        return _write(run, summary)


def diverged(run: Run) -> dict[str, Any]:
    """Record a run that left the finite numbers: a row without a value, and the summary."""
    summary = _summary(run, "diverged") | {"losses": _losses(run)}
    if not hosts.first():
        return summary
    if run.config.objective.name != "codebook":
        metric = outcomes.METRICS[run.config.objective.name]
        row = _columns(run, summary) | {"label": "macro", "metric": metric, "value": None, "domain": "id"}
        evalog.append(run.run_dir / folder.EVALS, [row])
    return _write(run, summary)


def interrupted(run: Run) -> dict[str, Any]:
    """Say in the summary that there is work left."""
    return _write(run, _summary(run, "interrupted") | {"losses": _losses(run)})


def _kept(run: Run, params: Any, placed: Any) -> np.ndarray:
    """What the objective keeps of each record (its `logits`), float64 [n, ...] in the order of the table."""
    lanes = run.config.train.lanes
    parts, sent = [], None
    for _, logits in step.evaluate(run.programs, params, placed, run.mesh):
        if sent is not None:
            parts.append(metrics.read(sent))  # of the batch before, while this one runs
        sent = logits
    parts.append(metrics.read(sent))
    by_place = np.concatenate([part.reshape(lanes, -1, part.shape[-1]) for part in parts], axis=1)
    return placed.in_table_order(by_place).astype(np.float64)


def _losses(run: Run) -> dict[str, Any]:
    best = run.control.best_loss
    return {"val": best if np.isfinite(best) else None, "train_last": run.results.last_loss}


def _summary(run: Run, status: str) -> dict[str, Any]:
    """Everything but the losses. Names that the eval log has mean the same here."""
    config, control, data = run.config, run.control, run.data
    encoder, total, looked_up = _count(run)
    finished = status in ("done", "unconverged")
    steps = control.best_step if finished else control.step
    seen = steps * config.train.batch
    per_record = objectives.training_flops(run.objective)
    return {
        "run": run.run_dir.resolve().name,
        "status": status,
        "identity": config_lib.identity(config)[1],
        "architecture": getattr(run.objective.arch, "family", "vqhbr"),
        "paradigm": PARADIGMS[config.objective.name],
        "rung": config.model.rung,
        "input": config.model.input,
        "objective": config.objective.name,
        "codebook": data.book.id if data.book else None,
        "choices": outcomes.choices(config, data.book),
        "pool": config.model.pool,
        "task": config.data.task,
        "labels": list(data.val.label_names),
        "dataset": data.name,
        "n_params": encoder,
        "n_params_total": total,
        "n_params_nonembedding": encoder - looked_up,
        "n_records": data.records,
        "n_patients": data.patients,
        "subset": config.data.subset,
        "subset_records": config.data.subset_records,
        "subset_offset": config.data.subset_offset,
        "step": steps,
        "updates": control.update,
        "batch": config.train.batch,
        "examples_seen": seen,
        "epochs": seen / data.records,
        "flops": per_record * seen,
        "flops_one_per_multiply_add": per_record * seen // 2,  # as fvcore counts
        "flops_per_record": per_record,  # forward and backward
        "flops_with_discarded": per_record * control.update * config.train.batch,
        "seed": config.train.seed,
        "lr": config.optim.lr,
        "loader": data.loader,
        "device": mesh_lib.describe(run.mesh),
        "precision": getattr(getattr(run.objective, "front", None), "dtype", "float32"),
        "versions": versions(),
        "resumes": run.resumes,
        "data": data.facts,
        "lineage": data.lineage,
    }


def mfu(objective: step.Objective, mesh: Mesh, ecg_per_s: float) -> float | None:
    """Share of the devices' dense peak that training reaches, by analytic FLOPs; None where the peak is not known."""
    precision = getattr(getattr(objective, "front", None), "dtype", "float32")
    each = ecg_per_s / mesh.size
    return flops.mfu(objectives.training_flops(objective), each, mesh.devices.flat[0].device_kind, precision)


def _count(run: Run) -> tuple[int, int, int]:
    """Parameters of the encoder, of encoder and head, and those of the encoder that are only looked up.

    What is not learned by gradient (running statistics, a codebook) is no parameter.
    """
    learned = outcomes.learned(run.programs.abstract.params)
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in learned.items()}
    looked_up = sum(learned["encoder"][name].size for name in LOOKED_UP if name in learned["encoder"])
    return sizes["encoder"], sum(sizes.values()), looked_up


def _columns(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Columns of the eval log that all ID rows of the run share."""
    own = {name: summary[name] for name in evalog.FIELDS if name in summary and name != "lineage"}
    lineage = "+".join(dict.fromkeys(entry["dataset"] for entry in run.data.lineage)) or None
    return own | {"task": "pretrain", "split": "test", "selection": "best-val", "lineage": lineage}


def _last_row(run: Run, summary: dict[str, Any], found: outcomes.Outcome) -> dict[str, Any]:
    """The ID loss of the last parameters, whatever `val` said of them."""
    own = {"step": run.control.step, "selection": "last"}
    seen = run.control.step * run.config.train.batch
    own |= {"examples_seen": seen, "epochs": seen / run.data.records}
    own |= {"flops": summary["flops_per_record"] * seen}
    return _columns(run, summary) | own | found.last


def _about_encoder(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    model, table = run.config.model, run.data.val
    return {
        "rung": model.rung,
        "scale": model.scale,
        "crop": model.crop,
        "input": model.input,
        "beats": model.beats,
        "slots": model.slots,
        "rate": 100,
        "leads": list(table.leads),
        "unit": table.unit,
        "chain": run.data.chain,
        "pool": model.pool,
        "task": run.config.data.task,
        "labels": list(table.label_names) if run.config.objective.name == "supervised" else [],
        "n_params": summary["n_params"],
        "identity": summary["identity"],
        "data": run.data.facts,
        "lineage": run.data.lineage,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _write(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    if not hosts.first():
        return summary
    spent = run.clock.spent()
    trained = run.control.update * run.config.train.batch
    speed = {
        "seconds": {name: round(value, 3) for name, value in spent.items()},
        "ecg_per_s": round(trained / max(spent["train"] + spent["input_wait"], 1e-9), 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps({"schema_version": 1} | summary | speed, indent=2, allow_nan=False) + "\n"
    files.write(run.run_dir / folder.SUMMARY, text)
    return json.loads(text)
