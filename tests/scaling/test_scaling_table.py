"""Reading: renames, defaults, what is left out and counted, what is refused and in which words."""

import csv
import json

import fake_log
import numpy as np
import pytest

from ecg_jax.errors import DataError, UsageError
from ecg_jax.scaling import families, table

ROW = {
    "run": "a",
    "architecture": "resnet1d",
    "paradigm": "SL",
    "n_params": 1000,
    "n_records": 500,
    "dataset": "x",
    "task": "pretrain",
    "metric": "bce",
    "value": 0.2,
}


def log(tmp_path, *changes, name="log.jsonl"):
    return fake_log.write_jsonl(tmp_path / name, [ROW | {"run": f"r{i}"} | c for i, c in enumerate(changes)])


def test_every_row_is_used_or_counted_with_its_reason(tmp_path):
    entries = fake_log.rows()
    path = fake_log.write_jsonl(tmp_path / "all.jsonl", entries)
    got = table.read([path])
    assert got.read == len(entries) == len(got.rows) + sum(got.left_out.values())
    assert sum(n for reason, n in got.left_out.items() if reason.startswith("untrained")) == 6
    sets = families.group(got)
    assert len(sets) == 6 and sets[0].key.domain == "id"
    assert all(s.n == 11 and s.selection == "best-val" for s in sets)
    assert sets[0].passed_over == {"selection last (best-val is used)": 11}
    assert sum(s.n + sum(s.passed_over.values()) for s in sets) == len(got.rows)
    assert sets[0].known_floor() == pytest.approx(fake_log.BAYES)


def test_run_folders_csv_and_jsonl_give_the_same_sets(tmp_path):
    entries = fake_log.rows()
    runs = fake_log.write_runs(tmp_path / "runs", entries)
    flat = tmp_path / "flat.csv"
    with open(flat, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for e in entries for k in e)))
        writer.writeheader()
        writer.writerows(entries)
    one, two = (families.group(table.read([p])) for p in (runs, flat))
    assert [s.key for s in one] == [s.key for s in two]
    for a, b in zip(one, two, strict=True):
        assert a.runs == b.runs and np.array_equal(a.loss, b.loss)


def test_columns_are_renamed_and_constants_given(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("name,N,D,loss\na,1000,500,0.2\nb,2000,500,0.19\n")
    columns = {
        "run": "name",
        "n_params": "N",
        "n_records": "D",
        "value": "loss",
        "dataset": "=c4",
        "task": "=pretrain",
        "metric": "=loss",
        "architecture": "=gpt",
        "paradigm": "=lm",
    }
    got = table.read([path], columns=columns)
    assert [r["n_params"] for r in got.rows] == [1000.0, 2000.0] and got.rows[0]["architecture"] == "gpt"
    assert "input" in got.defaults and got.rows[0]["domain"] == "id"


def test_wide_tables_are_melted(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text("run,architecture,paradigm,n_params,n_records,dataset,loss_id,loss_far\na,r,SL,10,20,x,0.2,0.3\n")
    got = table.read([path], melt=["loss_id", "loss_far"])
    assert [(r["task"], r["value"], r["metric"]) for r in got.rows] == [
        ("loss_id", 0.2, "loss"),
        ("loss_far", 0.3, "loss"),
    ]
    assert [r["domain"] for r in got.rows] == ["id", "ood_unseen"]


def test_contaminated_rows_are_left_out_and_counted(tmp_path):
    got = table.read([log(tmp_path, {}, {"domain": "contaminated", "task": "probe"})])
    assert len(got.rows) == 1 and any(r.startswith("contaminated") for r in got.left_out)


def test_diverged_and_unconverged_runs_are_kept_and_flagged(tmp_path):
    got = table.read([log(tmp_path, {}, {"status": "unconverged"}, {"status": "diverged", "value": None})])
    (runs,) = families.group(got)
    assert runs.status == ("done", "unconverged") and list(runs.converged) == [True, False]
    assert got.left_out == {"loss is not finite (diverged)": 1} and "r2" in got.notes[-1]


def test_bits_become_nats(tmp_path):
    got = table.read([log(tmp_path, {"unit": "bits", "value": 1.0, "floor": 0.5})])
    assert got.rows[0]["value"] == pytest.approx(np.log(2)) and got.rows[0]["floor"] == pytest.approx(np.log(2) / 2)


def test_probe_seeds_are_averaged_and_the_latest_step_is_used(tmp_path):
    probe = {"run": "a", "task": "t", "domain": "ood_seen", "probe": "adam"}
    changes = [probe | {"probe_seed": s, "value": v, "step": 9} for s, v in ((0, 0.2), (1, 0.3))]
    (runs,) = families.group(table.read([log(tmp_path, *changes, probe | {"step": 3, "value": 0.9})]))
    assert runs.n == 1 and runs.loss[0] == pytest.approx(0.25)
    assert runs.passed_over == {"earlier step of the same run": 1, "probe seed averaged into its run": 1}


def test_seed_noise_is_pooled_within_configurations(tmp_path):
    cells = [
        {"value": v, "n_params": n, "seed": i}
        for i, (n, v) in enumerate([(10, 0.20), (10, 0.22), (20, 0.1), (30, 0.05)])
    ]
    (runs,) = families.group(table.read([log(tmp_path, *cells)]))
    noise = families.seed_noise([runs])
    assert noise.df == 1 and noise.absolute == pytest.approx(np.std([0.20, 0.22], ddof=1))
    assert families.seed_noise([runs.only(runs.n_params > 10)]) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_params": "1.2M"}, ["line 2", "n_params", "'1.2M'", "plain digits"]),
        ({"n_records": 0}, ["line 2", "n_records is 0"]),
        ({"value": -0.1}, ["line 2", "-0.1", "not positive"]),
        ({"domain": "odd_seen"}, ["line 2", "domain", "ood_seen"]),
        ({"status": "finished"}, ["line 2", "status"]),
        ({"dataset": None}, ["line 2", "'dataset' is empty"]),
        ({"schema_version": 9}, ["line 2", "schema_version 9", "update"]),
    ],
)
def test_bad_rows_stop_with_file_line_and_column(tmp_path, change, words):
    path = log(tmp_path, {}, change)
    with pytest.raises(DataError) as err:
        table.read([path])
    assert all(w in str(err.value) for w in [*words, str(path)]) and "\n" not in str(err.value)


def test_missing_columns_and_duplicates_name_their_remedy(tmp_path):
    path = fake_log.write_jsonl(tmp_path / "a.jsonl", [{k: v for k, v in ROW.items() if k != "n_params"}])
    with pytest.raises(DataError, match=r"no column 'n_params'.*--columns n_params="):
        table.read([path])
    path = log(tmp_path, {"run": "same"}, {"run": "same", "value": 0.3})
    with pytest.raises(DataError, match=r"line 2: the same result as .*line 1.*keep one"):
        table.read([path])
    with pytest.raises(UsageError, match="did you mean 'n_params'"):
        table.read([path], columns={"nparams": "N"})
    with pytest.raises(DataError, match="no column 'N'"):
        table.read([path], columns={"n_params": "N"})


def test_unreadable_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        table.read([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no evals\.jsonl"):
        table.read([tmp_path / "empty"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROW) + '\n{"run": "b", \n')
    with pytest.raises(DataError, match="line 2: no JSON object"):
        table.read([broken])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not UTF-8"):
        table.read([binary])
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("run,value\na,1,2\n")
    with pytest.raises(DataError, match="line 2: the header has 2 columns"):
        table.read([ragged])
    nothing = tmp_path / "nothing.csv"
    nothing.write_text("run,value\n")
    with pytest.raises(DataError, match="no rows"):
        table.read([nothing])


def test_spread_is_split_into_probe_initialisation_and_subset(tmp_path):
    rng = np.random.default_rng(0)
    changes = []
    for n in range(1, 41):
        for offset in (0.0, 0.33):
            subset = 0.05 * rng.normal()
            for seed in range(3):
                run = {
                    "run": f"n{n}-{offset}-{seed}",
                    "n_params": n,
                    "subset_offset": offset,
                    "seed": seed,
                    "task": "t",
                }
                level = subset + 0.02 * rng.normal()
                probes = (
                    run | {"probe_seed": k, "value": float(np.exp(level + 0.01 * rng.normal()))} for k in range(2)
                )
                changes += list(probes)
    (runs,) = families.group(table.read([log(tmp_path, *changes)]))
    sd = {k: v[0] for k, v in runs.spread.items()}
    assert sd == {
        k: pytest.approx(v, rel=0.25) for k, v in (("probe", 0.01), ("initialisation", 0.02), ("subset", 0.05))
    }
    assert {k: v[1] for k, v in runs.spread.items()} == {"probe": 240, "initialisation": 160, "subset": 40}


def test_of_tuning_trials_the_best_on_id_is_kept_for_every_task(tmp_path):
    changes = []
    for n in (10, 20):
        for trial, (home, away) in enumerate(((0.30, 0.50), (0.20, 0.60), (0.25, 0.40))):
            run = {"run": f"n{n}-t{trial}", "n_params": n, "trial": trial, "lr": 10.0**-trial}
            changes += [run | {"value": home}, run | {"value": away, "task": "far", "domain": "ood_unseen"}]
    sets = families.group(table.read([log(tmp_path, *changes)]))
    assert [list(s.loss) for s in sets] == [[0.20, 0.20], [0.60, 0.60]]  # 0.40 is lower, but OOD never chooses
    assert all(s.passed_over == {"tuning trial that is not the best of its configuration": 4} for s in sets)
    same = [c | {"trial": 0} for c in changes]
    assert [s.n for s in families.group(table.read([log(tmp_path, *same, name="same.jsonl")]))] == [6, 6]
