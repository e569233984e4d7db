"""The audit across a data set: what it counts, what it names, and that it corrects nothing."""

import json

import numpy as np
import pytest
from tiny_source import source

from ecg_jax import cli, inspection
from ecg_jax.records.audit import Quality
from ecg_jax.shards import review
from ecg_jax.shards.catalog import group_hex, open_folder, read_exclude
from ecg_jax.shards.convert import convert
from ecg_jax.shards.writer import Columns


def columns(amplitude, quality=0, recording=None, signature=None) -> Columns:
    n = len(amplitude)
    if signature is None:
        signature = np.arange(2 * n, dtype=np.uint64).reshape(n, 2) + 10**6
    return Columns(
        record_id=np.array([f"r{i:04d}".encode() for i in range(n)]),
        group=np.arange(n, dtype=np.uint64),
        patient=np.zeros(n, np.uint64),
        order=np.arange(n, dtype=np.uint64),
        signature=signature,
        source=np.zeros((n, 32), np.uint8),
        recording=np.arange(n, dtype=np.int32) if recording is None else np.array(recording, np.int32),
        amplitude=np.array(amplitude, np.float32),
        quality=np.broadcast_to(np.array(quality, np.int64), n),
        labels={},
        bayes={},
    )


def card(rows: Columns, unit: str = "mV") -> dict:
    n = len(rows.group)
    return {
        "unit": unit,
        "amplitude": review.amplitude_summary(rows, unit),
        "quality": review.quality_counts(rows, np.zeros(n, int), ("train",)),
        "counts": {"written": n, "duplicates": 0, "duplicates_across_splits": 0},
        "accounting": {"written": n, "quarantined": 0},
        "tasks": {},
    }


USUAL = np.exp(np.random.default_rng(0).normal(0, 0.35, 4000))  # median 1 mV


@pytest.mark.parametrize("factor", [1 / 1000, 1 / 5, 1 / 2, 2, 5, 1000])
def test_a_wrong_gain_of_the_whole_set_is_named_with_its_factor(factor):
    (line,) = [line for line in review.findings(card(columns(USUAL * factor))) if line.startswith("gain")]
    word = "above" if factor > 1 else "below"
    assert word in line and f"factor of {max(factor, 1 / factor):g};" in line and "nothing was corrected" in line


def test_a_usual_set_has_no_findings_and_a_unit_less_one_no_gain():
    assert review.findings(card(columns(USUAL))) == []
    assert review.findings(card(columns(USUAL * 7), "z")) == []


def test_records_of_another_gain_than_the_rest_are_listed():
    values = USUAL[:400].copy()
    values[[7, 9]] = 0.001, 5.4
    summary = review.amplitude_summary(columns(values), "mV")
    assert summary["strange"]["low"]["ids"] == ["r0007"] and summary["strange"]["low"]["factor"][0] < 0.002
    assert summary["strange"]["high"]["ids"][0] == "r0009"
    found = review.findings(card(columns(values)))
    assert sum(line.startswith("amplitude") for line in found) == 2 and any("r0007" in line for line in found)


def test_a_fault_of_most_records_is_worth_a_line():
    found = review.findings(card(columns(USUAL[:50], int(Quality.EINTHOVEN | Quality.DERIVED))))
    assert found == ["quality: 100% of the records have einthoven; lead order, signs or scales are wrong"]


def test_known_elsewhere_takes_either_half():
    mine = columns(np.ones(4), signature=np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.uint64))
    other = np.array([[9, 4], [7, 0], [11, 12]], np.uint64)
    assert review.known_elsewhere(mine, other).tolist() == [-1, 0, -1, 1]
    assert review.known_elsewhere(mine, np.zeros((0, 2), np.uint64)).tolist() == [-1] * 4


def test_accounting_adds_up_and_a_bug_does_not_pass():
    rows = columns(np.ones(4), recording=[0, 0, 1, 2])
    keep = np.array([True, False, True, False])  # recording 0 keeps a window, recording 2 is a copy of another
    states = [{"items": 5, "refused": [{"id": "a"}, {"id": "b"}, {"id": "r#3", "window": True}]}]
    counts = review.accounting(rows, np.zeros(4, int), keep, states, {"filler row": 3})
    assert counts["listed"] == 8 and counts["written"] == 2 and counts["quarantined"] == 3
    assert counts["listed"] == counts["written"] + counts["quarantined"] + sum(counts["skipped"].values())
    with pytest.raises(RuntimeError, match="6 recordings"):
        review.accounting(rows, np.zeros(4, int), keep, [{**states[0], "items": 6}], {})


def test_the_card_accounts_for_every_record(tmp_path):
    made = source(40, change={3: {"refuse": "no-good"}, 4: {"seed": 0, "group": "other"}, 5: {"samples": 3600}})
    card = convert(made, tmp_path, workers=1)
    counts = card["accounting"]
    assert counts["listed"] == 40 and counts["quarantined"] == 2 and counts["written"] == 38
    lines = [json.loads(line) for line in (tmp_path / "tiny/1.2.3/quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {"r0003": "no-good", "r0004": "duplicate-of"}
    assert all(line["remedy"] and line["detail"] for line in lines)
    text = "\n".join(inspection.card_lines(card))
    assert "40 recordings = 38 written + 2 quarantined + 0 skipped" in text and "no-good 1" in text


def test_recordings_of_another_set_are_listed_for_exclusion(tmp_path):
    convert(source(30, name="first"), tmp_path, workers=1)
    shared = {i: {"seed": i} for i in range(5)}  # recordings 0..4 are those of `first`, at half the gain
    second = source(30, name="second", seed=9, change=shared, gain=0.5)
    card = convert(second, tmp_path, workers=1, against=[tmp_path / "first"])
    assert card["overlaps"] == {
        "first/1.2.3": {"records": 5, "patients": 2, "splits": card["overlaps"]["first/1.2.3"]["splits"]}
    }
    folder = open_folder(tmp_path / "second")
    lines = [json.loads(line) for line in (folder.path / "overlaps.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"r{i:04d}" for i in range(5)]
    groups = {int(row["group"]) for split in folder.splits for row in folder.index(split)}
    assert {int(line["group"], 16) for line in lines} <= groups
    (tmp_path / "exclude").write_text("\n".join(line["group"] for line in lines))
    assert read_exclude(tmp_path / "exclude") == {int(line["group"], 16) for line in lines}
    assert group_hex(int(lines[0]["group"], 16)) == lines[0]["group"]
    assert any("overlap: 5 records" in line for line in card["findings"])


def test_inspect_draws_the_audit(tmp_path, capsys):
    convert(source(40, change={3: {"refuse": "no-good"}}), tmp_path, workers=1)
    assert cli.main(["inspect", str(tmp_path / "tiny"), "--audit", str(tmp_path / "audit.png")]) == 0
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "40 recordings = 39 written" in capsys.readouterr().out
    assert cli.main(["inspect", "x.hea", "--audit", str(tmp_path / "no.png")]) == 2
