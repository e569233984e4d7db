"""What each process of `test_hosts` does, with few imports: `child`, of data, run folder, words and `then=RUN` words.

Ten steps of some networks one by one, then whole runs of the toy; prints JSON. Words are overrides of the configuration
of a run, and: `only=loop` leaves out the steps, `slow=S` makes each step of the run last S seconds, `stop=N` sends the
last process SIGTERM at step N, `die=commit` kills it while a checkpoint is committed, `damage=1` flips a byte of one of
its records; `then=NAME` begins another run, in the folder beside.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tiny_run

from ecg_jax.errors import InterruptedRun
from ecg_jax.models import ladder
from ecg_jax.objectives import supervised
from ecg_jax.shards.catalog import open_folder
from ecg_jax.training import data as data_lib
from ecg_jax.training import feed, hosts, loop, mesh, optim, step

NETS = {1: ("data", "toy"), 2: ("data", "fsdp"), 4: ("toy",)}  # what is compared, by number of processes
OWN_WORDS = ("only", "slow", "stop", "die", "damage")


def run(data: str, out: str, *words: str) -> None:
    """What each process does: ten steps of some networks one by one, then whole runs of the toy; prints JSON."""
    first, *others = " ".join(words).split(" then=")
    try:
        hosts.join()
        mesh.FSDP_BYTES = 1
        given, config = _read(data, first.split())
        nets = () if "only" in given else NETS[len(jax.devices())]
        result = {"losses": {}, "step": {}, "mu": {}}
        for name in nets:
            for key, value in _ten_steps(config, name).items():
                result[key][name] = value
        print(json.dumps(result), flush=True)
        loop.objectives.make = lambda config, n, _: tiny_run.Toy(config.model.crop, n)
        _run(given, config, data, Path(out))
        for other in others:
            name, *rest = other.split()
            _run(*_read(data, rest), data, Path(out).with_name(name))
    except InterruptedRun as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception as error:
        hosts.leave(error)  # as the command does
        raise


def _read(data: str, words: list[str]) -> tuple[dict, object]:
    given = dict(word.split("=") for word in words if word.startswith(OWN_WORDS))
    overrides = [word for word in words if not word.startswith(OWN_WORDS)]
    return given, tiny_run.config(f'data.folders=["{data}"]', "data.task=code", *overrides)


def _ten_steps(config, name: str) -> dict:
    real = supervised.make(ladder.get("Td1"), 6, crop=200)
    cases = {"data": (real, 1), "toy": (tiny_run.Toy(n_labels=6), 1), "fsdp": (tiny_run.Toy(n_labels=6), 2)}
    objective, fsdp = cases[name]
    where = mesh.make(8, 0, fsdp)
    loaded = data_lib.load(config, None, where, True)
    whole, hyper = mesh.replicated(where), optim.hyper(config.optim)
    programs = step.build(objective, where, 64, 8, False)
    seed, hyper = mesh.put(np.uint32(0), whole), mesh.put(hyper, whole)
    state = programs.init(seed, mesh.put(loaded.start, whole))
    if loaded.batches is None:
        inputs = feed.ResidentFeed(feed.place(loaded.train, where), where, 16, 0, False)
    else:
        inputs = feed.BatchFeed(loaded.batches(feed.FIELDS), where, False)
    losses, one, mu = [], None, []
    for number in range(10):
        rows, (entry,), (rate,) = inputs.take(number, np.full(1, 0.01, np.float32))
        one = one or programs.one.lower(state, rows, entry, rate, hyper, seed).compile()
        state, found = one(state, rows, entry, rate, hyper, seed)
        losses.append(float(hosts.fetch(found["loss"])))
        if not number:
            mu = np.concatenate([hosts.fetch(leaf).ravel() for leaf in jax.tree.leaves(state.mu)]).tolist()
    inputs.close()
    text = one.as_text()
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
    return {"losses": losses, "mu": mu, "step": counts}


def _run(given: dict, config, data: str, out: Path) -> None:
    last = jax.process_index() == jax.process_count() - 1
    if "die" in given and last:
        from orbax.checkpoint._src.futures import signaling_client

        signaling_client.JaxDistributedSignalingClient.wait_at_barrier = lambda *_, **__: os.kill(os.getpid(), 9)
    if "damage" in given and last:
        mine = [shard for shard in open_folder(Path(data)).shards("train") if shard.number % 8 == 7]
        with open(mine[0].path, "r+b") as file:
            file.seek(int(mine[0].index()[-1]["signal"]) + 5000)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    slow, stop = float(given.get("slow", 0)), int(given.get("stop", -1))
    takes = {kind: kind.take for kind in (feed.ResidentFeed, feed.BatchFeed)}

    def patched(take):
        def slowly(self, step, rates):
            time.sleep(slow)
            if step == stop and last:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(self, step, rates)

        return slowly

    for kind, take in takes.items():
        kind.take = patched(take)
    try:
        loop.train(config, out, quiet=True)
    except InterruptedRun:
        if stop < 0:
            raise
    finally:
        for kind, take in takes.items():
            kind.take = take


def child(environment: dict[str, str], log: Path, *words: str) -> None:
    """`run` in a process that was forked with all of this imported; what it prints goes to `log`.out and `log`.err."""
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        with open(f"{log}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    run(*words)
