"""`report.html`: one file that stands alone and says what was found, how sure it is, and everything that
was done.

Words and tables from results that are already computed. A law that is not identified is named so, with the
condition that failed and what was measured, in the place where its numbers would stand.

Invariant: no number without its interval or the reason why there is none, and no multiplier without its
name.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ecg_jax.scaling import checklist, claims, methods, numbers, one_law, page, probed
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.drawing import Drawing
from ecg_jax.scaling.families import RunSet, SetKey
from ecg_jax.scaling.multipliers import Multiplier, family_name
from ecg_jax.scaling.table import Table
from ecg_jax.scaling.transfer import Transfer


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


def _task(runs: RunSet) -> str:
    key = runs.key
    more = f", probe {key.probe}" if key.probe else ""
    more += f", {100 * key.label_fraction:g} % of the labels" if key.label_fraction != 1 else ""
    more += f", {key.metric}" if key.metric not in ("bce", "loss", "ce") else ""
    return _measured(key) + escape(more)


def _measured(of: SetKey | Multiplier) -> str:
    return escape(f"{of.dataset} {of.task}, {of.domain.replace('_', ' ').replace('ood', 'OOD').replace('id', 'ID')}")


# ------------------------------------------------------------------------------------------- laws


def _overview(study: Study) -> Iterator[str]:
    yield (
        "<p><i>N</i> counts the encoder's parameters, <i>D</i> the training records; losses are in "
        "nats. A law is "
        "printed only where the runs identify one; the conditions stand with each law below.</p>"
    )
    heads = ["Family", "Task", *(one_law.symbol(n) for n in ("alpha", "beta", "E")), "Known floor", "Held-out error"]
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
        yield f'<p class="law">{one_law.formula(r)}</p>' if r.identified else f"<p>{_refusal(r)}</p>"
        yield page.checks((c.ok, f"<b>{c.name}</b> {escape(c.text)}") for c in r.identification.conditions)
        yield page.figure(drawing.panels, drawing.caption)
        if r.identified:
            yield one_law.parameters(r, study.options)
            yield f"<p>{one_law.quality(r, study.options)}</p>"
            yield one_law.sensitivity(r, study.options)


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
    if rows := [_multiplier_row(m) for m in study.multipliers if m.identified]:
        yield page.table(heads, rows)
    missing = Counter(
        f"{escape(m.numerator)} over {escape(m.denominator)}, {_measured(m)}"
        for m in study.multipliers
        if not m.identified
    )
    if missing:
        listed = "; ".join(f"{what} ({n})" for what, n in missing.items())
        yield (
            f'<p><span class="refused">not identified</span> <span class="soft">{missing.total()} ratios, since one of '
            f"the two laws is not (multipliers.json has each): {listed}</span></p>"
        )


def _multiplier_row(m: Multiplier) -> list[str]:
    top, kind, v = (m.kind.split("_")[0].startswith("max"), *m.kind.removeprefix("max ").split("_"))
    letter = {"rho": "ρ", "N": "N", "D": "D", "m": "m"}.get(kind, "M")
    row = [
        f"{'max ' if top else ''}<i>{letter}</i><sub>{v}</sub> <small>{escape(m.meaning)}; "
        f"{escape(m.numerator)} over {escape(m.denominator)}</small>",
        _measured(m),
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
    if "without a form" in m.at:
        over += f"<small>without a form {numbers.short(m.at['without a form'])}</small>"
    if kind == "m":
        over = f"<small><i>p</i> of nothing else differing {numbers.p(m.at['p of all else shared'])}</small>"
        over += f"<small>{escape(m.note)}</small>" if m.note else ""
        if "p of swapped families" in m.at:
            over += f"<small><i>p</i> of swapped families {numbers.p(m.at['p of swapped families'])}</small>"
    if kind == "D" and v == "T":
        counted = numbers.short(m.at["multiplier"])
        over = f"<small>with {numbers.count(m.at['D_F'])} records, which count {counted} times</small>"
    if "under other forms" in m.at:
        others = (f"{f} {numbers.short(x)}" for f, x in m.at["under other forms"].items())
        over += f"<small>under other forms: {escape(', '.join(others))}</small>"
    if "best of k trials" in m.at:
        by_k = (
            f"{k}: {numbers.short(x)} {numbers.interval(ends)}" for k, (x, *ends) in m.at["best of k trials"].items()
        )
        always = "told from 1 at each" if m.at["told from 1 at every k"] else "not told from 1 at each"
        over += f"<small>best of k trials, {escape('; '.join(by_k))}: {always}</small>"
    if top:
        over = f"median {numbers.short(m.at['median'])}<small>range {numbers.interval(m.at['range'])}</small>"
    share = f"<small>{numbers.percent(m.infinite_draws)} of draws infinite</small>" if m.infinite_draws else ""
    runs = claims.seeds_to_tell(m)
    needed = f"<small>1.3 told from 1 with {runs} x these runs</small>" if runs and runs > 1 else ""
    return [
        *row,
        numbers.count(m.value) if letter in "ND" else numbers.short(m.value),
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
