"""Masked codes: nothing hidden leaks, evaluation asks everybody the same, sums are exact, and it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecg_jax.errors import UsageError
from ecg_jax.models import beats, ladder
from ecg_jax.objectives import masked_codes
from ecg_jax.records.windows import NO_CODE

CODES, DIM, RECORDS = 9, 5, 8
RESNET = ladder.ResNet1dConfig(4, kernel=5, strides=(4, 8), groups=1)
TRANSFORMER = ladder.TransformerConfig(8, 1, 1, patch=50, times=20)
SQUARE = {
    f"{arch.family}-{world}": ladder.for_input(arch, world)
    for arch in (RESNET, TRANSFORMER)
    for world in ("signal", "beats")
}


def _batch(seed=0, step=100):
    """Records of regular beats, `step` samples apart and a little more from record to record."""
    rng = np.random.default_rng(seed)
    peaks = np.full((RECORDS, 50), -1, np.int16)
    codes = np.full((RECORDS, 256), NO_CODE, np.uint16)
    for b in range(RECORDS):
        own = np.arange(30 + 3 * b, 1000, step + 2 * b)
        n = min(len(own), 21)
        peaks[b, : len(own)], codes[b, : 12 * n] = own, rng.integers(0, CODES, 12 * n)
    return {
        "signal": rng.normal(0, 200, (RECORDS, 1000, 12)).astype(np.int16),
        "valid": np.tile([[0, 1000]], (RECORDS, 1)).astype(np.int32),
        "rpeaks": peaks,
        "codes": codes,
        "hash": rng.integers(0, 2**32, (RECORDS, 2), dtype=np.uint32),
    }


def _make(arch=SQUARE["transformer-beats"], **more):
    return masked_codes.make(arch, CODES, DIM, **({"scale": "mv", "slots": 132, "masking": "beat"} | more))


def _params(objective, seed=0):
    rows = np.random.default_rng(seed).normal(size=(CODES, DIM))
    start = {"prior": np.full(CODES, 1 / CODES), "codebook": rows / np.linalg.norm(rows, axis=1, keepdims=True)}
    assert {name: value.shape for name, value in start.items()} == {n: s.shape for n, s in objective.start.items()}
    params = _init(objective, jax.random.key(seed), start)
    # Away from the start, where the head says nothing yet.
    params["head"]["code_kernel"] *= 30
    return params


_init = jax.jit(lambda objective, *args: objective.init(*args), static_argnums=0)
_kept = jax.jit(lambda objective, *args: objective.logits(*args), static_argnums=0)
_sums = jax.jit(lambda objective, *args: objective.sums(*args), static_argnums=0)
_slope = jax.jit(lambda objective, *args: jax.value_and_grad(objective.loss, has_aux=True)(*args), static_argnums=0)
_ask = jax.jit(lambda objective, *args: objective.ask(*args), static_argnums=0)
_windows = jax.jit(lambda slots, of: beats.blank(jnp.zeros((RECORDS, 1000, 12)), slots, of, jnp.ones(12)) > 0)
KEYS = jax.random.split(jax.random.key(7), RECORDS)


def _loss(*arguments):
    return _slope(*arguments)[0]


def test_make_is_memoised_and_refuses():
    assert _make() is _make() is _make(ratio=0.5, head="factorised")
    assert _make() is not _make(masking="token") and _make() != _make(head="full")
    for wrong, message in (
        ({"masking": "beats"}, "did you mean 'beat'"),
        ({"head": "fuller"}, "did you mean 'full'"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"padding": True, "masking": "token"}, "code of padding is None"),
        ({"padding": True, "masking": "token", "padding_code": CODES}, "not one of the 9"),
        ({"padding": True, "padding_code": 0}, "use masking 'token'"),
    ):
        with pytest.raises(UsageError, match=message):
            _make(**wrong)
    with pytest.raises(UsageError, match="the signal has none"):
        _make(RESNET, padding=True, padding_code=0, masking="token")


SWITCHES = [(name, "beat", "factorised") for name in SQUARE]
SWITCHES += [("resnet1d-signal", "token", "full"), ("transformer-beats", "token", "full")]


@pytest.mark.parametrize("name, masking, head", SWITCHES)
def test_what_is_hidden_does_not_leak_and_the_rest_is_seen(name, masking, head):
    objective, batch = _make(SQUARE[name], masking=masking, head=head), _batch()
    params = _params(objective)
    question = _ask(objective, batch, KEYS)
    slots = question.view.slots
    hidden = np.asarray(question.masked.hidden)
    covered, seen = (np.asarray(_windows(slots, one)) for one in (hidden, slots.there & ~hidden))
    assert 0.1 < covered.mean() < 0.5 and not (covered & seen).any()
    noise = np.random.default_rng(1).integers(-2000, 2000, covered.shape)
    loss, aux = _loss(objective, params, batch, KEYS)
    other = batch | {"signal": np.where(covered, noise, batch["signal"]).astype(np.int16)}
    assert float(_loss(objective, params, other, KEYS)[0]) == float(loss)
    other = batch | {"signal": np.where(seen, noise, batch["signal"]).astype(np.int16)}
    assert abs(float(_loss(objective, params, other, KEYS)[0] - loss)) > 1e-4
    assert float(aux["known"]) == hidden.sum() == question.known.sum() > 300


@pytest.mark.parametrize("name, masking, head", SWITCHES)
def test_gradients_reach_what_is_used(name, masking, head):
    objective = _make(SQUARE[name], masking=masking, head=head)
    _, grads = _slope(objective, _params(objective), _batch(), KEYS)
    still = {part: {n for n, g in tree.items() if not np.abs(g).max() > 0} for part, tree in grads.items()}
    assert still["head"] == ({"codebook"} if head == "factorised" else set())
    assert still["encoder"] == ({"mask_vector"} if name == "transformer-signal" else set())
    blank = grads["head"].get("blank")
    assert (blank is None) == (name == "transformer-beats")
    assert blank is None or blank.shape == ((96,) if name == "resnet1d-beats" else (12,))


def test_evaluation_asks_everybody_the_same():
    batch, found = _batch(), {}
    for name, arch in SQUARE.items():
        question = _ask(_make(arch), batch)
        slots, index = question.view.slots, question.masked.index
        found[name] = (question.known, question.code * question.known, index * question.known, slots.there)
    for name in SQUARE:
        assert all(np.array_equal(a, b) for a, b in zip(found[name], found["resnet1d-signal"], strict=True)), name
    objective = _make()
    params, order = _params(objective), np.random.default_rng(3).permutation(RECORDS)
    kept = np.asarray(_kept(objective, params, batch))
    moved = _kept(objective, params, {name: value[order] for name, value in batch.items()})
    assert np.allclose(kept[order], moved, atol=1e-4)
    other = _ask(objective, batch | {"hash": batch["hash"] + np.uint32(1)})
    assert (np.asarray(other.masked.hidden) != _ask(objective, batch).masked.hidden).any(1).all()


def test_masks_of_training_follow_the_keys_alone():
    objective, batch = _make(), _batch()
    first = _ask(objective, batch, KEYS).masked.hidden
    again = _ask(objective, batch | {"hash": batch["hash"] + np.uint32(1)}, KEYS).masked.hidden
    assert np.array_equal(first, again)
    assert (_ask(objective, batch, jax.random.split(jax.random.key(8), RECORDS)).masked.hidden != first).any(1).all()


def test_sums_are_those_of_the_kept():
    objective, batch = _make(), _batch()
    params = _params(objective)
    kept = np.asarray(_kept(objective, params, batch))
    assert kept.shape == (RECORDS, 6) and kept.dtype == np.float32 and objective.columns == ("limb", "chest")
    question = _ask(objective, batch)
    lead = np.where(question.known, objective.lead(question), -1)
    assert np.array_equal(kept[:, 1], ((lead >= 0) & (lead < 6)).sum(1))
    assert np.array_equal(kept[:, 4], (lead >= 6).sum(1))
    assert np.all(kept[:, [2, 5]] <= kept[:, [1, 4]]) and kept[:, [2, 5]].sum() > 0
    weight = np.ones(RECORDS, np.float32)
    weight[-1] = 0
    wild = {**batch, "signal": batch["signal"].copy()}
    wild["signal"][-1] = 32767
    sums, counts = _sums(objective, params, wild, weight)
    assert np.allclose(sums, kept[:-1, [0, 3]].sum(0), rtol=1e-5) and np.allclose(counts, kept[:-1, [1, 4]].sum(0))
    assert objective.mean(np.stack([sums, counts])) == pytest.approx(float(sums.sum() / counts.sum()))
    assert np.isnan(objective.mean(np.zeros((2, 2))))


def test_the_parts_of_a_batch_add_up_to_its_loss():
    objective, batch = _make(), _batch(step=60)
    params = _params(objective)
    whole, aux = _loss(objective, params, batch, KEYS)
    parts = []
    for at in (slice(0, RECORDS // 2), slice(RECORDS // 2, RECORDS)):
        loss, own = _loss(objective, params, {name: value[at] for name, value in batch.items()}, KEYS[at])
        parts.append((float(loss), float(own["known"])))
    total = sum(known for _, known in parts)
    assert total == float(aux["known"])
    assert sum(loss * known for loss, known in parts) / total == pytest.approx(float(whole), rel=1e-5)
    assert min(aux["loss_limb"], aux["loss_chest"]) <= whole <= max(aux["loss_limb"], aux["loss_chest"])
    assert 0 <= float(aux["accuracy"]) < 0.5


@pytest.mark.parametrize("name", ["resnet1d-beats", "transformer-beats"])
def test_room_for_more_beats_changes_nothing(name):
    batch, kept = _batch(), []
    for slots in (132, 252):
        objective = _make(SQUARE[name], slots=slots)
        kept.append(np.asarray(_kept(objective, _params(objective), batch)))
    assert np.allclose(*kept, atol=2e-3) and kept[0][:, 1].min() > 0


def test_slots_without_a_code_are_never_asked_for():
    objective, batch = _make(), _batch()
    codes = batch["codes"].copy()
    codes[:, ::3] = NO_CODE
    question = _ask(objective, batch | {"codes": codes}, KEYS)
    whole = _ask(objective, batch, KEYS)
    assert np.array_equal(question.masked.hidden, whole.masked.hidden)
    assert np.array_equal(question.known, np.asarray(whole.known) & (np.asarray(whole.masked.index) % 3 > 0))
    empty = batch | {"rpeaks": np.full_like(batch["rpeaks"], -1), "codes": np.full_like(codes, NO_CODE)}
    params = _params(objective)
    (loss, aux), grads = _slope(objective, params, empty, KEYS)
    assert float(loss) == float(aux["known"]) == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))
    assert np.all(_kept(objective, params, empty) == 0)


def test_dead_leads_are_never_asked_for():
    batch = _batch()
    batch["signal"][0, :, [0, 7]] = 0
    batch["signal"][1] = 0
    for masking in ("beat", "token"):
        question = _ask(_make(masking=masking), batch)
        lead = np.where(question.known, _make().lead(question), -1)
        assert not np.isin(lead[0], [0, 7]).any() and not question.known[1].any()
        assert set(lead[0]) == {-1, *range(12)} - {0, 7}
    whole = _ask(_make(masking="token"), _batch())
    inner = whole.view.slots.inner[0].sum()
    assert question.masked.hidden[0].sum() == round(0.5 * float(inner) * 10 / 12)


def test_padding_counts_where_it_is_asked_for():
    objective, batch = _make(padding=True, padding_code=3, masking="token"), _batch()
    question = _ask(objective, batch, KEYS)
    assert np.all(np.asarray(question.known).sum(1) == 66) and objective.columns[2] == "padding"
    padded = np.asarray(objective.lead(question)) == 12
    assert padded.any() and np.all(np.asarray(question.code)[padded] == 3)
    params = _params(objective)
    kept = np.asarray(_kept(objective, params, batch))
    assert kept.shape == (RECORDS, 9) and np.all(kept[:, [1, 4, 7]].sum(1) == 66) and kept[:, 7].sum() > 0
    aux = _loss(objective, params, batch, KEYS)[1]
    assert float(aux["known"]) == 66 * RECORDS and aux["loss_padding"] > 0
    assert params["head"]["lead_kernel"].shape[0] == 13


def test_crops_keep_whole_beats():
    objective = _make(SQUARE["transformer-signal"], crop=400, slots=60)
    question = _ask(objective, _batch(), KEYS)
    slots, first = question.view.slots, np.asarray(question.view.first)[:, None]
    there = np.asarray(slots.there)
    assert np.all(np.where(there, slots.start - first >= 0, True)) and np.all(
        np.where(there, slots.end - first <= 400, True)
    )
    assert question.known.any(1).all() and np.isfinite(_loss(objective, _params(objective), _batch(), KEYS)[0])
    moved = [_ask(objective, _batch(), jax.random.split(jax.random.key(s), RECORDS)).view.slots.start for s in (1, 2)]
    assert (moved[0] != moved[1]).any()


def test_batch_norm_statistics_are_carried():
    objective = _make(dataclasses.replace(RESNET, norm="batch"))
    params = _params(objective)
    _, aux = _loss(objective, params, _batch(), KEYS)
    new, scalars = objective.absorb(params, aux)
    assert set(scalars) == {"known", "accuracy", "loss_limb", "loss_chest"}
    moved = [
        n for n in new["encoder"] if "_running_" in n and not np.array_equal(new["encoder"][n], params["encoder"][n])
    ]
    assert len(moved) == len([n for n in params["encoder"] if "_running_" in n]) > 0


def test_features_and_width():
    objective = _make(RESNET)
    params = _params(objective)
    features = jax.jit(objective.features)({"encoder": params["encoder"]}, _batch())
    assert features.shape == (RECORDS, RESNET.features + 1)
    assert objective.at_width(6).arch.width == 6 and objective.fields == ("signal", "valid", "rpeaks", "codes")
    assert objective.head_macs > 0


@pytest.mark.parametrize("name", SQUARE)
def test_it_learns_what_the_visible_beats_tell(name):
    """All beats of a record have the code that its amplitude says."""
    objective, batch = _make(SQUARE[name]), _batch()
    kind = np.arange(RECORDS) % 2
    batch["signal"] = (batch["signal"] * (1 + 3 * kind)[:, None, None]).astype(np.int16)
    batch["codes"] = np.where(batch["codes"] == NO_CODE, NO_CODE, kind[:, None]).astype(np.uint16)
    params = _params(objective)
    state = _ADAM.init(params)
    for i in range(50):
        (_, aux), slope = _slope(objective, params, batch, jax.random.split(jax.random.key(i), RECORDS))
        params, state = _update(params, slope, state)
    kept = np.asarray(_kept(objective, params, batch), float)
    loss = kept[:, [0, 3]].sum() / kept[:, [1, 4]].sum()
    assert loss < 0.2, "log 2 is what the mix of both kinds gives"
    assert float(aux["accuracy"]) > 0.9


_ADAM = optax.adam(5e-3)


@jax.jit
def _update(params, slope, state):
    update, state = _ADAM.update(slope, state)
    return optax.apply_updates(params, update), state
