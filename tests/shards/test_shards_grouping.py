import pickle
import tracemalloc

import numpy as np
import pytest

from ecg_jax.datasets.source import Item, pack
from ecg_jax.errors import DataError, UsageError
from ecg_jax.shards import grouping


def items(n, split=None):
    return [Item(f"r{i}", f"p{i // 2}", split, None) for i in range(n)]


def test_hashes_never_change():
    # Every stored data set depends on these values.
    assert grouping.hash64("split", "ptbxl", "1") == GOLDEN["split"]
    assert grouping.hash64("shard", "ptbxl", "1") == GOLDEN["shard"]
    assert grouping.hash64("order", "ptbxl", "1") == GOLDEN["order"]
    assert len(set(GOLDEN.values())) == 3


GOLDEN = {"split": 14007666769733575774, "shard": 17690748066980204467, "order": 3787309265895506288}


def test_splits_are_ninety_five_five_and_the_salts_are_independent():
    names = [f"patient {i}" for i in range(20000)]
    split = np.array([grouping.split_of("x", name) for name in names])
    shares = [np.mean(split == s) for s in grouping.SPLITS]
    np.testing.assert_allclose(shares, [0.90, 0.05, 0.05], atol=0.006)
    shard = np.array([grouping.shard_of("x", name, 16) for name in names])
    assert np.bincount(shard).min() > 1100
    order = np.array([grouping.hash64("order", "x", name) for name in names], np.uint64) / 2.0**64
    for part in (split == "val", shard % 8 == 3):
        assert abs(order[part].mean() - 0.5) < 0.03
    assert abs(np.mean(split[shard % 8 == 3] == "train") - 0.9) < 0.02


def test_another_data_set_gives_another_split():
    names = [f"{i}" for i in range(2000)]
    same = np.mean([grouping.split_of("a", n) == grouping.split_of("b", n) for n in names])
    assert 0.75 < same < 0.88  # 0.815 by chance


@pytest.mark.parametrize(("records", "count"), [(1, 8), (40_000, 8), (50_000, 16), (345_779, 64), (2_300_000, 512)])
def test_shard_count(records, count):
    found = grouping.shard_count(records, "12")
    assert found == count and found % 8 == 0
    assert records * grouping.record_bytes("12") / found <= grouping.SHARD_BYTES


def test_a_plan_holds_every_item_once_and_whole_patients():
    plans = grouping.plan(grouping.survey("x", items(3000)), "12", 16)
    assert sorted(i.record_id for p in plans for i in p.items) == sorted(i.record_id for i in items(3000))
    place = {}
    for p in plans:
        for item in p.items:
            assert place.setdefault(item.group, (p.split, p.number)) == (p.split, p.number)
            assert p.number == grouping.shard_of("x", item.group, p.count)
            assert p.split == grouping.split_of("x", item.group)
    assert [p.number for p in plans if p.split == "train"] == list(range(16))
    assert {p.count for p in plans if p.split != "train"} == {8}


def test_official_splits_win_and_pull_their_patient_along():
    mixed = [Item("a", "p", None, None), Item("b", "p", "test", None), Item("c", "q", "val", None)]
    found = {i.record_id: p.split for p in grouping.plan(grouping.survey("x", mixed), "12", None) for i in p.items}
    assert found == {"a": "test", "b": "test", "c": "val"}


def test_a_patient_in_two_splits_is_named():
    bad = [Item("a", "patient 7", "train", None), Item("b", "patient 7", "test", None)]
    with pytest.raises(DataError, match=r"patient 7 is in two splits: record a in train, record b in test"):
        grouping.plan(grouping.survey("x", bad), "12", None)
    with pytest.raises(DataError, match="'dev' is none of"):
        grouping.plan(grouping.survey("x", [Item("a", "p", "dev", None)]), "12", None)


def test_a_patient_with_and_without_official_split_among_many():
    # Every third recording states a split; those of the same patient that state none must follow it.
    many = [
        Item(f"r{i}", f"p{i // 5}", ("val" if i // 5 % 2 else "test") if i % 3 == 0 else None, None) for i in range(900)
    ]
    for p in grouping.plan(grouping.survey("x", many), "12", None):
        for item in p.items:
            assert p.split == ("val" if int(item.group[1:]) % 2 else "test")


def made_up(count):
    # As a data set makes them: a path, labels, a group that repeats.
    labels = np.zeros(26, np.int8)
    for i in range(count):
        where = {"path": f"files/p{i % 100}/{i}", "labels": {"a": labels}, "age": 61.5}
        yield Item(f"id{i}", f"patient{i // 3}", None, where)


def test_a_plan_sends_each_worker_its_own_items():
    count = 30_000
    plans = grouping.plan(grouping.survey("x", pack(made_up(count))), "12", None)
    assert sum(len(p.items) for p in plans) == count
    one = max(plans, key=lambda p: len(p.items))
    sent = pickle.dumps(one)
    assert len(sent) / len(one.items) < 250  # what goes to a worker is that shard's alone
    back = pickle.loads(sent)
    assert [i.record_id for i in back.items] == [i.record_id for i in one.items]


def test_two_million_items_are_planned_in_little_memory():
    count = 40_000
    made = pack(made_up(count))
    tracemalloc.start()
    try:
        plans = grouping.plan(grouping.survey("x", made), "12", None)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(p.items) for p in plans) == count
    assert peak / count < 100 and held / count < 60  # bytes


def test_a_repeated_id_is_found_wherever_it_stands():
    again = [*items(5000), Item("r17", "somebody else", None, None)]
    with pytest.raises(DataError, match="x: record id 'r17' is listed twice"):
        grouping.survey("x", again)


def test_hashes_of_ids_that_collide_are_told_apart(monkeypatch):
    monkeypatch.setattr(grouping, "hash64", lambda salt, dataset, name: 7)
    assert len(grouping.survey("x", items(4)).items) == 4
    with pytest.raises(DataError, match="listed twice"):
        grouping.survey("x", [*items(2), *items(2)][::-1])


@pytest.mark.parametrize("shards", [0, 4, 12, -8])
def test_shards_must_fill_the_lanes(shards):
    with pytest.raises(UsageError, match="multiple of 8"):
        grouping.plan(grouping.survey("x", items(10)), "12", shards)


def test_names_follow_tfds():
    assert grouping.shard_name("mimic-iv-ecg", "train", 3, 64) == "mimic_iv_ecg-train.tfrecord-00003-of-00064"


def test_distance_on_the_circle_wraps():
    hashes = np.array([0, 2**63, 2**64 - 1], np.uint64)
    assert grouping.circle(hashes, 0.5).tolist() == [2**63, 0, 2**63 - 1]
