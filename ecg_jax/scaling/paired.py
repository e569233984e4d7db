"""Two families on the same footing without trusting either law's amplitudes: one shared law, a shift, no form.

    shared   F test of one Hoffmann law for both families against one each
    ratio    H: A_T = A_R m^alpha, all else shared: m by least squares on ln L with its profile interval, and the
             F test of that law against one each (4 degrees of freedom). Only where it is not rejected is one
             number the whole difference between two families.
    swapped  runs of equal configuration change families at random: p of the mean difference of ln L
    form-free  ln of the resource that the second needs over the first, both curves only made monotone

It draws random signs only (`swapped`, seeded). Invariant: m and M above 1 speak for the first family.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from ecg_jax.scaling import forms, laws, profile
from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.solve import fit_law

HOFFMANN = laws.get("hoffmann", ("N", "D"))
SAME_SIZE = 0.05  # in ln N: configurations closer than this are the same for a swap
SWAPS = 4000
POINTS = 21
STARTS = 3


@dataclass(frozen=True)
class Shared:
    """Ratio m with its profile interval, p of "they differ by m only" and p of "they do not differ"."""

    m: float
    interval: tuple[float | None, float | None]
    p_ratio_only: float
    p_one_law: float


def shared(first: RunSet, second: RunSet, level: float) -> Shared | None:
    """Both families under one law; None with too few runs."""
    n = first.n + second.n
    if n <= 2 * HOFFMANN.size + 1:
        return None
    xs = [r.log_x(("N", "D")) for r in (first, second)]
    x, y = np.concatenate(xs), np.concatenate([first.loss, second.loss])
    marked = np.column_stack([x, np.repeat([0.0, 1.0], [first.n, second.n])])
    each = sum(fit_law(HOFFMANN, a, r.loss, loss="ls-log", n_starts=STARTS).objective
               for a, r in zip(xs, (first, second), strict=True))  # fmt: skip
    one = fit_law(HOFFMANN, x, y, loss="ls-log", n_starts=STARTS).objective
    law = forms.get("ratio", ("N", "D", "T"))
    shifted = fit_law(law, marked, y, loss="ls-log", n_starts=STARTS)
    ends = profile.profile(shifted, marked, y, "m", level=level)
    df = n - 2 * HOFFMANN.size

    def p(total: float, more: int) -> float:
        return float(fdtrc(more, df, max(total - each, 0.0) / more / max(each / df, 1e-300)))

    interval = (ends.low, ends.high) if ends else (None, None)
    return Shared(shifted.parameters["m"], interval, p(shifted.objective, 4), p(one, 5))


def swapped(first: RunSet, second: RunSet, seed: int) -> float | None:
    """Two-sided p of equal losses by swapping families within configurations; None unless all of them match."""
    tables = []
    for r in (first, second):
        cells = r.cells
        tables.append([(r.n_params[cells == c][0], r.n_records[cells == c][0], np.log(r.loss[cells == c]).mean())
                       for c in np.unique(cells)])  # fmt: skip
    a, b = map(np.array, tables)
    if len(a) != len(b) or np.abs(np.log(a[:, :2]) - np.log(b[:, :2])).max() > SAME_SIZE:
        return None
    gap = a[:, 2] - b[:, 2]
    signs = np.random.default_rng([seed, 7]).choice([-1.0, 1.0], (SWAPS, len(gap)))
    return float((1 + (np.abs(signs @ gap) >= abs(gap.sum()) * (1 - 1e-12)).sum()) / (SWAPS + 1))


def form_free(first: RunSet, second: RunSet, v: str, other: float | None) -> float | None:
    """exp of the mean of ln(v of the second / v of the first) over the losses that both reach where the other
    variable is `other`; None where fewer than three values of v stand there or no loss is reached by both."""
    curves = []
    for r in (first, second):
        moving, fixed = (r.n_params, r.n_records) if v == "N" else (r.n_records, r.n_params)
        at = np.ones(r.n, bool) if other is None else np.abs(np.log(fixed / other)) < SAME_SIZE
        values = np.unique(moving[at])
        if len(values) < 3:
            return None
        log_loss = np.array([np.log(r.loss[at & (moving == x)]).mean() for x in values])
        curves.append((np.log(values), falling(log_loss)))
    low, high = max(y[-1] for _, y in curves), min(y[0] for _, y in curves)
    if not low < high:
        return None
    grid = np.linspace(low, high, POINTS)
    needed = [np.interp(grid, y[::-1], x[::-1]) for x, y in curves]
    return float(np.exp((needed[1] - needed[0]).mean()))


def falling(y: np.ndarray) -> np.ndarray:
    """The closest sequence that never rises (pool adjacent violators), then tilted by nothing to speak of so that it
    can be inverted."""
    blocks: list[list[float]] = []
    for value in y:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, k), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * k + b * m) / (k + m), k + m]]
    flat = np.concatenate([np.full(int(k), value) for value, k in blocks])
    return flat - 1e-9 * np.arange(len(y))
