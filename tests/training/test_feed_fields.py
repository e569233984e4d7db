"""Which fields of a table lie on the devices: those asked for, each once."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
import tiny_run

from ecg_jax.errors import UsageError
from ecg_jax.records.windows import NO_CODE
from ecg_jax.training import feed
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training import step as step_lib

BEATS = ("signal", "valid", "rpeaks", "codes")


def table(seed: int = 7):
    """A tiny table with peaks and codes."""
    rng = np.random.default_rng(seed)
    base = tiny_run.table(64, seed)
    peaks = np.sort(rng.integers(0, 1000, (64, 50)), 1).astype(np.int16)
    return dataclasses.replace(base, rpeaks=peaks, codes=rng.integers(0, NO_CODE + 1, (64, 256)).astype(np.uint16))


def test_fields_are_placed_as_asked_and_shared():
    mesh, held = mesh_lib.make(devices=1), table()
    plain = feed.place(held, mesh)
    beats = feed.place(held, mesh, BEATS)
    assert set(plain.rows) == {"signal", "labels", "valid", "hash"}
    assert set(beats.rows) == {"signal", "valid", "rpeaks", "codes", "hash"}
    assert beats.rows["codes"].dtype == np.uint16 and beats.rows["rpeaks"].dtype == np.int16
    for name in ("signal", "valid", "hash"):
        assert beats.rows[name] is plain.rows[name]  # the signals take the memory: they lie there once
    assert feed.place(held, mesh) is plain and feed.place(held, mesh, tuple(reversed(BEATS))) is beats
    there = held.codes[beats.source.clip(0)]
    got = np.asarray(beats.rows["codes"])
    np.testing.assert_array_equal(got[beats.source >= 0], there[beats.source >= 0])
    assert (got[beats.source < 0] == NO_CODE).all() and (beats.source < 0).any()
    np.testing.assert_array_equal(beats.in_table_order(np.asarray(beats.rows["rpeaks"])), held.rpeaks)


def test_a_batch_holds_the_rows_of_its_records():
    mesh, held = mesh_lib.make(devices=1), table()
    placed = feed.place(held, mesh, BEATS)
    rows, inputs, _ = feed.ResidentFeed(placed, mesh, 16, 0, False).take(5, np.zeros(1, np.float32))
    batch = jax.jit(lambda rows, at: step_lib.gather(mesh, rows, at))(rows, inputs[0]["index"])
    source = placed.source[np.arange(8)[:, None], np.asarray(inputs[0]["index"])].ravel()
    for name in BEATS:
        np.testing.assert_array_equal(batch[name], getattr(held, name)[source])


def test_placed_fields_go_with_their_table():
    mesh, held = mesh_lib.make(devices=1), table()
    before = len(feed._placed)
    feed.place(held, mesh)
    feed.place(held, mesh, BEATS)
    assert len(feed._placed) == before + 1
    del held
    gc.collect()
    assert len(feed._placed) == before


def test_what_is_not_there_is_asked_for_by_name():
    mesh = mesh_lib.make(devices=1)
    with pytest.raises(UsageError, match="holds no codes; load the table with"):
        feed.place(dataclasses.replace(table(), codes=None), mesh, BEATS)


def test_the_stream_sends_the_fields_that_were_asked_for():
    mesh, held = mesh_lib.make(devices=1), table()

    def batches(start):
        for at in range(start, 10):
            rows = np.arange(8) + at
            fields = {name: getattr(held, name)[rows] for name in ("signal", "labels", "valid", "record_hash")}
            yield fields | {"epoch": np.zeros(8, np.int32)}

    stream = feed.BatchFeed(batches, mesh, False, ("signal", "valid"))
    try:
        _, inputs, _ = stream.take(3, np.zeros(1, np.float32))
    finally:
        stream.close()
    assert set(inputs[0]) == {"signal", "valid", "epoch", "hash"}
    np.testing.assert_array_equal(inputs[0]["signal"], held.signal[3:11])
