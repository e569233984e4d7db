"""The tests that need TensorFlow: the stream loader, and our bytes against TensorFlow's own reader and
writer."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_source
from test_shards_schema import example

from ecg_jax.errors import DataError, UsageError
from ecg_jax.shards import schema, tables
from ecg_jax.shards.catalog import Subset, open_folder
from ecg_jax.shards.convert import convert
from ecg_jax.shards.resident import Order, lane_layout
from ecg_jax.shards.stream import batches

FIELDS = ("signal", "labels", "valid", "record_hash", "epoch")


def run(folders, batch, seed, **options):
    return list(batches(folders, "train", "main", batch, seed, **options))


def test_an_epoch_is_the_table_in_another_order(folder):
    table = tables.load([folder], "train", "main")
    n, batch = len(table), 16
    found = run([folder], batch, 1, steps=3 * n // batch)
    flat = {field: np.concatenate([b[field] for b in found]) for field in FIELDS}
    assert flat["epoch"].tolist() == [i // n for i in range(len(flat["epoch"]))]
    row = {h: i for i, h in enumerate(table.record_hash.tolist())}
    orders = []
    for epoch in range(2):
        of = flat["epoch"] == epoch
        rows = [row[h] for h in flat["record_hash"][of].tolist()]
        orders.append(rows)
        assert sorted(rows) == list(range(n)) != rows
        np.testing.assert_array_equal(flat["signal"][of], table.signal[rows])
        np.testing.assert_array_equal(flat["labels"][of], table.labels[rows])
        np.testing.assert_array_equal(flat["valid"][of], table.valid[rows])
    assert orders[0] != orders[1]
    dtypes = {field: found[0][field].dtype.name for field in FIELDS}
    want = ("int16", "int8", "int32", "uint64", "int32")
    assert dtypes == dict(zip(FIELDS, want, strict=True))


def test_stream_and_resident_feed_the_same_records(folder):
    subset = Subset(records=75, offset=0.2)
    table = tables.load([folder], "train", "main", subset=subset)
    lanes = lane_layout(table)
    order = Order(lanes.counts, 8, 0)
    index, epoch = order.span(0, int(lanes.counts.max()))
    resident = Counter()
    for lane in range(8):
        resident.update(lanes.record_hash[lane][index[:, lane][epoch[:, lane] == 0]].tolist())
    streamed = Counter()
    for b in run([folder], len(table), 5, steps=1, subset=subset):
        streamed.update(b["record_hash"].tolist())
    assert streamed == resident and set(streamed.values()) == {1}


@pytest.mark.parametrize("threads", [1, 3])
def test_going_on_at_a_step_gives_the_rest_of_the_same_run(folder, threads):
    whole = run([folder], 24, 7, steps=12)
    rest = run([folder], 24, 7, start_step=5, steps=7, threads=threads)
    for one, two in zip(whole[5:], rest, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(one[field], two[field])
    other = run([folder], 24, 8, steps=1)[0]
    assert other["record_hash"].tolist() != whole[0]["record_hash"].tolist()


def test_of_some_lanes_only_their_shards_are_read(folder, tmp_path):
    """What a process among several does: each record of its lanes once an epoch, whatever lies in the others' files."""
    copy = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, copy)
    for shard in open_folder(copy).shards("train"):
        if shard.number % 8 >= 4:
            shard.path.write_bytes(bytes(shard.bytes))
    own = tables.load([folder], "train", "main", lanes=range(4))
    found = run([copy], len(own), 3, steps=2, lanes=range(4))
    for epoch, one in enumerate(found):
        assert sorted(one["record_hash"].tolist()) == sorted(own.record_hash.tolist()) and set(one["epoch"]) == {epoch}
    (rest,) = run([copy], len(own), 3, start_step=1, steps=1, lanes=range(4))
    np.testing.assert_array_equal(rest["record_hash"], found[1]["record_hash"])
    with pytest.raises(DataError, match=r"no record of train lies in the shards of lanes \[7\]"):
        run(
            [copy],
            8,
            3,
            steps=1,
            lanes=[7],
            exclude=frozenset(tables.load([folder], "train", "main", lanes=[7]).group_hash.tolist()),
        )


def test_subsets_and_exclusions_are_those_of_the_table(folder):
    groups = tables.load([folder], "train", "main").group_hash
    for options in ({"subset": Subset(0.4, offset=0.8)}, {"exclude": frozenset(groups[::9].tolist())}):
        table = tables.load([folder], "train", "main", **options)
        (found,) = run([folder], len(table), 0, steps=1, **options)
        assert sorted(found["record_hash"].tolist()) == sorted(table.record_hash.tolist())


def test_several_folders_align_as_in_a_table(folder, tmp_path):
    source = tiny_source.source(40, name="other-set", unit="z", splits=True, tasks={"main": ("b", "d")}, seed=5)
    second = Path(convert(source, tmp_path, leads="8")["path"])
    table = tables.load([folder, second], "train", "main", labels=["d", "b", "a"])
    (found,) = run([folder, second], len(table), 0, steps=1, labels=["d", "b", "a"])
    row = {h: i for i, h in enumerate(table.record_hash.tolist())}
    rows = [row[h] for h in found["record_hash"].tolist()]
    assert sorted(rows) == list(range(len(table)))
    np.testing.assert_array_equal(found["labels"], table.labels[rows])
    np.testing.assert_array_equal(found["signal"], table.signal[rows])


def test_damage_is_named(tmp_path):
    path = Path(convert(tiny_source.source(40, splits=True), tmp_path)["path"])
    shard = max(open_folder(path).shards("train"), key=lambda s: s.records)
    at = int(shard.index()[0]["signal"]) + 77
    data = shard.path.read_bytes()
    shard.path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(DataError, match=rf"{shard.path}: record at byte 0: .*ecg-jax convert"):
        run([path], 8, 0, steps=2)


def test_wrong_arguments(folder):
    with pytest.raises(UsageError, match="batch 0"):
        run([folder], 0, 0, steps=1)
    with pytest.raises(DataError, match="did you mean"):
        list(batches([folder], "train", "mian", 8, 0, steps=1))


# ---------------------------------------------------------------------------------- against TensorFlow itself


@pytest.fixture(scope="module")
def tf():
    import tensorflow

    return tensorflow


@pytest.mark.parametrize("leads", ["8", "12"])
def test_tensorflow_reads_our_bytes(tf, tmp_path, leads):
    records = [example(i, labels={"x": np.array([1, 0, -1] * i, np.int8)}, quality=2**40 + i) for i in range(4)]
    path = tmp_path / "ours.tfrecord"
    path.write_bytes(b"".join(schema.frame(schema.encode(p, leads)) for p in records))
    for p, raw in zip(records, tf.data.TFRecordDataset(str(path)).as_numpy_iterator(), strict=True):
        feature = tf.train.Example.FromString(raw).features.feature
        stored = schema.decode(raw)
        assert feature["signal"].bytes_list.value[0] == stored["signal"].tobytes()
        assert list(feature["valid"].int64_list.value) == list(p.valid)
        assert feature["quality"].int64_list.value[0] == p.quality
        assert feature["age"].float_list.value[0] == p.age
        assert np.isnan(feature["sex"].float_list.value[0])
        assert feature["labels/x"].bytes_list.value[0] == p.labels["x"].tobytes()
        assert feature["meta"].bytes_list.value[0] == schema.meta_json(p.meta)
        assert len(feature) == 12
        # Nothing is left over that TensorFlow would drop: its bytes, in its own order of fields, are as many
        # as ours.
        assert tf.train.Example.FromString(raw).ByteSize() == len(raw)


def test_we_read_tensorflows_bytes(tf, tmp_path):
    records = [example(i, quality=-1) for i in range(3)]
    path = tmp_path / "theirs.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as file:
        for p in records:
            ours = tf.train.Example.FromString(schema.encode(p))
            features = reversed(sorted(ours.features.feature.items()))
            file.write(tf.train.Example(features=tf.train.Features(feature=dict(features))).SerializeToString())
    for p, payload in zip(records, schema.read_frames(path), strict=True):
        stored = schema.decode(payload)
        np.testing.assert_array_equal(stored["signal"], p.signal)
        assert (stored["record_id"], stored["valid"], stored["quality"]) == (p.record_id, p.valid, -1)
        np.testing.assert_array_equal(stored["labels"]["b"], p.labels["b"])


def test_tfds_opens_the_folder(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    card = open_folder(folder).card
    assert {s: info.num_examples for s, info in builder.info.splits.items()} == {
        s: found["records"] for s, found in card["splits"].items()
    }
    assert set(builder.info.features["labels"]) == set(card["tasks"])
    for split in card["splits"]:
        table = tables.load([folder], split, "main")
        read = {}
        for row in tfds.as_numpy(builder.as_dataset(split=split)):
            read[row["record_id"].decode()] = row
        assert sorted(read) == sorted(table.record_ids)
        for i, record_id in enumerate(table.record_ids):
            row = read[record_id]
            np.testing.assert_array_equal(row["signal"], table.signal[i])
            np.testing.assert_array_equal(row["labels"]["main"], table.labels[i])
            np.testing.assert_array_equal(row["valid"], table.valid[i])
            assert row["rpeaks"].dtype == np.int16 and row["source"].shape == (32,)


# ------------------------------------------------------------------------------------- who imports TensorFlow


def test_only_the_stream_imports_tensorflow(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny_source
from pathlib import Path
from ecg_jax.shards import catalog, grouping, resident, schema, tables
from ecg_jax.shards.convert import convert
path = convert(tiny_source.source(40, splits=True), Path({str(tmp_path)!r}))["path"]
resident.lane_layout(tables.load([path], "train", "main"))
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
import ecg_jax.shards.stream
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
