"""The benchmark of the train step: a line with everything in it, its own image, and the same network in PyTorch."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ABSENT = ("tensorflow", "tensorflow_datasets", "wfdb", "h5py", "google_crc32c", "matplotlib", "torch")
ALONE = f"""
import runpy, sys
sys.path.insert(0, {str(TOOLS)!r})
sys.modules.update(dict.fromkeys({ABSENT!r}))  # None: importing it fails
bench = runpy.run_path({str(TOOLS / "bench_step.py")!r})
bench["main"](sys.argv[1:])
"""
QUICK = ("--batch", "8", "--records", "8", "--pairs", "1", "--seconds", "0.01", "--crop", "100")


def test_runs_on_a_bare_image_and_writes_a_line(tmp_path):
    """Without TensorFlow, wfdb, PyTorch: JAX, Flax, NumPy are all that a GPU image needs."""
    file = tmp_path / "steps.csv"
    more = ("--rung", "Td1", "--csv", str(file), "--accumulate", "2")
    done = subprocess.run([sys.executable, "-c", ALONE, *QUICK, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = csv.DictReader(file.read_text().splitlines())
    assert line["rung"] == "Td1" and line["params"] == "1556" and line["samples"] == "100"
    for name in ("ecg_per_s", "ms_per_step", "cpu_ms_per_step", "compile_s", "program_mib", "input_wait_ms"):
        assert float(line[name]) > 0, name
    assert line["mfu"] == "" and line["device"].endswith(" x cpu"), "no peak is guessed"
    assert line["ratio_wall"] == "" and "ecg_per_s" in done.stdout
    own = ("--rung", "Td1", "--objective", "masked_codes", "--csv", str(file), "--profile")
    done = subprocess.run([sys.executable, "-c", ALONE, *QUICK[:-2], *own], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = list(csv.DictReader(file.read_text().splitlines()))[-1]
    assert (line["objective"], line["input"]) == ("masked_codes", "beats") and float(line["ecg_per_s"]) > 0
    profile = done.stdout.partition("ms of operations a step")[2].splitlines()[1:]
    assert len(profile) > 10 and any("dot" in row for row in profile)
    refused = subprocess.run(
        [sys.executable, "-c", ALONE, "--rung", "Rd1", "--batch", "12", "--accumulate", "5"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode == 1 and "multiple of --accumulate 5" in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("options", [("Rd1", "group"), ("Rd1", "batch"), ("Td1", "group")])
@pytest.mark.parametrize("channels_last", ["off", "on"])
def test_the_network_in_pytorch_is_the_same(options, channels_last, tmp_path):
    rung, norm = options
    if (rung, channels_last) == ("Td1", "on"):
        pytest.skip("a Transformer has no channels-last")
    file = tmp_path / "steps.csv"
    more = ("--rung", rung, "--norm", norm, "--csv", str(file), "--against", "torch", "--channels-last", channels_last)
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_step.py", *QUICK[:-1], "160" if rung == "Rd1" else "100", *more],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "same loss and gradients to" in done.stdout
    (line,) = csv.DictReader(file.read_text().splitlines())
    assert float(line["ratio_wall"]) > 0 and float(line["ratio_cpu"]) > 0
