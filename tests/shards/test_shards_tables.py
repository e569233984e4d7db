import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_source
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.leads import expand_matrix
from ecg_jax.shards import schema, tables
from ecg_jax.shards.catalog import Subset, group_hex, open_folder, read_exclude, select
from ecg_jax.shards.convert import convert


@pytest.fixture(scope="module")
def train(folder):
    return open_folder(folder).index("train")


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """Another data set: unit-less, eight leads, other labels of the same task."""
    source = tiny_source.source(
        60, name="other-set", unit="z", splits=True, tasks={"main": ("b", "d"), "third": ("q",)}, seed=5
    )
    return Path(convert(source, tmp_path_factory.mktemp("second"), leads="8")["path"])


# ----------------------------------------------------------------------------------------------- whole splits


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("task", ["main", "other"])
def test_a_table_holds_what_the_shards_hold(folder, split, task):
    opened = open_folder(folder)
    table = tables.load([folder], split, task)
    shards = opened.shards(split)
    rows = [schema.decode(p) for shard in shards for p in schema.read_frames(shard.path)]
    assert len(table) == len(rows) == opened.card["splits"][split]["records"]
    np.testing.assert_array_equal(table.signal, np.stack([row["signal"] for row in rows]))
    np.testing.assert_array_equal(table.labels, np.stack([row["labels"][task] for row in rows]))
    np.testing.assert_array_equal(table.valid, [row["valid"] for row in rows])
    np.testing.assert_allclose(table.bayes, [row["meta"]["bayes"][task] for row in rows], rtol=1e-6)
    np.testing.assert_array_equal(table.age, np.array([row["age"] for row in rows], np.float32))
    np.testing.assert_array_equal(table.sex, np.array([row["sex"] for row in rows], np.float32))
    assert table.record_ids == [row["record_id"] for row in rows]
    peaks = [row["rpeaks"].tolist() for row in rows]
    assert max(map(len, peaks)) > min(map(len, peaks))
    assert table.rpeaks.tolist() == [own + [-1] * (50 - len(own)) for own in peaks]
    assert table.rpeaks.dtype == np.int16 and table.codes is None
    np.testing.assert_array_equal(table.lane, np.repeat([s.number % 8 for s in shards], [s.records for s in shards]))
    np.testing.assert_array_equal(table.record_hash, opened.index(split)["record"])
    np.testing.assert_array_equal(table.group_hash, opened.index(split)["group"])
    assert table.capacity == np.bincount(table.lane).max()
    assert (table.unit, table.leads, table.label_names) == (
        "mV",
        tuple(opened.card["leads"]),
        tiny_source.TASKS[task],
    )
    assert {a.dtype.name for a in (table.valid, table.lane)} == {"int32"}


def test_a_table_without_a_task_has_no_labels(folder):
    whole, bare = tables.load([folder], "train", "main"), tables.load([folder], "train", "")
    assert bare.labels.shape == (len(whole), 0) and bare.label_names == () and bare.bayes is None
    for name in ("signal", "valid", "rpeaks", "lane", "record_hash", "group_hash", "age"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(whole, name))
    assert bare.record_ids == whole.record_ids
    with pytest.raises(DataError, match="has no label 'a'"):
        tables.load([folder], "train", "", labels=["a"])


def test_a_whole_shard_is_read_as_stored(folder, second, tmp_path):
    for path, n_leads in ((folder, 12), (second, 8)):
        opened = open_folder(path)
        for shard in opened.shards("train"):
            rows = [schema.decode(p) for p in schema.read_frames(shard.path)]
            found = tables.read_shard(opened, shard)
            assert found.record_ids == [row["record_id"] for row in rows]
            assert found.signal.shape == (shard.records, 1000, n_leads) and found.rpeaks.shape == (shard.records, 50)
            for i, row in enumerate(rows):
                np.testing.assert_array_equal(found.signal[i], row["signal"])
                assert found.valid[i].tolist() == list(row["valid"])
                assert found.rpeaks[i][found.rpeaks[i] >= 0].tolist() == row["rpeaks"].tolist()
    few = open_folder(Path(convert(tiny_source.source(2, splits=True), tmp_path)["path"]))
    assert min(shard.records for shard in few.shards("train")) == 0
    assert sum(len(tables.read_shard(few, shard).signal) for shard in few.shards("train")) == 2


def test_the_bayes_loss_of_a_table_is_that_of_the_card(folder):
    table = tables.load([folder], "test", "main")
    mask = table.labels >= 0
    loss = -np.where(table.labels == 1, np.log(table.bayes), np.log1p(-table.bayes)) * mask
    expected = open_folder(folder).card["splits"]["test"]["bayes_loss"]["main"]
    assert (loss.sum(0) / mask.sum(0)).mean() == pytest.approx(expected, rel=1e-5)


def test_labels_are_chosen_and_ordered_by_name(folder):
    whole = tables.load([folder], "val", "main")
    part = tables.load([folder], "val", "main", labels=["c", "a"])
    assert part.label_names == ("c", "a")
    np.testing.assert_array_equal(part.labels, whole.labels[:, [2, 0]])
    np.testing.assert_array_equal(part.bayes, whole.bayes[:, [2, 0]])


def test_several_folders_align_labels_leads_units_and_lanes(folder, second):
    one, two = tables.load([folder], "train", "main"), tables.load([second], "train", "main")
    both = tables.load([folder, second], "train", "main")
    n = len(one)
    assert both.label_names == ("a", "b", "c", "d") and both.unit == "mixed" and both.bayes is None
    np.testing.assert_array_equal(both.labels[:n, :3], one.labels)
    assert (both.labels[:n, 3] == -1).all() and (both.labels[n:, [0, 2]] == -1).all()
    np.testing.assert_array_equal(both.labels[n:, [1, 3]], two.labels)
    np.testing.assert_array_equal(both.signal[:n], one.signal)
    assert (two.unit, two.signal.shape[2], both.signal.shape[2]) == ("z", 8, 12)
    want = np.clip(np.rint(two.signal.astype(np.float32) @ expand_matrix()), -32767, 32767)
    np.testing.assert_array_equal(both.signal[n:], want.astype(np.int16))
    np.testing.assert_array_equal(both.lane, np.concatenate([one.lane, two.lane]))
    assert both.capacity == np.bincount(both.lane).max()
    assert len(set(both.record_hash.tolist())) == len(both)


def test_what_is_not_there_is_named(folder, second, tmp_path):
    with pytest.raises(DataError, match=r"no task 'mian' \(did you mean 'main'\?\); its tasks: main, other"):
        tables.load([folder], "train", "mian")
    with pytest.raises(DataError, match=r"other-set.*no task 'other'"):
        tables.load([folder, second], "train", "other")
    with pytest.raises(DataError, match=r"no label 'bb' \(did you mean 'b'\?\); it has a, b, c"):
        tables.load([folder], "train", "main", labels=["bb"])
    with pytest.raises(DataError, match=r"no split 'dev', only train"):
        tables.load([folder], "dev", "main")
    with pytest.raises(DataError, match="no such folder"):
        tables.load([tmp_path / "none"], "train", "main")
    with pytest.raises(DataError, match="no data folder given"):
        tables.load([], "train", "main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data folder \(no card.json\)"):
        open_folder(tmp_path / "empty")


def test_a_folder_is_found_from_above_if_it_is_the_only_one(folder, second, tmp_path):
    assert open_folder(folder.parent).path == folder and open_folder(folder.parent.parent).path == folder
    two = tmp_path / "two"
    two.mkdir()
    (two / "a").symlink_to(folder)
    (two / "b").symlink_to(second)
    with pytest.raises(DataError, match="several data folders"):
        open_folder(two)


def test_damage_is_named(tmp_path):
    source = tiny_source.source(40, splits=True)
    path = Path(convert(source, tmp_path)["path"])
    shard = max(open_folder(path).shards("train"), key=lambda s: s.records)
    row = shard.index()[1]
    good = shard.path.read_bytes()
    for at in (int(row["signal"]) + 5000, int(row["frame"]) + 2, int(row["frame"]) + 9):
        shard.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError) as error:
            tables.load([path], "train", "main")
        assert f"{shard.path}: record at byte {int(row['frame'])}:" in str(error.value)
        assert "delete that shard" in str(error.value)
    shard.path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"card\.json names"):
        tables.load([path], "train", "main")
    shard.path.unlink()
    with pytest.raises(DataError, match="No such file"):
        tables.load([path], "train", "main")
    assert convert(source, tmp_path)["report"]["shards_written"] == 1
    index = shard.path.with_name(shard.path.name + ".index.npy")
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is not the index"):
        tables.load([path], "train", "main")


# ---------------------------------------------------------------------------------------------------- subsets


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_subsets_nest_in_whole_groups_and_contiguous_runs(folder, train, data):
    offset = data.draw(st.floats(0, 1, exclude_max=True))
    small, large = sorted(data.draw(st.tuples(st.floats(0.001, 1), st.floats(0.001, 1))))
    masks = [select(train, Subset(fraction, offset=offset)) for fraction in (small, large)]
    few, many = sorted(data.draw(st.tuples(st.integers(1, len(train)), st.integers(1, len(train)))))
    masks += [select(train, Subset(records=n, offset=offset)) for n in (few, many)]
    for inner, outer in (masks[:2], masks[2:]):
        assert not (inner & ~outer).any()
    for mask in masks:
        for group in np.unique(train["group"]):
            assert len(set(mask[train["group"] == group])) == 1
        for shard in range(8):
            chosen = np.append(mask[train["shard"] == shard], False).astype(int)
            # One run; two where the circle closes, and then they touch both ends.
            runs = int((np.diff(chosen, prepend=0) == 1).sum())
            assert runs <= 1 or (runs == 2 and chosen[0] and chosen[-2])
    assert masks[2].sum() <= few and masks[3].sum() <= many


def test_a_number_of_records_gives_the_longest_arc(train):
    groups = {int(h): int((train["order_hash"] == h).sum()) for h in train["order_hash"]}
    for offset in (0.0, 0.4):
        order = sorted(groups, key=lambda h: (h - int(offset * 2**64)) % 2**64)
        for n in (1, 2, 3, 4, 7, 30, 79, len(train)):
            want, total = [], 0
            for h in order:
                if total + groups[h] > n:
                    break
                want, total = [*want, h], total + groups[h]
            got = select(train, Subset(records=n, offset=offset))
            assert set(train["order_hash"][got].tolist()) == set(want) and got.sum() == total
    assert select(train, Subset(records=10**9)).all()


def test_arcs_at_thirds_are_disjoint(train):
    masks = [select(train, Subset(0.3, offset=offset)) for offset in (0, 1 / 3, 2 / 3)]
    assert all(mask.any() for mask in masks) and np.sum(masks, 0).max() == 1


def test_the_card_counts_the_subsets_that_select_gives(folder, train):
    for entry in open_folder(folder).card["subsets"]:
        mask = select(train, Subset(entry["fraction"], offset=entry["offset"]))
        assert (entry["records"], entry["patients"]) == (mask.sum(), len(set(train["group"][mask].tolist())))
        if mask.any():
            table = tables.load([folder], "train", "main", subset=Subset(entry["fraction"], offset=entry["offset"]))
            assert entry["positives"]["main"] == (table.labels == 1).sum(0).tolist()


@pytest.mark.parametrize("subset", [Subset(0.5), Subset(0.5, offset=0.75), Subset(records=33, offset=0.9)])
def test_a_table_of_a_subset_is_the_part_of_the_whole_table(folder, train, subset):
    whole = tables.load([folder], "train", "main")
    part = tables.load([folder], "train", "main", subset=subset)
    mask = select(train, subset)
    assert 0 < mask.sum() < len(whole) and part.capacity == whole.capacity
    np.testing.assert_array_equal(part.signal, whole.signal[mask])
    np.testing.assert_array_equal(part.labels, whole.labels[mask])
    np.testing.assert_array_equal(part.bayes, whole.bayes[mask])
    assert part.record_ids == [i for i, m in zip(whole.record_ids, mask, strict=True) if m]


def test_val_and_test_never_shrink(folder):
    for split in ("val", "test"):
        whole = tables.load([folder], split, "main")
        part = tables.load([folder], split, "main", subset=Subset(0.1, offset=0.5))
        assert part.record_ids == whole.record_ids


def test_excluded_groups_are_left_out_before_records_are_counted(folder, train, tmp_path):
    gone = frozenset(int(g) for g in np.unique(train["group"])[::5])
    part = tables.load([folder], "train", "main", exclude=gone)
    assert len(part) < len(train) and not gone & set(part.group_hash.tolist())
    whole = tables.load([folder], "train", "main")
    keep = ~np.isin(whole.group_hash, list(gone))
    np.testing.assert_array_equal(part.signal, whole.signal[keep])
    # The last group that fits is a whole one, of at most three records.
    assert 28 <= select(train, Subset(records=30), gone).sum() <= 30
    path = tmp_path / "exclude.txt"
    path.write_text("# overlap\n" + "".join(f"{group_hex(g)}  # a patient\n" for g in gone) + "\n")
    assert read_exclude(path) == gone
    path.write_text("123\n")
    with pytest.raises(DataError, match="line 1: '123' is no group hash"):
        read_exclude(path)
    with pytest.raises(DataError, match="none in the subset"):
        tables.load([folder], "train", "main", exclude=frozenset(int(g) for g in train["group"]))


@pytest.mark.parametrize(
    "values",
    [{"fraction": 0.0}, {"fraction": 1.1}, {"offset": 1.0}, {"records": 0}, {"records": 5, "fraction": 0.5}],
)
def test_impossible_subsets(values):
    with pytest.raises(UsageError, match="subset"):
        Subset(**values)


def test_subsets_are_values():
    assert dataclasses.replace(Subset(), fraction=0.5) == Subset(0.5)


def test_a_folder_without_the_split_adds_nothing_where_another_has_it(folder, second, tmp_path):
    few = tmp_path / "few" / "0.0.1"
    shutil.copytree(second, few)
    card = json.loads((few / "card.json").read_text())
    del card["splits"]["val"]
    card["files"] = [file for file in card["files"] if file["split"] != "val"]
    (few / "card.json").write_text(json.dumps(card))
    alone, both = tables.load([folder], "val", "main"), tables.load([folder, few], "val", "main")
    np.testing.assert_array_equal(both.record_hash, alone.record_hash)
    assert len(tables.load([folder, few], "train", "main")) > len(tables.load([folder], "train", "main"))
    with pytest.raises(DataError, match=r"no split 'val', only"):
        tables.load([few], "val", "main")
