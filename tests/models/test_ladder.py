"""Rungs: exact counts, golden dumps of shapes and starting values.

After an intended change: `ECG_JAX_UPDATE_GOLDEN=1 python -m pytest tests/models/test_ladder.py` rewrites the
golden files; look at the difference before committing it.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import models
from ecg_jax.errors import UsageError
from ecg_jax.models import ladder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rungs"
UPDATE = os.environ.get("ECG_JAX_UPDATE_GOLDEN") == "1"
MEASURED_UP_TO = 2_000_000  # parameters; larger rungs are checked by shape and starting rule only
MEASURED_ALWAYS = 25_000  # larger ones are measured when the golden files are rewritten
STUDY = {
    "R1": 27_816,
    "R2": 61_788,
    "R3": 169_860,
    "R4": 432_288,
    "R5": 969_456,
    "R6": 1_720_640,
    "R7": 3_637_440,
    "R8": 6_865_536,
    "R9": 14_528_896,
    "R10": 32_674_368,
    "R11": 90_727_360,
    "R12": 199_582_080,
    "T1": 24_792,
    "T2": 54_976,
    "T3": 158_272,
    "T4": 459_840,
    "T5": 1_008_000,
    "T6": 1_876_480,
    "T7": 3_583_872,
    "T8": 6_351_360,
    "T9": 14_245_632,
    "T10": 31_590_400,
    "T11": 85_154_304,
    "T12": 201_672_704,
}


def test_study_counts_are_the_published_ladder():
    assert {name: ladder.count(ladder.get(name)) for name in STUDY} == STUDY
    assert set(ladder.RUNGS) == set(STUDY) | set(ladder.DEMO_RUNGS)


def test_counts_on_beats():
    """Tokens of a Transformer are then single beats of single leads; the stem of a ResNet reads 96 samples."""
    for name, count in STUDY.items():
        config = ladder.for_input(ladder.get(name), "beats")
        wider = (96 - 12) * 17 * config.width if name[0] == "R" else 0
        assert (
            ladder.count(config)
            == count + wider
            == sum(math.prod(one.shape) for one in models.parameters(config).values())
        )
        assert ladder.for_input(ladder.get(name), "auto").input == ("signal" if name[0] == "R" else "beats")
    with pytest.raises(UsageError, match=r"unknown input 'beat'.*did you mean"):
        ladder.for_input(ladder.get("R1"), "beat")


@pytest.mark.parametrize("name", list(ladder.RUNGS))
def test_golden(name):
    config = ladder.get(name)
    table = models.parameters(config)
    count = sum(math.prod(one.shape) for one in table.values())
    assert count == ladder.count(config)
    stds = {}
    if count <= MEASURED_UP_TO and (UPDATE or count < MEASURED_ALWAYS):
        values = models.init(config, jax.random.key(0))
        stds = {key: round(float(np.std(value)), 6) for key, value in values.items()}
    parameters = {
        key: {"shape": list(one.shape), "start": one.start, "std": round(one.std, 8)} for key, one in table.items()
    }
    dump = {"rung": name, "config": dataclasses.asdict(config), "count": count, "parameters": parameters}
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        for key, std in stds.items():
            parameters[key]["measured_std"] = std
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dump, indent=1) + "\n")
    golden = json.loads(path.read_text())
    measured = {key: one.pop("measured_std", None) for key, one in golden["parameters"].items()}
    for one in parameters.values():
        one.pop("measured_std", None)
    assert json.loads(json.dumps(dump)) == golden
    for key, std in stds.items():
        assert std == pytest.approx(measured[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("name", ["R1", "T1", "R12", "T12"])
def test_module_has_the_tables_shapes(name):
    config = ladder.get(name)
    x, valid = jnp.zeros((1, 1000, 12)), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(models.build(config).init, jax.random.key(0), x, valid)["params"]
    assert {key: leaf.shape for key, leaf in shapes.items()} == {
        key: one.shape for key, one in models.parameters(config).items()
    }
    assert jax.tree.structure(shapes) == jax.tree.structure(
        jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    )


@pytest.mark.parametrize("name", ["Rd3", "Td3"])
def test_starting_values_have_the_tables_spread(name):
    config = ladder.get(name)
    for key, value in models.init(config, jax.random.key(1)).items():
        one = models.parameters(config)[key]
        if one.start == "normal":
            assert np.abs(value).max() <= 2 * one.std / 0.8796
            assert np.std(value) == pytest.approx(one.std, rel=4 / math.sqrt(value.size))
        else:
            assert np.all(value == float(one.start == "ones"))


def test_starting_values_follow_the_key_only():
    config = ladder.get("Td1")
    a, b, c = (models.init(config, jax.random.key(seed)) for seed in (3, 3, 4))
    assert np.array_equal(a["patch_kernel"], b["patch_kernel"])
    assert not np.array_equal(a["patch_kernel"], c["patch_kernel"])


def test_get_refuses_what_it_does_not_know():
    with pytest.raises(UsageError, match="unknown rung 'R13'"):
        ladder.get("R13")
    with pytest.raises(UsageError, match="did you mean 'dropout'"):
        ladder.get("R1", dropuot=0.1)
    with pytest.raises(UsageError, match="Transformer"):
        ladder.get("T1", norm="batch")
    with pytest.raises(UsageError, match="unknown norm"):
        ladder.get("R1", norm="layer")
    assert ladder.get("T1", norm="group", dropout=0.1).dropout == 0.1
    assert ladder.get("R4").padded(1000) == 1024 and ladder.get("R4").padded(500) == 512
    assert ladder.get("T4").padded(1000) == 1056 and ladder.get("T4").padded(500) == 576
