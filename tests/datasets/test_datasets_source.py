"""Packed items: the same items as went in, in any order asked for, and no more bytes than they need."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.datasets.source import Item, PackedItems, pack

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.binary(max_size=8),
)
WHERE = st.recursive(
    PLAIN | st.lists(st.integers(-1, 1), max_size=5).map(lambda v: np.array(v, np.int8)),
    lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ITEMS = st.lists(
    st.builds(
        Item,
        st.text(max_size=6),
        st.text(max_size=6),
        st.sampled_from([None, "train", "val", "test"]),
        WHERE | st.lists(PLAIN, max_size=3) | st.tuples(PLAIN, PLAIN),
    ),
    max_size=6,
)


def same(a, b) -> bool:
    if isinstance(a, Item):
        return (a.record_id, a.group, a.split) == (b.record_id, b.group, b.split) and same(a.where, b.where)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and b.dtype == np.int8 and a.tolist() == b.tolist()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.data())
def test_what_comes_out_is_what_went_in(items, data):
    packed = pack(iter(items))
    assert len(packed) == len(items)
    assert all(same(a, b) for a, b in zip(items, packed, strict=True))
    which = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=8)) if items else []
    taken = packed.take(np.array(which, np.int64))
    for one in (taken, pickle.loads(pickle.dumps(taken)), taken.take(slice(None))):
        assert isinstance(one, PackedItems)
        assert all(same(items[i], found) for i, found in zip(which, one, strict=True))
    cut = data.draw(st.slices(len(items)))
    assert all(same(a, b) for a, b in zip(items[cut], packed[cut], strict=True))


def test_numbers_of_numpy_become_plain_and_what_would_change_is_refused():
    (item,) = pack([Item("a", "a", None, {"age": np.float64(61.5), "row": [np.int64(3), np.array([1, -1])]})])
    assert item.where["age"] == 61.5 and item.where["row"][0] == 3 and item.where["row"][1].tolist() == [1, -1]
    for wrong in (np.array([300]), np.array([0.5]), np.ones((2, 2)), bytearray(b"x"), object()):
        with pytest.raises(TypeError, match="packed"):
            pack([Item("a", "a", None, {"labels": wrong})])


def many(count: int) -> list[Item]:
    where = {"path": "files/x", "labels": {"a": np.arange(-1, 5, dtype=np.int8)}}
    return [Item(f"r{i}", f"p{i}", None, where) for i in range(count)]


def test_positions_count_from_either_end_and_end():
    packed = pack(many(5))
    assert [packed[i].record_id for i in (0, 4, -1, -5)] == ["r0", "r4", "r4", "r0"]
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            packed[beyond]
    assert [item.record_id for item in reversed(packed)] == ["r4", "r3", "r2", "r1", "r0"]
    assert not pack([]) and len(pack([])[:3]) == 0
    assert len(pickle.loads(pickle.dumps(pack([])))) == 0


def test_a_part_pickles_its_own_items_only():
    packed = pack(many(20_000))
    whole, part = len(pickle.dumps(packed)), len(pickle.dumps(packed.take(np.arange(0, 20_000, 100))))
    assert part < whole / 50


def test_an_item_takes_few_bytes():
    count = 20_000
    labels = np.zeros(26, np.int8)
    tracemalloc.start()
    try:
        made = pack(
            Item(f"id{i}", f"patient{i}", None, {"path": f"files/p1/{i}", "labels": {"a": labels}, "age": 61.5})
            for i in range(count)
        )
        held, _ = tracemalloc.get_traced_memory()
        parts = [made.take(np.arange(i, count, 100)) for i in range(100)]
        again, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 250
    assert (again - held) / count < 20 and sum(map(len, parts)) == count  # a share of the buffer, not a copy


def test_labels_cannot_be_written_to():
    item = pack(many(1))[0]
    with pytest.raises(ValueError, match="read-only"):
        item.where["labels"]["a"][0] = 1
