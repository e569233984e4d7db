"""Results that come back from the devices: read late, in order, turned into log lines and the best state.

The loop says what it has sent and how many results may stay unread; it decides nothing here. Invariant: what
is written and what the controller is told depends on the order of sending alone, never on when a result was
ready.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ecg_jax.errors import DivergedError
from ecg_jax.training import hosts, metrics
from ecg_jax.training.recipe import Controller
from ecg_jax.training.step import State

BAD_STEPS = 20  # non-finite steps in a row that end a run as diverged
SAID = (1, 10, 100, 1000)  # how many non-finite steps are worth a line on stderr


@dataclass(frozen=True)
class Sent:
    """A dispatched computation whose result has not been read: steps, or the evaluation of `candidate`."""

    step: int
    update: int
    phase: str
    lr: float
    values: Any
    candidate: State | None


class Results:
    """The queue of unread results of one run, and what the read ones amount to.

    best is the state with the lowest loss on `val` (None before the first), last_loss the mean training loss of the
    last line written. `mean` makes the loss of an evaluation's sums, as `step.Objective.mean`; `mfu` the use of the
    devices out of records a second, None where their peak is not known.
    """

    def __init__(
        self,
        control: Controller,
        log: metrics.Log,
        timing: metrics.Log,
        clock: metrics.Clock,
        mean: Callable[[np.ndarray], float],
        log_every: int,
        batch: int,
        mfu: Callable[[float], float | None],
    ) -> None:
        self.best: State | None = None
        self.last_loss: float | None = None
        self._control, self._log, self._timing, self._clock = control, log, timing, clock
        self._mean, self._every, self._batch, self._mfu = mean, log_every, batch, mfu
        self._window = metrics.Window()
        self._queue: deque[Sent] = deque()
        self._newest: Sent | None = None  # of the steps read
        self._skipped = 0  # steps that were not finite, in this process
        self._line_began = clock.spent() | {"update": control.update}

    def sent_steps(self, values: list[dict[str, Any]], lr: float) -> None:
        """The dispatch that the controller has just been advanced by; `lr` is its last step's rate."""
        control = self._control
        self._queue.append(Sent(control.step, control.update, control.phase, lr, values, None))

    def sent_evaluation(self, sums: Any, candidate: State) -> None:
        """An evaluation of `candidate`, which must be a copy that nobody changes."""
        control = self._control
        self._queue.append(Sent(control.step, control.update, control.phase, 0.0, sums, candidate))

    def evaluating(self) -> bool:
        """Whether an evaluation has been sent and not read."""
        return any(sent.candidate is not None for sent in self._queue)

    def read(self, keep: int = 0) -> None:
        """Read results in the order of sending until `keep` are left.

        Raises:
            DivergedError: `BAD_STEPS` non-finite steps in a row.
        """
        while len(self._queue) > keep:
            sent = self._queue.popleft()
            if sent.candidate is None:
                self._take_steps(sent)
            else:
                self._take_evaluation(sent)

    def end_line(self) -> None:
        """Write a line for the steps since the last one, if there are any."""
        if self._newest is not None and not self._window.empty():
            self._write_line(self._newest)

    def selected(self) -> State:
        """The best state.

        Raises:
            DivergedError: no evaluation gave a finite loss.
        """
        if self.best is None:
            raise DivergedError("diverged: no loss on val was finite; lower optim.lr")
        return self.best

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint needs; everything sent must have been read."""
        return {"window": self._window.sums, "last_loss": self.last_loss}

    def resume(self, saved: dict[str, Any], best: State | None) -> None:
        """Inverse of `to_json`."""
        self._window, self.last_loss, self.best = metrics.Window(saved["window"]), saved["last_loss"], best
        self._line_began = self._clock.spent() | {"update": self._control.update}

    def _take_steps(self, sent: Sent) -> None:
        parts = [{name: np.atleast_1d(v) for name, v in part.items()} for part in metrics.read(sent.values)]
        steps = {name: np.concatenate([part[name] for part in parts]).tolist() for name in parts[0]}
        count = len(steps["loss"])
        self._newest = sent
        for i in range(count):
            self._window.add({name: values[i] for name, values in steps.items()})
            if steps["skipped"][i]:
                self._skipped += 1
                if self._skipped in SAID:
                    hosts.say(
                        f"warning: step {sent.step - count + i + 1}: loss or gradient not finite, the update is left "
                        f"out ({self._skipped} so far; train/skipped in metrics.jsonl has them all)"
                    )
            if steps["row"][i] >= BAD_STEPS:
                raise DivergedError(
                    f"diverged: {BAD_STEPS} steps in a row were not finite, the last at step "
                    f"{sent.step - count + i + 1} (learning rate {sent.lr:.3g}); lower optim.lr"
                )
        if sent.update // self._every > (sent.update - count) // self._every:
            self._write_line(sent)

    def _take_evaluation(self, sent: Sent) -> None:
        with self._clock.of("eval"):
            loss = self._mean(metrics.read(sent.values))
        if self._control.saw(sent.step, sent.update, loss):
            self.best = sent.candidate
        self._log.write(self._where(sent) | {"val/loss": loss, "val/best": self._control.best_loss})

    def _write_line(self, sent: Sent) -> None:
        means = self._window.mean()
        self.last_loss = means["loss"]
        named = {f"train/{name}": value for name, value in means.items() if name != "row"}
        self._log.write(self._where(sent) | {"lr": sent.lr} | named)

        now, began = self._clock.spent() | {"update": sent.update}, self._line_began
        passed = {name: now[name] - began[name] for name in now}
        busy = max(passed["train"] + passed["input_wait"], 1e-9)
        speed = passed["update"] * self._batch / busy
        shown = {"ecg_per_s": speed, "input_wait_frac": passed["input_wait"] / busy, "mfu": self._mfu(speed)}
        self._timing.write({"update": sent.update} | shown | {"wall": now["wall"]})
        self._line_began = now

    def _where(self, sent: Sent) -> dict[str, Any]:
        epoch = sent.step / self._control.plan.epoch
        return {"step": sent.step, "update": sent.update, "phase": sent.phase, "epoch": epoch}
