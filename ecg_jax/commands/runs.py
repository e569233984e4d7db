"""`train`: from data folders to encoders."""

import argparse
import os
from pathlib import Path

from ecg_jax.commands.common import add, show


def train(commands) -> None:
    example = "train configs/supervised_ptbxl.toml --run runs/R4 model.rung=R4 optim.lr=1e-3"
    what = "train one encoder; resumes if the run folder exists"
    parser = add(commands, "train", what, example, _run_train, goes_on=True)
    several = "sbatch --nodes=2 tools/launch_slurm.sh CONFIG.toml --run DIR   (TPU: tools/launch_tpu.sh)"
    parser.epilog += f"\n\nseveral hosts:\n  {several}"
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--run", type=Path, required=True, dest="run_dir", metavar="DIR", help="the run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="print summary.json")
    parser.set_defaults(rest=[])


def _run_train(args: argparse.Namespace) -> int:
    from ecg_jax import config

    resolved = config.load(args.config, args.overrides + args.rest)
    from ecg_jax.training import folder, hosts, runtime
    from ecg_jax.training.loop import train

    if not any(map(os.environ.get, hosts.VARIABLES)):  # several processes share the machine's cores between them
        runtime.spread(resolved, folder.devices(args.run_dir))
    try:
        summary = train(resolved, args.run_dir)
    except Exception as error:
        hosts.leave(error)
        raise
    if not hosts.first():
        return 0
    show(summary, args.json, lambda s: _summary_lines(s, args.run_dir))
    return 0


def _summary_lines(summary: dict, run_dir: Path) -> list[str]:
    losses = summary.get("losses", {})
    shown = ", ".join(f"{name} {value:.5f}" for name, value in losses.items() if isinstance(value, float))
    return [f"{summary['status']}: {shown}", f"run folder: {run_dir}"]
