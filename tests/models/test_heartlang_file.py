"""Checkpoints of HeartLang's training code: read exactly, or refused in a line; nothing in them is executed."""

import json

import jax
import numpy as np
import pytest
from torch_pickle import (
    call,
    dictionary,
    entries_of,
    integer,
    made,
    number,
    numpy_number,
    old_file,
    pickle_of,
    tensor,
    text,
    zip_file,
)

from ecg_jax.errors import DataError
from ecg_jax.models import heartlang, vqhbr
from ecg_jax.models.heartlang import ClassifierConfig, MaskedConfig

SIZES = {"width": 8, "heads": 2, "mlp": 6, "slots": 3, "window": 5}
BOOK = vqhbr.Config(**SIZES, encoder_layers=2, decoder_layers=1, codes=7, code_dim=4, faithful=True)
MASKED = MaskedConfig(**SIZES, layers=2, codes=7)
CLASSIFIER = ClassifierConfig(3, MASKED)
KINDS = pytest.mark.parametrize("config", [BOOK, MASKED, CLASSIFIER], ids=["book", "masked", "classifier"])


def published(config):
    """A complete random state dict."""
    rng = np.random.default_rng(0)
    shapes = heartlang.published_shapes(config)
    arrays = {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    return arrays | ({heartlang.STARTED: np.ones(1, np.float32)} if config is BOOK else {})


def whole(arrays):
    """(arrays, pickle) of a checkpoint with all that the training script saves: optimizer, scaler, command line."""
    moments = {name: np.full(2, 0.5, np.float32) for name in ("exp_avg", "exp_avg_sq")}
    arrays = {**arrays, **moments}
    entries = entries_of(arrays)
    state = {name: entries.pop(name) for name in moments} | {"step": number(7.0)}
    group = {"lr": numpy_number(2e-4), "betas": b"(" + number(0.9) + number(0.99) + b"t", "weight_decay": number(1e-4)}
    group |= {"lr_scale": number(1.0), "foreach": b"N", "amsgrad": b"\x89", "params": b"](" + integer(0) + b"e"}
    optimizer = {"state": dictionary({0: dictionary(state)}), "param_groups": b"](" + dictionary(group) + b"e"}
    line = {"batch_size": integer(64), "opt_betas": b"](" + number(0.9) + number(0.99) + b"e", "clip_grad": b"N"}
    line |= {"output_dir": text("checkpoints/vqhbr"), "distributed": b"\x88"}
    scaler = {"scale": number(65536.0), "_growth_tracker": integer(17)}
    beside = {"optimizer": dictionary(optimizer), "scaler": dictionary(scaler)}
    return arrays, pickle_of(entries, **beside, args=made("argparse Namespace", dictionary(line)))


@pytest.fixture
def save(tmp_path):
    def save(data):
        path = tmp_path / "checkpoint.pth"
        path.write_bytes(data)
        return path

    return save


def refused(path, says, read=heartlang.load):
    with pytest.raises(DataError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path)) and len(line) < 350
    assert says in line, line


@KINDS
@pytest.mark.parametrize("write", [zip_file, old_file], ids=["zip", "old"])
def test_whole_checkpoints_come_in_and_go_out_as_they_were(save, config, write):
    arrays = published(config)
    found, params = heartlang.load(save(write(*whole(arrays))))
    assert found == config
    ours = jax.eval_shape(lambda k: (vqhbr if config is BOOK else heartlang).init(config, k), jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, ours)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))
    back = heartlang.state(config, params)
    assert set(arrays) - set(back) == (set(heartlang.LEFT_OVER) if config is BOOK else set())
    assert all(np.array_equal(back[key], arrays[key]) for key in back)


def test_layout_is_turned():
    arrays = published(BOOK)
    params = heartlang.from_state(BOOK, arrays)
    conv = arrays["encoder.token_embed.tokenConv.weight"]
    assert params["encoder"]["token_kernel"][2, 3, 1] == conv[1, 3, 2]
    assert (
        params["encoder"]["layers_qkv_kernel"][1, 5, 9] == arrays["encoder.transformer.layers.1.0.to_qkv.weight"][9, 5]
    )
    assert np.array_equal(params["decoder"]["position_table"], arrays["decoder.pos_embed"][0])
    assert np.array_equal(params["codebook"], arrays["quantize.embedding.weight"])


def test_only_vqhbr_has_a_codebook(save):
    config, params = heartlang.import_heartlang(save(zip_file(published(BOOK))))
    assert config == BOOK and params["codebook"].shape == (7, 4)
    for config, what in ((MASKED, "masked model"), (CLASSIFIER, "classifier")):
        refused(save(zip_file(published(config))), what, heartlang.import_heartlang)


QKV = "decoder.transformer.layers.0.0.to_qkv.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop(QKV), f"key {QKV} is missing"),
        (lambda a: a.pop("encoder.norm_layer.bias"), "key encoder.norm_layer.bias is missing"),
        (lambda a: a.pop("encoder.token_embed.tokenConv.weight"), "tokenConv.weight is missing"),
        (lambda a: a.pop("quantize.embedding.weight"), "none of HeartLang's networks"),
        (lambda a: a.pop("quantize.embedding.embed_avg"), "embed_avg is missing"),
        (lambda a: a.update({"extra.weight": a["encoder.cls_token"]}), "key 'extra.weight' is none of"),
        (
            lambda a: a.update({"encoder.cls_token": a["encoder.cls_token"][1:]}),
            "key encoder.cls_token is float32 of shape",
        ),
        (lambda a: a.update({"encoder.pos_embed": a["encoder.pos_embed"][0]}), "key encoder.pos_embed has shape"),
        (lambda a: a.update({"decoder.norm_layer.bias": a["decoder.norm_layer.bias"] * np.nan}), "not finite"),
        (lambda a: a.update({"encoder.cls_token": np.arange(8)}), "key encoder.cls_token is int64"),
        (lambda a: a.update({heartlang.STARTED: np.zeros(1, np.float32)}), "never started"),
        (lambda a: a.update({f"encoder.{QKV[8:]}": np.ones((9, 8), np.float32)}), "heads of 64"),
        (lambda a: a.update({"quantize.embedding.weight": np.ones((0, 4), np.float32)}), "weight has shape (0, 4)"),
        (
            lambda a: a.update({"encoder.transformer.layers.5.0.to_qkv.weight": a[QKV]}),
            "layers.2.0.norm.weight is missing",
        ),
    ],
)
def test_networks_that_differ_are_refused_by_key(save, change, says):
    arrays = published(BOOK)
    change(arrays)
    entries = {
        key: tensor(str(i), a.shape, kind="LongStorage" if a.dtype.kind == "i" else "FloatStorage")
        for i, (key, a) in enumerate(arrays.items())
    }
    refused(save(zip_file(arrays, pickle_of(entries))), says)


def test_nothing_in_a_checkpoint_is_executed(save, tmp_path):
    mark = tmp_path / "ran"
    arrays = published(BOOK)
    command = b"(" + text(f"touch {mark}") + b"t"
    hostile = {
        "os system": call("os system", command),
        "builtins eval": call("builtins eval", command),
        "subprocess Popen": b"csubprocess\nPopen\n" + command + b"\x81",
        "argparse ArgumentParser": made("argparse ArgumentParser"),
        "argparse Namespace": b"cargparse\nNamespace\n" + command + b"\x81",
        "something that has no name": text("os.system") + b")\x81",
    }
    for name, opcodes in hostile.items():
        for write in (zip_file, old_file):
            refused(save(write(arrays, pickle_of(entries_of(arrays), args=opcodes))), name)
    called = b"cargparse\nNamespace\n)R"
    refused(save(zip_file(arrays, pickle_of(entries_of(arrays), args=called))), "argparse Namespace")
    assert not mark.exists()


def test_files_that_are_no_checkpoints(save, tmp_path):
    data = zip_file(*whole(published(BOOK)))
    refused(save(data[: len(data) // 2]), "damaged")
    refused(save(b"not a checkpoint"), "not a torch file")
    refused(save(zip_file({})), "no weights")
    refused(tmp_path / "absent.pth", "No such file")
    broken = bytearray(data)
    broken[data.index(published(BOOK)["encoder.cls_token"].tobytes())] ^= 1
    refused(save(bytes(broken)), "damaged")


NAMES = {
    "vqhbr": vqhbr.Config(faithful=True),
    "HeartLang": MaskedConfig(),
    "HeartLang_finetune_base_5cls": ClassifierConfig(5),
}


COUNTS = {"vqhbr": 25_698_528, "HeartLang": 44_562_176, "HeartLang_finetune_base_5cls": 39_053_829}


@pytest.mark.parametrize("name", NAMES)
def test_published_names_and_shapes(shared_data, name):
    listed = json.loads((shared_data / "heartlang" / "heartlang_state_dict.json").read_text())[name]
    shapes = heartlang.published_shapes(NAMES[name])
    assert shapes == {key: tuple(shape) for key, shape, _ in listed["keys"]}
    assert (
        sum(int(np.prod(shape)) for shape in shapes.values()) - listed["n_buffers"]
        == listed["n_params"]
        == COUNTS[name]
    )
