"""What is learned: labels (`supervised`), codes of masked beats (`masked_codes`), or the codes themselves (`codebook`).

An objective is a frozen, hashable value that obeys `training/step.Objective`; training knows nothing else about it.
Here is the way from a configuration to one. Invariant: `resolve` leaves no "auto" that decides a result.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ecg_jax.config import Config
from ecg_jax.errors import UsageError
from ecg_jax.models import flops, ladder


def book(config: Config) -> Any:
    """The `codebook.Codebook` whose codes a run predicts, None where it predicts none.

    Raises DataError where the folder named holds none.
    """
    if config.objective.name != "masked_codes":
        return None
    from ecg_jax import codebook

    return codebook.load(Path(config.objective.codebook))


def resolve(config: Config) -> Config:
    """`config` with `model.input` and `model.beats` settled: by the rung, and by the codebook.

    Raises UsageError for beats that are not the codebook's, and for switches that the input does not know.
    """
    model, objective = config.model, config.objective
    found = book(config)
    own = found.info["beats"] if found else "robust"
    beats = own if model.beats == "auto" else model.beats
    if found and beats != own:
        raise UsageError(f"model.beats = {beats!r}, but the codes of {objective.codebook} are of {own!r} beats")
    world = "beats"
    if objective.name != "codebook":  # which has no rung
        arch = ladder.get(model.rung, norm=model.norm, dropout=model.dropout)
        world = ladder.for_input(arch, model.input).input
    if objective.padding and world != "beats":
        raise UsageError("objective.padding masks padding tokens, which only model.input=beats has")
    return dataclasses.replace(config, model=dataclasses.replace(model, input=world, beats=beats))


def make(config: Config, n_labels: int, found: Any) -> Any:
    """The objective of a resolved configuration; equal arguments give the same one.

    Args:
        n_labels: of the task, for `supervised`. found: what `book` gave.
    """
    model, objective = config.model, config.objective
    if objective.name == "codebook":
        from ecg_jax.models import vqhbr
        from ecg_jax.objectives import codebook

        sizes = dataclasses.asdict(config.codebook)
        learn = {"scale": model.scale, "mode": model.beats, "dtype": config.train.precision}
        learn |= {name: sizes.pop(name) for name in ("indices", "sample")}
        return codebook.make(vqhbr.Config(**sizes, **({"slots": model.slots} if model.slots else {})), **learn)
    arch = ladder.for_input(ladder.get(model.rung, norm=model.norm, dropout=model.dropout), model.input)
    front = {"scale": model.scale, "crop": model.crop, "random_crop": model.random_crop}
    front |= {"dtype": config.train.precision, "mode": model.beats, "slots": model.slots}
    if objective.name == "supervised":
        from ecg_jax.objectives import supervised

        return supervised.make(arch, n_labels, **front)
    from ecg_jax.objectives import masked_codes

    switches = {
        "masking": objective.masking,
        "ratio": objective.ratio,
        "padding": objective.padding,
        "head": objective.head,
    }
    if objective.padding:
        from ecg_jax.models import coder

        switches["padding_code"] = coder.padding_code(found.config, found.params)
    return masked_codes.make(arch, found.config.codes, found.config.code_dim, **switches, **front)


def training_flops(objective: Any) -> int:
    """FLOPs of forward and backward over one record, at 2 per multiply-add; of encoders without their heads."""
    front = getattr(objective, "front", None)
    return flops.training_flops(front.arch, front.length) if front else objective.training_flops
