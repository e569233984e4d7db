"""`sweep`: a grid of runs, planned, launched, gone on with, and tabulated."""

import argparse
from pathlib import Path

from ecg_jax.commands.common import add, key_values, show


def sweep(commands) -> None:
    example = (
        "sweep configs/study.toml --out study --dry-run --device h200\n"
        "  ecg-jax sweep configs/sweep_smoke.toml --out sweep\n"
        "  ecg-jax sweep configs/study.toml --out study --devices 0,1,2,3 data.code.folders='[\"/fast/code\"]'\n"
        "  ecg-jax sweep configs/study.toml --out study --launcher slurm --workers 8 --slurm slurm_gpus_per_node=1 "
        "--slurm timeout_min=1440"
    )
    what = "a grid of runs with learning-rate trials and probes; the same command goes on after any kill"
    parser = add(commands, "sweep", what, example, _run_sweep, goes_on=True)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs, trials, runs.csv; begun or not")
    parser.add_argument("overrides", nargs="*", metavar="table.key=value")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--dry-run", action="store_true", help="every run's size, FLOPs, hours and memory; runs nothing")
    plan.add_argument("--device", default="h200", metavar="NAME", help="hours on: h200 h100 a100 tpu-v5p two-cores ...")
    plan.add_argument("--measured", type=Path, metavar="CSV", help="speeds, of tools/bench_step.py --csv")
    launch = parser.add_argument_group("launch")
    launch.add_argument("--launcher", choices=("local", "slurm"), default="local")
    launch.add_argument(
        "--devices", default="auto", metavar="0,1|cpu|tpu", help="of this machine (default: all there are)"
    )
    launch.add_argument(
        "--per-device", type=int, default=0, metavar="N", help="runs packed on a GPU, or groups of cores on a CPU"
    )
    launch.add_argument("--workers", type=int, default=1, metavar="N", help="tasks of the Slurm array")
    launch.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE", help="parameter of submitit's executor; repeat"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(rest=[])


def _run_sweep(args: argparse.Namespace) -> int:
    from ecg_jax.sweep import spec

    found = spec.load(args.config, args.overrides + args.rest)
    if args.dry_run:
        from ecg_jax.sweep import cost, dry

        show(dry.dry_run(found, args.out, cost.device(args.device, args.measured)), args.json, dry.result_lines)
        return 0
    from ecg_jax.sweep import launch

    slurm = {key: int(value) if value.isdigit() else value for key, value in key_values(args.slurm).items()}
    result = launch.sweep(
        found,
        args.out,
        launcher=args.launcher,
        devices=args.devices,
        per_device=args.per_device,
        workers=args.workers,
        slurm=slurm,
        quiet=args.quiet,
    )
    show(result, args.json, launch.result_lines)
    return 0
