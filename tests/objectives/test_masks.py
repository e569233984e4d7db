"""Masks: exact numbers, uniform draws, nothing outside the inner slots, records by themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import beats
from ecg_jax.objectives import masks

MODES = ("robust", "heartlang")
VALID = (0, 1000)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _draw(keys, found, mode, masking, ratio, padding=False, number=None):
    return masks.draw(keys, found, mode=mode, masking=masking, ratio=ratio, padding=padding)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slots(peaks, valid, number, mode):
    return beats.slots(peaks, valid, number, mode=mode)


def _of(records, mode="robust", number=252):
    """Slots of records given by their R peaks."""
    peaks = np.full((len(records), 50), -1, np.int16)
    for row, own in zip(peaks, records, strict=True):
        row[: len(own)] = own
    return _slots(peaks, np.tile(VALID, (len(records), 1)), number, mode)


def _every_count():
    """A record of every number of beats that can be, and some whose outer beats are not inner."""
    return [110 + np.arange(n) * 15 for n in range(51)] + [np.arange(20, 990, step) for step in (45, 70, 97, 200)]


def _keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [0.5, 0.15, 0.35])
def test_token_masks_are_exact(mode, ratio):
    records = _every_count()
    found = _of(records, mode)
    masked = _draw(_keys(len(records)), found, mode, "token", ratio)
    hidden, inner = np.asarray(masked.hidden), np.asarray(found.inner)
    assert np.array_equal(hidden.sum(1), [round(ratio * n) for n in inner.sum(1).tolist()])
    assert not (hidden & ~inner).any()
    _check_targets(masked)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [0.5, 0.15, 0.35])
def test_beat_masks_take_all_leads_of_an_exact_number(mode, ratio):
    records = _every_count()
    found = _of(records, mode)
    masked = _draw(_keys(len(records)), found, mode, "beat", ratio)
    for b in range(len(records)):
        inner, beat = np.asarray(found.inner[b]), np.asarray(found.beat[b])
        chosen = np.unique(beat[np.asarray(masked.hidden[b])])
        possible = len(np.unique(beat[inner]))
        assert len(chosen) == (max(1, round(ratio * possible)) if possible else 0)
        assert np.array_equal(masked.hidden[b], inner & np.isin(beat, chosen))
    _check_targets(masked)
    assert masked.hidden.any(1).sum() > 40


def _check_targets(masked):
    """All hidden slots are targets, in slot order, and K is enough for them."""
    for hidden, index, there in zip(*map(np.asarray, masked), strict=True):
        assert np.array_equal(index[there], np.flatnonzero(hidden))
        assert np.array_equal(there, np.arange(len(there)) < hidden.sum())


@pytest.mark.parametrize("mode, number, wanted", [("robust", 252, (126, 120)), ("heartlang", 256, (128, 141))])
def test_the_number_of_places_is_reached(mode, number, wanted):
    for masking, most in zip(masks.MASKINGS, wanted, strict=True):
        assert masks.most_targets(number, mode, masking, 0.5) == most
        found = _of([110 + np.arange(n) * 15 for n in range(1, 51)], mode, number)
        masked = _draw(_keys(50), found, mode, masking, 0.5)
        assert masked.there.shape[1] == most
        short = 0 if mode == "robust" or masking == "token" else 10  # it takes the right beats to reach a cut lead
        assert most - short <= masked.hidden.sum(1).max() <= most
        assert np.array_equal(masked.there.sum(1), masked.hidden.sum(1))
        each = masks.most_per_lead(number, mode, masking, 0.5)
        lead = np.where(masked.hidden, found.lead, -1)
        assert max((lead == own).sum(1).max() for own in range(12)) <= each
    assert masks.most_per_lead(252, "robust", "token", 0.5) == 21
    assert masks.most_per_lead(252, "robust", "beat", 0.5) == 10


def test_padding_is_hidden_heartlangs_way():
    records = _every_count()
    found = _of(records)
    masked = _draw(_keys(len(records)), found, "robust", "token", 0.5, True)
    assert np.all(np.asarray(masked.hidden).sum(1) == 126)
    assert (masked.hidden & ~found.there).any() and (masked.hidden & found.there & ~found.inner).any()
    _check_targets(masked)


@pytest.mark.parametrize("masking", masks.MASKINGS)
def test_every_set_is_as_likely(masking):
    draws = 20_000
    found = jax.tree.map(lambda x: jnp.repeat(x, draws, 0), _of([[30, 150, 300, 420, 560, 700, 850, 960]], number=96))
    hidden = np.asarray(_draw(_keys(draws), found, "robust", masking, 0.5).hidden, float)
    inner = np.asarray(found.inner[0])
    assert inner.sum() == 72
    units = hidden[:, inner] if masking == "token" else hidden[:, np.flatnonzero(inner)[:6]]  # beats, in lead I
    n = units.shape[1]
    k = n // 2
    both = units.T @ units / draws
    pair = k * (k - 1) / (n * (n - 1))
    assert np.abs(np.diag(both) - 0.5).max() < 5 * np.sqrt(0.25 / draws)
    assert np.abs(both - np.eye(n) * (0.5 - pair) - pair).max() < 5 * np.sqrt(0.25 / draws)


@pytest.mark.parametrize("masking", masks.MASKINGS)
def test_a_mask_belongs_to_its_record(masking):
    records = _every_count()
    found, keys = _of(records), _keys(len(records))
    alone = _draw(keys, found, "robust", masking, 0.5)
    order = np.random.default_rng(0).permutation(len(records))
    moved = _draw(keys[order], jax.tree.map(lambda x: x[order], found), "robust", masking, 0.5)
    assert all(np.array_equal(a[order], b) for a, b in zip(map(np.asarray, alone), moved, strict=True))
    others = _draw(_keys(len(records), 1), found, "robust", masking, 0.5)
    assert (alone.hidden != others.hidden).any(1).mean() > 0.8
    # Nor does it depend on how many slots there is room for.
    few = [i for i, own in enumerate(records) if len(own) <= 11]
    small = _draw(keys[jnp.asarray(few)], _of([records[i] for i in few], number=132), "robust", masking, 0.5)
    assert np.array_equal(small.hidden, np.asarray(alone.hidden)[few, :132]) and small.hidden.any()


def test_nothing_to_hide():
    found = _of([[], [20], [20, 980]])
    for masking in masks.MASKINGS:
        masked = _draw(_keys(3), found, "robust", masking, 0.5)
        assert not masked.hidden.any() and not masked.there.any()


def test_what_does_not_go_together_is_refused():
    for wrong, message in (
        (("tokens", 0.5, False), "did you mean 'token'"),
        (("beat", 0.5, True), "use masking 'token'"),
        (("token", 1.0, False), "between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            masks.check(*wrong)
        with pytest.raises(UsageError, match=message):
            masks.draw(_keys(1), _of([[300]]), mode="robust", masking=wrong[0], ratio=wrong[1], padding=wrong[2])
