"""The `ecg-jax` command: one subcommand per stage, each importing only its own stage.

Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 usage or configuration, 3 bad input data, 4 diverged, 5 the
machine, 75 interrupted (the same command goes on). Results go to stdout, progress and errors to stderr.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ecg_jax import __version__
from ecg_jax.errors import EcgJaxError, MachineError, UsageError, did_you_mean

MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); return the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option (`train C.toml --run DIR optim.lr=1`): they are `rest`.
    if any(word.startswith("-") or not hasattr(args, "rest") for word in rest) and not getattr(args, "later", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args) or 0
    except EcgJaxError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError:
        return _fail("out of memory: use a smaller batch or data subset", MachineError.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (`| head`) went away
        return 0
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:
            where = f" ({error.filename})" if error.filename else ""
            return _fail(f"{error.strerror}{where}", MachineError.exit_code)
        raise


def _fail(error: object, code: int) -> int:
    print("ecg-jax: error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ecg-jax",
        description="Scaling studies of electrocardiogram models: raw ECG to shards to encoders to laws.",
        epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 diverged, 5 the machine, 75 interrupted (run it again).",
    )
    parser.add_argument("--version", action="version", version=f"ecg-jax {__version__}")
    commands = parser.add_subparsers(title="stages", metavar="COMMAND", required=True)
    _convert(commands)
    _inspect(commands)
    _later(commands, "codebook", "train the VQ-HBR codebook of heartbeats", "codebook --data DIR --out DIR")
    _later(commands, "tokenize", "heartbeat codes, once per record", "tokenize --data DIR --codebook DIR")
    _train(commands)
    _later(commands, "sweep", "a grid of runs, launched and tabulated", "sweep CONFIG.toml --out DIR")
    _probe(commands)
    _later(commands, "embed", "features of raw or converted ECG", "embed --run DIR --source FILES --out F.npz")
    _fit(commands)
    _demo(commands)
    _doctor(commands)
    return parser


def _add(commands, name: str, help: str, example: str, run: Callable) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  ecg-jax {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _later(commands, name: str, help: str, example: str) -> None:
    def run(args: argparse.Namespace) -> int:
        raise UsageError(f"'{name}' is not there yet in version {__version__}; see --help for what is")

    _add(commands, name, help + " (not there yet)", example, run).set_defaults(later=True)


def _key_values(pairs: Sequence[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r}: write it as NAME=VALUE")
        options[key] = value
    return options


def _print(result: dict, as_json: bool, lines: Callable[[dict], Sequence[str]]) -> None:
    print(json.dumps(result, indent=1, default=str) if as_json else "\n".join(lines(result)), flush=True)


# ---------------------------------------------------------------------------------------------------------- convert


def _convert(commands) -> None:
    example = "convert ptbxl --source ptb-xl-1.0.3 --out data --workers 8"
    parser = _add(commands, "convert", "raw recordings to sharded TFRecords with a card", example, _run_convert)
    parser.add_argument("dataset", metavar="DATASET", help="ptbxl, wfdb, synthetic, ... ('list' prints them all)")
    parser.add_argument("--describe", action="store_true", help="print layout, options and rules of DATASET, and end")
    parser.add_argument("--source", type=Path, help="folder of the raw recordings (not for synthetic)")
    parser.add_argument("--out", type=Path, help="writes OUT/<name>/<version>/")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the data set; repeat")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    runner = "local: --workers processes; beam: an Apache Beam pipeline, OUT on a file system that all its workers see"
    parser.add_argument("--runner", choices=("local", "beam"), default="local", help=runner)
    beam = "of the pipeline, e.g. runner=FlinkRunner (default: DirectRunner, in this process); repeat"
    parser.add_argument("--beam-option", action="append", default=[], metavar="NAME=VALUE", help=beam)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N recordings")
    parser.add_argument("--shards", type=int, metavar="N", help="shards of the train split (default: by size)")
    parser.add_argument("--leads", choices=("8", "12"), default="12", help="stored leads (8: the independent ones)")
    missing = "a recording without some leads: refuse it, or store zeros and set a quality bit (default: refuse)"
    parser.add_argument("--missing-leads", choices=("refuse", "zero"), default="refuse", help=missing)
    parser.add_argument("--chain", default="default", help="filter chain: default, heartlang, none")
    parser.add_argument("--windows", choices=("all", "first"), help="long records: every 10 s window, or the first")
    against = "another data folder: list the recordings that are in both; repeat"
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="DIR", help=against)
    parser.add_argument("--pseudonymise", type=Path, metavar="KEYFILE", help="patient ids become keyed hashes")
    parser.add_argument("--strict", action="store_true", help="fail at the first refused record")
    parser.add_argument("--dry-run", action="store_true", help="counts and size, nothing written")
    parser.add_argument("--json", action="store_true", help="print the card")


def _run_convert(args: argparse.Namespace) -> int:
    import importlib
    import inspect

    from ecg_jax.datasets import DATASETS, open_source

    if args.dataset == "list":
        print("\n".join(f"{name:14} {entry.help}" for name, entry in DATASETS.items()))
        return 0
    if args.describe:
        if args.dataset not in DATASETS:
            raise UsageError(f"unknown data set {args.dataset!r}{did_you_mean(args.dataset, list(DATASETS))}")
        module = importlib.import_module(f"ecg_jax.datasets.{DATASETS[args.dataset].open.partition(':')[0]}")
        print(inspect.cleandoc(module.__doc__))
        return 0
    if args.out is None:
        raise UsageError("--out DIR is missing: where shall the shards go?")
    if args.source is None and args.dataset != "synthetic":
        raise UsageError(f"--source DIR is missing: where are the raw recordings of {args.dataset}?")
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers}: at least 1")
    from ecg_jax.shards.convert import convert

    source = open_source(args.dataset, args.source, _key_values(args.option))
    card = convert(
        source,
        args.out,
        shards=args.shards,
        workers=args.workers,
        chain=args.chain,
        leads=args.leads,
        windows=args.windows or source.default_windows,
        missing_leads=args.missing_leads,
        limit=args.limit,
        dry_run=args.dry_run,
        pseudonymise=args.pseudonymise,
        strict=args.strict,
        against=args.against,
        runner=args.runner,
        beam_options=args.beam_option,
    )
    from ecg_jax.inspection import card_lines

    _print(card, args.json, card_lines)
    return 0


# ---------------------------------------------------------------------------------------------------------- inspect


def _inspect(commands) -> None:
    example = "inspect data/ptbxl --plot ecg.png"
    parser = _add(commands, "inspect", "show a data folder's card, and one ECG on ECG paper", example, _run_inspect)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a converted data folder, or one raw record (.hea .xml .dcm)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw one 12-lead ECG, 25 mm/s and 10 mm/mV")
    parser.add_argument("--audit", type=Path, metavar="PNG", help="draw the audit: amplitudes, quality, prevalences")
    parser.add_argument("--record", metavar="ID", help="which record (default: the first of the test split)")
    parser.add_argument("--json", action="store_true")


def _run_inspect(args: argparse.Namespace) -> int:
    from ecg_jax import inspection

    if args.path.suffix.lower() in inspection.RAW:
        if args.audit:
            raise UsageError("--audit PNG: one recording has no audit; give a converted data folder")
        record = inspection.raw_record(args.path)
        result, lines = {"record": record.title}, lambda r: [r["record"]]
    else:
        result, lines = inspection.read_card(args.path), inspection.card_lines
        record = inspection.stored_record(args.path, args.record) if args.plot else None
    _print(result, args.json, lines)
    if args.plot:
        from ecg_jax.ecg_paper import draw

        draw(record, args.plot)
        print(f"{record.title} drawn to {args.plot}", file=sys.stderr)
    if args.audit:
        from ecg_jax.card_plot import draw_card

        draw_card(result, args.audit)
        print(f"audit of {result['name']} drawn to {args.audit}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------------------------------------------------ train


def _train(commands) -> None:
    example = "train configs/supervised_ptbxl.toml --run runs/R4 model.rung=R4 optim.lr=1e-3"
    parser = _add(commands, "train", "train one encoder; resumes if the run folder exists", example, _run_train)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--run", type=Path, required=True, dest="run_dir", metavar="DIR", help="the run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="print summary.json")
    parser.set_defaults(rest=[])


def _run_train(args: argparse.Namespace) -> int:
    from ecg_jax import config

    resolved = config.load(args.config, args.overrides + args.rest)
    from ecg_jax.training.loop import train

    summary = train(resolved, args.run_dir)
    _print(summary, args.json, lambda s: _summary_lines(s, args.run_dir))
    return 0


def _summary_lines(summary: dict, run_dir: Path) -> list[str]:
    losses = summary.get("losses", {})
    shown = ", ".join(f"{name} {value:.5f}" for name, value in losses.items() if isinstance(value, float))
    return [f"{summary['status']}: {shown}", f"run folder: {run_dir}"]


# ------------------------------------------------------------------------------------------------------------ probe


def _probe(commands) -> None:
    example = "probe --run runs/R4 --data data/ptbxl --task superclass"
    parser = _add(commands, "probe", "linear probe on frozen features, with intervals", example, _run_probe)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="run folder with an encoder")
    which.add_argument("--features", type=Path, metavar="F.npz", help="features made elsewhere (not there yet)")
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="DIR", help="data folder; repeat")
    parser.add_argument("--task", required=True)
    parser.add_argument("--out", type=Path, help="default: the run folder")
    parser.add_argument("--seed", type=int, action="append", help="probe seed; repeat for several")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="patient resamples")
    parser.add_argument("--json", action="store_true")


def _run_probe(args: argparse.Namespace) -> int:
    if args.features:
        raise UsageError("--features is not there yet; probe a run folder with --run DIR")
    from ecg_jax.evaluation.probe import probe_run, result_lines

    data = args.data if len(args.data) > 1 else args.data[0]
    seeds = tuple(args.seed or (0,))
    result = probe_run(args.run_dir, data, args.task, out=args.out, seeds=seeds, bootstrap=args.bootstrap)
    _print(result, args.json, result_lines)
    return 0


# -------------------------------------------------------------------------------------------------------------- fit


def _fit(commands) -> None:
    example = "fit runs/* --out report"
    parser = _add(commands, "fit", "scaling laws and multipliers with intervals, and a report", example, _run_fit)
    parser.add_argument(
        "tables", nargs="+", type=Path, metavar="EVALS|RUNS", help="eval logs (JSONL, CSV), run folders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--form", default="auto")
    parser.add_argument("--loss", default="log-huber", help="log-huber, lad, ls, ls-log")
    parser.add_argument("--delta", type=float, help="of log-huber (default: 1.345 robust standard deviations)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N")
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", default="", metavar="n_params=N,value=loss", help="names of the table's columns")
    parser.add_argument("--melt", default="", metavar="loss_id,loss_ood_a", help="loss columns of a wide table")
    parser.add_argument("--metric", help="of several in the table, the one to fit")
    parser.add_argument("--predict", type=Path, metavar="TABLE", help="runs planned or held back, to be predicted")
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
        columns=_key_values([pair for pair in args.columns.split(",") if pair]),
        melt=[name for name in args.melt.split(",") if name],
        metric=args.metric,
        predict=args.predict,
        title=args.title,
    )
    _print(result, args.json, result_lines)
    return 0


# ----------------------------------------------------------------------------------------------------- demo, doctor


def _demo(commands) -> None:
    parser = _add(
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


def _doctor(commands) -> None:
    parser = _add(
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
    _print(result, args.json, report_lines)
    return 0 if not result["problems"] else MachineError.exit_code


if __name__ == "__main__":
    sys.exit(main())
