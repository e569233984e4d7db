"""Baselines of masked codes: the same targets as the objective, each told apart by data that only it can predict."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ecg_jax.evaluation import code_baselines, code_linear
from ecg_jax.evaluation.code_baselines import Grid, fit_and_score, score
from ecg_jax.models import ladder
from ecg_jax.objectives import masked_codes
from ecg_jax.records.windows import NO_CODE
from ecg_jax.shards.tables import Table

CODES, DIM, STEPS = 4, 3, 100
ARCH = ladder.for_input(ladder.TransformerConfig(8, 1, 1), "beats")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _objective(masking="token", **more):
    return masked_codes.make(ARCH, CODES, DIM, masking=masking, scale="mv", slots=132, **more)


def _book(seed=0):
    rows = np.random.default_rng(seed).normal(size=(CODES, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _table(records, seed, code, signal=None):
    """Regular beats; `code(rng, lead, beat)` gives the codes of a record, int [12, n], `signal` its samples."""
    rng = np.random.default_rng(seed)
    peaks = np.full((records, 50), -1, np.int16)
    codes = np.full((records, 256), NO_CODE, np.uint16)
    samples = rng.normal(0, 50, (records, 1000, 12))
    for i in range(records):
        own = np.arange(rng.integers(20, 60), 1000, rng.integers(92, 110))
        n, peaks[i, : len(own)] = len(own), own
        made = code(rng, *np.meshgrid(np.arange(12), np.arange(n), indexing="ij"))
        codes[i, : 12 * n] = np.broadcast_to(made, (12, n)).reshape(-1)
        if signal is not None:
            for lead, beat in np.ndindex(12, n):
                a = max(int(own[beat]) - 10, 0)
                samples[i, a : own[beat] + 10, lead] += signal(codes[i, lead * n + beat])
    return Table(
        signal=samples.astype(np.int16),
        labels=np.zeros((records, 0), np.int8),
        label_names=(),
        valid=np.tile([[0, 1000]], (records, 1)).astype(np.int32),
        lane=np.zeros(records, np.int32),
        record_hash=rng.integers(0, 2**63, records, dtype=np.uint64),
        group_hash=rng.integers(0, 2**63, records, dtype=np.uint64),
        record_ids=[str(i) for i in range(records)],
        age=np.zeros(records, np.float32),
        sex=np.zeros(records, np.float32),
        bayes=None,
        unit="mV",
        leads=(),
        capacity=records,
        rpeaks=peaks,
        codes=codes,
    )


def _three(code, signal=None, sizes=(70, 30, 40)):
    return [_table(n, seed, code, signal) for seed, n in enumerate(sizes)]


def _found(objective, tables, steps=STEPS):
    scores = fit_and_score(objective, *tables, _book(), steps=steps)
    return scores, {name: scores.mean(name) for name in code_baselines.NAMES}


def _any(rng, lead, beat):
    return rng.choice(CODES, lead.shape, p=[0.6, 0.2, 0.1, 0.1])


ENTROPY = -sum(p * np.log(p) for p in (0.6, 0.2, 0.1, 0.1))


@pytest.mark.parametrize("masking", ["token", "beat"])
def test_the_targets_are_the_objectives(masking):
    objective, tables = _objective(masking), _three(_any, sizes=(30, 10, 70))
    tables[2].codes[:, ::5] = NO_CODE
    scores, _ = _found(objective, tables, 0)
    start = {"prior": np.full(CODES, 0.25), "codebook": _book()}
    params = jax.jit(objective.init)(jax.random.key(0), start)
    words = np.stack([tables[2].record_hash >> np.uint64(32), tables[2].record_hash & np.uint64(0xFFFFFFFF)], 1)
    batch = {name: getattr(tables[2], name) for name in objective.fields} | {"hash": words.astype(np.uint32)}
    kept = np.asarray(jax.jit(objective.logits)(params, batch))
    assert np.array_equal(scores.counts, kept[:, [1, 4]]) and scores.counts.min() > 10


def test_unigram_is_the_entropy_of_shares():
    scores, found = _found(_objective(), _three(_any), 0)
    assert found["unigram"] == pytest.approx(ENTROPY, abs=0.04)
    assert all(found[name] == pytest.approx(found["unigram"], abs=0.02) for name in code_baselines.NAMES)
    assert scores.chosen["copied"][0] < 0.1 and scores.chosen["linear_step"] == 0
    tables = _three(_any)
    count = np.bincount(_inner_codes(tables[0]), minlength=CODES) + 0.5
    share = count / count.sum()
    objective = _objective()
    (_, grid), *_ = code_baselines._grids(objective, tables[2], np.arange(40))
    label = np.asarray(grid.label)
    assert found["unigram"] == pytest.approx(-np.log(share[label[label >= 0]]).mean(), rel=1e-6)


def _inner_codes(table):
    parts = [np.asarray(g.inner) for _, g in code_baselines._grids(_objective(), table, np.arange(len(table)))]
    inner = np.concatenate(parts)
    return inner[inner >= 0]


def test_position_knows_lead_and_place():
    tables = _three(lambda rng, lead, beat: (lead + beat) % CODES)
    scores, found = _found(_objective(), tables, 0)
    assert found["position"] < 0.15 and min(found["unigram"], found["copy"]) > 1
    # Of the lead alone, which the linear predictor starts from.
    tables = _three(lambda rng, lead, beat: lead % CODES)
    scores, found = _found(_objective(), tables, 0)
    assert found["position"] < 0.05 and found["linear"] < 0.05 and found["unigram"] > 1.3
    assert scores.mean("position", 0) > 0 and scores.counts.sum() > 1000


def test_copy_knows_the_neighbour():
    tables = _three(lambda rng, lead, beat: rng.integers(0, CODES, (12, 1)))
    for masking in ("token", "beat"):
        scores, found = _found(_objective(masking), tables, 0)
        assert found["copy"] < 0.15 and min(found["unigram"], found["position"], found["linear"]) > 1.2
        assert 0.9 < scores.chosen["copied"][0] < 1
    # Half of the neighbours are alike: the weight is what the chance of a lucky unigram leaves.
    tables = _three(
        lambda rng, lead, beat: np.where(rng.random(lead.shape) < 0.7, rng.integers(0, CODES), _any(rng, lead, beat))
    )
    scores, found = _found(_objective(), tables, 0)
    assert 0.3 < scores.chosen["copied"][0] < 0.6 and found["copy"] < found["unigram"] - 0.1


def test_linear_knows_the_other_leads_of_the_beat():
    """Each beat has a code of its own, in all leads, that its height tells."""
    tables = _three(lambda rng, lead, beat: rng.integers(0, CODES, (1, beat.shape[1])), lambda code: 400.0 * code)
    scores, found = _found(_objective(), tables, 300)
    assert found["linear"] < 0.7 and min(found["unigram"], found["position"], found["copy"]) > 1.2
    assert scores.chosen["linear_step"] > 0 and scores.chosen["linear_rate"] in code_linear.RATES
    _, blind = _found(_objective("beat"), tables, 300)
    assert blind["linear"] > 1.2, "nothing of the beat itself is to be seen"


def test_linear_knows_the_nearest_beat_where_all_leads_are_hidden(monkeypatch):
    tables = _three(lambda rng, lead, beat: (rng.integers(0, CODES) + lead // 6) % CODES, lambda code: 400.0 * code)
    _, found = _found(_objective("beat"), tables, 300)
    assert found["linear"] < 0.3 and found["unigram"] > 1.2
    monkeypatch.setattr(code_linear, "DIRECT_CODES", 2)  # through the rows of the codebook
    _, through = _found(_objective("beat"), tables, 299)
    assert through["linear"] < 0.6 and through["linear"] != found["linear"]


@pytest.mark.parametrize("masking", ["token", "beat"])
def test_no_hidden_wave_is_looked_at(masking):
    objective = _objective(masking)
    (_, grid), *_ = code_baselines._grids(objective, _three(_any)[2], np.arange(40))
    linear = code_linear.Linear(_book(), np.full((12, CODES), 0.25))
    linear._params["kernel"] = np.random.default_rng(0).normal(size=linear._params["kernel"].shape)
    before = np.asarray(linear.nats(grid))
    visible = np.asarray(grid.visible)[..., None]
    after = linear.nats(grid._replace(wave=np.where(visible, grid.wave, 99.0)))
    assert np.array_equal(before, after)
    assert not np.allclose(before, linear.nats(grid._replace(wave=np.where(visible, 99.0, grid.wave))))
    asked = np.asarray(grid.label) >= 0
    assert not (visible[..., 0] & asked).any() if masking == "token" else visible[..., 0][asked].all()


def test_near_is_the_nearest_visible_beat_of_the_lead():
    for masking in ("token", "beat"):
        objective = _objective(masking)
        table = _three(_any)[2]
        (_, grid), *_ = code_baselines._grids(objective, table, np.arange(40))
        grid = Grid(*map(np.asarray, grid))
        for i in range(3):
            n = int(grid.n[i])
            stored = table.codes[i, : 12 * n].reshape(12, n)
            peak = table.rpeaks[i, :n].astype(int)
            visible = grid.label[i, :n].T < 0
            for lead, beat in np.ndindex(12, n):
                away = np.where(visible[lead], np.abs(peak - peak[beat]), 9999)
                assert grid.away[i, beat, lead] == pytest.approx(away.min() / 100)
                assert grid.near[i, beat, lead] in stored[lead, away == away.min()]


def test_smoothing_is_the_formula():
    counted = object.__new__(code_baselines._Counts)
    counted._codes, counted._smoothing = 4, [2.0]
    cell, code = np.array([0, 0, 0, 5]), np.array([1, 1, 3, 2])
    counted._levels = [(np.unique(cell, return_counts=True), np.unique(cell * 4 + code, return_counts=True))]
    got = counted._smoothed(0, np.array([0, 0, 5, 7]), np.array([1, 2, 2, 2]), np.full(4, 0.25))
    assert np.allclose(got, [(2 + 0.5) / 5, 0.5 / 5, (1 + 0.5) / 3, 0.25])


def test_results_are_shared_by_networks_and_repeat(monkeypatch):
    tables = _three(_any, sizes=(20, 10, 12))
    first = fit_and_score(_objective(), *tables, _book(), steps=LOOKS)
    wide = masked_codes.make(dataclasses.replace(ARCH, width=16), CODES, DIM, scale="mv", slots=132)
    assert fit_and_score(wide, *tables, _book(), steps=LOOKS) is first
    monkeypatch.setattr(code_baselines, "_found", {})
    again = fit_and_score(_objective(), *tables, _book(), steps=LOOKS)
    assert again is not first and all(np.array_equal(again.sums[k], first.sums[k]) for k in first.sums)
    assert fit_and_score(_objective("beat"), *tables, _book(), steps=0) is not again


LOOKS = code_linear.LOOK


def test_score_is_plain_numbers_with_intervals():
    out = score(_objective(), *_three(_any), _book(), steps=0)
    assert json.loads(json.dumps(out)) == out and out["targets"] > 1000
    for name in code_baselines.NAMES:
        assert out[name]["ci_low"] < out[name]["all"] < out[name]["ci_high"]
        assert (
            min(out[name]["limb"], out[name]["chest"]) <= out[name]["all"] <= max(out[name]["limb"], out[name]["chest"])
        )


def test_records_without_beats_change_nothing():
    tables = _three(_any, sizes=(20, 10, 12))
    more = _three(_any, sizes=(20, 10, 12))
    more[2].rpeaks[3:5], more[2].codes[3:5] = -1, NO_CODE
    whole, some = (fit_and_score(_objective(), *t, _book(), steps=0) for t in (tables, more))
    keep = np.delete(np.arange(12), [3, 4])
    assert np.all(some.counts[3:5] == 0) and np.array_equal(some.counts[keep], whole.counts[keep])
    assert all(np.allclose(some.sums[k][keep], whole.sums[k][keep]) for k in some.sums)
