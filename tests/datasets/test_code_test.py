"""The CODE test set: rows without ids, leads in an order of their own, six raters."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.datasets.code_labels import CODE6, spread
from ecg_jax.datasets.code_test import ANNOTATORS, ORDER
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.records.leads import DERIVED, LEADS
from ecg_jax.records.record import Record, Refused

ROWS = 827
FILLED = spread(ROWS, 128)[:40]  # the rest are zeros, which are not looked at


def ecg(seed: int) -> np.ndarray:
    """float64 [4096, 12] in the order of `LEADS`, 2 x mV, R of lead II near 1.48."""
    rng = np.random.default_rng(seed)
    t = np.arange(4096) / 400
    beat = np.exp(-(((t % 0.8 - 0.4) / 0.012) ** 2))
    signal = rng.normal(0, 0.02, (4096, 12)) + beat[:, None] * rng.uniform(0.3, 1.2, 12)
    signal[:, 1] = 1.45 * beat + rng.normal(0, 0.02, 4096)
    for lead, (one, two) in DERIVED.items():
        signal[:, LEADS.index(lead)] = one * signal[:, 0] + two * signal[:, 1]
    return signal


def tracings(path: Path, order=ORDER, scale: float = 1.0, rows: int = ROWS, dtype: str = "f8") -> None:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("tracings", (rows, 4096, 12), dtype, chunks=(1, 4096, 12))
        for i in FILLED:
            if i < rows:
                data[i] = ecg(i)[:, [LEADS.index(lead) for lead in order]] * scale


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codetest")
    tracings(folder / "ecg_tracings.hdf5")
    people = "\n".join(f"{20 + i % 60},{'MF'[i % 2]}" for i in range(ROWS))
    (folder / "attributes.csv").write_text(f"age,sex\n{people}\n")
    (folder / "annotations").mkdir()
    for n, name in enumerate(ANNOTATORS):
        lines = [",".join("1" if (i + n) % 10 == k else "0" for k in range(6)) for i in range(ROWS)]
        (folder / "annotations" / f"{name}.csv").write_text("\n".join([",".join(CODE6), *lines]) + "\n")
    return folder


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy whose tables may be changed; the signals are linked."""
    (tmp_path / "annotations").mkdir()
    for file in (*published.glob("*.csv"), *published.glob("annotations/*.csv")):
        (tmp_path / file.relative_to(published)).write_bytes(file.read_bytes())
    (tmp_path / "ecg_tracings.hdf5").symlink_to(published / "ecg_tracings.hdf5")
    return tmp_path


def test_leads_come_out_in_standard_order(published):
    source = pickle.loads(pickle.dumps(open_source("code-test", published, {})))
    assert len(source.items) == ROWS and source.items[826].record_id == "test0826"
    assert {item.split for item in source.items} == {"test"} and source.tasks == {"code6": CODE6}
    chosen = source.items.take(np.array([0, FILLED[7], FILLED[9]]))
    for item, record in zip(chosen, source.read(chosen), strict=True):
        i = int(item.record_id[4:])
        np.testing.assert_array_equal(record.signal, (ecg(i) / 2).astype(np.float32))
        assert record.labels["code6"].tolist() == [int(i % 10 == k) for k in range(6)]
        assert (record.age, record.sex, record.split) == (20 + i % 60, float(i % 2 == 0), "test")
        assert record.group == record.record_id and record.patient_id is None
    assert source.about["lead_order"].startswith("I II III aVL aVF aVR V1")
    assert source.about["lead_order_checked_on"] == 40 and 1.4 < source.about["lead_II_peak_stored"] < 1.6
    assert source.about["positives"]["1dAVb"] == 83 and source.about["positives_published"]["1dAVb"] == 28


def test_the_folder_around_it_and_other_raters(folder):
    inner = folder / "all" / "data"
    inner.mkdir(parents=True)
    for name in ("annotations", "attributes.csv", "ecg_tracings.hdf5"):
        (inner / name).symlink_to(folder / name)
    plain, other = open_source("code-test", folder / "all", {}), open_source("code-test", folder, {"annotator": "dnn"})
    assert plain.items[0].where[3] == bytes([1, 0, 0, 0, 0, 0]) and other.items[0].where[3] == bytes(6)
    assert other.about["annotator"] == "dnn" and plain.about != other.about
    with pytest.raises(UsageError, match="did you mean 'cardiologist"):
        open_source("code-test", folder, {"annotator": "cardiologist"})


def test_columns_go_by_name(folder):
    path = folder / "annotations" / "gold_standard.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([",".join(CODE6[::-1]), *lines[1:]]) + "\n")
    assert open_source("code-test", folder, {}).items[0].where[3] == bytes([0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("name", ["attributes.csv", "annotations/gold_standard.csv"])
def test_one_row_more_or_less_is_refused(folder, name):
    text = (folder / name).read_text()
    for changed in (text.rsplit("\n", 2)[0] + "\n", text + text.splitlines()[-1] + "\n"):
        (folder / name).write_text(changed)
        with pytest.raises(DataError, match=f"{Path(name).name} has 82[68] rows, the CODE test set has 827"):
            open_source("code-test", folder, {})
    (folder / name).unlink()
    with pytest.raises(DataError, match="there is no"):
        open_source("code-test", folder, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": LEADS}, "order I II III aVR aVL aVF fits the data of 40 rows, and not I II III aVL aVF aVR"),
        ({"scale": 0.5}, r"lead II peaks at 0\.7.* 1\.48 as published.*Say scale=1"),
        ({"scale": 1000.0}, "lead II peaks at 1.48e"),
        ({"rows": 826}, "has 826 rows"),
        ({"dtype": "i2"}, "tracings holds int16"),
    ],
)
def test_another_file_is_refused(folder, change, message):
    (folder / "ecg_tracings.hdf5").unlink()
    tracings(folder / "ecg_tracings.hdf5", **change)
    with pytest.raises(DataError, match=message):
        open_source("code-test", folder, {})
    if "scale" in change:
        source = open_source("code-test", folder, {"scale": str(2 * change["scale"])})
        chosen = source.items.take(np.array([FILLED[3]]))
        expected = (ecg(FILLED[3]) / 2).astype(np.float32)
        np.testing.assert_allclose(next(source.read(chosen)).signal, expected, rtol=1e-6, atol=1e-9)


def test_mistakes(folder, tmp_path_factory):
    with pytest.raises(DataError, match=r"there is no .*ecg_tracings\.hdf5; give the folder that data\.zip"):
        open_source("code-test", tmp_path_factory.mktemp("none"), {})
    text = (folder / "attributes.csv").read_text()
    (folder / "attributes.csv").write_text(text.replace("\n20,M", "\n20,X", 1))
    with pytest.raises(DataError, match="sex='X', must be M, F or empty"):
        open_source("code-test", folder, {})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["attributes.csv", "annotations/gold_standard.csv", "ecg_tracings.hdf5"]),
    content=st.one_of(st.binary(max_size=200), st.text(st.sampled_from("01,\nagesx\"'"), max_size=40)),
)
def test_any_content(folder, file, content):
    path = folder / file
    before = None if file.endswith("hdf5") else path.read_bytes()
    link = path.readlink() if before is None else None
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        source = open_source("code-test", folder, {})
        assert all(isinstance(result, Record | Refused) for result in source.read(source.items[:3]))
    except EcgJaxError as error:
        assert error.exit_code in (2, 3)
    finally:
        path.unlink()
        if link:
            path.symlink_to(link)
        else:
            path.write_bytes(before)
