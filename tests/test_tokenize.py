"""Codes of data folders: right record by record, the same after a kill, and refused where they would mean nothing."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ecg_jax import cli, codebook, files
from ecg_jax import tokenize as tokenize_lib
from ecg_jax.errors import DataError, InterruptedRun, UsageError
from ecg_jax.models import coder, inputs, vqhbr
from ecg_jax.records import windows, xqrs
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards import codes as codes_lib
from ecg_jax.shards import tables
from ecg_jax.shards.catalog import open_folder
from ecg_jax.tokenize import result_lines, tokenize

CONFIG = vqhbr.Config(width=16, encoder_layers=1, decoder_layers=1, heads=1, head_size=8, mlp=16, codes=40, code_dim=8)
INFO = {
    "scale": "gain",
    "beats": "robust",
    "detector": windows.detector("robust"),
    "chain": "default",
    "indices": True,
    "leads": [],
    "unit": "mV",
    "usage": [],
    "lineage": [{"dataset": "elsewhere"}],
    "source": "trained",
}
RECORDS = 100


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    """Compile fast, and keep programs in a folder of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """Simulated ECGs, converted: 8 shards of train, 1 of val and test each."""
    out = tmp_path_factory.mktemp("simulated")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["convert", "synthetic", "--out", str(out), "--option", f"records={RECORDS}"]) == 0
    return out / "synthetic" / "1.0.0"


@pytest.fixture
def data(simulated, tmp_path) -> Path:
    return Path(shutil.copytree(simulated, tmp_path / "synthetic" / "1.0.0"))


@pytest.fixture
def book(tmp_path):
    """Makes a codebook of random weights: `book(scale="mv")`, or of another configuration."""

    def make(config: vqhbr.Config = CONFIG, **info) -> Path:
        params = jax.tree.map(np.asarray, jax.jit(lambda key: vqhbr.init(config, key))(jax.random.key(3)))
        codebook.save(tmp_path / "book", config, params, INFO | info)
        return tmp_path / "book"

    return make


@pytest.fixture
def two_sizes(monkeypatch):
    """Fewer programs to compile."""
    monkeypatch.setattr(coder, "SIZES", (144, 256))


@pytest.fixture
def quick_codes(monkeypatch):
    """No network: a record's codes are a checksum of it, so that only what surrounds the network is tested."""

    def encode(self, signal, valid, peaks):
        self.records += len(signal)
        n = (peaks >= 0).sum(1)
        out = np.full((len(signal), 256), NO_CODE, np.uint16)
        for row, one, beats in zip(out, signal, n, strict=True):
            row[: 12 * min(beats, 21)] = np.abs(one.astype(int)).sum() % self.config.codes
        return out

    monkeypatch.setattr(coder.Coder, "encode", encode)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def run(data: Path, book: Path, **more) -> tuple[dict, Path]:
    report = tokenize([data], book, quiet=True, **more)
    return report, Path(report["data"][0]["path"])


# ------------------------------------------------------------------------------------------------- right or wrong


@pytest.mark.parametrize(
    ("mode", "scale", "indices"), [("robust", "gain", True), ("robust", "mv", False), ("heartlang", "mv", True)]
)
def test_codes_are_those_of_each_record_alone(data, book, two_sizes, mode, scale, indices):
    """Beside the tokens that `records.windows` cuts, encoded one record at a time with all slots."""
    where = book(scale=scale, indices=indices)
    report, _ = run(data, where, beats=mode, batch=16)
    found = codebook.load(where)
    name = codes_lib.expected_name(found.id, mode)
    table = tables.load([data], "train", "", codes=[name])
    stored = tables.load([data], "train", "")

    @jax.jit
    def alone(x, valid, tokens, lead, time, there):
        lead_time = (lead, time) if indices else (None, None)
        z = vqhbr.encode(CONFIG, found.params, tokens[None], *(i if i is None else i[None] for i in lead_time), there)
        return z[0] @ found.params["codebook"].T

    doubtful = 0
    for i in range(len(table)):
        valid = stored.valid[i]
        x, _, _ = inputs.to_input(stored.signal[i : i + 1], valid[None], scale=scale)
        own = stored.rpeaks[i][stored.rpeaks[i] >= 0]
        if mode == "heartlang":
            (own,) = xqrs.peaks(stored.signal[i : i + 1], valid[None])
        assert table.rpeaks[i][table.rpeaks[i] >= 0].tolist() == own.tolist()
        tokens, lead, time, n = windows.tokens(np.asarray(x[0]), own, (valid[0], valid.sum()), mode)
        there = lead > 0
        assert (table.codes[i] != NO_CODE).tolist() == there.tolist() and there.sum() == min(12 * n, 256)
        scores = np.asarray(alone(x, valid, tokens, np.maximum(lead - 1, 0), np.maximum(time - 1, 0), there[None]))[
            there
        ]
        first, second = np.sort(scores, 1)[:, -1], np.sort(scores, 1)[:, -2]
        clear = first - second > 1e-4
        doubtful += (~clear).sum()
        np.testing.assert_array_equal(table.codes[i][there][clear], scores.argmax(1)[clear])
    tokens = (table.codes != NO_CODE).sum()
    assert doubtful < 0.01 * tokens and len(np.unique(table.codes)) > 5
    assert report["records_encoded"] == RECORDS and report["beats"] == mode
    whole = 2e-9 * vqhbr.encode_macs(CONFIG, 256)
    assert report["gflop_per_ecg_all_slots"] == pytest.approx(whole) and report["gflop_per_ecg"] > 0.3 * whole
    assert report["ecg_per_second"] > 0 and 0 < report["compile_seconds"] < report["seconds"]


def test_a_codebook_of_few_slots_codes_the_middle_beats(data, book):
    few = vqhbr.Config(
        width=8, encoder_layers=1, decoder_layers=1, heads=1, head_size=8, mlp=8, codes=9, code_dim=4, slots=72
    )
    report, path = run(data, book(few))
    table = tables.load([data], "train", "", codes=[path.name])
    n = np.minimum((table.rpeaks >= 0).sum(1), 21)
    assert (n > 6).any() and report["data"][0]["all"]["dropped"] >= (n > 6).sum()
    for own, codes in zip(n, table.codes, strict=True):
        there = (codes != NO_CODE)[: 12 * own].reshape(12, own)
        assert (codes[12 * own :] == NO_CODE).all() and (there == there[0]).all()
        kept = np.flatnonzero(there[0])
        assert len(kept) == min(own, 6)
        if own > 6:
            assert kept.tolist() == list(range((own - 6) // 2, (own - 6) // 2 + 6))


# --------------------------------------------------------------------------------------------- the folder and its card


def test_card_and_report_count_what_is_there(data, book, quick_codes):
    where = book()
    report, path = run(data, where)
    found = codebook.load(where)
    folder = open_folder(data)
    card = json.loads((path / "card.json").read_text())
    assert path == folder.path / codes_lib.expected_name(found.id, "robust") and report["codebook"] == found.id
    assert card["codebook"]["id"] == found.id and card["codebook"]["info"]["scale"] == "gain"
    assert card["beats"] == {
        "mode": "robust",
        "id": windows.beats_id("robust"),
        "detector": windows.detector("robust"),
    }
    assert card["lineage"] == INFO["lineage"] and card["data"] == {"name": "synthetic", "version": "1.0.0"}
    every = {"records": 0, "without_beats": 0, "dropped": 0, "tokens": 0}
    usage = np.zeros(CONFIG.codes, int)
    for split in folder.splits:
        table = tables.load([data], split, "", codes=[path])
        n = (table.rpeaks >= 0).sum(1)
        codes = table.codes[table.codes != NO_CODE]
        counts = card["splits"][split]
        want = {"records": len(table), "without_beats": (n == 0).sum(), "dropped": (n > 21).sum(), "tokens": codes.size}
        assert {key: counts[key] for key in want} == want
        assert counts["usage"] == np.bincount(codes, minlength=CONFIG.codes).tolist()
        assert counts["used"] == len(np.unique(codes))
        assert report["data"][0]["splits"][split]["perplexity"] == counts["perplexity"]
        usage += np.bincount(codes, minlength=CONFIG.codes)
        every = {key: every[key] + want[key] for key in every}
    whole = report["data"][0]["all"]
    assert {key: whole[key] for key in every} == every and every["records"] == RECORDS
    assert whole["dropped_share"] == every["dropped"] / RECORDS
    share = usage[usage > 0] / usage.sum()
    assert whole["perplexity"] == pytest.approx(2 ** -(share * np.log2(share)).sum())
    assert json.loads(json.dumps(report)) == report
    lines = "\n".join(result_lines(report))
    assert f"{RECORDS:,} ECGs" in lines and f"codebook {found.id}, robust beats" in lines
    assert set(contents(path)) == {"card.json"} | {
        f"{shard.path.name}.{kind}.npy"
        for split in folder.splits
        for shard in folder.shards(split)
        for kind in codes_lib.KINDS
    }


class Killed(BaseException):
    """The process ends here."""


def test_a_killed_run_goes_on_to_the_same_bytes(data, book, quick_codes, monkeypatch):
    where = book()
    _, path = run(data, where)
    whole = contents(path)
    folder = open_folder(data)
    sizes = [shard.records for split in folder.splits for shard in folder.shards(split)]
    write = files.write
    for stop in (0, 1, 2, 3, 4, 5, 18, 39, 2 * len(sizes) + 6, 4 * len(sizes), 4 * len(sizes) + 1):
        shutil.rmtree(path)
        written = []

        def dying(target, content, stop=stop, written=written):
            if len(written) == stop:  # half a file lies there, under its other name
                target.parent.mkdir(exist_ok=True)
                target.with_name(target.name + ".0badcafe.part").write_bytes(b"half")
                raise Killed
            written.append(target)
            write(target, content)

        monkeypatch.setattr(files, "write", dying)
        with pytest.raises(Killed):
            run(data, where)
        monkeypatch.setattr(files, "write", write)
        with pytest.raises(DataError, match="did not finish"):
            codes_lib.open_codes(folder, path)
        report, _ = run(data, where)
        assert contents(path) == whole
        done = max(0, stop - 1) // 4  # a note, then of each shard three files and a note, then the card
        assert report["records_encoded"] == sum(sizes[done:])


def test_ctrl_c_ends_with_what_to_do(data, book, quick_codes, monkeypatch):
    where = book()
    write, count = codes_lib.write_files, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(codes_lib, "write_files", interrupted)
    with pytest.raises(InterruptedRun, match="run the same command again"):
        run(data, where)
    monkeypatch.setattr(codes_lib, "write_files", write)
    report, _ = run(data, where)
    assert report["data"][0]["shards_kept"] == 2


def test_only_what_is_missing_damaged_or_changed_is_made_again(data, book, quick_codes):
    where = book()
    _, path = run(data, where)
    whole = contents(path)
    report, _ = run(data, where)
    assert report["records_encoded"] == 0 and report["data"][0]["shards_made"] == 0 and contents(path) == whole
    shards = open_folder(data).shards("train")
    (path / f"{shards[0].path.name}.ids.npy").unlink()
    hurt = path / f"{shards[1].path.name}.codes.npy"
    hurt.write_bytes(hurt.read_bytes()[:-2])
    report, _ = run(data, where)
    assert report["records_encoded"] == shards[0].records + shards[1].records and contents(path) == whole

    card = json.loads((data / "card.json").read_text())
    card["files"][0]["sha256"] = "0" * 64
    (data / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="as it is now"):
        tables.load([data], "train", "", codes=[path.name])
    report, _ = run(data, where)
    assert report["data"][0]["shards_made"] == 1
    assert len(tables.load([data], "train", "", codes=[path.name])) > 0
    report, _ = run(data, where, batch=5)  # other programs, other rounding: all of it
    assert report["records_encoded"] == RECORDS


def test_every_codebook_and_mode_has_its_own_folder(data, book, quick_codes):
    first = run(data, book())[1]
    before = contents(first)
    second = run(data, book(scale="mv"))[1]
    third = run(data, book(), beats="heartlang")[1]
    assert len({first, second, third}) == 3 and contents(first) == before
    with pytest.raises(DataError, match="take one codebook"):
        tables.load([data, data], "train", "", codes=[first.name, second.name])


def test_two_at_once_do_not_write_into_one_folder(data, book, quick_codes):
    where = book()
    path = data / codes_lib.expected_name(codebook.load(where).id, "robust")
    with codes_lib.held(path), pytest.raises(UsageError, match="another `ecg-jax tokenize` is writing there"):
        run(data, where)
    assert not list(path.iterdir())
    assert run(data, where)[1] == path


def test_the_command_reports_and_exits(data, book, quick_codes, capsys):
    where = book()
    assert cli.main(["tokenize", "--data", str(data), "--codebook", str(where)]) == 0
    assert f"{RECORDS:,} ECGs" in capsys.readouterr().out
    assert cli.main(["tokenize", "--data", str(data), "--codebook", str(where), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records_encoded"] == 0 and report["data"][0]["all"]["records"] == RECORDS
    assert cli.main(["tokenize", "--data", str(data), "--codebook", str(data)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("ecg-jax: error: ") and error.count("\n") == 1


def test_no_tensorflow_is_imported():
    check = "import sys, ecg_jax.tokenize; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=300).returncode == 0


def test_several_folders_in_one_go(data, simulated, book, quick_codes, tmp_path):
    other = Path(shutil.copytree(simulated, tmp_path / "second" / "1.0.0"))
    report = tokenize([data, other], book(), quiet=True)
    one, two = (Path(found["path"]) for found in report["data"])
    assert one.parent == data and two.parent == other and contents(one) == contents(two)
    assert report["records_encoded"] == 2 * RECORDS


# -------------------------------------------------------------------------------------------------------- refusals


def unit_less(data: Path) -> None:
    card = json.loads((data / "card.json").read_text())
    (data / "card.json").write_text(json.dumps(card | {"unit": "z"}))


def test_what_the_codebook_cannot_take_is_refused(data, book, quick_codes):
    unit_less(data)
    with pytest.raises(UsageError, match=r"is in unit 'z', and codebook .* takes mV; use one that was trained with"):
        run(data, book(scale="mv"))
    assert not list(data.glob("codes-*"))
    run(data, book(scale="gain"))


def test_bad_requests_are_refused(data, book, tmp_path):
    with pytest.raises(UsageError, match=r"unknown beats 'robbust' \(did you mean 'robust'\?\)"):
        run(data, book(), beats="robbust")
    with pytest.raises(UsageError, match="batch 0"):
        run(data, book(), batch=0)
    with pytest.raises(UsageError, match="no data folder given"):
        tokenize([], book())
    with pytest.raises(DataError, match="is no codebook"):
        run(data, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "none", book())


def test_peaks_of_another_detector_are_refused_with_the_command_that_mends_them(data, book, quick_codes):
    card = json.loads((data / "card.json").read_text())
    (data / "card.json").write_text(json.dumps(card | {"detector": "robust-0"}))
    with pytest.raises(DataError, match=r"robust-0.*convert refresh") as error:
        run(data, book())
    assert "\n" not in str(error.value)
    run(data, book(), beats="heartlang")  # whose peaks are found anew


def test_damaged_shards_are_named(data, book, quick_codes):
    shard = max(open_folder(data).shards("train"), key=lambda s: s.records)
    content = bytearray(shard.path.read_bytes())
    content[len(content) // 2] ^= 1
    shard.path.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.path}: record at byte"):
        run(data, book())


def test_what_a_reader_should_know_is_noted(data, book, quick_codes, capsys):
    report = tokenize([data], book(chain="heartlang", detector="robust-0"))
    assert len(report["notes"]) == 2 and "'default', the codebook was trained on 'heartlang'" in report["notes"][0]
    assert "trained on beats of robust-0" in report["notes"][1]
    assert capsys.readouterr().err.count("note: ") == 2


def test_a_device_without_memory_is_no_bug(data, book, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(coder.Coder, "encode", full)
    with pytest.raises(tokenize_lib.MachineError, match="not enough memory for batch 32: use a smaller one"):
        run(data, book())
