"""Configuration: strict keys with a remedy, overrides, the JSON round trip, and what belongs to a run's
identity.
"""

import dataclasses

import pytest

from ecg_jax import config as C
from ecg_jax.errors import UsageError

TEXT = """
[data]
folders = ["/somewhere/ptbxl/1.0.3"]
task = "superclass"
[optim]
lr = 1
[recipe]
kind = "steps"
steps = 100
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def test_reads_toml_with_defaults_and_overrides(toml):
    config = C.load(toml, ["optim.lr=3e-4", "model.rung=T4", 'data.labels=["a", "b"]', "data.exclude=none"])
    assert config.optim.lr == 3e-4 and config.model.rung == "T4"
    assert config.data.labels == ("a", "b") and config.data.exclude is None
    assert config.train == C.TrainConfig()
    assert isinstance(C.load(toml).optim.lr, float), "an int in the file is a float where a float is declared"


def test_json_round_trip(toml):
    config = C.load(toml, ['data.labels=["a"]', "data.subset_records=512"])
    assert C.from_json(C.to_json(config)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr=1", "'lrr'", "did you mean 'lr'"]),
        ("optm.lr=1", ["'optm'", "did you mean 'optim'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "must be a number"]),
        ("optim.lr=-1", ["optim.lr", "above 0"]),
        ("optim.lr=nan", ["optim.lr", "finite"]),
        ("train.batch=12", ["train.batch", "multiple of the 8 lanes"]),
        ("train.accumulate=0", ["train.accumulate", "1 or more"]),
        ("train.accumulate=3", ["train.batch = 64", "train.accumulate = 3", "multiple of 24"]),
        ("optim.base_width=-1", ["optim.base_width", "0 (off) or more"]),
        ("train.batch=true", ["train.batch", "whole number"]),
        ("train.steps_per_dispatch=3", ["recipe.steps", "multiple"]),
        ("model.norm=bach", ["model.norm", "did you mean 'batch'"]),
        ("data.folders=x", ["data.folders", "list of strings"]),
        ("seed", ["section.key=value"]),
    ],
)
def test_wrong_override_names_key_and_remedy(toml, override, words):
    with pytest.raises(UsageError) as caught:
        C.load(toml, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nlr = 1\nwarmup = 3\n", ["unknown key in [optim] 'warmup'", "warmup_steps"]),
        ("[optimizer]\nlr = 1\n", ["unknown section 'optimizer'"]),
        ("optim = 3\n", ["[optim] must be a section"]),
        ("[optim\n", ["not valid TOML"]),
    ],
)
def test_wrong_file_names_itself(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        C.load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        C.load(tmp_path / "nowhere.toml")


def test_overrides_may_mend_the_file_together(tmp_path):
    """Ranges are checked once, at the end: the order of overrides does not matter."""
    path = tmp_path / "run.toml"
    path.write_text('[recipe]\nkind = "steps"\n')
    with pytest.raises(UsageError, match=r"recipe\.steps"):
        C.load(path)
    assert C.load(path, ["train.steps_per_dispatch=4", "recipe.steps=8"]).recipe.steps == 8


def test_identity_holds_what_decides_the_result(toml):
    base = C.load(toml)
    keys, digest = C.identity(base)
    assert len(digest) == 16 and keys["data.folders"] == ["ptbxl/1.0.3"] and keys["optim.lr"] == 1.0
    for text in (
        "optim.lr=2",
        "train.seed=1",
        "data.subset=0.5",
        "model.rung=R2",
        "train.batch=8",
        "train.accumulate=2",
        "optim.base_width=16",
        "recipe.steps=7",
    ):
        assert C.identity(C.override(base, [text]))[1] != digest, text
    for text in ("train.devices=1", "train.cache_dir=/tmp", "checkpoint.keep=9", "train.log_every=3"):
        assert C.identity(C.override(base, [text]))[1] == digest, text
    moved = dataclasses.replace(base, data=dataclasses.replace(base.data, folders=("/else/ptbxl/1.0.3",)))
    assert C.identity(moved)[1] == digest
