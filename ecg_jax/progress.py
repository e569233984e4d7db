"""One progress bar for the whole command: on a terminal a live bar, in a log file a line now and then.

Nothing is drawn for work that ends within two seconds. Output goes to stderr, so that stdout stays for results.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DELAY = 2.0  # seconds of silence before anything is shown
LOG_EVERY = 15.0  # seconds between lines where stderr is no terminal


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield `items`, showing how far along they are. `total` is needed where `items` has no length."""
    total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)
    if sys.stderr.isatty():
        yield from _bar(items, what, total)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - start > DELAY and now - last > LOG_EVERY:
            last = now
            print(f"{what}: {done}{f'/{total}' if total else ''} {unit}".rstrip(), file=sys.stderr, flush=True)


def _bar(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    start = time.monotonic()
    shown = False
    task = bar.add_task(what, total=total)
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - start > DELAY:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
