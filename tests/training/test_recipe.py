"""The training-length recipes as arithmetic: phases, rates, budgets, and a controller that survives JSON."""

import json
import math

import numpy as np
import pytest
import tiny_run

from ecg_jax.training.recipe import Controller, plan

PLATEAU = (
    "recipe.kind=plateau",
    "recipe.steps=0",
    "recipe.eval_every=10",
    "recipe.patience=2",
    "recipe.min_epochs=0",
)


def run(controller, loss_of):
    """Drive a controller as the loop does, losses from `loss_of(step, phase)`. Returns rates and evaluations."""
    rates, seen, pending = [], [], None
    while controller.phase != "end":
        rates.append(controller.rates())
        controller.advance()
        if pending is not None:  # read one dispatch late
            controller.saw(*pending)
            pending = None
        if controller.eval_due() and not controller.wants_to_stop():
            pending = controller.step, controller.update, loss_of(controller.step, controller.phase)
            seen.append((controller.phase, controller.step))
        if controller.phase_over() or controller.wants_to_stop():
            if pending is not None:
                controller.saw(*pending)
                pending = None
            controller.end_phase()
    return np.concatenate(rates), seen


def test_plateau_stops_goes_back_and_decays():
    control = Controller(plan(tiny_run.config(*PLATEAU, "recipe.max_epochs=1000"), 160, 64))
    rates, seen = run(control, lambda step, phase: abs(step - 50) + (0 if phase == "trunk" else -100))
    # Best at 50, two evaluations without a gain, one step sent before the second was read.
    assert [step for phase, step in seen if phase == "trunk"] == [10, 20, 30, 40, 50, 60, 70]
    assert control.update == 71 + 10 and control.step == 60, "back to 50, a fifth of 50 steps of decay"
    assert [step for phase, step in seen if phase == "decay"] == [60]
    np.testing.assert_allclose(rates[:5], 0.05 * np.array([0.25, 0.5, 0.75, 1, 1]), rtol=1e-6)
    np.testing.assert_allclose(rates[71:], 0.05 * (1 - np.arange(10) / 10), rtol=1e-6)
    assert (control.best_step, control.best_loss, control.status()) == (60, -90, "done")


def test_budget_leaves_room_for_the_decay_and_says_unconverged():
    made = plan(tiny_run.config(*PLATEAU, "recipe.max_epochs=12"), 160, 64)
    assert made.epoch == 10 and made.budget == 120 and made.trunk == 100
    control = Controller(made)
    run(control, lambda step, phase: -step)
    assert control.step == control.update == 120 and control.status() == "unconverged"


def test_min_epochs_and_nan_losses():
    control = Controller(plan(tiny_run.config(*PLATEAU, "recipe.min_epochs=9"), 160, 64))
    run(control, lambda step, phase: math.nan if step > 10 else 1.0)
    assert control.best_step == 10
    assert control.update == 91 + 10, "stopped at the first evaluation after nine epochs"


def test_steps_decays_at_the_end_without_looking():
    made = plan(tiny_run.config("recipe.steps=40", "recipe.decay_fraction=0.25", "recipe.decay=cosine"), 160, 64)
    control = Controller(made)
    rates, seen = run(control, lambda step, phase: -step)
    assert len(rates) == 40 and control.status() == "done"
    np.testing.assert_allclose(rates[4:31], 0.05, rtol=1e-6)
    assert np.all(np.diff(rates[30:]) < 0) and rates[-1] < 0.005
    assert [step for _, step in seen] == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("dispatch", [1, 3])
def test_every_boundary_is_a_multiple_of_the_dispatch(dispatch):
    overrides = (*PLATEAU, f"train.steps_per_dispatch={dispatch}", "recipe.max_epochs=30")
    control = Controller(plan(tiny_run.config(*overrides, "recipe.steps=0"), 160, 64))
    _, seen = run(control, lambda step, phase: abs(step - 31))
    assert all(step % dispatch == 0 for _, step in seen) and control.update % dispatch == 0


def test_auto_eval_interval_is_bounded_by_its_cost():
    few = plan(tiny_run.config("recipe.eval_every=0", "recipe.kind=plateau"), 160, 6400)
    assert few.eval_every == math.ceil(4 / 3 * 6400 / 16)
    many = plan(tiny_run.config("recipe.eval_every=0", "recipe.kind=plateau"), 10**6, 64)
    assert many.eval_every == 500


def test_json_round_trip():
    made = plan(tiny_run.config(*PLATEAU), 160, 64)
    control, again = Controller(made), Controller(made)
    control.advance()
    again.resume(json.loads(json.dumps(control.to_json())))
    assert again == control and again.best_loss == math.inf
