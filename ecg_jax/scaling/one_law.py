"""What the report says about one law: its formula, parameters, how well it fits, and the same runs fitted otherwise.

HTML from results that are already computed. Invariant: no estimate without its interval or the reason why it has none.
"""

from collections.abc import Iterator
from html import escape

import numpy as np

from ecg_jax.scaling import adequacy, identify, methods, numbers, page
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.export import allocation_of, amplitudes_of, compute_of
from ecg_jax.scaling.intervals import interval, method_of
from ecg_jax.scaling.restrict import whole

SYMBOL = {"alpha": "α", "beta": "β", "kappa": "κ"}


def symbol(name: str) -> str:
    """A parameter as HTML, Greek where it is."""
    return f'<i class="v">{SYMBOL.get(name, name)}</i>'


def formula(r: LawResult) -> str:
    """The law with its numbers where it is a plain sum of powers."""
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


def parameters(r: LawResult, options: Options) -> str:
    """Table of estimates with intervals, raw and at the middle of the runs."""
    rows = []
    for name in r.law.names:
        ends = numbers.interval(r.intervals[name].pair()) if name in r.intervals else "no bootstrap asked for"
        rows.append([f"{symbol(name)} {methods.MEANING.get(name, '')}", numbers.short(r.fit.parameters[name], 4), ends])
    law, theta = whole(r.fit.law, r.fit.theta)
    for i, v in zip(amplitudes_of(law), law.variables, strict=False):
        centre, share = np.exp(r.fit.centre[law.variables.index(v)]), np.exp(theta[i])
        log_draws = whole(r.fit.law, r.draws.theta)[1][:, i] if r.draws else None
        ends = "no bootstrap asked for"
        if log_draws is not None:
            got = interval(float(np.log(share)), log_draws, level=options.level, method=method_of(r.draws), df=r.df)
            ends = numbers.interval([None if e is None else float(np.exp(e)) for e in got.pair()])
        rows.append([f"excess that {v} leaves at {v} = {numbers.count(centre)}", numbers.short(share, 4), ends])
    return page.table(["Parameter", "Estimate", f"{100 * options.level:g} % interval"], rows)


def quality(r: LawResult, options: Options) -> str:
    """Sentences on residuals, seeds, optimum, compute, lack of fit, extrapolation and flagged runs."""
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
    words += [escape(w) + ("" if "draws" in w else " (profile likelihood)") for w in r.weak]
    words += _compute(r)
    bad = adequacy.failed(r.tested)
    if bad:
        why = "; ".join(f"{escape(c.text)}, p {numbers.p(c.p)}" for c in bad)
        words.append(
            f'<b class="refused">Lack of fit</b>: the runs contradict this form ({why}); its intervals assume it'
        )
    elif r.tested:
        words.append(f"no lack of fit was found ({', '.join(f'{c.name} p {numbers.p(c.p)}' for c in r.tested)})")
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


def _compute(r: LawResult) -> Iterator[str]:
    """IsoFLOP and envelope, where the runs have budgets in common."""
    found = compute_of(r)
    if found is None:
        return
    iso = found["isoflop"]
    if len(iso["budgets"]) > 1:
        refused = f" ({len(iso['refused'])} budgets refused)" if iso["refused"] else ""
        yield (
            f"IsoFLOP parabolas at {len(iso['budgets'])} budgets of {found['cost']}{refused} put the best N at power "
            f"{numbers.short(iso['a'], 2)} of the budget, the best D at {numbers.short(iso['b'], 2)}"
        )
    hull = found["envelope"]
    if hull["a"] is not None:
        yield (
            f"{len(hull['runs'])} runs form the envelope of loss over {found['cost']}; along it N grows as the power "
            f"{numbers.short(hull['a'], 2)}"
        )


def _as_share(sd: float, logarithmic: bool) -> str:
    return numbers.percent(sd) if logarithmic else f"{numbers.short(sd)} nats"


def sensitivity(r: LawResult, options: Options) -> str:
    """Table of the same runs fitted otherwise."""
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
    return page.table(["The same runs fitted otherwise", "Runs", *(symbol(n) for n in names)], rows)
