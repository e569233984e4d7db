"""DICOM waveforms (12-lead ECG, general ECG), on the `pydicom` package (extra `dicom`).

Reads one multiplex group, the rhythm recording, and never the median beat. Facts: DICOM PS3.3 C.10.9 (waveform module)
and PS3.16 CID 3001 (lead codes). Invariant: every channel's own sensitivity, correction, baseline and unit are applied,
and the samples are exactly as many as the group states.
"""

import hashlib
import io
import math
import re
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ecg_jax.errors import UsageError
from ecg_jax.records.leads import canonical
from ecg_jax.records.readers.export import MAX_RATE, load, naming, timestamp
from ecg_jax.records.readers.reading import MILLIVOLT, Reading, settle
from ecg_jax.records.record import Refused

MAX_BYTES = 64 << 20  # ten seconds are a quarter of one
MAX_CHANNELS = 64
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MEDIAN = re.compile(r"median|average|template|representative|beat", re.IGNORECASE)
_SHORTEST_DERIVED = 3.0  # seconds; what is derived and shorter is a beat
# Sample interpretation -> NumPy kind; the companded ones (MB, AB) are not for ECG.
_KINDS = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4", "SV": "i8", "UV": "u8"}
# Lead numbers that the code schemes MDC ("2:61") and SCPECG ("5.6.3-9-61") share.
_NUMBERS = {1: "I", 2: "II", 3: "V1", 4: "V2", 5: "V3", 6: "V4", 7: "V5", 8: "V6"} | {
    61: "III", 62: "aVR", 63: "aVL", 64: "aVF"
}  # fmt: skip
_CODE = re.compile(r"(?:2:|5\.6\.3-9-)(\d{1,3})")
_WANTED = ("AcquisitionDateTime", "ContentDate", "ContentTime", "StudyDate", "StudyTime", "WaveformSequence")


def read_dicom(path: Path) -> Reading:
    """Read the DICOM file at `path`, in millivolt.

    Of the groups that hold one of the twelve leads, originals before derived ones, the one with most of the leads is
    read, the longer of equals. Raises `UsageError` without pydicom. Refuses with missing-file, unreadable-file,
    too-large, unknown-compression, no-rhythm, missing-element, unknown-encoding, bad-number, bad-rate, truncated,
    wrong-count, unknown-unit, ambiguous-lead, channel-skew, duplicate-lead, missing-lead.
    """
    pydicom = _pydicom()
    data = load(path, MAX_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that break the standard: what matters is checked here
        try:
            with naming(path):
                return _read(path, _open(pydicom, path, data), hashlib.sha256(data).digest())
        except Refused:
            raise
        except Exception as error:  # pydicom converts values when they are asked for, and raises anything
            why = f"{type(error).__name__}: {error}"
            raise Refused("unreadable-file", f"{path}: not a DICOM waveform file ({why[:200]})") from None


@cache
def _pydicom() -> ModuleType:
    try:
        import pydicom
    except ImportError:
        raise UsageError("reading DICOM needs pydicom: pip install 'ecg-jax[dicom]'") from None
    return pydicom


def _open(pydicom: ModuleType, path: Path, data: bytes) -> Any:
    meta = pydicom.filereader.read_file_meta_info(path)
    if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
        # It would be inflated in one piece, to any size.
        raise Refused("unknown-compression", f"{path} is deflated; write it in Explicit VR Little Endian")
    return pydicom.dcmread(io.BytesIO(data), specific_tags=list(_WANTED))


def _read(path: Path, dataset: Any, source: bytes) -> Reading:
    groups = [_Group(path, i, group) for i, group in enumerate(dataset.get("WaveformSequence") or ())]
    usable = [group for group in groups if group.usable()]
    if not usable:
        raise Refused("no-rhythm", f"{path}: none of {len(groups)} waveform groups is a recording of ECG leads")
    best = max(usable, key=_Group.rank)
    little = dataset.file_meta.TransferSyntaxUID.is_little_endian
    physical = best.physical("<" if little else ">")
    note = f"{len(usable)} waveform groups with leads, group {best.index + 1} was read"
    comments = (note,) if len(usable) > 1 else ()
    return settle(physical, best.leads, best.rate, source, time=_time(dataset), comments=comments)


class _Group:
    """One multiplex group: what its header says, checked, and its samples on demand."""

    def __init__(self, path: Path, index: int, item: Any) -> None:
        self.path, self.index, self.item = path, index, item
        channels = list(item.get("ChannelDefinitionSequence") or ())
        self.channels = channels[: MAX_CHANNELS + 1]
        self.names = [self._name(channel) for channel in self.channels]
        self.columns = [i for i, name in enumerate(self.names) if name]
        self.leads = [self.names[i] for i in self.columns]

    def refuse(self, reason: str, why: str) -> Refused:
        return Refused(reason, f"{self.path}: waveform group {self.index + 1} {why}")

    def usable(self) -> bool:
        """Whether it can be a recording of ECG leads: has some, and is no median beat."""
        if not self.leads or _MEDIAN.search(str(self.item.get("MultiplexGroupLabel") or "")):
            return False
        return self.original or self.seconds >= _SHORTEST_DERIVED

    def rank(self) -> tuple[bool, int, float, int]:
        known = {*self.leads}
        limb = len(known & {"I", "II", "III", "aVR", "aVL", "aVF"})
        return self.original, len(known) - limb + (6 if limb > 1 else limb), self.seconds, -self.index

    @property
    def original(self) -> bool:
        return str(self.item.get("WaveformOriginality") or "").strip() == "ORIGINAL"

    @property
    def rate(self) -> float:
        rate = self._number(self.item, "SamplingFrequency")
        if not 1.0 <= rate <= MAX_RATE:
            raise self.refuse("bad-rate", f"has SamplingFrequency {rate:g}, 1 to {MAX_RATE:g} was expected")
        return rate

    @property
    def seconds(self) -> float:
        return self._number(self.item, "NumberOfWaveformSamples") / self.rate

    def physical(self, order: str) -> np.ndarray:
        """float64 [T, leads] in mV; padding values are NaN."""
        raw, invalid = self._samples(order)
        out = np.empty((len(raw), len(self.columns)))
        for k, i in enumerate(self.columns):
            gain, baseline = self._scale(self.channels[i], self.names[i])
            out[:, k] = raw[:, i] * gain + baseline
            out[invalid[:, i], k] = np.nan
        return out

    def _samples(self, order: str) -> tuple[np.ndarray, np.ndarray]:
        """Stored integers [T, channels], and where they are padding."""
        item = self.item
        kind = _KINDS.get(str(item.get("WaveformSampleInterpretation")))
        bits = self._number(item, "WaveformBitsAllocated")
        if kind is None or bits != 8 * int(kind[1]) or (bits == 8 and order == ">"):
            what = f"{str(item.get('WaveformSampleInterpretation'))[:20]} of {bits:g} bits"
            raise self.refuse("unknown-encoding", f"has samples of {what}; known are {', '.join(_KINDS)}")
        channels = self._number(item, "NumberOfWaveformChannels")
        count = self._number(item, "NumberOfWaveformSamples")
        if channels != len(self.channels) or len(self.channels) > MAX_CHANNELS:
            raise self.refuse("wrong-count", f"defines {len(self.channels)} channels and states {channels:g}")
        data = item.get("WaveformData")
        if not isinstance(data, bytes):
            raise self.refuse("missing-element", "has no WaveformData")
        size = channels * count * int(kind[1])
        if len(data) < size:
            raise self.refuse("truncated", f"has {len(data)} bytes of WaveformData, {size:g} were promised")
        if not size or not size.is_integer() or len(data) - size > 1:  # data end on an even byte
            raise self.refuse("wrong-count", f"has {len(data)} bytes of WaveformData, {size:g} were promised")
        dtype = np.dtype(order + kind)
        raw = np.frombuffer(data[: int(size)], dtype).reshape(int(count), int(channels))
        padding = item.get("WaveformPaddingValue")
        if padding is None or padding == b"":
            return raw, np.zeros(raw.shape, bool)
        if isinstance(padding, int):
            return raw, raw == padding
        if not isinstance(padding, bytes) or len(padding) < dtype.itemsize:
            raise self.refuse("unknown-encoding", "has a WaveformPaddingValue that is no sample")
        return raw, raw == np.frombuffer(padding[: dtype.itemsize], dtype)[0]

    def _scale(self, channel: Any, name: str) -> tuple[float, float]:
        """(mV per step, mV at step 0) of a channel."""
        units = channel.get("ChannelSensitivityUnitsSequence")
        unit = str(units[0].get("CodeValue") or "") if units else ""
        factor = MILLIVOLT.get(unit.strip().casefold())
        if factor is None or channel.get("ChannelSensitivity") is None:
            raise self.refuse("unknown-unit", f"has no sensitivity in uV, mV, V or nV for lead {name} ({unit[:20]!r})")
        gain = self._number(channel, "ChannelSensitivity") * self._number(
            channel, "ChannelSensitivityCorrectionFactor", 1.0
        )
        if gain == 0:
            raise self.refuse("unknown-unit", f"has a sensitivity of 0 for lead {name}")
        skew = self._number(channel, "ChannelSampleSkew", 0.0)
        skew += self._number(channel, "ChannelTimeSkew", 0.0) * self.rate
        if abs(skew) >= 1:
            raise self.refuse("channel-skew", f"has lead {name} {skew:g} samples apart from the others")
        return gain * factor, self._number(channel, "ChannelBaseline", 0.0) * factor

    def _name(self, channel: Any) -> str | None:
        """The lead by its code, else by the code's meaning, else by the channel's label; None where it is no lead.

        Refuses with ambiguous-lead where code and meaning name different leads.
        """
        source = channel.get("ChannelSourceSequence")
        if not source:
            return _lead(channel.get("ChannelLabel"))
        value = str(source[0].get("CodeValue") or "").strip()
        match = _CODE.fullmatch(value)
        coded = _NUMBERS.get(int(match[1])) if match else _lead(value)
        meant = _lead(source[0].get("CodeMeaning"))
        if coded and meant and coded != meant:
            raise self.refuse("ambiguous-lead", f"has a channel of code {value[:20]!r}, {coded}, that means {meant}")
        return coded or (None if match else meant)

    def _number(self, item: Any, keyword: str, default: float | None = None) -> float:
        value = item.get(keyword)
        if value is None or value == "":
            if default is None:
                raise self.refuse("missing-element", f"has no {keyword}")
            return default
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refuse("bad-number", f"has {keyword} {str(value)[:40]!r}")
        return number


def _lead(text: Any) -> str | None:
    """The lead that "Lead I (Einthoven)" or the like means. "Lead -aVR" is another lead than aVR."""
    plain = re.sub(r"\(.*\)|,.*", "", str(text or ""))
    return canonical(re.sub(r"^\s*(ECG\s+)?lead\b", "", plain, flags=re.IGNORECASE).strip())


def _time(dataset: Any) -> str | None:
    stamp = timestamp(str(dataset.get("AcquisitionDateTime") or ""))
    for kind in ("Content", "Study"):
        date, clock = (str(dataset.get(f"{kind}{part}") or "") for part in ("Date", "Time"))
        stamp = stamp or timestamp(date + clock)
    return stamp
