"""Keyed hashes in place of patient and record ids.

Invariant: the same id gives the same 32 hex digits under one key, in every data set, and nothing leads back without it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ecg_jax.errors import UsageError


@dataclass(frozen=True)
class Pseudonyms:
    """Keyed blake2b of ids: the same id gives the same 32 hex digits under one key, and no way back without
    it."""

    key: bytes

    @classmethod
    def load(cls, path: Path) -> "Pseudonyms":
        """The secret in the file at `path`. Raises UsageError where it cannot be read or is short."""
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise UsageError(f"--pseudonymise {path}: {error.strerror or error}") from None
        if len(secret) < 16:
            raise UsageError(f"--pseudonymise {path}: holds {len(secret)} bytes, a key needs at least 16 random ones")
        return cls(hashlib.blake2b(secret, digest_size=32).digest())

    def __call__(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), digest_size=16, key=self.key).hexdigest()

    @property
    def check(self) -> str:
        """Tells keys apart without giving them away."""
        return hashlib.blake2b(b"", digest_size=4, key=self.key, person=b"check").hexdigest()
