"""The beat detectors: how fast they are, and how right.

    python tools/bench_beats.py [--records 640] [--pairs 15]
    python tools/bench_beats.py --score [--ludb DIR] [--simulated 300] [--copies 4] [--json FILE]

Speed: records per second of CPU on one core for `records/beats` (all leads), `records/xqrs` (lead I) and
`wfdb.processing.xqrs_detect` (lead I, one record at a time), on simulated records as they are stored; measured in turn,
in an order that changes, medians over the pairs. What is asked: `robust` at least 20 times wfdb's rate.

Score: sensitivity, positive predictive value, bias and SD (found minus true, in ms) of both detectors; found and true
beats belong together one to one within 75 ms. For both, everything runs through the default chain and int16.
    LUDB (`--ludb`: the folder with data/ or data.tar.xz): the integers, as microvolt; truth is the median over the
    leads of the cardiologists' N marks; counted from the first to the last marked beat, since the outermost beats of a
    recording are not marked. The marks lie one sample of 500 Hz, 2 ms, before the extremum of their lead (median).
    Odd and even record numbers are listed apart: thresholds were chosen on the odd ones.
    Noise: added to the stored signals at a signal-to-noise ratio of 6 dB (variance of the 8 independent leads over the
    whole record against that of the noise in them). It is drawn for nine electrodes and reaches the leads as it would
    there. "emg": 12 to 42 Hz, in bursts; "motion": 1/f^1.5 noise with bumps and with steps that fade, high-passed at
    0.67 Hz as the signals are; "both": half of each power.
    Dead leads: six leads are zero, once the limb leads, once the chest leads, else six by chance.
    Simulated: records/synthetic with its own noise (18 dB in the median, 15 in population 2), pops and exchanged
    electrodes, seeds that no threshold was chosen on. "AF", "ventricular" and "atrial" are the records with
    fibrillation and with premature beats of the balanced mixture. "rate": records without fibrillation whose rate is
    set to the number: of the study's mixture, and of the balanced one, where half of them have wide QRS, long QT or
    ectopy, which at 165 and 180/min no heart would have. The true R is the centre of the simulator's wave "main".
    Beats whose R is in the outer 0.15 s of a record do not count.

RESULT (robust-2 and xqrs-1, 300 simulated records of a kind, 4 copies; Se and PPV in per cent, bias and SD in ms)
    robust: LUDB 100.0 and 100.0, 4.0, 9.3 (odd and even alike); emg 99.98 and 99.89, motion 100.0 and 99.54, both 100.0
    and 99.89; six leads dead 99.99 and 99.86; lead I inverted 100.0 and 100.0; AF at least 99.97 and 99.69, ventricular
    99.52 and 99.87, atrial 99.97 and 99.90; 40 to 180/min 99.83 and 99.82, among wide QRS 99.57 and 99.76.
    xqrs: LUDB 90.7 and 70.8 (T waves of lead I count as beats), -32, 30.
    Speed, Intel Xeon with AVX-512, other work on the machine: robust 9,100 a second, 23 times wfdb's 390 (range of the
    pairs 22 to 25); xqrs 8,300, 21 times.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy import signal as dsp

from ecg_jax.records import beats, synthetic, xqrs
from ecg_jax.records.leads import INDEPENDENT, LEADS, expand_matrix
from ecg_jax.records.preprocess import prepare_many
from ecg_jax.records.readers.wfdb import read_wfdb
from ecg_jax.records.record import Record
from ecg_jax.records.synthetic import anatomy, noise, rhythm
from ecg_jax.records.synthetic.population import FIBRILLATION

TOLERANCE = 7.5  # samples at 100 Hz
SNR_DB = 6.0
EDGE = 15  # samples at either end of a simulated record
RATES = (40, 60, 80, 100, 120, 150, 165, 180)
EIGHT = [LEADS.index(lead) for lead in INDEPENDENT]
MODES = {"robust": beats.stored_peaks, "xqrs": xqrs.peaks}


class Case(NamedTuple):
    """Stored records int16 [n, 1000, 12], their valid spans (start, length), the true R positions of each in samples,
    and between which of them found beats count."""

    signal: np.ndarray
    valid: list[tuple[int, int]]
    truth: list[np.ndarray]
    span: list[tuple[float, float]]

    def take(self, rows: list[int]) -> "Case":
        return Case(self.signal[rows], *([part[i] for i in rows] for part in self[1:]))


class Score(NamedTuple):
    beats: int
    missed: int
    extra: int
    bias: float  # ms
    sd: float  # ms

    @property
    def sensitivity(self) -> float:
        """In per cent; `predictive` likewise."""
        return 100 * (1 - self.missed / self.beats)

    @property
    def predictive(self) -> float:
        hits = self.beats - self.missed
        return 100 * hits / max(1, hits + self.extra)


def score(case: Case, find: Callable[[np.ndarray, Any], list[np.ndarray]]) -> Score:
    """`find(signal, valid)` on the records of `case`."""
    errors: list[float] = []
    total = extra = 0
    for truth, found, (first, last) in zip(case.truth, find(case.signal, case.valid), case.span, strict=True):
        pairs = matched(truth, found)
        counted = (truth >= first) & (truth <= last)
        total += int(counted.sum())
        errors += [found[j] - truth[i] for i, j in pairs if counted[i]]
        alone = np.delete(found, [j for _, j in pairs])
        extra += int(((alone >= first - TOLERANCE) & (alone <= last + TOLERANCE)).sum())
    error = 10 * np.array(errors)
    return Score(total, total - len(errors), extra, float(error.mean()), float(error.std()))


def matched(truth: np.ndarray, found: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j) within TOLERANCE, the nearest first, each beat once."""
    apart = np.abs(truth[:, None] - found[None])
    pairs: list[tuple[int, int]] = []
    free = np.ones(len(truth), bool), np.ones(len(found), bool)
    for place in np.argsort(apart, axis=None, kind="stable")[: int((apart <= TOLERANCE).sum())].tolist():
        i, j = divmod(place, len(found))
        if free[0][i] and free[1][j]:
            free[0][i] = free[1][j] = False
            pairs.append((i, j))
    return pairs


# --------------------------------------------------------------------------------------------------------- LUDB


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """The folder of the records."""
    if (folder / "data").is_dir():
        yield folder / "data"
        return
    with tempfile.TemporaryDirectory() as aside:
        with tarfile.open(folder / "data.tar.xz") as archive:
            archive.extractall(aside, filter="data")
        yield Path(aside) / "data"


def ludb(folder: Path) -> tuple[list[int], Case]:
    """Record numbers and the case."""
    with unpacked(folder) as data:
        names = sorted((path.stem for path in data.glob("*.hea")), key=int)
        readings = [read_wfdb(data / name, millivolt_per_step=0.001) for name in names]
        truth = [marks(data / name) for name in names]
    prepared = prepare_many([Record(r.signal, r.rate, name, name) for r, name in zip(readings, names, strict=True)])
    windows = [window for (window,) in prepared]
    spans = [(own[0], own[-1]) for own in truth]
    case = Case(np.stack([w.signal for w in windows]), [w.valid for w in windows], truth, spans)
    return [int(name) for name in names], case


def marks(record: Path) -> np.ndarray:
    """R positions in samples at 100 Hz: the median of the leads' marks of a beat."""
    at = np.sort(np.concatenate([n_marks(record.with_suffix(f".{lead.lower()}")) for lead in LEADS])) / 5
    return np.array([np.median(beat) for beat in np.split(at, np.flatnonzero(np.diff(at) > 15) + 1)])


def n_marks(file: Path) -> np.ndarray:
    """Samples of the annotations of kind N in a WFDB annotation file. (`wfdb.rdann` takes 5 ms for each of 1,440.)

    Words of 16 bits: the kind in the upper 6, samples since the one before in the lower 10. 59 announces an interval of
    two words, the upper first; 60 to 62 are fields, 63 a text of so many bytes; a word of zero ends it.
    """
    words, i, now, found = np.fromfile(file, "<u2").tolist(), 0, 0, []
    while words[i]:
        kind, value = divmod(words[i], 1024)
        if kind == 59:
            now += (words[i + 1] << 16) + words[i + 2]
            i += 2
        elif kind == 63:
            i += (value + 1) // 2
        elif kind < 59:
            now += value
            found += [now] if kind == 1 else []
        i += 1
    return np.array(found, float)


def emg(draw: np.random.Generator, n: int) -> np.ndarray:
    """[9, n] for the electrodes."""
    frequency = np.fft.rfftfreq(n + 400, 0.01)
    shape = np.sqrt(frequency**2 / (frequency**2 + 12**2) / (1 + (frequency / 42) ** 16))
    wave = np.fft.irfft(np.fft.rfft(draw.standard_normal((9, n + 400))) * shape, n + 400)
    swell = ndimage.gaussian_filter1d(draw.standard_normal((9, n + 400)), 40, axis=1)
    wave *= np.exp(0.6 * swell / swell.std(axis=1, keepdims=True) + 0.55 * draw.standard_normal((9, 1)))
    return wave[:, 200 : 200 + n]


def motion(draw: np.random.Generator, n: int) -> np.ndarray:
    """[9, n] for the electrodes."""
    length = n + 600
    time_ = np.arange(length)
    frequency = np.fft.rfftfreq(length, 0.01)
    shape = 1 / (0.3 + frequency) ** 1.5 / (1 + (frequency / 40) ** 8)
    wave = np.fft.irfft(np.fft.rfft(draw.standard_normal((9, length))) * shape, length)
    wave *= np.exp(0.5 * draw.standard_normal((9, 1))) / wave.std(axis=1, keepdims=True)
    for electrode in wave:
        for _ in range(draw.poisson(0.005 * length)):
            at, size = draw.integers(length), 1.2 * draw.standard_normal() * np.exp(0.5 * draw.standard_normal())
            if draw.random() < 0.5:
                electrode += size * np.exp(-0.5 * ((time_ - at) / np.exp(draw.uniform(1.1, 3))) ** 2)
            else:
                since = time_[: length - at]
                rise, fade = draw.uniform(1, 4), np.exp(draw.uniform(1.6, 4.1))
                electrode[at:] += size * (1 - np.exp(-since / rise)) * np.exp(-since / fade)
    highpass = dsp.butter(1, 0.67, "highpass", fs=100, output="sos")
    return dsp.sosfiltfilt(highpass, wave, axis=1)[:, 300 : 300 + n]


def noisy(case: Case, kind: str, copies: int, seed: int) -> Case:
    """Every record `copies` times, each with noise of its own."""
    case = case.take([i for i in range(len(case.truth)) for _ in range(copies)])
    signal = np.empty_like(case.signal)
    for i, clean in enumerate(case.signal):
        draw = np.random.default_rng([seed, i])
        parts = []
        for make in {"emg": (emg,), "motion": (motion,), "both": (emg, motion)}[kind]:
            leads = make(draw, len(clean)).T @ noise.FROM_ELECTRODES.T
            parts.append(leads / np.sqrt(leads.var(axis=0).mean()))
        total = sum(parts) / np.sqrt(len(parts))
        total *= np.sqrt(clean[:, EIGHT].var(axis=0).mean() / 10 ** (SNR_DB / 10))
        signal[i] = np.rint(np.clip(clean + total @ expand_matrix(), -32767, 32767))
    return case._replace(signal=signal)


def dead(case: Case, copies: int, seed: int) -> Case:
    """Every record `copies` times with six leads at zero."""
    case = case.take([i for i in range(len(case.truth)) for _ in range(copies)])
    draw = np.random.default_rng(seed)
    signal = case.signal.copy()
    for i in range(len(signal)):
        gone = (np.arange(6), np.arange(6, 12))[i % copies] if i % copies < 2 else draw.permutation(12)[:6]
        signal[i][:, gone] = 0
    return case._replace(signal=signal)


def inverted(case: Case) -> Case:
    signal = case.signal.copy()
    signal[:, :, 0] *= -1
    return case._replace(signal=signal)


# ---------------------------------------------------------------------------------------------------- simulated


def simulated(kind: str, count: int, seed: int, rate: float | None = None, **settings: Any) -> Case:
    """`count` records: "af", "ventricular", "atrial", or "" for all without fibrillation, at `rate` if one is given."""
    chosen = synthetic.Settings(seed=seed, **settings)
    index = np.arange(80 * count)
    state, _ = synthetic.states(chosen, index, index)
    fibrillation = state.rhythm == FIBRILLATION
    of_kind = {"af": fibrillation, "ventricular": state.ectopy > 0, "atrial": state.atrial > 0, "": ~fibrillation}
    state = state.take(np.flatnonzero(of_kind[kind])[:count])
    if rate:
        state = dataclasses.replace(state, rate=np.full(len(state.rate), float(rate)))
    drawn, main = rhythm.beats(chosen, state), anatomy.WAVES.index("main")
    usual, early = anatomy.waves(state), anatomy.premature_waves(chosen, state)
    late = np.where(drawn.kind == rhythm.VENTRICULAR, early.centre[:, main, None], usual.centre[:, main, None])
    at = 100 * (drawn.onset + late)
    signals = synthetic.signals(chosen, state)
    windows = [w for (w,) in prepare_many([Record(x, 100.0, str(i), str(i)) for i, x in enumerate(signals)])]
    truth, spans = [], []
    for i, window in enumerate(windows):
        start, n = window.valid
        truth.append(np.sort(at[i][drawn.inside[i]]) + start - max(0, (len(signals[i]) - n) // 2))
        spans.append((start + EDGE, start + n - EDGE))
    return Case(np.stack([w.signal for w in windows]), [w.valid for w in windows], truth, spans)


def cases(folder: Path | None, count: int, copies: int) -> Iterator[tuple[str, Case]]:
    """All rows of the table."""
    if folder is not None:
        numbers, real = ludb(folder)
        yield "LUDB", real
        for half, name in ((1, "odd"), (0, "even")):
            yield f"LUDB {name}", real.take([i for i, number in enumerate(numbers) if number % 2 == half])
        for kind in ("emg", "motion", "both"):
            yield f"LUDB {kind} {SNR_DB:g} dB", noisy(real, kind, copies, seed=206)
        yield "LUDB six leads dead", dead(real, 4 * copies, seed=206)
        yield "LUDB lead I inverted", inverted(real)
    for population in (1, 2):
        for kind in ("af", "ventricular", "atrial"):
            more = {"population": population, "prevalence": "balanced"}
            yield f"simulated {kind}, population {population}", simulated(kind, count, 201, **more)
    for prevalence in ("code", "balanced"):
        for rate in RATES:
            yield f"simulated {rate}/min, {prevalence}", simulated("", count, 202, rate, prevalence=prevalence)


def table(folder: Path | None, count: int, copies: int) -> list[dict[str, Any]]:
    """Prints the table; returns its rows."""
    rows = []
    print(f"{'':30} {'beats':>6}" + "".join(f" | {mode:>6}: Se    PPV   bias    SD" for mode in MODES))
    for name, case in cases(folder, count, copies):
        row: dict[str, Any] = {"case": name}
        line = f"{name:30}"
        for mode, find in MODES.items():
            got = score(case, find)
            row |= {"beats": got.beats}
            row[mode] = got._asdict() | {"sensitivity": got.sensitivity, "predictive": got.predictive}
            line += f" {got.beats:6}" if mode == "robust" else ""
            line += f" | {got.sensitivity:9.2f} {got.predictive:6.2f} {got.bias:6.1f} {got.sd:5.1f}"
        print(line, flush=True)
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------- speed


def speed(records: int, pairs: int) -> dict[str, Any]:
    """Prints and returns records per second of CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wfdb.processing import xqrs_detect

    case = simulated("", records, 203)
    signals = case.signal * np.float32(0.001)
    lead = case.signal[:, :, 0] * 0.001
    some = lead[: max(1, records // 16)]
    work: dict[str, tuple[int, Callable[[], Any]]] = {
        "robust": (len(signals), lambda: beats.r_peaks(signals)),
        "xqrs": (len(lead), lambda: xqrs.xqrs(lead)),
        "wfdb": (len(some), lambda: [xqrs_detect(one, 100, verbose=False) for one in some]),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for pair in range(pairs + 1):
        for name in [*work][pair % 3 :] + [*work][: pair % 3]:
            count, run = work[name]
            start = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                run()
            if pair:  # the first is for warming up
                rates[name].append(count / (time.process_time() - start))
    found = {name: round(statistics.median(own)) for name, own in rates.items()}
    for name in ("robust", "xqrs"):
        ratios = [a / b for a, b in zip(rates[name], rates["wfdb"], strict=True)]
        found[f"{name}_over_wfdb"] = round(statistics.median(ratios), 1)
        found[f"{name}_over_wfdb_range"] = [round(min(ratios), 1), round(max(ratios), 1)]
    print(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--score", action="store_true", help="how right they are, instead of how fast")
    parser.add_argument("--ludb", type=Path, help="folder of LUDB")
    parser.add_argument("--simulated", type=int, default=300, help="records of each simulated kind")
    parser.add_argument("--copies", type=int, default=4, help="noises for each record of LUDB")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    found = table(args.ludb, args.simulated, args.copies) if args.score else speed(args.records, args.pairs)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
