"""From a sweep to ordered jobs: stages, learning-rate trials, runs; and which rate a run takes.

Trials are full runs of the study's recipe, at offset 0 and seed 0, of every family with the same rates. Chosen is the
lowest loss on `val`. Where the best rate of any family stands at an edge of the rates, every family of that rung and D
gets the next one, as often as `extensions` allows. A run takes the rate of its family at the largest tuned rung that is
not above its own, scaled by width (`optim.base_width`) if it is another rung, and at the tuned D nearest in log D; the
run that a chosen trial already is, is not trained again.

The order: stages, trials, runs; each cheapest first, so that mistakes show within minutes and an allocation that
ends early leaves whole ladders of small rungs instead of a few large runs; `order = "long"` puts the longest runs
first, which ends sooner where there are many devices.

Looks at no file: `outcome` tells of trials. Invariant: the jobs are a function of the sweep and the finished trials.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ecg_jax.models import ladder
from ecg_jax.sweep import cells, cost
from ecg_jax.sweep.cells import Cell
from ecg_jax.sweep.spec import Sweep, Tuning

BOOK = "codebook"
Outcome = Callable[[str], float | None]  # name of a trial -> loss on val, infinite if it diverged, None if unfinished


@dataclass(frozen=True)
class Job:
    """One thing to do.

    kind     "codebook" and "codes" (of the data set `data`) are stages
    lr       None: as the configuration has it, or not decided yet (then `needs` is not empty)
    trial    number of a trial, counted over the rates of its rung and D from 1; of a run, that of the trial that it is
    source   name of the trial that this run is
    needs    names of jobs that have to end first
    """

    kind: Literal["codebook", "codes", "trial", "run"]
    name: str
    cell: Cell | None = None
    data: str = ""
    lr: float | None = None
    base_width: int = 0
    trial: int = 0
    source: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The trials of all families at one rung and D. best: family -> rate, None until all trials have ended."""

    jobs: tuple[Job, ...]
    rates: tuple[float, ...]
    best: dict[tuple[str, str, str], float | None] | None


def plan(sweep: Sweep, outcome: Outcome, prices: dict[tuple, float] | None = None) -> list[Job]:
    """All jobs in the order in which they are to be begun; `prices` remembers what was reckoned, for the next call."""
    found = cells.expand(sweep)
    groups = {
        (tuning.data, rung, subset): _group(sweep, tuning, rung, subset, outcome, _families(sweep, tuning, found))
        for tuning, rung, subset in _places(sweep)
    }
    trials = [job for group in groups.values() for job in group.jobs]
    runs = [_run(sweep, one, groups) for one in found]
    stages = list(_stages(sweep, [*trials, *runs]))
    price = _price(sweep, {} if prices is None else prices)
    sign = -1 if sweep.order == "long" else 1
    return stages + sorted(trials, key=price) + sorted(runs, key=lambda job: sign * price(job))


def at_edges(sweep: Sweep, outcome: Outcome) -> list[str]:
    """What the trials leave open: families whose best rate is still the first or last one."""
    found, lines = cells.expand(sweep), []
    for tuning, rung, subset in _places(sweep):
        group = _group(sweep, tuning, rung, subset, outcome, _families(sweep, tuning, found))
        for family, rate in (group.best or {}).items():
            if rate is None or rate in (group.rates[0], group.rates[-1]):
                what = "no rate ends" if rate is None else f"the best rate, {rate:g}, is at the edge"
                where = f"rung {rung}, D {subset:.0%}, {' '.join(family)}"
                lines.append(f"{where}: {what}; widen the rates of [[tuning]]")
    return lines


def _places(sweep: Sweep) -> Iterator[tuple[Tuning, str, float]]:
    return ((t, rung, subset) for t in sweep.tunings for rung in t.rungs for subset in t.subsets)


def _families(sweep: Sweep, tuning: Tuning, found: list[Cell]) -> list[tuple[str, str, str]]:
    """Those whose runs take their rates from this tuning."""
    return list(dict.fromkeys(one.family for one in found if _tuning(sweep, one) is tuning))


def _tuning(sweep: Sweep, one: Cell) -> Tuning | None:
    """Of the cell's own data, else the first."""
    own = [tuning for tuning in sweep.tunings if tuning.data == one.data]
    return next(iter(own or sweep.tunings), None)


def _group(
    sweep: Sweep, tuning: Tuning, rung: str, subset: float, outcome: Outcome, families: list[tuple[str, str, str]]
) -> Group:
    def job(family: tuple[str, str, str], rate: float) -> Job:
        architecture, paradigm, world = family
        one = cells.cell(tuning.data, architecture, paradigm, world, rung, subset)
        needs = (_codes(tuning.data),) if paradigm == "SSL" and sweep.book.run else ()
        return Job("trial", f"{one.name}-lr{rate:g}", one, lr=rate, trial=order.index(rate) + 1, needs=needs)

    order = list(tuning.rates)  # trials are numbered as their rates were added
    low = high = 0
    while True:
        rates = sorted(order)
        trials = tuple(job(family, rate) for rate in rates for family in families)
        losses = {(trial.cell.family, trial.lr): outcome(trial.name) for trial in trials}
        if None in losses.values():
            return Group(trials, tuple(rates), None)
        best = {family: _best({rate: losses[family, rate] for rate in rates}) for family in families}
        more = []
        if low < tuning.extensions and any(rate in (None, rates[0]) for rate in best.values()):
            more.append(_beyond(rates[0], rates[1]))
            low += 1
        if high < tuning.extensions and rates[-1] in best.values():
            more.append(_beyond(rates[-1], rates[-2]))
            high += 1
        if not more:
            return Group(trials, tuple(rates), best)
        order += more


def _best(losses: dict[float, float]) -> float | None:
    """The rate of lowest loss (of equal ones the lowest rate); None where all diverged."""
    rate = min(losses, key=lambda rate: (losses[rate], rate))
    return rate if math.isfinite(losses[rate]) else None


def _beyond(edge: float, inner: float) -> float:
    """The rate that follows upon `edge`, to three digits."""
    return float(f"{edge * edge / inner:.3g}")


def _run(sweep: Sweep, one: Cell, groups: dict[tuple[str, str, float], Group]) -> Job:
    needs = (_codes(one.data),) if one.paradigm == "SSL" and sweep.book.run else ()
    tuning = _tuning(sweep, one)
    if tuning is None:
        return Job("run", one.name, one, needs=needs)
    letter, own = one.rung[0], ladder.count(ladder.get(one.rung))
    tuned = sorted(tuning.rungs, key=lambda rung: ladder.count(ladder.get(letter + rung)))
    below = [rung for rung in tuned if ladder.count(ladder.get(letter + rung)) <= own]
    rung = below[-1] if below else tuned[0]
    trained = cells.counts(sweep.data[tuning.data])[0]["train"]
    here = math.log(cells.size(sweep, one))
    subset = min(tuning.subsets, key=lambda share: (abs(math.log(share * trained) - here), -share))
    group = groups[tuning.data, rung, subset]
    mine = [trial for trial in group.jobs if trial.cell.family == one.family]
    if group.best is None:
        return Job("run", one.name, one, needs=(*needs, *(trial.name for trial in group.jobs)))
    rate = group.best[one.family]
    if rate is None:  # every trial diverged: there is nothing to run it at
        return Job("run", one.name, one, needs=(*needs, "a rate that does not diverge"))
    chosen = next(trial for trial in mine if trial.lr == rate)
    if chosen.cell == one:
        return Job("run", one.name, one, lr=rate, trial=chosen.trial, source=chosen.name, needs=needs)
    width = ladder.get(letter + rung).width if letter + rung != one.rung else 0
    return Job("run", one.name, one, lr=rate, base_width=width, needs=needs)


def _stages(sweep: Sweep, jobs: list[Job]) -> Iterator[Job]:
    """The codebook and the codes of all data that SSL jobs need, where the sweep makes them."""
    if sweep.book is None or sweep.book.run is None:
        return
    yield Job("codebook", BOOK)
    for data in dict.fromkeys(job.cell.data for job in jobs if job.cell.paradigm == "SSL"):
        yield Job("codes", _codes(data), data=data, needs=(BOOK,))


def _codes(data: str) -> str:
    return f"codes-{data}"


def _price(sweep: Sweep, known: dict[tuple, float]) -> Callable[[Job], float]:
    """FLOPs of a job at most; the same for all rates, seeds and offsets of a place in the grid."""
    anything = cost.device("h200")

    def price(job: Job) -> float:
        one = job.cell
        place = (one.data, one.rung, one.input, one.paradigm, one.subset)
        if place not in known:
            known[place] = cost.estimate(sweep, one, anything).flops[1]
        return known[place]

    return price
