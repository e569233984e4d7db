"""What a user can do about each reason for which a recording is refused.

One table, nothing else. Invariant: a remedy says what to do, in one line, and quotes nothing of the recording, so that
it may stand in a pseudonymised quarantine.
"""

_ANEW = "copy or download the file again; if it stays so, the published file is broken and the recording is lost"
_EXPORT = "export the recording again from the device or viewer that wrote it"
_NONE = "none: there is nothing to learn from; leave it out of the source, or accept the loss"
_SAY = "the file leaves it open: say it with the --option that the detail names"

REMEDIES: dict[str, str] = {
    "all-nan": _NONE,
    "all-zero": _NONE,
    "ambiguous-lead": "name the leads in the file as I, II, III, aVR, aVL, aVF, V1 to V6",
    "ambiguous-limb-leads": "name the limb leads in the file so that each is there once",
    "ambiguous-shape": _SAY,
    "ambiguous-signals": _SAY,
    "bad-lead-name": "name the leads in the file as I, II, III, aVR, aVL, aVF, V1 to V6",
    "bad-number": "correct the cell or element that the detail names",
    "bad-rate": "correct the sampling rate of the recording; 80 to 20,000 Hz can be used",
    "bad-row": "give every line the same number of cells",
    "bad-shape": "store the recording as leads by samples, one recording a file or row",
    "channel-skew": _EXPORT + " without skew between its channels",
    "checksum-mismatch": _ANEW,
    "corrupt-waveform": _EXPORT,
    "decimal-comma": "set the decimal mark with --option decimal=comma or decimal=point, or write points",
    "duplicate-lead": "keep one signal of each lead in the file",
    "duplicate-of": "if both are one patient, give them one patient id; else nothing: one copy is kept",
    "gain-policy-fails": "take the file from another copy of the set; its integers are not those that were published",
    "lead-mismatch": "leave --option leads= out, or correct it to what the file says",
    "leads-inconsistent": "convert with --leads 12",
    "missing-element": _EXPORT + ": it lacks what its format requires",
    "missing-file": "put the file where the table says, or remove its row",
    "missing-lead": "--missing-leads zero keeps such recordings, with zeros in the leads that they lack",
    "missing-row": "download table and signal file again: they are not of one release",
    "missing-samples": _ANEW,
    "missing-signal-file": "put the signal file beside its header, under the name that the header gives",
    "mixed-rates": "resample the leads of the recording to one rate",
    "mostly-missing": "none: more than half of a lead is missing; leave it out, or accept the loss",
    "no-header": "name the columns in the first line, or set --option leads= and header=off",
    "no-rate": "set --option rate=HZ, or store the rate in the file",
    "no-rhythm": "export the rhythm recording (10 s, all leads), not only averaged beats or other curves",
    "no-samples": _NONE,
    "no-signal": _NONE,
    "no-signals": "check that the file is a recording; where it holds several things, name the one with --option",
    "no-unit": "set --option unit=mV, uV, V or z, or store the unit in the file",
    "rate-mismatch": "leave --option rate= out, or correct it to what the file says",
    "too-large": "split the file; a 10 s recording is far smaller",
    "too-long": "split the recording into shorter ones",
    "too-short": "none: at least 2.5 s are needed; leave it out, or accept the loss",
    "truncated": _ANEW,
    "uneven-time": "store evenly spaced samples, missing ones as empty cells, and a time that runs forwards",
    "unexpected-header": "leave --option header=off out",
    "unit-mismatch": "leave --option unit= out, or correct it to what the file says",
    "unknown-compression": "write the file without compression, or in one that the detail names",
    "unknown-dialect": "export as Philips, HL7 aECG or GE MUSE XML",
    "unknown-encoding": "export with another encoding of the samples",
    "unknown-unit": "correct the unit in the file to a voltage; for a signal without unit, convert with unit=z",
    "unknown-version": "export in a version that the detail names",
    "unreadable-archive": _ANEW,
    "unreadable-file": _ANEW,
    "unreadable-header": "correct the header, or copy it again from where it was published",
    "unreadable-signal": _ANEW,
    "unreadable-xml": _EXPORT + ", as UTF-8",
    "unsafe-xml": "do not trust the file: no ECG needs what it declares; " + _EXPORT,
    "wrong-count": _EXPORT + ": its numbers of leads or samples contradict each other",
    "wrong-length": "take table and recordings from one release of the set",
    "wrong-type": "store the samples as numbers, and name the array that holds them with --option",
}
GENERAL = "look at the recording that the detail names; correct it, or leave it out"


def remedy(reason: str) -> str:
    """The remedy for the reason code `reason`."""
    return REMEDIES.get(reason, GENERAL)
