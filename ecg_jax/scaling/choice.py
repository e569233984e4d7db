"""Which form extrapolates best: fit the smaller runs, score the larger ones, again and again (rolling origin).

For one variable the origins hold out the largest half, third, quarter and sixth of the distinct sizes; for N and
D together the largest N, the largest D, either, and both, where enough is left. A form's score is the mean over
origins of ln of its root mean square error in ln L beyond the origin, later origins counting more (1, 2, 3, 4),
plus twice ln of the residual standard deviation of its fit to all runs: what bends where the runs do not is no
form for them, however lucky its forecasts. Of the forms whose score lies within one standard error (of the
paired differences) of the best, the first in the order of `ONE` or `TWO`, simplest first, is chosen. Weights and
the factor two were set on simulated curves (power laws with and without floor, shifted, broken, saturating,
bumps, plateaus; 5 to 45 points; noise 0.05 % to 3 %), not on public ones.

It compares no likelihoods, as losses and forms may differ. Deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecg_jax.scaling import forms
from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.solve import fit_law

ONE = ("power0", "power", "m3", "shifted", "m4", "broken")
TWO = ("hoffmann", "kaplan", "coupled")
HELD = (1 / 2, 1 / 3, 1 / 4, 1 / 6)
WORST = 3.0  # |ln error| beyond which a forecast is simply wrong: one absurd point must not decide alone
STARTS = 2
MARGIN = 0.15  # of N and D: a joint law of another form must lead by 15 % or more, whatever the standard error
LATER = (1.0, 2.0, 3.0, 4.0)  # weights of the origins, first to last
FIT = 2.0  # weight of ln(residual standard deviation) beside ln(rolling error)
LEAST = 3  # distinct values of a variable before a law in it is fitted


@dataclass(frozen=True)
class Score:
    """One form: rolling-origin errors, one per set and origin (NaN where it could not be fitted), and the
    residual standard deviation of its fit to all runs, one per set."""

    form: str
    errors: tuple[tuple[float, ...], ...]
    residual: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    form: str
    scores: tuple[Score, ...]
    tolerance: float  # one standard error of the best form's lead
    origins: tuple[str, ...]


def origins(n_params: np.ndarray, n_records: np.ndarray, variables: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """What is held out at each origin, in words, and the rows [n] bool."""
    columns = {"N": n_params, "D": n_records}
    if len(variables) == 1:
        (v,) = variables
        values = np.unique(columns[v])
        cuts = sorted({len(values) - max(1, round(share * len(values))) for share in HELD} - {0})
        return [(f"{v} >= {values[c]:,.6g}", columns[v] >= values[c]) for c in cuts]
    top = {v: columns[v] >= np.unique(columns[v])[-max(1, len(np.unique(columns[v])) // 4)] for v in variables}
    either, both = top["N"] | top["D"], top["N"] & top["D"]
    names = [("largest N", top["N"]), ("largest D", top["D"]), ("largest N or D", either)]
    return names + ([("largest N and D", both)] if both.any() else [])


def rolling(law, log_x: np.ndarray, y: np.ndarray, held_out: Sequence[np.ndarray], *, loss: str, delta=None):
    """Rolling-origin errors of one law, one per origin; NaN where too little is left to fit it."""
    errors = []
    for out in held_out:
        x, kept = log_x[~out], y[~out]
        if len(np.unique(x, axis=0)) < law.size + 1 or any(len(np.unique(c)) < LEAST for c in x.T):
            errors.append(np.nan)
            continue
        fit = fit_law(law, x, kept, loss=loss, delta=delta, n_starts=STARTS)
        miss = np.log(np.maximum(fit.predict(log_x[out]), 1e-300) / y[out])
        miss = np.where(np.isfinite(miss), np.clip(np.abs(miss), 0.0, WORST), WORST)
        errors.append(float(np.sqrt(np.mean(miss**2))))
    return errors


def choose(sets: Sequence[RunSet], variables: Sequence[str], *, loss: str, delta: float | None = None) -> Choice | None:
    """One form for `sets` (families measured alike) over `variables`; None with too few runs to hold any out."""
    if len(variables) == 2 and any(min(len(s.sizes), len(s.data)) <= LEAST for s in sets):
        return None
    words: list[str] = []
    scores = []
    for form in ONE if len(variables) == 1 else TWO:
        law, errors, residual = forms.get(form, tuple(variables)), [], []
        for runs in sets:
            held, x = origins(runs.n_params, runs.n_records, variables), runs.log_x(variables)
            words += [w for w, _ in held if w not in words]
            errors.append(tuple(rolling(law, x, runs.loss, [o for _, o in held], loss=loss, delta=delta)))
            if np.isfinite(errors[-1]).any():
                fit = fit_law(law, x, runs.loss, loss=loss, delta=delta, n_starts=STARTS)
                miss = np.log(np.maximum(fit.predict(x), 1e-300) / runs.loss)
                residual.append(float(np.sqrt((miss**2).sum() / max(runs.n - law.size, 1))))
            else:
                residual.append(np.nan)
        shortest = min(map(len, errors))
        scores.append(Score(form, tuple(e[:shortest] for e in errors), tuple(residual)))
    picked = pick(scores, MARGIN if len(variables) == 2 else 0.0)
    return None if picked is None else Choice(picked[0], tuple(scores), picked[1], tuple(words))


def pick(scores: Sequence[Score], margin: float = 0.0) -> tuple[str, float] | None:
    """The simplest form within one standard error of the best, and that standard error; None where none stands.

    A form that could not be fitted at an origin takes the best simpler form's error there; one that could be
    fitted at fewer than two origins of a set, or less than half of them, does not stand.
    """
    standing: dict[str, np.ndarray] = {}
    kept = []
    for s in scores:
        known = np.isfinite(np.array(s.errors))
        if not (known.sum(axis=1) >= np.maximum(np.minimum(2, known.shape[1]), 0.5 * known.shape[1])).all():
            continue
        simpler = np.min(list(standing.values()), axis=0) if standing else np.array(s.errors)
        errors = np.where(known, np.array(s.errors), simpler)
        if np.isfinite(errors).all():
            standing[s.form] = errors
            kept.append(s)
    if not standing:
        return None
    noise = np.min([s.residual for s in kept], axis=0)[:, None]
    origins_ = next(iter(standing.values())).shape[1]
    weight = np.tile(np.array(LATER[-origins_:]), (len(noise), 1))
    weight = weight / weight.sum()
    total = {}
    for s in kept:  # an error far below the noise is luck
        score = np.log(np.hypot(standing[s.form], 0.5 * noise) + 1e-6)
        total[s.form] = score + FIT * np.log(np.array(s.residual) + 1e-6)[:, None]
    best = min(total, key=lambda f: (weight * total[f]).sum())
    for form, score in total.items():
        lead = score - total[best]
        mean = float((weight * lead).sum())
        spread = float((weight * (lead - mean) ** 2).sum()) / max(1.0 - float((weight**2).sum()), 1e-9)
        se = (spread * float((weight**2).sum())) ** 0.5
        if mean <= max(se, margin) + 1e-12:
            return form, se
    return best, 0.0
