"""`fit`, `demo` and `doctor`: laws out of eval logs, the whole path at once, and the state of the machine."""

import argparse
import re
from pathlib import Path

from ecg_jax.commands.common import add, key_values, show
from ecg_jax.errors import MachineError


def fit(commands) -> None:
    example = "fit runs/* --out report"
    parser = add(commands, "fit", "scaling laws and multipliers with intervals, and a report", example, _run_fit)
    parser.add_argument(
        "tables", nargs="+", type=Path, metavar="EVALS|RUNS", help="eval logs (JSONL, CSV), run folders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--form",
        default="auto",
        help="auto (the one that extrapolates best); of N and D: hoffmann, kaplan, kaplan0, coupled, overfitting, "
        "data-constrained; of one: power, power0, shifted, broken, m1 to m4; of the ID loss: loss-to-loss",
    )
    parser.add_argument("--loss", default="log-huber", help="log-huber, lad, ls, ls-log, student-t, envelope")
    parser.add_argument("--delta", type=float, help="of log-huber (default: 1.345 robust standard deviations)")
    parser.add_argument("--fix", default="", metavar="E=0.07,beta=alpha", help="parameters held at a number or tied")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--resample",
        default="auto",
        help="auto (wild, or case for large scattered designs), case, wild, residual, parametric",
    )
    parser.add_argument(
        "--weights",
        default="equal",
        help="equal, or variance (of repeated seeds and of the evaluation: ci_low, ci_high)",
    )
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", default="", metavar="n_params=N,value=loss", help="names of the table's columns")
    parser.add_argument("--melt", default="", metavar="loss_id,loss_ood_a", help="loss columns of a wide table")
    parser.add_argument("--metric", help="of several in the table, the one to fit")
    parser.add_argument("--predict", type=Path, metavar="TABLE", help="runs planned or held back, to be predicted")
    parser.add_argument(
        "--probes", type=Path, action="append", default=[], metavar="CSV", help="of `ecg-jax table`, shown; repeat"
    )
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--json", action="store_true")


def _run_fit(args: argparse.Namespace) -> int:
    from ecg_jax.scaling.fit import fit, result_lines

    result = fit(
        args.tables,
        args.out,
        form=args.form,
        loss=args.loss,
        delta=args.delta,
        bootstrap=args.bootstrap,
        level=args.level,
        seed=args.seed,
        columns=key_values([pair for pair in args.columns.split(",") if pair]),
        melt=[name for name in args.melt.split(",") if name],
        metric=args.metric,
        predict=args.predict,
        fixed=_fixed(args.fix),
        title=args.title,
        probes=args.probes,
        resample=args.resample,
        weights=args.weights,
    )
    show(result, args.json, result_lines)
    return 0


def _fixed(text: str) -> dict[str, float | str]:
    """`E=0.07,beta=alpha` as {"E": 0.07, "beta": "alpha"}."""
    pairs = key_values([pair for pair in text.split(",") if pair])
    return {k: float(v) if re.fullmatch(r"[-+.\deE]*\d[-+.\deE]*", str(v)) else str(v) for k, v in pairs.items()}


def demo(commands) -> None:
    parser = add(
        commands,
        "demo",
        "all of it on simulated ECG: two CPU cores, five minutes",
        "demo --out demo",
        _run_demo,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a second run reuses what is done")
    parser.add_argument("--seed", type=int, default=0)


def _run_demo(args: argparse.Namespace) -> int:
    from ecg_jax.demo import demo

    demo(args.out, seed=args.seed)
    return 0


def doctor(commands) -> None:
    parser = add(
        commands,
        "doctor",
        "versions, devices, caches; what is wrong and how to mend it",
        "doctor",
        _run_doctor,
    )
    parser.add_argument("--json", action="store_true")


def _run_doctor(args: argparse.Namespace) -> int:
    from ecg_jax.doctor import examine, report_lines

    result = examine()
    show(result, args.json, report_lines)
    return 0 if not result["problems"] else MachineError.exit_code
