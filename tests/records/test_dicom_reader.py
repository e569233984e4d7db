"""DICOM waveforms: files written here with pydicom, damaged ones, and a real one against pydicom's own decoding."""

import builtins
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.errors import UsageError
from ecg_jax.records.leads import LEADS
from ecg_jax.records.readers import dicom
from ecg_jax.records.readers.dicom import read_dicom
from ecg_jax.records.record import Refused

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: E402

TYPES = {"SB": (8, "i1"), "UB": (8, "u1"), "SS": (16, "i2"), "US": (16, "u2"), "SL": (32, "i4"), "UL": (32, "u4")}
SCP = dict(zip(LEADS, (1, 2, 61, 62, 63, 64, 3, 4, 5, 6, 7, 8), strict=True))


def code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def channel(lead: str, unit: str = "uV", gain: object = 1.25, **more: object) -> Dataset:
    item = Dataset()
    item.ChannelSourceSequence = [code(f"5.6.3-9-{SCP[lead]}", "SCPECG", f"Lead {lead} (Einthoven)")]
    item.ChannelSensitivity = gain
    item.ChannelSensitivityUnitsSequence = [code(unit, "UCUM", unit)]
    item.ChannelSensitivityCorrectionFactor = 1
    item.ChannelBaseline = 0
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


def group(
    steps: np.ndarray,
    channels: list[Dataset] | None = None,
    rate: object = 500,
    kind: str = "SS",
    order: str = "<",
    originality: str = "ORIGINAL",
    label: str = "RHYTHM",
) -> Dataset:
    item = Dataset()
    item.WaveformOriginality, item.MultiplexGroupLabel = originality, label
    item.NumberOfWaveformChannels, item.NumberOfWaveformSamples = steps.shape[1], steps.shape[0]
    item.SamplingFrequency = rate
    item.ChannelDefinitionSequence = channels if channels is not None else [channel(lead) for lead in LEADS]
    item.WaveformBitsAllocated, item.WaveformSampleInterpretation = TYPES[kind][0], kind
    data = steps.astype(order + TYPES[kind][1]).tobytes()
    item.WaveformData = data + b"\0" * (len(data) % 2)
    return item


def save(path: Path, groups: list[Dataset], syntax=ExplicitVRLittleEndian) -> Path:
    """Written as pydicom writes it, whatever it would warn of."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.9.1.1", "1.2.3"
    meta.TransferSyntaxUID = syntax
    whole = Dataset()
    whole.file_meta, whole.PatientName, whole.AcquisitionDateTime = meta, "A^B", "20130125105919.5+0100"
    whole.WaveformSequence = groups
    whole.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def steps() -> np.ndarray:
    return np.random.default_rng(0).integers(-100, 100, (50, 12))


def refusal(path: Path) -> str:
    with pytest.raises(Refused, match=path.name.replace(".", r"\.")) as caught:
        read_dicom(path)
    return caught.value.reason


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_as_pydicom_decodes_it(tmp_path, steps, syntax):
    order = "<" if syntax.is_little_endian else ">"
    channels = [
        channel(lead, gain=0.5 + i / 8, ChannelBaseline=i - 3.5, ChannelSensitivityCorrectionFactor=1 + i / 16)
        for i, lead in enumerate(LEADS)
    ]
    reading = read_dicom(save(tmp_path / "a.dcm", [group(steps, channels, order=order)], syntax))
    assert (reading.rate, reading.time) == (500.0, "2013-01-25 10:59:19") and reading.names == LEADS
    if order == "<":  # pydicom decodes little-endian samples alone
        truth = pydicom.dcmread(tmp_path / "a.dcm").waveform_array(0) / 1000
        np.testing.assert_allclose(reading.signal, truth, atol=1e-6)
    gain = np.array([(0.5 + i / 8) * (1 + i / 16) for i in range(12)])
    np.testing.assert_allclose(reading.signal, (steps * gain + np.arange(12) - 3.5) / 1000, atol=1e-6)


@pytest.mark.parametrize("kind", list(TYPES))
def test_sample_types(tmp_path, steps, kind):
    stored = np.abs(steps) if kind[0] == "U" else steps
    reading = read_dicom(save(tmp_path / "a.dcm", [group(stored[:49], kind=kind)]))
    np.testing.assert_allclose(reading.signal, stored[:49] * 0.00125, atol=1e-6)


def test_units_and_order_of_channels(tmp_path, steps):
    names = LEADS[::-1]
    units = ["uV", "mV", "nV", "V"] * 3
    worth = np.array([1e-3, 1, 1e-6, 1e3] * 3)[::-1]
    channels = [channel(lead, unit) for lead, unit in zip(names, units, strict=True)]
    reading = read_dicom(save(tmp_path / "a.dcm", [group(steps, channels)]))
    np.testing.assert_allclose(reading.signal, steps[:, ::-1] * 1.25 * worth, rtol=1e-5, atol=1e-9)


def test_lead_codes(tmp_path, steps):
    def named(value: str, scheme: str, meaning: str) -> Dataset:
        item = channel("I")
        item.ChannelSourceSequence = [code(value, scheme, meaning)]
        return item

    labelled = channel("I", ChannelLabel="V6")
    del labelled.ChannelSourceSequence
    channels = [
        named("2:1", "MDC", "Lead I"),
        named("MDC_ECG_LEAD_II", "MDC", "Lead II"),
        named("X1", "99LOCAL", "Lead III"),
        named("2:62", "MDC", "aVR, augmented voltage, right"),
        named("2:65", "MDC", "Lead -aVR"),  # not aVR
        named("5.6.3-9-64", "SCPECG", "Lead aVF"),
        named("X2", "99LOCAL", "Lead -aVR"),
        labelled,
    ]
    reading = read_dicom(save(tmp_path / "a.dcm", [group(steps[:, :8], channels)]))
    assert reading.names == ("I", "II", "III", "aVR", "aVF", "V6")
    assert reading.derived == ("aVL",) and reading.missing == ("V1", "V2", "V3", "V4", "V5")
    np.testing.assert_allclose(reading.signal[:, 3], steps[:, 3] * 0.00125, atol=1e-6)
    np.testing.assert_allclose(reading.signal[:, 11], steps[:, 7] * 0.00125, atol=1e-6)
    channels = [named("5.6.3-9-1", "SCPECG", "Lead II")]
    assert refusal(save(tmp_path / "b.dcm", [group(steps[:, :1], channels)])) == "ambiguous-lead"


def test_which_group(tmp_path, steps):
    long = np.tile(steps, (40, 1))  # 4 s
    beat = group(long * 3, label="MEDIAN BEAT")
    derived_beat = group(steps * 5, originality="DERIVED", label="")
    limb = group(np.tile(long, (9, 1))[:, :3], [channel(lead) for lead in LEADS[:3]])
    reading = read_dicom(save(tmp_path / "a.dcm", [beat, derived_beat, limb, group(steps), group(long * 2)]))
    np.testing.assert_allclose(reading.signal, long * 2 * 0.00125, atol=1e-6)
    assert reading.comments == ("3 waveform groups with leads, group 5 was read",)
    smoothed = group(long, originality="DERIVED", label="FILTERED")
    assert len(read_dicom(save(tmp_path / "b.dcm", [beat, smoothed])).signal) == 2000
    assert refusal(save(tmp_path / "c.dcm", [beat, derived_beat])) == "no-rhythm"
    assert refusal(save(tmp_path / "d.dcm", [])) == "no-rhythm"


def test_padding(tmp_path, steps):
    item = group(steps)
    item.WaveformPaddingValue = np.array(steps[7, 3], "<i2").tobytes()
    signal = read_dicom(save(tmp_path / "a.dcm", [item])).signal
    gone = steps == steps[7, 3]
    assert np.isnan(signal[gone]).all() and np.isfinite(signal[~gone]).all() and gone.any()
    wide = group(steps, kind="SL")
    wide.WaveformPaddingValue = b"\0\0"  # no sample of 32 bits
    assert refusal(save(tmp_path / "b.dcm", [wide])) == "unknown-encoding"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"WaveformSampleInterpretation": "MB"}, "unknown-encoding"),
        ({"WaveformBitsAllocated": 32}, "unknown-encoding"),
        ({"SamplingFrequency": 0}, "bad-rate"),
        ({"SamplingFrequency": "1e9"}, "bad-rate"),
        ({"SamplingFrequency": None}, "missing-element"),
        ({"NumberOfWaveformSamples": 51}, "truncated"),
        ({"NumberOfWaveformSamples": 2**32 - 1}, "truncated"),
        ({"NumberOfWaveformSamples": 49}, "wrong-count"),
        ({"NumberOfWaveformSamples": 0}, "wrong-count"),
        ({"NumberOfWaveformChannels": 11}, "wrong-count"),
        ({"WaveformData": None}, "missing-element"),
    ],
)
def test_groups_refused(tmp_path, steps, change, reason):
    item = group(steps)
    for keyword, value in change.items():
        if value is None:
            delattr(item, keyword)
        else:
            setattr(item, keyword, value)
    assert refusal(save(tmp_path / "a.dcm", [item])) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ChannelSensitivityUnitsSequence": [code("mm", "UCUM", "")]}, "unknown-unit"),
        ({"ChannelSensitivityUnitsSequence": []}, "unknown-unit"),
        ({"ChannelSensitivity": None}, "unknown-unit"),
        ({"ChannelSensitivity": 0}, "unknown-unit"),
        ({"ChannelSampleSkew": 3}, "channel-skew"),
        ({"ChannelTimeSkew": "-0.01"}, "channel-skew"),
        ({"ChannelSourceSequence": [code("5.6.3-9-1", "SCPECG", "Lead I")]}, "duplicate-lead"),
    ],
)
def test_channels_refused(tmp_path, steps, change, reason):
    channels = [channel(lead) for lead in LEADS]
    for keyword, value in change.items():
        setattr(channels[4], keyword, value)
    assert refusal(save(tmp_path / "a.dcm", [group(steps, channels)])) == reason


def test_other_files(tmp_path, steps, monkeypatch):
    path = tmp_path / "a.dcm"
    assert refusal(path) == "missing-file"
    for data in (b"", b"DICM", b"x" * 999):
        path.write_bytes(data)
        assert refusal(path) == "unreadable-file"
    path.write_bytes(b"\0" * 128 + b"DICM")  # a DICOM file of nothing
    assert refusal(path) == "no-rhythm"
    save(path, [group(steps)])
    monkeypatch.setattr(dicom, "MAX_BYTES", 100)
    assert refusal(path) == "too-large"


def test_deflated_is_not_inflated(tmp_path, steps):
    path = save(tmp_path / "a.dcm", [group(steps)], pydicom.uid.DeflatedExplicitVRLittleEndian)
    assert refusal(path) == "unknown-compression"


def test_without_pydicom(tmp_path, monkeypatch):
    """The extra is optional: its absence is the user's to mend, not the recording's fault."""
    load = builtins.__import__

    def without(name, *rest):
        if name == "pydicom":
            raise ImportError(name)
        return load(name, *rest)

    dicom._pydicom.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'ecg-jax\[dicom\]'"):
        read_dicom(tmp_path / "a.dcm")
    monkeypatch.undo()
    dicom._pydicom.cache_clear()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(tmp_path, steps, data):
    """pydicom may raise or warn of anything; a reading or a refusal comes out."""
    path = tmp_path / "damaged.dcm"
    syntax = data.draw(st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian]))
    document = bytearray(save(path, [group(steps[:9])], syntax).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(128, len(document) - 1))
        kind = data.draw(st.sampled_from(["change", "change", "cut", "drop", "repeat"]))
        if kind == "change":
            document[at] = data.draw(st.sampled_from([0, 1, 0x20, 0x7F, 0x80, 0xFF, document[at] ^ 1]))
        elif kind == "cut":
            del document[at:]
        elif kind == "drop":
            del document[at : at + data.draw(st.integers(1, 40))]
        else:
            document[at:at] = document[at : at + 100]
        document = document if len(document) > 129 else bytearray(130)
    path.write_bytes(document)
    try:
        reading = read_dicom(path)
    except Refused as refused:
        assert "damaged.dcm" in refused.detail and "\n" not in refused.detail and len(refused.detail) < 1000
    else:
        assert reading.signal.dtype == np.float32 and reading.signal.shape[1] == 12 and 1 <= reading.rate <= 1e5
        assert len(reading.signal)


def test_real_file(shared_data, tmp_path):
    with tarfile.open(shared_data / "quirks" / "natural.tar.xz") as archive:
        archive.extract("natural/dicom/waveform_ecg.dcm", tmp_path, filter="data")
    path = tmp_path / "natural" / "dicom" / "waveform_ecg.dcm"
    reading = read_dicom(path)
    assert reading.signal.shape == (10_000, 12) and reading.rate == 1000.0  # not the median beat of 1.2 s
    assert reading.time == "2013-01-25 10:59:19" and reading.missing == reading.derived == reading.comments == ()
    truth = pydicom.dcmread(path).waveform_array(0) / 1000
    np.testing.assert_allclose(reading.signal, truth, atol=1e-6)
    one, two, three = reading.signal[:, :3].T
    assert np.abs(one + three - two).max() < 1e-5 and 0.5 < np.abs(reading.signal).max() < 3
