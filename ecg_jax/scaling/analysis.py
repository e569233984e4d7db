"""One set of runs, one law, everything that is to be said about it: fit, draws, intervals, conditions,
sensitivity.

It chooses the form (`choice`), fits, bootstraps, refits without flagged runs and under other
losses, and scores the largest runs held out. It does not compare families (`multipliers`) or write anything
(`fit`). Invariant: `LawResult.fit` is None exactly where the design refuses the law; numbers of a law that
is not identified are computed and flagged, so that a program can look at them and the report can withhold
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.progress import track
from ecg_jax.scaling import adequacy, bootstrap, choice, forms, identify, intervals, laws, profile, shift
from ecg_jax.scaling.families import RunSet, SeedNoise
from ecg_jax.scaling.intervals import Interval
from ecg_jax.scaling.restrict import Restricted
from ecg_jax.scaling.solve import LOSSES, Fit, fit_law

FORMS = ("auto", *choice.TWO, "kaplan0", *choice.ONE, "m1", "m2", "overfitting", "data-constrained", "loss-to-loss")
RESAMPLES = ("auto", *bootstrap.KINDS)
WEIGHTS = ("equal", "variance")
MOST_WEIGHT = 10.0  # over the least
PROFILED = ("E", "alpha", "beta", "RD", "RN")
DRAWS_UNIDENTIFIED = 200  # for numbers that are flagged and printed nowhere
LEAST_FOR_FLOOR = 4  # distinct sizes before a one-variable law may have its own floor


@dataclass(frozen=True)
class Options:
    """How laws are fitted; the same for all sets of one call."""

    form: str = "auto"
    loss: str = "log-huber"
    delta: float | None = None
    bootstrap: int = 1000
    level: float = 0.95
    seed: int = 0
    fixed: tuple[tuple[str, float | str], ...] = ()  # parameters held or tied by name
    resample: str = "auto"
    weights: str = "equal"

    def checked(self) -> "Options":
        """Itself, or UsageError naming the option that is wrong."""
        for name, known in (("form", FORMS), ("loss", LOSSES), ("resample", RESAMPLES), ("weights", WEIGHTS)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"--{name} {value!r} is none of {', '.join(known)}{did_you_mean(value, known)}")
        if self.delta is not None and not (self.loss in ("log-huber", "envelope") and 0 < self.delta < np.inf):
            raise UsageError("--delta must be positive and goes with --loss log-huber only")
        if not (self.bootstrap == 0 or 50 <= self.bootstrap <= 1_000_000):
            raise UsageError(f"--bootstrap {self.bootstrap}: 0 for no intervals, else 50 draws or more")
        if not 0.5 <= self.level < 1.0:
            raise UsageError(f"--level {self.level:g}: a confidence level from 0.5 to below 1, as 0.95")
        return self


@dataclass(frozen=True)
class Variant:
    """The same set fitted otherwise."""

    what: str
    n: int
    parameters: dict[str, float]


@dataclass(frozen=True)
class HeldOut:
    """Error on runs that the fit had not seen: root mean square of ln L, on how many runs, and in words
    which."""

    log_rmse: float
    n: int
    rule: str


@dataclass(frozen=True)
class LawResult:
    runs: RunSet
    law: laws.Law | forms.Formula | Restricted | None
    fit: Fit | None
    draws: bootstrap.Draws | None
    intervals: dict[str, Interval]
    identification: identify.Identification
    noise: SeedNoise | None
    held_out: HeldOut | None
    variants: tuple[Variant, ...]
    chosen: choice.Choice | None = None
    weak: tuple[str, ...] = ()  # parameters that the runs bound on one side only, in words
    tested: tuple[adequacy.Check, ...] = ()

    @property
    def identified(self) -> bool:
        return self.fit is not None and self.identification.identified

    @property
    def log_x(self) -> np.ndarray:
        return self.runs.log_x(self.law.variables)

    @property
    def df(self) -> int:
        """Degrees of freedom of the fit: configurations less parameters, at least 1."""
        return max(int(self.runs.cells.max()) + 1 - self.law.size, 1)


def varying(runs: RunSet) -> tuple[str, ...]:
    """Which of N and D take more than one value."""
    return tuple(v for v, values in (("N", runs.sizes), ("D", runs.data)) if len(values) > 1)


def choose_forms(sets: Sequence[RunSet], options: Options) -> list[choice.Choice | None]:
    """The form of every set by rolling-origin extrapolation, where `auto` asks for it.

    Families measured alike share one form, chosen by their pooled errors, or they could not be compared. None
    where a form was asked for, where nothing varies, or where there are too few runs to hold any out.
    """
    found: list[choice.Choice | None] = [None] * len(sets)
    groups: dict[tuple, list[int]] = {}
    for i, runs in enumerate(sets):
        if options.form == "auto" and varying(runs):
            alike = (*runs.key.measured, runs.key.paradigm, runs.key.input) if len(varying(runs)) == 2 else (i,)
            groups.setdefault((*alike, varying(runs)), []).append(i)
    for (*_, variables), members in track(groups.items(), "forms"):
        chosen = choice.choose([sets[i] for i in members], variables, loss=options.loss, delta=options.delta)
        for i in members:
            found[i] = chosen
    return found


def choose_law(runs: RunSet, form: str, chosen: choice.Choice | None = None) -> tuple[object | None, str]:
    """The law for a set, and where there is none why."""
    variables = varying(runs)
    if not variables:
        return None, "one configuration only: neither N nor D varies"
    if form == "data-constrained":
        if not np.isfinite(runs.examples).all():
            return None, "form data-constrained needs examples_seen (records read, repeats counted) of every run"
        return forms.get(form, ("N", "D", "U")), ""
    if form == "loss-to-loss" and runs.key.domain != "id":
        if not np.isfinite(runs.id_loss).all():
            return None, "form loss-to-loss needs the ID loss of every run (task pretrain, domain id)"
        return forms.get(form, ("L",)), ""
    one_of = len(variables) == 1 and form in ("hoffmann", "kaplan", "kaplan0", "coupled", "overfitting")
    if form == "auto" or one_of or form == "loss-to-loss":  # a joint form of one variable is its own term and floor
        distinct = len(runs.sizes if variables == ("N",) else runs.data)
        plain = "hoffmann" if len(variables) == 2 else ("power" if distinct >= LEAST_FOR_FLOOR else "power0")
        form = chosen.form if chosen else plain
    try:
        return forms.get(form, variables), ""
    except ValueError:
        return None, f"form {form} asked for, but {' and '.join(variables)} vary"


def analyse(runs: RunSet, options: Options, noise: SeedNoise | None, chosen: choice.Choice | None = None) -> LawResult:
    """Everything about one set. Deterministic by `options.seed`. Raises UsageError for a parameter that cannot
    be fixed as asked."""
    law, why = choose_law(runs, options.form, chosen)
    if law is None:
        refused = identify.Identification((identify.Condition("form", False, why),))
        return LawResult(runs, None, None, None, {}, refused, noise, None, ())
    conditions = identify.design_conditions(runs, law)
    if any(c.ok is False for c in conditions):
        return LawResult(runs, law, None, None, {}, identify.Identification(tuple(conditions)), noise, None, ())
    if "U" in law.variables:  # runs that read their records oftener are no repeats
        noise = None
    fitted = _fit(runs, law, options, noise)
    conditions += identify.loss_conditions(runs, fitted, noise)
    drawn, ends = None, {}
    known = identify.Identification(tuple(conditions))
    if options.bootstrap:
        drawn = _drawn(runs, fitted, options, options.bootstrap if known.identified else DRAWS_UNIDENTIFIED)
        ends = intervals.parameter_intervals(fitted, drawn, level=options.level)
    weak: tuple[str, ...] = ()
    if known.identified and options.bootstrap:
        ends, weak = _profiled(runs, fitted, ends, options)
    return LawResult(
        runs, fitted.law, fitted, drawn, ends, known, noise,
        _held_out(runs, law, options, noise), tuple(_variants(runs, law, options, noise)), chosen, weak,
        () if options.fixed or not known.identified else adequacy.checks(runs, law),
    )  # fmt: skip


def refitted(result: LawResult, runs: RunSet, options: Options) -> LawResult:
    """The law of `result` fitted to other losses `runs`, with draws; all that else is known of it stays."""
    fitted = _fit(runs, result.law, options, result.noise)
    return replace(result, runs=runs, fit=fitted, draws=_drawn(runs, fitted, options, options.bootstrap))


def _drawn(runs: RunSet, fitted: Fit, options: Options, most: int) -> bootstrap.Draws:
    keys = bootstrap.cell_keys(runs.n_params, runs.n_records)
    if "U" in fitted.law.variables:
        keys = [f"{k}/{x:.6g}" for k, x in zip(keys, runs.examples, strict=True)]
    kind = options.resample
    if kind == "auto":
        kind = bootstrap.choose_kind(runs.n_params, runs.n_records)
    x, draws = runs.log_x(fitted.law.variables), min(options.bootstrap, most)
    return bootstrap.draw(fitted, x, runs.loss, keys, draws=draws, seed=options.seed, kind=kind)


def _profiled(runs: RunSet, fit: Fit, ends: dict[str, Interval], options: Options):
    """The floor's interval widened to its profile's, where that is wider, and what is bounded on one side only.

    A floor far below the runs is an extrapolation: draws around one optimum know less of it than the profile.
    """
    weak = []
    ends = dict(ends)
    for name in PROFILED:
        if name in fit.law.names:
            got = profile.profile(fit, runs.log_x(fit.law.variables), runs.loss, name, level=options.level)
            if got is not None and got.words:
                weak.append(got.words)
            if got is not None and name == "E":
                low = min(got.low or 0.0, ends["E"].low or 0.0)
                high = None if got.high is None or ends["E"].high is None else max(got.high, ends["E"].high)
                ends["E"] = replace(ends["E"], low=low, high=high)
    flat = [v for v in ("alpha", "beta") if v in ends and not ends[v].low]
    # A slope that may be nil leaves any floor below the runs open: B D^-beta is one as beta goes to 0. Measured: never
    # so in 6 x 5 and 4 x 3 designs; in 3 x 3 ones E's 95 % interval then covers 99 to 100 % instead of 95 to 99 %.
    if "E" in ends and flat:
        ends["E"] = replace(ends["E"], low=0.0)
        weak = [w for w in weak if not w.startswith("E is bounded above")]
        weak.append(f"E is bounded above only, as the draws let {' and '.join(flat)} be 0")
    return ends, tuple(weak)


def _fit(runs: RunSet, law, options: Options, noise: SeedNoise | None, loss: str | None = None) -> Fit:
    loss = loss or options.loss

    def fit(weights: np.ndarray | None) -> Fit:
        return fit_law(
            law,
            runs.log_x(law.variables),
            runs.loss,
            loss=loss,
            delta=options.delta if loss == options.loss else None,
            noise=noise.log if noise else None,
            weights=weights,
            fixed=dict(options.fixed),
        )

    try:
        made = fit(None)
        return made if options.weights == "equal" else fit(_weights(runs, made, noise))
    except ValueError as err:
        if options.fixed:
            raise UsageError(f"--fix: {err}") from None
        raise


def _weights(runs: RunSet, plain: Fit, noise: SeedNoise | None) -> np.ndarray:
    """1 / (spread of seeds + variance of the evaluation) of ln L, mean 1, none over `MOST_WEIGHT` times the least.

    Without repeated seeds the residuals' variance, less the evaluation's mean one, stands for the first part.
    """
    error = runs.error if runs.error is not None else np.full(runs.n, np.nan)
    if not np.isfinite(error).all():
        raise UsageError(
            f"--weights variance: {int((~np.isfinite(error)).sum())} of {runs.n} runs of {runs.key.dataset} "
            f"{runs.key.task} have no interval of their loss; give the columns ci_low and ci_high"
        )
    rest = noise.log**2 if noise else max(identify.residual_sd(plain) ** 2 - float(np.mean(error**2)), 0.0)
    variance = np.maximum(rest + error**2, 1e-16)
    weights = 1.0 / np.minimum(variance, MOST_WEIGHT * variance.min())
    return weights / weights.mean()


def _fittable(runs: RunSet, law) -> bool:
    return runs.n > 0 and all(c.ok is not False for c in identify.design_conditions(runs, law))


def _variants(runs: RunSet, law, options: Options, noise: SeedNoise | None):
    """Without flagged runs, where there are any; and under the other losses."""
    if not runs.converged.all():
        rest = runs.only(runs.converged)
        what = f"without the {int((~runs.converged).sum())} runs that are not done"
        parameters = _fit(rest, law, options, noise).parameters if _fittable(rest, law) else {}
        yield Variant(what, rest.n, parameters)
    for loss in ("log-huber", "ls-log", "ls"):
        if loss != options.loss:
            yield Variant(f"loss {loss}", runs.n, _fit(runs, law, options, noise, loss).parameters)
    if law.name in ("power", "m4") and law.variables != ("L",) and not options.fixed:  # M2 is `power`
        form, names = (
            "m2" if law.name == "power" else "m4",
            {"A": law.names[-2 if law.name == "power" else 2], "alpha": law.names[-1 if law.name == "power" else 3]},
        )
        for jacobian, how in ((False, "as published, no Jacobian"), (True, "with the Jacobian of the shift")):
            got = shift.fit_shift(runs.log_x(law.variables)[:, 0], runs.loss, form=form, jacobian=jacobian)
            parameters = {names.get(k, k): v for k, v in got.items()}
            yield Variant(f"{form.upper()} on ln(L - E), {how}", runs.n, {k: parameters[k] for k in law.names})


def _held_out(runs: RunSet, law, options: Options, noise: SeedNoise | None) -> HeldOut | None:
    """Leave out the largest size of each variable (or only the corner of both, in small designs) and
    predict it."""
    top_n, top_d = runs.n_params == runs.sizes[-1], runs.n_records == runs.data[-1]
    values = {"N": f"N = {runs.sizes[-1]:,.0f}", "D": f"D = {runs.data[-1]:,.0f}"}
    if law.variables == ("L",):
        low = runs.id_loss <= np.quantile(runs.id_loss, 0.2)
        rules = [(low, "the fifth of the runs with the lowest ID loss")]
    elif len(law.variables) == 1:
        v = law.variables[0]
        rules = [(top_n if v == "N" else top_d, f"runs at {values[v]}")]
    else:
        rules = [
            (top_n | top_d, f"runs at {values['N']} or {values['D']}"),
            (top_n & top_d, f"runs at {values['N']} and {values['D']}"),
        ]
        scale = np.log(runs.n_params) + np.log(runs.n_records)
        if not (top_n & top_d).any():  # no grid: the fifth of the runs with the largest N x D
            rules = [(scale > np.quantile(scale, 0.8), "the fifth of the runs with the largest N x D")]
    for out, rule in rules:
        if _fittable(runs.only(~out), law):
            fitted = _fit(runs.only(~out), law, options, noise)
            rest = runs.only(out)
            error = np.log(fitted.predict(rest.log_x(law.variables)) / rest.loss)
            return HeldOut(float(np.sqrt(np.mean(error**2))), rest.n, rule)
    return None
