"""A realistic eval log: two architectures on 3 x 3 runs and repeats, ID, seen and unseen OOD, labels and
scores, run folders."""

import json
from pathlib import Path

import numpy as np

SIZES = {"resnet1d": (2104, 10312, 60288), "transformer": (2240, 9888, 61440)}
DATA = (512, 2048, 8192)
BAYES = 0.0712
PRIOR = 0.1685
# E, A, alpha, B, beta of the ID loss: excess falls by well over half across the grid.
TRUTH = {"resnet1d": (BAYES, 0.25, 0.30, 1.1, 0.48), "transformer": (BAYES, 0.42, 0.33, 1.5, 0.50)}
LABELS = ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")


def truth(architecture: str, n: float, d: float) -> float:
    e, a, alpha, b, beta = TRUTH[architecture]
    return e + a * n**-alpha + b * d**-beta


def rows(noise: float = 0.004, seed: int = 0, repeats: int = 2) -> list[dict]:
    """The log's rows, as `evals.jsonl` holds them; the repeated cell is (middle N, middle D)."""
    rng = np.random.default_rng(seed)
    out = []
    for architecture, sizes in SIZES.items():
        for i, n in enumerate(sizes):
            for j, d in enumerate(DATA):
                for s in range(1 + (repeats if (i, j) == (1, 1) else 0)):
                    out += _run(rng, architecture, n, d, s, noise)
    return out


def _run(rng, architecture: str, n: int, d: int, s: int, noise: float) -> list[dict]:
    run = f"{architecture}-N{n}-D{d}-s{s}"
    base = {
        "schema_version": 1,
        "run": run,
        "architecture": architecture,
        "paradigm": "SL",
        "input": "signal",
        "n_params": n,
        "n_records": d,
        "objective": "supervised",
        "pool": "mean",
        "seed": s,
        "lr": 0.003,
        "trial": 0,
        "status": "done",
        "subset_offset": 0.0,
        "split": "test",
        "probe_seed": 0,
        "label_fraction": 1.0,
        "n_examples": 2048,
    }
    value = truth(architecture, n, d) * float(np.exp(noise * rng.normal()))
    home = base | {
        "dataset": "synthetic",
        "task": "pretrain",
        "domain": "id",
        "step": 900 + d // 8,
        "probe": None,
    }
    out = [
        home
        | {
            "label": "macro",
            "metric": "bce",
            "value": value,
            "selection": "best-val",
            "floor": BAYES,
            "prior": PRIOR,
        },
        home
        | {
            "label": "macro",
            "metric": "bce",
            "value": value * 1.03,
            "selection": "last",
            "step": 1200 + d // 8,
        },
        home | {"label": "macro", "metric": "auroc", "value": 0.9, "selection": "best-val"},
    ]
    for k, name in enumerate(LABELS):
        out.append(home | {"label": name, "metric": "bce", "value": value * (0.6 + 0.15 * k), "selection": "best-val"})
    far = base | {
        "dataset": "synthetic-ood",
        "task": "ood",
        "probe": "adam",
        "step": home["step"],
        "selection": "best-val",
    }
    excess = value - BAYES
    for domain, k, kappa, floor, prior in (
        ("ood_seen", 0.9, 0.9, 0.11, 0.26),
        ("ood_unseen", 0.25, 0.45, 0.16, 0.30),
    ):
        loss = (floor + k * excess**kappa) * float(np.exp(noise * rng.normal()))
        out.append(
            far
            | {
                "domain": domain,
                "label": "macro",
                "metric": "bce",
                "value": loss,
                "floor": floor,
                "prior": prior,
            }
        )
        out.append(
            far
            | {
                "domain": domain,
                "label": "macro",
                "metric": "ap",
                "value": 0.4,
                "ci_low": 0.3,
                "ci_high": 0.5,
            }
        )
    if s == 0 and n == SIZES[architecture][0]:
        out.append(
            far
            | {
                "paradigm": "untrained",
                "run": f"{run}-untrained",
                "domain": "ood_seen",
                "label": "macro",
                "metric": "bce",
                "value": 0.25,
            }
        )
    return out


def write_jsonl(path: Path, entries: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def write_runs(folder: Path, entries: list[dict]) -> Path:
    """One run folder per run, with `evals.jsonl` and a `metrics.jsonl` whose validation loss ends near the
    run's loss."""
    by_run: dict[str, list[dict]] = {}
    for entry in entries:
        by_run.setdefault(entry["run"].removesuffix("-untrained"), []).append(entry)
    for run, mine in by_run.items():
        write_jsonl(folder / run / "evals.jsonl", mine)
        rng = np.random.default_rng(len(run))
        last = mine[0]["value"]
        steps = np.unique(np.geomspace(20, mine[0]["step"], 18).astype(int))
        lines = []
        for k, step in enumerate(steps):
            val = last + 0.09 * (1 - k / (len(steps) - 1)) ** 2
            lines.append({"step": int(step), "loss": val * (0.97 + 0.02 * rng.normal()), "val_loss": val})
        write_jsonl(folder / run / "metrics.jsonl", lines)
    return folder
