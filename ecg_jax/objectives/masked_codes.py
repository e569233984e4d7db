"""Masked codes: hide beats of a record and tell their codebook codes from the rest; cross-entropy in nats.

Codes are made once, on the unmasked record, by a frozen codebook (`ecg-jax tokenize`). On the signal, the windows of
hidden slots are replaced by a learned value per lead; on beats, hidden tokens by the encoder's mask vector (a ResNet's
by a learned token). Only hidden places reach the head, see `readout`. What it does not do: make codes, or say what a
loss is worth (`evaluation/code_baselines`).

Invariants: training masks depend on the keys alone, evaluation masks on the record's hash alone, so that every
evaluation, and every model of the same beats and crop, is asked the same; slots in the outer half second, of a dead
lead (all zero), and without a code are never asked for, but where padding is.

Shapes: B records, S slots, K targets, N codes, d features of a code, L columns.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.errors import UsageError
from ecg_jax.models import beats
from ecg_jax.models.ladder import Config
from ecg_jax.objectives import front as front_lib
from ecg_jax.objectives import masks, readout
from ecg_jax.objectives.front import Front, View
from ecg_jax.records.windows import NO_CODE, WINDOW

Params = dict[str, Any]
LIMB_LEADS = 6  # the first of the standard order
CROP, DROP, MASK = 0, 1, 2  # named streams of a record's key


class Question(NamedTuple):
    """What is asked of a batch: the view, its masks, and [B, K] of each target the code, and whether it counts."""

    view: View
    masked: masks.Masked
    code: jax.Array
    known: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """Masked-code objective; make it with `make`. Hashable by its arguments."""

    front: Front
    codes: int
    code_dim: int
    masking: str
    ratio: float
    padding: bool
    padding_code: int
    head: str

    @property
    def arch(self) -> Config:
        return self.front.arch

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the table that a batch must hold; evaluation needs its `hash` too."""
        return ("signal", "valid", "rpeaks", "codes")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `sums`."""
        return ("limb", "chest", "padding") if self.padding else ("limb", "chest")

    @property
    def start(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `init` wants to know of the data: the share of each code, and the codebook's rows."""
        shapes = {"prior": (self.codes,), "codebook": (self.codes, self.code_dim)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    @property
    def readout(self) -> readout.Readout:
        """The head's layout. Padding, where it is scored, is a lead of its own that may hold all targets."""
        switches = (self.front.number, self.front.mode, self.masking, self.ratio, self.padding)
        most = masks.most_targets(*switches) if self.padding else masks.most_per_lead(*switches)
        leads = beats.LEADS + self.padding
        kind = {"on_beats": self.front.on_beats, "head": self.head, "leads": leads, "per_lead": most}
        return readout.make(self.arch, self.codes, self.code_dim, **kind)

    @property
    def head_macs(self) -> int:
        """Multiply-adds of the head in one forward pass over one record."""
        switches = (self.front.number, self.front.mode, self.masking, self.ratio, self.padding)
        length = self.front.length if self.front.on_beats else self.arch.padded(self.front.crop)
        return readout.macs(self.readout, length, masks.most_targets(*switches))

    def at_width(self, width: int) -> "Objective":
        """The same at another width of the network."""
        return dataclasses.replace(self, front=self.front.at_width(width))

    def init(self, key: jax.Array, start: dict[str, jax.Array]) -> Params:
        """{"encoder": {...}, "head": {...}}, float32; the first loss is that of telling codes by `start["prior"]`."""
        encoder_key, head_key = jax.random.split(key)
        prior_N = jnp.asarray(start["prior"], jnp.float32)
        head = readout.init(self.readout, head_key, prior_N, jnp.asarray(start["codebook"]))
        if not self.front.on_beats:
            head["blank"] = jnp.zeros(beats.LEADS)
        elif self.arch.family == "resnet1d":
            head["blank"] = jnp.zeros(WINDOW)
        return {"encoder": self.front.init(encoder_key), "head": head}

    def loss(self, params: Params, batch: dict[str, jax.Array], keys: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """(mean cross-entropy in nats over the targets of the batch, aux).

        `keys` [B] typed: crop, mask and dropout of each record. aux: `known` the number of targets, `loss_limb`,
        `loss_chest` (and `loss_padding`) in nats, `accuracy`; with BatchNorm "stats" for `absorb`.
        """
        question = self.ask(batch, keys)
        number = question.known.sum(dtype=jnp.float32)
        weight = question.known / jnp.maximum(number, 1)
        # One pass of reduced precision is enough for a gradient; evaluation does without.
        (loss, ce, right), stats = self._answer(params, question, weight, _stream(keys, DROP), True, "high")
        aux: dict[str, Any] = {"known": number, "accuracy": (right * weight).sum()}
        for name, own in self._by_column(question).items():
            aux[f"loss_{name}"] = jnp.where(own, ce, 0).sum() / jnp.maximum(own.sum(), 1)
        if stats:
            aux["stats"] = stats
        return loss, aux

    def absorb(self, params: Params, aux: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """Params with the running statistics of `aux` in place, and `aux` with scalars only."""
        if "stats" not in aux:
            return params, aux
        scalars = {name: value for name, value in aux.items() if name != "stats"}
        return {**params, "encoder": {**params["encoder"], **aux["stats"]}}, scalars

    def sums(self, params: Params, batch: dict[str, jax.Array], weight_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum of cross-entropy, number of targets), float32 [L] each, records weighted by `weight` (0 for padding)."""
        kept_BxLx3 = self.logits(params, batch).reshape(len(weight_B), -1, 3)
        # `where`, not a product: a padding row may hold anything.
        kept_BxLx3 = jnp.where(weight_B[:, None, None] > 0, kept_BxLx3 * weight_B[:, None, None], 0.0)
        return kept_BxLx3[:, :, 0].sum(0), kept_BxLx3[:, :, 1].sum(0)

    def mean(self, sums_2xL: np.ndarray) -> float:
        """Cross-entropy in nats over all targets, limb and chest leads together (NaN without any)."""
        total, number = np.asarray(sums_2xL, np.float64).sum(1)
        return float(total / number) if number > 0 else float("nan")

    def logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Not logits, which would be thousands, but what tests need: float32 [B, 3 L], for each column the sum of
        cross-entropy, the number of targets and how many codes were told right. Centre crop, masks by `hash`.
        """
        question = self.ask(batch)
        weight = question.known.astype(jnp.float32)
        (_, ce, right), _ = self._answer(params, question, weight, None, False, "highest")
        kept = []
        for own in self._by_column(question).values():
            kept += [jnp.where(own, ce, 0).sum(1), own.sum(1, dtype=jnp.float32), jnp.where(own, right, 0).sum(1)]
        return jnp.stack(kept, 1)

    def features(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """[B, D + 1] float32, see `Front.features`. Needs no head, no codes."""
        return self.front.features(params, batch)

    def ask(self, batch: dict[str, jax.Array], keys_B: jax.Array | None = None) -> Question:
        """View, masks and targets: by `keys` [B] as in training, without them by the records' `hash` [B, 2] as in
        evaluation (centre crop).
        """
        view = self.front.view(batch, None if keys_B is None else _stream(keys_B, CROP))
        slots = view.slots
        alive_BxS = jnp.any(beats.tokens(view.x, slots, view.first) != 0, axis=2)
        view = view._replace(slots=slots._replace(inner=slots.inner & alive_BxS))
        mask_keys_B = record_keys(batch["hash"]) if keys_B is None else _stream(keys_B, MASK)
        switches = {"masking": self.masking, "ratio": self.ratio, "padding": self.padding}
        masked = masks.draw(mask_keys_B, view.slots, mode=self.front.mode, **switches)
        at_BxK = jnp.take_along_axis(view.slots.code, masked.index, axis=1)
        code_BxK = jnp.take_along_axis(batch["codes"], at_BxK, axis=1).astype(jnp.int32)
        if self.padding:
            real_BxK = jnp.take_along_axis(view.slots.there, masked.index, axis=1)
            code_BxK = jnp.where(real_BxK, code_BxK, self.padding_code)
        known_BxK = masked.there & (code_BxK != NO_CODE)
        return Question(view, masked, jnp.where(known_BxK, code_BxK, 0), known_BxK)

    def lead(self, question: Question) -> jax.Array:
        """Lead of each target, int32 [B, K], 0 to 11; 12 for padding."""
        slots, index = question.view.slots, question.masked.index
        lead_BxK = jnp.take_along_axis(slots.lead, index, axis=1)
        return jnp.where(jnp.take_along_axis(slots.there, index, axis=1), lead_BxK, beats.LEADS)

    def _by_column(self, question: Question) -> dict[str, jax.Array]:
        """Which targets belong to each column, bool [B, K]."""
        lead_BxK, known = self.lead(question), question.known
        parts = (lead_BxK < LIMB_LEADS, (lead_BxK >= LIMB_LEADS) & (lead_BxK < beats.LEADS), lead_BxK == beats.LEADS)
        return {name: part & known for name, part in zip(self.columns, parts, strict=False)}

    def _answer(self, params, question, weight, drop_keys, train, precision):
        """(what `readout.score` gives, new running statistics)."""
        view, masked = question.view, question.masked
        head, own = params["head"], self.readout
        more: dict[str, Any] = {"train": train, "keys": drop_keys}
        if self.front.on_beats:
            more |= {"hidden": masked.hidden, "blank": head.get("blank")}
        else:
            more |= {"x": beats.blank(view.x, view.slots, masked.hidden, head["blank"], view.first), "stages": True}
        encoded = self.front.encode(params["encoder"], view, **more)
        frames = tuple(stage for stage, _ in encoded.stages[-len(own.sources) :]) or (encoded.frames,)
        start, end = (
            jnp.take_along_axis(places, masked.index, axis=1) - view.first[:, None]
            for places in (view.slots.start, view.slots.end)
        )
        targets = readout.Targets(start, end, masked.index, self.lead(question), masked.there)
        features = readout.features(own, head, frames, targets)
        return readout.score(own, head, features, question.code, weight, precision=precision), encoded.stats


def _stream(keys_B: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def record_keys(hash_Bx2: jax.Array) -> jax.Array:
    """Typed keys [B] of evaluation masks, from the 64-bit record hashes as two uint32."""

    def key(words: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(MASK), words[0]), words[1])

    return jax.vmap(key)(hash_Bx2)


def make(
    arch: Config,
    codes: int,
    code_dim: int,
    *,
    masking: str = "token",
    ratio: float = 0.5,
    padding: bool = False,
    padding_code: int | None = None,
    head: str = "factorised",
    **front: Any,
) -> Objective:
    """The objective of these arguments, one and the same object for equal ones. `front`: arguments of `front.make`.

    Args:
        codes, code_dim: size of the codebook.
        masking, ratio: see `masks.draw`.
        padding: HeartLang's way, on beats only: masks fall on padding too, and all that is hidden is asked for. Needs
            `padding_code`, the code that the codebook gives to padding.
        head: "factorised" or "full", see `readout`.

    Raises UsageError for unknown choices and such as do not go together.
    """
    masks.check(masking, ratio, padding)
    built = front_lib.make(arch, **front)
    if padding and not built.on_beats:
        raise UsageError("padding is hidden and scored on the beats input only; the signal has none")
    if padding and (padding_code is None or not 0 <= padding_code < codes):
        raise UsageError(f"padding is scored, but the code of padding is {padding_code}, not one of the {codes}")
    own = _make(built, codes, code_dim, masking, float(ratio), bool(padding), padding_code if padding else -1, head)
    own.readout  # noqa: B018  (refuses an unknown head)
    return own


@functools.cache
def _make(*arguments: Any) -> Objective:
    return Objective(*arguments)
