"""A data folder of an older detector: refused where beats are needed, and written again without its raw recordings."""

import importlib
import json
import shutil

import numpy as np
import pytest
import tiny_source
from read_back import contents, stored

from ecg_jax.errors import DataError, UsageError
from ecg_jax.records import beats
from ecg_jax.shards import refresh as refreshing
from ecg_jax.shards import writer
from ecg_jax.shards.catalog import open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.refresh import check_detector, refresh

ASIDE = "codes-11111111-22222222"


def make_older(monkeypatch) -> None:
    """A detector that finds a beat every second, and none where sample 300 of lead I is negative."""

    def detect(x):
        return [np.arange(0, x.shape[2] * (own[0, 300] >= 0), 100) for own in x]

    monkeypatch.setattr(beats, "detect", detect)
    for name in ("finish", "convert"):
        monkeypatch.setattr(importlib.import_module(f"ecg_jax.shards.{name}"), "DETECTOR", "robust-0")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """leads -> (the folder of an older detector, the same converted by this version), with records known elsewhere."""
    base = tmp_path_factory.mktemp("refresh")
    other = convert(tiny_source.source(12, name="elsewhere"), base)["path"]
    made = {}
    for leads in ("12", "8"):
        with pytest.MonkeyPatch.context() as patch:
            make_older(patch)
            before = convert(tiny_source.standard(), base / f"old{leads}", leads=leads, against=[other])
        fresh = convert(tiny_source.standard(), base / f"new{leads}", leads=leads, against=[other])
        made[leads] = (open_folder(before["path"]), open_folder(fresh["path"]))
    return made


@pytest.mark.parametrize("leads", ["12", "8"])
def test_it_is_what_a_conversion_would_write(old, leads, tmp_path):
    before, fresh = old[leads]
    (before.path / ASIDE).mkdir(exist_ok=True)
    (before.path / ASIDE / "card.json").write_text("{}")
    untouched = contents(before.path)
    card = refresh(before.path, tmp_path)
    assert contents(before.path) == untouched
    assert card["detector"] == beats.DETECTOR != before.card["detector"]
    assert card["report"] == {"shards_written": len(card["files"]), "shards_kept": 0}
    assert card["quality"] != before.card["quality"] and card["overlaps"]["elsewhere/1.2.3"]["records"]
    mine, theirs = contents(open_folder(tmp_path).path), contents(fresh.path)
    assert mine.keys() == theirs.keys()
    different = {name for name in mine if mine[name] != theirs[name]}
    # The sidecar of the shard that held the copy of another's record: whether that had beats is not known any more.
    assert {name.rpartition("/")[0] + name[-4:] for name in different} <= {".convert.npz"} and len(different) == 1
    (shard,) = (name.removeprefix(".convert/").removesuffix(".npz") for name in different)
    one, other = (writer.read_columns(folder, shard) for folder in (open_folder(tmp_path).path, fresh.path))
    dropped = np.isin(one.record_id, [b"r0100"])
    assert dropped.sum() == 1
    np.testing.assert_array_equal(one.quality[~dropped], other.quality[~dropped])
    for mine, theirs in zip(one._replace(quality=0), other._replace(quality=0), strict=True):
        np.testing.assert_equal(mine, theirs)


def test_peaks_and_their_quality_bit_are_new(old, tmp_path):
    before, _ = old["12"]
    refresh(before.path, tmp_path)
    changed = 0
    for split in before.splits:
        for then, now in zip(stored(before.path, split), stored(tmp_path, split), strict=True):
            changed += not np.array_equal(then.pop("rpeaks"), now["rpeaks"])
            assert bool(now["quality"] & 2048) == (len(now.pop("rpeaks")) == 0)
            assert then.pop("quality") | 2048 == now.pop("quality") | 2048
            np.testing.assert_array_equal(then.pop("signal"), now.pop("signal"))
            np.testing.assert_equal(then, now)
    assert changed > 100


def test_it_goes_on_after_an_interruption(old, tmp_path, monkeypatch):
    before, _ = old["12"]
    refresh(before.path, tmp_path / "whole")
    begun, rewrite = [], refreshing._rewrite

    def interrupted(folder, shard, new):
        if len(begun) == 5:
            raise KeyboardInterrupt
        begun.append(shard)
        rewrite(folder, shard, new)

    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "_rewrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refresh(before.path, tmp_path / "cut")
    with pytest.raises(DataError, match="did not finish"):
        open_folder(tmp_path / "cut")
    leftover = tmp_path / "cut" / "tiny" / "1.2.3" / "x.tmp"
    leftover.touch()
    card = refresh(before.path, tmp_path / "cut")
    assert card["report"]["shards_kept"] == 5 and not leftover.exists()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    again = refresh(before.path, tmp_path / "cut")
    assert again["report"] == {"shards_written": 0, "shards_kept": len(card["files"])}
    assert {**again, "report": 0} == {**card, "report": 0}


def test_where_it_cannot_write(old, tmp_path):
    before, fresh = old["12"]
    with pytest.raises(UsageError, match="nothing to refresh"):
        refresh(fresh.path, tmp_path)
    with pytest.raises(UsageError, match="the data folder itself"):
        refresh(before.path, before.path.parents[1])
    other = tmp_path / "other"
    convert(tiny_source.source(24), other)
    with pytest.raises(UsageError, match=r"was begun otherwise \(.*delete it"):
        refresh(before.path, other)
    full = tmp_path / "full" / "tiny" / "1.2.3"
    full.mkdir(parents=True)
    (full / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="no conversion"):
        refresh(before.path, tmp_path / "full")
    assert (full / "letter.txt").read_text() == "mine"


def test_damage_is_named(old, tmp_path):
    before, _ = old["12"]
    copy = tmp_path / "copy" / "tiny" / "1.2.3"
    shutil.copytree(before.path, copy)
    shard = next(s for s in open_folder(copy).shards("train") if s.records)
    data = bytearray(shard.path.read_bytes())
    data[5000] ^= 1
    shard.path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.path.name}: record at byte 0"):
        refresh(copy, tmp_path / "out")
    assert not (tmp_path / "out" / "tiny" / "1.2.3" / "card.json").exists()
    data[5000] ^= 1
    shard.path.write_bytes(data)
    (copy / ".convert" / f"{shard.path.name}.json").unlink()
    with pytest.raises(DataError, match=rf"lacks the sidecars of {shard.path.name}"):
        refresh(copy, tmp_path / "out")


def test_an_older_detector_is_refused(old):
    before, fresh = old["12"]
    check_detector(fresh.card, fresh.path)
    with pytest.raises(DataError) as refusal:
        check_detector(before.card, before.path)
    text = str(refusal.value)
    assert "robust-0" in text and beats.DETECTOR in text and str(before.path) in text and "\n" not in text
    assert f"`ecg-jax convert refresh --source {before.path} --out DIR`" in text
    with pytest.raises(DataError, match="detector None"):
        check_detector(json.loads("{}"), before.path)
