"""Lead names, lead order and the algebra of the limb leads.

Leads are found by name, never by position. The six limb leads live in a plane, so any two of them give the other four
exactly. Whether a recording without a lead is used is decided later, in `preprocess`. Invariant: what leaves `arrange`
is float32 [T, 12] in the order of `LEADS`, NaN where there is nothing.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ecg_jax.records.record import Refused

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")

# Weights of I and II in each lead that follows from them (Einthoven, Goldberger).
DERIVED = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}

LIMB = {"I": (1.0, 0.0), "II": (0.0, 1.0)} | DERIVED  # every limb lead in the plane of I and II

_BY_NAME = {lead.casefold(): lead for lead in LEADS} | {f"d{lead.casefold()}": lead for lead in LEADS[:3]}
_PREFIX = re.compile(r"^(mdc_?ecg_?lead|ecg[_:-]?lead|ecg|lead)[_:-]?")


@lru_cache(maxsize=1024)
def canonical(name: str) -> str | None:
    """The lead that `name` means, or None. Case, blanks and a prefix such as "ECG", "Lead" or "MDC_ECG_LEAD_" do not
    matter; DI, DII, DIII are I, II, III.

    Modified leads (MLII) are other leads, not spellings of these.
    """
    plain = "".join(str(name).split()).casefold()
    return _BY_NAME.get(plain) or _BY_NAME.get(_PREFIX.sub("", plain))


def arrange(signal: np.ndarray, names: Sequence[str], derive: bool = True) -> tuple[np.ndarray, set[str], set[str]]:
    """Signal [T, n] with `names` -> (float32 [T, 12] in the order of `LEADS`, derived leads, missing leads).

    Any two limb leads give the four others (unless `derive` is False); a lead that is absent and cannot be derived is
    missing, its column NaN. Channels that are none of the twelve are left out. Refuses ("duplicate-lead") two channels
    of one lead, ("missing-lead") a signal with none of the twelve, ("bad-shape") when names and channels disagree.
    """
    if signal.ndim != 2 or signal.shape[1] != len(names):
        raise Refused("bad-shape", f"signal of shape {signal.shape} with {len(names)} lead names")
    column: dict[str, int] = {}
    for i, name in enumerate(names):
        lead = canonical(name)
        if lead is None:
            continue
        if lead in column:
            first = names[column[lead]]
            raise Refused("duplicate-lead", f"lead {lead} is there twice, as {first!r} and {name!r}")
        column[lead] = i
    if not column:
        found = " ".join(str(name) for name in names)[:200] or "none"
        raise Refused("missing-lead", f"none of the twelve leads (the recording has: {found})")
    known = [lead for lead in LIMB if lead in column][:2]
    weights = {}
    if derive and len(known) == 2:
        # Rows of the two known leads in the plane of I and II; the others are their combinations.
        plane = np.array([LIMB[lead] for lead in known])
        weights = {lead: np.array(LIMB[lead]) @ np.linalg.inv(plane) for lead in LIMB if lead not in column}
    missing = {lead for lead in LEADS if lead not in column and lead not in weights}
    if [column.get(lead) for lead in LEADS] == list(range(signal.shape[1])):
        return signal.astype(np.float32), set(), set()  # as most files have them: one pass instead of twelve
    out = np.empty((signal.shape[0], len(LEADS)), np.float32)
    for i, lead in enumerate(LEADS):
        if lead in column:
            out[:, i] = signal[:, column[lead]]
        elif lead in weights:
            # In float64, so that a derived lead is as exact as a stored one.
            one, two = (signal[:, column[lead]].astype(np.float64) for lead in known)
            out[:, i] = weights[lead][0] * one + weights[lead][1] * two
        else:
            out[:, i] = np.nan
    return out, set(weights), missing


def expand_matrix() -> np.ndarray:
    """float32 [8, 12]: signal in `INDEPENDENT` [T, 8] @ matrix = signal in `LEADS` [T, 12]."""
    matrix = np.zeros((len(INDEPENDENT), len(LEADS)), np.float32)
    for j, lead in enumerate(LEADS):
        if lead in INDEPENDENT:
            matrix[INDEPENDENT.index(lead), j] = 1.0
        else:
            matrix[:2, j] = DERIVED[lead]
    return matrix
