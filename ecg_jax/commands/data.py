"""`convert` and `inspect`: from raw recordings to data folders, and a look into them."""

import argparse
import os
import sys
from pathlib import Path

from ecg_jax.commands.common import add, key_values, show
from ecg_jax.errors import UsageError, did_you_mean


def convert(commands) -> None:
    example = "convert ptbxl --source ptb-xl-1.0.3 --out data --workers 8"
    parser = add(commands, "convert", "raw recordings to sharded TFRecords with a card", example, _run_convert)
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="ptbxl, wfdb, synthetic, ...; 'list' prints them all; 'refresh' finds R peaks anew",
    )
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
    if args.dataset == "refresh":
        return _refresh(args)
    if args.out is None:
        raise UsageError("--out DIR is missing: where shall the shards go?")
    if args.source is None and args.dataset != "synthetic":
        raise UsageError(f"--source DIR is missing: where are the raw recordings of {args.dataset}?")
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers}: at least 1")
    from ecg_jax.shards.convert import convert

    source = open_source(args.dataset, args.source, key_values(args.option))
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

    show(card, args.json, card_lines)
    return 0


def _refresh(args: argparse.Namespace) -> int:
    """A data folder of an older release with R peaks of this one, without the raw recordings."""
    if args.source is None or args.out is None:
        raise UsageError("convert refresh needs --source OUT/<name>/<version> of a data folder, and another --out DIR")
    from ecg_jax.inspection import card_lines
    from ecg_jax.shards.refresh import refresh

    show(refresh(args.source, args.out), args.json, card_lines)
    return 0


def inspect(commands) -> None:
    example = "inspect data/ptbxl --plot ecg.png"
    parser = add(commands, "inspect", "show a data folder's card, and one ECG on ECG paper", example, _run_inspect)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a data folder, its codes, or one raw record (.hea .xml .dcm)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw one 12-lead ECG, 25 mm/s and 10 mm/mV")
    parser.add_argument("--audit", type=Path, metavar="PNG", help="draw the audit: amplitudes, quality, prevalences")
    parser.add_argument("--verify", action="store_true", help="read every file of a data folder, check every digest")
    parser.add_argument("--record", metavar="ID", help="which record (default: the first of the test split)")
    parser.add_argument("--json", action="store_true")


def _run_inspect(args: argparse.Namespace) -> int:
    from ecg_jax import inspection

    if args.verify:
        return _verify(args)
    if args.path.name.startswith("codes-"):
        return _inspect_codes(args)
    if args.path.suffix.lower() in inspection.RAW:
        if args.audit:
            raise UsageError("--audit PNG: one recording has no audit; give a converted data folder")
        record = inspection.raw_record(args.path)
        result, lines = {"record": record.title}, lambda r: [r["record"]]
    else:
        result, lines = inspection.read_card(args.path), inspection.card_lines
        record = inspection.stored_record(args.path, args.record) if args.plot else None
    show(result, args.json, lines)
    if args.plot:
        from ecg_jax.ecg_paper import draw

        draw(record, args.plot)
        print(f"{record.title} drawn to {args.plot}", file=sys.stderr)
    if args.audit:
        from ecg_jax.card_plot import draw_card

        draw_card(result, args.audit)
        print(f"audit of {result['name']} drawn to {args.audit}", file=sys.stderr)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ecg_jax import inspection
    from ecg_jax.errors import DataError
    from ecg_jax.shards.schema import REPAIR

    result = inspection.verify(args.path)
    show(result, args.json, inspection.verified_lines)
    if count := len(result["damaged"]):
        what = "1 file is" if count == 1 else f"{count} files are"
        raise DataError(f"{result['path']}: {what} not what card.json names, {result['damaged'][0]}; {REPAIR}")
    return 0


def _inspect_codes(args: argparse.Namespace) -> int:
    if args.audit or args.record:
        raise UsageError("--audit and --record are for data folders; codes have --plot PNG")
    from ecg_jax import codes_plot

    show(codes_plot.read_card(args.path), args.json, codes_plot.card_lines)
    if args.plot:
        found = codes_plot.draw(args.path, args.plot)
        print(f"{found['beats']:,} beats, {found['used']:,} codes drawn to {args.plot}", file=sys.stderr)
    return 0
