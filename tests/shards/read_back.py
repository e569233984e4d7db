"""What the tests read of a data folder."""

import json
from pathlib import Path

from ecg_jax.shards import schema
from ecg_jax.shards.catalog import open_folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, whole."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(path: Path, split: str) -> list[dict]:
    """The records of a split."""
    return [schema.decode(p) for shard in open_folder(path).shards(split) for p in schema.read_frames(shard.path)]


def quarantine(path: Path) -> list[dict]:
    """The lines of quarantine.jsonl."""
    return [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]
