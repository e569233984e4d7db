"""The codes of hidden beats by one softmax per lead, linear in waveforms that may be seen: a baseline of masked codes.

Adam with a rate that falls to zero, at several rates in turn; validation says which and when to stop. What is seen and
asked comes as a `code_baselines.Grid`. Invariant: a lead that may not be seen enters as zeros, and a flag says so.

Shapes: B records, N places for beats, U beats of a minibatch, L = 12 leads, W = 96 samples of a token, C codes, d
features of a code.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ecg_jax.models import beats

DIRECT_CODES = 256  # beyond, through the codebook's rows
STEPS, UNITS = 2000, 64  # updates at each rate, beats in each
LOOK, LOOKED = 100, 2048  # updates between looks at validation, and beats of it that are looked at
RATES = (1e-3, 4e-3)  # at the start


class Linear:
    """One softmax per lead, started at `prior` [L, C], the codes' shares in that lead. `chosen` says where it stopped.

    codebook: float [C, d], whose rows stand between features and codes where those are many.
    """

    def __init__(self, codebook: np.ndarray, prior_LxC: np.ndarray) -> None:
        self._rows = jnp.asarray(codebook, jnp.float32) if len(codebook) > DIRECT_CODES else None
        outputs = len(codebook) if self._rows is None else codebook.shape[1]
        self._params = {
            "kernel": jnp.zeros((beats.LEADS * (beats.WINDOW + 1), beats.LEADS, outputs)),
            "bias": jnp.asarray(np.log(prior_LxC), jnp.float32),
        }
        self._size = jnp.float32(1)
        self.chosen: dict[str, Any] = {"linear_rate": None, "linear_step": 0}

    def fit(self, train: Any, val: Any, ratio: float | None, seed: int, steps: int) -> None:
        """Train, and keep the parameters of the look at `val` with the lowest loss (the start counts too). Both are
        `code_baselines.Grid`s on the host.

        With `ratio` the leads of training beats are hidden anew each time they are drawn; without, as in `train`.
        """
        (wave, visible, label, inner), other = _units(train), _units(val)[:3]
        if not len(wave) or not len(other[0]):
            return
        self._size = jnp.float32(np.sqrt(np.square(wave, dtype=np.float32).mean()) or 1.0)
        looked = np.random.default_rng(seed).permutation(len(other[0]))[:LOOKED]
        other, start = tuple(part[looked] for part in other), self._params
        best = self._mean(start, other)
        for peak in RATES:
            rng, params, state = np.random.default_rng(seed), start, _ADAM.init(start)
            for step in range(steps):
                at = rng.integers(0, len(wave), UNITS)
                seen, asked = visible[at], label[at]
                if ratio is not None:
                    hidden = (rng.random(seen.shape) < ratio) & (inner[at] >= 0)
                    seen, asked = (seen | (asked >= 0)) & ~hidden, np.where(hidden, inner[at], -1)
                rate = np.float32(peak * (1 - step / steps))
                params, state = _update(params, state, rate, self._rows, self._size, wave[at], seen, asked)
                if (step + 1) % LOOK == 0 and (found := self._mean(params, other)) < best:
                    best, self._params = found, params
                    self.chosen = {"linear_rate": peak, "linear_step": step + 1}

    def nats(self, grid: Any) -> jax.Array:
        """Cross-entropy [B, N, L]; where nothing is asked it means nothing."""
        batch, places = grid.label.shape[:2]
        parts = (x.reshape(batch * places, *x.shape[2:]) for x in (grid.wave, grid.visible, grid.label))
        return _ce(self._params, self._rows, self._size, *parts).reshape(grid.label.shape)

    def _mean(self, params: Any, units: tuple[np.ndarray, ...]) -> float:
        total, number = 0.0, 0
        for start in range(0, len(units[0]), UNITS):
            wave, visible, label = (part[start : start + UNITS] for part in units)
            short = ((0, UNITS - len(wave)), (0, 0))  # one compiled shape
            label = np.pad(label, short, constant_values=-1)
            nats = _ce(params, self._rows, self._size, np.pad(wave, (*short, (0, 0))), np.pad(visible, short), label)
            total += float(np.asarray(nats)[label >= 0].sum())
            number += int((label >= 0).sum())
        return total / number


def _units(grid: Any) -> tuple[np.ndarray, ...]:
    """(wave [U, L, W], visible, label and inner [U, L]) of the beats that are asked for in some lead."""
    asked = (grid.label >= 0).any(2)
    return grid.wave[asked], grid.visible[asked], grid.label[asked], grid.inner[asked]


_ADAM = optax.scale_by_adam()


@jax.jit
def _ce(params, rows, size, wave_UxLxW, visible_UxL, label_UxL):
    """Cross-entropy [U, L] in nats."""
    seen_UxLxW = jnp.where(visible_UxL[:, :, None], wave_UxLxW.astype(jnp.float32), 0)
    inputs = (seen_UxLxW / size).reshape(len(wave_UxLxW), -1)
    inputs = jnp.concatenate([inputs, visible_UxL.astype(jnp.float32)], axis=1)
    with jax.default_matmul_precision("highest"):
        points = jnp.einsum("ui,ild->uld", inputs, params["kernel"])
        logits = (points if rows is None else points @ rows.T) + params["bias"]
    own = jnp.take_along_axis(logits, jnp.maximum(label_UxL, 0)[:, :, None], axis=2)[:, :, 0]
    return jax.nn.logsumexp(logits, axis=2) - own


@jax.jit
def _update(params, state, rate, rows, size, wave_UxLxW, visible_UxL, label_UxL):
    def loss(params):
        asked = label_UxL >= 0
        nats = _ce(params, rows, size, wave_UxLxW, visible_UxL, label_UxL)
        return jnp.where(asked, nats, 0).sum() / jnp.maximum(asked.sum(), 1)

    direction, state = _ADAM.update(jax.grad(loss)(params), state)
    return jax.tree.map(lambda p, d: p - rate * d, params, direction), state
