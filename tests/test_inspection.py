"""The card in words and the ECG on paper."""

import tarfile

import numpy as np
import pytest
from matplotlib.figure import Figure

from ecg_jax import cli, ecg_paper, inspection
from ecg_jax.datasets import open_source
from ecg_jax.errors import DataError
from ecg_jax.shards.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    convert(open_source("synthetic", None, {"records": "200", "val": "40", "test": "40"}), out, workers=1)
    return out / "synthetic"


def test_card_lines_name_splits_labels_and_unit(folder):
    text = "\n".join(inspection.card_lines(inspection.read_card(folder)))
    for word in ("synthetic 1.0.0", "12 leads at 100 Hz", "unit mV", "train", "val", "test", "1dAVb", "ST"):
        assert word in text


def test_stored_record_by_id_and_by_default(folder):
    first = inspection.stored_record(folder)
    assert first.signal.shape == (1000, 12) and first.rate == 100
    again = inspection.stored_record(folder, first.title.split()[1])
    np.testing.assert_array_equal(first.signal, again.signal)
    with pytest.raises(DataError, match="no record 'nobody'"):
        inspection.stored_record(folder, "nobody")


def test_inspect_draws_a_picture(folder, tmp_path, capsys):
    assert cli.main(["inspect", str(folder), "--plot", str(tmp_path / "ecg.png")]) == 0
    assert (tmp_path / "ecg.png").read_bytes().startswith(b"\x89PNG")
    assert "synthetic" in capsys.readouterr().out


def test_paper_is_true_to_scale(monkeypatch, tmp_path):
    """A 1 mV step is 10 mm high and one second is 25 mm long, in figure millimetres."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    signal = np.zeros((1000, 12))
    signal[500:, 1] = 1.0
    ecg_paper.draw(ecg_paper.Tracing(signal, 100.0, "mV", "t"), tmp_path / "x.png")
    (figure,) = figures
    (axes,) = figure.axes
    rhythm = max(axes.lines, key=lambda line: len(line.get_xdata()))
    x, y = rhythm.get_data()
    to_mm = figure.get_figwidth() * 25.4 / axes.get_xlim()[1]
    assert to_mm == pytest.approx(figure.get_figheight() * 25.4 / axes.get_ylim()[1]) == pytest.approx(1)
    assert np.ptp(y) == pytest.approx(10)
    assert x[100] - x[0] == pytest.approx(25)


def test_padding_is_not_drawn(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    ecg_paper.draw(ecg_paper.Tracing(np.ones((1000, 12)), 100.0, "mV", "t", valid=(135, 730)), tmp_path / "x.png")
    rhythm = max(figures[0].axes[0].lines, key=lambda line: len(line.get_xdata()))
    assert np.isfinite(rhythm.get_ydata()).sum() == 730


@pytest.mark.parametrize("name", ["reencoded/gains.hea", "natural/xml/hl7_aecg.xml", "natural/dicom/waveform_ecg.dcm"])
def test_a_raw_record_is_drawn_as_it_lies_on_disk(name, shared_data, tmp_path, capsys):
    if name.endswith("dcm"):
        pytest.importorskip("pydicom")
    with tarfile.open(shared_data / "quirks" / f"{name.partition('/')[0]}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert cli.main(["inspect", str(tmp_path / name), "--plot", str(tmp_path / "ecg.png")]) == 0
    assert (tmp_path / "ecg.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.strip()


def test_a_broken_raw_record_is_one_line(tmp_path, capsys):
    (tmp_path / "a.xml").write_text("<nothing/>")
    assert cli.main(["inspect", str(tmp_path / "a.xml")]) == 3
    assert "a.xml" in capsys.readouterr().err
