"""The record of when a test split was opened: once for each run, data set, task and probe.

`Openings` keeps `openings.jsonl` beside the predictions: one line an opening, with the choice that was made before it.
The same choice may be scored again (it gives the same numbers); another one is refused, unless the caller says so, and
that is recorded too. It opens nothing itself. Invariant: what stands in the file is never taken out.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecg_jax import files
from ecg_jax.errors import DataError, UsageError

NAME = "openings.jsonl"


def digest(choice: Mapping[str, Any]) -> str:
    """16 hex digits of a choice: settings, encoder and data."""
    return hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]


class Openings:
    """The openings recorded in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: not a record of openings ({error})") from None

    def settle(self, asked: Mapping[str, Mapping[str, Any]], reopen: bool) -> None:
        """Record that the test split is now opened for each of `asked`, name -> choice.

        Raises UsageError, with nothing recorded, where a name was opened with another choice before and not `reopen`.
        """
        before = {entry["opened"]: entry for entry in self.entries}
        new = []
        for name, choice in asked.items():
            entry = {"opened": name, "choice": digest(choice), "settings": dict(choice), "reopened": name in before}
            if name in before and before[name]["choice"] == entry["choice"]:
                continue
            if name in before and not reopen:
                old = before[name]["settings"]
                other = [key for key in choice if choice[key] != old.get(key)] or sorted(set(old) - set(choice))
                raise UsageError(
                    f"{self.path}: the test split of {name} was opened before with other {', '.join(other)}; choosing "
                    "again after seeing the test makes its numbers optimistic: --reopen does it and records it"
                )
            new.append(entry)
        if new:
            self.entries += new
            files.write(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
