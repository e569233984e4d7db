import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.errors import DataError
from ecg_jax.records.leads import INDEPENDENT, LEADS
from ecg_jax.records.record import Prepared
from ecg_jax.shards import schema

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
task_names = st.text("abcdefgh_", min_size=1, max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | texts


@st.composite
def prepared(draw) -> Prepared:
    start = draw(st.integers(0, 999))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    low, high = sorted((draw(st.integers(-32768, 32767)), draw(st.integers(-32768, 32767))))
    labels = draw(st.dictionaries(task_names, st.lists(st.integers(-1, 1), min_size=1, max_size=90), max_size=3))
    return Prepared(
        signal=rng.integers(low, high + 1, (1000, 12)).astype(np.int16),
        valid=(start, draw(st.integers(1, 1000 - start))),
        record_id=draw(texts),
        group="g",
        patient_id=draw(texts),
        split=None,
        age=draw(st.floats(width=32)),
        sex=draw(st.floats(width=32)),
        quality=draw(st.integers(0, 2**63 - 1)),
        labels={task: np.array(values, np.int8) for task, values in labels.items()},
        rpeaks=np.array(draw(st.lists(st.integers(0, 999), max_size=40)), np.int16),
        source=draw(st.binary(min_size=32, max_size=32)),
        signature=draw(st.binary(min_size=16, max_size=16)),
        meta=draw(st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=4)),
    )


def example(seed: int = 0, **changes) -> Prepared:
    rng = np.random.default_rng(seed)
    base = Prepared(
        signal=rng.integers(-3000, 3000, (1000, 12)).astype(np.int16),
        valid=(0, 1000),
        record_id=f"record {seed}",
        group="patient",
        patient_id="patient",
        split="train",
        age=61.0,
        sex=float("nan"),
        quality=5,
        labels={"b": np.array([1, 0, -1], np.int8), "a": np.array([0], np.int8)},
        rpeaks=np.array([100, 190], np.int16),
        source=bytes(range(32)),
        signature=bytes(range(16)),
        meta={"rate": 500.0, "device": None},
    )
    return dataclasses.replace(base, **changes)


def assert_same(p: Prepared, stored: dict, leads: str) -> None:
    columns = [LEADS.index(lead) for lead in INDEPENDENT] if leads == "8" else slice(None)
    np.testing.assert_array_equal(stored["signal"], p.signal[:, columns])
    assert stored["signal"].dtype == np.int16
    for field in ("valid", "record_id", "patient_id", "quality", "source", "signature"):
        assert stored[field] == getattr(p, field), field
    for field in ("age", "sex"):
        one, two = stored[field], getattr(p, field)
        assert one == two or (math.isnan(one) and math.isnan(two))
    assert stored["labels"].keys() == p.labels.keys()
    for task, values in p.labels.items():
        np.testing.assert_array_equal(stored["labels"][task], values)
    np.testing.assert_array_equal(stored["rpeaks"], p.rpeaks)
    assert stored["meta"] == json.loads(json.dumps(p.meta))


@quick
@given(prepared(), st.sampled_from(["8", "12"]))
def test_what_is_encoded_is_decoded(p, leads):
    encoded = schema.encode_indexed(p, leads)
    assert_same(p, schema.decode(encoded.payload), leads)
    assert encoded.payload == schema.encode(p, leads)
    found = encoded.payload[encoded.id : encoded.id + encoded.id_length]
    assert found.decode() == p.record_id
    fixed = schema.fixed_offsets(leads, tuple((task, len(v)) for task, v in p.labels.items()))
    for task, values in p.labels.items():
        at, size = fixed[f"labels/{task}"]
        at += encoded.signal
        assert encoded.payload[at : at + size] == values.tobytes()
    at, size = fixed["signature"]
    assert encoded.payload[encoded.signal + at :][:size] == p.signature
    tail = schema.decode_tail(encoded.payload[encoded.id + encoded.id_length :])
    assert json.loads(tail["meta"]) == json.loads(json.dumps(p.meta))


def test_bytes_do_not_depend_on_the_order_of_dicts_or_the_kind_of_nan():
    one = example(labels={"a": np.zeros(1, np.int8), "b": np.ones(2, np.int8)}, meta={"x": 1, "y": float("nan")})
    odd_nan = float(np.array(0xFFC00001, np.uint32).view(np.float32))
    two = example(labels=dict(reversed(one.labels.items())), meta={"y": None, "x": np.int64(1)}, sex=odd_nan)
    assert schema.encode(one) == schema.encode(two)


def test_signal_comes_first():
    encoded = schema.encode_indexed(example())
    assert encoded.signal < 40
    assert encoded.payload[encoded.signal :][:24000] == example().signal.tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"signal": np.zeros((1000, 8), np.int16)},
        {"signal": np.zeros((1000, 12), np.float32)},
        {"source": b"short"},
        {"valid": (10, 995)},
        {"valid": (0, 0)},
        {"labels": {"a": np.zeros(2, np.int64)}},
    ],
)
def test_a_prepared_record_that_breaks_its_contract_is_our_bug(changes):
    with pytest.raises(ValueError, match="record 0"):
        schema.encode(example(**changes))


def written(tmp_path, n=4):
    payloads = [schema.encode(example(i), "8") for i in range(n)]
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(map(schema.frame, payloads)))
    return path, payloads


def test_frames_come_back(tmp_path):
    path, payloads = written(tmp_path)
    assert list(schema.read_frames(path)) == payloads
    path.write_bytes(b"")
    assert list(schema.read_frames(path)) == []


@quick
@given(st.data())
def test_a_damaged_file_never_gives_a_wrong_record(tmp_path_factory, data):
    path, payloads = written(tmp_path_factory.mktemp("damaged"), 3)
    good = path.read_bytes()
    # Half of the damage goes to the headers and footers, which are a thousandth of the bytes.
    edges = [i for i in range(len(good)) if i % (len(good) // 3) < 40 or i % (len(good) // 3) > len(good) // 3 - 40]
    at = data.draw(st.integers(0, len(good) - 1) | st.sampled_from(edges))
    kind = data.draw(st.sampled_from(["change", "cut", "insert", "remove"]))
    junk = data.draw(st.binary(min_size=1, max_size=9))
    bad = {
        "change": good[:at] + junk + good[at + len(junk) :],
        "cut": good[:at],
        "insert": good[:at] + junk + good[at:],
        "remove": good[:at] + good[at + len(junk) :],
    }[kind]
    path.write_bytes(bad)
    found, error = [], None
    try:
        for payload in schema.read_frames(path):
            found.append(payload)
    except DataError as caught:
        error = str(caught)
    assert found == payloads[: len(found)]
    if error is None:  # then nothing is wrong with what is there
        assert bad == b"".join(map(schema.frame, payloads[: len(found)]))
    else:
        start = sum(len(p) + schema.FRAME_EXTRA for p in payloads[: len(found)])
        assert str(path) in error and f"byte {start}:" in error and "ecg-jax convert" in error


@quick
@given(
    st.binary(max_size=200)
    | st.builds(lambda n, b: schema.encode(example(), "8")[: 40 + n] + b, st.integers(0, 99), st.binary(max_size=60))
)
def test_decoding_nonsense_is_a_data_error(junk):
    with pytest.raises(DataError):
        schema.decode(junk)


@quick
@given(st.integers(16030, 16500), st.integers(0, 255))
def test_decoding_a_payload_with_a_changed_byte_is_a_data_error_or_a_record(at, value):
    payload = bytearray(schema.encode(example(), "8"))
    payload[at % len(payload)] = value
    try:
        assert schema.decode(bytes(payload))["signal"].shape == (1000, 8)
    except DataError:
        pass


def test_a_missing_field_is_named():
    p = example()
    payload = schema.encode(p)
    renamed = payload.replace(b"patient_id", b"patient_ix")
    with pytest.raises(DataError, match="patient_id"):
        schema.decode(renamed)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"no\.tfrecord"):
        next(schema.read_frames(tmp_path / "no.tfrecord"))
