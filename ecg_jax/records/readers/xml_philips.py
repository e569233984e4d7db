"""Philips (Sierra) ECG XML 1.03 to 1.04.02: parsed waveforms, compressed (XLI) or not.

Reads the rhythm strip, never the representative beats; the calibration pulse at its end becomes NaN. Facts: the public
descriptions of the format in the repository sixlettervariables/sierra-ecg-tools. Invariant: a chunk that does not
decode to exactly the samples that the file promises is refused.
"""

import re

import numpy as np

from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.export import timestamp
from ecg_jax.records.readers.reading import Reading, settle
from ecg_jax.records.readers.xml_tree import Tree

VERSIONS = ("1.03", "1.04", "1.04.01", "1.04.02")
_STANDARD = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
_HEADER = 8  # bytes before each lead's codes: length (int32), unknown (int16), first second difference (int16)
_CODE_BITS = 10
_END = (1 << _CODE_BITS) - 1
_LAST = _END - 1  # of the dictionary
_BIAS = 64
_MOST = 4_000_000  # samples of all leads together: a short chunk can unfold to 600 times its size


def read_philips(root: Tree, source: bytes) -> Reading:
    """`root` is the `restingecgdata` element; `source` the sha256 of the file.

    Refuses with unknown-version, missing-element, unknown-encoding, unknown-compression, bad-number, bad-rate,
    too-long, truncated, wrong-count, corrupt-waveform, unknown-unit, ambiguous-limb-leads, bad-lead-name,
    duplicate-lead, missing-lead.
    """
    info = root.one("documentinfo")
    kind, version = info.one("documenttype").text, info.one("documentversion").text
    if kind not in ("SierraECG", "PhilipsECG") or version not in VERSIONS:
        raise info.refuse("unknown-version", f"is {kind[:40]} {version[:40]}, known are {', '.join(VERSIONS)}")
    acquisition = root.one("dataacquisition")
    signal = acquisition.one("signalcharacteristics")
    wave = root.one("waveforms/parsedwaveforms")

    def said(attribute: str, *elements: str) -> str:
        """What 1.04 says at the waveforms and 1.03 among the signal's characteristics."""
        if attribute in wave.node.attrib:
            return wave.attribute(attribute)
        found = next((tree for tree in map(signal.find, elements) if tree), None)
        return found.text if found else signal.one(elements[0]).text

    rate = signal.number(said("samplespersecond", "samplingrate"), "samplingrate")
    rate = xml_tree.check_rate(signal, rate)
    stated = signal.number(signal.one("samplingrate").text, "samplingrate")
    if stated != rate:
        raise wave.refuse("bad-rate", f"has {rate:g} samples a second, signalcharacteristics {stated:g}")
    step = signal.number(said("resolution", "resolution", "signalresolution"), "resolution")
    if step <= 0:
        raise signal.refuse("unknown-unit", f"has a resolution of {step:g} uV")
    layout = said("bitspersample", "bitspersample"), said("signalsigned", "signalsigned").lower()
    if layout != ("16", "true") or signal.number(said("signaloffset", "signaloffset") or "0", "signaloffset"):
        raise signal.refuse("unknown-encoding", "is not of signed 16-bit samples without offset")
    names = _names(signal, wave)
    milliseconds = wave.number(wave.attribute("durationperchannel"), "durationperchannel")
    length = round(milliseconds * rate / 1000)
    if not 0 < length * len(names) <= _MOST:
        raise wave.refuse("bad-number", f"lasts {milliseconds:g} ms; {_MOST} samples of all leads can be read at most")

    encoding, compression = wave.attribute("dataencoding"), _compression(wave)
    if compression == "XLI" and encoding == "Base64":
        leads = _with_limb_leads(_xli(wave, xml_tree.from_base64(wave), len(names), length), names)
    elif compression is None and encoding in ("Base64", "Plain"):
        if encoding == "Plain":
            flat = xml_tree.samples(wave)
        else:
            data = xml_tree.from_base64(wave)
            flat = np.frombuffer(data[: len(data) // 2 * 2], "<i2")
        # Sixteen channels may be stored where twelve are in use.
        if len(flat) % length or len(flat) < length * len(names):
            raise wave.refuse("wrong-count", f"holds {len(flat)} samples, {length * len(names)} were promised")
        leads = flat.reshape(-1, length)[: len(names)].astype(np.float64)
        _check_limb_leads(wave, leads, names)
    else:
        what = f"data encoding {encoding[:40]!r}, compression {str(compression)[:40]!r}"
        raise wave.refuse("unknown-compression", f"has {what}; known are Base64 with XLI, Base64 and Plain without")
    when = f"{acquisition.node.get('date', '')} {acquisition.node.get('time', '')}"
    time = timestamp(re.sub(r"[-: ]", "", when)) if re.fullmatch(r"[-\d]{10} [\d:]{5,8}", when) else None
    physical = without_calibration(leads.T * (step / 1000), rate)
    return settle(physical, names, rate, source, time=time)


def without_calibration(physical: np.ndarray, rate: float) -> np.ndarray:
    """Leads [T, n] in mV with NaN where, at the end, a calibration pulse stands in place of the ECG.

    Philips' eleventh second is no ECG: zeros, and a square pulse of 1 mV in every lead at once. No heart does that:
    III is II - I. Conversions of such files to other formats carry it along, filtered to within a step or two.
    """
    if physical.shape[1] < 3:
        return physical
    low, high = physical.min(axis=1), physical.max(axis=1)
    pulse = np.flatnonzero((low > 0.5) & (high - low < 0.02))
    pulse = pulse[pulse >= len(physical) - rate]
    if len(pulse) < 0.1 * rate:
        return physical
    heard = np.flatnonzero((high > 0.0125) | (low < -0.0125))
    heard = heard[heard < pulse[0]]
    out = physical.copy()
    out[heard[-1] + 1 if len(heard) else 0 :] = np.nan
    return out


def _names(signal: Tree, wave: Tree) -> tuple[str, ...]:
    if "leadlabels" in wave.node.attrib:
        names = tuple(wave.attribute("leadlabels").split())
        count = wave.count(wave.attribute("numberofleads"), "numberofleads", xml_tree.MAX_LEADS)
        if not 0 < count <= len(names):
            raise wave.refuse("wrong-count", f"has {len(names)} labels for {count} leads")
        return tuple(xml_tree.lead_name(wave, name) for name in names[:count])
    kind = signal.one("acquisitiontype").text
    count = signal.count(signal.one("numberchannelsallocated").text, "numberchannelsallocated", xml_tree.MAX_LEADS)
    if kind not in ("STD-12", "10-WIRE") or count < len(_STANDARD):
        raise signal.refuse("unknown-encoding", f"is of type {kind[:40]!r} with {count} channels and names no leads")
    return _STANDARD


def _compression(wave: Tree) -> str | None:
    """Name of the compression, None where there is none: one flag and a name in 1.03, one name later."""
    if wave.node.get("compressflag", "True").lower() == "false":
        return None
    name = wave.node.get("compressmethod", wave.node.get("compression", ""))
    return None if name in ("", "Uncompressed", "None") else name


def _xli(wave: Tree, data: bytes, count: int, length: int) -> np.ndarray:
    """int64 [count, length]: a chunk for each lead; chunks beyond `count` (spare channels) are left alone."""
    leads, at = [], 0
    for i in range(count):
        if at + _HEADER > len(data):
            raise wave.refuse("truncated", f"ends before lead {i + 1} of {count}")
        size = int.from_bytes(data[at : at + 4], "little", signed=True)
        start = int.from_bytes(data[at + 6 : at + 8], "little", signed=True)
        at += _HEADER
        if size < 0 or at + size > len(data):
            raise wave.refuse("truncated", f"has {len(data) - at} bytes left for lead {i + 1}, which claims {size}")
        octets = _unpacked(wave, data[at : at + size], 2 * length)
        if len(octets) != 2 * length:
            raise wave.refuse("wrong-count", f"has {len(octets) // 2} samples in lead {i + 1}, promised are {length}")
        leads.append(_summed(wave, octets, start))
        at += size
    return np.stack(leads)


def _unpacked(wave: Tree, codes: bytes, most: int) -> bytes:
    """LZW with codes of 10 bits, high bit first, and a dictionary that stops growing when it is full.

    At most a little over `most` bytes: a short chunk can unfold to gigabytes.
    """
    table = [bytes([i]) for i in range(256)]
    out, length, previous = [], 0, b""
    buffer = bits = 0
    for octet in codes:
        buffer, bits = (buffer << 8 | octet) & 0xFFFFFF, bits + 8
        if bits < _CODE_BITS:
            continue
        bits -= _CODE_BITS
        code = buffer >> bits & _END
        if code == _END:
            break
        if code < len(table):
            word = table[code]
        elif code == len(table) <= _LAST and previous:
            word = previous + previous[:1]
        else:
            raise wave.refuse("corrupt-waveform", f"uses code {code} before it is defined")
        if previous and len(table) <= _LAST:
            table.append(previous + word[:1])
        previous = word
        out.append(word)
        length += len(word)
        if length > most:
            break
    return b"".join(out)


def _summed(wave: Tree, octets: bytes, start: int) -> np.ndarray:
    """Samples of a lead: high bytes, then low bytes, of the first two samples and the biased second differences."""
    half = len(octets) // 2
    high, low = np.frombuffer(octets, np.uint8).reshape(2, half).astype(np.int64)
    words = (high << 8 | low) - ((high & 0x80) << 9)
    if half < 3:
        return words
    # The k-th sample beyond the second takes the difference that was stored two words before it.
    second = np.concatenate([[start], words[2:-1] - _BIAS])
    slope = words[1] - words[0] - np.cumsum(second)
    lead = np.concatenate([words[:2], words[1] + np.cumsum(slope)])
    if np.abs(lead).max() > 1 << 15:
        raise wave.refuse("corrupt-waveform", "decodes to samples beyond 16 bits")
    return lead


def _with_limb_leads(leads: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Under XLI, III and the augmented leads are stored as what Einthoven's and Goldberger's sums leave over."""
    leads = leads.copy()
    row = {name: i for i, name in enumerate(names)}
    if all(name in row for name in _STANDARD[:6]):
        one, two = leads[row["I"]], leads[row["II"]]
        three = two - one - leads[row["III"]]
        leads[row["III"]] = three
        leads[row["aVR"]] = -leads[row["aVR"]] - (one + two) // 2
        leads[row["aVL"]] = (one - three) // 2 - leads[row["aVL"]]
        leads[row["aVF"]] = (two + three) // 2 - leads[row["aVF"]]
    return leads


def _check_limb_leads(wave: Tree, leads: np.ndarray, names: tuple[str, ...]) -> None:
    """Without compression the leads should be there themselves. Refuses where III looks like a remainder."""
    row = {name: i for i, name in enumerate(names)}
    if not all(name in row for name in _STANDARD[:3]):
        return
    one, two, three = (leads[row[name]] for name in _STANDARD[:3])
    off = np.abs(three - (two - one))
    if off.max() > 2 and off.sum() > np.abs(three).sum():
        raise wave.refuse("ambiguous-limb-leads", "holds a lead III that is not II - I and may be a remainder")
