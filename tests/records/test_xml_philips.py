"""Philips ECG XML: files written here in the published layout, with their compression, and a real one."""

import base64
import struct
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers.xml import read_xml
from ecg_jax.records.record import Refused


def lzw(octets: bytes) -> bytes:
    """Codes of 10 bits, high bit first, closed by 1023; the dictionary ends at code 1022."""
    table = {bytes([i]): i for i in range(256)}
    codes, word = [], b""
    for octet in octets:
        longer = word + bytes([octet])
        if longer in table:
            word = longer
            continue
        codes.append(table[word])
        if len(table) < 1023:
            table[longer] = len(table)
        word = bytes([octet])
    bits = "".join(f"{code:010b}" for code in [*codes, table[word], 1023])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def chunk(samples: np.ndarray) -> bytes:
    """One lead under XLI."""
    x = samples.astype(int)
    second = 2 * x[1:-1] - x[:-2] - x[2:]
    words = np.concatenate([x[:2], second[1:] + 64, [64]]).astype("<u2")
    octets = (words >> 8).astype(np.uint8).tobytes() + (words & 255).astype(np.uint8).tobytes()
    packed = lzw(octets)
    return struct.pack("<ihh", len(packed), 1, second[0]) + packed


def xli(steps: np.ndarray, spare: int = 0) -> str:
    """Steps [T, 12] in the standard order; III and the augmented leads are stored as remainders."""
    one, two, three, avr, avl, avf = steps[:, :6].T.astype(int)
    stored = steps.astype(int).copy()
    stored[:, 2] = two - one - three
    stored[:, 3] = -avr - (one + two) // 2
    stored[:, 4] = (one - three) // 2 - avl
    stored[:, 5] = (two + three) // 2 - avf
    chunks = [chunk(lead) for lead in stored.T] + [chunk(np.zeros(len(steps)))] * spare
    return base64.encodebytes(b"".join(chunks)).decode()


def philips(body: str, length: int, version: str = "1.03", flags: str | None = None, rate: int = 500) -> str:
    """The elements that matter, where they stand in the real files."""
    new = version != "1.03"
    if flags is None:
        flags = 'compression="XLI"' if new else 'compressflag="True" compressmethod="XLI"'
    if new:
        flags += (
            f' numberofleads="12" leadlabels="{" ".join(LEADS)} VX VY" samplespersecond="{rate}" resolution="5" '
            'signaloffset="0" signalsigned="True" bitspersample="16"'
        )
    step = "resolution" if new else "signalresolution"
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<restingecgdata xmlns="http://www3.medical.philips.com" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
<documentinfo><documenttype>{"PhilipsECG" if new else "SierraECG"}</documenttype>
<documentversion>{version}</documentversion></documentinfo>
<dataacquisition date="2011-12-01" time="07:27:34"><signalcharacteristics><samplingrate>{rate}</samplingrate>
<{step}>5</{step}><acquisitiontype>STD-12</acquisitiontype><bitspersample>16</bitspersample>
<signaloffset>0</signaloffset><signalsigned>True</signalsigned>
<numberchannelsallocated>12</numberchannelsallocated></signalcharacteristics></dataacquisition>
<patient><generalpatientdata><age><years>50</years></age></generalpatientdata></patient>
<waveforms><parsedwaveforms {flags} dataencoding="Base64" durationperchannel="{1000 * length // rate}">{body}\
</parsedwaveforms></waveforms></restingecgdata>"""


@pytest.fixture(scope="module")
def small(steps) -> str:
    return philips(xli(steps[:60]), 60)


@pytest.mark.parametrize("version", ["1.03", "1.04", "1.04.01"])
def test_philips_compressed(read, steps, version):
    reading = read(philips(xli(steps, spare=4), len(steps), version))
    np.testing.assert_allclose(reading.signal, steps * 0.005, atol=1e-6)
    assert (reading.rate, reading.time, reading.names) == (500.0, "2011-12-01 07:27:34", LEADS)
    assert reading.derived == reading.missing == () and len(reading.source) == 32


def test_philips_full_dictionary(read):
    """Noise fills the dictionary; a constant lead uses codes in the step in which they are defined."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-3000, 3000, (2000, 12))
    steps[:, 7] = 17
    assert len(lzw(steps[:, 0].astype("<i2").tobytes())) > 1023 * 10 // 8
    np.testing.assert_allclose(read(philips(xli(steps), 2000)).signal, steps * 0.005, atol=1e-6)


def test_philips_uncompressed(refusal, read, steps):
    data = base64.b64encode(np.pad(steps, ((0, 0), (0, 4))).T.astype("<i2").tobytes()).decode()
    for version, flags in (("1.03", 'compressflag="False" compressmethod="XLI"'), ("1.04", "")):
        reading = read(philips(data, len(steps), version, flags))
        np.testing.assert_allclose(reading.signal, steps * 0.005, atol=1e-6)
    text = "\n".join(" ".join(map(str, lead)) for lead in steps.T)
    plain = philips(text, len(steps), "1.04", "").replace('"Base64"', '"Plain"')
    np.testing.assert_allclose(read(plain).signal, steps * 0.005, atol=1e-6)
    remainders = steps.copy()
    remainders[:, 2:6] = np.arange(len(steps))[:, None] % 3 - 1
    data = base64.b64encode(remainders.T.astype("<i2").tobytes()).decode()
    assert refusal(philips(data, len(steps), "1.04", "")) == "ambiguous-limb-leads"


def test_calibration_pulse_is_no_ecg(read, ecg):
    """11 s: zeros from 10.6 s on, with 1 mV in every lead from 10.7 to 10.9 s."""
    steps = np.rint(ecg(seconds=11.0) / 0.005).astype(int)
    steps[5300:] = 0
    steps[5350:5450] = 200
    signal = read(philips(xli(steps), 5500)).signal
    assert np.isnan(signal[5300:]).all() and np.isfinite(signal[:5290]).all() and len(signal) == 5500
    np.testing.assert_allclose(signal[:5290], steps[:5290] * 0.005, atol=1e-6)


def test_philips_reads_utf16(read, steps):
    document = philips(xli(steps), len(steps), "1.04").replace("UTF-8", "utf-16")
    np.testing.assert_allclose(read(document.encode("utf-16")).signal, steps * 0.005, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<documentversion>1.03", "<documentversion>2.0", "unknown-version"),
        ("SierraECG<", "MortaraECG<", "unknown-version"),
        ("STD-12", "15-LEAD", "unknown-encoding"),
        ('compressmethod="XLI"', 'compressmethod="Huffman"', "unknown-compression"),
        ('dataencoding="Base64"', 'dataencoding="Hex"', "unknown-compression"),
        (' dataencoding="Base64"', "", "missing-element"),
        ("<samplingrate>500", "<samplingrate>abc", "bad-number"),
        ("<samplingrate>500", "<samplingrate>0", "bad-rate"),
        ("<samplingrate>500", "<samplingrate>nan", "bad-number"),
        ("<samplingrate>500", "<samplingrate>5_00", "bad-number"),
        ("<samplingrate>500", "<samplingrate>250", "wrong-count"),
        ("<signalresolution>5", "<signalresolution>0", "unknown-unit"),
        ("<signalsigned>True", "<signalsigned>False", "unknown-encoding"),
        ("<signaloffset>0", "<signaloffset>1000", "unknown-encoding"),
        ("<bitspersample>16", "<bitspersample>24", "unknown-encoding"),
        ("<numberchannelsallocated>12", "<numberchannelsallocated>8", "unknown-encoding"),
        ('durationperchannel="120"', 'durationperchannel="118"', "wrong-count"),
        ('durationperchannel="120"', 'durationperchannel="1e12"', "bad-number"),
        ('durationperchannel="120"', 'durationperchannel="-120"', "bad-number"),
        ("parsedwaveforms", "otherwaveforms", "missing-element"),
        ("dataacquisition", "acquisition", "missing-element"),
    ],
)
def test_philips_refused(refusal, read, small, old, new, reason):
    assert old in small
    assert refusal(small.replace(old, new)) == reason


def test_philips_broken_codes(refusal, read, steps):
    whole = base64.b64decode(xli(steps))

    def refused(data: bytes) -> str:
        return refusal(philips(base64.b64encode(data).decode(), len(steps)))

    assert refused(whole[:-5]) == "truncated" and refused(whole[:3]) == refused(b"") == "truncated"
    assert refused(struct.pack("<ihh", -1, 1, 0) + whole[8:]) == "truncated"
    assert refused(struct.pack("<ihh", 1 << 30, 1, 0) + whole[8:]) == "truncated"
    undefined = struct.pack("<ihh", 4, 1, 0) + int(f"{65:010b}{700:010b}".ljust(32, "0"), 2).to_bytes(4, "big")
    assert refused(undefined + whole) == "corrupt-waveform"
    wild = struct.pack("<ihh", len(chunk(np.zeros(1000))) - 8, 1, 9000) + chunk(np.zeros(1000))[8:]
    assert refused(wild + whole) == "corrupt-waveform"  # slopes beyond 16 bits
    bomb = b"".join(chunk(np.zeros(60_000)) for _ in range(12))
    assert refused(bomb) == "wrong-count"
    assert refusal(philips("AAA!", 1000)) == refusal(philips("äöü", 1000)) == "corrupt-waveform"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_codes(read, steps, data):
    """What is not refused has as many samples as promised, of 16 bits."""
    codes = bytearray(base64.b64decode(xli(steps[:60])))
    for _ in range(data.draw(st.integers(1, 5))):
        codes[data.draw(st.integers(0, len(codes) - 1))] = data.draw(st.integers(0, 255))
    try:
        reading = read(philips(base64.b64encode(codes).decode(), 60))
    except Refused as refused:
        assert refused.reason in ("truncated", "wrong-count", "corrupt-waveform") and "ecg.xml" in refused.detail
    else:
        assert reading.signal.shape == (60, 12) and np.nanmax(np.abs(reading.signal)) < 6 * 32768 * 0.005


def einthoven(signal: np.ndarray) -> float:
    """Largest departure of the limb leads from their sums, mV."""
    one, two, three, avr, avl, avf = signal[np.isfinite(signal).all(axis=1), :6].T
    sums = (two - one - three, avr + (one + two) / 2, avl - (one - three) / 2, avf - (two + three) / 2)
    return max(float(np.abs(rest).max()) for rest in sums)


def test_real_philips(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks" / "natural.tar.xz") as archive:
        archive.extract("natural/xml/philips_1_03.xml", tmp_path, filter="data")
    reading = read_xml(tmp_path / "natural" / "xml" / "philips_1_03.xml")
    signal = reading.signal
    assert signal.shape == (5500, 12) and reading.rate == 500.0 and reading.time == "2011-12-01 07:27:34"
    # Sample 2750 of each lead in steps of 5 uV, as the authors of the format's public tools decode it.
    middle = np.rint(signal[2750] / 0.005).astype(int)
    assert middle.tolist() == [-9, -17, -7, 13, -1, -12, 0, -1, -3, -4, -7, -6]
    assert einthoven(signal) <= 0.0101  # two steps
    assert np.isnan(signal[5264:]).all() and np.isfinite(signal[:5264]).all()  # then comes the calibration pulse
    assert 0.3 < np.nanmax(np.abs(signal)) < 1.5 and (np.nanstd(signal, axis=0) > 0.02).all()
