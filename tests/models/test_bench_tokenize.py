"""The benchmark of codes: a line with everything in it, and no package that a GPU image lacks."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench_tokenize.py"
ABSENT = ("tensorflow", "tensorflow_datasets", "wfdb", "h5py", "google_crc32c", "matplotlib", "torch")
TINY = ("--width", "16", "--encoder-layers", "1", "--heads", "1", "--head-size", "8", "--mlp", "16")
TINY += (
    "--codes",
    "24",
    "--code-dim",
    "4",
    "--records",
    "16",
    "--pairs",
    "1",
    "--seconds",
    "0.01",
    "--coder-batch",
    "8",
)


def test_codes_beforehand_stand_beside_codes_inside(tmp_path, capsys):
    file = tmp_path / "codes.csv"
    main = runpy.run_path(str(BENCH))["main"]
    main([*TINY, "--rung", "Td1", "--batch", "8", "--csv", str(file)])
    (line,) = csv.DictReader(file.read_text().splitlines())
    assert line["rung"] == "Td1" and line["input"] == "beats" and line["codes"] == "24"
    for name in ("beforehand_ecg_per_s", "inside_cpu_ms_per_ecg", "ratio_wall", "ratio_cpu", "tokenize_ecg_per_s"):
        assert float(line[name]) > 0, name
    assert 0 < float(line["gflop_per_ecg"]) and float(line["first_losses_apart"]) < 1e-3
    assert "ratio_cpu_range" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="multiples of 8"):
        main([*TINY, "--batch", "12"])


def test_making_codes_runs_on_a_bare_image():
    alone = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
    alone += f"runpy.run_path({str(BENCH)!r})['main'](sys.argv[1:])"
    command, env = [sys.executable, "-c", alone, *TINY, "--rung"], os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert "tokenize_ecg_per_s" in done.stdout and "inside" not in done.stdout
