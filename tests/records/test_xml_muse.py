"""GE MUSE XML: files written here in the published layout, with the median beat that is not to be read."""

import base64
import zlib

import numpy as np
import pytest

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import xml_tree

EIGHT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


def lead_data(name: str, steps: np.ndarray, **more: object) -> str:
    data = steps.astype("<i2").tobytes()
    said = {
        "LeadByteCountTotal": len(data),
        "LeadTimeOffset": 0,
        "LeadSampleCountTotal": len(steps),
        "LeadAmplitudeUnitsPerBit": "4.88",
        "LeadAmplitudeUnits": "MICROVOLTS",
        "LeadHighLimit": 32767,
        "LeadLowLimit": -32768,
        "LeadID": name,
        "LeadOffsetFirstSample": 0,
        "FirstSampleBaseline": 0,
        "LeadSampleSize": 2,
        "LeadOff": "FALSE",
        "BaselineSway": "FALSE",
        "LeadDataCRC32": zlib.crc32(data),
        "WaveFormData": "\n" + base64.encodebytes(data).decode(),
    } | more
    return "<LeadData>" + "".join(f"<{tag}>{value}</{tag}>\n" for tag, value in said.items()) + "</LeadData>"


def waveform(kind: str, leads: list[str], base: str = "500", exponent: str = "0") -> str:
    return f"""<Waveform><WaveformType>{kind}</WaveformType><WaveformStartTime>0</WaveformStartTime>
<NumberofLeads>{len(leads)}</NumberofLeads><SampleType>CONTINUOUS_SAMPLES</SampleType><SampleBase>{base}</SampleBase>
<SampleExponent>{exponent}</SampleExponent><HighPassFilter>16</HighPassFilter>{"".join(leads)}</Waveform>"""


def muse(*waves: str) -> str:
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>\r\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">
<RestingECG><MuseInfo><MuseVersion>9.0.10.18530</MuseVersion></MuseInfo><PatientDemographics><PatientID>1</PatientID>
</PatientDemographics><TestDemographics><AcquisitionTime>09:35:04</AcquisitionTime>
<AcquisitionDate>09-23-2020</AcquisitionDate></TestDemographics>{"".join(waves)}</RestingECG>"""


@pytest.fixture(scope="module")
def small(steps) -> str:
    return muse(waveform("Rhythm", [lead_data(name, steps[:60, LEADS.index(name)]) for name in EIGHT]))


def test_muse(refusal, read, steps):
    median = waveform("Median", [lead_data(name, steps[:600, 0] * 9) for name in EIGHT])
    rhythm = waveform("Rhythm", [lead_data(name, steps[:, LEADS.index(name)]) for name in EIGHT], "50", "1")
    for document in (muse(median, rhythm), muse(rhythm, median)):
        reading = read(document.encode("latin-1"))
        assert reading.rate == 500.0 and reading.time == "2020-09-23 09:35:04"
        assert set(reading.derived) == {"III", "aVR", "aVL", "aVF"} and reading.missing == ()
        stored = [LEADS.index(name) for name in EIGHT]
        np.testing.assert_allclose(reading.signal[:, stored], steps[:, stored] * 0.00488, atol=1e-6)
        np.testing.assert_allclose(reading.signal[:, 2], (steps[:, 1] - steps[:, 0]) * 0.00488, atol=1e-6)
    assert refusal(muse(median)) == "no-rhythm"
    hidden = muse(rhythm).replace("09-23-2020", "XX-XX-XXXX")
    assert read(hidden).time is None


def test_muse_leads_of_their_own_time(read, steps):
    """Four columns of leads, one after another."""
    leads = [
        lead_data(name, steps[250 * (i // 3) : 250 * (i // 3) + 250, i], LeadOffsetFirstSample=250 * (i // 3))
        for i, name in enumerate(LEADS)
    ]
    signal = read(muse(waveform("Rhythm", leads))).signal
    assert signal.shape == (1000, 12)
    there = np.isfinite(signal)
    assert all(there[250 * (i // 3) : 250 * (i // 3) + 250, i].all() for i in range(12)) and there.sum() == 3000
    np.testing.assert_allclose(signal[there], steps[there] * 0.00488, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"LeadAmplitudeUnits": "ADU"}, "unknown-unit"),
        ({"LeadAmplitudeUnitsPerBit": "-10"}, "unknown-unit"),
        ({"LeadAmplitudeUnitsPerBit": "inf"}, "bad-number"),
        ({"LeadSampleCountTotal": 59}, "wrong-count"),
        ({"LeadByteCountTotal": 118}, "wrong-count"),
        ({"LeadDataCRC32": 12345}, "checksum-mismatch"),
        ({"LeadSampleSize": 3}, "unknown-encoding"),
        ({"LeadSampleSize": 4}, "wrong-count"),
        ({"LeadTimeOffset": 5}, "unknown-encoding"),
        ({"FirstSampleBaseline": 5}, "unknown-encoding"),
        ({"LeadOffsetFirstSample": 10**9}, "too-long"),
        ({"LeadOffsetFirstSample": 900_000}, "bad-number"),
        ({"LeadOffsetFirstSample": -1}, "bad-number"),
        ({"LeadID": "II"}, "duplicate-lead"),
        ({"WaveFormData": "==="}, "corrupt-waveform"),
    ],
)
def test_muse_refused(refusal, read, steps, change, reason):
    few = steps[:60]
    leads = [lead_data(name, few[:, 0], **(change if name == "V4" else {})) for name in EIGHT]
    assert refusal(muse(waveform("Rhythm", leads))) == reason
    if "LeadDataCRC32" in change:  # 0 promises nothing
        leads = [lead_data(name, few[:, 0], LeadDataCRC32=0) for name in EIGHT]
        assert len(read(muse(waveform("Rhythm", leads))).signal) == 60


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<SampleBase>500", "<SampleBase>", "bad-number"),
        ("<SampleExponent>0", "<SampleExponent>300", "bad-rate"),
        ("<SampleExponent>0", "<SampleExponent>4", "bad-rate"),
        ("<NumberofLeads>8", "<NumberofLeads>12", "wrong-count"),
        ("<LeadID>V6", "<LeadID>", "missing"),
        ("LeadAmplitudeUnits>", "Units>", "missing-element"),
        ("WaveFormData", "Data", "missing-element"),
        ("WaveformType", "Type", "missing-element"),
    ],
)
def test_muse_header_refused(refusal, read, small, old, new, reason):
    assert old in small
    if reason == "missing":  # a channel without a name is none of the twelve
        assert read(small.replace(old, new)).missing == ("V6",)
        return
    assert refusal(small.replace(old, new)) == reason


def test_muse_limits(refusal, read, small, monkeypatch):
    assert refusal(small.replace("<LeadID>V6", "<LeadID>" + "x" * 999)) == "bad-lead-name"
    monkeypatch.setattr(xml_tree, "MAX_SAMPLES", 50)
    assert refusal(small) == "too-long"
