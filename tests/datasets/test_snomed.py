"""Header comments of the Challenge sets, their code table, their folders, and MERL's published splits."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecg_jax.datasets import snomed
from ecg_jax.datasets.snomed import Facts, code_labels, find_records, parse_comments, read_facts, read_merl
from ecg_jax.errors import DataError, UsageError

HEAD = b"JS00001 12 500 5000\nJS00001.mat 16+24 1000/mV 16 0 -254 21756 0 I\n"


def said(*lines: str) -> Facts:
    return parse_comments(HEAD + "\n".join(lines).encode())


def test_table():
    assert len(snomed.ABBREVIATIONS) == len(set(snomed.ABBREVIATIONS.values())) == 133
    assert len(snomed.SCORED) == 26 and sum(len(codes) for codes in snomed.SCORED) == 30
    assert snomed.SCORED_NAMES[:6] == ("AF", "AFL", "BBB", "Brady", "CLBBB", "CRBBB")
    column = {name: i for i, name in enumerate(snomed.SCORED_NAMES)}
    for name, *codes in (("CRBBB", "713427006", "59118001"), ("CLBBB", "733534002", "164909002")):
        assert {snomed.SCORED_COLUMN[code] for code in codes} == {column[name]}
    for name, *codes in (("PAC", "284470004", "63593006"), ("PVC", "427172004", "17338001")):
        assert {snomed.SCORED_COLUMN[code] for code in codes} == {column[name]}
    assert (
        "164884008" not in snomed.SCORED_COLUMN
    )  # ventricular ectopics: CPSC's PVC, which the Challenge does not score


def test_table_as_published(shared_data):
    published, scored = {}, set()
    for name in ("dx_mapping_scored.csv", "dx_mapping_unscored.csv"):
        with open(shared_data / "challenge_dx_mapping" / name, newline="") as file:
            rows = {row["SNOMEDCTCode"]: row["Abbreviation"] for row in csv.DictReader(file)}
        published |= rows
        scored |= rows.keys() if not scored else set()
    assert published == snomed.ABBREVIATIONS and scored == snomed.SCORED_COLUMN.keys()
    with open(shared_data / "challenge_dx_mapping" / "weights.csv", newline="") as file:
        assert tuple(next(csv.reader(file))[1:]) == tuple("|".join(codes) for codes in snomed.SCORED)


@pytest.mark.parametrize(
    ("lines", "codes", "words", "age", "sex"),
    [
        (("#Age: 85", "#Sex: Male", "#Dx: 164889003,59118001"), ("59118001", "164889003"), (), 85, 1),
        (("# Age: 57", "# Sex: Female", "# Dx: 426783006"), ("426783006",), (), 57, 0),
        (("#Age: NaN", "#Sex: Unknown", "#Dx: Unknown"), (), (), None, None),
        (("#Age: -1", "#Sex: Unknows", "#Dx:"), (), (), None, None),
        (("#Dx: 426177001,164934002,", "#Age: 0"), ("164934002", "426177001"), (), 0, None),
        (("#Dx: 284470004,, 284470004 ,",), ("284470004",), (), None, None),
        (("#Dx: 6180003,251238007",), ("6180003", "251238007"), (), None, None),
        (("#Dx: AF,RBBB",), (), ("AF", "RBBB"), None, None),
        (("#Dx: 164889003 59118001",), (), ("164889003 59118001",), None, None),
        (("#Dx: 164889003,0164889003,12345,1e9",), ("164889003",), ("0164889003", "12345", "1e9"), None, None),
        (("#DX : 164889003\r", "#sex: F\r", "#AGE: 61.5\r"), ("164889003",), (), 61.5, 0),
        (("Dx: 164889003", "Age: 5"), (), (), None, None),
        (("#Rx: 164889003", "#Hx: 59118001"), (), (), None, None),
        (("#Age: 200",), (), (), None, None),
    ],
)
def test_comments(lines, codes, words, age, sex):
    facts = said(*lines)
    assert (facts.codes, facts.words, facts.unread) == (codes, words, ())
    assert math.isnan(facts.age) if age is None else facts.age == age
    assert math.isnan(facts.sex) if sex is None else facts.sex == sex


def test_what_is_not_understood_is_named():
    facts = said("#Age: 58Y", "#Sex: divers")
    assert facts.unread == ("age", "sex") and math.isnan(facts.age) and math.isnan(facts.sex)
    facts = said("#Age: 58", "#Age: 59", "#Sex: Male", "#Sex: Male")
    assert facts.unread == ("age",) and math.isnan(facts.age) and facts.sex == 1
    assert said("#Age: 1_0").unread == ("age",) and said("#Age: ٣٣").unread == ("age",)


def test_comments_of_a_header_whose_first_lines_are_broken():
    facts = parse_comments(b"JS01052 12 500 500000/mV 16 0 15 31255 0 I\n#Dx: 426177001,\n#Age: 33\n")
    assert facts.codes == ("426177001",) and facts.age == 33


def test_gains():
    text = b"E1.mat 12 500 5000 05-May-2020 14:50:55\nE1.mat 16+24 4880/mV 16 0 1 2 0 I\n"
    text += b"E1.mat 16x1+24 1000.0(0)/mV 0 II\n"
    assert parse_comments(text).gains == (1000.0, 4880.0)
    assert parse_comments(HEAD).gains == (1000.0,)


def test_labels_are_zero_only_where_everything_was_understood():
    column = {"59118001": 0, "713427006": 0, "164889003": 1}
    assert code_labels(Facts(codes=("713427006",)), column, 3).tolist() == [1, 0, 0]
    assert code_labels(Facts(codes=("6180003",)), column, 3).tolist() == [0, 0, 0]
    assert code_labels(Facts(codes=("164889003",), words=("RBBB?",)), column, 3).tolist() == [-1, 1, -1]
    assert code_labels(Facts(), column, 3).tolist() == [-1, -1, -1]


def test_too_many_codes(tmp_path):
    every = [Facts(codes=tuple(str(10**6 + i) for i in range(1001)))]
    with pytest.raises(DataError, match="1001 different codes"):
        snomed.all_codes(tmp_path, every)
    assert snomed.all_codes(tmp_path, [Facts(codes=("59118001", "6374002"))]) == ("6374002", "59118001")


def test_headers_that_cannot_be_read(tmp_path):
    (tmp_path / "E00001.hea").write_bytes(HEAD + b"#Dx: 426783006\n")
    (tmp_path / "E00002.hea").write_bytes(b"#" * (snomed.MAX_HEADER + 1))
    (tmp_path / "E00003.hea").mkdir()
    one, two, three, four, none = read_facts(tmp_path, ["E00001", "E00002", "E00003", "E00004", None])
    assert one.codes == ("426783006",) and one.refused is None
    assert two.refused == (
        "unreadable-header",
        f"{tmp_path}/E00002.hea is longer than 65536 bytes: no header of an ECG",
    )
    assert three.refused[0] == four.refused[0] == "unreadable-header" and none.refused is None


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.tuples(st.sampled_from(["#Dx: ", "# Age:", "#Sex: ", "#dx:", "x ", "#"]), st.text(max_size=40)),
            max_size=6,
        ).map(lambda lines: "\n".join(a + b for a, b in lines).encode("utf-8", "surrogatepass")),
    )
)
def test_any_header_gives_clean_facts(text):
    facts = parse_comments(text)
    assert all(code.isascii() and code.isdecimal() and 6 <= len(code) <= 18 for code in facts.codes)
    assert len(set(facts.codes)) == len(facts.codes) and list(facts.codes) == sorted(facts.codes, key=int)
    assert math.isnan(facts.age) or 0 <= facts.age <= 130
    assert math.isnan(facts.sex) or facts.sex in (0.0, 1.0)
    assert set(code_labels(facts, snomed.SCORED_COLUMN, 26).tolist()) <= {-1, 0, 1}


def test_find_records(tmp_path):
    for name in (
        "g1/E00002.hea",
        "g1/E00002.mat",
        "g2/E00001.hea",
        "E00003.mat",
        "HR00001.hea",
        "xE00004.hea",
        "T.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_records(tmp_path, r"E\d{5}", ("T.csv",))
    assert found.headers == {"E00001": "g2/E00001", "E00002": "g1/E00002"}
    assert found.signals == {"E00002": ("g1/E00002",), "E00003": ("E00003",)} and found.tables == ("T.csv",)
    assert found.others == {"HR00001", "xE00004"} and found.ids() == ["E00001", "E00002", "E00003"]
    (tmp_path / "E00001.hea").touch()
    with pytest.raises(DataError, match=r"E00001 is there twice, as E00001\.hea and g2/E00001\.hea"):
        find_records(tmp_path, r"E\d{5}")


def write_merl(folder, **text):
    for split in ("train", "val", "test"):
        (folder / f"x_{split}.csv").write_text(text.get(split, f"path,age,A,B\n/d/E0000{len(split)}.mat,12,1,0\n"))


def merl(folder):
    return read_merl(str(folder), "x", "path", ("path", "age"), r"E\d{5}")


def test_merl(tmp_path):
    (tmp_path / "x").mkdir()
    write_merl(tmp_path / "x", val="path,age,A,B\n")
    read = merl(tmp_path)
    assert read.columns == ("A", "B") and {r: s for r, (s, _) in read.rows.items()} == {
        "E00005": "train",
        "E00004": "test",
    }
    assert read.rows["E00005"][1].tolist() == [1, 0] and read.rows["E00005"][1].dtype == np.int8
    assert read.records == {"train": 1, "val": 0, "test": 1} and sorted(read.tables_sha256) == [
        "x_test.csv", "x_train.csv", "x_val.csv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,age,A,C\n", "x_val.csv: its label columns"),
        ("path,A,B\n", "no column 'age'"),
        (
            "path,age,A,B\n/d/E00005.mat,12,1,0\n",
            r"x_val\.csv:2: path='/d/E00005.mat' is there twice \(also in train\)",
        ),
        ("path,age,A,B\n/d/5.mat,12,1,0\n", "names no record"),
        ("path,age,A,B\n/d/E٠٠٠٠٠.mat,12,1,0\n", "names no record"),
        ("path,age,A,B\n/d/E00001.mat,12,1,0.5\n", r"x_val\.csv:2: B='0\.5' is neither 0 nor 1"),
        ("path,age,A,B\n/d/E00001.mat,12,1\n", "3 cells under 4"),
        ("", "is empty"),
    ],
)
def test_bad_merl_tables(tmp_path, text, message):
    write_merl(tmp_path, val=text)
    with pytest.raises(DataError, match=message):
        merl(tmp_path)


def test_merl_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        merl(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"x_train\.csv"):
        merl(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=120), st.text('path,ageAB\n\r"E0123456789./-', max_size=120).map(str.encode)))
def test_any_merl_table_is_read_or_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("merl", numbered=True)
    write_merl(folder)
    (folder / "x_val.csv").write_bytes(content)
    try:
        assert merl(folder).columns == ("A", "B")
    except DataError as error:
        assert "x_val.csv" in str(error) and "\n" not in str(error)
