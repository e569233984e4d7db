"""The command line itself: every stage is there, explains itself, and fails in one line with the documented code."""

import errno
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ecg_jax import cli, errors, stops
from ecg_jax.commands import runs, study
from ecg_jax.datasets import DATASETS

STAGES = "convert inspect codebook tokenize train sweep probe table embed fit demo doctor".split()


def run(*words, capsys):
    try:
        code = cli.main(list(words))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_stage(capsys):
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for stage in STAGES:
        assert f"\n    {stage} " in out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help_with_an_example(stage, capsys):
    code, out, _ = run(stage, "--help", capsys=capsys)
    assert code == 0
    assert f"example:\n  ecg-jax {stage}" in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("two\nlines"), 2),
        (errors.DataError("x"), 3),
        (errors.DivergedError("x"), 4),
        (errors.MachineError("x"), 5),
        (errors.InterruptedRun("x"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "shard"), 5),
        (OSError(errno.EROFS, "Read-only file system", "shard"), 5),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_their_code(error, code, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr(study, "_run_doctor", fail)
    got, out, err = run("doctor", capsys=capsys)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("ecg-jax: error: ")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(study, "_run_doctor", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("convert", "ptbxl"), "--out"),
        (("convert", "ptbxl", "--out", "x"), "--source"),
        (("convert", "ptbxk", "--out", "x", "--source", "."), "did you mean 'ptbxl'"),
        (("convert", "synthetic", "--out", "x", "--option", "records"), "NAME=VALUE"),
        (("convert", "synthetic", "--out", "x", "--workers", "0"), "--workers"),
        (("convert", "refresh", "--out", "x"), "--source"),
        (("codebook", "--out", "x", "--import", "y", "a.b=1"), "--import takes only --out"),
        (("codebook", "a.toml", "b.toml", "--out", "x"), "one CONFIG.toml"),
        (("codebook", "--out", "x", "codebook.codes=1"), "between 2 and 65535"),
        (("codebook", "--out", "x"), "data.folders is empty"),
        (("probe", "--features", "x.npz", "--data", "x", "--task", "y"), "--features needs --out"),
        (("probe", "--run", "r", "--data", "x", "--preset", "nine"), "no preset 'nine'"),
        (("probe", "--run", "r", "--data", "x", "--task", "y", "--label-fraction", "2"), "must lie in (0, 1]"),
        (("probe", "--run", "r", "--data", "x", "--task", "y", "--probe", "svm"), "known are logistic, adam, finetune"),
    ],
)
def test_usage_errors_name_the_argument(words, says, capsys):
    code, _, err = run(*words, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


@pytest.mark.parametrize("words", [("a.b=1", "--run", "r"), ("--run", "r", "a.b=1")])
def test_overrides_may_stand_before_and_after_the_options(words, capsys, monkeypatch):
    monkeypatch.setattr(runs, "_run_train", lambda args: print(args.config, args.run_dir, args.overrides + args.rest))
    assert run("train", "c.toml", *words, capsys=capsys)[:2] == (0, "c.toml r ['a.b=1']\n")
    assert run("train", "c.toml", *words, "--nonsense", capsys=capsys)[0] == 2


def test_missing_folder_is_bad_data(tmp_path, capsys):
    code, _, err = run("inspect", str(tmp_path / "nowhere"), capsys=capsys)
    assert (code, err.count("\n")) == (3, 1)
    assert "nowhere" in err


def test_convert_lists_the_data_sets(capsys):
    code, out, _ = run("convert", "list", capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()][:3] == ["ptbxl", "code15", "code"]
    for entry in DATASETS.values():
        module, function = entry.open.split(":")
        assert callable(getattr(importlib.import_module(f"ecg_jax.datasets.{module}"), function))


def test_doctor_speaks_json(capsys):
    code, out, _ = run("doctor", "--json", capsys=capsys)
    result = json.loads(out)
    assert {"python", "packages", "devices", "machine", "caches", "problems"} <= set(result)
    assert code == (5 if result["problems"] else 0)
    assert result["devices"]


@pytest.mark.parametrize("number", stops.SIGNALS)
def test_a_signal_before_anything_is_begun_says_to_run_it_again(number, capfd):
    """As during an import: at once, with the code that means "go on", by whatever leaves the process."""
    before, codes = [signal.getsignal(each) for each in stops.SIGNALS], []
    with stops.at_once(codes.append):
        signal.raise_signal(number)
    assert codes == [75] and capfd.readouterr().err.count("run it again to go on\n") == 1
    assert before == [signal.getsignal(each) for each in stops.SIGNALS]


def test_planning_a_study_loads_no_jax(tmp_path):
    config = Path(__file__).parents[1] / "configs" / "study.toml"
    code = f"import sys, ecg_jax.cli as c; c.main(['sweep', {str(config)!r}, '--out', 'x', '--dry-run', '--json']); "
    code += "sys.exit(bool({'jax', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)["runs"]) > 120 and not list(tmp_path.iterdir())


def test_importing_the_package_and_asking_for_help_load_nothing_heavy():
    heavy = "{'jax', 'tensorflow', 'scipy', 'matplotlib', 'wfdb', 'numpy'}"
    code = f"import sys, ecg_jax.cli as c; c._parser(); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
