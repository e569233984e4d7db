"""What becomes of every recording, and the options that decide it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_source
from read_back import contents, quarantine, stored

from ecg_jax import cli
from ecg_jax.datasets import DATASETS, DatasetEntry
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.audit import Quality
from ecg_jax.records.leads import LEADS
from ecg_jax.shards import grouping, remedies, schema, writer
from ecg_jax.shards.convert import convert

# ------------------------------------------------------------------------------------------------ the options


def test_dry_run_writes_nothing(tmp_path):
    card = convert(tiny_source.source(90, splits=True), tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert {s: c["records"] for s, c in card["splits"].items()} == {"train": 30, "val": 30, "test": 30}
    real = convert(tiny_source.source(90, splits=True), tmp_path / "out")
    assert card["report"]["bytes"] == pytest.approx(sum(f["bytes"] for f in real["files"]), rel=0.02)
    assert card["path"] == real["path"] and card["report"]["free_bytes"] > 0


def test_limit_takes_the_first_and_counts_the_rest(tmp_path):
    card = convert(tiny_source.source(90, skipped={"outside the folds": 4}), tmp_path, limit=12)
    ids = {r["record_id"] for split in card["splits"] for r in stored(Path(card["path"]), split)}
    assert ids == {f"r{i:04d}" for i in range(12)}
    assert card["accounting"]["skipped"] == {"--limit": 78, "outside the folds": 4}
    assert card["accounting"]["listed"] == 94
    assert card["accounting"]["written"] == 12


def test_a_limit_that_leaves_nothing_out_is_not_told(tmp_path):
    assert convert(tiny_source.source(9), tmp_path, limit=9)["accounting"]["skipped"] == {}


# ---------------------------------------------------------------------------------- what becomes of each recording


def lossy(**change) -> "tiny_source.Source":
    """Recordings of which one loses a window of three, one all three, one its only one, and one lacks a lead."""
    odd = {
        3: {"samples": 3000, "lost": [(1000, 1800)]},
        4: {"samples": 3000, "lost": [(100, 900), (1100, 1900), (2050, 2950)]},
        5: {"lost": [(100, 900)]},
        6: {"absent": ["V3"]},
    }
    return tiny_source.source(12, change=odd, **change)


def test_a_refused_window_does_not_take_its_recording_along(tmp_path):
    card = convert(lossy(), tmp_path)
    lines = {line["id"]: line for line in quarantine(Path(card["path"]))}
    assert {key: line["reason"] for key, line in lines.items()} == {
        "r0003#1": "mostly-missing",
        "r0004": "mostly-missing",
        "r0005": "mostly-missing",
        "r0006": "missing-lead",
    }
    assert [key for key, line in lines.items() if line.get("window")] == ["r0003#1"]
    assert lines["r0003#1"]["detail"].startswith("r0003#1: ")
    assert all(line["remedy"] == remedies.remedy(line["reason"]) for line in lines.values())
    ids = {r["record_id"] for split in card["splits"] for r in stored(Path(card["path"]), split)}
    assert {i for i in ids if i.startswith(("r0003", "r0004"))} == {"r0003#0", "r0003#2"}
    found = card["accounting"]
    assert (found["listed"], found["written"], found["quarantined"], found["windows_quarantined"]) == (12, 9, 3, 1)


def test_the_sidecars_say_which_recording_a_window_is_of(tmp_path):
    source = lossy()
    card = convert(source, tmp_path)
    listing = grouping.survey("tiny", source.items)
    for plan in grouping.plan(listing, "12", None):
        name = plan.file_name("tiny")
        columns, state = writer.read_columns(Path(card["path"]), name), writer.read_state(Path(card["path"]), name)
        ids = [plan.items[int(i)].record_id for i in columns.recording]
        assert ids == [i.decode().partition("#")[0] for i in columns.record_id]
        assert state["written"] == len(set(ids)) and state["items"] == len(plan.items)
        refused = [line for line in state["refused"] if not line.get("window")]
        assert state["items"] == state["written"] + len(refused)
        rows = {r["record_id"]: r for r in map(schema.decode, schema.read_frames(Path(card["path"]) / name))}
        for i, record_id in enumerate(columns.record_id):
            row = rows[record_id.decode()]
            assert columns.quality[i] == row["quality"]
            assert columns.amplitude[i] == np.float32(row["meta"]["amplitude"])
            assert 0 < columns.amplitude[i] < 10


def test_missing_leads_can_be_stored_as_zeros(tmp_path):
    card = convert(lossy(), tmp_path, missing_leads="zero")
    rows = {r["record_id"]: r for split in card["splits"] for r in stored(Path(card["path"]), split)}
    assert not rows["r0006"]["signal"][:, LEADS.index("V3")].any()
    assert rows["r0006"]["quality"] & Quality.MISSING_LEAD
    assert card["accounting"]["written"] == 10


def test_strict_accepts_no_refused_window(tmp_path):
    source = tiny_source.source(12, change={3: {"samples": 3000, "lost": [(1000, 1800)]}})
    with pytest.raises(DataError, match=r"record r0003#1: mostly-missing.*--strict"):
        convert(source, tmp_path, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_every_reason_has_a_remedy_of_its_own():
    package = Path(remedies.__file__).parents[1]
    codes = {"duplicate-of": "finish.py"}
    given = re.compile(r"""(?:\bRefused\(|\brefuse\w*\(|\breason(?:, \w+)? = )\s*f?["']([a-z][a-z0-9-]*)["']""")
    for folder in ("records", "datasets", "shards"):
        for file in (package / folder).rglob("*.py"):
            codes |= {code: file.name for code in given.findall(file.read_text())}
    assert len(codes) > 40
    assert {code: name for code, name in codes.items() if code not in remedies.REMEDIES} == {}
    assert all(text and "\n" not in text for text in remedies.REMEDIES.values())
    assert remedies.remedy("of-some-other-reader") == remedies.GENERAL


def test_describe_prints_the_rules_of_a_data_set(tmp_path, capsys):
    assert cli.main(["convert", "synthetic", "--describe"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Simulated populations") and "label_noise" in text
    assert cli.main(["convert", "synthetik", "--describe"]) == 2
    assert "did you mean 'synthetic'" in capsys.readouterr().err
    for name in DATASETS:
        assert cli.main(["convert", name, "--describe"]) == 0
        assert len(capsys.readouterr().out) > 100


def test_the_options_reach_the_conversion(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("tiny:open", "tests"))
    monkeypatch.setattr("ecg_jax.datasets.open_source", lambda name, source, options: lossy())
    words = ["convert", "tiny", "--source", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]
    assert cli.main([*words, "--missing-leads", "zero", "--limit", "8"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["accounting"]["written"] == 6 and card["accounting"]["skipped"] == {"--limit": 4}
    assert cli.main([*words, "--limit", "8"]) == 2
    assert "--missing-leads: zero then, refuse now" in capsys.readouterr().err
    other = ["convert", "tiny", "--source", ".", "--out", str(tmp_path / "two"), "--against", str(tmp_path / "out")]
    assert cli.main([*other, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["overlaps"]) == ["tiny/1.2.3"]
    assert cli.main([*other, "--against", str(tmp_path / "nowhere")]) == 3
    assert cli.main([*words, "--beam-option", "a=b"]) == 2


def test_a_comparison_with_another_folder_is_made_afterwards_too(tmp_path):
    convert(tiny_source.source(12, name="first"), tmp_path)
    source = tiny_source.source(12, name="second")
    alone = convert(source, tmp_path)
    before = contents(Path(alone["path"]))
    compared = convert(source, tmp_path, against=[tmp_path / "first"])
    assert compared["report"]["shards_written"] == 0 and compared["overlaps"]["first/1.2.3"]["records"] == 12
    assert convert(source, tmp_path, against=[tmp_path / "first"])["overlaps"] == compared["overlaps"]
    assert convert(source, tmp_path)["overlaps"] == {}
    assert contents(Path(alone["path"])) == before


# ---------------------------------------------------------------------------------------------- more of the options


def test_pseudonyms_hide_ids_everywhere_and_keep_patients_together(tmp_path):
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("a secret of sixteen letters\n")
    other.write_text("another secret of sixteen")
    change = {4: {"refuse": "not-good"}, 7: {"seed": 16, "samples": 1000}}
    source = tiny_source.source(30, change=change)
    card = convert(source, tmp_path / "out", pseudonymise=key)
    path = Path(card["path"])
    rows = [r for split in card["splits"] for r in stored(path, split)]
    everything = b"".join(contents(path).values())
    for i in range(30):
        assert f"r{i:04d}".encode() not in everything
    patients = {}
    for row in rows:
        patients.setdefault(row["patient_id"], []).append(row["record_id"])
    assert sorted(map(len, patients.values())) == [2, 2, *[3] * 8]
    assert all(len(r["record_id"]) == 32 for r in rows)
    assert {line["reason"] for line in quarantine(path)} == {"not-good", "duplicate-of"}
    assert convert(source, tmp_path / "out", pseudonymise=key)["report"]["shards_written"] == 0
    for wrong in (None, other):
        with pytest.raises(UsageError, match="--pseudonymise"):
            convert(source, tmp_path / "out", pseudonymise=wrong)
    (tmp_path / "short").write_text("short")
    for bad in ("short", "none"):
        with pytest.raises(UsageError, match="--pseudonymise"):
            convert(source, tmp_path / "else", pseudonymise=tmp_path / bad)


def test_pseudonyms_hide_the_ids_of_refused_windows_too(tmp_path):
    (tmp_path / "key").write_text("a secret of sixteen letters\n")
    card = convert(lossy(), tmp_path / "out", pseudonymise=tmp_path / "key")
    lines = quarantine(Path(card["path"]))
    assert len(lines) == 4 and all(re.fullmatch(r"[0-9a-f]{32}(#1)?", line["id"]) for line in lines)
    assert [line["id"][32:] for line in lines if line.get("window")] == ["#1"]
    assert not any(b"r0003" in data for data in contents(Path(card["path"])).values())


def test_eight_leads_window_by_window(tmp_path):
    # The second window breaks I + III = II, and goes alone.
    source = tiny_source.source(12, change={2: {"samples": 3000, "break": [(1200, 1800)]}})
    card = convert(source, tmp_path, leads="8")
    (line,) = quarantine(Path(card["path"]))
    assert (line["id"], line["reason"], line["window"]) == ("r0002#1", "leads-inconsistent", True)
    assert card["accounting"]["written"] == 12 and card["counts"]["written"] == 13


def test_eight_leads_where_the_other_four_follow(tmp_path):
    source = tiny_source.source(20, change={6: {"einthoven": False}})
    card = convert(source, tmp_path / "8", leads="8")
    rows = [r for split in card["splits"] for r in stored(Path(card["path"]), split)]
    assert {r["signal"].shape for r in rows} == {(1000, 8)} and len(card["leads"]) == 8
    (line,) = quarantine(Path(card["path"]))
    assert (line["id"], line["reason"]) == ("r0006", "leads-inconsistent") and "--leads 12" in line["detail"]
    assert convert(source, tmp_path / "12", leads="12")["counts"]["written"] == 20


def test_shards_by_number(tmp_path):
    card = convert(tiny_source.source(60, splits=True), tmp_path, shards=16)
    assert {split: found["shards"] for split, found in card["splits"].items()} == {
        "train": 16,
        "val": 8,
        "test": 8,
    }
    assert [f["number"] for f in card["files"] if f["split"] == "train"] == list(range(16))
