"""HL7 aECG: files written here in the published layout, and the standard's own example."""

import tarfile

import numpy as np
import pytest

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.xml import read_xml


def sequence(code: str, digits: str, scale: str = "2.5", unit: str = "uV", origin: str = "0") -> str:
    return f"""<component><sequence><code code="{code}" codeSystem="2.16.840.1.113883.6.24"/>
<value xsi:type="SLIST_PQ"><origin value="{origin}" unit="{unit}"/><scale value="{scale}" unit="{unit}"/>
<digits>{digits}</digits></value></sequence></component>"""


def series(steps: np.ndarray, names=LEADS, kind: str = "RHYTHM", inner: str = "", increment="0.002", unit="s") -> str:
    leads = [
        sequence(f"MDC_ECG_LEAD_{name.upper()}", " ".join(map(str, lead)))
        for name, lead in zip(names, steps.T, strict=True)
    ]
    return f"""<component><series><code code="{kind}"/><effectiveTime><low value="20021122091000"/></effectiveTime>
{inner}<component><sequenceSet><component><sequence><code code="TIME_ABSOLUTE"/><value xsi:type="GLIST_TS">
<head value="20021122091000.000"/><increment value="{increment}" unit="{unit}"/></value></sequence></component>
{"".join(leads)}</sequenceSet></component></series></component>"""


def aecg(*parts: str) -> str:
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" type="Observation">
<effectiveTime><center value="20010101000000"/></effectiveTime>{"".join(parts)}</AnnotatedECG>"""


@pytest.fixture(scope="module")
def small(steps) -> str:
    return aecg(series(steps[:60]))


def test_aecg(refusal, read, steps):
    beat = series(steps[:100] * 9, kind="REPRESENTATIVE_BEAT").replace("series>", "derivedSeries>")
    derivation = beat.replace("<component>", "<derivation>", 1)[: -len("</component>")] + "</derivation>"
    document = aecg(series(steps * 2, inner=derivation))
    assert "<derivation><derivedSeries>" in document
    reading = read(document)
    np.testing.assert_allclose(reading.signal, steps * 0.005, atol=1e-6)
    assert (reading.rate, reading.time, reading.comments) == (500.0, "2002-11-22 09:10:00", ())
    beats_alone = series(steps, kind="REPRESENTATIVE_BEAT")
    assert refusal(aecg(beats_alone)) == refusal(aecg()) == "no-rhythm"


def test_aecg_scale_origin_order(read, steps):
    names = LEADS[::-1]
    parts = [
        sequence(f"MDC_ECG_LEAD_{name}", " ".join(map(str, steps[:, LEADS.index(name)])), "0.005", "mV", str(i / 10))
        for i, name in enumerate(names)
    ]
    extra = sequence("MDC_ECG_LEAD_VX", "1 2 3") + sequence("MDC_ECG_LEAD_AVR_NEG", "1 2 3")
    document = aecg(series(steps[:, :0], (), increment="4", unit="ms")).replace(
        "</sequenceSet>", "".join(parts) + extra + "</sequenceSet>"
    )
    reading = read(document)
    assert reading.rate == 250.0 and reading.names[0] == "MDC_ECG_LEAD_V6"
    origin = np.array([names.index(lead) / 10 for lead in LEADS])
    np.testing.assert_allclose(reading.signal, steps * 0.005 + origin, atol=1e-6)


def test_aecg_takes_the_fullest_set(read, steps):
    two, long = series(steps[:, :2], LEADS[:2]), series(steps * 2)
    reading = read(aecg(series(steps[:500]), two, long, series(steps[:300] * 7)))
    np.testing.assert_allclose(reading.signal, steps * 0.005, atol=1e-6)
    assert reading.comments == ("4 rhythm sequence sets, the fullest was read",)
    limb = read(aecg(two))
    assert limb.missing == LEADS[6:] and set(limb.derived) == {"III", "aVR", "aVL", "aVF"}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('unit="uV"', 'unit="mm"', "unknown-unit"),
        ('<scale value="2.5"', '<scale value="0"', "unknown-unit"),
        ('<scale value="2.5"', '<scale value="two"', "bad-number"),
        ('<origin value="0" unit="uV"/>', "", "missing-element"),
        ("SLIST_PQ", "SLIST_INT", "unknown-encoding"),
        ('<increment value="0.002"', '<increment value="0"', "bad-rate"),
        ('<increment value="0.002"', '<increment value="-1"', "bad-rate"),
        ('<increment value="0.002"', '<increment value="1e-320"', "bad-rate"),
        ('value="0.002" unit="s"', 'value="0.002" unit="min"', "unknown-unit"),
        ("TIME_ABSOLUTE", "TIME", "missing-element"),
        ("LEAD_V3", "LEAD_V2", "duplicate-lead"),
        ("MDC_ECG_LEAD_", "MDC_ECG_LEAD_X", "missing-lead"),
        ("<digits>", "<digits>7 ", "wrong-count"),
        ("<digits>", "<digits>1e999 ", "bad-number"),
        ("<digits>", "<digits>1_0 ", "bad-number"),
        ("<digits>", "<digits>x ", "bad-number"),
    ],
)
def test_aecg_refused(refusal, read, small, old, new, reason):
    assert old in small
    assert refusal(small.replace(old, new, 1 if reason == "wrong-count" else -1)) == reason


def test_aecg_sample_that_is_not_there(read, small):
    signal = read(small.replace("<digits>", "<digits>NaN ")).signal
    assert np.isnan(signal[0]).all() and np.isfinite(signal[1:]).all()


def test_calibration_pulse_that_a_conversion_carried_along(read, ecg):
    """Zeros from 10.6 s on, with 1 mV in every lead from 10.7 to 10.9 s, to within a step: it was filtered."""
    steps = np.rint(ecg(seconds=11.0) / 0.005).astype(int)
    steps[5300:] = 0
    steps[5350:5450] = 200
    steps[5300:] += np.random.default_rng(1).integers(-1, 2, (200, 12))
    signal = read(aecg(series(steps * 2))).signal
    assert np.isnan(signal[5300:]).all() and np.isfinite(signal[:5290]).all() and len(signal) == 5500
    np.testing.assert_allclose(signal[:5290], steps[:5290] * 0.005, atol=1e-6)


def test_aecg_limits(refusal, read, small, monkeypatch):
    assert refusal(small.replace("MDC_ECG_LEAD_V6", "MDC_ECG_LEAD_V" + " " * 999 + "6")) == "bad-lead-name"
    monkeypatch.setattr(xml_tree, "MAX_SAMPLES", 50)
    assert refusal(small) == "too-long"


def test_real_aecg(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks" / "natural.tar.xz") as archive:
        archive.extract("natural/xml/hl7_aecg.xml", tmp_path, filter="data")
    reading = read_xml(tmp_path / "natural" / "xml" / "hl7_aecg.xml")
    assert reading.signal.shape == (5000, 12) and reading.rate == 500.0 and reading.time == "2002-11-22 09:10:00"
    assert reading.missing == reading.derived == ()
    one, two, three, avr, avl, avf = reading.signal[:, :6].T
    sums = (two - one - three, avr + (one + two) / 2, avl - (one - three) / 2, avf - (two + three) / 2)
    assert max(float(np.abs(rest).max()) for rest in sums) < 0.0026  # a step
    np.testing.assert_allclose(reading.signal[:6, 0], np.array([-2, -2, -2, -2, -3, -4]) * 0.0025, atol=1e-7)
    assert 0.5 < np.abs(reading.signal).max() < 3
