"""ICU labels of MDS-ED: the published table, the rule at its edges, splits, and hostile tables."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import open_source
from ecg_jax.datasets.mimic_icu import icu_labels
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.evaluation.tasks import domains
from ecg_jax.records.record import Record, Refused
from ecg_jax.shards.convert import convert

LIST_HEAD = "subject_id,study_id,file_name,ecg_time,path"
MDS_HEAD = (
    "general_file_name,general_study_id,general_subject_id,general_ecg_time,general_anchor_age,general_strat_fold,"
    "general_ecg_no_within_stay,general_data,demographics_age,demographics_gender,deterioration_severe_hypoxemia,"
    "deterioration_icu_24h,deterioration_icu_stay"
)
ED_HEAD = "subject_id,hadm_id,stay_id,intime,outtime,gender,race,arrival_transport,disposition"
ICU_HEAD = "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los"
ICD_HEAD = "study_id,subject_id,all_diag_all,gender,age,anchor_age,strat_fold"
# study -> (subject, minutes after its patient's arrival at 12:00), in the order of the list
STUDIES = {
    11: (1, 0), 12: (1, 90), 13: (1, 91), 14: (1, -1), 21: (2, 10), 31: (3, 10), 32: (3, 20), 41: (4, 5), 51: (5, 5),
    61: (6, 5), 71: (7, 5), 81: (8, 5), 99: (9, 5),
}  # fmt: skip


def clock(minutes: float, day: int = 10) -> str:
    seconds = round(12 * 3600 + minutes * 60)
    return (
        f"2180-03-{day + seconds // 86400:02d} {seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    )


def write_signal(stem: Path, seed: int) -> None:
    """Format 16, 200 units per mV, MIMIC's order of leads: beats that grow from lead to lead."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(5000) / 500
    beat = np.exp(-((((time * (1 + 0.05 * seed)) % 0.8 - 0.4) / 0.02) ** 2)) + 0.02 * np.sin(7 * time + seed)
    one, two = 0.6 * beat, np.roll(beat, 3)
    limbs = [one, two, two - one, -(one + two) / 2, two - one / 2, one - two / 2]
    digital = np.rint(200 * np.stack([*limbs, *(np.roll(beat, k) for k in range(6))], axis=1)).astype("<i2")
    stem.with_suffix(".dat").write_bytes(digital.tobytes())
    lines = [f"{stem.name} 12 500 5000"]
    for k, lead in enumerate(("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")):
        total = int(digital[:, k].astype(int).sum()) % 65536
        lines.append(f"{stem.name}.dat 16 200(0)/mV 16 0 {digital[0, k]} {total} 0 {lead}")
    stem.with_suffix(".hea").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The list of records, and the tables that the labels are made from; signals for the first three studies."""
    rows = [f"{s},{k},{k},{clock(at)},files/p0/p{s}/s{k}/{k}" for k, (s, at) in STUDIES.items()]
    (tmp_path / "record_list.csv").write_text("\n".join([LIST_HEAD, *rows]) + "\n")
    for seed, study in enumerate((11, 12, 13)):
        write_signal(tmp_path / f"files/p0/p1/s{study}/{study}", seed)
    stay = "2180-03-10 12:00:00,2180-03-10 20:00:00"
    ed = [f"{s},{f'{100 + s}.0' if s != 8 else ''},{30 + s},{stay},{'MF'[s % 2]},WHITE,WALK IN,X" for s in range(1, 9)]
    ed.append("3,,50,2180-03-10 12:15:00,2180-03-10 20:00:00,F,WHITE,WALK IN,X")  # patient 3 is back after a quarter
    (tmp_path / "edstays.csv").write_text("\n".join([ED_HEAD, *ed]) + "\n")
    icu = [  # hadm, minutes after arrival: two stays of 101 in the wrong order
        (1, 3000), (1, 600), (2, 90), (3, 90 - 1 / 60), (4, 24 * 60), (5, 24 * 60 + 1 / 60), (6, -30),
    ]  # fmt: skip
    lines = [f"{s},{100 + s},{70 + n},MICU,MICU,{clock(at)},{clock(at + 60)},1.0" for n, (s, at) in enumerate(icu)]
    with gzip.open(tmp_path / "icustays.csv.gz", "wt") as file:
        file.write("\n".join([ICU_HEAD, *lines]) + "\n")
    return tmp_path


AGAIN = {"edstays": "edstays.csv", "icustays": "icustays.csv.gz"}


def labels(source) -> dict[int, list[int]]:
    return {int(item.record_id): item.where["labels"]["icu"].tolist() for item in source.items}


def test_rule_at_its_edges():
    hour = 3600
    assert icu_labels(0, None) == (0, 0)
    assert icu_labels(0, -hour) is None and icu_labels(0, 0) is None and icu_labels(0, hour * 3 // 2 - 1) is None
    assert icu_labels(0, hour * 3 // 2) == (1, 1) and icu_labels(0, 24 * hour) == (1, 1)
    assert icu_labels(0, 24 * hour + 1) == (0, 1)


def test_labels_made_again(folder):
    source = pickle.loads(pickle.dumps(open_source("mimic-icu", folder, AGAIN)))
    assert source.tasks == {"icu": ("ICU_24H", "ICU_stay")}
    assert labels(source) == {
        11: [1, 1], 12: [1, 1],  # of two unsorted ICU stays the first in time, after ten hours, counts
        21: [1, 1],  # after exactly an hour and a half
        32: [0, 0],  # of two arrivals the later one, which led to no hospital stay
        41: [1, 1], 51: [0, 1],  # after exactly a day, and a second later
        71: [0, 0], 81: [0, 0],  # no ICU; no hospital stay at all
    }  # fmt: skip
    # 13 and 14 lie outside the 90 minutes, 99 was never in the ED; 31 a second early, 61 was in an ICU before arrival.
    assert source.skipped == {"not in the cohort": 3, "ICU within 1.5 h": 2}
    assert len(source.items) + sum(source.skipped.values()) == len(STUDIES)
    assert {item.split for item in source.items} == {None} and source.items[0].where["sex"] == 0.0
    assert source.about["diagnoses"].startswith("not known") and len(source.about["tables_sha256"]) == 3


def test_labels_made_again_with_folds(folder):
    rows = [
        f"{study},{s},\"['I10']\",F,91,91,{17 + s % 3}" for study, (s, _) in STUDIES.items() if study not in (71, 81)
    ]
    rows.append("71,7,[],F,40,40,3")  # no diagnosis, and 81 is not there at all
    (folder / "icd.csv").write_text("\n".join([ICD_HEAD, *rows]) + "\n")
    source = open_source("mimic-icu", folder, AGAIN | {"icd": "icd.csv"})
    splits = {int(item.record_id): item.split for item in source.items}
    assert splits == {11: "val", 21: "test", 32: "train", 41: "val", 51: "test"}
    assert source.skipped["no diagnosis"] == 2 and source.items[0].where["age"] == 90.0
    assert source.skipped["not the first ECG of its stay (validation and test)"] == 1  # study 12
    swapped = open_source("mimic-icu", folder, AGAIN | {"icd": "icd.csv", "folds": "18/17/20"})
    assert {int(item.record_id) for item in swapped.items if item.split == "train"} == {11, 12, 41}
    assert swapped.skipped["fold outside the option folds"] == 2


def mds(study: int, fold: int, day: object, stay: object, number: object = 0, **more: object) -> str:
    subject, row = STUDIES[study][0], list(STUDIES).index(study)
    own = {"anchor": 50, "age": 55.0, "sex": 1, "subject": subject} | more
    path = f"mimic-iv-ecg-diagnostic-electrocardiogram-matched-subset-1.0/files/p0/p{subject}/s{study}/{study}"
    return (
        f"{path},{study},{own['subject']},{clock(0)},{own['anchor']},{fold},{number},{row},{own['age']},{own['sex']},"
        f"-999.0,{day},{stay}"
    )


PUBLISHED = [
    mds(12, 3, 0.0, 0.0, number=1), mds(11, 3, 1.0, 1.0), mds(21, 18, 0.0, 1.0), mds(31, 19, -999.0, -999.0),
    mds(32, 19, 0, 0, number=1), mds(41, 19, 0.0, 1.0, anchor=91, sex=0, age=""), mds(51, 18, "", ""),
    mds(61, 17, 1, 1),
]  # fmt: skip


def write_mds(folder: Path, rows: list[str], head: str = MDS_HEAD) -> None:
    (folder / "mds_ed.csv").write_text("\n".join([head, *rows]) + "\n")


def test_published_table(folder):
    write_mds(folder, PUBLISHED)
    source = pickle.loads(pickle.dumps(open_source("mimic-icu", folder, {})))
    assert labels(source) == {11: [1, 1], 12: [0, 0], 21: [0, 1], 41: [0, 1], 61: [1, 1]}
    splits = {int(item.record_id): item.split for item in source.items}
    assert splits == {11: "train", 12: "train", 21: "val", 41: "test", 61: "train"}
    assert source.skipped == {
        "ICU within 1.5 h": 1,
        "no ICU label": 1,
        "not the first ECG of its stay (validation and test)": 1,
        "not in the cohort": 5,
    }
    assert len(source.items) + sum(source.skipped.values()) == len(STUDIES)
    where = {int(item.record_id): item.where for item in source.items}
    assert (where[11]["age"], where[11]["sex"], where[41]["age"], where[41]["sex"]) == (55.0, 1.0, 90.0, 0.0)
    assert source.about["joined_by"] == "general_study_id" and source.about["id_space"] == "mimic"
    folds = open_source("mimic-icu", folder, {"folds": "17/18/19"})
    assert folds.skipped["fold outside the option folds"] == 2 and len(folds.items) == 3


def test_spellings_and_joins_of_the_published_table(folder):
    """Capitals as the publisher's code had them; without study ids the row of the list counts, checked by patient."""
    head = MDS_HEAD.replace("icu_24h", "ICU_24H").replace("icu_stay", "ICU_stay").replace("general_study_id", "x")
    write_mds(folder, PUBLISHED, head)
    source = open_source("mimic-icu", folder, {"labels": "mds_ed.csv"})
    assert labels(source) == {11: [1, 1], 12: [0, 0], 21: [0, 1], 41: [0, 1], 61: [1, 1]}
    assert source.about["joined_by"] == "general_data"
    shifted = mds(61, 17, 1, 1).replace(f",{list(STUDIES).index(61)},", ",2,")  # that row is another patient's
    write_mds(folder, [*PUBLISHED, shifted], head)
    with pytest.raises(DataError, match="not of one release"):
        open_source("mimic-icu", folder, {})


def test_rows_listed_again_and_studies_without_recording(folder):
    other = mds(11, 3, 0.0, 1.0)
    extra = mds(99, 3, 1.0, 1.0).replace(",99,", ",98,")
    write_mds(folder, [*PUBLISHED, other, extra, extra.replace(",98,", ",97,").replace("1.0,1.0", "-999,-999")])
    source = open_source("mimic-icu", folder, {})
    found = {item.record_id: item.where for item in source.items}
    assert found["11"]["labels"]["icu"].tolist() == [-1, 1] and source.about["listed_again"] == 1
    assert found["98"]["path"] is None and source.about["labelled_without_recording"] == 2
    assert source.skipped["ICU within 1.5 h"] == 2
    read = dict(zip([item.record_id for item in source.items], source.read(source.items), strict=True))
    assert isinstance(read["98"], Refused) and read["98"].reason == "missing-file"


def test_converts_whole_and_is_contaminated_by_mimic_iv_ecg(folder, tmp_path):
    write_mds(folder, PUBLISHED)
    card = convert(open_source("mimic-icu", folder, {}), tmp_path / "out")
    assert card["counts"]["items"] == 5 and card["counts"]["written"] == 2 and card["refused"] == {"missing-file": 3}
    assert card["positives"]["icu"]["train"] == [1, 1] and card["known"]["icu"]["train"] == [2, 2]
    whole = convert(open_source("mimic-iv-ecg", folder, {}), tmp_path / "out", limit=2)
    assert card["lineage"][0]["id_space"] == whole["lineage"][0]["id_space"] == "mimic"
    assert domains(["ICU_24H"], [], card["lineage"], whole["lineage"]) == ["contaminated"]
    assert domains(["ICU_24H"], [], card["lineage"], [{"dataset": "mimic-iv-ecg"}]) == ["contaminated"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "x"}, "did you mean 'labels'"),
        ({"edstays": "edstays.csv"}, "are needed together"),
        (AGAIN | {"labels": "mds_ed.csv"}, "labels= is the published table"),
        (AGAIN | {"folds": "0-17/18/19"}, "folds= needs icd=FILE"),
        ({"patients": "patients.csv"}, "go with edstays="),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(UsageError, match=message):
        open_source("mimic-icu", folder, options)


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ([], MDS_HEAD, "no row of it is in record_list.csv"),
        ([mds(11, 3, 2.0, 1.0)], MDS_HEAD, r"mds_ed.csv:2: deterioration_icu_24h='2.0', MDS-ED has 0, 1 and -999"),
        ([mds(11, 3, 1.0, 0.0)], MDS_HEAD, "which cannot be"),
        ([mds(11, 3, 1, 1, sex="X")], MDS_HEAD, "demographics_gender='X'"),
        ([mds(11, 3, 1, 1, subject=2)], MDS_HEAD, "not of one release"),
        ([mds(11, "x", 1, 1)], MDS_HEAD, "general_strat_fold='x' is no whole number"),
        ([], MDS_HEAD.replace("icu_stay", "icu"), "no column 'deterioration_icu_stay'"),
        ([], MDS_HEAD.replace("general_study_id", "a").replace("general_data", "b"), "tells which ECG"),
        ([], MDS_HEAD.replace("severe_hypoxemia", "ICU_24h"), "differ by case alone"),
    ],
)
def test_bad_published_tables(folder, rows, head, message):
    write_mds(folder, rows, head)
    with pytest.raises(DataError, match=message) as caught:
        open_source("mimic-icu", folder, {})
    assert "\n" not in str(caught.value)


def test_missing_and_bad_stay_tables(folder):
    with pytest.raises(DataError, match=r"mds_ed\.csv.*edstays=FILE"):
        open_source("mimic-icu", folder, {})
    good = (folder / "edstays.csv").read_text()
    for old, new, message in (
        ("1,101.0,31,2180-03-10 12:00:00", "1,101.0,31,", "edstays.csv:2: intime='' is no time"),
        ("101.0", "A", "hadm_id='A' is no whole number"),
        ("103.0,33", "103.0,34", "stay_id 34 is there twice"),
    ):
        (folder / "edstays.csv").write_text(good.replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            open_source("mimic-icu", folder, AGAIN)
    with pytest.raises(DataError, match=r"no column 'gender'"):
        open_source("mimic-icu", folder, AGAIN | {"edstays": "icustays.csv.gz"})


CELLS = st.sampled_from(
    ["", "0", "1", "-1", "-999", "11", "1e300", "inf", "nan", "²", "9" * 30, "\0", "x", "2180-03-10"]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_tables_are_errors_of_one_line(folder, data):
    again = data.draw(st.booleans())
    write_mds(folder, PUBLISHED)
    name = data.draw(
        st.sampled_from(["edstays.csv", "record_list.csv"] if again else ["mds_ed.csv", "record_list.csv"])
    )
    good = (folder / name).read_bytes()
    if data.draw(st.booleans()):
        rows = [line.split(b",") for line in good.split(b"\n")]
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(CELLS).encode()
        spoilt = b"\n".join(b",".join(cells) for cells in rows)
    else:
        cut = data.draw(st.integers(0, len(good)))
        spoilt = good[:cut] + data.draw(st.binary(max_size=4)) + good[cut + data.draw(st.integers(0, 9)) :]
    try:
        (folder / name).write_bytes(spoilt)
        source = open_source("mimic-icu", folder, AGAIN if again else {})
        assert all(set(item.where["labels"]["icu"]) <= {-1, 0, 1} for item in source.items if item.where["path"])
        assert all(isinstance(one, Record | Refused) for one in source.read(source.items))
    except EcgJaxError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(good)
