"""The report's last section: form, loss, delta, weights, rows left out and why, starts, certificate,
intervals, version.

What scaling studies leave unsaid, and what moves their conclusions (Misfitting, arXiv 2502.18969): it is
all said here, for the fit at hand and not in general. Invariant: every row of the input is accounted for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from ecg_jax.scaling import adequacy, bootstrap, identify, numbers, page, starts
from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.methods import LOSSES
from ecg_jax.scaling.table import DEFAULTS, Table


def render(table: Table, results: Sequence[LawResult], options: Options, version: str) -> Iterator[str]:
    """HTML of the section."""
    yield page.definitions(_items(table, results, options, version))


def _items(table: Table, results: Sequence[LawResult], options: Options, version: str) -> Iterator[tuple[str, str]]:
    fitted = [r for r in results if r.fit]
    yield "Sources", _sources(table)
    yield "Rows", _rows(table, results)
    if table.notes:
        yield "Noticed", " ".join(escape(n) for n in table.notes)
    if table.defaults:
        said = {
            "domain": "id for task pretrain, else ood_unseen",
            "floor": "not known",
            "prior": "not known",
            "probe": "none",
        }
        values = (f"{k} ({said.get(k, DEFAULTS[k])})" for k in table.defaults)
        yield "Columns taken at their default", escape(", ".join(values))
    mixed = {c for r in results for c in r.runs.mixed}
    if mixed:
        yield "Mixed families", f"Runs of one family differ in {escape(', '.join(sorted(mixed)))}."
    forms = Counter(r.law.formula for r in fitted)
    how = f"asked for: {options.form}"
    if options.form == "auto":
        chosen = sum(r.chosen is not None for r in fitted)
        how = f"{chosen} by rolling-origin extrapolation, {len(fitted) - chosen} by the design (too few sizes)"
    yield (
        "Form",
        escape("; ".join(f"L = {f} ({k} fits)" for f, k in forms.items()) or "none was fitted") + f"; {how}",
    )
    yield "Loss", _loss(fitted, options)
    yield "Weights", _weights(options)
    yield "Lack of fit", _lack(fitted)
    yield "Flagged runs", _flagged(results)
    yield (
        "Starts",
        (
            f"grid of {len(starts.EXPONENTS)} x {len(starts.EXPONENTS)} exponents from "
            f"{starts.EXPONENTS[0]:g} to "
            f"{starts.EXPONENTS[-1]:g} ({len(starts.EXPONENTS_1D)} for one variable), amplitudes by "
            f"non-negative least squares "
            "on relative residuals; the best ten apart from each other, each by damped Newton with the "
            "exact Hessian"
        ),
    )
    yield "Certificate", _certificate(fitted)
    yield "Intervals", _intervals(fitted, options)
    yield (
        "Identification",
        (
            f"at least {identify.LEAST_SIZES} sizes of each variable; constant predictor over best loss "
            f"at least "
            f"{identify.LEAST_RATIO:g}; excess falling by at least {100 * identify.LEAST_FALL['D']:.0f} "
            f"% over D and "
            f"{100 * identify.LEAST_FALL['N']:.0f} % over N, each by more than {identify.SEED_SDS:g} "
            f"seed SDs; "
            f"{sum(r.identified for r in results)} of {len(results)} laws pass"
        ),
    )
    yield (
        "Held out",
        "the runs of the largest N and D where enough sizes remain, else their common corner; see each law",
    )
    yield "Tuning", _tuning(table)
    yield "Version", f"ecg_jax {escape(version)}"
    yield (
        "Files",
        "<code>laws.json</code>, <code>multipliers.json</code>, <code>fit.json</code>, <code>figures/</code>",
    )


def _sources(table: Table) -> str:
    names = [escape(str(s)) for s in table.sources]
    return "<br>".join(names[:6]) + (f"<br>and {len(names) - 6} more" if len(names) > 6 else "")


def _rows(table: Table, results: Sequence[LawResult]) -> str:
    used = sum(r.runs.n for r in results)
    passed: Counter[str] = Counter()
    for r in results:
        passed.update(r.runs.passed_over)
    lines = [f"{table.read:,} read, {used:,} fitted"]
    lines += [f"{n:,} left out: {escape(reason)}" for reason, n in table.left_out.items()]
    lines += [f"{n:,} passed over: {escape(reason)}" for reason, n in passed.items()]
    return "<br>".join(lines)


def _loss(fitted: Sequence[LawResult], options: Options) -> str:
    text = f"{LOSSES[options.loss]} ({options.loss})"
    deltas = sorted(r.fit.delta for r in fitted if r.fit.delta is not None)
    if deltas and options.delta is not None:
        text += f", delta {options.delta:g} as asked"
    elif deltas:
        span = (
            numbers.short(deltas[0])
            if len(deltas) == 1
            else f"{numbers.short(deltas[0])} to {numbers.short(deltas[-1])}"
        )
        text += f", delta 1.345 robust standard deviations of the residuals, here {span}"
    return text + "; the objective is a sum over runs"


def _flagged(results: Sequence[LawResult]) -> str:
    count: Counter[str] = Counter()
    for r in results:
        count.update(s for s in r.runs.status if s != "done")
    if not count:
        return "none: every run is done"
    listed = ", ".join(f"{n} {s}" for s, n in count.items())
    return f"{listed} rows kept in the fits; each law is fitted without them too"


def _weights(options: Options) -> str:
    if options.weights == "equal":
        return "every run counts the same; repeated seeds are separate rows"
    return (
        "each run by one over the variance of ln L: spread of repeated seeds (else of the residuals) plus that of the "
        "evaluation, none more than ten times another"
    )


def _lack(fitted: Sequence[LawResult]) -> str:
    tested = [r for r in fitted if r.tested]
    bad = sum(bool(adequacy.failed(r.tested)) for r in tested)
    return (
        f"{len(tested)} of {len(fitted)} laws could be tested (coupling of N and D, extent of overfitting, spread of "
        f"seeds; Holm's correction, 5 %); {bad} are contradicted by their runs"
    )


def _certificate(fitted: Sequence[LawResult]) -> str:
    if not fitted:
        return "nothing was fitted"
    c = [r.fit.certificate for r in fitted]
    bad = sum(not x.converged for x in c)
    at_edge = sum(bool(x.boundary) for x in c)
    shares = [x.starts_agreeing / x.starts for x in c]
    return (
        f"{len(c) - bad} of {len(c)} fits converged; largest scaled gradient "
        f"{max(x.scaled_gradient for x in c):.0e}; "
        f"between {100 * min(shares):.0f} % and {100 * max(shares):.0f} % of the starts agree; "
        f"{at_edge} fits at a boundary"
    )


def _intervals(fitted: Sequence[LawResult], options: Options) -> str:
    kinds = Counter(r.draws.kind for r in fitted if r.draws)
    if not kinds:
        return "none were asked for (--bootstrap 0)"
    words = {
        "wild": "wild bootstrap by configuration with leverage correction, robust standard deviation times t",
        "residual": "residual bootstrap with leverage correction, robust standard deviation times t",
        "parametric": "parametric bootstrap with normal noise, robust standard deviation times t",
        "case": f"case bootstrap by configuration, percentiles ({bootstrap.SMALL_DESIGN} configurations or more)",
    }
    text = "; ".join(f"{words[k]} ({n} fits)" for k, n in kinds.items())
    rechecked = sum(r.draws.rechecked for r in fitted if r.draws)
    improved = sum(r.draws.improved for r in fitted if r.draws)
    return (
        f"{100 * options.level:g} %; {options.bootstrap:,} draws, seed {options.seed}, common to all "
        f"fits; {text}; "
        f"{rechecked} draws solved again from other starts, {improved} improved"
    )


def _tuning(table: Table) -> str:
    trials = {r["trial"] for r in table.rows if r["trial"] is not None}
    rates = {r["lr"] for r in table.rows if r["lr"] is not None}
    if not trials and not rates:
        return (
            "the log states no trials and no learning rates: whether families were tuned alike cannot be seen from it"
        )
    return (
        f"different learning rates in the log: {len(rates)}, trial numbers: {len(trials)}; of several trials or rates "
        "of one configuration the best on ID is fitted; where there are several, ratios stand at the best of k too, "
        "the same k for both"
    )
