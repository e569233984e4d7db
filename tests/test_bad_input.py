"""What a user's mistakes look like from the command line: one clear line, the documented code, nothing half-written."""

import numpy as np
import pytest
import wfdb

from ecg_jax import cli
from ecg_jax.records.leads import LEADS
from ecg_jax.records.synthetic import Settings, generate

RATE = 100


def ecg() -> np.ndarray:
    """One simulated ECG, float64 [730 or 1024, 12] in mV."""
    return generate(Settings(), np.array([3]), np.array([3])).signal[0].astype(float)


def write(folder, name, signal, leads=LEADS, **options):
    folder.mkdir(exist_ok=True)
    size = signal.shape[1]
    wfdb.wrsamp(name, RATE, ["mV"] * size, list(leads), signal, fmt=["16"] * size, write_dir=str(folder), **options)


def table(folder, text="record,patient_id,sinus\nbad,p1,1\n"):
    (folder / "labels.csv").write_text(text)


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, source, out, *says):
    """Converting `source`, which holds one bad record alone, fails with code 3 and one line; nothing is left."""
    code, stdout, err = run(
        capsys,
        "convert",
        "wfdb",
        "--source",
        source,
        "--out",
        out,
        "--option",
        "binary=sinus",
        "--workers",
        "1",
    )
    assert (code, stdout, err.count("\n")) == (3, "", 1), err
    for word in says:
        assert word in err
    assert not out.exists() or not any(path.is_file() for path in out.rglob("*"))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    table(folder)
    return folder


def test_truncated_signal_file(source, tmp_path, capsys):
    write(source, "bad", ecg())
    whole = (source / "bad.dat").read_bytes()
    (source / "bad.dat").write_bytes(whole[: len(whole) // 2])
    refused(capsys, source, tmp_path / "out", "bad", "truncated")


def test_header_that_names_a_missing_lead(source, tmp_path, capsys):
    write(source, "bad", ecg()[:, :11], LEADS[:11])
    refused(capsys, source, tmp_path / "out", "bad", "missing-lead", "V6")


def test_all_nan_record(source, tmp_path, capsys):
    signal = ecg() * np.nan
    write(source, "bad", signal, adc_gain=[1000.0] * 12, baseline=[0] * 12)
    refused(capsys, source, tmp_path / "out", "bad", "nan")


def test_labels_table_with_an_unknown_column(source, tmp_path, capsys):
    write(source, "bad", ecg())
    table(source, "record,patient_idd,sinus\nbad,p1,1\n")
    refused(capsys, source, tmp_path / "out", "labels.csv", "patient_idd", "did you mean")


def test_missing_source_folder(tmp_path, capsys):
    code, _, err = run(capsys, "convert", "ptbxl", "--source", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (3, 1)
    assert "nowhere" in err and not (tmp_path / "out").exists()


def test_unknown_config_key(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("[optim]\nlearning_rat = 1e-3\n")
    code, _, err = run(capsys, "train", config, "--run", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "learning_rat" in err and str(config) in err and not (tmp_path / "run").exists()


def test_unknown_override(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text("")
    code, _, err = run(capsys, "train", config, "--run", tmp_path / "run", "optim.weight_decy=1")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean" in err and not (tmp_path / "run").exists()


def test_missing_data_folder(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(f'[data]\nfolders = ["{tmp_path / "nowhere"}"]\ntask = "code"\n')
    code, _, err = run(capsys, "train", config, "--run", tmp_path / "run")
    assert code == 3
    assert "nowhere" in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_one_bad_record_among_good_ones_is_quarantined(source, tmp_path, capsys):
    for i in range(40):
        index = np.array([i])
        write(source, f"r{i}", generate(Settings(), index, index).signal[0].astype(float))
    whole = (source / "r7.dat").read_bytes()
    (source / "r7.dat").write_bytes(whole[:100])
    table(source, "record,patient_id,sinus\n" + "".join(f"r{i},p{i},{i % 2}\n" for i in range(40)))
    words = ("--source", source, "--out", tmp_path / "out", "--option", "binary=sinus", "--workers", "1")
    code, out, err = run(capsys, "convert", "wfdb", *words)
    assert code == 0, err
    assert "40 recordings = 39 written + 1 quarantined" in out and "truncated 1" in out
    (quarantine,) = (tmp_path / "out").rglob("quarantine.jsonl")
    assert '"r7"' in quarantine.read_text() and "truncated" in quarantine.read_text()
