"""Decides whether a set of runs shows a law at all, before anyone reads a number off it.

    runs       more configurations (N, D) than parameters
    sizes      at least three distinct values of each variable, or its exponent is refused
    design     N and D do not move in step
    learning   loss of the constant predictor over the best loss at least 1.5
    over D     excess over the irreducible loss falls by at least 30 % from the smallest to the largest D,
               at the largest N, and by more than 4 seed SDs
    over N     and by at least 15 % from the smallest to the largest N, at the largest D, likewise

The irreducible loss is the log's `floor` where it states one, else the fitted E. The seed SD comes from
repeated seeds; without any, the residuals' SD stands in and the text says so. What the log does not allow
to check is said, and does not count against the law.

It does not fit and draws nothing. Invariant: every condition carries the numbers that it was decided by.
"""

from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling.families import RunSet, SeedNoise
from ecg_jax.scaling.laws import EXPONENT, Law
from ecg_jax.scaling.solve import Fit

LEAST_RATIO = 1.5
LEAST_FALL = {"D": 0.30, "N": 0.15}
SEED_SDS = 4.0
LEAST_SIZES = 3
GRID_SHARE = 0.6  # of a variable's values that must be present at the largest other one to read the fall off the runs


@dataclass(frozen=True)
class Condition:
    """One condition: `ok` is None where the log does not allow to check it."""

    name: str
    ok: bool | None
    text: str
    measured: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Identification:
    conditions: tuple[Condition, ...]

    @property
    def identified(self) -> bool:
        return all(c.ok is not False for c in self.conditions)

    @property
    def failed(self) -> tuple[Condition, ...]:
        return tuple(c for c in self.conditions if c.ok is False)


def design_conditions(runs: RunSet, law: Law) -> list[Condition]:
    """Conditions on the design alone; where one fails nothing is fitted."""
    cells = int(runs.cells.max()) + 1
    found = [
        Condition(
            "runs",
            cells > law.size,
            f"{cells} configurations for {law.size} parameters",
            float(cells),
            law.size + 1.0,
        )
    ]
    for v in law.variables:
        if v == "U":
            continue
        count = len({"N": runs.sizes, "D": runs.data, "L": np.unique(runs.id_loss)}[v])
        text = f"{count} distinct values of {v}"
        if count < LEAST_SIZES:
            text += f"; {LEAST_SIZES} are needed before {EXPONENT.get(v, 'kappa')} means anything"
        found.append(Condition(f"sizes of {v}", count >= LEAST_SIZES, text, float(count), float(LEAST_SIZES)))
    if len(law.variables) == 2 and len(runs.sizes) > 1 and len(runs.data) > 1:
        together = abs(float(np.corrcoef(np.log(runs.n_params), np.log(runs.n_records))[0, 1]))
        ok = together < 0.999
        text = f"correlation of ln N with ln D {together:.3f}" + ("" if ok else "; they cannot be told apart")
        found.append(Condition("design", ok, text, together, 0.999))
    return found


def loss_conditions(runs: RunSet, fit: Fit, noise: SeedNoise | None) -> list[Condition]:
    """Conditions on the losses, given the fitted law (used for E and where the runs are no grid)."""
    found = [_learning(runs)]
    floor = runs.known_floor()
    reference = fit.parameters.get("E", 0.0) if floor is None else floor
    for v in ("D", "N"):
        if v in fit.law.variables:
            found.append(_fall(runs, fit, noise, v, reference, known=floor is not None))
    return found


def _learning(runs: RunSet) -> Condition:
    prior = runs.prior[np.isfinite(runs.prior)]
    if not len(prior):
        return Condition("learning", None, "the log does not state the constant predictor's loss (column prior)")
    ratio = float(np.median(prior) / runs.loss.min())
    text = f"constant predictor {np.median(prior):.4g} over best loss {runs.loss.min():.4g} = {ratio:.2f}"
    return Condition("learning", ratio >= LEAST_RATIO, f"{text} (at least {LEAST_RATIO})", ratio, LEAST_RATIO)


def _fall(runs: RunSet, fit: Fit, noise: SeedNoise | None, v: str, reference: float, *, known: bool) -> Condition:
    moving, fixed = (runs.n_records, runs.n_params) if v == "D" else (runs.n_params, runs.n_records)
    other = "N" if v == "D" else "D"
    at = fixed == fixed.max()
    values = np.unique(moving[at])
    if len(values) >= max(2, GRID_SHARE * len(np.unique(moving))):
        first, last = (
            runs.loss[at & (moving == values[0])].mean(),
            runs.loss[at & (moving == values[-1])].mean(),
        )
        how = ""
    else:  # no grid: the law itself is asked
        pair = {v: np.array([moving.min(), moving.max()]), other: np.full(2, fixed.max())}
        pair["U"] = pair["D"]  # records read once
        first, last = fit.predict(np.log(np.stack([pair[x] for x in fit.law.variables], axis=1)))
        how = ", by the fitted law (the runs are no grid)"
    drop = float(first - last)
    sd, source = _spread(runs, fit, noise)
    where = f" at the largest {other}" if len(fit.law.variables) == 2 else ""
    what = "known floor" if known else "fitted E"
    if first <= reference:
        return Condition(f"over {v}", False, f"no excess over the {what} {reference:.4g}{where}{how}")
    share = drop / float(first - reference)
    free = known or "E" in fit.law.names  # a law without a floor has no excess to speak of
    enough = share >= LEAST_FALL[v] or not free
    clear = drop > SEED_SDS * sd
    text = f"excess over the {what} falls by {100 * share:.0f} %{where}{how} (at least {100 * LEAST_FALL[v]:.0f} %)"
    if not free:
        text = f"loss falls by {100 * share:.0f} %{where}{how} (the law has no floor)"
    many = f"{drop / sd:.1f}" if sd > 1e-12 * first else "very many"
    text += f", by {many} {source} SDs (more than {SEED_SDS:.0f})"
    return Condition(f"over {v}", bool(enough and clear), text, share, LEAST_FALL[v])


def _spread(runs: RunSet, fit: Fit, noise: SeedNoise | None) -> tuple[float, str]:
    if noise is not None:
        return noise.absolute, "seed"
    return residual_sd(fit) * (float(np.median(runs.loss)) if fit.logarithmic else 1.0), "residual (no repeated seeds)"


def residual_sd(fit: Fit) -> float:
    """Standard deviation of the residuals as the loss takes them (of ln L, or of L for `ls`), degrees of
    freedom counted."""
    return float(np.sqrt(np.sum(fit.residuals**2) / max(fit.n - fit.law.size, 1)))
