"""From stored records to codes of their beats, by a frozen codebook: the device's part of tokenizing.

No files. Records of a batch go through together, with as many slots as their beats need. Invariant: codes of a list of
records are a function of that list, the codebook, the mode and the batch (and of what rounds: the device and JAX).

Shapes: B records, T samples, L stored leads, P places for peaks, S slots, N records of a list.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecg_jax.models import beats as beats_lib
from ecg_jax.models import inputs, vqhbr
from ecg_jax.records.windows import MOST, NO_CODE, SLOTS

BATCH = 32
SIZES = (96, 144, 192, SLOTS)  # slots of a program: a batch takes the smallest that holds its records' beats, so that
# records of 12 beats cost two thirds of the longest; more sizes would save another 7 %, and compile longer
PARTS = ("encoder", "encode_head", "codebook")  # of a codebook's parameters, what codes need


@functools.lru_cache(maxsize=64)
def coding(config: vqhbr.Config, scale: str, indices: bool, mode: str, slots: int) -> Callable[..., jax.Array]:
    """The traceable function (params, signal int16 [B, T, L], valid [B, 2], peaks int16 [B, P]) -> codes uint16
    [B, 256] as they are stored, NO_CODE where there is no beat, where its lead is dead (a token of zeros is padding to
    the codebook), or where it is not among the `slots` that go through. `params` may hold no more than PARTS."""

    def run(params: Any, signal_BxTxL: jax.Array, valid_Bx2: jax.Array, peaks_BxP: jax.Array) -> jax.Array:
        # Full precision: on accelerators the default would decide between codes by rounding.
        with jax.default_matmul_precision("highest"):
            x_BxTxC, _, _ = inputs.to_input(signal_BxTxL, valid_Bx2, scale=scale, crop=signal_BxTxL.shape[1])
            own = beats_lib.slots(peaks_BxP, valid_Bx2, slots, mode=mode)
            tokens_BxSxW = beats_lib.tokens(x_BxTxC, own)
            lead_BxS, time_BxS = (own.lead, own.time) if indices else (None, None)
            z_BxSxd = vqhbr.encode(config, params, tokens_BxSxW, lead_BxS, time_BxS, own.there)
            codes_BxS = vqhbr.assign(config, params, z_BxSxd)
        real_BxS = own.there & jnp.any(tokens_BxSxW != 0, axis=2)
        at_BxS = jnp.where(real_BxS, own.code, SLOTS)  # past the end: left out
        out_BxN = jnp.full((len(codes_BxS), SLOTS), NO_CODE, jnp.uint16)
        return jax.vmap(lambda out, at, new: out.at[at].set(new, mode="drop"))(
            out_BxN, at_BxS, codes_BxS.astype(jnp.uint16)
        )

    return run


def most_beats(config: vqhbr.Config, mode: str) -> int:
    """Beats of a record that all get codes: of more, some are dropped."""
    most = min(config.slots, SLOTS) // beats_lib.LEADS
    return min(most, MOST) if mode == "robust" else most


def padding_code(config: vqhbr.Config, params: Any) -> int:
    """The code that the codebook gives to padding, which carries nothing: one for all of it."""

    @jax.jit
    def run(params: Any) -> jax.Array:
        token_BxSxW, there_BxS = jnp.zeros((1, config.slots, config.window)), jnp.zeros((1, config.slots), bool)
        return vqhbr.assign(config, params, vqhbr.encode(config, params, token_BxSxW, None, None, there_BxS))

    return int(run({name: params[name] for name in PARTS})[0, 0])


class Coder:
    """Batches of stored records to codes: one compiled program for each of SIZES that is needed.

    compile_seconds, records and macs (multiply-adds asked for, padding included) count what it has done.
    """

    def __init__(self, config: vqhbr.Config, params: Any, info: Mapping[str, Any], mode: str, batch: int) -> None:
        """`config`, `params` and `info` (scale and indices) as `codebook.load` gives them; `mode` of beats."""
        self.config, self.mode, self.batch = config, mode, batch
        self.device = jax.devices()[0].device_kind
        self.compile_seconds, self.records, self.macs = 0.0, 0, 0
        self._how = info["scale"], info["indices"], mode
        self._params = jax.device_put({name: params[name] for name in PARTS})
        most = min(config.slots, SLOTS)
        # As published, padding takes part in every token's code: then there must be as much of it as published.
        self._sizes = (most,) if config.faithful else (*(size for size in SIZES if size < most), most)
        self._programs: dict[tuple[int, int], Any] = {}

    def encode(self, signal_NxTxL: np.ndarray, valid_Nx2: np.ndarray, peaks_NxP: np.ndarray) -> np.ndarray:
        """Codes uint16 [N, 256], NO_CODE where there is no beat, of stored records (int16, int32, int16).

        Records are taken in the order of their number of beats, so that those of a batch need about as many slots; the
        last batch is filled up. One batch is in flight while the next is sent.
        """
        records = signal_NxTxL, valid_Nx2, peaks_NxP
        slots_N = np.minimum(beats_lib.LEADS * (peaks_NxP >= 0).sum(1), self._sizes[-1])
        order = np.argsort(slots_N, kind="stable")
        out = np.full((len(order), SLOTS), NO_CODE, np.uint16)
        sent: tuple[np.ndarray, jax.Array] | None = None
        for first in range(0, len(order), self.batch):
            rows = order[first : first + self.batch]
            size = next(size for size in self._sizes if size >= slots_N[rows].max())
            codes = self._send(records, rows, size)
            if sent:
                _take(out, *sent)
            sent = rows, codes
            self.records += len(rows)
            self.macs += self.batch * vqhbr.encode_macs(self.config, size)
        if sent:
            _take(out, *sent)
        return out

    def _send(self, records: tuple[np.ndarray, ...], rows: np.ndarray, size: int) -> jax.Array:
        filled = np.resize(rows, self.batch)  # repeats rows: real records, whose codes are thrown away
        batch = jax.device_put(tuple(part[filled] for part in records))
        key = size, records[0].shape[2]
        if key not in self._programs:
            start = time.monotonic()
            run = coding(self.config, *self._how, size)
            self._programs[key] = jax.jit(run).lower(self._params, *batch).compile()
            self.compile_seconds += time.monotonic() - start
        return self._programs[key](self._params, *batch)


def _take(out: np.ndarray, rows: np.ndarray, codes: jax.Array) -> None:
    out[rows] = np.asarray(codes)[: len(rows)]
