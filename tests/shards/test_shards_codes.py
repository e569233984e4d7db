"""Codes beside the shards: written, read for any selection, and refused where they belong to something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_source

from ecg_jax.errors import DataError
from ecg_jax.records import windows
from ecg_jax.shards import codes, tables
from ecg_jax.shards.catalog import Subset, open_folder
from ecg_jax.shards.convert import convert

BOOK = "0123abcd"
HOW = {"codebook": BOOK, "batch": 4}


def coded(data: Path, *, book: str = BOOK, mode: str = "robust", seed: int = 0, finish: bool = True) -> Path:
    """A folder of random codes and peaks for the shards of `data`."""
    folder = open_folder(data)
    path = folder.path / codes.expected_name(book, mode)
    done = {}
    for split in folder.splits:
        for shard in folder.shards(split):
            rng = np.random.default_rng([seed, shard.number, len(split)])
            found = rng.integers(0, 9, (shard.records, 256)).astype(np.uint16)
            peaks = rng.integers(-1, 999, (shard.records, 50)).astype(np.int16)
            ids = tables.read_shard(folder, shard).record_ids
            done[shard.path.name] = codes.write_files(path, shard, found, peaks, ids)
    codes.note(path, HOW, done)
    if finish:
        about = {"mode": mode, "id": windows.beats_id(mode), "detector": windows.detector(mode)}
        card = {"codebook": {"id": book, "config": {"codes": 9}}, "beats": about, "how": HOW, "files": done}
        codes.finish(path, card)
    return path


@pytest.fixture
def data(folder, tmp_path) -> Path:
    """A copy of the tiny data set."""
    return Path(shutil.copytree(folder, tmp_path / "tiny" / "1.2.3"))


def rewrite(path: Path, change) -> None:
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def test_codes_of_a_selection_are_those_of_its_records(data):
    path = coded(data)
    folder = open_folder(data)
    of = {}
    for split in folder.splits:
        for shard in folder.shards(split):
            ids = tables.read_shard(folder, shard).record_ids
            files = [np.load(path / f"{shard.path.name}.{kind}.npy") for kind in ("codes", "peaks")]
            of |= {name: pair for name, *pair in zip(ids, *files, strict=True)}
    assert len(of) == folder.card["counts"]["written"]
    gone = frozenset(int(g) for g in np.unique(folder.index("train")["group"])[::4])
    options = [{}, {"subset": Subset(0.4, offset=0.8)}, {"subset": Subset(records=20)}, {"exclude": gone}]
    for split in folder.splits:
        for more in options:
            table = tables.load([data], split, "main", codes=[path.name], **more)
            assert table.codes.shape == (len(table), 256) and table.codes.dtype == np.uint16
            assert table.rpeaks.shape == (len(table), 50) and table.rpeaks.dtype == np.int16
            for name, found, peaks in zip(table.record_ids, table.codes, table.rpeaks, strict=True):
                np.testing.assert_array_equal(found, of[name][0])
                np.testing.assert_array_equal(peaks, of[name][1])


def test_codes_of_several_folders_come_in_their_order(data, tmp_path):
    other = tmp_path / "other"
    source = tiny_source.source(40, name="other-set", splits=True, tasks={"main": ("b",)}, seed=5)
    second = Path(convert(source, other)["path"])
    names = [coded(data), coded(second, seed=1)]
    both = tables.load([data, second], "train", "", codes=names)
    one, two = (tables.load([f], "train", "", codes=[n]) for f, n in zip((data, second), names, strict=True))
    np.testing.assert_array_equal(both.codes, np.concatenate([one.codes, two.codes]))
    np.testing.assert_array_equal(both.rpeaks, np.concatenate([one.rpeaks, two.rpeaks]))
    with pytest.raises(DataError, match="1 folders of codes for 2 data folders"):
        tables.load([data, second], "train", "", codes=names[:1])
    strange = coded(second, book="77777777")
    with pytest.raises(DataError, match=r"codebook 77777777.*take one codebook"):
        tables.load([data, second], "train", "", codes=[names[0], strange])
    lead_one = coded(second, mode="heartlang")
    with pytest.raises(DataError, match=r"heartlang beats.*robust beats"):
        tables.load([data, second], "train", "", codes=[names[0], lead_one])


def test_what_is_no_finished_folder_is_refused_with_the_command(data):
    folder = open_folder(data)
    with pytest.raises(DataError, match=r"no such folder \(codes beside these shards: none\); run `ecg-jax tokenize"):
        codes.open_codes(folder, codes.expected_name(BOOK, "robust"))
    path = coded(data, finish=False)
    with pytest.raises(DataError, match="did not finish"):
        codes.open_codes(folder, path)
    coded(data)
    assert not (path / codes.STATE).exists()
    assert codes.open_codes(folder, path.name).codebook == BOOK
    assert codes.open_codes(folder, path, codebook=BOOK, mode="robust").mode == "robust"
    with pytest.raises(DataError, match=f"beside these shards: {path.name}"):
        codes.open_codes(folder, "codes-ffffffff-00000000")


def test_codes_of_something_else_are_refused(data, tmp_path):
    folder, path = open_folder(data), coded(data)
    card = path / "card.json"
    good = card.read_text()
    with pytest.raises(DataError, match="codes of codebook 0123abcd, wanted are those of 99999999"):
        codes.open_codes(folder, path, codebook="99999999")
    with pytest.raises(DataError, match="codes of 'robust' beats, wanted is 'heartlang'"):
        codes.open_codes(folder, path, mode="heartlang")
    renamed = Path(shutil.copytree(path, data / codes.expected_name("99999999", "robust")))
    with pytest.raises(DataError, match=f"{renamed}: holds what belongs to {path.name}"):
        tables.load([data], "train", "", codes=[renamed.name])

    def older(card):
        card["beats"] |= {"id": "00000000", "detector": "robust-0"}

    old = Path(shutil.copytree(path, data / f"codes-{BOOK}-00000000"))
    rewrite(old / "card.json", older)
    with pytest.raises(DataError, match=r"beats 00000000 \(detector robust-0\), this release cuts"):
        codes.open_codes(folder, old)

    first = folder.card["files"][0]["file"]
    rewrite(card, lambda c: c["files"][first].update(shard_sha256="0" * 64))
    with pytest.raises(DataError, match=f"not the codes of .*{first} as it is now"):
        codes.open_codes(folder, path)
    card.write_text(good)
    rewrite(card, lambda c: c["files"].pop(first))
    with pytest.raises(DataError, match=f"not the codes of .*{first} as it is now"):
        codes.open_codes(folder, path)
    card.write_text(good)
    rewrite(card, lambda c: c.update(format=99))
    with pytest.raises(DataError, match="format 99, this release reads 1"):
        codes.open_codes(folder, path)
    for broken in ("{", "[1]", "", json.dumps({"format": 1}), json.dumps({"format": 1, "codebook": 3, "beats": []})):
        card.write_text(broken)
        with pytest.raises(DataError, match=r"card\.json: is damaged") as error:
            codes.open_codes(folder, path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", codes.KINDS)
@pytest.mark.parametrize("how", ["missing", "short", "flipped", "empty"])
def test_damaged_files_are_refused_by_name(data, kind, how):
    path = coded(data)
    shard = max(open_folder(data).shards("train"), key=lambda s: s.records)
    file = path / f"{shard.path.name}.{kind}.npy"
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]
        file.write_bytes({"short": content[:-10], "flipped": flipped, "empty": b""}[how])
    with pytest.raises(DataError) as error:
        tables.load([data], "train", "main", codes=[path])
    assert str(file) in str(error.value) and "ecg-jax tokenize" in str(error.value)


def test_codes_of_other_records_are_refused(data):
    path = coded(data)
    folder = open_folder(data)
    shard = max(folder.shards("train"), key=lambda s: s.records)
    ids = tables.read_shard(folder, shard).record_ids
    found = np.zeros((shard.records, 256), np.uint16), np.zeros((shard.records, 50), np.int16)
    for wrong, pattern in (
        ([*ids[:-1], "stranger"], "'stranger' where the shard has another record"),
        (ids[:-1], "holds"),
    ):
        entry = codes.write_files(path, shard, *found, wrong)
        rewrite(path / "card.json", lambda card, entry=entry: card["files"].update({shard.path.name: entry}))
        with pytest.raises(DataError, match=pattern):
            tables.load([data], "train", "main", codes=[path])


def test_begun_folders_keep_what_is_whole_and_of_the_same_making(data):
    folder = open_folder(data)
    path = coded(data, finish=False)
    shards = [shard for split in folder.splits for shard in folder.shards(split)]
    names = {shard.path.name for shard in shards}
    assert set(codes.begin(path, shards, HOW)) == names
    assert codes.begin(path, shards, HOW | {"batch": 5}) == {}
    coded(data)
    assert set(codes.begin(path, shards, HOW)) == names
    hurt = path / f"{shards[0].path.name}.peaks.npy"
    hurt.write_bytes(hurt.read_bytes()[:-1])
    (path / f"{shards[1].path.name}.ids.npy").unlink()
    rewrite(path / "card.json", lambda c: c["files"][shards[2].path.name].update(shard_sha256="0"))
    rewrite(path / "card.json", lambda c: c["files"].pop(shards[3].path.name))
    rewrite(path / "card.json", lambda c: c["files"][shards[4].path.name].pop("codes_crc32c"))
    assert set(codes.begin(path, shards, HOW)) == names - {shard.path.name for shard in shards[:5]}
    (path / "card.json").write_text("{")
    assert codes.begin(path, shards, HOW) == {}


def test_codes_do_not_hide_the_data_folder(data):
    coded(data)
    assert open_folder(data).path == data
    assert open_folder(data.parent).path == data and open_folder(data.parent.parent).path == data
