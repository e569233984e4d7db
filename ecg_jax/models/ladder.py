"""The size ladders: two frozen configurations and the rungs by name.

Counts are exact, so that "model size N" means the same wherever a rung's name is given; `tests/golden/rungs`
holds every shape. N is the encoder without any task head. Adds no parameters of its own and never builds a
network.
"""

import dataclasses

from ecg_jax.errors import UsageError, did_you_mean
from ecg_jax.records.windows import WINDOW

NORMS = ("group", "batch")
ATTENTIONS = ("auto", "xla", "matmul", "chunked", "cudnn")  # see `attention`
REMATS = ("none", "dots", "block")
WORLDS = ("auto", "signal", "beats")


@dataclasses.dataclass(frozen=True)
class ResNet1dConfig:
    """Two-stream pre-activation ResNet1d of the CODE group on raw leads (100 Hz, 12 leads)."""

    width: int  # channels of the stem; stage i has width x i
    units: int = 1  # residual units per stage
    kernel: int = 17  # taps, odd
    strides: tuple[int, ...] = (1, 4, 4, 2, 2)  # one per stage, taken by its first unit
    leads: int = 12
    groups: int = 8  # GroupNorm takes the largest divisor of the width up to this
    norm: str = "group"  # "batch" takes its statistics from the global batch
    dropout: float = 0.0
    conv: str = "auto"  # formulation of every convolution, see layers.conv1d
    input: str = "signal"  # see `for_input`
    family = "resnet1d"

    def __post_init__(self):
        if self.norm not in NORMS:
            raise UsageError(f"unknown norm {self.norm!r}{did_you_mean(self.norm, NORMS)}; known: {', '.join(NORMS)}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * (i + 1) for i in range(len(self.strides)))

    @property
    def features(self) -> int:
        """Channels of a frame."""
        return self.widths[-1]

    @property
    def frame(self) -> int:
        """Samples per frame."""
        size = 1
        for stride in self.strides:
            size *= stride
        return size

    def padded(self, length: int) -> int:
        """Samples after zero-padding to whole frames."""
        return -(-length // self.frame) * self.frame


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Pre-LN Transformer encoder on patches of single leads (or of `leads_per_token` neighbours together)."""

    width: int
    layers: int
    heads: int
    patch: int = 96  # samples per token
    leads_per_token: int = 1  # a token holds the patch of one lead, or of several together
    mlp: int = 4  # hidden width of the feed-forward part, in widths
    leads: int = 12
    times: int = 15  # time indices 1..times; a record holds at most this many patches per lead
    dropout: float = 0.0
    scan: bool | None = None  # layers in lax.scan; None: on, except for at most 8 layers on CPU
    attention: str = "auto"  # formulation, see attention.attention
    remat: str = "none"  # kept for the gradient: all ("none"), weight products ("dots"), a layer's input ("block")
    input: str = "signal"  # see `for_input`
    family = "transformer"

    def __post_init__(self):
        for name, known in (("attention", ATTENTIONS), ("remat", REMATS)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}{did_you_mean(value, known)}; known: {', '.join(known)}")

    @property
    def lead_groups(self) -> int:
        """Tokens per patch of time."""
        return self.leads // self.leads_per_token

    @property
    def features(self) -> int:
        """Channels of a frame (a token)."""
        return self.width

    @property
    def frame(self) -> int:
        """Samples per frame."""
        return self.patch

    def padded(self, length: int) -> int:
        """Samples after zero-padding to whole patches."""
        return -(-length // self.patch) * self.patch


Config = ResNet1dConfig | TransformerConfig

RUNGS: dict[str, Config] = {
    "R1": ResNet1dConfig(4),  # 27,816
    "R2": ResNet1dConfig(6),  # 61,788
    "R3": ResNet1dConfig(10),  # 169,860
    "R4": ResNet1dConfig(16),  # 432,288
    "R5": ResNet1dConfig(24),  # 969,456
    "R6": ResNet1dConfig(32),  # 1,720,640
    "R7": ResNet1dConfig(32, units=2),  # 3,637,440
    "R8": ResNet1dConfig(64),  # 6,865,536
    "R9": ResNet1dConfig(64, units=2),  # 14,528,896
    "R10": ResNet1dConfig(96, units=2),  # 32,674,368
    "R11": ResNet1dConfig(160, units=2),  # 90,727,360
    "R12": ResNet1dConfig(192, units=3),  # 199,582,080
    "T1": TransformerConfig(24, 3, 2),  # 24,792
    "T2": TransformerConfig(32, 4, 2),  # 54,976
    "T3": TransformerConfig(64, 3, 2),  # 158,272
    "T4": TransformerConfig(96, 4, 3),  # 459,840
    "T5": TransformerConfig(128, 5, 4),  # 1,008,000
    "T6": TransformerConfig(160, 6, 5),  # 1,876,480
    "T7": TransformerConfig(192, 8, 6),  # 3,583,872
    "T8": TransformerConfig(256, 8, 8),  # 6,351,360
    "T9": TransformerConfig(384, 8, 6),  # 14,245,632
    "T10": TransformerConfig(512, 10, 8),  # 31,590,400
    "T11": TransformerConfig(768, 12, 12),  # 85,154,304
    "T12": TransformerConfig(1024, 16, 16),  # 201,672,704
    # Demonstration rungs, for two CPU cores and 5-second crops, never for a study. The ResNets have four
    # stages, kernel 7 and frames of 32 samples, and one norm group: at these widths the rule makes a group of
    # every channel, which wipes out amplitudes; Rd1 then learns nothing. The Transformers have one layer and
    # tokens of a quarter of a second of all leads, of which a 5-second crop fills twenty.
    "Rd1": ResNet1dConfig(2, kernel=7, strides=(4, 2, 2, 2), groups=1),  # 1,760
    "Rd2": ResNet1dConfig(5, kernel=7, strides=(4, 2, 2, 2), groups=1),  # 10,055
    "Rd3": ResNet1dConfig(12, kernel=7, strides=(4, 2, 2, 2), groups=1),  # 55,800
    "Td1": TransformerConfig(4, 1, 1, patch=25, leads_per_token=12, times=20),  # 1,556
    "Td2": TransformerConfig(16, 1, 1, patch=25, leads_per_token=12, times=20),  # 8,528
    "Td3": TransformerConfig(56, 1, 2, patch=25, leads_per_token=12, times=20),  # 56,728
}
DEMO_RUNGS = tuple(name for name in RUNGS if name[1] == "d")


def get(name: str, **overrides: object) -> Config:
    """The configuration of a rung, with fields replaced by keyword.

    `norm="group"` is accepted for a Transformer and means nothing there; "batch" is refused.
    Raises UsageError for an unknown rung or field.
    """
    if name not in RUNGS:
        raise UsageError(f"unknown rung {name!r}{did_you_mean(name, list(RUNGS))}; known: {', '.join(RUNGS)}")
    config = RUNGS[name]
    if isinstance(config, TransformerConfig) and "norm" in overrides:
        if overrides.pop("norm") != "group":
            raise UsageError(f"norm is a choice of the ResNet rungs; {name} is a Transformer with LayerNorm")
    fields = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in fields:
            raise UsageError(f"rung {name} has no field {key!r}{did_you_mean(key, fields)}")
    return dataclasses.replace(config, **overrides)


def for_input(config: Config, world: str) -> Config:
    """The same rung for another input: "signal" (raw leads, or patches of them) or "beats" (a sequence of beat tokens,
    one for each lead and beat, `WINDOW` samples long).

    On beats a ResNet runs along the tokens, without strides, and its leads are the samples of a token; a Transformer's
    tokens are single beats of single leads, so T1..T12 keep their counts. "auto" is signal for ResNets and beats for
    Transformers. Raises UsageError for any other.
    """
    if world not in WORLDS:
        raise UsageError(f"unknown input {world!r}{did_you_mean(world, WORLDS)}; known: {', '.join(WORLDS)}")
    resnet = isinstance(config, ResNet1dConfig)
    if world == "auto":
        world = "signal" if resnet else "beats"
    if world == "signal":
        return config
    if resnet:
        return dataclasses.replace(config, leads=WINDOW, strides=(1,) * len(config.strides), input=world)
    return dataclasses.replace(config, patch=WINDOW, leads_per_token=1, input=world)


def count(config: Config) -> int:
    """Parameters of the encoder without any head (running statistics of BatchNorm are not parameters)."""
    if isinstance(config, ResNet1dConfig):
        total = config.leads * config.width * config.kernel + 2 * config.width
        before = config.width
        for width in config.widths:
            for _ in range(config.units):
                total += before * width * config.kernel + width * width * config.kernel + 4 * width
                total += before * width if before != width else 0
                before = width
        return total
    d = config.width
    layer = 2 * 2 * d + (4 * d * d + 4 * d) + (2 * config.mlp * d * d + config.mlp * d + d)
    tables = (config.lead_groups + 1) * d + (config.times + 1) * d + 2 * d  # with cls and the mask vector
    return config.layers * layer + (config.patch * config.leads_per_token * d + d) + tables + 2 * d
