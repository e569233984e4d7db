"""An exported encoder without the training code: NumPy, JAX, safetensors and `ecg_jax.models` are all it takes.

    python tools/read_encoder.py runs/R4              what it is, and features of a second of noise

A run folder's `encoder.safetensors` holds float32 arrays under flat names ("encoder/stem/kernel"), `encoder.json` the
architecture and the input: the scale of the signal, the crop in samples, rate, leads, unit. `features` below is the
whole of what they mean, for encoders that read the signal (those on beats need R peaks: `ecg_jax.load`).
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ecg_jax import models
from ecg_jax.models import inputs, ladder, layers, legacy

FAMILIES = {config.family: config for config in (ladder.ResNet1dConfig, ladder.TransformerConfig, legacy.LegacyConfig)}


def read(folder: Path) -> tuple[dict, object, dict]:
    """(what encoder.json says, architecture, parameters as nested dictionaries)."""
    info = json.loads((Path(folder) / "encoder.json").read_text())
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in info["arch"].items()}
    params: dict = {}
    for name, array in load_file(Path(folder) / "encoder.safetensors").items():
        *path, leaf = name.split("/")[1:]
        at = params
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = array
    return info, FAMILIES[info["family"]](**fields), params


def features(info: dict, arch, params: dict, signal: np.ndarray, valid: np.ndarray) -> jax.Array:
    """float32 [B, D + 1] of stored records: signal int16 [B, 1000, 12] (1 LSB = 1 uV at 100 Hz), valid int32 [B, 2]
    (start, length); the log gain comes last.
    """
    if getattr(arch, "input", "signal") != "signal":
        raise SystemExit("this encoder reads beats; use ecg_jax.load(run).embed(signal, rate, leads)")
    crop = min(info["crop"], signal.shape[1])
    length = arch.padded(info["crop"])
    x, valid, log_gain = inputs.to_input(
        jnp.asarray(signal), jnp.asarray(valid), scale=info["scale"], crop=crop, keys=None, length=length
    )
    running = models.statistics(arch)
    variables = {"params": {name: leaf for name, leaf in params.items() if name not in running}}
    if running:
        variables["batch_stats"] = {name: params[name] for name in running}
    frames, weight = models.build(arch, jnp.float32).apply(variables, x, valid, train=False, keys=None)[:2]
    return jnp.concatenate([layers.pool(frames, weight), log_gain[:, None]], axis=1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    about, config, tree = read(Path(sys.argv[1]))
    print(json.dumps({"arch": dataclasses.asdict(config)} | {k: about[k] for k in ("scale", "crop", "rate", "unit")}))
    noise = np.random.default_rng(0).normal(0, 100, (2, 1000, 12)).astype(np.int16)
    found = features(about, config, tree, noise, np.array([[0, 1000]] * 2, np.int32))
    print(f"features {found.shape}, first {np.asarray(found[0, :4])}")
