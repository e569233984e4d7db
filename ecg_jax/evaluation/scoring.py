"""Numbers of one test set: what holds for its records whatever the probe, and each probe's metrics with
intervals.

A floor is the loss of the Bayes probabilities that a simulated set carries, on exactly the records scored; a
prior is the loss there of the constant predictor at the training prevalences. A label with fewer than `least` positive
records is too few: told, and in no macro. One with fewer negatives is told and stays. Fits and selects nothing.
Invariant: a value that does not exist has no entry and no row; it is never a NaN or a 0.
"""

from typing import Any

import numpy as np

from ecg_jax.evaluation import bootstrap, calibration, metrics, tasks

LEAST = 10  # positive records below which a probe's label is too rare for a macro
LOGGED = ("bce", "auroc", "ap", "f1")  # rows of the eval log; the report has every metric


class ScoredSet:
    """What is true of the scored test records whatever the probe: floors, priors, domains, who is left
    out.
    """

    def __init__(
        self,
        test: Any,
        names: list[str],
        of_labels: list[str],
        train_prevalence: np.ndarray,
        level: float,
        least: int = 0,
    ) -> None:
        """least: positive records that a label needs to be in a macro."""
        self.names, self.of_labels, self.level, self.least = names, of_labels, level, least
        self.groups = tasks.by_domain(of_labels)
        self.known, self.positive = metrics.n_known(test.labels), metrics.n_positive(test.labels)
        self.any_known = {d: int((test.labels[:, m] != metrics.UNKNOWN).any(1).sum()) for d, m in self.groups.items()}
        self.few = self.positive < least
        self.shift = calibration.prevalence_shift(test.labels, train_prevalence)
        self.labels = test.labels
        constant = np.broadcast_to(metrics.logit(train_prevalence), test.labels.shape)
        self.prior = metrics.bce(constant, test.labels)
        self.floor = np.full(len(names), np.nan)
        if test.bayes is not None and np.isfinite(test.bayes).all():
            self.floor = metrics.bce(metrics.logit(test.bayes), test.labels)

    def report(
        self, spread: dict[str, bootstrap.Spread], thresholds: np.ndarray, logits: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Numbers of one probe with intervals: `labels` by name, and `macro` by domain; with the logits [n, K] also
        calibration.
        """
        labels = {}
        if logits is not None:
            line = dict(zip(("intercept", "slope"), calibration.recalibration(logits, self.labels), strict=True))
            line["ece"] = calibration.ece(logits, self.labels)
        for k, name in enumerate(self.names):
            labels[name] = {
                "domain": self.of_labels[k],
                "n_examples": int(self.known[k]),
                "n_positive": int(self.positive[k]),
                "threshold": _number(thresholds[k]),
                "floor": _number(self.floor[k]),
                "prior": _number(self.prior[k]),
                "metrics": {
                    metric: self._value(metric, s.label(k)) | {"dropped": _number(s.dropped[k])}
                    for metric, s in spread.items()
                    if np.isfinite(s.point[k])
                },
            }
            if self.least:
                labels[name]["too_few"] = bool(self.few[k])
            if logits is not None:
                labels[name]["calibration"] = {what: _number(values[k]) for what, values in line.items()}
        macro = {}
        for domain, members in self.groups.items():
            there = members & (self.known > 0) & ~self.few
            macro[domain] = {
                "n_examples": self.any_known[domain],
                "floor": _number(metrics.macro(self.floor[there])[0]),
                "prior": _number(metrics.macro(self.prior[there])[0]),
                "metrics": {},
            }
            for metric, s in spread.items():
                found = s.macro(members & ~self.few)
                if found.labels:
                    macro[domain]["metrics"][metric] = self._value(metric, found) | {"n_labels": found.labels}
        return {"labels": labels, "macro": macro}

    def _value(self, metric: str, found: bootstrap.Estimate) -> dict[str, float | None]:
        low, high = bootstrap.interval(metric, found, self.level)
        return {"value": found.point, "ci_low": _number(low), "ci_high": _number(high)}

    def rows(self, result: dict[str, Any], common: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of the eval log, for `evalog.append` to complete, for one entry of `report`'s results."""
        entries = [(name, e, e["domain"]) for name, e in result["labels"].items()]
        entries += [("macro", e, domain) for domain, e in result["macro"].items()]
        rows = []
        for label, entry, domain in entries:
            for metric in (m for m in LOGGED if m in entry["metrics"]):
                value = {k: v for k, v in entry["metrics"][metric].items() if k != "dropped"}
                own = {"label": label, "domain": domain, "metric": metric, "n_examples": entry["n_examples"]}
                if metric == "bce":
                    own |= {"floor": entry["floor"], "prior": entry["prior"]}
                rows.append(common | own | value)
        return rows

    def left_out(self) -> dict[str, str]:
        """Labels that are not in every metric or not in the macros, and why; also those with few negatives."""
        reasons = {}
        for k, name in enumerate(self.names):
            if not self.known[k]:
                reasons[name] = "unknown in every test record: in no metric"
            elif self.positive[k] in (0, self.known[k]):
                which = "positive" if not self.positive[k] else "negative"
                reasons[name] = f"no {which} test record: only in BCE and Brier" + ", too few" * bool(self.few[k])
            elif self.few[k]:
                reasons[name] = (
                    f"too few: {self.positive[k]} positive test records, fewer than {self.least}: in no macro"
                )
            elif (negative := self.known[k] - self.positive[k]) < self.least:
                reasons[name] = f"only {negative} negative test records: in the macros, its interval rests on them"
        return reasons


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
