import dataclasses

import numpy as np
import pytest

from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import tables
from ecg_jax.shards.resident import Order, lane_layout, permute

COUNTS = [11, 7, 30, 1, 2, 16, 17, 64]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 31, 33, 1000])
def test_permutations_are_permutations(n):
    for key in range(6):
        found = permute(np.arange(n), n, np.uint64(key))
        assert sorted(found.tolist()) == list(range(n))


def test_permutations_look_random():
    n, keys = 12, 6000
    found = permute(np.arange(n)[None, :], n, np.arange(keys)[:, None]).astype(int)
    count = np.zeros((n, n))
    np.add.at(count, (np.broadcast_to(np.arange(n), found.shape), found), 1)
    chi = ((count - keys / n) ** 2 / (keys / n)).sum() / (n - 1) ** 2
    follow = np.zeros((n, n))
    np.add.at(follow, (found[:, :-1], found[:, 1:]), 1)
    off = follow[~np.eye(n, dtype=bool)]
    chi_follow = ((off - off.mean()) ** 2 / off.mean()).sum() / (n * (n - 1) - 1)
    assert chi < 1.5 and chi_follow < 1.5
    assert len(np.unique(found, axis=0)) > 0.99 * keys


@pytest.mark.parametrize("batch", [8, 24, 64])
def test_every_epoch_of_a_lane_visits_each_record_once(batch):
    order = Order(COUNTS, batch, seed=3)
    steps = 2 * max(COUNTS) * 8 // batch + 3
    index, epoch = order.span(0, steps)
    assert index.shape == epoch.shape == (steps, 8, batch // 8)
    assert index.dtype == epoch.dtype == np.int32
    for lane, count in enumerate(COUNTS):
        seen, of = index[:, lane].ravel(), epoch[:, lane].ravel()
        assert of.tolist() == sorted(of.tolist())
        epochs = [seen[of == e].tolist() for e in range(of[-1])]  # the last one may be unfinished
        assert len(epochs) >= 2
        for one in epochs:
            assert sorted(one) == list(range(count))
        if count > 10:
            assert epochs[0] != epochs[1]


def test_a_step_is_a_function_of_its_number_alone():
    order = Order(COUNTS, 32, seed=9)
    index, epoch = order.span(0, 40)
    for step in (39, 7, 0):
        one, of = Order(COUNTS, 32, seed=9).indices(step)
        np.testing.assert_array_equal(one, index[step])
        np.testing.assert_array_equal(of, epoch[step])
    far, of = order.indices(10**8)
    assert (far < np.array(COUNTS)[:, None]).all() and of[3, 0] == 4 * 10**8


def test_a_lane_does_not_know_the_others():
    # What makes one device, eight or several hosts see the same batches.
    other = [count + 5 for count in COUNTS]
    other[2] = COUNTS[2]
    np.testing.assert_array_equal(Order(COUNTS, 32, 1).span(0, 20)[0][:, 2], Order(other, 32, 1).span(0, 20)[0][:, 2])


def test_seed_lane_and_epoch_all_matter():
    order = Order([50] * 8, 400, seed=0).span(0, 2)[0]
    assert not np.array_equal(order[0], Order([50] * 8, 400, seed=1).span(0, 1)[0][0])
    assert len({tuple(row) for row in order.reshape(-1, 50).tolist()}) == 16


def test_what_cannot_be_ordered():
    with pytest.raises(DataError, match=r"\[11, 7, 0, 1, 2, 16, 17, 64\] records.*larger subset"):
        Order([11, 7, 0, 1, 2, 16, 17, 64], 8, 0)
    for batch in (0, 4, 12):
        with pytest.raises(UsageError, match="multiple of 8"):
            Order(COUNTS, batch, 0)
    with pytest.raises(UsageError, match="always 8"):
        Order([5, 5], 8, 0)


def test_the_layout_holds_each_lane_and_padding(folder):
    table = tables.load([folder], "train", "main")
    lanes = lane_layout(table)
    assert lanes.signal.shape == (8, table.capacity, 1000, 12) and lanes.signal.dtype == np.int16
    assert lanes.counts.sum() == len(table) and lanes.counts.max() == table.capacity
    for lane, count in enumerate(lanes.counts):
        mine = table.lane == lane
        np.testing.assert_array_equal(lanes.signal[lane, :count], table.signal[mine])
        np.testing.assert_array_equal(lanes.labels[lane, :count], table.labels[mine])
        np.testing.assert_array_equal(lanes.record_hash[lane, :count], table.record_hash[mine])
        assert not lanes.signal[lane, count:].any() and (lanes.labels[lane, count:] == -1).all()
    assert lane_layout(table, table.capacity + 3).valid.shape == (8, table.capacity + 3, 2)
    with pytest.raises(ValueError, match="below the fullest"):
        lane_layout(table, 1)


def test_only_the_fields_that_are_asked_for_are_laid_out(folder):
    table = tables.load([folder], "train", "main")
    codes = np.arange(len(table) * 256, dtype=np.uint16).reshape(-1, 256) % 999
    table = dataclasses.replace(table, codes=codes)
    default = lane_layout(table)
    assert default.rpeaks is None and default.codes is None and default.signal is not None
    lanes = lane_layout(table, fields=("valid", "rpeaks", "codes"))
    assert lanes.signal is None and lanes.labels is None
    assert (lanes.rpeaks.shape, lanes.rpeaks.dtype) == ((8, table.capacity, 50), np.int16)
    assert (lanes.codes.shape, lanes.codes.dtype) == ((8, table.capacity, 256), np.uint16)
    np.testing.assert_array_equal(lanes.counts, default.counts)
    for lane, count in enumerate(lanes.counts):
        mine = table.lane == lane
        for name in ("valid", "rpeaks", "codes", "record_hash"):
            np.testing.assert_array_equal(getattr(lanes, name)[lane, :count], getattr(table, name)[mine])
        assert (lanes.rpeaks[lane, count:] == -1).all() and (lanes.codes[lane, count:] == NO_CODE).all()
    assert (lanes.counts < table.capacity).any()  # so that there was something beyond a lane's end
    with pytest.raises(UsageError, match="holds no codes; load the table with the folder of codes"):
        lane_layout(dataclasses.replace(table, codes=None), fields=("rpeaks", "codes"))
    with pytest.raises(UsageError, match="holds no rpeaks and no codes"):
        lane_layout(dataclasses.replace(table, codes=None, rpeaks=None), fields=("rpeaks", "codes"))
    with pytest.raises(UsageError, match="holds no sound"):
        lane_layout(table, fields=("sound",))
