"""What studies claim beyond one ratio: compute at equal loss, where one family overtakes, "up to", and transfer.

    M_C    N D that the numerator needs over what the denominator needs, at equal loss, each at its own cheapest
           N and D (cost c N D with one c for both: where FLOPs per record differ, multiply by their ratio)
    N_x    size at which two families' laws cross, at the largest D both were trained on
    m_N    the one factor by which all of a family's sizes must be multiplied if the families differ in nothing else,
           with the test of that (`paired`)
    D_T    effective data transferred (Hernandez et al. 2021): records that the numerator, trained on D_F of them,
           saves over what the denominator needs for the same loss
    max M  the largest of several tasks' ratios with the bootstrap distribution of the maximum, and the median
           beside it: the maximum of noisy ratios is biased upwards
    rho_T  ratio of kappas (`transfer`)

`under_other_forms` fits the rival forms; nothing else is fitted. Invariant: every ratio is the same statement
as its inverse, in the order of `multipliers`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ecg_jax.scaling import choice, forms, paired
from ecg_jax.scaling.allocation import cost_of_loss
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.multipliers import POINTS, Multiplier, between, compare, needed, pairs, reached
from ecg_jax.scaling.solve import fit_law
from ecg_jax.scaling.transfer import Transfer

CROSSING_GRID = 241
TELL = np.log(1.3)  # the smallest ratio that the planning is for
POWER = 1.96 + 0.84  # two-sided 5 %, power 80 %


def extra(results: Sequence[LawResult], transfers: Sequence[Transfer], options: Options) -> Iterator[Multiplier]:
    """M_C, N_x and m_N of every pair with a Hoffmann law, D_T of two paradigms, and rho_T."""
    level = options.level
    for first, second in pairs(results):
        if first.law.names == ("E", "A", "B", "alpha", "beta") and first.law.name == "hoffmann":
            yield compute(first, second, level)
            if options.bootstrap and first.identified and second.identified and not options.fixed:
                yield from one_factor(first, second, options)
        if "N" in first.law.variables and "U" not in first.law.variables:
            yield crossing(first, second, level)
        if first.runs.key.paradigm != second.runs.key.paradigm and set(first.law.variables) in ({"N", "D"}, {"D"}):
            yield transferred(first, second, level)
    of = {t.away.runs.key: t for t in transfers}
    for first, second in pairs([t.away for t in transfers]):
        one, two = of[first.runs.key], of[second.runs.key]
        estimate = float(np.log(one.kappa / two.kappa))
        draws = None
        if one.draws is not None and two.draws is not None:
            j = one.fit.law.names.index("kappa")
            draws = np.log(one.draws.raw[:, j]) - np.log(two.draws.raw[:, j])
        meaning = "kappa of the first over kappa of the second: how much faster OOD excess falls with ID excess"
        yield between("rho_T", first, second, estimate, draws, {}, meaning, level)


def compute(first: LawResult, second: LawResult, level: float) -> Multiplier:
    """Compute that `second` needs over what `first` needs, averaged over the losses both reach."""
    ends = [[reached(r, best) for best in (True, False)] for r in (first, second)]
    low, high = max(e[0] for e in ends), min(e[1] for e in ends)
    meaning = "N D at equal loss, each family at its cheapest N and D"
    if not low < high:
        return between("M_C", second, first, None, None, {}, meaning, level, "no loss that both families reach")
    losses = np.exp(np.linspace(np.log(low), np.log(high), POINTS))

    def cost(r: LawResult, raw: np.ndarray) -> np.ndarray:
        return cost_of_loss({k: raw[:, [j]] for j, k in enumerate(r.law.names)}, losses)

    point = (cost(second, second.fit.raw[None]) - cost(first, first.fit.raw[None]))[0]
    draws = None
    if first.draws is not None:
        with np.errstate(all="ignore"):
            draws = (cost(second, second.draws.raw) - cost(first, first.draws.raw)).mean(axis=1)
    at = {
        "loss": [float(low), float(high)],
        "ratio at these losses": [float(np.exp(point[0])), float(np.exp(point[-1]))],
    }
    return between("M_C", second, first, float(point.mean()), draws, at, meaning, level)


def one_factor(first: LawResult, second: LawResult, options: Options) -> Iterator[Multiplier]:
    """m: the second family needs m times the first's parameters, all else shared."""
    found = paired.shared(first.runs, second.runs, options.level)
    if found is None:
        return
    swap = paired.swapped(first.runs, second.runs, options.seed)
    at = {"p of all else shared": found.p_ratio_only} | ({} if swap is None else {"p of swapped families": swap})
    meaning = "factor between the sizes of the two families if they differ in nothing else"
    made = between("m_N", second, first, float(np.log(found.m)), None, at, meaning, options.level)
    note = "they differ in more than this" if found.p_ratio_only < 0.05 else ""
    yield replace(made, interval=found.interval, p=found.p_one_law, note=note)


def transferred(first: LawResult, second: LawResult, level: float) -> Multiplier:
    """Records that `first` saves, at the middle of its data and the largest size of both."""
    d_f = float(np.exp(0.5 * (np.log(first.runs.data[0]) + np.log(first.runs.data[-1]))))
    at = {"D_F": d_f, "N": float(min(r.runs.n_params.max() for r in (first, second)))}
    at = {k: x for k, x in at.items() if k == "D_F" or "N" in first.law.variables}
    place = np.log([[{"N": at.get("N"), "D": d_f}[v] for v in first.law.variables]])
    here = {k: x for k, x in at.items() if k == "N"}
    estimate = float(needed(second, "D", first.fit.predict(place), here)[0, 0])
    draws = None
    if first.draws is not None:
        losses = first.fit.law.predict(first.draws.theta, place - first.fit.centre)
        draws = needed(second, "D", losses, here, draws=True)[:, 0]
    meaning = f"records saved over {second.runs.key.paradigm} by {first.runs.key.paradigm} with {d_f:,.0f} of them"
    made = between("D_T", first, second, estimate, draws, at, meaning, level)
    at["multiplier"] = float(np.exp(estimate)) / d_f
    at |= _transfer_model(first, second, here)
    ends = tuple(None if e is None else e - d_f for e in made.interval)
    value = made.value - d_f if np.isfinite(made.value) else None
    note = "" if value is not None else "the other never reaches this loss, however many records it has"
    return replace(made, value=value, interval=ends, p=None, at=at, note=note)


def _transfer_model(first: LawResult, second: LawResult, here: dict[str, float]) -> dict[str, object]:
    """k, a, b of D_T = k D_F^a N^b over the first family's configurations; empty with fewer than five of them."""
    rows = []
    for n, d, loss in zip(first.runs.n_params, first.runs.n_records, first.fit.predict(first.log_x), strict=True):
        saved = np.exp(needed(second, "D", np.array([loss]), here | ({"N": n} if here else {}))[0, 0]) - d
        if 0 < saved < np.inf:
            rows.append((np.log(d), np.log(n), np.log(saved)))
    if len({r[:2] for r in rows}) < 5:
        return {}
    d, n, saved = np.array(rows).T
    basis = np.stack([np.ones(len(d)), d] + ([n] if here and len(set(n)) > 1 else []), axis=1)
    k, a, *b = np.linalg.lstsq(basis, saved, rcond=None)[0]
    return {"D_T = k D_F^a N^b": {"k": float(np.exp(k)), "a": float(a), "b": float(b[0]) if b else 0.0}}


def crossing(first: LawResult, second: LawResult, level: float) -> Multiplier:
    """Size from which the family with the lower loss changes, inside the sizes that both families have."""
    low = max(r.runs.n_params.min() for r in (first, second))
    high = min(r.runs.n_params.max() for r in (first, second))
    at = {"D": float(min(r.runs.n_records.max() for r in (first, second)))}
    meaning = "parameters at which the two laws cross"
    if not low < high:
        return between("N_x", first, second, None, None, at, meaning, level, "the families share no range of sizes")
    grid = np.linspace(np.log(low), np.log(high), CROSSING_GRID)

    def gap(draws: bool) -> np.ndarray:
        curves = []
        for r in (first, second):
            columns = {"N": grid, "D": np.full(len(grid), np.log(at["D"]))}
            z = np.stack([columns[v] for v in r.law.variables], axis=1) - r.fit.centre
            with np.errstate(over="ignore"):
                curves.append(r.fit.law.predict(r.draws.theta if draws else r.fit.theta[None], z))
        return curves[0] - curves[1]

    def roots(d: np.ndarray) -> np.ndarray:
        change = np.sign(d[:, 1:]) != np.sign(d[:, :-1])
        i = change.argmax(axis=1)
        rows = np.arange(len(d))
        part = d[rows, i] / np.where(d[rows, i] == d[rows, i + 1], 1.0, d[rows, i] - d[rows, i + 1])
        inside = grid[i] + np.clip(part, 0.0, 1.0) * (grid[1] - grid[0])
        below = np.abs(d[:, 0]) < np.abs(d[:, -1])  # no crossing: beyond the nearer end
        return np.where(change.any(axis=1), inside, np.where(below, -np.inf, np.inf))

    estimate = float(roots(gap(False))[0])
    if not np.isfinite(estimate):
        return between(
            "N_x", first, second, None, None, at, meaning, level, "not in range: the laws do not cross there"
        )
    drawn = roots(gap(True)) if first.draws is not None else None
    # A size is no ratio: there is nothing to test against one.
    return replace(between("N_x", first, second, estimate, drawn, at, meaning, level), p=None)


def largest(found: Sequence[Multiplier], *, level: float) -> Iterator[Multiplier]:
    """ "Up to" per kind and pair of families: the maximum over OOD tasks with its own bootstrap distribution."""
    groups: dict[tuple, list[Multiplier]] = {}
    for m in found:
        if m.domain != "id" and m.kind not in ("N_x", "D_T") and m.identified and m.value is not None:
            groups.setdefault((m.kind, m.numerator, m.denominator), []).append(m)
    for (kind, _, _), tasks in groups.items():
        if len(tasks) < 2:
            continue
        values = np.array([m.value for m in tasks])
        top = int(values.argmax())
        interval: tuple[float | None, float | None] = (None, None)
        if all(m.draws is not None and len(m.draws) == len(tasks[0].draws) for m in tasks):
            best = np.sort(np.max([np.where(np.isnan(m.draws), np.inf, m.draws) for m in tasks], axis=0))
            ends = np.quantile(best, [(1 - level) / 2, (1 + level) / 2], method="nearest")
            interval = tuple(float(np.exp(e)) if abs(e) < 700 else None for e in ends)
        without = {
            f"without {m.dataset} {m.task} {m.domain}": float(np.delete(values, i).max()) for i, m in enumerate(tasks)
        }
        by_domain = {d: [m.value for m in tasks if m.domain == d] for d in dict.fromkeys(m.domain for m in tasks)}
        at = {
            "median": float(np.median(values)),
            "range": [float(values.min()), float(values.max())],
            "tasks": len(tasks),
        }
        at |= {f"largest in {d}": float(max(v)) for d, v in by_domain.items()} | without
        yield replace(
            tasks[top], kind=f"max {kind}", at=at, interval=interval, p=None, p_holm=None, draws=None,
            meaning=f"largest of {len(tasks)} tasks; the interval is of the maximum, which noise pushes upwards",
        )  # fmt: skip


def seeds_to_tell(m: Multiplier) -> int | None:
    """Runs per configuration, in units of the present ones, until a ratio of 1.3 is told from 1 (power 80 %, 5 %
    two-sided); None where the ratio has no finite spread. Noise that seeds do not carry (misfit) stays."""
    if m.draws is None or not m.kind.startswith(("M_", "rho_")):
        return None
    low, high = np.quantile(np.where(np.isnan(m.draws), np.inf, m.draws), [0.159, 0.841], method="nearest")
    sd = 0.5 * (high - low)
    return max(1, int(np.ceil((POWER * sd / TELL) ** 2))) if np.isfinite(sd) else None


def under_other_forms(
    found: Sequence[Multiplier], results: Sequence[LawResult], options: Options, *, level: float
) -> list[Multiplier]:
    """The ratios with what the other joint forms give for each, as `at["under other forms"]`: point values only."""
    others: dict[tuple, dict[str, float]] = {}
    known = [r for r in results if r.identified and set(r.law.variables) == {"N", "D"}]
    for form in choice.TWO:
        law = forms.get(form, ("N", "D"))
        swapped = []
        for r in known:
            if r.law.name != form and int(r.runs.cells.max()) + 1 > law.size:
                x = r.runs.log_x(("N", "D"))
                made = fit_law(law, x, r.runs.loss, loss=options.loss, delta=options.delta, n_starts=choice.STARTS)
                swapped.append(replace(r, law=law, fit=made, draws=None))
        for pair in pairs(swapped):
            for m in compare(*pair, level=level):
                if m.value is not None and np.isfinite(m.value):
                    others.setdefault(m.statement, {})[form] = m.value
    return [
        replace(m, at=m.at | {"under other forms": others[m.statement]}) if m.statement in others else m for m in found
    ]
