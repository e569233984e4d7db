"""What a training run is: frozen dataclasses with every default, read from TOML, written to JSON.

A file may name only what exists here, with the type that is declared here; `section.key=value` overrides on
the command line obey the same rule. Nothing else in the package holds a default of a run. `identity` says
which of the values decide the result of a run: two runs of equal identity on the same data end with the same
numbers.

It does not look at the data or at the machine. Invariant: `from_json(to_json(config)) == config`.
"""

import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ecg_jax.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class DataConfig:
    """Which records are seen: `OUT/<name>/<version>` folders, one label task, a nested subset of the
    patients.
    """

    folders: tuple[str, ...] = ()
    task: str = ""
    labels: tuple[str, ...] | None = None  # None: all labels of the task, in the card's order
    subset: float = 1.0  # share of the train patients, an arc of their order hash
    subset_records: int | None = None  # number of train records instead of a share
    subset_offset: float = 0.0  # where the arc starts, in [0, 1)
    exclude: str | None = None  # file of group hashes never to train on
    val_split: str = "val"
    test_split: str = "test"


@dataclass(frozen=True)
class ModelConfig:
    rung: str = "R1"
    norm: Literal["group", "batch"] = "group"
    pool: Literal["mean"] = "mean"
    scale: Literal["gain", "mv", "zscore"] = "gain"
    crop: int = 1000  # samples at 100 Hz; in evaluation from the centre of the record
    random_crop: bool = True  # in training from a random place of the record (false: from its centre)
    dropout: float = 0.0
    input: Literal["auto", "signal", "beats"] = "auto"  # auto: signal for ResNets, beat tokens for Transformers
    beats: Literal["auto", "robust", "heartlang"] = "auto"  # which beats; auto: the codebook's, else robust
    slots: int = 0  # beat tokens of a record, a multiple of 12 (0: as many as can be, 252, or 256 for heartlang)


@dataclass(frozen=True)
class ObjectiveConfig:
    """`supervised` learns the labels of data.task; `masked_codes` the codes of masked beats, of the codebook folder
    `codebook` (see `ecg-jax tokenize`); `codebook` learns such a codebook, of section [codebook].
    """

    name: Literal["supervised", "masked_codes", "codebook"] = "supervised"
    codebook: str = ""
    masking: Literal["token", "beat"] = "token"  # what is hidden together: one lead's beat, or a beat in all leads
    ratio: float = 0.5  # share of the beats that is hidden
    padding: bool = False  # HeartLang's way: masks fall on padding too, and it is scored
    head: Literal["factorised", "full"] = "factorised"  # through the frozen codebook, or a matrix of its own
    baseline_steps: int = 500  # of the linear baseline that the loss is shown beside


@dataclass(frozen=True)
class CodebookConfig:
    """Size and training of VQ-HBR (`models/vqhbr.py`); the defaults are HeartLang's sizes."""

    codes: int = 8192
    code_dim: int = 128
    width: int = 768
    encoder_layers: int = 4
    decoder_layers: int = 2
    heads: int = 2
    head_size: int = 64
    mlp: int = 2048
    decay: float = 0.99  # of the codebook's moving average
    beta: float = 1.0  # weight of the commitment loss
    refresh: float = 0.0  # codes used less than this share of an even use are put anew, 0.2 does well (0: never)
    faithful: bool = False  # as published: padding and the outer half second count
    indices: bool = True  # codes are made with lead and time indices (published: without)
    sample: int = 1024  # training records that k-means starts from


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. Decay acts on arrays of two and more dimensions; `clip` is the largest global norm (0: off).

    With `base_width`, matrices whose fan-in grows with the width of the network learn at `lr` times fan-in at that
    width / fan-in, so that one rate serves all widths (0: off; see `training/optim.width_factors`).
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0
    warmup_steps: int = 50
    base_width: int = 0  # the `width` of a rung, channels of its stem or of a token


@dataclass(frozen=True)
class RecipeConfig:
    """How long to train. `plateau` finds the length for itself, `steps` is told it (see
    `training/recipe.py`).
    """

    kind: Literal["plateau", "steps"] = "plateau"
    steps: int = 0  # kind "steps": the number of steps; kind "plateau": a further budget in steps (0: none)
    min_epochs: float = 2.0
    max_epochs: float = 100.0  # budget, decay included
    eval_every: int = 0  # steps (0: chosen from the sizes of train and val)
    patience: int = 4  # evaluations without a gain
    min_gain: float = 0.0  # smallest relative gain on val that counts as one
    decay_fraction: float = 0.2  # plateau: of the steps up to the best; steps: of all steps
    decay: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class TrainConfig:
    batch: int = 64
    accumulate: int = 1  # micro-batches per update: the same update (but for BatchNorm), in less memory on GPU and TPU
    lanes: int = 8
    steps_per_dispatch: int = 1
    loader: Literal["auto", "resident", "host", "stream"] = "auto"  # on the devices, mapped shards, tf.data
    seed: int = 0
    precision: Literal["float32", "bfloat16", "auto"] = "auto"  # auto: bfloat16 on GPU and TPU, float32 on CPU
    log_every: int = 10  # steps per line of metrics.jsonl
    devices: int = 0  # data-parallel devices (0: all; on a CPU as many as are fastest, see `runtime.share`)
    fsdp: int = 1  # how many of them share one copy of the large arrays
    cache_dir: str | None = None  # compiled programs (None: the user's cache folder, "": off)
    watchdog: float = 15.0  # minutes without a step after which all stacks are shown (0: never)


@dataclass(frozen=True)
class CheckpointConfig:
    every_seconds: float = 600.0
    every_steps: int = 0  # further ones at fixed updates (0: none)
    keep: int = 2  # the last ones
    keep_every: int = 0  # and for ever those of updates that this divides (0: none)


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


CODEBOOK_SIZES = ("code_dim", "width", "encoder_layers", "decoder_layers", "heads", "head_size", "mlp", "sample")
# Of [train] only these decide a result; the number of devices and where programs are cached do not.
IDENTITY_TRAIN = ("batch", "accumulate", "lanes", "steps_per_dispatch", "loader", "seed", "precision")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides in order, check types and ranges.

    Raises:
        UsageError: the file is missing or is no TOML; a section, key or value is wrong (names file, key and
        remedy).
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read config {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    config = _with_overrides(_build(tree, str(path)), overrides)
    _check_ranges(config, str(path))
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `section.key=value` strings; a value is TOML (`3e-4`, `true`, `["a","b"]`), or a bare word for a
    string.

    Raises:
        UsageError: as `load`.
    """
    config = _with_overrides(config, overrides)
    _check_ranges(config, "overrides")
    return config


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Build a Config from nested dictionaries; `where` names their origin in errors (UsageError)."""
    config = _build(tree, where)
    _check_ranges(config, where)
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain dictionaries (tuples become lists), every default written out."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Config) -> str:
    """The resolved configuration as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config") -> Config:
    """Inverse of `to_json`, as strict as `load`."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None
    return from_dict(tree, where)


def identity(config: Config) -> tuple[dict[str, Any], str]:
    """The values that decide the result, flat (`"optim.lr": 0.001`), and the first 16 hex digits of their
    SHA-256.

    A data folder counts by its last two components, name and version, so that data may move between disks; a codebook
    by its folder's name. What only concerns the machine (devices, caches, checkpoints, how often a line is logged) is
    left out, and the section of a codebook where none is trained.
    """
    tree = to_dict(config)
    if config.objective.name != "codebook":
        del tree["codebook"]
    tree["objective"]["codebook"] = Path(config.objective.codebook).name
    tree["train"] = {key: tree["train"][key] for key in IDENTITY_TRAIN}
    tree["data"]["folders"] = ["/".join(Path(folder).parts[-2:]) for folder in config.data.folders]
    tree["data"]["exclude"] = Path(config.data.exclude).name if config.data.exclude else None
    del tree["checkpoint"]
    keys = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return keys, hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def _sections() -> dict[str, Any]:
    return {item.name: item.default_factory for item in dataclasses.fields(Config)}


def _build(tree: Mapping[str, Any], where: str) -> Config:
    built = {}
    for name, values in tree.items():
        _check_name(name, _sections(), "section", where)
        section = _sections()[name]
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: [{name}] must be a section of key = value lines, not {values!r}")
        kinds = typing.get_type_hints(section)
        for key in values:
            _check_name(key, kinds, f"key in [{name}]", where)
        built[name] = section(**{k: _convert(v, kinds[k], f"{where}: {name}.{k}") for k, v in values.items()})
    return Config(**built)


def _with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    for text in overrides:
        where = f"override {text!r}"
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise UsageError(f"{where} is not of the form section.key=value, as in optim.lr=3e-4")
        _check_name(section, _sections(), "section", where)
        kinds = typing.get_type_hints(_sections()[section])
        _check_name(key, kinds, f"key in [{section}]", where)
        changed = {key: _convert(parse_value(value.strip()), kinds[key], f"{where}: {section}.{key}")}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changed)})
    return config


def _check_name(name: str, known: Any, what: str, where: str) -> None:
    if name not in known:
        hint = did_you_mean(name, list(known)) or f"; known: {', '.join(known)}"
        raise UsageError(f"{where}: unknown {what} {name!r}{hint}")


def parse_value(text: str) -> Any:
    """The value of an override as TOML reads it, else the word itself; `none` and `null` are None."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Check `value` against a declared type. An int is taken for a float, a list for a tuple, nothing
    else bends.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            hint = did_you_mean(str(value), arguments)
            raise UsageError(f"{where} = {value!r}: must be one of {', '.join(map(repr, arguments))}{hint}")
        return value
    if origin is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f'{where} = {value!r}: must be a list of strings, as ["a", "b"]')
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
        raise UsageError(f"{where} = {value!r}: must be a finite number")
    if kind in (bool, int, str) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    raise UsageError(f"{where} = {value!r}: must be {names[kind]}, not {type(value).__name__}")


def _check_ranges(config: Config, where: str) -> None:
    d, m, o, r, t, c = config.data, config.model, config.optim, config.recipe, config.train, config.checkpoint
    j, b = config.objective, config.codebook
    rules = [
        ("data.subset", d.subset, 0 < d.subset <= 1, "in (0, 1]"),
        ("data.subset_offset", d.subset_offset, 0 <= d.subset_offset < 1, "in [0, 1)"),
        (
            "data.subset_records",
            d.subset_records,
            d.subset_records is None or d.subset_records > 0,
            "above 0",
        ),
        ("model.crop", m.crop, 100 <= m.crop <= 1000, "between 100 and 1000 samples"),
        ("model.dropout", m.dropout, 0 <= m.dropout < 1, "in [0, 1)"),
        ("model.slots", m.slots, m.slots >= 0, "0 (as many as can be) or more"),
        ("objective.ratio", j.ratio, 0 < j.ratio < 1, "in (0, 1)"),
        ("objective.baseline_steps", j.baseline_steps, j.baseline_steps >= 1, "1 or more"),
        ("codebook.codes", b.codes, 2 <= b.codes <= 65535, "between 2 and 65535"),
        *((f"codebook.{name}", getattr(b, name), getattr(b, name) >= 1, "1 or more") for name in CODEBOOK_SIZES),
        ("codebook.decay", b.decay, 0 < b.decay < 1, "in (0, 1)"),
        ("codebook.beta", b.beta, b.beta >= 0, "0 or more"),
        ("codebook.refresh", b.refresh, 0 <= b.refresh < 1, "in [0, 1)"),
        ("optim.lr", o.lr, o.lr > 0, "above 0"),
        ("optim.weight_decay", o.weight_decay, o.weight_decay >= 0, "0 or more"),
        ("optim.b1", o.b1, 0 <= o.b1 < 1, "in [0, 1)"),
        ("optim.b2", o.b2, 0 <= o.b2 < 1, "in [0, 1)"),
        ("optim.eps", o.eps, o.eps > 0, "above 0"),
        ("optim.clip", o.clip, o.clip >= 0, "0 (off) or more"),
        ("optim.warmup_steps", o.warmup_steps, o.warmup_steps >= 0, "0 or more"),
        ("optim.base_width", o.base_width, o.base_width >= 0, "0 (off) or more"),
        ("recipe.steps", r.steps, r.steps > 0 or (r.kind == "plateau" and r.steps == 0), "above 0"),
        ("recipe.min_epochs", r.min_epochs, r.min_epochs >= 0, "0 or more"),
        ("recipe.max_epochs", r.max_epochs, r.max_epochs >= max(r.min_epochs, 1e-9), "at least min_epochs"),
        ("recipe.eval_every", r.eval_every, r.eval_every >= 0, "0 (chosen for you) or more"),
        ("recipe.patience", r.patience, r.patience >= 1, "1 or more"),
        ("recipe.min_gain", r.min_gain, 0 <= r.min_gain < 1, "in [0, 1)"),
        ("recipe.decay_fraction", r.decay_fraction, 0 <= r.decay_fraction <= 1, "in [0, 1]"),
        ("train.lanes", t.lanes, t.lanes == 8, "8 (the lanes of the design)"),
        ("train.batch", t.batch, t.batch > 0 and t.batch % 8 == 0, "a multiple of the 8 lanes"),
        ("train.accumulate", t.accumulate, t.accumulate >= 1, "1 or more"),
        ("train.steps_per_dispatch", t.steps_per_dispatch, t.steps_per_dispatch >= 1, "1 or more"),
        ("train.seed", t.seed, 0 <= t.seed < 2**31, "in [0, 2^31)"),
        ("train.log_every", t.log_every, t.log_every >= 1, "1 or more"),
        ("train.devices", t.devices, t.devices >= 0, "0 (all) or more"),
        ("train.fsdp", t.fsdp, t.fsdp >= 1, "1 or more"),
        ("checkpoint.every_seconds", c.every_seconds, c.every_seconds >= 0, "0 (off) or more"),
        ("checkpoint.every_steps", c.every_steps, c.every_steps >= 0, "0 (off) or more"),
        ("checkpoint.keep", c.keep, c.keep >= 1, "1 or more"),
        ("checkpoint.keep_every", c.keep_every, c.keep_every >= 0, "0 (off) or more"),
        ("train.watchdog", t.watchdog, t.watchdog >= 0, "0 (off) or more"),
    ]
    for name, value, good, want in rules:
        if not good:
            raise UsageError(f"{where}: {name} = {value!r} must be {want}")
    if j.name == "masked_codes" and not j.codebook:
        raise UsageError(f"{where}: objective.codebook is empty; name the folder of an `ecg-jax codebook`")
    if t.batch % (t.lanes * t.accumulate):
        raise UsageError(
            f"{where}: train.batch = {t.batch} cannot be split into train.accumulate = {t.accumulate} micro-batches "
            f"of whole lanes; make it a multiple of {t.lanes * t.accumulate}"
        )
    if r.kind == "steps" and r.steps % t.steps_per_dispatch:
        raise UsageError(
            f"{where}: recipe.steps = {r.steps} is no multiple of train.steps_per_dispatch, {t.steps_per_dispatch}"
        )
