"""HL7 annotated ECG (aECG, FDA XML): the rhythm series.

Never reads a derived series (the representative beat). Of several rhythm series or sequence sets the one with most of
the twelve leads is taken, the longer of equals, then the first; `comments` says so. Facts: the implementation guide of
the HL7 aECG standard (2005) and its example. Invariant: every lead has its own origin, scale and unit applied.
"""

import numpy as np

from ecg_jax.records.leads import canonical
from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.export import timestamp
from ecg_jax.records.readers.reading import MILLIVOLT, Reading, settle
from ecg_jax.records.readers.xml_philips import without_calibration
from ecg_jax.records.readers.xml_tree import Tree

SECOND = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TIME = ("TIME_ABSOLUTE", "TIME_RELATIVE")


def read_aecg(root: Tree, source: bytes) -> Reading:
    """`root` is the `AnnotatedECG` element; `source` the sha256 of the file.

    Refuses with no-rhythm, missing-element, unknown-unit, unknown-encoding, bad-number, bad-rate, too-long,
    wrong-count, bad-lead-name, duplicate-lead, missing-lead.
    """
    series = [one for one in root.all("component/series") if _code(one) == "RHYTHM"]
    sets = [(one, found) for one in series for found in one.all("component/sequenceSet")]
    if not sets:
        raise root.refuse("no-rhythm", "has no series of code RHYTHM with a sequence set")
    chosen, sequences = max(sets, key=lambda pair: _size(pair[1]))  # the first of equals
    clock, names, columns = None, [], []
    for sequence in sequences.all("component/sequence"):
        code = _code(sequence)
        if code in _TIME:
            clock = clock or sequence
        elif canonical(code):
            names.append(xml_tree.lead_name(sequence, code))
            columns.append(_millivolt(sequence.one("value")))
    if not names:
        raise sequences.refuse("missing-lead", "has none of the twelve leads")
    if clock is None:
        raise sequences.refuse("missing-element", f"has no sequence of code {' or '.join(_TIME)}")
    rate = _rate(clock.one("value"))
    physical = without_calibration(xml_tree.same_length(sequences, names, columns), rate)
    comments = () if len(sets) == 1 else (f"{len(sets)} rhythm sequence sets, the fullest was read",)
    return settle(physical, names, rate, source, time=_time(clock, chosen, root), comments=comments)


def _code(tree: Tree) -> str:
    code = tree.find("code")
    return "" if code is None else code.node.get("code", "").strip()


def _size(sequences: Tree) -> tuple[int, int]:
    """How many of the twelve leads, and the length of the text of the first."""
    leads = [one for one in sequences.all("component/sequence") if canonical(_code(one))]
    digits = leads[0].find("value/digits") if leads else None
    return len({canonical(_code(one)) for one in leads}), len(digits.text) if digits else 0


def _millivolt(value: Tree) -> np.ndarray:
    """origin + scale * digits, float64 [T] in mV."""
    kind = value.node.get("xsi:type", "").rpartition(":")[2]
    if kind != "SLIST_PQ":
        raise value.refuse("unknown-encoding", f"is of type {kind[:40]!r}, only SLIST_PQ has a unit")
    digits = xml_tree.samples(value.one("digits"))
    scale = _quantity(value.one("scale"))
    if scale == 0:
        raise value.refuse("unknown-unit", "has a scale of 0")
    return _quantity(value.one("origin")) + scale * digits


def _quantity(tree: Tree) -> float:
    unit = tree.attribute("unit")
    factor = MILLIVOLT.get(unit.casefold())
    if factor is None:
        raise tree.refuse("unknown-unit", f"has unit {unit[:40]!r}, known are uV, mV, V, nV")
    return tree.number(tree.attribute("value"), "value") * factor


def _rate(value: Tree) -> float:
    """Samples a second, of a GLIST_TS or GLIST_PQ."""
    step = value.one("increment")
    unit = step.attribute("unit")
    if unit not in SECOND:
        raise step.refuse("unknown-unit", f"has unit {unit[:40]!r}, known are {', '.join(SECOND)}")
    seconds = step.number(step.attribute("value"), "value") * SECOND[unit]
    # Steps are decimal, so 0.002 s must give 500 and not 500.00000000000006.
    return xml_tree.check_rate(step, round(1 / seconds, 6) if seconds > 1e-9 else 0.0)


def _time(clock: Tree, series: Tree, root: Tree) -> str | None:
    """Start of the recording: of its time sequence, else of the series, else of the document."""
    heads = [clock.find("value/head")] if _code(clock) == "TIME_ABSOLUTE" else []
    for one in (series, root):
        heads += [one.find(f"effectiveTime/{end}") for end in ("low", "center")]
        heads.append(one.find("effectiveTime"))
    stamps = (timestamp(head.node.get("value", "")) for head in heads if head)
    return next((stamp for stamp in stamps if stamp), None)
