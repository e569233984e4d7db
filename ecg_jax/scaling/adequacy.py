"""Does the law fit at all? Tests that a referee would ask for, on ln L, whatever loss the law was fitted with.

    coupling     k = 1 in E + (A N^-alpha + B D^-beta)^k: do the terms of N and D add?
    overfitting  c = 1 in M (1 + B D^-beta M^-c): is the extent of overfitting, L over the loss M without limit of
                 data, the power of D M^(1/beta) that Hoffmann's law makes it? (A plot of one against the other with
                 M and beta from the same fit is an identity and shows nothing.)
    seeds        does the law miss configurations by more than repeated seeds of one configuration differ?

The first two are F tests of one more parameter by least squares on ln L, the third is the F test against pure
error. An interval of a law that fails them is conditional on a form that the runs contradict.

It chooses no form. Deterministic. Invariant: a test that the design does not allow is absent, not passed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from ecg_jax.scaling import forms
from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.solve import fit_law

REJECTED = 0.05  # after Holm's correction over the tests of one law
NESTED = {
    "coupled": ("coupling", "k", "the terms of N and D add (k = 1)"),
    "overfitting": ("overfitting", "c", "the extent of overfitting is what Hoffmann's law makes it (c = 1)"),
}
STARTS = 3


@dataclass(frozen=True)
class Check:
    """One test: the free parameter's estimate (None: there is none) and the p of "the law fits"."""

    name: str
    p: float
    estimate: float | None
    text: str


def checks(runs: RunSet, law) -> tuple[Check, ...]:
    """All tests that the design allows for `law`, which must have no fixed parameters."""
    x = runs.log_x(law.variables)
    if runs.n <= law.size + 2:
        return ()
    plain = fit_law(law, x, runs.loss, loss="ls-log", n_starts=STARTS).objective
    found = list(_against_seeds(runs, plain, law.size)) if "U" not in law.variables else []
    if law.name == "hoffmann":
        for form, (name, free, text) in NESTED.items():
            wider = fit_law(forms.get(form, ("N", "D")), x, runs.loss, loss="ls-log", n_starts=STARTS)
            df = runs.n - wider.law.size
            gain = max(plain - wider.objective, 0.0)
            p = float(fdtrc(1, df, gain / max(wider.objective / df, 1e-300)))
            value = wider.parameters[free]
            noiseless = plain < 1e-20 * runs.n
            found.append(Check(name, 1.0 if noiseless else p, value, f"{text}; free, {free} = {value:.3g}"))
    return tuple(found)


def _against_seeds(runs: RunSet, total: float, size: int) -> Iterator[Check]:
    cells = runs.cells
    groups = [np.log(runs.loss[cells == c]) for c in np.unique(cells)]
    df_pure = sum(len(g) - 1 for g in groups)
    df_misfit = len(groups) - size
    if df_pure < 2 or df_misfit < 1:
        return
    pure = float(sum(((g - g.mean()) ** 2).sum() for g in groups))
    ratio = max(total - pure, 0.0) / df_misfit / max(pure / df_pure, 1e-300)
    p = float(fdtrc(df_misfit, df_pure, ratio)) if total > 1e-20 * runs.n else 1.0
    yield Check("seeds", p, None, f"misfit over spread of seeds, F = {ratio:.3g} on {df_misfit} and {df_pure} df")


def failed(found: Sequence[Check]) -> tuple[Check, ...]:
    """The tests that reject the law, Holm's correction over all of them."""
    out = []
    for rank, c in enumerate(sorted(found, key=lambda c: c.p)):
        if c.p * (len(found) - rank) >= REJECTED:
            break
        out.append(c)
    return tuple(out)
