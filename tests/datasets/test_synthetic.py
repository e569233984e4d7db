"""The simulated data set: items, options, splits, reading in any order, the card's facts."""

import pickle

import numpy as np
import pytest

from ecg_jax.datasets import open_source
from ecg_jax.errors import UsageError
from ecg_jax.records import synthetic
from ecg_jax.records.record import Record
from ecg_jax.records.synthetic.settings import LABELS


def _open(**options):
    return open_source("synthetic", None, {name: str(value) for name, value in options.items()})


@pytest.fixture(scope="module")
def source():
    return _open(records=300, seed=4)


def test_items_are_known_without_signals(source):
    assert len(source.items) == 300 == len({item.record_id for item in source.items})
    assert source.unit == "mV" and source.tasks == {"code": synthetic.CODE_LABELS}
    assert len({item.group for item in source.items}) == source.about["patients"] < 300
    assert all(item.split is None for item in source.items)


def test_reading_scattered_items_gives_the_same_records(source):
    whole = list(source.read(source.items))
    read = pickle.loads(pickle.dumps(source.read))
    some = pickle.loads(pickle.dumps(source.items))[250::-40]
    for item, record in zip(some, read(some), strict=True):
        assert isinstance(record, Record) and record.record_id == item.record_id and record.group == item.group
        other = whole[item.where[0]]
        assert np.array_equal(record.signal, other.signal) and record.meta == other.meta
        assert record.source == other.source and len(record.source) == 32
        assert record.signal.dtype == np.float32 and record.rate == 100 and record.unit == "mV"
        assert record.labels["code"].dtype == np.int8 and record.labels["code"].shape == (6,)
    assert len({record.source for record in whole}) == 300


def test_bayes_probabilities_come_along_rounded(source):
    record = next(source.read(source.items[7:8]))
    settings = synthetic.Settings(seed=4)
    index, patient = source.items[7].where
    _, probability = synthetic.states(settings, np.array([index]), np.array([patient]))
    np.testing.assert_allclose(record.meta["bayes"]["code"], probability[0, :6], rtol=1e-5)
    assert all(value == float(f"{value:.6g}") for value in record.meta["bayes"]["code"])


def test_more_records_keep_the_first_ones(source):
    assert list(_open(records=500, seed=4).items[:300]) == list(source.items)
    by_patient = _open(patients=100, seed=4)
    assert by_patient.about["patients"] == 100
    assert list(by_patient.items) == list(source.items[: len(by_patient.items)])


def test_official_split_by_patient_only_grows_the_training_set():
    small, large = _open(records=400, val=60, test=80), _open(records=800, val=60, test=80)
    assert list(large.items[:400]) == list(small.items)
    for source in (small, large):
        groups = {name: {i.group for i in source.items if i.split == name} for name in ("train", "val", "test")}
        assert not groups["train"] & groups["val"] | groups["train"] & groups["test"] | groups["val"] & groups["test"]
        counts = {name: sum(i.split == name for i in source.items) for name in groups}
        assert 60 <= counts["val"] < 100 and 80 <= counts["test"] < 120
    assert not any(item.split == "val" for item in _open(records=100, test=10).items)


def test_second_population_has_its_own_name_and_task():
    source = _open(records=40, population=2, prevalence="balanced")
    assert source.name != _open(records=1).name
    assert source.tasks == {"ood": synthetic.OOD_LABELS}
    assert source.about["labels_seen_in_training"] == ["RBBB", "LBBB", "AF", "ST"]
    record = next(source.read(source.items[:1]))
    assert record.labels["ood"].shape == (7,) and len(record.meta["bayes"]["ood"]) == 7
    columns = [LABELS.index(name) for name in synthetic.OOD_LABELS]
    settings = synthetic.Settings(population=2, prevalence="balanced")
    _, probability = synthetic.states(settings, np.array([0]), np.array([0]))
    np.testing.assert_allclose(record.meta["bayes"]["ood"], probability[0, columns], rtol=1e-5)


def test_card_states_prior_and_floor():
    about = _open(records=3000, prevalence="balanced").about
    assert about["demonstration"] and about["simulator"]["prevalence"] == "balanced"
    assert all(0.08 < value < 0.2 for value in about["prior"].values())
    ratio = about["prior_entropy"]["macro"] / about["bayes_entropy"]["macro"]
    assert ratio > 5
    assert not _open(records=10).about["demonstration"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"recrods": 5}, "did you mean 'records'"),
        ({"records": "many"}, "records='many' is not a whole number"),
        ({"records": 0}, "out of range"),
        ({"records": 5, "patients": 5}, "not both"),
        ({"population": 3}, "population=3"),
        ({"prevalence": "high"}, "code, balanced"),
        ({"noise": -1}, "noise=-1"),
        ({"tail": "nan"}, "tail=nan"),
        ({"teacher": "strong"}, "is not a number"),
        ({"records": 50, "val": 30, "test": 30}, "leave nothing"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_are_one_line(options, part):
    with pytest.raises(UsageError) as caught:
        _open(**options)
    assert part in str(caught.value) and "\n" not in str(caught.value)
