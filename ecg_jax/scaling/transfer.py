"""From ID to OOD: one joint law for both losses of the same runs, and what it says about transfer.

    L_ID = E + g,   L_OOD = Eo + K g^kappa,   g = A N^-alpha + B D^-beta

Both floors are fitted, and noise that a run shares between its two losses is shared by its bootstrap draws, so
kappa's interval knows about them; the usual two-step regression takes both floors as known and the ID loss as
free of noise (its kappa, and that of orthogonal regression, stand beside for comparison). kappa = 1 is tested by
the likelihood ratio on ln L: an OOD loss is a Hoffmann law in N and D only there.

ID losses of two paradigms have different units; kappa has none, so families are compared by it alone (rho_T).
It does not choose tasks. Invariant: a run without either of the two losses takes no part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from ecg_jax.scaling import bootstrap, forms, intervals
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.intervals import Interval
from ecg_jax.scaling.solve import Fit, fit_law

LAW = forms.get("transfer", ("N", "D", "T"))
LEAST_CELLS = 9  # configurations: eight parameters over two losses each
STARTS = 2
MOST_DRAWS = 200  # enough for a standard deviation, which is what the interval is made of


@dataclass(frozen=True)
class Transfer:
    """The joint law of one family on one OOD task."""

    home: LawResult
    away: LawResult
    fit: Fit
    draws: bootstrap.Draws | None
    intervals: dict[str, Interval]
    p_kappa_one: float
    two_step: float | None
    orthogonal: float | None

    @property
    def kappa(self) -> float:
        return self.fit.parameters["kappa"]

    @property
    def gain(self) -> float:
        """Share of the OOD excess that goes when the ID excess is halved: 1 - 0.5^kappa."""
        return 1.0 - 0.5**self.kappa


def transfers(results: Sequence[LawResult], options: Options) -> list[Transfer]:
    """A joint law for every OOD set whose family has an ID set over N and D with the same runs."""
    homes = {r.runs.key.family: r for r in results if r.runs.key.domain == "id" and r.fit is not None}
    found = []
    for away in results:
        home = homes.get(away.runs.key.family)
        if away.runs.key.domain == "id" or home is None or set(home.law.variables) != {"N", "D"} or not away.fit:
            continue
        one = joint(home, away, options)
        if one is not None:
            found.append(one)
    return found


def joint(home: LawResult, away: LawResult, options: Options) -> Transfer | None:
    """Fit one pair, with draws where both of its laws are identified; None with fewer than `LEAST_CELLS`
    configurations that have both losses."""
    place = {run: i for i, run in enumerate(home.runs.runs)}
    rows = [i for i, run in enumerate(away.runs.runs) if run in place]
    first = home.runs.only(np.array([place[away.runs.runs[i]] for i in rows], int))
    second = away.runs.only(np.array(rows, int))
    if not rows or int(second.cells.max()) + 1 < LEAST_CELLS:
        return None
    both = first.log_x(("N", "D"))
    x = np.concatenate([np.column_stack([both, np.full(len(rows), t)]) for t in (0.0, 1.0)])
    y = np.concatenate([first.loss, second.loss])
    loss, delta = ("log-huber", None) if options.loss == "ls" else (options.loss, options.delta)
    fit = fit_law(LAW, x, y, loss=loss, delta=delta, n_starts=STARTS)
    free, one = (fit_law(LAW, x, y, loss="ls-log", n_starts=STARTS, fixed=f) for f in ({}, {"kappa": 1.0}))
    ratio = len(y) * np.log(max(one.objective, 1e-300) / max(free.objective, 1e-300))
    drawn, ends = None, {}
    if options.bootstrap and home.identified and away.identified:
        keys = bootstrap.cell_keys(first.n_params, first.n_records) * 2
        count = min(options.bootstrap, MOST_DRAWS)
        drawn = bootstrap.draw(fit, x, y, keys, draws=count, seed=options.seed, kind="wild")
        ends = intervals.parameter_intervals(fit, drawn, level=options.level)
    return Transfer(
        home, away, fit, drawn, ends, float(chdtrc(1, max(ratio, 0.0))), *_classical(home, away, first, second)
    )


def _classical(home: LawResult, away: LawResult, first, second) -> tuple[float | None, float | None]:
    """kappa by two steps (OOD floor free, ID floor as fitted) and by orthogonal regression of the logs."""
    excess = first.loss - home.fit.parameters.get("E", 0.0)
    good = excess > 0
    if good.sum() < 5:
        return None, None
    law = forms.get("power", ("N",))  # Eo + K x^-kappa in x = 1 / ID excess
    step = fit_law(law, -np.log(excess[good])[:, None], second.loss[good], loss="ls-log")
    left = second.loss - step.parameters["E"]
    good &= left > 0
    if good.sum() < 3:
        return step.parameters["alpha"], None
    xx, xy, _, yy = np.cov(np.log(excess[good]), np.log(left[good])).ravel()
    return step.parameters["alpha"], float((yy - xx + np.hypot(yy - xx, 2 * xy)) / (2 * xy)) if xy > 0 else None


def transfer_json(t: Transfer, clean) -> Mapping[str, object]:
    """One entry of `transfer.json`."""
    key = t.away.runs.key
    out = {f: getattr(key, f) for f in ("architecture", "paradigm", "input", "dataset", "task", "domain")}
    return clean(
        out
        | {
            "formula": t.fit.law.formula,
            "n": t.fit.n,
            "loss": t.fit.loss,
            "objective": t.fit.objective,
            "parameters": t.fit.parameters,
            "intervals": {k: v.pair() for k, v in t.intervals.items()},
            "p_kappa_is_1": t.p_kappa_one,
            "gain_at_half_the_id_excess": t.gain,
            "kappa_two_step": t.two_step,
            "kappa_orthogonal": t.orthogonal,
            "converged": t.fit.certificate.converged,
            "scaled_gradient": t.fit.certificate.scaled_gradient,
        }
    )
