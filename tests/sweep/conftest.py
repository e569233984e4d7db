"""A small simulated data set and the sweep over it that the tests launch, kill and go on with."""

import dataclasses
import os
from pathlib import Path

import pytest

from ecg_jax import cli
from ecg_jax.sweep import spec

SWEEP = """
[data.synthetic]
folders = ["DATA"]
task = "code"

[run]
model.crop = 100
optim.lr = 1e-2
optim.warmup_steps = 2
recipe.kind = "steps"
recipe.steps = 24
recipe.eval_every = 8
train.batch = 16
checkpoint.every_steps = 4

[[grid]]
data = "synthetic"
architectures = ["transformer"]
inputs = ["signal"]
paradigms = ["SL"]
rungs = ["d1"]
subsets = [0.5, 1.0]

[[tuning]]
data = "synthetic"
rungs = ["d1"]
subsets = [1.0]
rates = [1e-2, 3e-2]
extensions = 0

[[probe]]
folders = ["DATA"]
task = "code"
bootstrap = 20
"""


@pytest.fixture(scope="session")
def toml(tmp_path_factory) -> Path:
    """A sweep of one family: two trials, two runs, a probe of each run."""
    out = tmp_path_factory.mktemp("sweep")
    options = [f"--option={pair}" for pair in ("records=420", "val=48", "test=48", "prevalence=balanced")]
    assert cli.main(["convert", "synthetic", "--out", str(out / "data"), "--workers", "1", *options]) == 0
    (out / "sweep.toml").write_text(SWEEP.replace("DATA", str(out / "data")))
    return out / "sweep.toml"


@pytest.fixture
def tiny(toml) -> spec.Sweep:
    """The same, read."""
    return spec.load(toml)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of child processes: this package, one cache of compiled programs for all tests, programs compiled fast."""
    root = Path(spec.__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    return os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": cache, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture
def changed(tiny):
    """`tiny` with fields of its only grid or tuning replaced: `changed(grid={...}, tuning={...})`."""

    def make(grid=None, tuning=None, **fields) -> spec.Sweep:
        grids = (dataclasses.replace(tiny.grids[0], **(grid or {})),)
        tunings = (dataclasses.replace(tiny.tunings[0], **(tuning or {})),)
        return dataclasses.replace(tiny, **{"grids": grids, "tunings": tunings} | fields)

    return make
