"""`probe`, `table` and `embed`: what encoders are worth on tasks, side by side, and their features for others."""

import argparse
import sys
from pathlib import Path

from ecg_jax.commands.common import add, show
from ecg_jax.errors import UsageError


def probe(commands) -> None:
    example = (
        "probe --run runs/R4 --data data/ptbxl --task superclass\n"
        "  ecg-jax probe --run runs/R4 --data data --preset study      (all tasks of a preset that are there)\n"
        "  ecg-jax probe --features ecgfm.npz --data data/ptbxl --task superclass --out other/ecgfm"
    )
    parser = add(commands, "probe", "linear probes on frozen features, with intervals", example, _run_probe)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="run folder with an encoder")
    which.add_argument("--features", type=Path, metavar="F.npz", help="made elsewhere: record_id [n], features [n, D]")
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="DIR", help="data folder; repeat")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task")
    what.add_argument(
        "--preset", help="ptbxl (five tasks), study (six columns), left-out; --data holds the data folders"
    )
    parser.add_argument("--out", type=Path, help="default: the run folder")
    parser.add_argument(
        "--probe",
        action="append",
        dest="probes",
        help="logistic, adam, finetune; default the first two",
    )
    parser.add_argument("--seed", type=int, action="append", help="probe seed; repeat for several")
    parser.add_argument(
        "--label-fraction", type=float, action="append", metavar="F", help="share of training patients; repeat"
    )
    parser.add_argument("--crop-seconds", type=float, metavar="S", help="only the middle S seconds, as 7.3")
    parser.add_argument("--no-baselines", action="store_true", help="the encoder alone")
    parser.add_argument(
        "--reopen", action="store_true", help="score the test split again with another choice; recorded"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="patient resamples")
    parser.add_argument("--json", action="store_true")


def _run_probe(args: argparse.Namespace) -> int:
    from ecg_jax.evaluation import report
    from ecg_jax.evaluation.probe import probe_run

    asked = [(args.data, args.task)] if args.task else _of_preset(args.preset, args.data)
    for data, task in asked:
        result = probe_run(
            args.run_dir,
            data,
            task,
            features_file=args.features,
            out=args.out,
            probes=tuple(args.probes or ("logistic", "adam")),
            seeds=tuple(args.seed or (0,)),
            fractions=tuple(args.label_fraction or (1.0,)),
            baselines=not args.no_baselines,
            crop_seconds=args.crop_seconds,
            reopen=args.reopen,
            bootstrap=args.bootstrap,
        )
        show(result, args.json, report.result_lines)
    return 0


def _of_preset(name: str, roots: list[Path]) -> list[tuple[list[Path], str]]:
    """The data folders and tasks of a preset that lie below `roots`; says aloud which are not there."""
    from ecg_jax.evaluation import tasks
    from ecg_jax.shards import catalog

    there = {}
    for card in sorted(path for root in roots for path in root.rglob(catalog.CARD)):
        folder = catalog.open_folder(card.parent)
        there.setdefault(folder.card["name"], folder)
    found = []
    for column in tasks.preset(name):
        for entry in column["tasks"]:
            dataset, _, task = entry.partition(":")
            if dataset not in there or task not in there[dataset].card["tasks"]:
                print(f"ecg-jax: SKIPPED {entry}: not in {', '.join(map(str, roots))}", file=sys.stderr, flush=True)
            elif ([there[dataset].path], task) not in found:
                found.append(([there[dataset].path], task))
    if not found:
        raise UsageError(f"--preset {name}: none of its data sets lies in {', '.join(map(str, roots))}")
    return found


def table(commands) -> None:
    example = "table runs/* --metric auroc --out tables"
    parser = add(commands, "table", "encoders x tasks with intervals, as Markdown and CSV", example, _run_table)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that were probed")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--metric", default="auroc", choices=("auroc", "bce", "ap", "brier"))
    parser.add_argument("--probe", default="logistic", choices=("logistic", "adam", "finetune"))
    parser.add_argument("--preset", help="its columns and their mean")
    parser.add_argument("--json", action="store_true")


def _run_table(args: argparse.Namespace) -> int:
    from ecg_jax.evaluation import report

    result = report.table(args.runs, args.out, metric=args.metric, probe=args.probe, preset=args.preset)
    for name in result["missing"]:
        print(f"ecg-jax: SKIPPED column {name}: no encoder was probed on all its tasks", file=sys.stderr, flush=True)
    show(result, args.json, lambda r: [*r["lines"], f"wrote {r['path']}"])
    return 0


def embed(commands) -> None:
    example = (
        "embed --run runs/R4 --source data/ptbxl --out ptbxl.npz\n"
        "  ecg-jax embed --run runs/R4 --source holter.npy --rate 250 --unit mV --out f.npz"
    )
    parser = add(commands, "embed", "features of raw or converted ECG, as .npz", example, _run_embed)
    parser.add_argument("--run", type=Path, required=True, dest="run_dir", metavar="DIR")
    parser.add_argument(
        "--source", type=Path, required=True, action="append", help="data folder, folder or file; repeat"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="F.npz")
    parser.add_argument("--rate", type=float, help="Hz, of .npy files")
    parser.add_argument("--unit", help="of .npy files: mV, uV, V or z")
    parser.add_argument("--leads", help="of .npy files, as I,II,V1,...; default the standard twelve")
    parser.add_argument("--json", action="store_true")


def _run_embed(args: argparse.Namespace) -> int:
    from ecg_jax.evaluation.embed import embed_source

    leads = args.leads.split(",") if args.leads else None
    result = embed_source(args.run_dir, args.source, args.out, rate=args.rate, unit=args.unit, leads=leads)
    show(result, args.json, lambda r: [f"{r['records']} records, {r['features']} features each: {r['path']}"])
    return 0
