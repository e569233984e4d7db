"""`ecg-jax demo`: the whole path on simulated ECG, on two CPU cores, in under five minutes.

Two populations are simulated and converted; a small codebook of heartbeats is trained, and all beats get their codes;
both families are trained under both paradigms on a grid of three sizes and three nested subsets, one cell of it four
times; every encoder is probed on the shifted population; laws are fitted and the report written.
The work is shared between two processes, each with a core of its own. Nothing here knows how a stage works: it calls
what the commands call. A second call on the same folder does only what is missing.

The Bayes risk of the simulated labels is known, so the excess over it is measured, not modelled. It is a demonstration
of the path and of the fitter, not a study of anything.
"""

import itertools
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecg_jax.errors import EcgJaxError, UsageError

BANNER = "demonstration, not a study"
RUNGS = ("Rd1", "Rd2", "Rd3", "Td1", "Td2", "Td3")
SHARES = {"first core": ("Rd3", "Td3", "Td2"), "second core": ("Rd2", "Rd1", "Td1")}  # about equal work
PARADIGMS = {"SL": "supervised", "SSL": "masked_codes"}
STEPS = {("R", "SL"): 400, ("T", "SL"): 800, ("R", "SSL"): 200, ("T", "SSL"): 300}
RECORDS = (256, 1024, 4096)
REPEATED = {"Rd2", "Td2"}, 1024, (1, 2, 3)  # rungs, records and further seeds of the cell that is trained four times
POPULATIONS = {
    "synthetic": {"population": "1", "prevalence": "balanced", "records": "6208", "val": "512", "test": "1536"},
    "synthetic_ood": {"population": "2", "prevalence": "balanced", "records": "2048", "val": "384", "test": "768"},
}
# Without 1dAVb and AF: whether a net of this size finds the PR interval, or the irregular rhythm, within so few steps
# is a matter of luck, and three seeds of one cell end at 0.20, 0.36 and 0.37 nats on one, at 0.14, 0.15 and 0.35 on
# the other. The other four agree to a few thousandths.
LABELS = ["RBBB", "LBBB", "SB", "ST"]
TRAINING = [
    "data.task=code",
    "model.input=signal",
    "model.crop=500",
    "model.slots=96",  # eight beats are as many as five seconds hold, but for a few tachycardias
    "model.random_crop=false",  # so that few records stay few, and their lack shows within minutes
    "objective.masking=beat",
    "objective.baseline_steps=100",
    "optim.lr=1e-2",
    "optim.warmup_steps=20",
    "recipe.kind=steps",
    "recipe.decay_fraction=0.6",
    "recipe.eval_every=100",
    "train.batch=32",
]
CODEBOOK = [
    "objective.name=codebook",
    "model.slots=96",  # of longer records the eight beats in the middle, which are those that the crop shows
    "data.subset_records=2048",
    "codebook.codes=64",
    "codebook.code_dim=16",
    "codebook.width=64",
    "codebook.encoder_layers=1",
    "codebook.decoder_layers=1",
    "codebook.head_size=32",
    "codebook.mlp=128",
    "codebook.sample=64",
    "optim.lr=2e-3",
    "optim.warmup_steps=20",
    "recipe.kind=steps",
    "recipe.steps=80",
    "recipe.eval_every=80",
    "train.batch=16",
]


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    rung: str
    paradigm: str  # of PARADIGMS
    records: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rung}-{self.paradigm}-D{self.records}-s{self.seed}"


def grid(rung: str, seed: int) -> list[Cell]:
    """The rung's runs under both paradigms; of the supervised ones the repeats of one cell too."""
    rungs, repeated, more = REPEATED
    cells = [Cell(rung, paradigm, records, seed) for paradigm in PARADIGMS for records in RECORDS]
    return cells + [Cell(rung, "SL", repeated, seed + extra) for extra in more if rung in rungs]


def settings(cell: Cell, folder: Path, book: Path) -> list[str]:
    """What the run of `cell` overrides in the default configuration."""
    of_cell = [f"model.rung={cell.rung}", f"data.subset_records={cell.records}", f"train.seed={cell.seed}"]
    data = [f"data.folders={json.dumps([str(folder)])}", f"data.labels={json.dumps(LABELS)}"]
    learn = [f"objective.name={PARADIGMS[cell.paradigm]}", f"objective.codebook={json.dumps(str(book))}"]
    return [*TRAINING, *data, *of_cell, *learn, f"recipe.steps={STEPS[cell.rung[0], cell.paradigm]}"]


def demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run the demonstration in the folder `out`; returns what `fit` returns, with `seconds`. `seed` seeds all of it.

    Raises UsageError if `out` is a file; the errors of the stages pass through.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    cells = [cell for rung in RUNGS for cell in grid(rung, seed)]
    clock.say(f"{BANNER}: two simulated populations, two architectures, two paradigms, {len(cells)} runs")
    _together({name: (_convert, (out, name, options, seed)) for name, options in POPULATIONS.items()}, clock)
    _together({"codebook": (_codebook, (out, seed))}, clock)
    _together({name: (_study, (out, rungs, seed)) for name, rungs in SHARES.items()}, clock)

    from ecg_jax.scaling.fit import fit, result_lines

    result = fit(
        [out / "runs" / cell.name for cell in cells],
        out / "report",
        title="Simulated ECG: three sizes, three data subsets",
        banner=BANNER,
    )
    clock.say("laws fitted")
    print("\n".join(result_lines(result)))
    places = {
        "shards": out / "data",
        "one ECG": out / "ecg.png",
        "codes": out / "codes.png",
        "runs": out / "runs",
        "laws": out / "report" / "laws.json",
        "report": out / "report" / "report.html",
    }
    print("\n".join(f"{what:8} {place}" for what, place in places.items()))
    clock.say("done")
    return result | {"seconds": clock.seconds()}


class _Clock:
    def __init__(self) -> None:
        self.start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        print(f"{self.seconds():5.0f} s  {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- one process a core


def _together(jobs: dict[str, tuple[Callable, tuple]], clock: _Clock) -> None:
    """Run the jobs side by side, each on its own core, and pass on what they say; the first failure ends them all."""
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    shares = [cores[i :: len(jobs)] or cores for i in range(len(jobs))]
    workers = {
        name: context.Process(target=_work, args=(name, job, args, share, messages), name=name)
        for (name, (job, args)), share in zip(jobs.items(), shares, strict=True)
    }
    for worker in workers.values():
        worker.start()
    running = set(workers)
    try:
        while running:
            try:
                name, what, text = messages.get(timeout=1.0)
            except queue.Empty:  # has someone died without a word?
                for name in running:
                    if (code := workers[name].exitcode) not in (None, 0):
                        raise EcgJaxError(f"the {name} process ended with code {code}") from None
                continue
            if what == "done":
                running.discard(name)
            elif what == "failed":
                raise text
            else:
                clock.say(text)
    finally:
        for worker in workers.values():
            if running:
                worker.terminate()
            worker.join()


def _work(name: str, job: Callable, args: tuple, cores: list[int], messages: Any) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX counts the cores that it may use
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        job(*args, lambda text: messages.put((name, "says", text)))
        messages.put((name, "done", ""))
    except EcgJaxError as error:
        messages.put((name, "failed", error))
    except BaseException:
        traceback.print_exc()
        messages.put((name, "failed", EcgJaxError(f"the {name} process failed; its traceback stands above")))


# ------------------------------------------------------------------------------------------------ what they have to do


def _convert(out: Path, name: str, options: dict[str, str], seed: int, say: Callable[[str], None]) -> None:
    from ecg_jax.datasets import open_source
    from ecg_jax.shards.convert import convert

    source = open_source("synthetic", None, options | {"seed": str(seed)})
    card = convert(source, out / "data", workers=1)
    counts = ", ".join(f"{split} {c['records']:,}" for split, c in card["splits"].items())
    say(f"{name}: {counts} records in shards")
    if name == "synthetic":
        from ecg_jax import ecg_paper, inspection

        ecg_paper.draw(inspection.stored_record(out / "data" / name), out / "ecg.png")


def _codebook(out: Path, seed: int, say: Callable[[str], None]) -> None:
    from ecg_jax import codes_plot, config
    from ecg_jax.tokenize import tokenize
    from ecg_jax.training.loop import train

    folder, book = out / "data" / "synthetic", out / "codebook"
    own = [f"data.folders={json.dumps([str(folder)])}", f"train.seed={seed}"]
    summary = train(config.override(config.Config(), [*CODEBOOK, *own]), book, quiet=True)
    usage = summary["codes"]
    say(f"codebook: {usage['used']} of {usage['codes']} codes used, perplexity {usage['perplexity']:.0f}")
    (found,) = tokenize([folder], book, quiet=True)["data"]
    say(f"codes of all beats beside the shards, {found['path']}")
    codes_plot.draw(Path(found["path"]), out / "codes.png")


def _study(out: Path, rungs: tuple[str, ...], seed: int, say: Callable[[str], None]) -> None:
    from ecg_jax import config
    from ecg_jax.codebook import load
    from ecg_jax.evaluation.probe import probe_run
    from ecg_jax.shards import tables
    from ecg_jax.shards.catalog import Subset
    from ecg_jax.shards.codes import expected_name
    from ecg_jax.training.loop import train

    folder, shifted, book = out / "data" / "synthetic", out / "data" / "synthetic_ood", out / "codebook"
    options = {"labels": tuple(LABELS), "codes": [expected_name(load(book).id, "robust")]}
    held = {split: tables.load([folder], split, "code", **options) for split in ("val", "test")}
    other = {split: tables.load([shifted], split, "ood") for split in ("train", "val", "test")}
    cells = sorted((cell for rung in rungs for cell in grid(rung, seed)), key=lambda cell: cell.records)
    for records, same in itertools.groupby(cells, key=lambda cell: cell.records):  # one training table at a time
        held["train"] = tables.load([folder], "train", "code", **options, subset=Subset(records=records))
        for cell in same:
            run = out / "runs" / cell.name
            summary = train(
                config.override(config.Config(), settings(cell, folder, book)), run, tables=held, quiet=True
            )
            loss, took = summary["losses"]["test"], summary["seconds"]["wall"]
            what = f"{cell.paradigm} {cell.rung} ({summary['n_params']:,} parameters) on {records:,} records"
            say(f"{what}: test loss {loss:.4f} ({took:.0f} s)")
            if not (run / "probes" / "synthetic_ood-ood.json").exists():
                probe_run(run, shifted, "ood", tables=other, bootstrap=200, probes=("logistic",), baselines=False)
