"""The errors a user can cause or meet, each with the exit code of the `ecg-jax` command.

A message is one line and names what is wrong, where (file, record, field) and what to do about it. Anything that is
not an `EcgJaxError` is a bug of ours: it keeps its traceback and exits 1.
"""


class EcgJaxError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 1


class UsageError(EcgJaxError):
    """Wrong command line or configuration."""

    exit_code = 2


class DataError(EcgJaxError):
    """Bad input data: unreadable, inconsistent, of another version, or not what was asked for."""

    exit_code = 3


class DivergedError(EcgJaxError):
    """Training left the finite numbers."""

    exit_code = 4


class MachineError(EcgJaxError):
    """The machine failed: disk, memory, device, or a lost peer."""

    exit_code = 5


class InterruptedRun(EcgJaxError):
    """Stopped by a signal; the same command goes on from where it stopped."""

    exit_code = 75


def did_you_mean(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """`' (did you mean X?)'` for a near miss among `known`, else the empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
