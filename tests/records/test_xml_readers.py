"""XML files whatever they hold: dialects told apart, documents that attack, encodings, damage."""

import base64
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.xml import read_xml
from ecg_jax.records.record import Refused

# 20 samples of each lead, as short as each dialect can be written.
_XSI = 'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
_ROW = [3 * i % 7 - 3 for i in range(20)]
PHILIPS = f"""<?xml version="1.0" encoding="UTF-8"?>
<restingecgdata xmlns="http://www3.medical.philips.com" {_XSI}><documentinfo><documenttype>PhilipsECG</documenttype>
<documentversion>1.04</documentversion></documentinfo><dataacquisition date="2011-12-01" time="07:27:34">
<signalcharacteristics><samplingrate>500</samplingrate></signalcharacteristics></dataacquisition>
<waveforms><parsedwaveforms dataencoding="Plain" numberofleads="12" leadlabels="{" ".join(LEADS)}"
durationperchannel="40" samplespersecond="500" resolution="5" signaloffset="0" signalsigned="True" bitspersample="16">
{" ".join(str(k * value) for k in (1, 2, 1, -1, 0, 1, 1, 2, 3, 4, 5, 6) for value in _ROW)}
</parsedwaveforms></waveforms></restingecgdata>"""
AECG = (
    f"""<?xml version="1.0" encoding="UTF-8"?>
<AnnotatedECG xmlns="urn:hl7-org:v3" {_XSI}><effectiveTime><low value="20021122091000"/></effectiveTime>
<component><series><code code="RHYTHM"/><component><sequenceSet><component><sequence><code code="TIME_ABSOLUTE"/>
<value xsi:type="GLIST_TS"><head value="20021122091000"/><increment value="0.002" unit="s"/></value></sequence>
</component>"""
    + "".join(
        f"""<component><sequence><code code="MDC_ECG_LEAD_{lead}"/><value xsi:type="SLIST_PQ">
<origin value="0" unit="uV"/><scale value="5" unit="uV"/><digits>{" ".join(map(str, _ROW))}</digits></value>
</sequence></component>"""
        for lead in LEADS
    )
    + "</sequenceSet></component></series></component></AnnotatedECG>"
)
AECG16 = AECG.replace("UTF-8", "UTF-16").encode("utf-16")
MUSE = (
    """<?xml version="1.0" encoding="ISO-8859-1"?>
<!DOCTYPE RestingECG SYSTEM "restecg.dtd">
<RestingECG><Waveform><WaveformType>Rhythm</WaveformType><NumberofLeads>8</NumberofLeads><SampleBase>500</SampleBase>
<SampleExponent>0</SampleExponent>"""
    + "".join(
        f"""<LeadData><LeadSampleCountTotal>20</LeadSampleCountTotal><LeadAmplitudeUnits>MICROVOLTS</LeadAmplitudeUnits>
<LeadAmplitudeUnitsPerBit>4.88</LeadAmplitudeUnitsPerBit><LeadID>{lead}</LeadID>
<WaveFormData>{base64.b64encode(np.array(_ROW, "<i2").tobytes()).decode()}</WaveFormData></LeadData>"""
        for lead in ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
    )
    + "</Waveform></RestingECG>"
)


def test_dialects_are_told_apart(read):
    row = np.array(_ROW)
    for document, step in ((PHILIPS, 0.005), (AECG, 0.005), (AECG16, 0.005), (MUSE, 0.00488)):
        reading = read(document)
        np.testing.assert_allclose(reading.signal[:, 0], row * step, atol=1e-7)
        assert reading.signal.shape == (20, 12) and reading.rate == 500.0 and not reading.missing


ENTITIES = '<!DOCTYPE RestingECG [<!ENTITY a "x">]>'
LAUGHS = '<!DOCTYPE RestingECG [<!ENTITY a "xxxxxxxxxx"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE RestingECG [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
DEFAULTS = f'<!DOCTYPE RestingECG [<!ATTLIST LeadData a CDATA "{"x" * 1000}">]>'


@pytest.mark.parametrize("doctype", [ENTITIES, LAUGHS, OUTSIDE, DEFAULTS])
def test_own_document_types_are_refused(refusal, read, doctype):
    text = MUSE.replace('<!DOCTYPE RestingECG SYSTEM "restecg.dtd">', doctype)
    assert refusal(text) == refusal(text.replace("<LeadID>V", "<LeadID>&a;V")) == "unsafe-xml"


def test_undefined_entity_is_no_nothing(refusal, read):
    assert refusal(MUSE.replace("<LeadID>V", "<LeadID>&a;V")) == "unsafe-xml"


def test_shape_of_the_document(refusal, read, monkeypatch):
    assert refusal("<a>" * 300 + "</a>" * 300) == "unsafe-xml"
    assert refusal(f'<a xmlns="{"u" * 300}"/>') == "unsafe-xml"
    monkeypatch.setattr(xml_tree, "MAX_ELEMENTS", 1000)
    assert refusal("<a>" + "<b/>" * 2000 + "</a>") == "unsafe-xml"
    assert refusal("<svg/>") == refusal('<RestingECG xmlns="urn:x"/>') == "unknown-dialect"
    for broken in ("", "<a>", "no xml", "<a></b>", "<a xsi:type='b'/>", b"\xff\xfe<\0", b"\0" * 99):
        assert refusal(broken) == "unreadable-xml"


def test_file(tmp_path, monkeypatch):
    with pytest.raises(Refused, match="missing-file"):
        read_xml(tmp_path / "absent.xml")
    with pytest.raises(Refused, match="unreadable-file"):
        read_xml(tmp_path)
    with pytest.raises(Refused, match="unreadable-file"):
        read_xml(Path("a\0b.xml"))
    (tmp_path / "a.xml").write_bytes(AECG.encode())
    monkeypatch.setattr(xml_tree, "MAX_BYTES", 1000)
    with pytest.raises(Refused, match="too-large"):
        read_xml(tmp_path / "a.xml")


@pytest.mark.parametrize("encoding", ["utf-16", "ISO-8859-1", "windows-1252", "gb18030", "Shift_JIS", "utf-8-sig"])
def test_encodings(read, encoding):
    name = {"gb18030": "山东", "Shift_JIS": "東京"}.get(encoding, "Müller")
    declared = encoding.removesuffix("-sig")
    text = AECG.replace("UTF-8", declared).replace("<effectiveTime>", f"<!-- {name} --><effectiveTime>")
    assert len(read(text.encode(encoding)).signal) == 20


def test_wrong_encodings(refusal, read):
    text = AECG.replace("UTF-8", "NAME").replace("<effectiveTime>", "<!-- ü --><effectiveTime>")
    for name in ("rot13", "base64", "idna", "utf-7", "unknown-9", "big5"):
        assert refusal(text.replace("NAME", name).encode("latin-1")) == "unreadable-xml"
    assert refusal(text.replace("NAME", "utf-16").encode()) == "unreadable-xml"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(read, data):
    """Whatever becomes of a file, the answer is a reading of sound shape or a refusal that names it."""
    document = bytearray(data.draw(st.sampled_from([PHILIPS.encode(), AECG.encode(), MUSE.encode(), AECG16])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(document) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "drop", "insert", "repeat"]))
        if kind == "change":
            document[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del document[at + 1 :]
        elif kind == "drop":
            del document[at : at + data.draw(st.integers(1, 200))]
        elif kind == "insert":
            document[at:at] = data.draw(st.sampled_from([b"9", b"-", b"1e9", b"&a;", b"\xff", b"<a>", b" ", b"nan"]))
        else:
            document[at:at] = document[at : at + 300]
        document = document or bytearray(b"x")
    try:
        reading = read(bytes(document))
    except Refused as refused:
        assert "ecg.xml" in refused.detail
        assert refused.reason and "\n" not in refused.detail and len(refused.detail) < 1000
    else:
        assert reading.signal.dtype == np.float32 and reading.signal.shape[1] == 12 and 1 <= reading.rate <= 1e5
        assert len(reading.signal) and not np.isinf(reading.signal).any()
