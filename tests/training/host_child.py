"""What each process of `test_hosts` does, with few imports: `python host_child.py DATA RUN [override ...]`.

Ten steps of some networks one by one, then a whole run of the toy; prints JSON. The override `only=loop` leaves out
the steps, `slow=S` makes each step of the run last S seconds.
"""

import json
import sys
import time

import jax
import numpy as np
import tiny_run

from ecg_jax.errors import EcgJaxError
from ecg_jax.models import ladder
from ecg_jax.objectives import supervised
from ecg_jax.training import data as data_lib
from ecg_jax.training import feed, hosts, loop, mesh, optim, step

NETS = {1: ("data", "toy"), 2: ("data", "fsdp"), 4: ("toy",)}  # what is compared, by number of processes


def run(data: str, out: str, *overrides: str) -> None:
    """Runs in each process: ten steps of a real network one by one, then a whole run of the toy; prints JSON."""
    try:
        hosts.join()
        mesh.FSDP_BYTES = 1
        nets = () if "only=loop" in overrides else NETS[len(jax.devices())]
        slow = [float(word[5:]) for word in overrides if word.startswith("slow=")]
        overrides = [word for word in overrides if not word.startswith(("only=", "slow="))]
        config = tiny_run.config(f'data.folders=["{data}"]', "data.task=code", *overrides)
        result = {"losses": {}, "step": {}, "mu": {}}
        real = supervised.make(ladder.get("Td1"), 6, crop=200)
        cases = {"data": (real, 1), "toy": (tiny_run.Toy(n_labels=6), 1), "fsdp": (tiny_run.Toy(n_labels=6), 2)}
        for name in nets:
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
            losses, one = [], None
            for number in range(10):
                rows, (entry,), (rate,) = inputs.take(number, np.full(1, 0.01, np.float32))
                one = one or programs.one.lower(state, rows, entry, rate, hyper, seed).compile()
                state, found = one(state, rows, entry, rate, hyper, seed)
                losses.append(float(hosts.fetch(found["loss"])))
                if not number:
                    mu = [hosts.fetch(leaf) for leaf in jax.tree.leaves(state.mu)]
                    result["mu"][name] = np.concatenate([leaf.ravel() for leaf in mu]).tolist()
            inputs.close()
            text = one.as_text()
            kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
            result["step"][name] = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
            result["losses"][name] = losses
        print(json.dumps(result), flush=True)
        loop.objectives.make = lambda config, n, _: tiny_run.Toy(config.model.crop, n)
        take = feed.ResidentFeed.take
        if slow:
            feed.ResidentFeed.take = lambda *args: time.sleep(slow[0]) or take(*args)
        loop.train(config, out, quiet=True)
    except EcgJaxError as error:
        hosts.leave(error)  # as the command does
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run(*sys.argv[1:])
