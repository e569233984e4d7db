"""A methods paragraph for a paper, with references, from what was really done in this fit.

Words only. Invariant: nothing stands in it that the options and results do not say.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from ecg_jax.scaling.analysis import LawResult, Options
from ecg_jax.scaling.transfer import Transfer

LOSSES = {
    "log-huber": "Huber's loss of ln L",
    "lad": "absolute deviations of ln L",
    "ls": "squared deviations of L",
    "ls-log": "squared deviations of ln L",
    "student-t": "Student's t likelihood of ln L with 4 degrees of freedom and estimated scale",
    "envelope": "Huber's loss of ln L with runs below the law weighted nine times those above it",
}
MEANING = {
    "E": "irreducible loss", "alpha": "exponent of N", "beta": "exponent of D", "A": "amplitude of N, raw",
    "B": "amplitude of D, raw", "k": "coupling of N and D (1: they add)", "s": "shift",
    "turn": "where the slope changes",
    "alpha_late": "exponent of N beyond the turn", "beta_late": "exponent of D beyond the turn",
    "f": "width of the turn",
    "E0": "loss before learning", "q": "how the start saturates",
    "gamma": "inverse size at which it levels off",
    "c": "extent of overfitting (1: as Hoffmann's law has it)", "Eo": "irreducible OOD loss",
    "K": "amplitude of the OOD excess", "kappa": "exponent of OOD excess in ID excess",
    "RD": "repeats of the data that still count", "RN": "excess parameters that still count",
}  # fmt: skip
REFERENCES = {
    "hoffmann": "Hoffmann et al. 2022, Training compute-optimal large language models, arXiv 2203.15556.",
    "kaplan": "Kaplan et al. 2020, Scaling laws for neural language models, arXiv 2001.08361.",
    "broken": "Caballero et al. 2023, Broken neural scaling laws, arXiv 2210.14891.",
    "m": "Alabdulmohsin et al. 2022, Revisiting neural scaling laws in language and vision, arXiv 2209.06640.",
    "data-constrained": "Muennighoff et al. 2023, Scaling data-constrained language models, arXiv 2305.16264.",
    "replication": "Besiroglu et al. 2024, Chinchilla scaling: a replication attempt, arXiv 2404.10102.",
    "webb": "Webb 2023, Reworking wild bootstrap-based inference for clustered errors, Canadian Journal of Economics.",
    "holm": "Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.",
    "report": "Li et al. 2025, (Mis)fitting: a survey of scaling laws, arXiv 2502.18969.",
}


def render(
    results: Sequence[LawResult], transfers: Sequence[Transfer], options: Options, version: str
) -> Iterator[str]:
    """HTML of the section: one paragraph, then the references it needs."""
    text, cited = paragraph(results, transfers, options, version)
    yield f"<p>{escape(text)}</p>"
    yield "<ul>" + "".join(f"<li>{escape(REFERENCES[c])}</li>" for c in cited) + "</ul>"


def paragraph(
    results: Sequence[LawResult], transfers: Sequence[Transfer], options: Options, version: str
) -> tuple[str, list[str]]:
    """The paragraph and the keys of its references, in the order of their use."""
    fitted = [r for r in results if r.fit]
    forms = Counter(r.law.name for r in fitted)
    formulas = {r.law.name: r.law.formula for r in fitted}
    said = [f"Scaling laws were fitted with ecg_jax {version}."]
    if fitted:
        listed = "; ".join(f"L = {formulas[f]} ({f}, {k} fits)" for f, k in forms.items())
        how = f"as asked for ({options.form})" if options.form != "auto" else "by the design"
        if any(r.chosen for r in fitted):
            how = "by rolling-origin extrapolation with the one-standard-error rule"
        said.append(f"The form was chosen {how}: {listed}.")
        delta = f" with delta {options.delta:g}" if options.delta else ""
        if options.loss == "log-huber" and not delta:
            delta = " with delta at 1.345 robust standard deviations of the residuals"
        said.append(
            f"Parameters minimise the sum over runs of {LOSSES[options.loss]}{delta}"
            + ", from a grid of starting points by a damped Newton method with exact second derivatives in centred "
            "parameters; every optimum carries a certificate (scaled gradient, curvature, agreement of the starts)."
        )  # fmt: skip
    if options.weights == "variance":
        said.append(
            "Runs are weighted by the inverse variance of ln L from repeated seeds and from the evaluation's interval."
        )
    if any(r.tested for r in fitted):
        said.append(
            "Each law was tested against a free coupling of N and D, a free exponent of the extent of overfitting and, "
            "where seeds are repeated, pure error (F tests on ln L, Holm's correction)."
        )
    if options.fixed:
        said.append("Held: " + ", ".join(f"{k} = {v}" for k, v in options.fixed) + ".")
    kinds = Counter(r.draws.kind for r in fitted if r.draws)
    if kinds.get("wild"):
        said.append(
            f"Intervals ({100 * options.level:g} %) are from {options.bootstrap:,} wild bootstrap draws by "
            "configuration (N, D) with leverage correction and six-point weights, common to all fits so that "
            "differences are paired; "
            "their ends are Student's t times the draws' robust standard deviation, and E's are widened to its "
            "profile likelihood's."
        )
    for kind, how in (("residual", "leverage-corrected residuals"), ("parametric", "normal noise")):
        if kinds.get(kind):
            said.append(
                f"Intervals ({100 * options.level:g} %) are from {options.bootstrap:,} bootstrap draws of {how}; their "
                "ends are Student's t times the draws' robust standard deviation, and E's are widened to its profile "
                "likelihood's."
            )
    if kinds.get("case"):
        said.append(
            f"Designs of many scattered configurations use {options.bootstrap:,} case resamples by configuration and "
            "percentiles."
        )
    said.append(
        "Laws were called identified only with at least three sizes of each variable, a best loss well below the "
        "constant predictor's and a fall of the excess loss beyond the spread of repeated seeds; multipliers are "
        "geometric means over the losses that both families reach inside their observed sizes. P values are "
        "corrected over tasks by Holm's method."
    )
    if transfers:
        said.append(
            "Transfer exponents come from a joint fit of in- and out-of-distribution losses with both floors free."
        )
    keys = [k for k in ("hoffmann", "kaplan", "broken", "data-constrained") if any(f.startswith(k) for f in forms)]
    keys += ["m"] if any(f in ("m3", "m4") for f in forms) else []
    return " ".join(said), [*keys, "replication", *(["webb"] if kinds.get("wild") else []), "holm", "report"]
