"""What to say when the memory of a device runs out, or a device fails: one line, with a batch that would fit.

Called after the fact; it measures nothing while training runs. Invariant: what is none of the machine's faults keeps
its traceback.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ecg_jax.config import Config
from ecg_jax.errors import EcgJaxError, MachineError
from ecg_jax.training import hosts

EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc")
SHARE = 0.95  # of a device's limit that a program may plan with


class Account:
    """Remembers a program and the shapes it was called with, to ask it how much memory it needs."""

    def __init__(self) -> None:
        self._program: Any = None
        self._shapes: Any = None

    def keep(self, program: Callable, *args: Any) -> None:
        """To be called before the arguments are given away."""
        self._shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), args)
        self._program = program

    def begun(self) -> bool:
        """Whether anything was dispatched."""
        return self._program is not None

    def sizes(self) -> tuple[int, int] | None:
        """Bytes on a device that do not depend on the batch (state, records) and that do, of one program."""
        try:
            found = self._program.lower(*self._shapes).compile().memory_analysis()
            return found.argument_size_in_bytes, found.temp_size_in_bytes
        except Exception:  # whatever a backend without such an account raises
            return None


def largest_batch(batch: int, unit: int, sizes: tuple[int, int] | None, limit: float | None) -> int:
    """A batch, a multiple of `unit` below `batch`, that would fit; 0 if none. Half where the account is not known.

    Args:
        sizes: as `Account.sizes`, for `batch`.
        limit: bytes of a device.
    """
    most = batch / 2
    if sizes is not None and limit is not None:
        fixed, grows = sizes
        most = min(batch - unit, batch * (SHARE * limit - fixed) / max(grows, 1))
    return max(int(most // unit) * unit, 0)


def explained(error: Exception, account: Account, config: Config, run_dir: Path) -> EcgJaxError | None:
    """What a failure of the devices means, None where it is not the machine's."""
    text = " ".join(str(error).split())
    if not any(word in text for word in EXHAUSTED):
        return hosts.lost(error) if hosts.count() > 1 else None
    wanted = text[:120]
    if not account.begun():
        return MachineError(
            f"{run_dir}: the records, or the model, do not fit the memory of the device ({wanted}): set "
            "train.loader=host, which keeps the training records off it, or take a smaller model.rung"
        )
    train = config.train
    unit = train.lanes * train.accumulate
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    fits = largest_batch(train.batch, unit, account.sizes(), limit)
    even = (k for k in range(2, train.batch // train.lanes + 1) if train.batch % (unit * k) == 0)
    parts = next((k for k in even if train.batch // k <= fits), 0)
    ways = [f"train.batch={fits} would fit"] if fits else []
    ways += [f"train.accumulate={parts * train.accumulate} makes the same update in parts"] if parts else []
    remedy = " (in a new run folder), ".join(ways) or "set train.loader=host or take a smaller model.rung"
    return MachineError(f"{run_dir}: out of memory in a step with train.batch={train.batch}: {remedy} ({wanted})")
