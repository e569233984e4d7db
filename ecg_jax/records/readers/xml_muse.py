"""GE MUSE `RestingECG` XML: the rhythm waveform.

Never reads the median beat. MUSE stores eight leads; the four others follow from I and II when the channels are
settled. Facts: public exports and readers of the format (rickead/musexmlexport, PierreElias/IntroECG). Invariant: the
byte counts, sample counts and CRC-32 that a lead states agree with its data.
"""

import re
import zlib

import numpy as np

from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.export import timestamp
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.readers.xml_tree import Tree

UNITS = {"MICROVOLTS": 1e-3, "MILLIVOLTS": 1.0}
_TYPES = {2: "<i2", 4: "<i4"}


def read_muse(root: Tree, source: bytes) -> Reading:
    """`root` is the `RestingECG` element; `source` the sha256 of the file.

    Refuses with no-rhythm, missing-element, unknown-unit, unknown-encoding, bad-number, bad-rate, too-long,
    wrong-count, checksum-mismatch, corrupt-waveform, bad-lead-name, duplicate-lead, missing-lead. A lead whose first
    sample comes later is NaN before it, one that ends earlier NaN after.
    """
    waves = [one for one in root.all("Waveform") if one.one("WaveformType").text == "Rhythm"]
    if not waves:
        raise root.refuse("no-rhythm", "has no Waveform of WaveformType Rhythm")
    leads_of = [one.all("LeadData") for one in waves]
    # The first of the fullest.
    wave, leads = max(zip(waves, leads_of, strict=True), key=lambda pair: len(pair[1]))
    if not leads or len(leads) > xml_tree.MAX_LEADS:
        raise wave.refuse("wrong-count", f"has {len(leads)} LeadData, 1 to {xml_tree.MAX_LEADS} can be read")
    promised = wave.find("NumberofLeads")
    if promised and promised.count(promised.text, "text", xml_tree.MAX_LEADS) != len(leads):
        raise wave.refuse("wrong-count", f"has {len(leads)} LeadData, NumberofLeads says {promised.text}")
    names = [xml_tree.lead_name(lead, lead.one("LeadID").text) for lead in leads]
    columns = [_lead(lead) for lead in leads]
    length = max(len(column) for column in columns)
    physical = np.full((length, len(columns)), np.nan)
    for i, column in enumerate(columns):
        physical[: len(column), i] = column
    comments = () if len(waves) == 1 else (f"{len(waves)} rhythm waveforms, the fullest was read",)
    return settle(physical, names, _rate(wave), source, time=_time(root), comments=comments)


def _rate(wave: Tree) -> float:
    base = wave.number(wave.one("SampleBase").text, "SampleBase")
    exponent = wave.find("SampleExponent")
    power = exponent.number(exponent.text or "0", "text") if exponent else 0.0
    if abs(power) > 9 or not power.is_integer():
        raise wave.refuse("bad-rate", f"has SampleExponent {power:g}")
    return xml_tree.check_rate(wave, base * 10.0**power)


def _lead(lead: Tree) -> np.ndarray:
    """float64 [T] in mV, from the start of the waveform on."""
    unit = lead.one("LeadAmplitudeUnits").text
    if unit.upper() not in UNITS:
        raise lead.refuse("unknown-unit", f"has LeadAmplitudeUnits {unit[:40]!r}, known are {', '.join(UNITS)}")
    step = lead.number(lead.one("LeadAmplitudeUnitsPerBit").text, "LeadAmplitudeUnitsPerBit")
    if step <= 0:
        raise lead.refuse("unknown-unit", f"has LeadAmplitudeUnitsPerBit {step:g}, it must be above zero")

    def whole(name: str, default: int) -> int:
        found = lead.find(name)
        return found.count(found.text, "text", 1 << 32) if found and found.text else default

    for name in ("LeadTimeOffset", "FirstSampleBaseline"):
        if whole(name, 0):
            raise lead.refuse("unknown-encoding", f"has a {name} other than 0, whose meaning is not published")
    size = whole("LeadSampleSize", 2)
    if size not in _TYPES:
        raise lead.refuse("unknown-encoding", f"has LeadSampleSize {size}, known are 2 and 4")
    data = xml_tree.from_base64(lead.one("WaveFormData"))
    promised = whole("LeadSampleCountTotal", len(data) // size)
    if len(data) != promised * size or len(data) != whole("LeadByteCountTotal", len(data)):
        raise lead.refuse("wrong-count", f"has {len(data)} bytes of data, other than it states ({promised} samples)")
    # Some exports that were edited have 0 there.
    crc = whole("LeadDataCRC32", 0)
    if crc and crc != zlib.crc32(data):
        raise lead.refuse("checksum-mismatch", f"states CRC-32 {crc}, its data give {zlib.crc32(data)}")
    late = whole("LeadOffsetFirstSample", 0)
    if promised + late > xml_tree.MAX_SAMPLES:
        raise xml_tree.too_long(lead)
    # Four columns of 2.5 s start at three times their length at most; memory is not given for a number alone.
    if late > 16 * promised:
        raise lead.refuse("bad-number", f"has LeadOffsetFirstSample {late} with {promised} samples")
    samples = np.frombuffer(data, _TYPES[size]) * (step * UNITS[unit.upper()])
    return np.concatenate([np.full(late, np.nan), samples])


def _time(root: Tree) -> str | None:
    """Written month first; None where anonymised."""
    date, clock = (root.find(f"TestDemographics/Acquisition{part}") for part in ("Date", "Time"))
    match = re.fullmatch(r"(\d\d)-(\d\d)-(\d{4})", date.text) if date else None
    if match is None:
        return None
    digits = clock.text.replace(":", "") if clock else ""
    hour = digits if re.fullmatch(r"\d{4}(\d\d)?", digits) else ""
    return timestamp(f"{match[3]}{match[1]}{match[2]}{hour}")
