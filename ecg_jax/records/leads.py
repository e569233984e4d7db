"""Lead names, lead order and the algebra of the limb leads.

Leads are found by name, never by position. The six limb leads live in a plane: two electrodes' differences, I
and II, give the other four exactly, so a missing one of those four is computed; a missing chest lead, I or II
is a refusal. Invariant: what leaves `arrange` is float32 [T, 12] in the order of `LEADS`.
"""

from collections.abc import Sequence

import numpy as np

from ecg_jax.records.record import Refused

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")

# Weights of I and II in each lead that follows from them (Einthoven, Goldberger).
DERIVED = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}

_BY_NAME = {lead.casefold(): lead for lead in LEADS} | {f"d{lead.casefold()}": lead for lead in LEADS[:3]}


def canonical(name: str) -> str | None:
    """The lead that `name` means, or None. Case and surrounding blanks do not matter; DI, DII, DIII are I,
    II, III.

    Modified leads (MLII) are other leads, not spellings of these.
    """
    return _BY_NAME.get("".join(str(name).split()).casefold())


def arrange(signal: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, set[str]]:
    """Signal [T, n] with `names` -> (float32 [T, 12] in the order of `LEADS`, leads derived from I and II).

    Channels that are none of the twelve are left out. Refuses ("duplicate-lead") two channels of one lead and
    ("missing-lead") a lead that is absent and cannot be derived; ("bad-shape") when names and channels
    disagree.
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
    missing = [lead for lead in LEADS if lead not in column]
    derived = {lead for lead in missing if lead in DERIVED}
    if lost := [lead for lead in missing if lead not in DERIVED]:
        plural = "s" if len(lost) > 1 else ""
        found = " ".join(str(name) for name in names) or "none"
        raise Refused("missing-lead", f"no lead{plural} {', '.join(lost)} (the recording has: {found})")
    out = np.empty((signal.shape[0], len(LEADS)), np.float32)
    for i, lead in enumerate(LEADS):
        if lead in column:
            out[:, i] = signal[:, column[lead]]
        else:
            a, b = DERIVED[lead]
            # In float64, so that a derived lead is as exact as a stored one.
            out[:, i] = a * signal[:, column["I"]].astype(np.float64) + b * signal[:, column["II"]]
    return out, derived


def expand_matrix() -> np.ndarray:
    """float32 [8, 12]: signal in `INDEPENDENT` [T, 8] @ matrix = signal in `LEADS` [T, 12]."""
    matrix = np.zeros((len(INDEPENDENT), len(LEADS)), np.float32)
    for j, lead in enumerate(LEADS):
        if lead in INDEPENDENT:
            matrix[INDEPENDENT.index(lead), j] = 1.0
        else:
            matrix[:2, j] = DERIVED[lead]
    return matrix
