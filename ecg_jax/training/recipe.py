"""How long a run trains and at which rate: the training-length recipes.

`plateau`: warm up, hold the peak rate, evaluate on `val` every `eval_every` steps, stop after `patience`
evaluations without a gain (not before `min_epochs`); go back to the best state and lower the rate linearly to
zero over `decay_fraction` of the steps that led there. The run's parameters are the best on `val` over all of
it. A budget (`max_epochs`, `steps`) bounds trunk and decay together; a trunk that it ends gives the status
`unconverged`.

`steps`: a fixed number of steps, warm-up, and a decay over the last `decay_fraction` of them.

Two counters, never confused: `step` is how many updates the current parameters have behind them (it goes back
with them, and it is the position in the order of the data, so a decay continues where its trunk stood);
`update` counts all updates made, those that were thrown away included, and only grows.

Host arithmetic only, no arrays of the model. Invariant: every decision is a function of (plan, losses seen),
so it does not depend on when a checkpoint was taken; `Controller.to_json` holds all of it.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from ecg_jax.config import Config


@dataclass(frozen=True)
class Plan:
    """The recipe in steps, all multiples of `dispatch` except warm-up and min_steps."""

    kind: str
    peak: float  # learning rate
    warmup: int
    budget: int  # steps of trunk and decay together
    trunk: int  # steps of the trunk at most
    min_steps: int
    eval_every: int
    patience: int
    min_gain: float
    decay_fraction: float
    shape: str  # of the decay, linear or cosine
    dispatch: int
    epoch: float  # steps per epoch


def plan(config: Config, records: int, val_records: int) -> Plan:
    """Resolve a recipe for `records` training and `val_records` validation records.

    `eval_every = 0` becomes one epoch, at most 500 steps, and at least so many that evaluation (a third of
    the work per record) takes no more than a fifth of the time.
    """
    recipe, dispatch, batch = config.recipe, config.train.steps_per_dispatch, config.train.batch

    def up(steps: float) -> int:
        return max(1, math.ceil(steps / dispatch - 1e-9)) * dispatch

    def down(steps: float) -> int:
        return max(1, math.floor(steps / dispatch + 1e-9)) * dispatch

    epoch = records / batch
    every = up(recipe.eval_every or max(min(epoch, 500), 4 / 3 * val_records / batch))
    if recipe.kind == "steps":
        budget = recipe.steps
        trunk = budget - min(budget, up(recipe.decay_fraction * budget)) if recipe.decay_fraction > 0 else budget
    else:
        budget = down(min(recipe.max_epochs * epoch, recipe.steps or math.inf))
        share = down(budget / (1 + recipe.decay_fraction))  # leave room for the decay
        trunk = max(min(share, budget - every), dispatch)
    return Plan(
        kind=recipe.kind,
        peak=config.optim.lr,
        warmup=config.optim.warmup_steps,
        budget=budget,
        trunk=trunk,
        min_steps=math.ceil(recipe.min_epochs * epoch),
        eval_every=every,
        patience=recipe.patience,
        min_gain=recipe.min_gain,
        decay_fraction=recipe.decay_fraction,
        shape=recipe.decay,
        dispatch=dispatch,
        epoch=epoch,
    )


@dataclass
class Controller:
    """Where the recipe stands. The loop asks it for rates, tells it of steps and losses, and obeys
    `phase`.
    """

    plan: Plan
    phase: str = "trunk"  # trunk | decay | end
    step: int = 0
    update: int = 0
    decay_start: int = 0
    decay_end: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    best_update: int = 0
    gain_loss: float = math.inf  # the loss that the next one has to beat to count as a gain
    without_gain: int = 0
    seen_step: int = 0  # step of the last loss taken in
    converged: bool = False

    def rates(self) -> np.ndarray:
        """Learning rates of the next dispatch, float32 [steps per dispatch]."""
        steps = np.arange(self.step, self.step + self.plan.dispatch)
        warm = np.minimum(1.0, (steps + 1) / max(1, self.plan.warmup))
        if self.phase != "decay":
            return (self.plan.peak * warm).astype(np.float32)
        done = (steps - self.decay_start) / (self.decay_end - self.decay_start)
        left = 1 - done if self.plan.shape == "linear" else 0.5 * (1 + np.cos(np.pi * done))
        return (self.plan.peak * warm * left).astype(np.float32)

    def advance(self) -> None:
        """One dispatch has been sent."""
        self.step += self.plan.dispatch
        self.update += self.plan.dispatch
        if self.plan.kind == "steps" and self.phase == "trunk" and self.step >= self.plan.trunk < self.plan.budget:
            self._begin_decay(self.plan.budget)  # no look at any loss: the same state goes on at a falling rate

    def phase_over(self) -> bool:
        """Whether the steps of this phase are used up, so that its last evaluation has to be read
        before going on.
        """
        if self.plan.kind == "steps":
            return self.step >= self.plan.budget
        return self.step >= (self.plan.trunk if self.phase == "trunk" else self.decay_end)

    def eval_due(self) -> bool:
        """Whether the state after the last dispatch is to be evaluated."""
        origin = self.decay_start if self.phase == "decay" and self.plan.kind == "plateau" else 0
        return (self.step - origin) % self.plan.eval_every == 0 or self.phase_over()

    def saw(self, step: int, update: int, loss: float) -> bool:
        """Take in the validation loss after `step`; True if it is the best so far. A NaN is never a gain."""
        self.seen_step = step
        if loss < self.gain_loss * (1 - self.plan.min_gain):
            self.gain_loss, self.without_gain = loss, 0
        else:
            self.without_gain += 1
        if not loss < self.best_loss:
            return False
        self.best_loss, self.best_step, self.best_update = loss, step, update
        return True

    def wants_to_stop(self) -> bool:
        """Whether the trunk has gone `patience` evaluations without a gain."""
        return (
            self.plan.kind == "plateau"
            and self.phase == "trunk"
            and self.seen_step >= self.plan.min_steps
            and self.without_gain >= self.plan.patience
        )

    def end_phase(self) -> bool:
        """Go to the next phase; True if the loop has to go back to the best state.

        From the trunk of `plateau` to its decay, from anything else to the end.
        """
        if self.plan.kind == "steps" or self.phase == "decay":
            self.converged = self.converged or self.plan.kind == "steps"
            self.phase = "end"
            return False
        self.converged = self.wants_to_stop()
        length = max(self.plan.decay_fraction * self.best_step, self.plan.eval_every)
        length = math.ceil(length / self.plan.dispatch) * self.plan.dispatch
        if self.plan.decay_fraction == 0:
            self.phase = "end"
            return False
        self.step = self.best_step
        self._begin_decay(self.step + length)
        return True

    def _begin_decay(self, end: int) -> None:
        self.phase, self.decay_start, self.decay_end = "decay", self.step, end

    def status(self) -> str:
        """`done`, or `unconverged` if the budget ended the trunk."""
        return "done" if self.converged else "unconverged"

    def to_json(self) -> dict:
        """Everything but the plan, for a checkpoint; infinity becomes None."""
        state = {key: value for key, value in asdict(self).items() if key != "plan"}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in state.items()}

    def resume(self, saved: dict) -> None:
        """Inverse of `to_json`."""
        for key, value in saved.items():
            setattr(self, key, math.inf if value is None else value)
