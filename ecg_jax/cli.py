"""The `ecg-jax` command: one subcommand per stage, each importing only its own stage.

Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 usage or configuration, 3 bad input data, 4 diverged, 5 the
machine, 75 interrupted (the same command goes on). Results go to stdout, progress and errors to stderr.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from ecg_jax import __version__
from ecg_jax.commands import beats, data, probes, runs, study, sweep
from ecg_jax.errors import EcgJaxError, MachineError

MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); return the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option (`train C.toml --run DIR optim.lr=1`): they are `rest`.
    if any(word.startswith("-") or not hasattr(args, "rest") for word in rest):
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
    data.convert(commands)
    data.inspect(commands)
    beats.codebook(commands)
    beats.tokenize(commands)
    runs.train(commands)
    sweep.sweep(commands)
    probes.probe(commands)
    probes.table(commands)
    probes.embed(commands)
    study.fit(commands)
    study.demo(commands)
    study.doctor(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
