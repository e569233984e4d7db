"""What is asked of the beat detector: on cardiologists' marks, with noise and dead leads, and on simulated hearts.

The scoring is that of tools/bench_beats.py, which prints the same figures for more copies.
"""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_beats.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_beats", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real(bench, shared_data):
    """(record numbers, case) of LUDB."""
    return bench.ludb(shared_data / "ludb")


def robust(bench, case):
    return bench.score(case, bench.MODES["robust"])


def test_scoring(bench):
    """A missed beat, an extra one, a doubled one, one outside the marks; the rest 20 ms late."""
    truth = np.array([100.0, 200.0, 300.0, 400.0])
    found = np.array([40, 93, 102, 202, 250, 308, 402, 405, 480])
    case = bench.Case(np.zeros((1, 1000, 12), np.int16), [(0, 1000)], [truth], [(100.0, 400.0)])
    got = bench.score(case, lambda signal, valid: [found])
    assert (got.beats, got.missed, got.extra) == (4, 1, 4)
    assert got.bias == pytest.approx(20) and got.sd == pytest.approx(0)
    assert got.sensitivity == 75 and got.predictive == pytest.approx(300 / 7)
    nothing = bench.matched(truth, np.zeros(0))
    assert nothing == [] and bench.matched(np.array([10.0, 12.0]), np.array([11.5])) == [(1, 0)]


def test_annotations_are_read_as_wfdb_reads_them(bench, shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas deprecations inside wfdb
        import wfdb

        with bench.unpacked(shared_data / "ludb") as data:
            for file in sorted(path for path in data.iterdir() if path.suffix[1:] in ("i", "v4"))[::9]:
                note = wfdb.rdann(str(file.with_suffix("")), file.suffix[1:])
                expected = [at for at, kind in zip(note.sample, note.symbol, strict=True) if kind == "N"]
                assert bench.n_marks(file).tolist() == expected and len(expected) > 3


def test_marks_of_cardiologists(bench, real):
    numbers, case = real
    assert len(numbers) == 120 and sum(map(len, case.truth)) == 1086
    for half in (0, 1):
        got = robust(bench, case.take([i for i, number in enumerate(numbers) if number % 2 == half]))
        assert got.sensitivity >= 99.8 and got.predictive >= 99.8, got
        assert abs(got.bias) <= 5 and got.sd <= 10, got
    heartlang = bench.score(case, bench.MODES["xqrs"])
    assert 85 < heartlang.sensitivity < 95 and 65 < heartlang.predictive < 80 and heartlang.bias < -25


@pytest.mark.parametrize("kind", ["emg", "motion", "both"])
def test_with_noise_at_6_db(bench, real, kind):
    noisy = bench.noisy(real[1], kind, 2, seed=1)
    power = (
        (noisy.signal.astype(float) - np.repeat(real[1].signal, 2, axis=0))[:, :, bench.EIGHT].var(axis=1).mean(axis=1)
    )
    clean = np.repeat(real[1].signal[:, :, bench.EIGHT].astype(float).var(axis=1).mean(axis=1), 2)
    np.testing.assert_allclose(10 * np.log10(clean / power), 6, atol=0.05)
    got = robust(bench, noisy)
    assert got.sensitivity >= 99 and got.predictive >= 99, got


def test_with_leads_dead_or_inverted(bench, real):
    dead = bench.dead(real[1], 6, seed=1)
    assert ((dead.signal == 0).all(axis=1).sum(axis=1) >= 6).all()
    for case in (dead, bench.inverted(real[1])):
        got = robust(bench, case)
        assert got.sensitivity >= 99 and got.predictive >= 99, got


@pytest.mark.parametrize("kind", ["af", "ventricular", "atrial"])
def test_simulated_rhythms(bench, kind):
    """Both populations taken together."""
    cases = [bench.simulated(kind, 200, 201, population=number, prevalence="balanced") for number in (1, 2)]
    got = [robust(bench, case) for case in cases]
    total, missed, extra = (sum(getattr(one, field) for one in got) for field in ("beats", "missed", "extra"))
    assert total > 4000 and missed <= 0.005 * total and extra <= 0.005 * total, got


@pytest.mark.parametrize("rate", [40, 80, 120, 180])
def test_simulated_rates(bench, rate):
    case = bench.simulated("", 150, 202, rate)
    intervals = np.concatenate([np.diff(truth) for truth in case.truth])
    assert np.median(intervals) == pytest.approx(6000 / rate, rel=0.03)
    got = robust(bench, case)
    assert got.sensitivity >= 99.5 and got.predictive >= 99.5 and abs(got.bias) <= 5, got


def test_the_benchmark_measures_all_three(bench, capsys):
    found = bench.speed(32, 2)
    assert {"robust", "xqrs", "wfdb", "robust_over_wfdb"} <= found.keys() and min(found["robust"], found["wfdb"]) > 0
    assert '"robust_over_wfdb"' in capsys.readouterr().out
