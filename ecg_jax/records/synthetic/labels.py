"""From the latent state to the diagnoses: their exact probabilities given the state, and the labels drawn
from them.

What it does. A label's rule is a probit around its threshold (`rule_margins`). Its log odds are shifted by a
teacher term, a fixed random nonlinear function of the visible morphology (256 features, the i-th weighted
i^-1.2), by the offset of the record's morphology mode, and by an intercept that keeps the prevalence where it
is without them. 1 % of what is true then goes missing and 0.1 % of what is not is reported. What it does not:
look at the waveform. Invariant: `probabilities` is P(label = 1 | state) exactly; labels are drawn from it
independently; the function from state to probability is one and the same in both populations, at every
prevalence and for all seeds.
"""

from functools import lru_cache

import numpy as np
from scipy.special import expit, log_ndtr

from ecg_jax.records.synthetic import hashing, population, rhythm
from ecg_jax.records.synthetic.population import FIBRILLATION, LEFT, RIGHT, SINUS, TEACHER_DIMS, State
from ecg_jax.records.synthetic.settings import CODE_LABELS, FALSE, LABELS, MISSED, WORLD, Settings

FEATURES = 256
WEIGHT_POWER = 1.2
SURE = 4.0  # margins are held within +- 4 standard deviations
REFERENCE = 1 << 16  # records of the calibration sample
REFERENCE_SEED = 1 << 40  # far from any user's seed
# What `calibrate` finds for the default strengths (a test compares): opening a data set is to be quick.
KNOWN_INTERCEPTS = {
    (1.6, 1.6, 1.0): (-1.55138, -0.67206, -0.63101, -1.25994, 0.12906, 0.22598, 1.25085, -0.61446, 0.0367),
}

PR_LIMIT, PR_SD = 200.0, 12.0  # ms
QRS_LIMIT, QRS_SD = 120.0, 8.0  # ms
SLOW_LIMIT, FAST_LIMIT, RATE_SD = 50.0, 100.0, 3.0  # per minute
CV_LIMIT, CV_SD = 0.10, 0.025  # variation of RR above which a rhythm without P is read as fibrillation
QTC_LIMIT, QTC_SD = 460.0, 10.0  # ms
ST_LIMIT, ST_SD = -0.10, 0.025  # mV
PVC_MARGIN = (-SURE, 1.6, 2.6, SURE)  # for 0, 1, 2, 3 and more beats


def rule_margins(state: State, premature: np.ndarray, label_noise: float = 1.0) -> np.ndarray:
    """float64 [n, 9] in the order LABELS: how far inside its definition each record is, in standard
    deviations of the reader's judgement. `premature` [n] counts the ventricular premature beats in the
    record."""
    sinus = state.rhythm == SINUS
    margins = [
        np.where(sinus, (state.pr - PR_LIMIT) / PR_SD, -np.inf),
        np.where(state.pattern == RIGHT, (state.qrs - QRS_LIMIT) / QRS_SD, -np.inf),
        np.where(state.pattern == LEFT, (state.qrs - QRS_LIMIT) / QRS_SD, -np.inf),
        np.where(sinus, (SLOW_LIMIT - state.rate) / RATE_SD, -np.inf),
        np.where(state.rhythm == FIBRILLATION, (state.rr_cv - CV_LIMIT) / CV_SD, -np.inf),
        np.where(sinus, (state.rate - FAST_LIMIT) / RATE_SD, -np.inf),
        np.array(PVC_MARGIN)[np.minimum(premature, 3)],
        (state.qtc - QTC_LIMIT) / QTC_SD,
        (ST_LIMIT - state.st) / ST_SD,
    ]
    return np.clip(np.stack(margins, axis=1) / max(label_noise, 1e-6), -SURE, SURE)


@lru_cache(maxsize=1)
def _teacher_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Directions [10, 256], phases [256], weights [256, 9]. Each feature looks along two or three axes of the
    morphology; later features are finer. Every label ranks the same features in another order, and its
    weights are scaled to give the sum unit variance over the people."""
    feature = np.arange(FEATURES)
    place = hashing.normals(hashing.key("teacher", WORLD), feature, TEACHER_DIMS)
    chosen = np.argsort(np.argsort(-np.abs(place), axis=1), axis=1) < 2 + (feature % 2)[:, None]
    direction = np.where(chosen, place, 0.0)
    size = 0.9 + 1.3 * (feature / FEATURES) ** 0.5
    direction *= (size / np.linalg.norm(direction, axis=1))[:, None]
    phase = 2 * np.pi * hashing.uniforms(hashing.key("phase", WORLD), feature, 1)[:, 0]
    sign = hashing.normals(hashing.key("weight", WORLD), feature, len(LABELS))
    rank = (feature[:, None] + 29 * np.arange(len(LABELS))) % FEATURES + 1.0
    weight = np.where(sign > 0, 1.0, -1.0) * rank**-WEIGHT_POWER
    people = hashing.normals(hashing.key("teacher people", WORLD), np.arange(8192), TEACHER_DIMS)
    term = np.sin(people @ direction.T + phase) @ weight
    return direction.T, phase, np.stack([term.mean(axis=0) / term.std(axis=0), 1 / term.std(axis=0)]), weight


def teacher_term(morphology: np.ndarray) -> np.ndarray:
    """float64 [n, 9], the teacher's part of the log odds at strength 1, from `State.morphology` [n, 14]: mean
    0 and variance 1 over the people."""
    direction, phase, (mean, scale), weight = _teacher_tables()
    seen = np.ascontiguousarray(morphology[:, :TEACHER_DIMS])
    wave = np.sin(np.matmul(seen[:, None, :], direction)[:, 0] + phase)
    return np.matmul(wave[:, None, :], weight)[:, 0] * scale - mean


def tail_term(mode: np.ndarray) -> np.ndarray:
    """float64 [n, 9], the modes' part of the log odds at strength 1; hashed from the mode's number."""
    return hashing.normals(hashing.key("offset", WORLD), mode, len(LABELS))


def premature_beats(settings: Settings, state: State) -> np.ndarray:
    """int64 [n], the ventricular premature beats well inside each record."""
    count = np.zeros(len(state.index), np.int64)
    prone = np.flatnonzero(state.ectopy > 0)  # few; the others' beats need not be drawn
    if len(prone):
        count[prone] = rhythm.beats(settings, state.take(prone)).premature
    return count


def _rule_odds(settings: Settings, state: State) -> np.ndarray:
    """Log odds of the rules alone, float64 [n, 9]."""
    margin = rule_margins(state, premature_beats(settings, state), settings.label_noise)
    return log_ndtr(margin) - log_ndtr(-margin)


def _offsets(settings: Settings, state: State) -> np.ndarray:
    """What teacher and tail add to the log odds, float64 [n, 9], without the intercept."""
    return settings.teacher * teacher_term(state.morphology) + settings.tail * tail_term(state.mode)


def _reported(log_odds: np.ndarray) -> np.ndarray:
    return FALSE + (1 - MISSED - FALSE) * expit(log_odds)


@lru_cache(maxsize=16)
def calibrate(teacher: float, tail: float, label_noise: float) -> tuple[float, ...]:
    """The nine intercepts under which teacher and tail leave the prevalences as the rules alone have them:
    the six of CODE in population 1, the three new labels in population 2, at CODE's mixture of conditions. By
    bisection on 65,536 reference records of fixed seed, some 2 s."""
    found = []
    for which, columns in ((1, range(len(CODE_LABELS))), (2, range(len(CODE_LABELS), len(LABELS)))):
        settings = Settings(population=which, seed=REFERENCE_SEED, teacher=teacher, tail=tail, label_noise=label_noise)
        index = np.arange(REFERENCE)
        state = population.draw(settings, index, index)
        rule, offset = _rule_odds(settings, state), _offsets(settings, state)
        wanted = _reported(rule).mean(axis=0)
        for column in columns:
            odds = rule[:, column] + offset[:, column]
            low, high = -8.0, 8.0
            for _ in range(40):
                middle = (low + high) / 2
                over = _reported(odds + middle).mean() > wanted[column]
                low, high = (low, middle) if over else (middle, high)
            found.append(round((low + high) / 2, 5))
    return tuple(found)


def intercepts(settings: Settings) -> tuple[float, ...]:
    """The nine intercepts that belong to the strengths of these settings, and to nothing else in them."""
    strengths = (settings.teacher, settings.tail, settings.label_noise)
    return KNOWN_INTERCEPTS.get(strengths) or calibrate(*strengths)


def probabilities(settings: Settings, state: State) -> np.ndarray:
    """float64 [n, 9] in the order LABELS: P(label = 1 | state), exact."""
    return _reported(_rule_odds(settings, state) + _offsets(settings, state) + np.array(intercepts(settings)))


def draw(settings: Settings, state: State, probability: np.ndarray) -> np.ndarray:
    """int8 [n, 9], labels drawn from `probability` [n, 9], independently of each other and of everything
    else."""
    u = hashing.uniforms(hashing.key("label", settings.population, settings.seed), state.index, len(LABELS))
    return (u < probability).astype(np.int8)


def entropy(probability: np.ndarray) -> np.ndarray:
    """Nats, elementwise: the loss of a predictor that gives exactly this probability."""
    p = np.asarray(probability, np.float64)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))
