"""Values of a sweep's TOML file: one conversion for each kind, which names the key and what was wanted.

A conversion is `convert(value, where) -> value`, raising UsageError in one line that begins with `where`. Knows nothing
of what the values mean to a sweep.
"""

import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.models import ladder

REQUIRED = object()


def read(entry: Mapping[str, Any], kinds: Mapping[str, tuple[Callable, Any]], where: str) -> dict[str, Any]:
    """{key: value} of all of `kinds` (key -> (conversion, default)), nothing else allowed."""
    for key in entry:
        if key not in kinds:
            hint = did_you_mean(key, list(kinds)) or f"; known: {', '.join(kinds)}"
            raise UsageError(f"{where}: unknown key {key!r}{hint}")
    for key, (_, default) in kinds.items():
        if default is REQUIRED and key not in entry:
            raise UsageError(f"{where}: {key} is missing")
    return {k: kind(entry[k], f"{where}: {k}") if k in entry else default for k, (kind, default) in kinds.items()}


def bad(where: str, value: Any, want: str) -> UsageError:
    return UsageError(f"{where} = {value!r}: must be {want}")


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad(where, value, "a string")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise bad(where, value, "true or false")
    return value


def whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise bad(where, value, "a whole number, 0 or more")
    return value


def positive(value: Any, where: str) -> int:
    if whole(value, where) < 1:
        raise bad(where, value, "1 or more")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise bad(where, value, "a table of key = value lines")
    return value


def mappings(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise bad(where, value, "written with double brackets, one [[...]] for each")
    return tuple(value)


def many(value: Any, where: str, want: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise bad(where, value, want)
    if len({repr(item) for item in value}) < len(value):
        raise UsageError(f"{where} = {value!r}: names something twice")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(text(item, where) for item in many(value, where, 'a list of strings, as ["a", "b"]'))


def names(*known: str) -> Callable[[Any, str], tuple[str, ...]]:
    def convert(value: Any, where: str) -> tuple[str, ...]:
        for item in texts(value, where):
            if item not in known:
                raise UsageError(f"{where}: {item!r} is none of {', '.join(known)}{did_you_mean(item, known)}")
        return tuple(value)

    convert.known = known
    return convert


def one_of(*known: str) -> Callable[[Any, str], str]:
    return lambda value, where: names(*known)([value], where)[0]


def wholes(value: Any, where: str) -> tuple[int, ...]:
    return tuple(whole(item, where) for item in many(value, where, "a list of whole numbers"))


def numbers(value: Any, where: str) -> tuple[float, ...]:
    out = []
    for item in many(value, where, 'a list of numbers, as [0.1, "1/3"]'):
        try:
            out.append(float(Fraction(item)) if isinstance(item, str) else float(item))
        except (TypeError, ValueError, ZeroDivisionError):
            raise bad(where, item, 'a number, or a fraction as "1/3"') from None
    return tuple(out)


def shares(value: Any, where: str) -> tuple[float, ...]:
    found = numbers(value, where)
    if not all(0 < share <= 1 for share in found):
        raise bad(where, value, "shares in (0, 1]")
    return found


def offsets(value: Any, where: str) -> tuple[float, ...]:
    found = numbers(value, where)
    if not all(0 <= offset < 1 for offset in found):
        raise bad(where, value, "places in [0, 1)")
    return found


def rates(value: Any, where: str) -> tuple[float, ...]:
    """At least two, ascending in one ratio up to rounding: only then is it clear how the grid goes on at its edges."""
    found = numbers(value, where)
    good = len(found) > 1 and found[0] > 0 and found[1] > found[0]
    ratio = found[1] / found[0] if good else 1.0
    if not good or any(abs(b / a / ratio - 1) > 0.2 for a, b in itertools.pairwise(found)):
        raise bad(where, value, "at least two rates that ascend in one ratio, as [1e-3, 3e-3, 1e-2]")
    return found


def rungs(value: Any, where: str) -> tuple[str, ...]:
    """Whole numbers, "d1" (a demonstration rung), or "1-8"."""
    out: list[str] = []
    for item in [value] if isinstance(value, str) else many(value, where, 'a list of rungs, as [1, 2] or "1-8"'):
        first, dash, last = str(item).partition("-")
        known = not isinstance(item, bool) and (
            first.isdigit() and last.isdigit() if dash else f"R{first}" in ladder.RUNGS
        )
        if not known:
            raise UsageError(f'{where}: {item!r} is no rung; write 1 to 12, "1-8", or "d1"')
        out += [str(n) for n in range(int(first), int(last) + 1)] if dash else [first]
    if not out or any(f"R{rung}" not in ladder.RUNGS for rung in out) or len(set(out)) < len(out):
        raise bad(where, value, "rungs from 1 to 12, each once")
    return tuple(out)
