"""Compares families: ratios of exponents and ratios of resources at equal loss, each named, each with an
interval.

    rho_N  alpha of the numerator over alpha of the denominator (how much faster loss falls with size)
    rho_D  the same for beta and data
    M_N    parameters that the numerator needs over those the denominator needs, at equal loss and equal D
    M_D    records that the numerator needs over those the denominator needs, at equal loss and equal N

M is the geometric mean over the overlap of the losses that both families reach inside their observed sizes,
never beyond. Architectures are compared within one input and one paradigm; paradigms within one
architecture and input, and never on their own ID losses, whose units differ. Common bootstrap draws make
the differences paired.

It does not fit. Invariant: a ratio and its inverse are the same statement; each pair appears once, in the
order in which rho and M above 1 both speak for the same family (M_N's denominator is rho_N's numerator).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from ecg_jax.scaling import paired
from ecg_jax.scaling.analysis import LawResult
from ecg_jax.scaling.formula import Formula
from ecg_jax.scaling.intervals import interval, method_of, p_value, parameter_draws
from ecg_jax.scaling.laws import EXPONENT, Law
from ecg_jax.scaling.restrict import whole

FARTHEST = 60.0  # in ln N or ln D from the design's centre; a loss not reached there is never reached
POINTS = 21  # losses in the overlap over which ln M is averaged


@dataclass(frozen=True)
class Multiplier:
    """`value` is None where there is none, and `note` says why. `interval` ends are None where unbounded."""

    kind: str
    numerator: str
    denominator: str
    dataset: str
    task: str
    domain: str
    at: dict[str, Any]
    value: float | None
    interval: tuple[float | None, float | None]
    p: float | None
    p_holm: float | None
    infinite_draws: float
    identified: bool
    meaning: str
    note: str = ""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)  # of ln value; paired among ratios

    @property
    def statement(self) -> tuple[str, ...]:
        """What it is the ratio of, however it was found."""
        return self.kind, self.numerator, self.denominator, self.dataset, self.task, self.domain


def family_name(family: tuple[str, str, str]) -> str:
    """`resnet1d / SL / signal`."""
    return " / ".join(family)


def compare_all(results: Sequence[LawResult], *, level: float) -> list[Multiplier]:
    """All multipliers between fitted laws on the same measured thing, with Holm's correction."""
    return corrected([m for pair in pairs(results) for m in compare(*pair, level=level)])


def corrected(found: Sequence[Multiplier]) -> list[Multiplier]:
    """Holm's correction over tasks, within each kind and pair of families."""
    found = list(found)
    groups: dict[tuple, list[int]] = {}
    for i, m in enumerate(found):
        if m.p is not None:
            groups.setdefault((m.kind, m.numerator, m.denominator), []).append(i)
    for rows in groups.values():
        for i, p in zip(rows, holm([found[i].p for i in rows]), strict=True):
            found[i] = replace(found[i], p_holm=p)
    return found


def pairs(results: Sequence[LawResult]) -> Iterator[tuple[LawResult, LawResult]]:
    """Families that may be compared on one measured thing, in the order in which ratios speak for the first."""
    usable = [r for r in results if r.fit is not None]
    for a, b in combinations(usable, 2):
        if a.runs.key.measured != b.runs.key.measured or a.law.name != b.law.name or a.law.variables != b.law.variables:
            continue
        (arch_a, par_a, in_a), (arch_b, par_b, in_b) = a.runs.key.family, b.runs.key.family
        architecture = arch_a != arch_b and par_a == par_b and in_a == in_b
        paradigm = arch_a == arch_b and par_a != par_b and in_a == in_b and a.runs.key.domain != "id"
        if architecture or paradigm:
            a, b = _as_many_draws(a, b)
            yield ((a, b) if (arch_a, par_b) < (arch_b, par_a) else (b, a))  # resnet before transformer, SSL before SL


def _as_many_draws(*results: LawResult) -> tuple[LawResult, ...]:
    """The same with equally many draws: a law that is not identified has fewer, and pairing is by their number."""
    counts = {r.draws.count for r in results if r.draws is not None}
    if len(counts) < 2:
        return results
    return tuple(replace(r, draws=r.draws.first(min(counts))) for r in results)


def compare(first: LawResult, second: LawResult, *, level: float) -> Iterator[Multiplier]:
    """rho and M for every variable of the laws, in favour of `first` where above 1."""
    for v in first.law.variables:
        if v == "U":  # distinct records, where D counts those read
            continue
        yield _exponent_ratio(first, second, v, level)
        if set(first.law.variables) <= {"N", "D"}:
            yield _equal_loss(first, second, v, level)


def _exponent_ratio(first: LawResult, second: LawResult, v: str, level: float) -> Multiplier:
    name = EXPONENT.get(v, "kappa")
    estimate = float(np.log(first.fit.parameters[name] / second.fit.parameters[name]))
    draws = None
    if first.draws is not None:
        with np.errstate(invalid="ignore"):
            draws = np.log(_exponent_draws(first, v)) - np.log(_exponent_draws(second, v))
    meaning = f"{name} of {_short(first, second)} over {name} of {_short(second, first)}"
    return between(f"rho_{v}", first, second, estimate, draws, {}, meaning, level)


def _exponent_draws(result: LawResult, v: str) -> np.ndarray:
    return parameter_draws(result.fit, result.draws, result.law.names.index(EXPONENT.get(v, "kappa")))


def _equal_loss(first: LawResult, second: LawResult, v: str, level: float) -> Multiplier:
    other = [x for x in first.law.variables if x != v]
    at: dict[str, Any] = {}
    if other:
        tops = [r.runs.n_params.max() if other[0] == "N" else r.runs.n_records.max() for r in (first, second)]
        at[other[0]] = float(min(tops))
    ranges = [_reached(r, v, at) for r in (first, second)]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    what = "parameters" if v == "N" else "records"
    condition = "".join(f" at {k} = {x:,.0f}" for k, x in at.items())
    meaning = f"{what} {_short(second, first)} needs over those {_short(first, second)} needs, at equal loss{condition}"
    if not low < high:
        note = "no loss that both families reach inside their observed sizes"
        return between(f"M_{v}", second, first, None, None, at, meaning, level, note)
    losses = np.exp(np.linspace(np.log(low), np.log(high), POINTS))
    at["loss"] = [float(low), float(high)]
    point = needed(second, v, losses, at)[0] - needed(first, v, losses, at)[0]
    draws = None
    if first.draws is not None:
        with np.errstate(invalid="ignore"):
            draws = (needed(second, v, losses, at, draws=True) - needed(first, v, losses, at, draws=True)).mean(axis=1)
    free = paired.form_free(first.runs, second.runs, v, at.get(other[0]) if other else None)
    if free is not None:
        at["without a form"] = free
    at["ratio at these losses"] = [float(np.exp(point[0])), float(np.exp(point[-1]))]
    return between(f"M_{v}", second, first, float(point.mean()), draws, at, meaning, level)


def reached(result: LawResult, best: bool) -> float:
    """Fitted loss of the largest (or smallest) N and D together."""
    pick = np.max if best else np.min
    ends = {"N": pick(result.runs.n_params), "D": pick(result.runs.n_records)}
    return float(result.fit.predict(np.log([[ends[u] for u in result.law.variables]]))[0])


def _reached(result: LawResult, v: str, at: dict[str, float]) -> tuple[float, float]:
    """Fitted losses at the ends of the observed range of `v`, the other variable as in `at`."""
    values = result.runs.n_params if v == "N" else result.runs.n_records
    ends = [{v: x, **at} for x in (values.max(), values.min())]
    log_x = np.log([[float(e[u]) for u in result.law.variables] for e in ends])
    low, high = result.fit.predict(log_x)
    return float(low), float(high)


def needed(result: LawResult, v: str, losses: np.ndarray, at: dict, *, draws: bool = False) -> np.ndarray:
    """ln of the resource `v` at which the law reaches `losses` ([m], or [R, m] with one row a draw), [R, m]; +inf
    where it never does."""
    fit = result.fit
    theta = result.draws.theta if draws else fit.theta[None]
    law, theta = whole(fit.law, theta)
    i = law.variables.index(v)
    if not isinstance(law, Law):
        return fit.centre[i] + _bisect(
            law, theta, i, losses, [np.log(at.get(u, 1.0)) for u in law.variables] - fit.centre
        )
    rest = np.zeros(len(theta))
    if law.floor:
        rest = rest + np.exp(theta[:, 0])
    for j, u in enumerate(law.variables):
        if u != v:
            rest = rest + np.exp(theta[:, law.floor + j] - theta[:, law.n_terms + j] * (np.log(at[u]) - fit.centre[j]))
    left = np.atleast_2d(losses) - rest[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_left = np.where(left > 0, np.log(np.maximum(left, 1e-300)), -np.inf)
        return fit.centre[i] + (theta[:, [law.floor + i]] - log_left) / theta[:, [law.n_terms + i]]


def _bisect(law: Formula, theta_RxP: np.ndarray, i: int, losses_m: np.ndarray, z_V: np.ndarray) -> np.ndarray:
    """Centred ln of variable i at which the law reaches each loss, [R, m], by halving; a law falls in each
    variable."""
    shape = (len(theta_RxP), losses_m.shape[-1])
    low, high = np.full(shape, -FARTHEST), np.full(shape, FARTHEST)
    columns = [np.full(shape, z) for z in z_V]

    def above(z: np.ndarray) -> np.ndarray:
        columns[i] = z
        return law.loss_at(theta_RxP, columns) > losses_m

    never, always = above(high), ~above(low)
    for _ in range(50):
        middle = 0.5 * (low + high)
        up = above(middle)
        low, high = np.where(up, middle, low), np.where(up, high, middle)
    return np.where(never, np.inf, np.where(always, -np.inf, 0.5 * (low + high)))


def between(kind, top, bottom, log_value, draws, at, meaning, level, note="") -> Multiplier:
    """A ratio of two families from its ln and the paired draws of that ln."""
    key = top.runs.key
    ends: tuple[float | None, float | None] = (None, None)
    p, infinite = None, 0.0
    if draws is not None and log_value is not None:
        df = top.df + bottom.df
        found = interval(log_value, draws, level=level, method=method_of(top.draws), df=df)
        ends = tuple(None if e is None or abs(e) > 700 else float(np.exp(e)) for e in found.pair())
        p, infinite = p_value(log_value, draws, null=0.0, df=df), found.infinite
    return Multiplier(
        kind=kind,
        numerator=family_name(top.runs.key.family),
        denominator=family_name(bottom.runs.key.family),
        dataset=key.dataset,
        task=key.task,
        domain=key.domain,
        at=at,
        value=None if log_value is None else float(np.exp(log_value)),
        interval=ends,
        p=p,
        p_holm=None,
        infinite_draws=infinite,
        identified=top.identified and bottom.identified,
        meaning=meaning,
        note=note,
        draws=draws,
    )


def _short(result: LawResult, against: LawResult) -> str:
    """The part of the family's name that differs from the other's."""
    mine, other = result.runs.key.family, against.runs.key.family
    return " ".join(a for a, b in zip(mine, other, strict=True) if a != b)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
