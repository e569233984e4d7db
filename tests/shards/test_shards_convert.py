import errno
import importlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_source
from read_back import contents, quarantine, stored

from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.shards import pool, resume, schema, writer
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.grouping import hash64

# The module, which shares its name with a function of its own.
finish = importlib.import_module("ecg_jax.shards.finish")


# -------------------------------------------------------------------------------------------- what is written


def test_every_record_is_written_or_quarantined(folder):
    card = open_folder(folder).card
    lines = quarantine(folder)
    assert {line["id"]: line["reason"] for line in lines} == {"r0005": "not-good", "r0100": "duplicate-of"}
    assert "r0007" in next(line["detail"] for line in lines if line["id"] == "r0100")
    found = {split: [r["record_id"] for r in stored(folder, split)] for split in card["splits"]}
    ids = sorted(i for of_split in found.values() for i in of_split)
    windows = [f"r0011#{i}" for i in range(3)]
    want = {f"r{i:04d}" for i in range(240)} - {"r0005", "r0100", "r0011"} | set(windows)
    assert ids == sorted(want)
    counts = {"items": 240, "items_refused": 1, "records": 241, "duplicates": 1, "written": 240}
    assert card["counts"] | counts == card["counts"]
    assert {split: len(rows) for split, rows in found.items()} == {s: c["records"] for s, c in card["splits"].items()}
    assert card["refused"] == {"duplicate-of": 1, "not-good": 1}


def test_a_shard_follows_the_circle_and_the_index_tells_where(folder):
    opened = open_folder(folder)
    for split in opened.splits:
        for shard in opened.shards(split):
            index, data = shard.index(), shard.path.read_bytes()
            assert len(index) == shard.records
            rows = [schema.decode(p) for p in schema.read_frames(shard.path)]
            places = [(hash64("order", "tiny", row["patient_id"]), row["record_id"]) for row in rows]
            assert places == sorted(places)
            for row, place in zip(index, rows, strict=True):
                at = int(row["signal"])
                assert data[at : at + 24000] == place["signal"].tobytes()
                at = int(row["frame"] + row["id"])
                assert data[at : at + int(row["id_length"])].decode() == place["record_id"]
                assert tuple(row["valid"]) == place["valid"]
                for salt, field in (
                    ("split", "split_hash"),
                    ("shard", "shard_hash"),
                    ("order", "order_hash"),
                ):
                    assert row[field] == hash64(salt, "tiny", place["patient_id"])
                assert row["group"] == hash64("group", "tiny", place["patient_id"])
                assert row["record"] == hash64("record", "tiny", place["record_id"])
                assert row["shard"] == shard.number == int(row["shard_hash"]) % 8


def test_the_card_counts_what_the_shards_hold(folder):
    card = open_folder(folder).card
    for split, found in card["splits"].items():
        rows = stored(folder, split)
        assert found["patients"] == len({row["patient_id"] for row in rows})
        for task, names in card["tasks"].items():
            labels = np.stack([row["labels"][task] for row in rows])
            assert card["positives"][task][split] == (labels == 1).sum(0).tolist()
            assert card["known"][task][split] == (labels >= 0).sum(0).tolist()
            share = (labels == 1).sum(0) / (labels >= 0).sum(0)
            np.testing.assert_allclose(card["prevalence"][task][split], share)
            entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
            assert card["prior_entropy"][task][split] == pytest.approx(entropy.mean())
            bayes = np.stack([row["meta"]["bayes"][task] for row in rows])
            loss = np.ma.array(-np.log(np.where(labels == 1, bayes, 1 - bayes)), mask=labels < 0)
            assert found["bayes_loss"][task] == pytest.approx(loss.mean(0).mean())
            assert len(names) == labels.shape[1]
    assert [s["fraction"] for s in card["subsets"] if s["offset"] == 0] == [
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
        1.0,
    ]
    whole = next(s for s in card["subsets"] if s["fraction"] == 1)
    assert whole["records"] == card["splits"]["train"]["records"]
    assert whole["positives"]["main"] == card["positives"]["main"]["train"]
    for file in card["files"]:
        data = (folder / file["file"]).read_bytes()
        assert len(data) == file["bytes"]
        assert writer.hashlib.sha256(data).hexdigest() == file["sha256"]
    assert len(open_folder(folder).signatures()) == card["counts"]["written"]
    assert card["detector"] and card["chain"]["digest"] and card["lineage"][0]["dataset"] == "tiny"


def test_nothing_in_the_folder_tells_when_or_where_it_was_made(folder, tmp_path):
    text = (folder / "card.json").read_text() + (folder / "dataset_info.json").read_text()
    assert str(folder.parent) not in text


# ----------------------------------------------------------------------------------- interrupted and repeated


def test_bytes_do_not_depend_on_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "write_shard", None)  # so that this process cannot have done it
    card = convert(tiny_source.standard(), tmp_path, workers=2)
    assert card["report"]["shards_written"] == 24
    assert contents(Path(card["path"])) == contents(folder)


@pytest.mark.parametrize(("name", "value"), [("CHUNK", 1), ("CHUNK", 7), ("CHUNK_VALUES", 20_000)])
def test_bytes_do_not_depend_on_what_is_prepared_together(folder, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(writer, name, value)
    assert contents(Path(convert(tiny_source.standard(), tmp_path)["path"])) == contents(folder)


def test_a_reader_that_skips_an_item_is_a_bug_that_shows(tmp_path):
    source = replace(tiny_source.source(20), read=lambda items: tiny_source.read(items[1:]))
    with pytest.raises(ValueError, match=r"shorter|answered item"):
        convert(source, tmp_path)


def test_a_second_run_does_nothing_and_a_lost_shard_alone_is_written_again(tmp_path):
    source = tiny_source.source(40, change={7: {"seed": 30}})
    first = convert(source, tmp_path)
    path = Path(first["path"])
    before = contents(path)
    again = convert(source, tmp_path)
    assert again["report"] == {"shards_written": 0, "shards_kept": len(first["files"])}
    assert {k: v for k, v in again.items() if k != "report"} == {k: v for k, v in first.items() if k != "report"}
    with_copy = next(f for f in first["files"] if f["records"] > 1)["file"]
    (path / with_copy).unlink()
    assert convert(source, tmp_path)["report"]["shards_written"] == 1
    assert contents(path) == before
    (path / with_copy).write_bytes((path / with_copy).read_bytes()[:-1])
    assert convert(source, tmp_path)["report"]["shards_written"] == 1
    assert contents(path) == before


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5, 26, -7, -6, -5, -4, -3, -2, -1])
def test_a_run_killed_anywhere_is_refused_by_readers_and_then_finished(tmp_path, monkeypatch, stop):
    # Every file goes through write_atomic, so stopping at its n-th call (from the end where negative) is a
    # kill at every kind of moment: the plan, a shard's columns, frames, index and sidecar, the rewriting of a
    # shard with a duplicate (-7 to -5), the quarantine, the signatures, the overlaps, the card.
    source = tiny_source.source(40, change={7: {"seed": 30}})
    calls, last = 0, 10**9
    original = writer.write_atomic

    def dying(path, chunks):
        nonlocal calls
        calls += 1
        if calls > last:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return original(path, chunks)

    for module in (writer, resume, finish):
        monkeypatch.setattr(module, "write_atomic", dying)
    whole = convert(source, tmp_path / "whole")
    shards = len(whole["files"])
    assert calls == 1 + 4 * shards + 3 + 4
    calls, last = 0, stop % calls
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"did not finish: run the same command again .*ecg-jax convert tiny"):
        open_folder(tmp_path / "cut")
    card = convert(source, tmp_path / "cut")
    # A shard whose rewriting was cut between its files is written from the source again.
    assert card["report"]["shards_kept"] == (
        (stop - 1) // 4 if stop > 0 else 0 if stop == 0 else shards - (stop in (-6, -5))
    )
    assert contents(Path(card["path"])) == contents(Path(whole["path"]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"leads": "8"}, "--leads: 12 then, 8 now"),
        ({"chain": "none"}, "--chain: default"),
        ({"limit": 20}, "--limit: null then, 20 now"),
        ({"shards": 16}, "--shards: null then, 16 now"),
        ({"windows": "first"}, "--windows: all then, first now"),
        ({"source": tiny_source.source(41)}, "recordings: 40 then, 41 now"),
        ({"source": tiny_source.source(40, tasks={"main": ("a", "b", "z")})}, 'tasks.main: ["a", "b", "c"] then'),
        ({"source": tiny_source.source(40, about={"licence": "some"})}, "source.licence: none then, some now"),
        ({"source": tiny_source.source(40, skipped={"folds": 2})}, "skipped.folds: null then, 2 now"),
        ({"missing_leads": "zero"}, "--missing-leads: refuse then, zero now"),
    ],
)
def test_a_folder_begun_otherwise_is_refused(tmp_path, change, named):
    out, source = tmp_path, tiny_source.source(40)
    path = Path(convert(source, out)["path"])
    before = contents(path)
    options = {"source": source, "out": out} | change
    with pytest.raises(UsageError) as error:
        convert(options.pop("source"), options.pop("out"), **options)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert contents(path) == before


def test_a_damaged_plan_is_told(tmp_path):
    source = tiny_source.source(10)
    path = Path(convert(source, tmp_path)["path"])
    for broken in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (path / ".convert" / "plan.json").write_bytes(broken)
        with pytest.raises(DataError, match="is damaged: delete"):
            convert(source, tmp_path)


def test_other_code_does_not_mix_its_shards_in(tmp_path, monkeypatch):
    source = tiny_source.source(20)
    path = Path(convert(source, tmp_path)["path"])
    monkeypatch.setattr(resume, "code_versions", lambda: {"ecg-jax": "9.9.9"})
    assert convert(source, tmp_path)["report"]["shards_written"] == 0  # complete: nothing to mix
    (path / "card.json").unlink()
    with pytest.raises(UsageError, match=r"code: ecg-jax .* then, ecg-jax 9\.9\.9 now"):
        convert(source, tmp_path)


def test_differences_name_the_innermost_key_and_the_place():
    before = {"a": {"folds": "1-8/9/10", "same": 1}, "b": [1, 2], "gone": 0, "long": "x" * 60 + "y" + "z" * 60}
    now = {"a": {"folds": "1-6/7/8", "same": 1}, "b": [1, 3], "long": "x" * 60 + "Y" + "z" * 60, "n": "1"}
    found = resume.differences(before, now)
    assert "a.folds: 1-8/9/10 then, 1-6/7/8 now" in found
    assert "b: [1, 2] then, [1, 3] now" in found
    assert "gone: 0 then, null now" in found and "n: null then, 1 now" in found
    (long,) = [line for line in found if line.startswith("long")]
    assert "xy" in long and "xY" in long and len(long) < 120
    assert resume.differences({"a": 1}, {"a": "1"}) == ['a: 1 then, "1" now']
    assert resume.differences(now, now) == []


def test_a_foreign_folder_is_not_touched(tmp_path):
    foreign = tmp_path / "tiny" / "1.2.3"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no conversion"):
        convert(tiny_source.source(10), tmp_path)
    assert contents(foreign) == {"thesis.txt": b"years of work"}


# ----------------------------------------------------------------------------------------- what must not pass


def test_one_patient_in_two_splits_fails_before_anything_is_written(tmp_path):
    source = tiny_source.source(30, change={0: {"split": "train"}, 1: {"split": "test"}})
    with pytest.raises(DataError, match="patient p0 is in two splits"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_under_one_patient_stay_and_chains_of_copies_keep_one_patient(tmp_path):
    same = {"seed": 3}
    change = {1: {"seed": 0}, 10: same, 20: same | {"gain": 0.5}, 21: {"seed": 20}, 29: same}
    path = Path(convert(tiny_source.source(30, change=change), tmp_path)["path"])
    gone = {line["id"]: line["detail"].split(":")[0] for line in quarantine(path)}
    # r0001 is r0000 again, of the same patient; r0003 is the smallest id of its content.
    assert gone == {"r0010": "r0003", "r0020": "r0003", "r0029": "r0003"}


def test_if_every_record_is_refused_nothing_is_left(tmp_path):
    refused = {i: {"refuse": f"reason-{i}"} for i in range(12)}
    with pytest.raises(DataError, match=r"all 12 recordings were refused.*reason-\d+: r\d+ is not good"):
        convert(tiny_source.source(12, change=refused), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_strict_accepts_no_refusal(tmp_path):
    source = tiny_source.source(40, change={9: {"refuse": "not-good"}})
    with pytest.raises(DataError, match=r"record r0009: not-good.*--strict"):
        convert(source, tmp_path / "out", strict=True)
    assert list(tmp_path.iterdir()) == []
    path = Path(convert(source, tmp_path / "out")["path"])
    before = contents(path)
    with pytest.raises(DataError, match=r"record r0009 is refused \(not-good\): --strict"):
        convert(source, tmp_path / "out", strict=True)
    assert contents(path) == before  # what an earlier run has finished is not taken away


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chain": "defalt"}, "did you mean 'default'"),
        ({"leads": "3"}, "known are 12, 8"),
        ({"limit": 0}, "at least 1"),
        ({"shards": 9}, "multiple of 8"),
        ({"windows": "some"}, "known are all, first"),
        ({"missing_leads": "nan"}, "known are refuse, zero"),
        ({"runner": "spark"}, "known are local, beam"),
        ({"beam_options": ["runner=x"]}, "only with --runner beam"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        convert(tiny_source.source(10), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_ids_must_be_unique(tmp_path):
    with pytest.raises(DataError, match="'r0001' is listed twice"):
        convert(tiny_source.source(10, change={4: {"id": "r0001"}}), tmp_path)
    clash = tiny_source.source(10, change={4: {"id": "r0001#0"}, 1: {"samples": 2000}})
    with pytest.raises(DataError, match="'r0001#0' occurs twice"):
        convert(clash, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_keeps_the_finished_shards(tmp_path, monkeypatch, code):
    source = tiny_source.source(40)
    whole = contents(Path(convert(source, tmp_path / "whole")["path"]))
    calls = 0
    original = os.fsync

    def failing(fd):
        nonlocal calls
        calls += 1
        if calls > 18:
            raise OSError(code, os.strerror(code))
        return original(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(MachineError) as error:
        convert(source, tmp_path / "full")
    assert os.strerror(code) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    left = contents(tmp_path / "full")
    assert not [name for name in left if name.endswith((".tmp", "card.json"))]
    with pytest.raises(DataError, match="did not finish"):
        open_folder(tmp_path / "full")
    card = convert(source, tmp_path / "full")
    assert card["report"]["shards_kept"] == 4
    assert contents(Path(card["path"])) == whole


def test_an_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="Not a directory"):
        convert(tiny_source.source(10), tmp_path / "file" / "out")
