"""The readout: cross-entropy and its gradient by definition, features by hand, targets apart from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ecg_jax.errors import UsageError
from ecg_jax.models import ladder
from ecg_jax.objectives import readout

RESNET = ladder.ResNet1dConfig(4, kernel=5, strides=(4, 4, 2), groups=1)
BATCH, TARGETS, CODES, DIM = 3, 7, 11, 6


def _plain(points, rows, bias, code, weight):
    """Cross-entropy as a textbook has it, for automatic differentiation."""
    share = jax.nn.log_softmax(jnp.einsum("bkd,nd->bkn", points, rows, precision="highest") + bias)
    ce = -jnp.take_along_axis(share, code[:, :, None], axis=2)[:, :, 0]
    return (ce * weight).sum(), ce


def _numbers(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    points, rows, bias = (rng.normal(size=s).astype(np.float32) for s in ((batch, TARGETS, DIM), (CODES, DIM), CODES))
    best = (np.einsum("bkd,nd->bkn", 3 * points, rows) + bias).argmax(-1)
    code = jnp.asarray(np.where(np.arange(TARGETS) % 3, rng.integers(0, CODES, best.shape), best))
    share = np.linspace(0, 1, batch)[:, None]  # of the places: none in the first record, all in the last
    weight = (rng.random((batch, TARGETS)) * (rng.random((batch, TARGETS)) < share)).astype(np.float32)
    return 3 * points, rows, bias, code, weight


@pytest.mark.parametrize("batch, groups, size", [(3, 1, 21), (3, 1, 1), (3, 1, 5), (16, 8, 3), (4, 4, 7)])
def test_cross_entropy_and_gradient_are_the_definitions(monkeypatch, batch, groups, size):
    monkeypatch.setitem(readout.CHUNK_BYTES, "cpu", 4 * groups * size * CODES)
    assert readout.turn_size(groups, batch // groups * TARGETS, CODES) == size
    points, rows, bias, code, weight = _numbers(batch=batch)

    def wanted(points, rows, bias):
        total, ce = _plain(points, rows, bias, code, weight)
        return 2 * total, ce  # a slope other than 1

    def got(points, rows, bias):
        total, ce, right = readout.cross_entropy(True, "highest", points, rows, bias, code, weight)
        return 2 * total, (ce, right)

    (total, ce), slopes = jax.value_and_grad(wanted, argnums=(0, 1, 2), has_aux=True)(points, rows, bias)
    (own, (own_ce, right)), own_slopes = jax.value_and_grad(got, argnums=(0, 1, 2), has_aux=True)(points, rows, bias)
    assert float(own) == pytest.approx(float(total), rel=1e-6)
    scored = weight > 0
    assert np.allclose(own_ce, ce * scored, atol=1e-5) and 0.3 < scored.mean() < 0.7
    for a, b in zip(own_slopes, slopes, strict=True):
        assert np.abs(b).max() > 0.01 and np.allclose(a, b, atol=1e-5)
    best = (np.einsum("bkd,nd->bkn", points, rows) + bias).argmax(-1)
    assert np.array_equal(right, (best == code) & scored) and 0 < np.mean(right) < 1
    assert np.allclose(got(points, rows, bias)[1][0], ce * scored, atol=1e-5)  # without a gradient
    frozen = jax.grad(lambda r: readout.cross_entropy(False, "highest", points, r, bias, code, weight)[0])(rows)
    assert np.all(frozen == 0)


def test_places_without_weight_may_hold_anything():
    points, rows, bias, code, weight = _numbers()
    assert (weight == 0).any()
    wild = jnp.where(weight[:, :, None] == 0, jnp.nan, points)

    def total(points, rows, bias):
        return readout.cross_entropy(True, "highest", points, rows, bias, code, weight)[0]

    assert float(total(wild, rows, bias)) == float(total(jnp.asarray(points), rows, bias))
    slopes = jax.grad(total, argnums=(0, 1))(wild, rows, bias)
    assert all(np.isfinite(s).all() for s in slopes) and np.all(np.asarray(slopes[0])[weight == 0] == 0)


def test_nothing_to_score():
    points, rows, bias, code, weight = _numbers()
    total, ce, right = readout.cross_entropy(True, "highest", points, rows, bias, code, 0 * weight)
    assert float(total) == 0 and not np.any(ce) and not np.any(right)


def _targets(seed=0, leads=12, length=320, slots=20):
    """Targets by rising lead, some records with fewer."""
    rng = np.random.default_rng(seed)
    number = np.array([TARGETS, 4, 0])
    lead = np.sort(rng.integers(0, leads, (BATCH, TARGETS)), axis=1)
    lead[0, :4] = lead[0, 0]  # many of one lead
    start = rng.integers(0, length - 100, (BATCH, TARGETS))
    slot = np.stack([np.sort(rng.choice(slots, TARGETS, replace=False)) for _ in range(BATCH)])
    there = np.arange(TARGETS) < number[:, None]
    arrays = (start, start + rng.integers(20, 97, start.shape), slot, lead)
    return readout.Targets(*(jnp.asarray(a, jnp.int32) for a in arrays), jnp.asarray(there))


def _made(arch, on_beats=False, head="factorised", leads=12):
    own = readout.make(arch, CODES, DIM, on_beats=on_beats, head=head, leads=leads, per_lead=5)
    rng = np.random.default_rng(1)
    made = readout.init(own, jax.random.key(0), jnp.full(CODES, 1 / CODES), jnp.asarray(rng.normal(size=(CODES, DIM))))
    return own, {k: v if k != "lead_bias" else 0.1 * rng.normal(size=v.shape) for k, v in made.items()}


def _by_hand(own, head, read, targets):
    """GELU of what was read times the matrix of the lead, target by target."""
    out = np.zeros((BATCH, TARGETS, readout.READ))
    for b, k in np.argwhere(np.asarray(targets.there)):
        lead = int(targets.lead[b, k])
        out[b, k] = read(b, k) @ np.asarray(head["lead_kernel"][lead]) + head["lead_bias"][lead]
    return np.asarray(jax.nn.gelu(out))


def test_a_resnet_is_read_over_the_beats_window():
    own, head = _made(RESNET)
    assert own.sources == ((8, 16), (12, 32)) and own.groups == 1  # not the first stage, of stride 4
    rng = np.random.default_rng(2)
    frames = tuple(rng.normal(size=(BATCH, 320 // s, d)).astype(np.float32) for d, s in own.sources)
    targets = _targets()

    def read(b, k):
        inside = slice(int(targets.start[b, k]), int(targets.end[b, k]))
        parts = [np.repeat(f[b], s, axis=0)[inside].mean(0) for f, (_, s) in zip(frames, own.sources, strict=True)]
        return sum(part @ np.asarray(head[f"read{i}_kernel"]) for i, part in enumerate(parts)) + head["read_bias"]

    got = jax.jit(readout.features, static_argnums=0)(own, head, frames, targets)
    assert np.allclose(got, _by_hand(own, head, read, targets), atol=1e-4) and np.abs(got).max() > 0.1


@pytest.mark.parametrize("together", [1, 3, 12])
def test_a_transformer_is_read_in_the_targets_own_lead(together):
    arch = ladder.TransformerConfig(8, 1, 1, patch=40, leads_per_token=together)
    own, head = _made(arch)
    assert own.sources == ((8, 40),) and own.groups == 12 // together
    frames = np.random.default_rng(2).normal(size=(BATCH, own.groups, 8, 8)).astype(np.float32)  # 8 patches of 8
    targets = _targets()

    def read(b, k):
        group = frames[b, int(targets.lead[b, k]) // together]
        inside = np.repeat(group, 40, axis=0)[int(targets.start[b, k]) : int(targets.end[b, k])]
        return inside.mean(0) @ np.asarray(head["read0_kernel"])

    got = readout.features(own, head, (frames.reshape(BATCH, -1, 8),), targets)
    assert np.allclose(got, _by_hand(own, head, read, targets), atol=1e-4) and np.abs(got).max() > 0.1


@pytest.mark.parametrize("leads", [12, 13])
def test_beats_are_read_at_their_own_slot(leads):
    own, head = _made(ladder.for_input(RESNET, "beats"), on_beats=True, leads=leads)
    assert own.sources == ((12, 0),)
    frames = np.random.default_rng(2).normal(size=(BATCH, 20, 12)).astype(np.float32)
    targets = _targets(leads=leads)

    def read(b, k):
        return frames[b, int(targets.slot[b, k])] @ np.asarray(head["read0_kernel"])

    got = readout.features(own, head, (frames,), targets)
    assert np.allclose(got, _by_hand(own, head, read, targets), atol=1e-4) and np.abs(got).max() > 0.1


def test_places_without_a_target_give_no_gradient():
    own, head = _made(ladder.for_input(RESNET, "beats"), on_beats=True)
    frames = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, 20, 12)))
    targets = _targets()

    def total(frames):
        return (readout.features(own, head, (frames,), targets) ** 2).sum()

    moved = np.abs(jax.grad(total)(frames)).sum(2) > 0
    wanted = np.zeros_like(moved)
    for b, k in np.argwhere(np.asarray(targets.there)):
        wanted[b, targets.slot[b, k]] = True
    assert np.array_equal(moved, wanted) and wanted.any()


@pytest.mark.parametrize("head", readout.HEADS)
def test_the_start_tells_codes_by_their_prior(head):
    own = readout.make(RESNET, CODES, DIM, on_beats=False, head=head, leads=12, per_lead=5)
    prior = np.arange(CODES, dtype=np.float32)  # the first code never occurs
    codebook = np.random.default_rng(0).normal(size=(CODES, DIM))
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    made = readout.init(own, jax.random.key(0), jnp.asarray(prior), jnp.asarray(codebook))
    assert ("codebook" in made) == (head == "factorised")
    features = jax.nn.gelu(np.random.default_rng(1).normal(size=(BATCH, 200, readout.READ)))
    code = np.random.default_rng(2).choice(CODES, (BATCH, 200), p=prior / prior.sum())
    weight = np.full(code.shape, 1 / code.size)
    loss, ce, _ = readout.score(own, made, features, code, weight, precision="highest")
    assert float(loss) == pytest.approx(-np.log(prior[code] / prior.sum()).mean(), abs=0.02)
    assert np.isfinite(made["bias"]).all() and float(ce.mean()) == pytest.approx(float(loss), rel=1e-5)
    slopes = jax.grad(lambda h: readout.score(own, h, features, code, weight, precision="highest")[0])(made)
    assert np.abs(slopes["code_kernel"]).max() > 0 and np.abs(slopes["bias"]).max() > 0
    if head == "factorised":
        assert np.all(slopes["codebook"] == 0)


@pytest.mark.parametrize("head", readout.HEADS)
@pytest.mark.parametrize("world", ["signal", "beats", "patches"])
def test_macs_are_those_of_the_program(monkeypatch, world, head):
    arch = ladder.TransformerConfig(8, 1, 1, patch=40) if world == "patches" else ladder.for_input(RESNET, world)
    own, made = _made(arch, on_beats=world == "beats", head=head)
    targets = _targets()
    lengths = [own.groups * 320 // s if s else 20 for _, s in own.sources]
    frames = tuple(jnp.zeros((BATCH, f, d)) for f, (d, _) in zip(lengths, own.sources, strict=True))

    def run(made, frames, targets):
        features = readout.features(own, made, frames, targets)
        return readout.score(own, made, features, targets.slot % CODES, targets.there * 1.0, precision="highest")

    monkeypatch.setitem(readout.CHUNK_BYTES, "cpu", 1 << 30)  # one turn
    products = [0]

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                ((left, _), _) = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                products[0] += eqn.outvars[0].aval.size * int(np.prod([shape[i] for i in left]))
            for inner in jaxprs_in_params(eqn.params):
                count(inner)

    count(jax.make_jaxpr(run)(made, frames, targets).jaxpr)
    assert products[0] == BATCH * readout.macs(own, 320 if world != "beats" else 20, TARGETS)


def test_an_unknown_head_is_refused():
    with pytest.raises(UsageError, match="did you mean 'factorised'"):
        _made(RESNET, head="factorized")
