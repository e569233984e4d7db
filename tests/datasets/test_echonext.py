"""EchoNext: rows by split, labels with unmeasured ones unknown, alignment, lead order and scale, and hostile files."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.datasets.echonext import FLAGS, SHD
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.record import Record, Refused
from ecg_jax.shards.convert import convert

MEASURES = list(dict.fromkeys(value for values in FLAGS.values() for value in values))
COLUMNS = [
    "", "ecg_key", "patient_key", "acquisition_year", "location_setting", "race_ethnicity", "most_recent_ecg", "sex",
    "ventricular_rate", "atrial_rate", "age_at_ecg", *MEASURES, *FLAGS, SHD, "split",
]  # fmt: skip


def signal(rate: float, seed: int) -> np.ndarray:
    """[2500, 12] in the standard order, beats at `rate` per minute, one scale for all leads."""
    time = np.arange(2500) / 250
    at = np.arange(0.2 + 0.01 * (seed % 30), 10, 60 / rate)
    qrs, wave = (
        np.exp(-(((time[:, None] - at - shift) / width) ** 2)).sum(1) for shift, width in ((0, 0.02), (0.2, 0.04))
    )
    noise = 0.01 * np.random.default_rng(seed).standard_normal((2500, 8))
    one, two = 1.4 * qrs + 0.3 * wave, 2.2 * qrs + 0.6 * wave + noise[:, 0]
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.stack([*limbs, *((0.5 + 0.6 * k) * qrs + noise[:, k + 1] for k in range(6))], axis=1)


def row(key: int, patient: int, split: str, rate: object, **cells: object) -> dict[str, object]:
    """Everything measured, nothing found."""
    blank = {"": key, "ecg_key": key, "patient_key": patient, "acquisition_year": 2014, "location_setting": "inpatient"}
    blank |= {"race_ethnicity": "unknown", "most_recent_ecg": 0, "sex": "female", "age_at_ecg": 61.0}
    blank |= dict.fromkeys(MEASURES, "none") | dict.fromkeys([*FLAGS, SHD], 0)
    return blank | {"ventricular_rate": rate, "atrial_rate": "", "split": split} | cells


def write(folder: Path, rows: list[dict[str, object]], signals: dict[str, np.ndarray], columns=COLUMNS) -> None:
    lines = [",".join(columns)] + [",".join(str(one[name]) for name in columns) for one in rows]
    (folder / "echonext_metadata_100k.csv").write_text("\n".join(lines) + "\n")
    for split, values in signals.items():
        np.save(folder / f"EchoNext_{split}_waveforms.npy", values)


def rates(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(45, 130, n).round()


SPLITS = {"train": 30, "val": 4, "test": 24, "no_split": 3}
RATES = {split: rates(n, seed) for seed, (split, n) in enumerate(SPLITS.items())}
SIGNALS = {
    split: np.stack([signal(rate, 100 * k + i)[None] for i, rate in enumerate(RATES[split])])
    for k, split in enumerate(SPLITS)
}
SIGNALS_SAVED = {split: values for split, values in SIGNALS.items() if split != "no_split"}  # that file is not needed


def rows_of() -> list[dict[str, object]]:
    """The splits one after another, as published; patients of train have three ECGs, those of no_split are test's."""
    rows = []
    for split, n in SPLITS.items():
        for i in range(n):
            patient = {"train": i // 3, "val": 100 + i, "test": 200 + i, "no_split": 200 + i}[split]
            rows.append(row(1000 + len(rows), patient, split, RATES[split][i]))
    return rows


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, rows_of(), SIGNALS_SAVED)
    return tmp_path


def test_rows_of_each_split(folder):
    source = pickle.loads(pickle.dumps(open_source("echonext", folder, {})))
    assert (source.name, source.version, source.unit) == ("echonext", "1.1.0", "z")
    assert source.tasks == {"shd": (SHD,), "echo": tuple(FLAGS)} and len(FLAGS) == 11
    assert source.skipped == {"no_split": 3} and len(source.items) == 58
    assert [source.items[i].split for i in (0, 29, 30, 34, 57)] == ["train", "train", "val", "test", "test"]
    assert source.items[3].group == "1" and source.items[3].record_id == "1003"
    some = source.items[25:40]
    for item, record in zip(some, source.read(some), strict=True):
        truth = SIGNALS[item.split][item.where["row"], 0]
        np.testing.assert_allclose(record.signal, truth, rtol=1e-6, atol=1e-30)
        assert record.rate == 250 and record.unit == "z" and record.time == "2014" and record.missing == ()
        assert (record.age, record.sex, record.patient_id) == (61.0, 0.0, item.group) and len(record.source) == 32
    checks = source.about["checks"]
    assert checks["train"]["heart_rates"]["agree"] > 0.9 and checks["train"]["heart_rates"]["rank_correlation"] > 0.9
    assert checks["train"]["scaling"] == "global" and min(checks["test"]["limb_leads_explained"].values()) > 0.99
    assert checks["val"] == {"rows": 4, "not_checked": "fewer than 20 rows prove nothing"}
    assert "no re-sharing" in source.about["licence"] and "constant" in source.about["constant_filler"]


def test_order_of_the_table_within_a_split_counts(folder):
    """Splits may be mixed; a row's place among those of its split is what finds its signal."""
    rows = rows_of()
    place = [i for n in SPLITS.values() for i in range(n)]
    mixed = [rows[k] for k in sorted(range(len(rows)), key=place.__getitem__)]
    assert [one["split"] for one in mixed[:5]] == ["train", "val", "test", "no_split", "train"]
    write(folder, mixed, {})
    source = open_source("echonext", folder, {"splits": "test, train"})
    assert source.skipped == {"no_split": 3, "val: not asked for": 4}
    (record,) = source.read([item for item in source.items if item.record_id == "1040"])
    np.testing.assert_allclose(record.signal, SIGNALS["test"][6, 0], rtol=1e-6, atol=1e-30)


def test_unmeasured_is_unknown(folder):
    rows = rows_of()
    rows[0] |= {"pasp_value": "", "tr_max_velocity_value": "", SHD: 1, "lvef_lte_45_flag": 1, "lvef_value": 30}
    rows[1] |= {"ivs_measurement": "", "lvwt_gte_13_flag": 1, SHD: "1.0"}  # one wall is thick enough
    rows[2] |= {"lvpw_measurement": ""}  # one wall is not, the other unknown
    rows[3] |= {"aortic_stenosis_value": "presumed none"}
    rows[4] |= dict.fromkeys(MEASURES, "")
    rows[5] |= {SHD: ""}
    write(folder, rows, {})
    source = open_source("echonext", folder, {})
    labels = [item.where["labels"] for item in source.items]
    names = list(FLAGS)
    at = {name: names.index(name) for name in names}
    assert labels[0]["echo"][at["lvef_lte_45_flag"]] == 1 and labels[0]["shd"].tolist() == [1]
    assert labels[0]["echo"][at["pasp_gte_45_flag"]] == -1 and labels[0]["echo"][at["tr_max_gte_32_flag"]] == -1
    assert (labels[0]["echo"] == 0).sum() == 8
    assert labels[1]["echo"][at["lvwt_gte_13_flag"]] == 1 and labels[2]["echo"][at["lvwt_gte_13_flag"]] == -1
    assert labels[3]["echo"].tolist() == [0] * 11
    assert labels[4]["echo"].tolist() == [-1] * 11 and labels[4]["shd"].tolist() == [0]  # a negative echo, later
    assert labels[5]["shd"].tolist() == [-1]
    about = source.about
    assert about["negatives_unmeasured"]["pasp_gte_45_flag"] == 2
    assert about["negatives_unmeasured"]["lvwt_gte_13_flag"] == 2
    assert about["composite_negatives_without_any_measurement"] == 1
    columns = [name for name in COLUMNS if name not in ("pasp_value", "lvpw_measurement")]
    write(folder, rows, {}, columns)
    source = open_source("echonext", folder, {})
    echo = np.stack([item.where["labels"]["echo"] for item in source.items])
    assert (echo[:, [at["pasp_gte_45_flag"], at["lvwt_gte_13_flag"]]] == -1).all() and (echo == 0).any()
    assert source.about["flags_without_measurement_column"] == ["lvwt_gte_13_flag", "pasp_gte_45_flag"]


def test_misaligned_rows_are_refused(folder):
    """Rows shifted by one, or shuffled: as many as there should be, each with another one's labels."""
    for order in (np.roll(np.arange(30), 1), np.random.default_rng(0).permutation(30)):
        np.save(folder / "EchoNext_train_waveforms.npy", SIGNALS["train"][order])
        with pytest.raises(DataError, match=r"EchoNext_train_waveforms\.npy: its rows are not those of"):
            open_source("echonext", folder, {})
    unknown = [one | {"ventricular_rate": ""} for one in rows_of()]
    write(folder, unknown, {})
    source = open_source("echonext", folder, {})
    assert source.about["checks"]["train"]["heart_rates"].startswith("not checked")


def test_lead_order_and_scale(folder):
    def save(values: np.ndarray) -> dict:
        np.save(folder / "EchoNext_train_waveforms.npy", values)
        return open_source("echonext", folder, {}).about["checks"]["train"]

    train = SIGNALS["train"]
    per_lead = save(train / train.std(axis=(0, 1, 2)))
    assert per_lead["scaling"] == "per lead" and all(abs(sd - 1) < 0.1 for sd in per_lead["lead_sd"].values())
    assert min(per_lead["limb_leads_explained"].values()) > 0.99
    for swap in ((4, 5), (0, 1), (2, 3), (3, 4)):
        order = list(range(12))
        order[swap[0]], order[swap[1]] = order[swap[1]], order[swap[0]]
        with pytest.raises(DataError, match="its leads are not in the order I II III"):
            save(train[..., order])
    dead = train.copy()
    dead[..., 3] = 0.0
    assert save(dead)["scaling"] == "not known: a lead is constant"


def test_converts_whole(folder, tmp_path):
    short = SIGNALS["val"].copy()
    short[0, 0, 625:] = short[0, 0, 624]  # 2.5 s, then constant
    short[1] = 0.0
    short[2, 0, 100] = np.nan
    np.save(folder / "EchoNext_val_waveforms.npy", short.astype(">f4"))
    card = convert(open_source("echonext", folder, {}), tmp_path / "out")
    assert card["unit"] == "z" and card["counts"]["items"] == 58 and card["refused"] == {"all-zero": 1}
    assert {split: found["records"] for split, found in card["splits"].items()} == {"train": 30, "val": 3, "test": 24}
    assert card["splits"]["train"]["patients"] == 10
    assert card["known"]["shd"]["train"] == [30] and len(card["positives"]["echo"]["test"]) == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "did you mean 'splits'"),
        ({"splits": "train,no_split"}, "shares its patients"),
        ({"splits": "dev"}, "some of train, val, test"),
        ({"splits": "val,val"}, "each once"),
        ({"version": "1.1"}, "not of the form"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(UsageError, match=message):
        open_source("echonext", folder, options)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"split": "dev"}, r"echonext_metadata_100k.csv:2: split='dev', EchoNext has train, val, test, no_split"),
        ({"ecg_key": ""}, "ecg_key '' is empty"),
        ({"ecg_key": 1001}, "'1001' is there twice"),
        ({"patient_key": ""}, "patient_key is empty"),
        ({"sex": "x"}, "sex='x'"),
        ({SHD: 2}, "='2' is neither 0 nor 1"),
        ({"age_at_ecg": "old"}, "age_at_ecg='old' is no number"),
        ({"split": "test"}, "has 30 rows, echonext_metadata_100k.csv 29 of split train"),
    ],
)
def test_bad_tables(folder, cells, message):
    rows = rows_of()
    rows[0] |= cells
    write(folder, rows, {})
    with pytest.raises(DataError, match=message) as caught:
        open_source("echonext", folder, {})
    assert "\n" not in str(caught.value)


def test_bad_waveform_files(folder):
    path = folder / "EchoNext_val_waveforms.npy"
    good = path.read_bytes()
    for values, message in (
        (SIGNALS["val"][:, 0], r"float64 \(4, 2500, 12\), expected float"),
        (np.asfortranarray(SIGNALS["val"]), "in Fortran order"),
        (np.zeros((4, 1, 2500, 12), np.int16), "int16"),
        (np.zeros((4, 1, 2500, 12), "U1"), "<U1"),
    ):
        np.save(path, values)
        with pytest.raises(DataError, match=message):
            open_source("echonext", folder, {})
    path.write_bytes(good[:-8])
    with pytest.raises(DataError, match="its 4 rows need"):
        open_source("echonext", folder, {})
    path.write_bytes(good)
    source = open_source("echonext", folder, {})
    path.write_bytes(good[:-8])  # after opening
    *others, last = source.read([item for item in source.items if item.split == "val"])
    assert all(isinstance(one, Record) for one in others) and last.reason == "truncated"
    path.unlink()
    assert {one.reason for one in source.read(source.items[30:34])} == {"unreadable-signal"}
    with pytest.raises(DataError, match=r"there is no .*val_waveforms.*splits="):
        open_source("echonext", folder, {})
    (folder / "ECHONEXT_metadata_100k.csv").write_text("")
    with pytest.raises(DataError, match="more than one"):
        open_source("echonext", folder, {})
    for table in folder.glob("*.csv"):
        table.unlink()
    with pytest.raises(DataError, match="there is no echonext_metadata_100k"):
        open_source("echonext", folder, {})


def test_table_in_any_case(folder):
    (folder / "echonext_metadata_100k.csv").rename(folder / "EchoNext_metadata_100k.csv")
    assert set(open_source("echonext", folder, {}).about["tables_sha256"]) == {"EchoNext_metadata_100k.csv"}


CELLS = st.sampled_from(["", "0", "1", "-1", "1e400", "nan", "²", "9" * 30, "\0", "x", "train", "no_split"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_files_are_errors_of_one_line(folder, data):
    """A small split and its file, spoilt in one place: an error for the user, or a source that reads."""
    rows = [one for one in rows_of() if one["split"] == "val"]
    write(folder, rows, {})
    table, waveforms = folder / "echonext_metadata_100k.csv", folder / "EchoNext_val_waveforms.npy"
    whole = io.BytesIO()
    np.save(whole, SIGNALS["val"])
    waveforms.write_bytes(whole.getvalue())
    kind = data.draw(st.sampled_from(["cell", "bytes", "header"]))
    if kind == "cell":
        lines = [line.split(",") for line in table.read_text().split("\n")]
        line = lines[data.draw(st.integers(0, len(lines) - 1))]
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(CELLS)
        table.write_text("\n".join(",".join(line) for line in lines))
    else:
        path = table if kind == "bytes" else waveforms
        good = path.read_bytes()
        at = data.draw(st.integers(0, min(len(good), 128)))
        path.write_bytes(good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 5)) :])
    try:
        source = open_source("echonext", folder, {"splits": "val"})
        read = list(source.read(source.items))
        assert len(read) == len(source.items) and all(isinstance(one, Record | Refused) for one in read)
    except EcgJaxError as error:
        assert "\n" not in str(error)
