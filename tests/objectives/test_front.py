"""What encoders see: the two worlds, hidden beats, crops, and independence of padding, place and bucket."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import ladder
from ecg_jax.objectives import front as front_lib
from ecg_jax.records.windows import MAX_PEAKS

SMALL = {
    "resnet1d": ladder.ResNet1dConfig(4, kernel=5, strides=(4, 4)),
    "transformer": ladder.TransformerConfig(16, 2, 2),
}
FAMILIES = list(SMALL)


def _front(family, world="beats", **options):
    arch = ladder.for_input(SMALL[family], world)
    return front_lib.make(arch, **({"dtype": "float32", "slots": 96} | options))


def _batch(records=4, seed=0, beats=6):
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, 300, (records, 1000, 12)).astype(np.int16)
    peaks = np.full((records, MAX_PEAKS), -1, np.int16)
    for row in peaks:
        row[:beats] = np.sort(rng.choice(np.arange(60, 940, 60), beats, replace=False))
    valid = np.tile(np.array([[0, 1000]], np.int32), (records, 1))
    return {"signal": jnp.asarray(signal), "valid": jnp.asarray(valid), "rpeaks": jnp.asarray(peaks)}


_encoders = {}


def _encode(front, batch, **more):
    key = front.arch
    if key not in _encoders:
        _encoders[key] = jax.jit(front.init)(jax.random.key(1))
    hidden = more.pop("hidden", None)
    run = jax.jit(lambda encoder, batch, hidden: front.encode(encoder, front.view(batch), hidden=hidden, **more))
    return run(_encoders[key], batch, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_slots_change_nothing(family):
    """Padding of a larger bucket reaches no frame and no feature."""
    batch = _batch()
    found = {slots: _front(family, slots=slots) for slots in (72, 96, 252)}
    frames = {slots: _encode(front, batch) for slots, front in found.items()}
    assert {slots: one.weight.sum() for slots, one in frames.items()} == dict.fromkeys(found, 4 * 72)
    for slots in (96, 252):
        np.testing.assert_allclose(frames[slots].frames[:, :72], frames[72].frames, atol=2e-5)
        views = [front.view(batch) for front in (found[72], found[slots])]
        pooled = [found[n].pooled(frames[n], view) for n, view in zip((72, slots), views, strict=True)]
        np.testing.assert_allclose(pooled[1], pooled[0], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_tokens_are_not_seen(family):
    """Other samples inside a hidden window give the same frames; inside a visible one they do not."""
    front, batch = _front(family), _batch()
    blank = jnp.full(96, 0.1)
    hidden = np.zeros((4, 96), bool)
    hidden[:, 2] = True  # third beat of lead I
    view = front.view(batch)
    start, end = int(view.slots.start[0, 2]), int(view.slots.end[0, 2])
    changed = np.array(batch["signal"])
    changed[0, start:end, 0] = -changed[0, start:end, 0]  # keeps the gain
    other = batch | {"signal": jnp.asarray(changed)}
    kwargs = {"hidden": jnp.asarray(hidden), "blank": blank}
    first, second = (_encode(front, one, **kwargs).frames for one in (batch, other))
    np.testing.assert_allclose(first, second, atol=1e-6)
    seen, also = (_encode(front, one).frames for one in (batch, other))
    assert np.abs(np.asarray(seen - also))[0].max() > 1e-2 and not np.abs(np.asarray(seen - also))[1:].max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_without_a_beat_is_scored(family):
    front, batch = _front(family), _batch()
    batch["rpeaks"] = batch["rpeaks"].at[1].set(-1)
    params = {"encoder": jax.jit(front.init)(jax.random.key(0))}
    features = np.asarray(jax.jit(front.features)(params, batch))
    assert np.isfinite(features).all() and not features[1, :-1].any() and features[1, -1] != 0
    assert features[0, :-1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_keeps_whole_beats(family):
    front, batch = _front(family, crop=500), _batch()
    view = jax.jit(front.view)(batch)
    there = np.asarray(view.slots.there)
    assert there.any() and (np.asarray(view.slots.start)[there] >= 250).all()
    assert (np.asarray(view.slots.end)[there] <= 750).all()
    keys = jax.random.split(jax.random.key(0), 4)
    moved = jax.jit(front.view)(batch, keys)
    assert not np.array_equal(moved.slots.start, view.slots.start)
    fixed = dataclasses.replace(front, random_crop=False)
    assert np.array_equal(jax.jit(fixed.view)(batch, keys).slots.start, view.slots.start)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signal_world_knows_its_beats_if_asked(family):
    front, batch = _front(family, "signal", crop=480), _batch()
    view = jax.jit(front.view)(batch)
    assert view.x.shape == (4, 480, 12) and view.slots is not None and (view.first == 260).all()
    without = {name: batch[name] for name in ("signal", "valid")}
    assert front.fields == ("signal", "valid") and front.view(without).slots is None
    params = jax.jit(front.init)(jax.random.key(0))
    plain = jax.jit(lambda b: front.encode(params, front.view(b)).frames)
    np.testing.assert_array_equal(plain(batch), plain(without))
    shown = front.encode(params, view, x=jnp.zeros_like(view.x))
    assert not np.allclose(shown.frames, plain(batch))


def test_stages_of_a_resnet():
    front, batch = _front("resnet1d", "signal"), _batch()
    params = jax.jit(front.init)(jax.random.key(0))
    found = jax.jit(lambda b: front.encode(params, front.view(b), stages=True)[:3])(batch)
    (first, last) = found[2]
    assert [int(stride) for _, stride in (first, last)] == [4, 16]
    assert first[0].shape == (4, 252, 4) and last[0].shape == (4, 63, 8)
    np.testing.assert_array_equal(last[0], found[0])


def test_refusals():
    arch = SMALL["transformer"]
    for options, match in (
        ({"scale": "gane"}, "unknown scale 'gane'.*gain"),
        ({"dtype": "float16"}, "unknown precision"),
        ({"mode": "robsut"}, "unknown beats.*robust"),
        ({"slots": 100}, "multiple of 12"),
        ({"slots": 264}, "up to 252"),
        ({"crop": 50}, "shorter than one frame"),
    ):
        with pytest.raises(UsageError, match=match):
            front_lib.make(arch, **options)
    assert front_lib.make(arch, mode="heartlang").number == 256 and front_lib.make(arch).number == 252
