"""`report.html`: one file that stands alone and says what was found, how sure it is, and everything that
was done.

Words and tables from results that are already computed. A law that is not identified is named so, with the
condition that failed and what was measured, in the place where its numbers would stand.

Invariant: no number without its interval or the reason why there is none, and no multiplier without its
name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ecg_jax.scaling import checklist, claims, identify, methods, numbers, page, probed
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.drawing import Drawing
from ecg_jax.scaling.export import allocation_of, amplitudes_of
from ecg_jax.scaling.families import RunSet
from ecg_jax.scaling.multipliers import Multiplier, family_name
from ecg_jax.scaling.restrict import whole
from ecg_jax.scaling.table import Table
from ecg_jax.scaling.transfer import Transfer

SYMBOL = {"alpha": "α", "beta": "β"}


@dataclass(frozen=True)
class Study:
    """Everything the report shows."""

    title: str
    banner: str | None
    version: str
    options: Options
    table: Table
    results: tuple[LawResult, ...]
    multipliers: tuple[Multiplier, ...]
    transfers: tuple[Transfer, ...]
    drawings: tuple[Drawing, ...]
    predicted: str | None  # text of predictions.csv
    probed: tuple[dict[str, str], ...] = ()  # `probed.read`


def render(study: Study) -> str:
    """The whole report as HTML text."""
    return page.page(study.title, _body(study))


def _body(study: Study) -> Iterator[str]:
    if study.banner:
        yield f'<p class="tag">{escape(study.banner)}</p>'
    yield f"<h1>{escape(study.title)}</h1>"
    yield f'<p class="lede">{_lede(study)}</p>'
    sections = [("laws", "Laws", _overview), ("each", "Each law", _each)]
    if study.multipliers:
        sections.append(("families", "Families compared", _multipliers))
    if study.transfers or any(d.kind == "transfer" for d in study.drawings):
        sections.append(("transfer", "OOD against ID", _transfer))
    if any(d.kind == "trajectory" for d in study.drawings):
        sections.append(("trajectories", "Loss against step", _trajectories))
    if study.probed:
        sections.append(("probed", "Probes", lambda s: probed.render(s.probed)))
    if study.predicted:
        sections.append(("predictions", "Predictions", _predictions))
    sections.append(("methods", "Methods", lambda s: methods.render(s.results, s.transfers, s.options, s.version)))
    sections.append(("done", "What was done", lambda s: checklist.render(s.table, s.results, s.options, s.version)))
    yield "<nav>" + " ".join(f'<a href="#{a}">{t}</a>' for a, t, _ in sections) + "</nav>"
    for anchor, title, make in sections:
        yield f'<h2 id="{anchor}">{title}</h2>'
        yield from make(study)


def _lede(study: Study) -> str:
    families = list(dict.fromkeys(r.runs.key.family for r in study.results))
    runs = {run for r in study.results for run in r.runs.runs}
    n = np.concatenate([r.runs.n_params for r in study.results])
    d = np.concatenate([r.runs.n_records for r in study.results])
    known = sum(r.identified for r in study.results)
    total = len(study.results)
    laws = f"All {total} laws are identified" if known == total else f"{known} of {total} laws are identified"
    if total == 1:
        laws = "The law is identified" if known else "The law is not identified"
    return (
        f"{len(runs)} runs of {_families(len(families))}: {_range(n, 'parameters')}, "
        f"{_range(d, 'records')}. {laws}. "
        f"Intervals are at the {100 * study.options.level:g} % level."
    )


def _families(k: int) -> str:
    return "one family" if k == 1 else f"{k} families"


def _range(values: np.ndarray, unit: str) -> str:
    low, high = numbers.count(values.min()), numbers.count(values.max())
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _symbol(name: str) -> str:
    return f'<i class="v">{SYMBOL.get(name, name)}</i>'


def _task(runs: RunSet) -> str:
    key = runs.key
    more = f", probe {key.probe}" if key.probe else ""
    more += f", {100 * key.label_fraction:g} % of the labels" if key.label_fraction != 1 else ""
    more += f", {key.metric}" if key.metric not in ("bce", "loss", "ce") else ""
    return escape(
        f"{key.dataset} {key.task}, {key.domain.replace('_', ' ').replace('ood', 'OOD').replace('id', 'ID')}{more}"
    )


# ------------------------------------------------------------------------------------------- laws


def _overview(study: Study) -> Iterator[str]:
    yield (
        "<p><i>N</i> counts the encoder's parameters, <i>D</i> the training records; losses are in "
        "nats. A law is "
        "printed only where the runs identify one; the conditions stand with each law below.</p>"
    )
    heads = ["Family", "Task", *(_symbol(n) for n in ("alpha", "beta", "E")), "Known floor", "Held-out error"]
    rows = []
    for r in study.results:
        row = [escape(family_name(r.runs.key.family)), _task(r.runs)]
        if r.identified:
            row += [_cell(r, name) for name in ("alpha", "beta", "E")] + [_floor(r), _held_out(r)]
        else:
            row.append(_refusal(r))
        rows.append(row)
    yield page.table(heads, rows)


def _cell(r: LawResult, name: str) -> str:
    """Estimate with its interval below it."""
    if name not in r.law.names:
        return numbers.DASH
    ends = r.intervals[name].pair() if name in r.intervals else None
    shown = f"<small>{numbers.interval(ends)}</small>" if ends else ""
    return f"{numbers.short(r.fit.parameters[name])}{shown}"


def _floor(r: LawResult) -> str:
    known = r.runs.known_floor()
    if known is None or "E" not in r.law.names:
        return "not stated" if known is None else numbers.short(known, 4)
    if "E" not in r.intervals:
        return numbers.short(known, 4)
    covered = r.intervals["E"].covers(known)
    return f"{numbers.short(known, 4)}<small>{'inside' if covered else 'outside'} the interval of E</small>"


def _held_out(r: LawResult) -> str:
    if r.held_out is None:
        return "too few sizes"
    plural = "run" if r.held_out.n == 1 else "runs"
    return f"{numbers.percent(r.held_out.log_rmse)}<small>{r.held_out.n} {plural}</small>"


def _refusal(r: LawResult) -> str:
    why = "; ".join(escape(c.text) for c in r.identification.failed)
    return f'<span class="refused">law not identified</span> <span class="soft">{why}</span>'


def _each(study: Study) -> Iterator[str]:
    for drawing in (d for d in study.drawings if d.kind == "law"):
        r = drawing.result
        yield f"<h3>{escape(family_name(r.runs.key.family))} <span>{_task(r.runs)}</span></h3>"
        yield f'<p class="law">{_formula(r)}</p>' if r.identified else f"<p>{_refusal(r)}</p>"
        yield page.checks((c.ok, f"<b>{c.name}</b> {escape(c.text)}") for c in r.identification.conditions)
        yield page.figure(drawing.panels, drawing.caption)
        if r.identified:
            yield _parameters(r, study.options)
            yield f"<p>{_quality(r, study.options)}</p>"
            yield _sensitivity(r, study.options)


def _formula(r: LawResult) -> str:
    values = r.fit.parameters
    if r.law.name not in ("hoffmann", "power", "power0"):
        return f"<i>L</i> = {escape(r.law.formula)}" if "=" not in r.law.formula else escape(r.law.formula)
    terms = [numbers.short(values["E"])] if "E" in values else []
    for v, (amplitude, exponent) in {"N": ("A", "alpha"), "D": ("B", "beta")}.items():
        if amplitude in values:
            terms.append(
                f"{numbers.short(values[amplitude])} "
                f"<i>{v}</i><sup>{numbers.MINUS}{numbers.short(values[exponent])}</sup>"
            )
    return f"<i>L</i> = {' + '.join(terms)}"


def _parameters(r: LawResult, options: Options) -> str:
    rows = []
    for name in r.law.names:
        ends = numbers.interval(r.intervals[name].pair()) if name in r.intervals else "no bootstrap asked for"
        rows.append(
            [f"{_symbol(name)} {methods.MEANING.get(name, '')}", numbers.short(r.fit.parameters[name], 4), ends]
        )
    law, theta = whole(r.fit.law, r.fit.theta)
    for i, v in zip(amplitudes_of(law), law.variables, strict=False):
        centre, share = np.exp(r.fit.centre[law.variables.index(v)]), np.exp(theta[i])
        log_draws = whole(r.fit.law, r.draws.theta)[1][:, i] if r.draws else None
        ends = "no bootstrap asked for"
        if log_draws is not None:
            from ecg_jax.scaling.intervals import interval, method_of

            got = interval(float(np.log(share)), log_draws, level=options.level, method=method_of(r.draws), df=r.df)
            ends = numbers.interval([None if e is None else float(np.exp(e)) for e in got.pair()])
        rows.append([f"excess that {v} leaves at {v} = {numbers.count(centre)}", numbers.short(share, 4), ends])
    return page.table(["Parameter", "Estimate", f"{100 * options.level:g} % interval"], rows)


def _quality(r: LawResult, options: Options) -> str:
    c, fit = r.fit.certificate, r.fit
    words = [
        f"{fit.n} runs in {int(r.runs.cells.max()) + 1} configurations; residual standard deviation "
        f"{_as_share(identify.residual_sd(fit), fit.logarithmic)}"
    ]
    if r.noise:
        pooled = f" pooled over {r.noise.pooled_over} families" if r.noise.pooled_over > 1 else ""
        words.append(
            f"repeated seeds differ by {numbers.percent(r.noise.log)} ({r.noise.df} degrees of freedom{pooled})"
        )
    if len(r.runs.spread) > 1:
        parts = (f"{k} {numbers.percent(sd)} ({df} df)" for k, (sd, df) in r.runs.spread.items())
        words.append(f"spread by its origin: {', '.join(parts)}")
    agree = f"{c.starts_agreeing} of {c.starts} starts reached this optimum"
    gap = (
        "no other was found"
        if c.second_best_gap is None
        else f"the next lies {numbers.percent(c.second_best_gap)} higher"
    )
    words.append(f"{agree}, {gap}; scaled gradient {c.scaled_gradient:.0e}")
    if c.boundary:
        words.append(f"at a boundary: {', '.join(c.boundary)}")
    best = allocation_of(r, options.level)
    if best is not None:
        span = f" ({numbers.interval(best['a_interval'], 2)})" if "a_interval" in best else ""
        words.append(
            f"at compute proportional to N D the optimal N grows as its power {numbers.short(best['a'], 2)}{span}; for "
            f"the largest budget here that is N = {numbers.count(best['n_params'])} with D = "
            f"{numbers.count(best['n_records'])}"
        )
    words += [f"{escape(w)} (profile likelihood)" for w in r.weak]
    if not c.converged:
        words.append("<b>the optimiser did not converge</b>")
    if r.held_out:
        words.append(
            f"fitted without the {escape(r.held_out.rule)}, the law misses them by "
            f"{numbers.percent(r.held_out.log_rmse)}"
        )
    else:
        words.append("too few sizes to hold the largest runs out")
    if not r.runs.converged.all():
        flagged = [f"{n} ({s})" for n, s in zip(r.runs.runs, r.runs.status, strict=True) if s != "done"]
        words.append(f"kept though flagged: {escape(', '.join(flagged[:8]))}{' and more' if len(flagged) > 8 else ''}")
    return ". ".join(w[0].upper() + w[1:] if w[0] != "<" else w for w in words) + "."


def _as_share(sd: float, logarithmic: bool) -> str:
    return numbers.percent(sd) if logarithmic else f"{numbers.short(sd)} nats"


def _sensitivity(r: LawResult, options: Options) -> str:
    names = r.law.names
    rows = [
        [
            f"as above (loss {options.loss})",
            str(r.fit.n),
            *(numbers.short(r.fit.parameters[n]) for n in names),
        ]
    ]
    for v in r.variants:
        cells = [numbers.short(v.parameters[n]) for n in names] if v.parameters else ["too few runs are left"]
        rows.append([escape(v.what), str(v.n), *cells])
    return page.table(["The same runs fitted otherwise", "Runs", *(_symbol(n) for n in names)], rows)


# --------------------------------------------------------------------------------- other sections


def _multipliers(study: Study) -> Iterator[str]:
    yield (
        "<p>Two kinds of ratio, which answer different questions. <b>rho</b> is a ratio of exponents: "
        "how much faster one "
        "family's loss falls, saying nothing about levels. <b>M</b> is a ratio of resources at equal "
        "loss: the "
        "geometric mean over the losses that both families reach inside their observed sizes. "
        "Architectures are compared "
        "within one input and one paradigm. <i>p</i> tests a ratio of one; Holm's correction runs over "
        "tasks.</p>"
    )
    yield from (page.figure(d.panels, d.caption, wide=True) for d in study.drawings if d.kind == "forest")
    level = f"{100 * study.options.level:g} % interval"
    heads = ["Ratio", "Task", "Value", level, "<i>p</i> (Holm)", "At equal loss"]
    yield page.table(heads, [_multiplier_row(m) for m in study.multipliers])


def _multiplier_row(m: Multiplier) -> list[str]:
    top, kind, v = (m.kind.split("_")[0].startswith("max"), *m.kind.removeprefix("max ").split("_"))
    letter = {"rho": "ρ", "N": "N"}.get(kind, "M")
    row = [
        f"{'max ' if top else ''}<i>{letter}</i><sub>{v}</sub> <small>{escape(m.meaning)}; "
        f"{escape(m.numerator)} over {escape(m.denominator)}</small>",
        escape(f"{m.dataset} {m.task}, {m.domain.replace('_', ' ').replace('ood', 'OOD').replace('id', 'ID')}"),
    ]
    if not m.identified:
        return [
            *row,
            '<span class="refused">not identified</span> <span class="soft">one of the laws is not</span>',
        ]
    if m.value is None:
        return [*row, f'<span class="soft">{escape(m.note)}</span>']
    over = numbers.DASH
    if "ratio at these losses" in m.at:
        drift = m.at["ratio at these losses"]
        over = (
            f"{numbers.interval(m.at['loss'])}<small>ratio there {numbers.short(drift[0])} and "
            f"{numbers.short(drift[1])}</small>"
        )
    if "under other forms" in m.at:
        others = (f"{f} {numbers.short(x)}" for f, x in m.at["under other forms"].items())
        over += f"<small>under other forms: {escape(', '.join(others))}</small>"
    if top:
        over = f"median {numbers.short(m.at['median'])}<small>range {numbers.interval(m.at['range'])}</small>"
    share = f"<small>{numbers.percent(m.infinite_draws)} of draws infinite</small>" if m.infinite_draws else ""
    runs = claims.seeds_to_tell(m)
    needed = f"<small>1.3 told from 1 with {runs} x these runs</small>" if runs and runs > 1 else ""
    return [
        *row,
        numbers.count(m.value) if letter == "N" else numbers.short(m.value),
        (numbers.interval(m.interval) if m.interval != (None, None) else "unbounded") + share + needed,
        escape(numbers.p(m.p_holm)),
        over,
    ]


def _transfer(study: Study) -> Iterator[str]:
    if study.transfers:
        yield (
            "<p>One joint law for both losses of the same runs, <i>L</i><sub>ID</sub> = <i>E</i> + <i>g</i> and "
            "<i>L</i><sub>OOD</sub> = <i>E</i><sub>o</sub> + <i>K g</i><sup>κ</sup>: both floors are fitted. κ below 1 "
            "means that OOD loss falls more slowly than ID loss. Two-step and orthogonal regression stand beside it "
            "for comparison; they take the floors as known.</p>"
        )
        heads = ["Family", "Task", "κ", "<i>E</i><sub>o</sub>", "<i>p</i> (κ = 1)", "Two-step, orthogonal"]
        rows = []
        for t in study.transfers:
            row = [escape(family_name(t.away.runs.key.family)), _task(t.away.runs)]
            if not (t.home.identified and t.away.identified):
                why = "one of its two laws is not identified"
                rows.append([*row, f'<span class="refused">not identified</span> <span class="soft">{why}</span>'])
                continue
            ends = {k: numbers.interval(t.intervals[k].pair()) if t.intervals else "" for k in ("kappa", "Eo")}
            p = t.fit.parameters
            row += [f"{numbers.short(p[k])}<small>{ends[k]}</small>" for k in ("kappa", "Eo")]
            rows.append(
                [*row, escape(numbers.p(t.p_kappa_one)), f"{numbers.short(t.two_step)}, {numbers.short(t.orthogonal)}"]
            )
        yield page.table(heads, rows)
    yield from (page.figure(d.panels, d.caption) for d in study.drawings if d.kind == "transfer")


def _trajectories(study: Study) -> Iterator[str]:
    yield from (page.figure(d.panels, d.caption) for d in study.drawings if d.kind == "trajectory")


def _predictions(study: Study, most: int = 40) -> Iterator[str]:
    import csv

    identified: Sequence[LawResult] = [r for r in study.results if r.identified]
    rows = list(csv.DictReader(study.predicted.splitlines()))
    yield (
        "<p>Interval of a new run: the law's own uncertainty and the scatter of runs around it. "
        "Everything, also the "
        f"interval of the law alone, is in <code>predictions.csv</code>. {len(identified)} of "
        f"{len(study.results)} laws are "
        "identified; the others predict nothing here.</p>"
    )
    cells = []
    for row in rows[:most]:
        who = escape(" / ".join(row[f] for f in ("architecture", "paradigm", "input")))
        task = escape(f"{row['dataset']} {row['task']} {row['domain']}")
        size = [numbers.count(float(row[f])) if row.get(f) else numbers.DASH for f in ("n_params", "n_records")]
        if row["identified"] == "True":
            ends = [float(row[f]) if row[f] else None for f in ("low", "high")]
            value = [numbers.short(float(row["predicted"]), 4), numbers.interval(ends, 4)]
        else:
            value = ['<span class="refused">law not identified</span>']
        cells.append([who, task, *size, *value])
    yield page.table(["Family", "Task", "<i>N</i>", "<i>D</i>", "Predicted", "Interval"], cells)
    if len(rows) > most:
        yield f"<p>The first {most} of {len(rows)} rows.</p>"
