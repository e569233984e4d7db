"""What a loss of masked codes is worth: four predictors without a network, asked for the same hidden beats.

  unigram   how often each code occurs in training
  position  lead, second, and place among the beats; each smoothed towards the one before, at last the unigram
  copy      the code of the nearest visible beat of the same lead, with a probability that depends on how far it is
            away; else the unigram
  linear    one softmax per lead, linear in the waveforms of the same beat in the visible leads; where a beat is hidden
            in all leads, in those of the nearest visible beat

They learn from training records, settle their smoothing, weights and stopping on validation, and are scored on the
evaluation masks of the objective (of HeartLang's padding mode, on real beats alone). Results say nothing of their own
about any network. Invariant: deterministic for given tables and seed; a target counts here if it counts there.

Shapes: n records, B of a batch, S slots, N places for beats, L = 12 leads, W = 96 samples of a token, C codes, d
features of a code.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.evaluation import bootstrap
from ecg_jax.evaluation.code_linear import STEPS, Linear
from ecg_jax.models import beats
from ecg_jax.objectives.masked_codes import LIMB_LEADS, Objective
from ecg_jax.records.windows import MAX_PEAKS, NO_CODE
from ecg_jax.shards.tables import Table

BATCH = 64
RECORDS = 2048  # of training, and of validation, at most: spread evenly over the table
NAMES = ("unigram", "position", "copy", "linear")
SMOOTHING = 10.0 ** np.arange(0, 7, 0.5)  # observations that the coarser distribution counts for
COPIED = np.concatenate([np.arange(0, 0.99, 0.01), [0.99, 0.995, 0.999]])
DISTANCES = (1.0, 2.0, 4.0)  # seconds: limits of the classes of distance that have a weight each
SECONDS = 16  # time indices, at least
RESAMPLES = 400


class Grid(NamedTuple):
    """A batch beat by beat and lead by lead.

    wave float32 [B, N, L, W] tokens: of the beat itself or, where beats are hidden in all leads, of the nearest
    visible one; visible bool [B, N, L], which of them may be seen; label int32 [B, N, L] the code asked for, -1
    elsewhere; inner int32 [B, N, L] the code of every inner slot, -1 elsewhere; near int32 [B, N, L] that of the
    nearest visible beat of the lead (-1: none), away float32 [B, N, L] in seconds; time [B, N] in seconds; n [B].
    """

    wave: jax.Array
    visible: jax.Array
    label: jax.Array
    inner: jax.Array
    near: jax.Array
    away: jax.Array
    time: jax.Array
    n: jax.Array


@dataclass(frozen=True)
class Scores:
    """counts int64 [n, 2]: targets of each record in limb and in chest leads; sums: by baseline float64 [n, 2], their
    cross-entropies in nats; chosen: what was settled on validation.
    """

    counts: np.ndarray
    sums: dict[str, np.ndarray]
    chosen: dict[str, Any]

    def mean(self, name: str, columns: Any = slice(None)) -> float:
        """Nats per target (NaN without any); `columns` 0 limb, 1 chest, both by default."""
        number = self.counts[:, columns].sum()
        return float(self.sums[name][:, columns].sum() / number) if number else float("nan")


def score(
    objective: Objective,
    train: Table,
    val: Table,
    test: Table,
    codebook: np.ndarray,
    seed: int = 0,
    steps: int = STEPS,
) -> dict[str, Any]:
    """`fit_and_score` as plain numbers: by baseline "all", "limb", "chest" in nats per target of `test`, "ci_low" and
    "ci_high" of "all" (95 %, patients resampled); "targets"; "chosen".
    """
    found = fit_and_score(objective, train, val, test, codebook, seed, steps)
    resamples = bootstrap.draw(test.group_hash, RESAMPLES)
    targets = np.maximum(_resampled(found.counts.sum(1), resamples), 1)
    out: dict[str, Any] = {"targets": int(found.counts.sum()), "chosen": found.chosen}
    for name in NAMES:
        value = found.mean(name)
        low, high = bootstrap.percentile(value, _resampled(found.sums[name].sum(1), resamples) / targets)
        out[name] = {"all": value, "limb": found.mean(name, 0), "chest": found.mean(name, 1)}
        out[name] |= {"ci_low": low, "ci_high": high}
    return out


def _resampled(values_n: np.ndarray, resamples: bootstrap.Resamples) -> np.ndarray:
    per_patient = np.bincount(resamples.patient, values_n, len(resamples.counts))
    return resamples.counts.T.astype(np.float64) @ per_patient


_found: dict[str, Scores] = {}


def fit_and_score(
    objective: Objective,
    train: Table,
    val: Table,
    test: Table,
    codebook: np.ndarray,
    seed: int = 0,
    steps: int = STEPS,
) -> Scores:
    """Fit on at most RECORDS of `train`, settle on as many of `val`, score all of `test`; tables with `rpeaks` and
    `codes`, `codebook` float [C, d].

    Randomness: the minibatches of the linear predictor, from `seed`; masks from the records' hashes. Memory: 50 kB for
    each record of training and validation that is used. Time: in proportion to `steps` and to the records of `test`.
    Remembered by the process: what is asked does not depend on the network, so runs share it.
    """
    front = objective.front
    asked = (front.mode, front.number, front.crop, front.scale, objective.masking, objective.ratio, objective.padding)
    key = hashlib.blake2b(repr((asked, objective.codes, seed, steps)).encode())
    for table in (train, val, test):
        key.update(np.ascontiguousarray(table.record_hash))
        key.update(np.ascontiguousarray(table.codes))
    name = key.hexdigest()
    if name not in _found:
        _found[name] = _fit_and_score(objective, train, val, test, codebook, seed, steps)
    return _found[name]


def _fit_and_score(objective, train, val, test, codebook, seed, steps) -> Scores:
    learned, settled = (_collect(objective, table, _some(table)) for table in (train, val))
    counted = _Counts(learned, objective.codes)
    counted.settle(settled)
    linear = Linear(codebook, counted.lead_prior())
    ratio = objective.ratio if objective.masking == "token" else None
    linear.fit(learned, settled, ratio, seed, steps)
    sums = {name: np.zeros((len(test), 2)) for name in NAMES}
    counts = np.zeros((len(test), 2), np.int64)
    for rows, grid in _grids(objective, test, np.arange(len(test))):
        places = _Places.of(grid)
        nats = counted.nats(places) | {"linear": np.asarray(linear.nats(grid))[places.at]}
        here = rows[places.at[0]], (places.lead >= LIMB_LEADS).astype(int)
        np.add.at(counts, here, 1)
        for name in NAMES:
            np.add.at(sums[name], here, nats[name])
    return Scores(counts, sums, counted.chosen | linear.chosen)


# ------------------------------------------------------------------------------------------ what there is to see


@partial(jax.jit, static_argnums=0)
def read(objective: Objective, batch: dict[str, jax.Array]) -> Grid:
    """The evaluation masks of a batch as a grid; see `Objective.ask`."""
    question = objective.ask(batch)
    slots, hidden, view = question.view.slots, question.masked.hidden, question.view
    number = slots.there.shape[1]
    places = min(number, MAX_PEAKS) if objective.front.mode == "heartlang" else number // beats.LEADS
    beat_N = jnp.arange(places)
    slot_BxNxL = jnp.arange(beats.LEADS) * slots.n[:, None, None] + beat_N[:, None]
    at_BxM = jnp.minimum(slot_BxNxL, number - 1).reshape(len(hidden), -1)

    def laid(x_BxS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BxS, at_BxM, axis=1).reshape(slot_BxNxL.shape)

    real = (slot_BxNxL < number) & (beat_N < slots.n[:, None])[:, :, None] & laid(slots.there)
    code = jnp.take_along_axis(batch["codes"], laid(slots.code).reshape(at_BxM.shape), axis=1).astype(jnp.int32)
    code = jnp.where(real & (code.reshape(real.shape) != NO_CODE), code.reshape(real.shape), -1)
    visible = real & ~laid(hidden)
    tokens_BxSxW = beats.tokens(view.x, slots, view.first)
    wave = jnp.take_along_axis(tokens_BxSxW, at_BxM[:, :, None], axis=1).reshape(*real.shape, -1)

    peak_BxN = laid(slots.peak)[:, :, 0]
    away_BxNxN = jnp.abs(peak_BxN[:, :, None] - peak_BxN[:, None]) / beats.SECOND
    away_BxNxNxL = jnp.where((visible & (code >= 0))[:, None], away_BxNxN[..., None], jnp.inf)
    nearest_BxNxL, least_BxNxL = away_BxNxNxL.argmin(2), away_BxNxNxL.min(2)
    near = jnp.where(jnp.isfinite(least_BxNxL), jnp.take_along_axis(code, nearest_BxNxL, axis=1), -1)
    if objective.masking == "beat":  # nothing is visible of the beat itself
        source_BxN = jnp.where(visible.any(2)[:, None], away_BxNxN, jnp.inf).argmin(2)
        wave = jnp.take_along_axis(wave, source_BxN[:, :, None, None], axis=1)
        visible = jnp.take_along_axis(visible, source_BxN[:, :, None], axis=1)
    return Grid(
        wave=wave,
        visible=visible,
        label=jnp.where(laid(hidden), code, -1),
        inner=jnp.where(laid(slots.inner), code, -1),
        near=near,
        away=least_BxNxL,
        time=laid(slots.time)[:, :, 0],
        n=slots.n,
    )


def _some(table: Table) -> np.ndarray:
    return np.unique(np.linspace(0, len(table) - 1, min(RECORDS, len(table))).astype(int))


def _grids(objective: Objective, table: Table, rows_n: np.ndarray):
    """(rows, Grid) of the records at `rows`, a batch at a time; the last batch is filled up and then cut."""
    words = np.stack([table.record_hash >> np.uint64(32), table.record_hash & np.uint64(0xFFFFFFFF)], 1)
    for start in range(0, len(rows_n), BATCH):
        own = rows_n[start : start + BATCH]
        filled = np.resize(own, BATCH)
        batch = {name: getattr(table, name)[filled] for name in ("signal", "valid", "rpeaks", "codes")}
        grid = read(objective, batch | {"hash": words[filled].astype(np.uint32)})
        yield own, Grid(*(leaf[: len(own)] for leaf in grid))


def _collect(objective: Objective, table: Table, rows_n: np.ndarray) -> Grid:
    """All of it on the host, waves in half precision."""
    parts = []
    for _, grid in _grids(objective, table, rows_n):
        parts.append(jax.tree.map(np.asarray, grid._replace(wave=grid.wave.astype(jnp.float16))))
    return Grid(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Places:
    """Targets of a grid in a row: at, their (record, beat, lead); and what is known of each."""

    at: tuple[np.ndarray, np.ndarray, np.ndarray]
    code: np.ndarray
    lead: np.ndarray
    cells: tuple[np.ndarray, ...]  # of `position`, from coarse to fine
    near: np.ndarray
    distance: np.ndarray  # class, 0 to len(DISTANCES); -1 without a visible beat

    @classmethod
    def of(cls, grid: Grid, every: bool = False) -> "_Places":
        """The targets, or `every` inner slot."""
        code = np.asarray(grid.inner if every else grid.label)
        at = np.nonzero(code >= 0)
        record, beat, lead = at
        time, n = np.asarray(grid.time)[record, beat], np.asarray(grid.n)[record].astype(np.int64)
        cells = (lead, lead * SECONDS + np.minimum(time, SECONDS - 1), (lead * (MAX_PEAKS + 1) + n) * MAX_PEAKS + beat)
        near = np.asarray(grid.near)[at]
        distance = np.where(near >= 0, np.searchsorted(DISTANCES, np.asarray(grid.away)[at], "right"), -1)
        return cls(at, code[at], lead, cells, near, distance)


# ------------------------------------------------------------------------------------------------ counting


class _Counts:
    """The three baselines that count: unigram, position, copy."""

    def __init__(self, train: Grid, codes: int) -> None:
        places = _Places.of(train, every=True)
        count = np.bincount(places.code, minlength=codes) + 0.5
        self.unigram = count / count.sum()
        self._codes = codes
        # For each level: how often each cell, and each code in it, was seen; only what was seen is kept.
        self._levels = [
            (np.unique(cell, return_counts=True), np.unique(cell * codes + places.code, return_counts=True))
            for cell in places.cells
        ]
        self._smoothing = [np.inf] * len(self._levels)
        self._copied = np.zeros(len(DISTANCES) + 1)

    def settle(self, val: Grid) -> None:
        """Choose smoothing, from coarse to fine, and the probabilities of copying."""
        places = _Places.of(val)
        if not len(places.code):
            return
        for level in range(len(self._levels)):
            found = []
            for self._smoothing[level] in (np.inf, *SMOOTHING):
                found.append(-np.log(self._position(places, level + 1)).mean())
            self._smoothing[level] = (np.inf, *SMOOTHING)[int(np.argmin(found))]
        u, right = self.unigram[places.code], places.near == places.code
        for own in range(len(self._copied)):
            here = places.distance == own
            if here.any():
                wrong = (here & ~right).sum() + 1  # never quite sure, however few there are
                gain = [np.log(c + (1 - c) * u[here & right]).sum() + wrong * np.log1p(-c) for c in COPIED]
                self._copied[own] = COPIED[int(np.argmax(gain))]

    @property
    def chosen(self) -> dict[str, Any]:
        """Smoothing of lead, second and place (None: not used); probability of copying by distance."""
        smoothing = [float(a) if np.isfinite(a) else None for a in self._smoothing]
        return {"smoothing": smoothing, "copied": self._copied.tolist()}

    def lead_prior(self) -> np.ndarray:
        """Probability of each code in each lead, float64 [L, C]."""
        lead, code = np.divmod(np.arange(beats.LEADS * self._codes), self._codes)
        return self._smoothed(0, lead, code, self.unigram[code]).reshape(beats.LEADS, -1)

    def nats(self, places: _Places) -> dict[str, np.ndarray]:
        """Cross-entropy of each target, by baseline."""
        u = self.unigram[places.code]
        copied = np.where(places.distance >= 0, self._copied[places.distance], 0.0)
        copy = copied * (places.near == places.code) + (1 - copied) * u
        position = self._position(places, len(self._levels))
        return {"unigram": -np.log(u), "position": -np.log(position), "copy": -np.log(copy)}

    def _position(self, places: _Places, levels: int) -> np.ndarray:
        p = self.unigram[places.code]
        for level in range(levels):
            p = self._smoothed(level, places.cells[level], places.code, p)
        return p

    def _smoothed(self, level: int, cell: np.ndarray, code: np.ndarray, coarser: np.ndarray) -> np.ndarray:
        more = self._smoothing[level]
        if not np.isfinite(more):
            return coarser
        cells, pairs = self._levels[level]
        return (_seen(*pairs, cell * self._codes + code) + more * coarser) / (_seen(*cells, cell) + more)


def _seen(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, counts[at], 0)
