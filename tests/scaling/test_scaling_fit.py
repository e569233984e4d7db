"""`fit` from end to end: files, their contracts, determinism, the report's words, nothing half written."""

import csv
import json
import re
from html.parser import HTMLParser

import fake_log
import numpy as np
import pytest

from ecg_jax.errors import DataError, UsageError
from ecg_jax.scaling import axes, numbers
from ecg_jax.scaling.fit import fit, result_lines

LAW_FIELDS = {
    *("architecture", "paradigm", "dataset", "task", "domain", "form", "loss", "delta", "n", "objective"),
    *("parameters", "standard_errors", "intervals", "certificate"),
}
MULTIPLIER_FIELDS = {
    "kind",
    "numerator",
    "denominator",
    "dataset",
    "task",
    "at",
    "value",
    "interval",
    "p",
    "p_holm",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    runs = fake_log.write_runs(folder / "runs", fake_log.rows())
    plan = folder / "plan.csv"
    plan.write_text("name,n_params,n_records\nnext,200000,32768\nseen,60288,8192\n")
    table = folder / "table-auroc.csv"
    table.write_text("metric,encoder,column,value,ci_low,ci_high,best,tied\nauroc,R4,x:y,0.91,0.88,0.94,True,False\n")
    result = fit(
        [runs],
        folder / "out",
        bootstrap=300,
        probes=[table],
        predict=plan,
        title="Two <families>",
        banner="demonstration, not a study",
    )
    return folder, result


def test_laws_json_keeps_its_contract(study):
    folder, result = study
    laws = json.loads((folder / "out" / "laws.json").read_text())
    assert laws == result["laws"] and len(laws) == 6
    for law in laws:
        assert law.keys() >= LAW_FIELDS and law["form"] == "hoffmann" and law["n"] == 11
        assert set(law["parameters"]) == set(law["intervals"]) == {"E", "A", "B", "alpha", "beta"}
        low, high = law["intervals"]["alpha"]
        assert low is None or high is None or low <= law["parameters"]["alpha"] <= high
    by_domain = {(law["architecture"], law["domain"]): law for law in laws}
    resnet = by_domain["resnet1d", "id"]
    assert (
        resnet["identified"]
        and resnet["known_floor_covered"]
        and resnet["known_floor"] == pytest.approx(fake_log.BAYES)
    )
    assert not by_domain["resnet1d", "ood_unseen"]["identified"]


def test_multipliers_json_keeps_its_contract(study):
    entries = json.loads((study[0] / "out" / "multipliers.json").read_text())
    plain = {"rho_N", "rho_D", "M_N", "M_D", "M_C", "N_x", "m_N", "rho_T"}
    assert plain <= {m["kind"] for m in entries} <= plain | {f"max {k}" for k in plain}
    assert all(m.keys() >= MULTIPLIER_FIELDS and len(m["interval"]) == 2 and m["meaning"] for m in entries)
    on_id = next(m for m in entries if m["kind"] == "M_N" and m["domain"] == "id")
    assert on_id["value"] > 1 and on_id["interval"][0] > 1 and on_id["identified"]
    assert on_id["p_holm"] >= on_id["p"]


def test_predictions_name_law_and_interval(study):
    with open(study[0] / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 and rows[0]["name"] == "next"
    for row in rows:
        if row["identified"] == "True":
            low, law_low, value, law_high, high = (
                float(row[k]) for k in ("low", "law_low", "predicted", "law_high", "high")
            )
            assert low < law_low < value < law_high < high
    seen = next(r for r in rows if r["name"] == "seen" and r["architecture"] == "resnet1d" and r["domain"] == "id")
    assert float(seen["predicted"]) == pytest.approx(fake_log.truth("resnet1d", 60288, 8192), rel=0.01)


class Balance(HTMLParser):
    """Tags that must close, and everything that would be loaded from somewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loaded += [attrs[k] for k in ("src", "href", "xlink:href") if not attrs.get(k, "#").startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


def test_report_stands_alone_and_is_well_formed(study):
    text = (study[0] / "out" / "report.html").read_text()
    page = Balance()
    page.feed(text)
    assert not page.open and not page.loaded and "url(http" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert '<h2 id="probed">Probes</h2>' in text and "<b>0.910</b> [0.880, 0.940]" in text
    assert "demonstration, not a study" in text and "<h1>Two &lt;families&gt;</h1>" in text
    assert (
        'name="viewport"' in text
        and "@media print" in text
        and "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    )


def test_a_law_that_is_not_identified_has_no_number_in_the_report(study):
    text = (study[0] / "out" / "report.html").read_text()
    law = next(x for x in study[1]["laws"] if not x["identified"])
    assert text.count("law not identified") >= 2 * 2
    assert numbers.short(law["parameters"]["alpha"]) not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    assert "constant predictor 0.3 over best loss" in text
    printed = result_lines(study[1])
    assert any(line.endswith("law not identified") for line in printed)
    assert sum("learning: " in line for line in printed) == 6 and printed[-1].startswith("4 of 6 laws identified")


def test_everything_left_out_is_said_in_the_report(study):
    text = (study[0] / "out" / "report.html").read_text()
    for words in (
        "untrained encoder",
        "metric is a score",
        "selection last",
        "single label",
        "delta 1.345 robust",
    ):
        assert words in text


def test_figures_are_written_one_per_law_with_transfer_and_trajectories(study):
    names = sorted(p.name for p in (study[0] / "out" / "figures").iterdir())
    kinds = [n.split("-")[0] for n in names]
    assert (kinds.count("law"), kinds.count("transfer"), kinds.count("trajectory")) == (6, 1, 2)
    assert all((study[0] / "out" / "figures" / n).read_text().startswith("<svg") for n in names)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", [r for r in fake_log.rows() if r["task"] == "pretrain"])
    for name in ("a", "b"):
        fit(log, tmp_path / name, bootstrap=100)
    for file in sorted((tmp_path / "a").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    "constant, form, names",
    [("n_params", "power", ["E", "B", "beta"]), ("n_records", "power", ["E", "A", "alpha"])],
)
def test_one_constant_variable_gives_the_one_variable_law(tmp_path, constant, form, names):
    x = np.geomspace(100, 1e5, 7)
    moving = "n_records" if constant == "n_params" else "n_params"
    path = tmp_path / "curve.csv"
    lines = [f"{i},{v:.0f},{0.3 + 4 * v**-0.4}" for i, v in enumerate(x.round())]
    path.write_text(f"run,{moving},loss\n" + "\n".join(lines) + "\n")
    columns = {"value": "loss", constant: "=5000", "architecture": "=net", "paradigm": "=SL", "dataset": "=x",
               "task": "=pretrain", "metric": "=loss"}  # fmt: skip
    (tmp_path / "plan.csv").write_text(f"{moving}\n1000000\n")
    result = fit(path, tmp_path / "out", columns=columns, bootstrap=50, predict=tmp_path / "plan.csv")
    (law,) = result["laws"]
    assert law["form"] == form and list(law["parameters"]) == names
    assert list(law["parameters"].values()) == pytest.approx([0.3, 4.0, 0.4], rel=1e-6)
    with open(tmp_path / "out" / "predictions.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["predicted"]) == pytest.approx(0.3 + 4 * 1e6**-0.4)


def test_flagged_runs_are_fitted_with_and_without(tmp_path):
    entries = [r for r in fake_log.rows() if r["task"] == "pretrain" and r["architecture"] == "resnet1d"]
    for r in entries:
        if r["n_params"] == 10312 and r["n_records"] == 8192:
            r["status"] = "unconverged"
    result = fit(fake_log.write_jsonl(tmp_path / "log.jsonl", entries), tmp_path / "out", bootstrap=50)
    (law,) = result["laws"]
    assert law["n"] == 11 and law["flagged"] == ["resnet1d-N10312-D8192-s0: unconverged"]
    without = law["sensitivity"][0]
    assert without["what"].startswith("without the 1 runs") and without["n"] == 10
    assert without["parameters"]["alpha"] != law["parameters"]["alpha"]
    assert "(unconverged)" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"form": "hofmann"}, "did you mean 'hoffmann'"),
        ({"loss": "student"}, "did you mean 'student-t'"),
        ({"fixed": {"gamma": 1.0}}, "has the parameters"),
        ({"loss": "ls", "delta": 0.1}, "--delta"),
        ({"level": 95}, "--level 95"),
        ({"bootstrap": 3}, "--bootstrap 3"),
    ],
)
def test_wrong_options_write_nothing(tmp_path, options, words):
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", fake_log.rows())
    with pytest.raises(UsageError, match=re.escape(words)):
        fit(log, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_write_nothing(tmp_path):
    entries = fake_log.rows()
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", [*entries, entries[0]])
    with pytest.raises(DataError, match="the same result"):
        fit(log, tmp_path / "out")
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", entries)
    with pytest.raises(DataError, match="no such file"):
        fit(log, tmp_path / "out", predict=tmp_path / "nowhere.csv")
    (tmp_path / "plan.csv").write_text("architecture,n_params,n_records\nvit,10,10\n")
    with pytest.raises(DataError, match="no law was fitted for architecture vit"):
        fit(log, tmp_path / "out", bootstrap=0, predict=tmp_path / "plan.csv")
    assert not (tmp_path / "out").exists()


def test_figures_of_an_earlier_fit_are_removed_and_other_files_stay(tmp_path):
    entries = [r for r in fake_log.rows() if r["task"] == "pretrain"]
    log = fake_log.write_jsonl(tmp_path / "log.jsonl", entries)
    fit(log, tmp_path / "out", bootstrap=0)
    (tmp_path / "out" / "figures" / "mine.svg").write_text("<svg/>")
    one = fake_log.write_jsonl(tmp_path / "one.jsonl", [r for r in entries if r["architecture"] == "resnet1d"])
    fit(one, tmp_path / "out", bootstrap=0)
    names = {p.name for p in (tmp_path / "out" / "figures").iterdir()}
    assert names == {"law-resnet1d-sl-signal-synthetic-pretrain-id.svg", "mine.svg"}


@pytest.mark.parametrize("low, high", [(0.07, 0.12), (0.1402, 0.1409), (1e-4, 3.0), (512, 8192), (2.1, 2.9)])
def test_log_axes_always_have_labels(low, high):
    ticks = axes.log_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and (ticks >= low * 0.999).all() and (ticks <= high * 1.001).all()


@pytest.mark.parametrize(
    "value, text",
    [
        (0.3, "0.300"),
        (2.5, "2.50"),
        (123.4, "123"),
        (0.0123, "0.0123"),
        (1e-06, "1.00 × 10⁻⁶"),
        (None, "–"),
        (-0.5, "−0.500"),
        (999.6, "1,000"),
        (0.0, "0"),
        (0.09996, "0.100"),
        (12345.0, "12,345"),
    ],
)
def test_numbers_as_people_read_them(value, text):
    assert numbers.short(value) == text


def test_counts_and_intervals_as_people_read_them():
    assert [numbers.count(x) for x in (512, 8192, 60288, 2.3e6, 999_600)] == [
        "512",
        "8,192",
        "60.3 K",
        "2.3 M",
        "1 M",
    ]
    assert numbers.interval([None, None]) == "unbounded" and numbers.interval([1.2, None]) == "at least 1.20"
