"""Keras HDF5 files: whole models and renumbered ones are read; hostile ones and other networks refused in a line."""

import importlib.util
import io
import json
from pathlib import Path

import h5py
import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from ecg_jax.errors import DataError
from ecg_jax.models import legacy, weights
from ecg_jax.models.legacy import LegacyConfig
from ecg_jax.training import export

DIAGNOSIS = LegacyConfig("keras", 2, kernel=4, dropout=0.2, filters=(2, 3, 4), lengths=(32, 8, 4), leads=3, samples=32)


def published(config):
    """A complete random network under its published keys."""
    rng = np.random.default_rng(0)
    tables = legacy.parameters(config) | legacy.statistics(config)
    tables |= {f"head/{name}": one for name, one in legacy.head(config).items()}
    names = weights.keras_names(config)
    return {
        names[ours]: rng.uniform(0.1, 1, weights._their_shape(config, ours, one.shape)).astype(np.float32)
        for ours, one in tables.items()
    }


def keras_bytes(arrays, configuration=None, change=None):
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for key, array in arrays.items():
            layer, leaf = key.split("/")
            file[f"model_weights/{layer}/{layer}/{leaf}:0"] = array
        file["optimizer_weights/training/Adam/dense/kernel/m:0"] = np.zeros(3, np.float32)
        if configuration is not None:
            file.attrs["model_config"] = json.dumps(configuration)
        if change:
            change(file)
    return out.getvalue()


def configuration():
    """What Keras 2 says of DIAGNOSIS: layers in the order of building, with where each comes from."""
    layers = [("InputLayer", "signal", None, {"batch_input_shape": [None, 32, 3]})]
    counted = {}

    def add(kind, short, source, **settings):
        n = counted[short] = counted.get(short, -1) + 1
        name = f"{short}_{n}" if n else short
        layers.append((kind, name, source, settings))
        return name

    def conv(source, stride=1):
        settings = {"padding": "same", "use_bias": False, "activation": "linear", "dilation_rate": [1]}
        return add("Conv1D", "conv1d", source, strides=[stride], **settings)

    def norm(source):
        normed = add("BatchNormalization", "batch_normalization", source, epsilon=0.001)
        return add("Activation", "activation", normed, activation="relu")

    x = y = norm(conv("signal"))
    for stride in (4, 2):
        pooled = add("MaxPooling1D", "max_pooling1d", y, pool_size=[stride], strides=[stride])
        skip = conv(pooled)
        x = add("Dropout", "dropout", norm(conv(x)), rate=1 - 0.8)
        y = add("Add", "add", conv(x, stride))
        layers[-1][3]["other"] = skip
        x = add("Dropout", "dropout", norm(y), rate=1 - 0.8)
    add("Dense", "dense", add("Flatten", "flatten", x), activation="sigmoid")
    return {
        "class_name": "Model",
        "config": {
            "layers": [
                {
                    "class_name": kind,
                    "config": {"name": name} | settings,
                    "inbound_nodes": [[[source, 0, 0, {}]]] if source else [],
                }
                for kind, name, source, settings in layers
            ]
        },
    }


@pytest.fixture
def save(tmp_path):
    def save(data, name="model.hdf5"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def refused(path, says):
    with pytest.raises(DataError) as caught:
        weights.load(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and says in line, line


def test_a_keras_network_comes_in_whatever_the_numbers_of_its_layers(save):
    arrays = published(DIAGNOSIS)
    config, encoder, head = weights.load(save(keras_bytes(arrays, configuration())))
    assert config == DIAGNOSIS
    assert np.array_equal(encoder["unit1_conv2_kernel"], arrays["conv1d_3/kernel"])
    assert np.array_equal(encoder["unit2_norm1_running_mean"], arrays["batch_normalization_3/moving_mean"])
    assert head["kernel"][2, 3, 1] == arrays["dense/kernel"][2 * 4 + 3, 1]

    def later(key):  # a second network of the same session, its convolutions numbered by use
        kind, _, rest = key.partition("/")
        base, _, number = kind.rpartition("_")
        index = int(number) if number.isdecimal() else 0
        swapped = {1: 2, 2: 3, 3: 1, 4: 5, 5: 6, 6: 4}.get(index, 0) if kind.startswith("conv") else index
        return f"{base if number.isdecimal() else kind}_{swapped + 20}/{rest}"

    again = weights.load(save(keras_bytes({later(k): v for k, v in arrays.items()}, configuration()), "b.hdf5"))
    assert again[0] == config and all(np.array_equal(again[1][name], encoder[name]) for name in encoder)


def test_weights_alone_come_in_with_the_published_lengths(save):
    """Keras 3 numbers the variables of a layer; without a configuration nothing else tells the strides."""
    config = LegacyConfig("keras", 6, kernel=4, dropout=0.2, filters=(1, 2, 3, 4, 5), leads=3)
    leaves = {"kernel": 0, "bias": 1, "gamma": 0, "beta": 1, "moving_mean": 2, "moving_variance": 3}
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for key, array in published(config).items():
            layer, leaf = key.split("/")
            file[f"layers/{layer}/vars/{leaves[leaf]}"] = array
    found, encoder, _ = weights.load(save(out.getvalue()))
    assert found == config
    assert np.array_equal(
        encoder["unit1_norm1_running_var"], published(config)["batch_normalization_1/moving_variance"]
    )
    with pytest.raises(DataError, match="takes no settings"):
        weights.load(save(out.getvalue()), Path("args.json"))


def _replace(name, **how):
    def change(file):
        del file[name]
        file.create_dataset(name, **how)

    return change


def _link(file):
    del file["model_weights/dense/dense/bias:0"]
    file["model_weights/dense/dense/bias:0"] = h5py.ExternalLink("/etc/passwd", "x")


def _circle(file):
    group = file.create_group("model_weights/loop")
    group["loop"] = group


BIAS = "model_weights/dense/dense/bias:0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_replace(BIAS, shape=(2**40,), dtype="f4"), "claims"),
        (_replace(BIAS, shape=(2**40,), dtype="f4", chunks=(2**10,), compression="gzip"), "not stored as Keras"),
        (_replace(BIAS, data=np.array([1, 2])), "not stored as Keras"),
        (_replace(BIAS, shape=(2,), dtype="f4", external=[("/etc/passwd", 0, 8)]), "not stored as Keras"),
        (_replace(BIAS, data=np.array([1.0, np.inf], "f4")), "dense/bias is not finite"),
        (_replace(BIAS, data=np.array(["a", "b"], h5py.string_dtype())), "not stored as Keras"),
        (_link, "link to elsewhere"),
        (_circle, "without end"),
        (lambda file: file.pop(BIAS), "dense has no bias"),
        (lambda file: file.pop("model_weights/batch_normalization_4"), "BatchNorms"),
        (lambda file: file.create_group("model_weights/lstm").create_dataset("kernel:0", data=[1.0]), "lstm"),
    ],
)
def test_hostile_keras_files(save, change, says):
    refused(save(keras_bytes(published(DIAGNOSIS), configuration(), change)), says)


def _edit(kind, **settings):
    def edit(layers):
        next(layer for layer in layers if layer["class_name"] == kind)["config"].update(settings)

    return edit


def _unsummed(layers):  # normalised before the sum: the other variant of the public code
    second = [layer for layer in layers if layer["class_name"] == "BatchNormalization"][2]
    second["inbound_nodes"] = [[["conv1d_3", 0, 0, {}]]]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_edit("Conv1D", padding="valid"), "'conv1d'"),
        (_edit("BatchNormalization", epsilon=1e-5), "'batch_normalization'"),
        (_edit("Activation", activation="elu"), "'activation'"),
        (_edit("MaxPooling1D", pool_size=[2], strides=[2]), "dense/kernel has shape|lengths"),
        (_edit("Dropout", rate=0.5), "not the published"),
        (_edit("InputLayer", batch_input_shape=[None, None, 3]), "not the published"),
        (_unsummed, "'batch_normalization_2'"),
        (lambda layers: layers.append({"class_name": "Lambda", "config": {"name": "l"}, "inbound_nodes": []}), "'l'"),
        (lambda layers: layers.clear(), "not the published"),
        (lambda layers: layers.append(3), "not a Keras file"),
    ],
)
def test_another_network_of_the_same_shapes_is_refused(save, edit, says):
    changed = configuration()
    edit(changed["config"]["layers"])
    with pytest.raises(DataError, match=says):
        weights.load(save(keras_bytes(published(DIAGNOSIS), changed)))


VALID = keras_bytes(published(DIAGNOSIS), configuration())


@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_damaged_files_are_read_or_refused_in_a_line(save, data):
    content = bytearray(VALID)
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


def test_the_tool_writes_an_encoder_folder(save, tmp_path, capsys):
    script = Path(__file__).resolve().parents[2] / "tools" / "import_code_weights.py"
    spec = importlib.util.spec_from_file_location("import_code_weights", script)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    path, out = save(VALID), tmp_path / "out"
    assert tool.main([str(path), "--out", str(out)]) == 0
    assert "dropout 0.2" in capsys.readouterr().out
    config, params, info = export.load_encoder(out)
    expected, encoder, head = weights.load(path)
    assert config == expected == DIAGNOSIS and params.keys() == encoder.keys()
    assert all(np.array_equal(params[name], encoder[name]) for name in encoder)
    assert np.array_equal(safetensors.numpy.load_file(out / info["head"])["head/kernel"], head["kernel"])
    assert (info["rate"], info["factor"], info["task"], info["labels"]) == (
        400,
        2.0,
        "diagnosis",
        ["output0", "output1"],
    )
    assert tool.main([str(save(b"no", "bad.pth")), "--out", str(tmp_path / "none")]) == 3
    assert "bad.pth" in capsys.readouterr().err and not (tmp_path / "none").exists()
