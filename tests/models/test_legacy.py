"""The published networks: names, shapes and counts; outputs recorded from the public code; training statistics."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import legacy, weights
from ecg_jax.models.legacy import PRESETS, LegacyConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "weights"
NAMES = {"torch": weights.torch_names, "keras": weights.keras_names}
# Outputs of the public classes, run once with PyTorch 2.13 and Keras 3.15 on `wave` weights and input. The first has a
# strided stem and an odd stride, the second a unit of equal widths without stride.
STRIDED = LegacyConfig("torch", 2, kernel=5, dropout=0.8, filters=(4, 6, 8), lengths=(24, 6, 2), leads=3, samples=48)
EQUAL = LegacyConfig(
    "torch", 2, kernel=7, dropout=0.8, filters=(4, 4, 8, 10), lengths=(32, 32, 8, 2), leads=3, samples=32
)
EVEN = LegacyConfig("keras", 2, kernel=6, dropout=0.2, filters=(4, 6, 8), lengths=(32, 8, 4), leads=3, samples=32)
RECORDED = [
    (STRIDED, [[9.540612, -4.73298], [8.644277, -17.684525]]),
    (EQUAL, [[-93.37966, 111.839584], [109.655106, -64.49015]]),
    (EVEN, [[9.386235, -0.46159768], [-0.4232221, 1.5728221]]),
]


def wave(key, shape):
    """Weights from the published name and shape alone."""
    n = math.prod(shape)
    wave = np.sin(1.7 * np.arange(n) + len(key) + sum(map(ord, key)) % 97)
    if key.endswith(("var", "moving_variance")):
        wave = 1.2 + wave
    elif key == "batch_normalization/beta":
        wave = 0.5 * wave - 1  # whole windows are negative: whether y has gone through a ReLU shows
    elif len(shape) == 1:
        wave = 0.5 * wave + float(key.endswith("gamma") or ("bn" in key and key.endswith("weight")))
    else:
        wave = 0.6 * wave
    return wave.reshape(shape).astype(np.float32)


def published(config):
    """{published key: wave}, in the published layout."""
    tables = legacy.parameters(config) | legacy.statistics(config)
    tables |= {f"head/{name}": one for name, one in legacy.head(config).items()}
    names = NAMES[config.source](config)
    shapes = {names[ours]: weights._their_shape(config, ours, one.shape) for ours, one in tables.items()}
    return {key: wave(key, shape) for key, shape in shapes.items()}


def variables(config):
    """(the encoder's variables, the head) of the `published` waves."""
    encoder, head = weights._fill(config, NAMES[config.source](config), published(config))
    params = {name: encoder[name] for name in legacy.parameters(config)}
    return {"params": params, "batch_stats": {name: encoder[name] for name in legacy.statistics(config)}}, head


def apply(config, start, x, keys=None, train=False):
    valid = jnp.tile(jnp.asarray([[0, config.samples]]), (len(x), 1))
    mutable = ["batch_stats"] if train else False
    run = jax.jit(lambda start, x: legacy.Legacy(config).apply(start, x, valid, train, keys, mutable=mutable))
    return run(start, x)


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_the_published_ones(preset):
    golden = {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"{preset}.json").read_text()).items()}
    assert {key: array.shape for key, array in published(PRESETS[preset]).items()} == golden


@pytest.mark.parametrize(
    ("config", "trained", "running"),
    [
        (PRESETS["legacy_age"], 6_924_705, 3_984),
        (dataclasses.replace(PRESETS["legacy_age"], outputs=6), 6_950_310, 3_984),
        (PRESETS["legacy_diagnosis"], 6_421_910, 3_728),
    ],
)
def test_counts(config, trained, running):
    def total(table):
        return sum(math.prod(one.shape) for one in table.values())

    assert total(legacy.parameters(config)) + total(legacy.head(config)) == trained
    assert total(legacy.statistics(config)) == running


@pytest.mark.parametrize(("config", "recorded"), RECORDED, ids=["strided", "equal", "even"])
def test_outputs_of_the_public_code(config, recorded):
    x = np.cos(0.37 * np.arange(2 * config.samples * 3)).reshape(2, config.samples, 3).astype(np.float32)
    start, head = variables(config)
    frames, weight = apply(config, start, x)
    assert frames.shape == (2, config.lengths[-1], config.features) and (weight == 1).all()
    assert np.allclose(legacy.predict(head, frames), recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "unbiased", "kept"), [(STRIDED, 1, 0.9), (EVEN, 0, 0.99)], ids=["torch", "keras"])
def test_running_statistics_follow_their_framework(config, unbiased, kept):
    config = dataclasses.replace(config, dropout=0.0)
    x = jax.random.normal(jax.random.key(0), (2, config.samples, 3))
    start, _ = variables(config)
    _, new = apply(config, start, x, train=True)
    stem = legacy._conv(x, start["params"]["stem_kernel"], config.samples // config.lengths[0], config.source)
    for which, seen in (("mean", np.mean(stem, (0, 1))), ("var", np.var(stem, (0, 1), ddof=unbiased))):
        name = f"stem_norm_running_{which}"
        expected = kept * start["batch_stats"][name] + (1 - kept) * seen
        assert np.allclose(new["batch_stats"][name], expected, rtol=1e-5, atol=1e-6)
    changed = [not np.allclose(start["batch_stats"][name], new["batch_stats"][name]) for name in start["batch_stats"]]
    assert all(changed)


def test_dropout_drops_the_share_it_says_and_only_in_training():
    config = LegacyConfig("torch", 1, kernel=3, dropout=0.8, filters=(64, 64), lengths=(64, 64), leads=3, samples=64)
    start, _ = variables(config)
    start["params"]["unit2_norm2_scale"] *= 0  # so that the last ReLU gives ones
    start["params"]["unit2_norm2_bias"] = np.ones(64, np.float32)
    x, keys = jnp.ones((1, 64, 3)), jax.random.split(jax.random.key(0), 1)
    (frames, _), _ = apply(config, start, x, keys, train=True)
    assert set(np.unique(np.asarray(frames).round(4))) == {0.0, 5.0}
    assert abs(float((frames == 0).mean()) - 0.8) < 0.03
    assert (apply(config, start, x, keys)[0] == 1).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"source": "tf"}, "unknown source 'tf'"),
        ({"kernel": 16}, "odd kernels"),
        ({"dropout": 1.0}, "dropout"),
        ({"lengths": (4096, 1024, 256, 64)}, "5 filters and 4 lengths"),
        ({"lengths": (4096, 1024, 256, 60, 16)}, "whole factors"),
        ({"filters": (0, 128, 196, 256, 320)}, "positive"),
    ],
)
def test_impossible_configurations_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(PRESETS["legacy_age"], **wrong)


def test_other_lengths_are_refused():
    with pytest.raises(UsageError, match="crop first"):
        EVEN.padded(33)
    assert EVEN.padded(20) == 32
    with pytest.raises(UsageError, match=r"\[B, 32, 3\]"):
        apply(EVEN, variables(EVEN)[0], jnp.zeros((1, 30, 3)))
