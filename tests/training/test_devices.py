"""Eight simulated devices against one, in a process of its own: same batches, same losses, and which collectives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = 8


def _child() -> None:
    """Runs in the subprocess: prints one JSON object."""
    import jax
    import numpy as np
    import tiny_run

    from ecg_jax.errors import UsageError
    from ecg_jax.models import ladder
    from ecg_jax.objectives import supervised
    from ecg_jax.training import feed, mesh, optim, step

    mesh.FSDP_BYTES = 1  # so that arrays of this tiny model are split too
    table, config = tiny_run.table(160, 1), tiny_run.config("model.rung=Td1")
    real, toy = supervised.make(ladder.get("Td1"), 3, crop=200), tiny_run.Toy()
    start, hyper, seed = {"prior": np.full(3, 0.3, np.float32)}, optim.hyper(config.optim), np.uint32(0)
    import ecg_jax.training.loop  # noqa: F401 - with all that training imports

    out = {"devices": len(jax.devices())}
    cases = ("one", real, 1, 1), ("eight", real, 8, 1), ("toy", toy, 1, 1), ("fsdp", toy, 8, 4)
    for name, objective, devices, fsdp in cases:
        where = mesh.make(8, devices, fsdp)
        programs = step.build(objective, where, 64, 8, False)
        state = programs.init(seed, start)
        placed = feed.place(table, where)
        inputs = feed.ResidentFeed(placed, where, 16, 0, False)
        rows, (entry,), (rate,) = inputs.take(0, np.full(1, 0.01, np.float32))
        one = programs.one.lower(state, rows, entry, rate, hyper, seed).compile()
        losses, mu = [], None
        for number in range(10):
            rows, (entry,), (rate,) = inputs.take(number, np.full(1, 0.01, np.float32))
            state, metrics = one(state, rows, entry, rate, hyper, seed)
            losses.append(float(metrics["loss"]))
            mu = mu or jax.tree.map(np.asarray, state.mu)  # of the first step: the gradient, but for a factor
        gather = jax.jit(lambda rows, index, where=where: step.gather(where, rows, index))
        text = one.as_text()
        out[name] = {
            "losses": losses,
            "mu": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mu)]).tolist(),
            "split": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)),
            "step": {kind: text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all")},
            "gather": gather.lower(rows, entry["index"]).compile().as_text(),
        }
        if objective is real:
            *_, (sums, _) = step.evaluate(programs, state.params, placed, where)
            out[name]["sums"] = np.asarray(sums).tolist()
    out["imported"] = [name for name in ("tensorflow", "orbax", "matplotlib") if name in sys.modules]
    out["moved"] = _moved(Path(sys.argv[1]), state, hyper, seed, inputs)
    out["features"] = _features(table)
    try:
        mesh.make(8, 3)
    except UsageError as error:
        out["refused"] = str(error)
    print(json.dumps(out))


def _features(table):
    """(devices that had records, features) of a frozen encoder, on all devices and on one."""
    import jax
    import numpy as np

    from ecg_jax.evaluation import features
    from ecg_jax.models import ladder
    from ecg_jax.objectives import supervised

    arch = ladder.get("Td1")
    params = supervised.make(arch, 3, crop=200).init(jax.random.key(0), {"prior": np.full(3, 0.3, np.float32)})
    encoder = features.Encoder(arch, {"encoder": params["encoder"]}, {"scale": "gain", "crop": 200}, "")
    used, put, devices = [0], jax.device_put, jax.local_devices()

    def watched(x, where):
        used.append(where.num_devices * bool(where.spec))
        return put(x, where)

    jax.device_put, out = watched, []
    for present in (devices, devices[:1]):
        jax.local_devices = lambda present=present: present
        found = features.extract(encoder, table, "val", batch=8).tolist()
        out.append((used[-1], found))
    return out


def _moved(folder, state, hyper, seed, inputs):
    """Loss of the next step where the state stands, and after a checkpoint brought it to a single device."""
    import numpy as np
    import tiny_run

    from ecg_jax.config import CheckpointConfig
    from ecg_jax.training import feed, mesh, step
    from ecg_jax.training.checkpoint import Checkpoints

    saved = Checkpoints(folder, CheckpointConfig())
    saved.save(10, {"state": state._asdict()}, {"note": [1.5, None]}, wait=True)
    one = mesh.make(8, 1)
    programs = step.build(tiny_run.Toy(), one, 64, 8, False)
    update, arrays, host = Checkpoints(folder, CheckpointConfig()).restore({"state": programs.abstract._asdict()})
    assert (update, host) == (10, {"note": [1.5, None]})
    rates = np.full(1, 0.01, np.float32)
    alone = feed.ResidentFeed(feed.place(tiny_run.table(160, 1), one), one, 16, 0, False)
    _, (there,) = programs.step(step.State(**arrays["state"]), *alone.take(10, rates), hyper, seed)
    many = mesh.make(8, 8, 4)
    _, (here,) = step.build(tiny_run.Toy(), many, 64, 8, False).step(state, *inputs.take(10, rates), hyper, seed)
    return [float(here["loss"]), float(there["loss"])]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    here = Path(__file__).parent
    flags = f"--xla_force_host_platform_device_count={DEVICES} {os.environ.get('XLA_FLAGS', '')}"
    flags += " --xla_backend_optimization_level=0"  # compiles faster; nothing here is about speed
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import test_devices; test_devices._child()"
    command = [sys.executable, "-c", code, str(tmp_path_factory.mktemp("checkpoints"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("many", "one"), [("eight", "one"), ("fsdp", "toy")])
def test_first_gradients_and_ten_losses_equal_one_device(result, many, one):
    assert result["devices"] == DEVICES
    scale = max(map(abs, result[one]["mu"]))
    assert result[many]["mu"] == pytest.approx(result[one]["mu"], rel=1e-5, abs=1e-5 * scale)
    assert result[many]["losses"] == pytest.approx(result[one]["losses"], rel=1e-5)
    assert result[one]["losses"][0] != result[one]["losses"][9]


def test_a_step_on_resident_data_imports_neither_tensorflow_nor_orbax(result):
    assert result["imported"] == []


def test_a_checkpoint_of_eight_devices_goes_on_on_one(result):
    here, there = result["moved"]
    assert there == pytest.approx(here, rel=1e-5)


def test_sharding_is_what_it_says(result):
    assert result["one"]["split"] == result["eight"]["split"] == 0 and result["fsdp"]["split"] > 0


def test_no_device_asks_another_for_records(result):
    """The gather has no collective at all; the data-parallel step none but sums."""
    for mesh in ("eight", "fsdp"):
        text = result[mesh]["gather"]
        assert "gather" in text or "dynamic-slice" in text
        assert not any(kind in text for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert result["eight"]["step"]["all-reduce"] > 0
    assert result["eight"]["step"]["all-gather"] == result["eight"]["step"]["all-to-all"] == 0
    assert sum(result["one"]["step"].values()) == 0


def test_evaluation_is_the_same_on_any_number(result):
    for a, b in zip(result["eight"]["sums"], result["one"]["sums"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_frozen_features_are_computed_on_all_devices_and_are_the_same(result):
    (many, ours), (one, alone) = result["features"]
    assert (many, one) == (DEVICES, 1) and len(ours) == 160
    for a, b in zip(ours, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_number_that_does_not_divide_the_lanes_is_refused(result):
    assert "train.devices = 3" in result["refused"] and "1, 2, 4, 8" in result["refused"]


RULE = """
import os
os.sched_getaffinity = lambda _: {0, 1, 2, 3, 4, 5}
from ecg_jax import config
from ecg_jax.training import runtime
runtime.spread()
import jax
jax.devices()
runtime.spread(held=2)  # too late: changes nothing, says nothing
def share(*words, held=0):
    return runtime.share(config.override(config.Config(), words), held)
print(jax.device_count(), *(share(f"model.rung={rung}") for rung in ("R4", "R8", "T8", "T11")), end=" ")
print(share("objective.name=codebook"), share("model.rung=T8", held=2), share("model.rung=T8", held=8), end=" ")
print(share("model.rung=R8", "train.devices=2", held=1))
"""


@pytest.mark.parametrize(
    ("flags", "shares"),
    [("", [4, 4, 1, 4, 1, 1, 2, 4, 2]), ("--xla_force_host_platform_device_count=3", [3, *[0] * 7, 2])],
)
def test_a_run_on_cpu_is_spread_over_the_cores_where_that_is_faster(flags, shares):
    """Of six cores: four devices, of which a run takes all or one; or as many as it was begun on, or asks for."""
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", RULE], capture_output=True, text=True, env=env, timeout=120)
    assert list(map(int, done.stdout.split())) == shares, done.stderr
