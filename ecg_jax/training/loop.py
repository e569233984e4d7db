"""The training loop, from a configuration to a finished run folder. Read it from top to bottom.

It says when things happen. What happens is in `step` (the compiled programs), `recipe` (how long, at which
rate), `feed` (input), `results` (reading and logging), `checkpoint`, and `finish` (test, eval log, summary).

Invariants. The host never waits for the step that it has just sent: step n is read after step n + 1 has been
dispatched, an evaluation likewise, so every decision falls at a fixed place in the order of steps.
`metrics.jsonl` is a function of the run's identity: a run that was killed and started again leaves the same
bytes as one that was not.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecg_jax import config as config_lib
from ecg_jax import files, objectives, progress
from ecg_jax.config import Config
from ecg_jax.errors import DivergedError, InterruptedRun
from ecg_jax.shards.tables import Table
from ecg_jax.training import data as data_lib
from ecg_jax.training import finish, folder, hosts, memory, metrics, optim, recipe, runtime, step
from ecg_jax.training import mesh as mesh_lib
from ecg_jax.training.checkpoint import Checkpoints
from ecg_jax.training.feed import BatchFeed, ResidentFeed, place
from ecg_jax.training.results import Results

EVAL_BATCH = 256  # records per evaluation program, or the training batch if that is larger


def train(
    config: Config, run_dir: str | Path, *, tables: Mapping[str, Table] | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train a run, go on with it, or return the summary of a finished one.

    Args:
        run_dir: the run folder; made if need be, gone on with if it holds the same run.
        tables: "train", "val" and "test" (or what the configuration calls the last two), where they are in
            memory. The same objects in several calls are put on the devices once.
        quiet: no progress and no remarks on stderr.

    Returns:
        The content of `summary.json`.

    Raises:
        UsageError: a wrong configuration, or a folder that holds another run.
        DataError: missing or damaged data, or no readable checkpoint.
        DivergedError: too many non-finite steps in a row; the summary says so too.
        InterruptedRun: SIGTERM or SIGINT came; the state is saved, the same call goes on from there.
        MachineError: the disk or the memory refused, or another process of the run is lost.
    """
    run_dir = Path(run_dir)
    hosts.join()
    with runtime.stop_signals(str(run_dir)) as stop, contextlib.ExitStack() as at_end:
        with hosts.together("run folder"):
            if hosts.first():
                at_end.enter_context(folder.claim(run_dir))
        with hosts.together("configuration"):
            config = folder.adopt(run_dir, objectives.resolve(config))
            summary = folder.finished(run_dir)
        account = memory.Account()
        try:
            return summary or _train(config, run_dir, tables, quiet or not hosts.first(), stop, at_end, account)
        except jax.errors.JaxRuntimeError as error:
            if (told := memory.explained(error, account, config, run_dir)) is None:
                raise
            raise told from error


def _train(
    config: Config,
    run_dir: Path,
    tables: Any,
    quiet: bool,
    stop: runtime.Stop,
    at_end: contextlib.ExitStack,
    account: memory.Account,
) -> dict[str, Any]:
    # ------------------------------------------------------------------------------------------------ runtime
    runtime.setup(config.train.cache_dir)
    clock = metrics.Clock()
    held = folder.devices(run_dir)
    mesh = mesh_lib.make(config.train.lanes, runtime.share(config, held), config.train.fsdp)
    everywhere = mesh_lib.replicated(mesh)
    cpu = mesh_lib.on_cpu(mesh)
    if cpu and hosts.count() == 1:  # goes into the folder: on as many, the run that goes on has the same bits
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, devices=mesh.size))
        if held not in (0, mesh.size) and not quiet:
            note = f"begun on {held} devices, going on on {mesh.size}: the same to 1e-5, not to the bit"
            print(f"{run_dir}: {note}", file=sys.stderr)
    block = cpu and mesh.size > 1  # an unbounded queue deadlocks the collectives of simulated devices
    scan = not cpu and config.train.steps_per_dispatch > 1  # convolutions in a loop are pathological on CPU

    # --------------------------------------------------------------------------------------------------- data
    with clock.of("data"), hosts.together("data"):
        data = data_lib.load(config, tables, mesh, quiet)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, loader=data.loader))
        objective = objectives.make(config, len(data.val.label_names), data.book)
        val = place(data.val, mesh, objective.fields)
        if data.batches is None:
            rows = place(data.train, mesh, objective.fields)
            feed = ResidentFeed(rows, mesh, config.train.batch, config.train.seed, scan)
            data = dataclasses.replace(data, train=None)  # the devices have it: the host's copy may go
        else:
            feed = BatchFeed(data.batches(objective.fields), mesh, scan, objective.fields)
        at_end.callback(feed.close)

    # ----------------------------------------------------------------------------------------------- programs
    with hosts.together("same data"):
        if hosts.first():
            folder.check_data(run_dir, data.facts)
            files.write(run_dir / folder.CONFIG, config_lib.to_json(config))
    parts = config.train.accumulate
    at_once = max(config.train.batch // parts, EVAL_BATCH)
    programs = step.build(objective, mesh, at_once, config.train.lanes, scan, parts)

    # -------------------------------------------------------------------------------------------------- state
    # Rate, decay, clipping and seed are arguments of the programs: another value is no other compilation.
    hyper = mesh_lib.put(optim.hyper(config.optim, objective), everywhere)
    seed = mesh_lib.put(np.uint32(config.train.seed), everywhere)
    state = programs.init(seed, mesh_lib.put(data.start, everywhere))
    control = recipe.Controller(recipe.plan(config, data.records, data.facts["val"]["records"]))

    # ------------------------------------------------------------------------------------------------- resume
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    both = {"state": programs.abstract._asdict(), "best": programs.abstract._asdict()}
    at_end.callback(checkpoints.close)
    watchdog = runtime.Watchdog(config.train.watchdog, str(run_dir))
    at_end.callback(watchdog.close)
    saved = checkpoints.restore(both)
    host = saved[2] if saved else {"offset": 0, "resumes": -1}
    log = metrics.Log(run_dir / folder.METRICS, host["offset"])
    timing = metrics.Log(run_dir / folder.TIMING, None if saved else 0)
    at_end.callback(log.close)
    at_end.callback(timing.close)
    resumes = host["resumes"] + 1
    if saved:
        control.resume(host["control"])
        clock.resume(host["clock"])
        state = step.State(**saved[1]["state"])
        timing.write({"resumed": resumes, "update": control.update, "input_wait_frac": None})
        stop.saved = f"checkpoint {control.update} is there"
        if not quiet:
            print(f"{run_dir}: going on after update {control.update}", file=sys.stderr)
    mfu = functools.partial(finish.mfu, objective, mesh)
    results = Results(control, log, timing, clock, objective.mean, config.train.log_every, config.train.batch, mfu)
    votes = hosts.Votes(mesh)
    if saved:
        results.resume(host["results"], step.State(**saved[1]["best"]) if host["has_best"] else None)

    def evaluate() -> None:
        candidate = programs.copy(state)  # the loop goes on and gives `state` away before the result is known
        *_, (sums, _) = step.evaluate(programs, candidate.params, val, mesh)
        results.sent_evaluation(sums, candidate)

    def save(wait: bool = False) -> None:
        with clock.of("checkpoint"):
            results.read()
            best = results.best if results.best is not None else state
            checkpoints.save(
                control.update,
                {"state": programs.copy(state)._asdict(), "best": best._asdict()},
                {
                    "control": control.to_json(),
                    "clock": clock.spent(),
                    "results": results.to_json(),
                    "has_best": results.best is not None,
                    "offset": log.offset(),
                    "resumes": resumes,
                },
                wait,
            )
            stop.saved = f"checkpoint {control.update} has been begun" + (" and is whole" if wait else "")

    # --------------------------------------------------------------------------------------------------- loop
    run = finish.Run(config, run_dir, mesh, data, objective, programs, control, results, clock, resumes)
    stopping = late = False  # once told, until it can be done
    try:
        if control.update == 0:
            evaluate()  # the untrained model, where every trajectory begins
        for _ in _until_end(control, "" if quiet else f"train {run_dir.name}"):
            # Send a dispatch; then, and only then, read what was sent before it.
            rates = control.rates()
            with clock.of("input_wait"):
                rows, inputs, there = feed.take(control.step, rates)
            if not account.begun():
                sent = (programs.many, inputs, there) if scan else (programs.one, inputs[0], there[0])
                account.keep(sent[0], state, rows, *sent[1:], hyper, seed)
            state, values = programs.step(state, rows, inputs, there, hyper, seed)
            if block:
                jax.block_until_ready(values)
            control.advance()
            results.sent_steps(values, float(rates[-1]))
            results.read(keep=1)
            watchdog.beat()
            told, overdue = votes.poll(stop.signal is not None, hosts.first() and checkpoints.overdue())
            stopping, late = stopping or told, late or overdue

            # Evaluate; stop, go back to the best state, decay, or end, as the recipe says.
            if control.eval_due() and not control.wants_to_stop():
                evaluate()
            if control.phase_over() or control.wants_to_stop():
                results.read()
                results.end_line()
                if control.end_phase():
                    state = programs.copy(results.selected())

            # Save when it is time to, or when told to stop, but not between an evaluation and its reading.
            if control.phase != "end" and not results.evaluating():
                if stopping:
                    save(wait=True)
                    what = stop.signal or "another process was told to stop"
                    raise InterruptedRun(f"{run_dir}: {what} after step {control.step}, saved; run it again to go on")
                if late or checkpoints.due(control.update):
                    save()
                    late = False
        results.selected()
    except DivergedError as error:
        finish.diverged(run)
        raise DivergedError(f"{run_dir}: {error}") from None
    except InterruptedRun:
        finish.interrupted(run)
        raise

    # ------------------------------------------------------------------------------------------------- finish
    return finish.done(run, state)


def _until_end(control: recipe.Controller, shown_as: str) -> Iterator[None]:
    """Once per dispatch until the recipe is at its end, with a progress bar unless `shown_as` is empty."""

    def going() -> Iterator[None]:
        while control.phase != "end":
            yield

    most = control.plan.budget // control.plan.dispatch
    return progress.track(going(), shown_as, most, "dispatches at most") if shown_as else going()
