"""A codebook folder gives back what went in, to the bit, or is refused in one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ecg_jax import codebook
from ecg_jax.errors import DataError
from ecg_jax.models import vqhbr

CONFIG = vqhbr.Config(
    width=8, encoder_layers=1, decoder_layers=1, heads=1, head_size=4, mlp=8, codes=12, code_dim=4, slots=24
)
INFO = {
    "scale": "gain",
    "beats": "robust",
    "detector": "robust-1",
    "chain": "default",
    "indices": True,
    "leads": ["I", "II"],
    "unit": "mV",
    "usage": np.arange(12.0),
    "lineage": [{"dataset": "tiny", "records": np.int64(3)}],
    "source": "trained",
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, jax.jit(lambda key: vqhbr.init(CONFIG, key))(jax.random.key(0)))


@pytest.fixture
def folder(params, tmp_path):
    codebook.save(tmp_path / "book", CONFIG, params, INFO)
    return tmp_path / "book"


def test_what_is_loaded_is_what_was_saved(params, tmp_path):
    identity = codebook.save(tmp_path / "a", CONFIG, params, INFO)
    found = codebook.load(tmp_path / "a")
    assert (found.config, found.id, found.path) == (CONFIG, identity, tmp_path / "a")
    assert len(identity) == 8 and set(identity) <= set("0123456789abcdef")
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
    assert found.info["usage"] == list(range(12)) and found.info["lineage"] == [{"dataset": "tiny", "records": 3}]
    assert {key: found.info[key] for key in ("scale", "beats", "indices")} == {
        "scale": "gain",
        "beats": "robust",
        "indices": True,
    }
    again = codebook.save(tmp_path / "b", found.config, found.params, found.info)
    assert again == identity
    for name in (codebook.ARRAYS, codebook.ABOUT):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [codebook.ABOUT, codebook.ARRAYS]


def test_the_id_changes_with_whatever_changes_codes(params, tmp_path):
    def identity(config=CONFIG, params=params, **info):
        return codebook.save(tmp_path / "x", config, params, INFO | info)

    moved = params | {"codebook": params["codebook"] + np.float32(1e-6) * (np.arange(48).reshape(12, 4) == 7)}
    head = params | {"encode_head": params["encode_head"] | {"out_bias": params["encode_head"]["out_bias"] + 1}}
    ids = [
        identity(),
        identity(params=moved),
        identity(params=head),
        identity(config=dataclasses.replace(CONFIG, faithful=True)),
        identity(scale="mv"),
        identity(indices=False),
    ]
    assert len(set(ids)) == len(ids)
    assert identity(usage=[], lineage=[], chain="other", source="heartlang") == ids[0]


def test_impossible_info_is_a_bug_of_ours(params, tmp_path):
    with pytest.raises(ValueError, match="lacks \\['scale'\\]"):
        codebook.save(tmp_path, CONFIG, params, {k: v for k, v in INFO.items() if k != "scale"})
    with pytest.raises(ValueError, match="scale is 'uV', not one of gain, mv, zscore"):
        codebook.save(tmp_path, CONFIG, params, INFO | {"scale": "uV"})


def test_what_is_missing_or_damaged_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"is no codebook \(no codebook.json\); name the --out folder"):
        codebook.load(tmp_path / "nothing")
    arrays, about = folder / codebook.ARRAYS, folder / codebook.ABOUT
    content = arrays.read_bytes()
    for broken in (b"", content[:-4], content[:50], b"\xff" * 100, content + b"x"):
        arrays.write_bytes(broken)
        with pytest.raises(DataError, match=r"codebook\.safetensors: cannot be read") as error:
            codebook.load(folder)
        assert "\n" not in str(error.value)
    arrays.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(DataError, match=r"is not what codebook\.json describes .*damaged or mixed"):
        codebook.load(folder)
    arrays.unlink()
    with pytest.raises(DataError, match=r"no codebook\.safetensors"):
        codebook.load(folder)
    arrays.write_bytes(content)
    about.write_text("{")
    with pytest.raises(DataError, match=r"codebook\.json: cannot be read"):
        codebook.load(folder)


def change(folder, **changes) -> None:
    about = json.loads((folder / codebook.ABOUT).read_text())
    (folder / codebook.ABOUT).write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"format": 2}, "format 2, this release reads 1"),
        ({"config": {"width": 8, "wide": 3}}, "unexpected keyword argument 'wide'"),
        ({"config": dataclasses.asdict(CONFIG) | {"codes": 0}}, "codes = 0"),
        ({"config": [1]}, "is no description of a codebook"),
        ({"info": 5}, "is no description of a codebook"),
        ({"info": {"scale": "gain"}}, "lacks 'beats'"),
        (
            {"info": INFO | {"usage": [], "lineage": [], "beats": "loud"}},
            "beats is 'loud', not one of robust, heartlang",
        ),
        ({"info": INFO | {"usage": [], "lineage": [], "indices": False}}, "damaged or mixed"),
        ({"config": dataclasses.asdict(CONFIG) | {"mlp": 9}}, "damaged or mixed"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(folder, changes, pattern):
    change(folder, **changes)
    with pytest.raises(DataError, match=pattern) as error:
        codebook.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_another_release_are_refused(params, tmp_path):
    codebook.save(tmp_path, CONFIG, params | {"codebook": params["codebook"][:, :3]}, INFO)
    with pytest.raises(DataError, match=r"array 'codebook' is \(12, 3\), not \(12, 4\)"):
        codebook.load(tmp_path)
    codebook.save(tmp_path, CONFIG, {k: v for k, v in params.items() if k != "usage"}, INFO)
    with pytest.raises(DataError, match=r"array 'usage' is not there, not \(12,\)"):
        codebook.load(tmp_path)
    codebook.save(tmp_path, CONFIG, params | {"more": np.zeros(2)}, INFO)
    with pytest.raises(DataError, match=r"array 'more' is \(2,\), not expected"):
        codebook.load(tmp_path)


def test_anyone_can_read_the_arrays(folder, params):
    found = safetensors.numpy.load_file(folder / codebook.ARRAYS)
    np.testing.assert_array_equal(found["codebook"], params["codebook"])
    np.testing.assert_array_equal(found["encode_head/out_kernel"], params["encode_head"]["out_kernel"])


def test_published_weights_become_a_codebook(params, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, faithful=True)
    read = []
    monkeypatch.setattr("ecg_jax.models.heartlang.import_heartlang", lambda path: read.append(path) or (config, params))
    report = codebook.import_published(tmp_path / "heartlang.pth", tmp_path / "book")
    found = codebook.load(tmp_path / "book")
    assert read == [tmp_path / "heartlang.pth"]
    assert report == {"id": found.id, "codes": 12, "code_dim": 4} and found.config == config
    assert (found.info["scale"], found.info["beats"], found.info["source"]) == ("mv", "heartlang", "heartlang")
    assert found.info["indices"] is True and found.info["lineage"][0]["dataset"] == "mimic-iv-ecg"


def test_what_is_no_published_checkpoint_is_refused(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for path in (tmp_path / "bad.pth", tmp_path / "none.pth"):
        with pytest.raises(DataError, match=path.name) as error:
            codebook.import_published(path, tmp_path / "book")
        assert "\n" not in str(error.value) and not (tmp_path / "book").exists()
