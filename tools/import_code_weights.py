"""Published weights of the CODE group (model.pth, model.hdf5, safetensors) as an encoder folder of this package.

    python tools/import_code_weights.py model/model.pth --out imported/age [--settings model/config.json]
    python tools/import_code_weights.py model/model.hdf5 --out imported/diagnosis

Writes `encoder.safetensors` and `encoder.json` as training does, and `head.safetensors` beside them: the published
linear head, kernel [frames, features, outputs] and bias. The weights are public: doi.org/10.5281/zenodo.4892365 (age),
doi.org/10.5281/zenodo.3625017 (diagnosis). Nothing in the file is executed.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from ecg_jax import files
from ecg_jax.errors import EcgJaxError
from ecg_jax.models import legacy, weights
from ecg_jax.training import export

HEAD = "head.safetensors"
# Data sets of the published training: the age network left the patients of CODE-15 % out.
TRAINED_ON = {"torch": ["code"], "keras": ["code", "code15"]}


def convert(path: Path, out: Path, settings: Path | None, trained_on: list[str] | None) -> str:
    """Import one file; returns a line that says what it was."""
    config, encoder, head = weights.load(path, settings)
    task = "age" if config.source == "torch" and config.outputs == 1 else "diagnosis"
    known = {"age": ["age"], "diagnosis": list(legacy.DIAGNOSES)}[task]
    labels = known if len(known) == config.outputs else [f"output{i}" for i in range(config.outputs)]
    n_encoder = sum(array.size for name, array in encoder.items() if "_running_" not in name)
    n_head = sum(array.size for array in head.values())
    info = {
        "rung": next((name for name, preset in legacy.PRESETS.items() if preset == config), None),
        # Twice the millivolt value at 400 Hz: no scale of the 100 Hz pipeline, which refuses this name.
        "scale": "code",
        "crop": config.samples,
        "rate": legacy.RATE,
        "leads": list(legacy.LEADS) if config.leads == len(legacy.LEADS) else [],
        "unit": "mV",
        "factor": legacy.SCALE,
        "pool": "flatten",
        "head": HEAD,
        "task": task,
        "labels": labels,
        "n_params": int(n_encoder),
        "identity": hashlib.sha256(path.read_bytes()).hexdigest(),
        "lineage": [{"dataset": name} for name in trained_on or TRAINED_ON[config.source]],
    }
    files.write(out / HEAD, safetensors.numpy.save({f"head/{name}": np.asarray(a) for name, a in head.items()}))
    export.save_encoder(out, config, encoder, info)
    return f"{info['rung'] or 'legacy'}: encoder {n_encoder:,} + head {n_head:,} parameters, dropout {config.dropout}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="model.pth, model.hdf5 or safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--settings", type=Path, help="JSON of a torch file; default: config.json or args.json beside it"
    )
    parser.add_argument("--trained-on", nargs="+", help="data sets that the weights have seen (default: as published)")
    args = parser.parse_args(argv)
    try:
        print(convert(args.file, args.out, args.settings, args.trained_on))
    except EcgJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
