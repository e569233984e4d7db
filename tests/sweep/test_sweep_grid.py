"""Which runs a sweep has, in which order, at which rates, and what they cost."""

import dataclasses
import math
from pathlib import Path

import pytest

from ecg_jax.errors import DataError, UsageError
from ecg_jax.models import flops, ladder
from ecg_jax.sweep import cells, cost, dry, jobs, spec

CONFIGS = Path(__file__).parents[2] / "configs"
BOTH = ("resnet1d", "transformer")


def unfinished(trial):
    return None


def valley(at):
    """Outcomes of trials whose loss is lowest at the rate `at[architecture letter]`."""

    def outcome(trial):
        return abs(math.log(float(trial.rsplit("-lr")[1]) / at[trial[0]]))

    return outcome


def test_cells_have_one_name_and_one_configuration(changed):
    found = changed(grid={"architectures": BOTH, "subsets": (0.1, 1.0), "offsets": (0.0, 1 / 3), "seeds": (0, 3)})
    twice = dataclasses.replace(found, grids=found.grids * 2)
    names = [one.name for one in cells.expand(found)]
    assert len(set(names)) == len(names) == 16 and [one.name for one in cells.expand(twice)] == names
    config = cells.configure(found, cells.expand(found)[3], lr=0.5)
    assert names[3] == "Rd1-signal-SL-synthetic-D10-o33-s3"
    assert (config.model.rung, config.data.subset, config.train.seed, config.optim.lr) == ("Rd1", 0.1, 3, 0.5)
    assert config.data.subset_offset == 1 / 3 and config.recipe.steps == 24
    near = changed(grid={"offsets": (0.331, 0.334)})
    with pytest.raises(UsageError, match="too close"):
        cells.expand(near)


def test_set_changes_the_runs_that_it_names(changed):
    found = changed(grid={"architectures": BOTH}, sets=({"architectures": ["resnet1d"], "train": {"batch": 32}},))
    assert [cells.configure(found, one).train.batch for one in cells.expand(found)] == [32, 32, 16, 16]


def test_trials_come_first_and_decide(changed):
    found = changed(grid={"architectures": BOTH})
    before = jobs.plan(found, unfinished)
    assert [job.kind for job in before] == ["trial"] * 4 + ["run"] * 4
    assert all(job.lr is None and len(job.needs) == 4 for job in before[4:])
    after = {job.name: job for job in jobs.plan(found, valley({"R": 1e-2, "T": 3e-2})) if job.kind == "run"}
    assert {name[0]: job.lr for name, job in after.items()} == {"R": 1e-2, "T": 3e-2}
    is_trial = {name: (job.source, job.trial) for name, job in after.items() if job.source}
    assert is_trial == {
        "Rd1-signal-SL-synthetic-D100-o0-s0": ("Rd1-signal-SL-synthetic-D100-o0-s0-lr0.01", 1),
        "Td1-signal-SL-synthetic-D100-o0-s0": ("Td1-signal-SL-synthetic-D100-o0-s0-lr0.03", 2),
    }


def test_an_optimum_at_the_edge_extends_the_grid_for_every_family(changed):
    """ResNets would learn fastest at 0.1, beyond the rates: Transformers get the further trials too."""
    found = changed(grid={"architectures": BOTH}, tuning={"extensions": 4})
    planned = jobs.plan(found, valley({"R": 9e-2, "T": 2e-2}))
    tried = {letter: [j.lr for j in planned if j.kind == "trial" and j.name[0] == letter] for letter in "RT"}
    assert sorted(tried["R"]) == sorted(tried["T"]) == [1e-2, 3e-2, 9e-2, 0.27]
    numbers = {job.lr: job.trial for job in planned if job.kind == "trial"}
    assert numbers == {1e-2: 1, 3e-2: 2, 9e-2: 3, 0.27: 4}
    assert {job.name[0]: job.lr for job in planned if job.kind == "run"} == {"R": 9e-2, "T": 3e-2}
    assert jobs.at_edges(found, valley({"R": 9e-2, "T": 2e-2})) == []
    limited = dataclasses.replace(found, tunings=(dataclasses.replace(found.tunings[0], extensions=0),))
    assert any("at the edge" in line for line in jobs.at_edges(limited, valley({"R": 9e-2, "T": 2e-2})))


def test_diverged_trials_are_never_chosen(changed):
    planned = jobs.plan(changed(), lambda trial: math.inf if "lr0.03" in trial else 0.5)
    assert {job.lr for job in planned if job.kind == "run"} == {1e-2}
    blocked = [job for job in jobs.plan(changed(), lambda trial: math.inf) if job.kind == "run"]
    assert all(job.needs for job in blocked)


def test_larger_rungs_take_the_rate_of_the_largest_tuned_one_scaled_by_width(changed):
    found = changed(grid={"rungs": ("d1", "d2", "d3")}, tuning={"rungs": ("d1", "d2")})
    runs = [job for job in jobs.plan(found, valley({"T": 1e-2})) if job.kind == "run"]
    assert {job.cell.rung: job.base_width for job in runs} == {"Td1": 0, "Td2": 0, "Td3": ladder.get("Td2").width}
    config = cells.configure(found, runs[-1].cell, 1e-2, 16)
    assert config.optim.base_width == 16


def test_runs_take_the_rate_of_the_nearest_d(changed):
    found = changed(grid={"subsets": (0.05, 0.2, 0.9)}, tuning={"subsets": (0.1, 1.0)})

    def outcome(trial):
        return float((float(trial.rsplit("-lr")[1]) > 0.02) == ("-D10-" in trial))

    rates = {job.cell.subset: job.lr for job in jobs.plan(found, outcome) if job.kind == "run"}
    assert rates == {0.05: 1e-2, 0.2: 1e-2, 0.9: 3e-2}


def test_cheap_runs_first_or_long_ones(changed):
    found = changed(grid={"rungs": ("d3", "d1", "d2")})
    cheap = [job.cell.rung for job in jobs.plan(found, unfinished) if job.kind == "run"]
    long = [
        job.cell.rung for job in jobs.plan(dataclasses.replace(found, order="long"), unfinished) if job.kind == "run"
    ]
    assert cheap == ["Td1"] * 2 + ["Td2"] * 2 + ["Td3"] * 2 and long == cheap[::-1]


def test_cost_is_the_plain_arithmetic(changed, tmp_path):
    found = changed()
    one = cells.Cell("synthetic", "Td1", "signal", "SL", 0.5)
    per_record = flops.training_flops(ladder.get("Td1"), 100)
    got = cost.estimate(found, one, cost.device("h200"))
    assert got.steps == (24, 24) and got.flops == (24 * 16 * per_record,) * 2 and got.n_params == 1556
    table = tmp_path / "steps.csv"
    table.write_text(f"rung,tflops\nTd1,{per_record * 1e3 / 1e12}\n")  # 1,000 ECG/s
    measured = cost.estimate(found, one, cost.device("two-cores", table))
    records = cells.counts(found.data["synthetic"])[0]
    seen = 24 * (16 + records["val"] / 8 / 3) + records["test"] / 3
    assert measured.hours[0] == pytest.approx((seen / 1000 + cost.OVERHEAD / 10) / 3600)
    with pytest.raises(UsageError, match="did you mean 'h200'"):
        cost.device("h20")
    table.write_text("rung,speed\nTd1,3\n")
    with pytest.raises(DataError, match="tflops"):
        cost.device("h200", table)


def test_the_study_is_planned_without_data(tmp_path, monkeypatch):
    """More than 120 runs in four families of both worlds, three places of the circle up to 10 %, and their trials."""
    monkeypatch.chdir(tmp_path)
    study = spec.load(CONFIGS / "study.toml")
    result = dry.dry_run(study, tmp_path / "study", cost.device("h200"))
    runs = [run for run in result["runs"] if run["kind"] == "run" and run["data"] == "code"]
    assert len(runs) >= 120
    families = {(run["architecture"], run["paradigm"]) for run in runs}
    assert len(families) == 4
    for architecture, paradigm in families:
        mine = [run for run in runs if (run["architecture"], run["paradigm"]) == (architecture, paradigm)]
        for world in ("signal", "beats"):
            assert {f"{architecture[0].upper()}{n}" for n in range(1, 9)} <= {
                r["rung"] for r in mine if r["input"] == world
            }
        small = {(run["rung"], run["input"], run["subset"]) for run in mine if run["subset"] <= 0.1}
        places = {(run["rung"], run["input"], run["subset"], run["offset"]) for run in mine}
        assert all((*cell, offset) in places for cell in small for offset in (0.0, 1 / 3, 2 / 3))
        assert max(run["seed"] for run in mine) == 2
    trials = [run for run in result["runs"] if run["kind"] == "trial" and run["data"] == "code"]
    by_family = {}
    for run in trials:
        family = run["architecture"], run["paradigm"], run["input"]
        by_family.setdefault(family, set()).add((run["rung"][1:], run["subset"], run["lr"]))
    assert len(by_family) == 8 and len({frozenset(tried) for tried in by_family.values()}) == 1
    assert {rung for rung, *_ in by_family["resnet1d", "SL", "signal"]} == {str(n) for n in range(1, 9)}
    assert any(run["data"] == "ptbxl" and run["paradigm"] == "SL" for run in result["runs"])
    assert not any(note.startswith("!") for note in result["notes"]), "every run fits the device"
    assert any("code2: left out" in note for note in result["notes"])
    assert result["totals"][-1]["hours"][1] > result["totals"][-1]["hours"][0] > 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[run]", "[rum]", "did you mean 'run'"),
        ('rungs = ["d1"]\nsubsets = [0.5', 'rungs = ["13"]\nsubsets = [0.5', "no rung"),
        ("subsets = [0.5, 1.0]", "subsets = [0.5, 1.5]", "shares in"),
        ("subsets = [0.5, 1.0]", "subset = [0.5, 1.0]", "did you mean 'subsets'"),
        ('paradigms = ["SL"]', 'paradigms = ["SSL"]', "need a [codebook]"),
        ("rates = [1e-2, 3e-2]", "rates = [1e-2]", "ascend in one ratio"),
        ("train.batch = 16", "train.bach = 16", "did you mean 'batch'"),
        ("train.batch = 16", "train.batch = 17", "multiple of the 8 lanes"),
        ('data = "synthetic"\narch', 'data = "sythetic"\narch', "did you mean 'synthetic'"),
        ("[[probe]]", "[probe]", "double brackets"),
    ],
)
def test_mistakes_in_the_file_are_named(toml, tmp_path, old, new, says):
    text = toml.read_text()
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        jobs.plan(spec.load(tmp_path / "bad.toml"), unfinished)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_overrides_reach_every_table(toml):
    found = spec.load(toml, ["run.train.batch=32", 'data.synthetic.folders=["elsewhere"]'])
    assert found.run["train"]["batch"] == 32 and found.data["synthetic"].folders == ("elsewhere",)
    with pytest.raises(UsageError, match=r"table\.key=value"):
        spec.load(toml, ["batch=32"])
    with pytest.raises(DataError, match="states no records"):
        cells.counts(dataclasses.replace(found.data["synthetic"], records={}))
