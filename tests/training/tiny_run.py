"""A data set of a few hundred noisy records whose labels can be learned, a configuration and a toy objective.

Also a program: `python tiny_run.py RUN_DIR [section.key=value ...]` trains the toy on it, for tests that need a
process of their own.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax import config as config_lib
from ecg_jax.config import Config
from ecg_jax.models import flops, ladder
from ecg_jax.objectives import supervised
from ecg_jax.records.leads import LEADS
from ecg_jax.shards.tables import Table

LABELS = ("up", "slow", "rare")
BASE = (
    "data.task=tiny",
    "model.rung=Td1",
    "model.input=signal",
    "model.crop=200",
    "optim.lr=0.05",
    "optim.warmup_steps=4",
    "recipe.kind=steps",
    "recipe.steps=24",
    "recipe.eval_every=8",
    "train.batch=16",
    "train.log_every=4",
    "checkpoint.every_seconds=0",
)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Stands for `supervised.Objective` where the model does not matter: one hidden layer, compiled in no time."""

    crop: int = 200
    n_labels: int = len(LABELS)
    arch = ladder.get("Td1")
    fields = ("signal", "labels")
    mean = supervised.Objective.mean

    @property
    def columns(self):
        return tuple(map(str, range(self.n_labels)))

    @property
    def start(self):
        return {"prior": jax.ShapeDtypeStruct((self.n_labels,), jnp.float32)}

    @property
    def training_flops(self):
        return flops.training_flops(self.arch, self.crop)

    def init(self, key, start):
        prior = start["prior"]
        kernel = jax.random.normal(key, (len(LEADS), 8)) * 0.3
        head = {"kernel": jnp.full((8, self.n_labels), 0.1), "bias": jnp.log(prior) - jnp.log1p(-prior)}
        return {"encoder": {"stem_kernel": kernel, "stem_bias": jnp.zeros(8)}, "head": head}

    def loss(self, params, batch, keys):
        total, known = self.sums(params, batch, jnp.ones(len(batch["labels"])), keys)
        return total.sum() / known.sum(), {"known": known.mean() / len(batch["labels"])}

    def absorb(self, params, aux):
        return params, aux

    def sums(self, params, batch, weight, keys=None):
        return supervised.bce_sums(self.logits(params, batch, keys), batch["labels"], weight)

    def logits(self, params, batch, keys=None):
        x = batch["signal"].astype(jnp.float32) * 1e-3
        if keys is not None:
            start = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000 - self.crop))(keys)
            x = jax.vmap(lambda one, at: jax.lax.dynamic_slice_in_dim(one, at, self.crop))(x, start)
        power = jnp.square(x @ params["encoder"]["stem_kernel"] + params["encoder"]["stem_bias"]).mean(1)
        return power @ params["head"]["kernel"] + params["head"]["bias"]


def table(records: int, seed: int, capacity: int = 0, bayes: bool = False) -> Table:
    """`records` records of noise; a sine is added to lead k where label k is positive. 5 % of labels unknown."""
    rng = np.random.default_rng(seed)
    truth = rng.random((records, len(LABELS))) < (0.5, 0.3, 0.1)
    signal = rng.normal(0, 300, (records, 1000, len(LEADS)))
    signal[:, :, : len(LABELS)] += 400 * truth[:, None, :] * np.sin(np.arange(1000) / 5)[:, None]
    labels = truth.astype(np.int8)
    labels[rng.random(labels.shape) < 0.05] = -1
    lane = rng.integers(0, 8, records).astype(np.int32)
    lane[:8] = np.arange(8)
    return Table(
        signal=signal.astype(np.int16),
        labels=labels,
        label_names=LABELS,
        valid=np.tile(np.array([0, 1000], np.int32), (records, 1)),
        lane=lane,
        record_hash=rng.integers(0, 2**64, records, np.uint64),
        group_hash=rng.integers(0, 2**64, records, np.uint64),
        record_ids=[f"r{i}" for i in range(records)],
        age=np.full(records, np.nan, np.float32),
        sex=np.full(records, np.nan, np.float32),
        bayes=np.clip(truth.astype(np.float32), 0.1, 0.9) if bayes else None,
        unit="mV",
        leads=LEADS,
        capacity=max(capacity, int(np.bincount(lane, minlength=8).max())),
    )


def tables(train: int = 160, capacity: int = 40) -> dict[str, Table]:
    """train, val and test; `capacity` fixes the shapes, whatever the number of training records."""
    return {"train": table(train, 1, capacity), "val": table(64, 2), "test": table(96, 3, bayes=True)}


def config(*overrides: str) -> Config:
    """The base configuration with overrides."""
    return config_lib.override(Config(), [*BASE, *overrides])


if __name__ == "__main__":
    from ecg_jax.errors import EcgJaxError
    from ecg_jax.training import loop

    loop.objectives.make = lambda config, n, _: Toy(config.model.crop, n)
    try:
        loop.train(config(*sys.argv[2:]), sys.argv[1], tables=tables(), quiet=True)
    except EcgJaxError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
