"""Weight files of PyTorch: what torch writes is read, all else is one line of DataError, nothing is executed."""

import io
import json
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from torch_pickle import call, integer, made, old_file, pickle_of, reference, tensor, text, zip_file

from ecg_jax.errors import DataError
from ecg_jax.models import legacy, torch_file, weights
from ecg_jax.models.legacy import LegacyConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "weights"
AGE = LegacyConfig("torch", 1, kernel=5, dropout=0.8, filters=(2, 3, 4), lengths=(32, 8, 4), leads=3, samples=32)
AGE_SETTINGS = {"seq_length": 32, "net_filter_size": [2, 3, 4], "net_seq_lengh": [32, 8, 4], "kernel_size": 5}
PUBLISHED_LENGTHS = LegacyConfig("torch", 1, kernel=3, dropout=0.8, filters=(1, 2, 3, 4, 5), leads=2)


def published(config):
    """A complete random network under its published keys."""
    rng = np.random.default_rng(0)
    tables = legacy.parameters(config) | legacy.statistics(config)
    tables |= {f"head/{name}": one for name, one in legacy.head(config).items()}
    names = weights.torch_names(config)
    return {
        names[ours]: rng.uniform(0.1, 1, weights._their_shape(config, ours, one.shape)).astype(np.float32)
        for ours, one in tables.items()
    }


@pytest.fixture
def save(tmp_path):
    def save(data, name="model.pth", settings=AGE_SETTINGS):
        if settings is not None:
            (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def refused(path, *says):
    with pytest.raises(DataError) as caught:
        weights.load(path)
    line = str(caught.value)
    assert "\n" not in line and str(path.parent) in line and len(line) < 400
    for part in says:
        assert part in line, line


# --- files that torch itself wrote


@pytest.mark.parametrize("name", ["tiny_zip.pth", "tiny_old.pth"])
def test_files_written_by_torch(name):
    found = torch_file.state_dict((GOLDEN / name).read_bytes(), name)
    assert list(found) == ["a", "b", "c", "h", "p"]
    assert np.array_equal(found["a"], [[0, 3], [1, 4], [2, 5]]) and found["a"].dtype == np.float32
    assert found["b"].shape == () and found["b"] == 7 and found["b"].dtype == np.int64
    assert np.array_equal(found["c"], [4.0, 5.0]) and found["c"].dtype == np.float64
    assert np.array_equal(found["h"], [0.5, -2.0]) and found["h"].dtype == np.float16
    assert np.array_equal(found["p"], [1.0, 1.0])
    assert not any(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("name", ["tiny_zip.pth", "tiny_old.pth"])
def test_every_truncation_is_refused(name):
    data = (GOLDEN / name).read_bytes()
    for stop in range(0, len(data) - 1, 7):
        with pytest.raises(DataError, match=r"^f: [^\n]+$"):
            torch_file.state_dict(data[:stop], "f")


# --- whole networks


@pytest.mark.parametrize("write", [zip_file, old_file, safetensors.numpy.save], ids=["zip", "old", "safetensors"])
def test_a_torch_network_comes_in_with_its_layout_turned(save, write):
    arrays = published(AGE)
    config, encoder, head = weights.load(save(write(arrays)))
    assert config == AGE
    assert encoder.keys() == legacy.parameters(AGE).keys() | legacy.statistics(AGE).keys()
    assert np.array_equal(encoder["unit2_conv1_kernel"][1, 0], arrays["resblock1d_1.conv1.weight"][:, 0, 1])
    # feature (channel 3, frame 2) of the flattened 4 x 4 is number 3 * 4 + 2
    assert head["kernel"][2, 3, 0] == arrays["lin.weight"][0, 14]
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in encoder.values())


def test_settings_are_checked_and_defaults_are_the_published(save):
    arrays = published(AGE)
    path = save(zip_file(arrays), settings=AGE_SETTINGS | {"kernel_size": 7})
    refused(path, "kernel_size", "does not agree")
    refused(save(zip_file(arrays), settings=AGE_SETTINGS | {"net_seq_lengh": [32, 8, 3]}), "whole factors")
    refused(save(zip_file(arrays), settings=AGE_SETTINGS | {"net_seq_lengh": [32, 32, 4]}), "skip_connection.1")
    refused(save(zip_file(arrays), settings=AGE_SETTINGS | {"dropout_rate": "high"}), "dropout_rate")
    refused(save(zip_file(arrays), settings=AGE_SETTINGS | {"seq_length": 1e3}), "seq_length")
    (path.parent / "config.json").unlink()
    refused(path, "3 blocks", "settings")
    (path.parent / "config.json").write_text("[1")
    with pytest.raises(DataError, match="not JSON"):
        weights.load(path)
    (path.parent / "config.json").unlink()
    assert weights.load(save(zip_file(published(PUBLISHED_LENGTHS)), settings=None))[0] == PUBLISHED_LENGTHS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("bn1.running_var"), "bn1.running_var is missing"),
        (lambda a: a.update({"extra.weight": a["lin.bias"]}), "extra.weight"),
        (lambda a: a.update({"lin.weight": a["lin.weight"][:, 1:]}), "lin.weight has shape"),
        (lambda a: a.update({"bn1.weight": a["bn1.weight"] * np.nan}), "bn1.weight is not finite"),
        (lambda a: a.update({"bn1.running_var": -a["bn1.running_var"]}), "negative variance"),
        (lambda a: a.update({"conv1.weight": a["conv1.weight"][0]}), "conv1.weight"),
        (lambda a: a.update({"resblock1d_7.conv2.weight": a["conv1.weight"]}), "numbered"),
    ],
)
def test_networks_that_differ_are_refused_by_key(save, change, says):
    arrays = published(AGE)
    change(arrays)
    refused(save(zip_file(arrays)), says)


# --- hostile torch files


def test_a_pickle_that_calls_something_is_not_run(save, tmp_path):
    mark = tmp_path / "ran"
    for name in ("os system", "builtins eval", "posix system"):
        hostile = b"\x80\x02" + call(name, b"(" + text(f"touch {mark}") + b"t") + b"."
        refused(save(zip_file({}, hostile)), name)
        refused(save(torch_file.LEGACY_START + hostile), name)
    assert not mark.exists()


ARRAYS = {"a": np.ones(4, np.float32)}


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (pickle_of({"a": tensor("0", (10**4, 10**4), numel=4, strides=[0, 0])}), "key 'a': its shape"),
        (pickle_of({"a": tensor("0", (4,), numel=4, offset=1)}), "key 'a': its shape"),
        (pickle_of({"a": tensor("0", (4,), numel=4, offset=-1)}), "impossible shape"),
        (pickle_of({"a": tensor("0", (2**31 - 1,))}), "key 'a': its storage has 16 bytes"),
        (pickle_of({"a": tensor("../../data.pkl", (4,))}), "missing"),
        (pickle_of({"a": tensor("0", (4,)), "b": integer(3)}), "key 'b' holds no tensor"),
        (pickle_of({"a": integer(3)}), "no weights"),
        (b"\x80\x02}" + reference("0", 4) + b"K\x01s.", "neither text nor number"),
        (b"\x80\x02" + b"}q\x00" + b"r\xff\xff\xff\xff" + b".", "no weights"),
        (b"\x80\x02\x8b\x20\x00\x00\x00" + b"\xff" * 31 + b"\x01.", "too long"),
        (b"\x80\x02" + b"N0" * 10, "POP"),
        (b"\x80\x02" + b"N" * (torch_file.PICKLE_BYTES + 9) + b".", "longer than"),
        (b"\x80\x02ctorch\n\\FloatStorage\n.", "no weights"),
        (b"\x80\x02}", "no end|not a torch file"),
        (b".", "not a torch file"),
    ],
)
def test_hostile_pickles(save, pickled, says):
    with pytest.raises(DataError, match=says):
        torch_file.state_dict(zip_file(ARRAYS, pickled), "f")


def test_shared_parts_cannot_multiply(save):
    # forty tuples, each of two of the one before: 2^40 leaves to anyone who walks or prints them
    bomb = b"K\x01" + b"q\x00h\x00\x86" * 40
    for hostile in (b"\x80\x02}" + bomb + b"K\x01s.", b"\x80\x02" + bomb + b"Q.", b"\x80\x02" + bomb + b")R."):
        with pytest.raises(DataError):
            torch_file.state_dict(zip_file(ARRAYS, hostile), "f")
    shared = pickle_of({f"k{i}": tensor("0", (10_000,)) for i in range(100)})
    with pytest.raises(DataError, match="claim more"):
        torch_file.state_dict(zip_file({"a": np.ones(10_000, np.float32)}, shared), "f")


def test_archives_that_are_not_torchs(save):
    refused(save(zip_file(published(AGE), compress=zipfile.ZIP_DEFLATED)), "compressed")
    data = bytearray(zip_file(published(AGE)))
    at = data.index(published(AGE)["conv1.weight"].tobytes())
    data[at] ^= 1
    refused(save(bytes(data)), "damaged")
    refused(save(old_file(published(AGE), little=b"\x89")), "big-endian")
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("metadata.json", "{}")
    refused(save(empty.getvalue()), "data.pkl")
    refused(save(b""))
    refused(save(b"\x00" * 100), "neither torch, nor HDF5, nor safetensors")
    refused(save(b"").parent / "absent.pth", "No such file")


# --- any bytes


VALID = {
    "zip": zip_file(published(AGE)),
    "old": old_file(published(AGE)),
    "safetensors": safetensors.numpy.save(published(AGE)),
}


@pytest.mark.parametrize("kind", VALID)
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused_in_a_line(save, kind, data):
    content = bytearray(VALID[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = save(bytes(content[: data.draw(st.integers(0, len(content))) or None]))
    try:
        config, encoder, _ = weights.load(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.isfinite(encoder[name]).all() for name in legacy.parameters(config))


OPCODES = [b"}", b"]", b")", b"(", b"t", b"u", b"s", b"e", b"a", b"Q", b"R", b"b", b"K\x01", b"N", b"q\x00", b"h\x00"]
OPCODES += [text("storage"), text("0"), b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"\x85", b"\x87"]
OPCODES += [
    made("argparse Namespace"),
    b"cargparse\nNamespace\n",
    reference("0", 4),
    tensor("0", (4,)),
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"0",
    b"\x81",
    b"l",
    b".",
]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(st.sampled_from(OPCODES), max_size=30), st.booleans())
def test_any_sequence_of_opcodes_is_read_or_refused(opcodes, old):
    pickled = b"\x80\x02" + b"".join(opcodes) + b"."
    data = old_file(ARRAYS, pickled) if old else zip_file(ARRAYS, pickled)
    try:
        found = torch_file.state_dict(data, "f")
    except DataError as error:
        assert str(error).startswith("f: ") and "\n" not in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in found.values())
