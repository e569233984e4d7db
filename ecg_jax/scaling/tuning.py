"""Whether a family wins by its models or by its tuning: every ratio again at the best of k trials, the same k for both.

A configuration with n trials, ranked by their ID loss, has the j-th of them as the best of k drawn at random without
putting back with probability C(n - j, k - 1) / C(n, k). Its loss, ID or OOD, is then the expectation over j (after
Dodge et al. 2019, "Show Your Work", who draw with putting back); a configuration with fewer than k trials gives the
best that it has. k goes up to the smaller number of trials of the two families, and the median trial stands beside it.
A claim that needs the larger family's tuning does not hold at small k.

Refits the laws that there are; chooses no form. Invariant: at k = n of every configuration the losses are those fitted.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import comb

import numpy as np

from ecg_jax.scaling import families
from ecg_jax.scaling.analysis import LawResult, Options, refitted
from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.multipliers import Multiplier, compare, pairs
from ecg_jax.scaling.table import Table

DRAWS = 200  # of the bootstrap, for each k
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MEDIAN = 0  # in place of k


def shares(n: int, k: int) -> np.ndarray:
    """Probability [n] that each of n trials, best first, is the best of k drawn; k = MEDIAN: the one in the middle."""
    if k == MEDIAN:
        return np.isin(np.arange(n), [(n - 1) // 2, n // 2]) / (2 - n % 2)
    k = min(k, n)
    return np.array([comb(n - j, k - 1) for j in range(1, n + 1)]) / comb(n, k)


def at_k(runs: RunSet, ranks: Sequence[Sequence[str]], k: int) -> RunSet | None:
    """`runs`, which has all trials, with one row for each configuration of `ranks` (its runs, best first), at the loss
    of the best of k; None where a trial was not evaluated on this task.
    """
    place = {run: i for i, run in enumerate(runs.runs)}
    loss, kept = runs.loss.copy(), np.ones(runs.n, bool)
    for ranked in ranks:
        rows = [place[run] for run in ranked if run in place]
        if rows and len(rows) < len(ranked):
            return None
        if rows:
            loss[rows[0]] = shares(len(rows), k) @ runs.loss[rows]
            kept[rows[1:]] = False
    return replace(runs, loss=loss).only(kept)


def matched(
    found: Sequence[Multiplier], results: Sequence[LawResult], table: Table, options: Options
) -> list[Multiplier]:
    """`found` with `at["best of k trials"]`: {k or "median": [value, low, high]} for rho and M of every pair of
    identified laws, where the log has trials, and `at["told from 1 at every k"]`. Randomness: the bootstrap's, by
    `options.seed`.
    """
    ranks = families.ranked_trials(table)
    if not ranks or options.fixed or not options.bootstrap:
        return list(found)
    whole = {s.key: s for s in families.group(table, trials=True)}
    family = {run: s.key.family for s in whole.values() for run in s.runs}
    most: dict[tuple[str, ...], int] = {}
    for ranked in (r for r in ranks if r[0] in family):
        most[family[ranked[0]]] = max(most.get(family[ranked[0]], 1), len(ranked))
    few = replace(options, bootstrap=min(options.bootstrap, DRAWS))
    made: dict[tuple, LawResult | None] = {}

    def fitted(result: LawResult, k: int) -> LawResult | None:
        key = result.runs.key, k
        if key not in made:
            runs = at_k(whole[result.runs.key], ranks, k)
            made[key] = None if runs is None else refitted(result, runs, few)
        return made[key]

    told: dict[tuple, dict[str, list[float | None]]] = {}
    known = [r for r in results if r.identified and set(r.law.variables) <= {"N", "D"}]
    for first, second in pairs(known):
        top = min(most.get(r.runs.key.family, 1) for r in (first, second))
        for k in (*(s for s in STEPS if s < top), top, MEDIAN):
            one, two = fitted(first, k), fitted(second, k)
            for m in compare(one, two, level=options.level) if one and two else ():
                if m.value is not None:
                    told.setdefault(m.statement, {})[str(k) if k else "median"] = [m.value, *m.interval]

    def with_trials(m: Multiplier) -> Multiplier:
        by_k = told.get(m.statement)
        if by_k is None:
            return m
        sides = {
            1 if low is not None and low > 1 else -1 if high is not None and high < 1 else 0
            for _, low, high in by_k.values()
        }
        return replace(m, at=m.at | {"best of k trials": by_k, "told from 1 at every k": sides in ({1}, {-1})})

    return [with_trials(m) for m in found]
