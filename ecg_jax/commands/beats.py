"""`codebook` and `tokenize`: codes of heartbeats, from the shards or from published weights."""

import argparse
import json
from pathlib import Path

from ecg_jax.commands.common import add, show
from ecg_jax.errors import UsageError


def codebook(commands) -> None:
    example = (
        "codebook configs/codebook.toml --data data/ptbxl --data data/georgia --out books/own\n"
        "  ecg-jax codebook --import heartlang.pth --out books/heartlang"
    )
    what = "a codebook of heartbeats (VQ-HBR): trained on shards, or out of HeartLang's published weights"
    parser = add(commands, "codebook", what, example, _run_codebook, goes_on=True)
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="(default: HeartLang's sizes)")
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="DIR", help="data folder; repeat")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run and codebook folder; resumes")
    parser.add_argument("--import", type=Path, dest="published", metavar="FILE", help="a checkpoint, never executed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="print summary.json")
    parser.set_defaults(rest=[])


def _run_codebook(args: argparse.Namespace) -> int:
    words = ([str(args.config)] if args.config else []) + args.overrides + args.rest
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if args.published:
        if words or args.data:
            raise UsageError("--import takes only --out: published weights are not trained")
        from ecg_jax import codebook

        found = codebook.import_published(args.published, args.out)
        show(found, args.json, lambda f: [f"codebook {f['id']}: {f['codes']:,} codes of {f['code_dim']}, {args.out}"])
        return 0
    if len(files) > 1:
        raise UsageError(f"one CONFIG.toml, not {', '.join(files)}")
    from ecg_jax import config

    changed = ["objective.name=codebook", *overrides]
    if args.data:
        changed.insert(0, f"data.folders={json.dumps([str(folder) for folder in args.data])}")
    resolved = config.load(files[0], changed) if files else config.override(config.Config(), changed)
    from ecg_jax.training.loop import train

    summary = train(resolved, args.out)
    show(summary, args.json, lambda s: _book_lines(s, args.out))
    return 0


def _book_lines(summary: dict, out: Path) -> list[str]:
    losses = ", ".join(f"{name} {value:.5f}" for name, value in summary["losses"].items() if value is not None)
    usage = summary["codes"]
    used = f"{usage['used']:,} of {usage['codes']:,} codes used, perplexity {usage['perplexity']:.1f}"
    return [f"{summary['status']}: {losses}", f"codebook {summary['codebook']}: {used}", f"codebook folder: {out}"]


def tokenize(commands) -> None:
    example = "tokenize --data data/ptbxl --codebook books/own"
    what = "codes of heartbeats, once per record, beside the shards"
    parser = add(commands, "tokenize", what, example, _run_tokenize)
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR", help="data folder; repeat")
    parser.add_argument("--codebook", type=Path, required=True, metavar="DIR", help="of `ecg-jax codebook`")
    beats = "how beats are found and cut (default: as the codebook's were)"
    parser.add_argument("--beats", choices=("robust", "heartlang"), help=beats)
    parser.add_argument("--json", action="store_true")


def _run_tokenize(args: argparse.Namespace) -> int:
    from ecg_jax.tokenize import result_lines, tokenize

    show(tokenize(args.data, args.codebook, beats=args.beats), args.json, result_lines)
    return 0
