"""What the subcommands share: how one is added, how words become options, how a result is shown."""

import argparse
import json
from collections.abc import Callable, Sequence

from ecg_jax import stops
from ecg_jax.errors import UsageError


def add(commands, name: str, help: str, example: str, run: Callable, goes_on: bool = False) -> argparse.ArgumentParser:
    """The parser of one subcommand; `run(args)` returns its exit code, None for 0. goes_on: the same command takes up
    what SIGTERM or SIGINT ended, from the first import on.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  ecg-jax {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_stoppable(run) if goes_on else run)
    return parser


def _stoppable(run: Callable) -> Callable:
    def inside(args: argparse.Namespace) -> int:
        with stops.at_once():
            return run(args)

    return inside


def key_values(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a dictionary. Raises UsageError for a word without `=`."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r}: write it as NAME=VALUE")
        options[key] = value
    return options


def show(result: dict, as_json: bool, lines: Callable[[dict], Sequence[str]]) -> None:
    """A result for a program that reads it, or as `lines` for a person."""
    print(json.dumps(result, indent=1, default=str) if as_json else "\n".join(lines(result)), flush=True)
