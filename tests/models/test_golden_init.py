"""Starting values of every rung with its head, as golden files: shape, measured standard deviation, decay group and
rate group of each array.

After an intended change: `ECG_JAX_UPDATE_GOLDEN=1 python -m pytest tests/models/test_golden_init.py` rewrites the
files; look at the difference before committing it.
"""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax import models
from ecg_jax.models import ladder
from ecg_jax.objectives import supervised
from ecg_jax.training import optim

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "init"
UPDATE = os.environ.get("ECG_JAX_UPDATE_GOLDEN") == "1"
LABELS = 6
WHOLE = 500_000  # parameters up to which a rung is measured as it starts; larger ones array by array
SAMPLE = 100_000  # values of an array that are measured
ALWAYS = ("Rd1", "Td1", "R1", "T1")  # measured in every run, the others when the files are rewritten
SIGMAS = 5  # of the standard deviation of a measured standard deviation


def _stds(objective):
    """Standard deviation of each array by part and name: measured, or of the rules that the arrays are drawn by."""
    key, start, table = jax.random.key(0), {"prior": jnp.full(LABELS, 0.1)}, models.parameters(objective.arch)
    if objective.arch not in map(ladder.get, ALWAYS) and not UPDATE:
        head = math.sqrt(supervised.HEAD_GAIN / (objective.arch.features + 1))
        return {"encoder": {name: one.std for name, one in table.items()}, "head": {"kernel": head, "bias": 0.0}}
    if ladder.count(objective.arch) <= WHOLE:
        values = objective.init(key, start)
    else:
        encoder = {name: one.init(key, (min(math.prod(one.shape), SAMPLE),)) for name, one in table.items()}
        values = {"encoder": encoder, "head": jax.jit(lambda: objective.init(key, start)["head"])()}
    return jax.tree.map(lambda value: float(np.std(value)), values)


def _rounded(std):
    """Three digits."""
    return float(f"{std:.3g}") if std > 1e-6 else 0.0


@pytest.mark.parametrize("rung", list(ladder.RUNGS))
def test_starting_values_are_golden(rung):
    objective = supervised.make(ladder.get(rung), LABELS)
    shapes = optim.shapes(objective)
    decayed, stds = optim.decayed(shapes), _stds(objective)
    base = optim.width_factors(objective, 2 * objective.arch.width)
    scaled = jax.tree.unflatten(jax.tree.structure(shapes), list(base != 1))
    found = {
        f"{part}/{name}": {
            "shape": list(leaf.shape),
            "std": _rounded(stds[part][name]),
            "decay": decayed[part][name],
            "rate": "by width" if scaled[part][name] else "base",
        }
        for part, leaves in shapes.items()
        for name, leaf in leaves.items()
    }
    path = GOLDEN / f"{rung}.json"
    if UPDATE:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = json.loads(path.read_text())
    assert list(found) == list(golden)
    for name, entry in found.items():
        slack = SIGMAS / math.sqrt(2 * min(math.prod(entry["shape"]), SAMPLE)) if entry["std"] else 0.0
        assert entry.pop("std") == pytest.approx(golden[name].pop("std"), rel=slack), name
        assert entry == golden[name], name


def test_kernels_and_tables_are_decayed_and_nothing_else():
    for rung in ladder.RUNGS:
        for name, entry in json.loads((GOLDEN / f"{rung}.json").read_text()).items():
            assert entry["decay"] == name.endswith(("kernel", "table")), name
            assert (entry["std"] == 0) == name.endswith(("bias", "scale")), name
