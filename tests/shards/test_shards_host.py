"""Mapped shards: the records and the order of the resident loader, checked when first read, never written twice."""

from pathlib import Path

import numpy as np
import pytest
import tiny_source
from test_shards_stream import run

from ecg_jax import inspection
from ecg_jax.cli import main
from ecg_jax.errors import DataError, UsageError
from ecg_jax.records.windows import SLOTS
from ecg_jax.shards import codes as codes_lib
from ecg_jax.shards import host, schema, stream, tables
from ecg_jax.shards.catalog import Subset, open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.resident import Order, lane_layout

FIELDS = ("signal", "labels", "valid", "rpeaks")


def mapped(folders, **options):
    return tables.load(folders, "train", "main", mapped=True, **options)


@pytest.mark.parametrize("lanes", [range(8), range(4, 8), range(2, 3)])
def test_batches_are_those_of_the_resident_loader(folder, lanes):
    """Any process's part of them, at any step, over several epochs; a batch that is held is left alone."""
    subset = Subset(records=75, offset=0.2)
    whole = tables.load([folder], "train", "main", subset=subset)
    laid = lane_layout(whole, fields=FIELDS)
    order = Order(laid.counts, 16, 3)
    own = mapped([folder], subset=subset, lanes=lanes)
    assert (len(own) < len(whole)) == (len(lanes) < 8) and not isinstance(own.signal, np.ndarray)
    source = host.batches(own, order, FIELDS, lanes, 5)
    held = [next(source) for _ in range(40)]
    at = np.arange(8)[:, None]
    for step, batch in enumerate(held, 5):
        index, epoch = order.indices(step)
        for name in FIELDS:
            wanted = getattr(laid, name)[at, index][list(lanes)]
            np.testing.assert_array_equal(batch[name], wanted.reshape(-1, *wanted.shape[2:]))
        wanted = laid.record_hash[at, index][list(lanes)].ravel()
        np.testing.assert_array_equal(batch["record_hash"], wanted)
        np.testing.assert_array_equal(batch["epoch"], epoch[list(lanes)].ravel())
    assert held[-1]["epoch"].max() >= 2
    del batch, held
    buffers = host.Buffers((3, 2))
    first = buffers.take()
    assert buffers.take() is not first
    address = first.ctypes.data
    del first
    assert buffers.take().ctypes.data == address, "what nobody holds is used again"


def test_a_process_opens_no_other_lanes_shards(tmp_path):
    path = Path(convert(tiny_source.source(80, splits=True), tmp_path, shards=8)["path"])
    whole = tables.load([path], "train", "main")
    for shard in open_folder(path).shards("train"):
        if shard.number % 8 >= 4:
            shard.path.write_bytes(bytes(shard.bytes))
    own = tables.load([path], "train", "main", lanes=range(4))
    rows = whole.lane < 4
    np.testing.assert_array_equal(own.signal, whole.signal[rows])
    np.testing.assert_array_equal(own.whole_lane, whole.lane)
    assert own.capacity == whole.capacity and len(own) == rows.sum() < len(whole)
    np.testing.assert_array_equal(lane_layout(own, lanes=range(4)).signal, lane_layout(own).signal[:4])
    with pytest.raises(DataError):
        tables.load([path], "train", "main", lanes=range(4, 8))


def test_rows_are_read_as_from_an_array(folder, tmp_path):
    """Several folders, one of them with eight leads that are expanded."""
    source = tiny_source.source(40, name="other-set", unit="z", splits=True, seed=5)
    eight = Path(convert(source, tmp_path, leads="8")["path"])
    held, own = (tables.load([eight, folder], "train", "main", mapped=m) for m in (False, True))
    assert own.signal.shape == held.signal.shape and own.signal.dtype == held.signal.dtype
    for rows in (slice(None, None, 7), np.array([5, 0, 5]), 3, np.zeros(0, int)):
        np.testing.assert_array_equal(own.signal[rows], held.signal[rows])
    for name in ("labels", "valid", "age", "sex", "rpeaks", "record_hash", "lane"):
        np.testing.assert_array_equal(getattr(own, name), getattr(held, name))


def test_damage_is_found_before_the_record_is_handed_out(tmp_path):
    path = Path(convert(tiny_source.source(40, splits=True), tmp_path)["path"])
    shard = max(open_folder(path).shards("train"), key=lambda s: s.records)
    row = shard.index()[-1]
    content = bytearray(shard.path.read_bytes())
    content[int(row["signal"]) + 77] ^= 1
    shard.path.write_bytes(content)
    table = mapped([path])
    bad = table.record_hash.tolist().index(int(row["record"]))
    assert table.signal[:bad].shape == (bad, 1000, 12)
    with pytest.raises(DataError, match=rf"{shard.path}: record at byte {int(row['frame'])}: .*ecg-jax convert"):
        table.signal[bad]


def test_a_shard_of_another_data_set_is_refused(tmp_path):
    """Same sizes, same ids, sound checksums: only the name of the set differs."""
    ours = Path(convert(tiny_source.source(40, splits=True), tmp_path / "a")["path"])
    theirs = Path(convert(tiny_source.source(40, name="tyni", splits=True), tmp_path / "b")["path"])
    shard = max(open_folder(theirs).shards("train"), key=lambda s: s.records)
    target = max(open_folder(ours).shards("train"), key=lambda s: s.records)
    target.path.write_bytes(shard.path.read_bytes())
    with pytest.raises(DataError, match=rf"{target.path}.*(names|another data set|checksum).*ecg-jax convert"):
        tables.load([ours], "train", "main")
    target.path.write_bytes(b"x" * target.bytes)
    with pytest.raises(DataError, match=rf"{target.path}: .*cannot be decoded.*ecg-jax convert"):
        mapped([ours])
    swapped = target.path.with_name(target.path.name + schema.INDEX_SUFFIX)
    swapped.write_bytes(shard.path.with_name(shard.path.name + schema.INDEX_SUFFIX).read_bytes())
    with pytest.raises(DataError, match=r"is not the index that card\.json names"):
        tables.load([ours], "train", "main")


# ------------------------------------------------------------------------------------- what the stream carries


def test_the_stream_carries_every_field(folder):
    every = (*stream.STORED, "labels")
    table = tables.load([folder], "train", "main")
    (batch,) = run([folder], len(table), 0, steps=1, fields=every)
    assert set(batch) == {*every, "record_hash", "epoch"}
    stored = {}
    for shard in open_folder(folder).shards("train"):
        for payload in schema.read_frames(shard.path):
            one = schema.decode(payload)
            stored[one["record_id"]] = one
    row = {h: i for i, h in enumerate(table.record_hash.tolist())}
    rows = [row[h] for h in batch["record_hash"].tolist()]
    for name in ("signal", "labels", "valid", "rpeaks", "age", "sex"):
        np.testing.assert_array_equal(batch[name], getattr(table, name)[rows])
    for i, name in enumerate(batch["record_id"].tolist()):
        one = stored[name.decode()]
        assert table.record_ids[rows[i]] == name.decode() and batch["quality"][i] == one["quality"]
        assert (batch["patient_id"][i].decode(), batch["source"][i]) == (one["patient_id"], one["source"])
        assert batch["signature"][i] == one["signature"] and batch["meta"][i] == schema.meta_json(one["meta"])
    (few,) = run([folder], 8, 0, steps=1, fields=("valid",))
    assert set(few) == {"valid", "record_hash", "epoch"}
    with pytest.raises(UsageError, match="carries no sound"):
        run([folder], 8, 0, steps=1, fields=("sound",))


def test_many_peaks_and_none_become_fifty_places():
    from ecg_jax.shards import peaks

    rng = np.random.default_rng(0)
    own = [np.sort(rng.integers(0, 1000, n)).astype("<i2") for n in (0, 3, 50, 51, 70, 0)]
    np.testing.assert_array_equal(stream._peaks([one.tobytes() for one in own]), peaks.fitted(own))


def test_the_stream_joins_codes_to_their_records(tmp_path):
    from test_shards_codes import coded

    path = Path(convert(tiny_source.source(60, splits=True), tmp_path)["path"])
    name = coded(path).name
    table = tables.load([path], "train", "main", codes=[name])
    (batch,) = run([path], len(table), 0, steps=1, codes=[name], fields=("signal", "codes", "rpeaks"))
    row = {h: i for i, h in enumerate(table.record_hash.tolist())}
    rows = [row[h] for h in batch["record_hash"].tolist()]
    assert batch["codes"].shape == (len(table), SLOTS) and len(np.unique(table.codes)) > 1
    for field in ("signal", "codes", "rpeaks"):
        np.testing.assert_array_equal(batch[field], getattr(table, field)[rows])
    with pytest.raises(UsageError, match="folders of codes"):
        run([path], 8, 0, steps=1, fields=("codes",))


# --------------------------------------------------------------------------------------------- inspect --verify


def test_verify_names_every_file_that_is_not_what_the_card_names(tmp_path, capsys):
    from test_shards_codes import coded

    path = Path(convert(tiny_source.source(60, splits=True), tmp_path, shards=8)["path"])
    beside = coded(path)
    assert main(["inspect", str(path), "--verify"]) == 0
    files = sum(1 for file in path.iterdir() if ".tfrecord" in file.name) + 3 * len(open_folder(path).card["files"])
    assert f"{files} of {files} files are sound" in capsys.readouterr().out
    flipped, cut, missing = (s for s in open_folder(path).shards("train")[:3])
    content = bytearray(flipped.path.read_bytes())
    content[9] ^= 4
    flipped.path.write_bytes(content)
    cut.path.write_bytes(cut.path.read_bytes()[:-5])
    missing.path.unlink()
    codes = beside / codes_lib._file(flipped.path.name, "codes")
    codes.write_bytes(codes.read_bytes()[:-1])
    assert main(["inspect", str(path), "--verify"]) == 3
    out, err = capsys.readouterr()
    for file in (flipped.path, cut.path, missing.path, codes):
        assert f"damaged   {file}: " in out
    assert "4 files are not what card.json names" in err and "Traceback" not in err
    assert len(inspection.verify(path)["damaged"]) == 4
