"""Looks at the installation and says what is wrong and how to mend it. Changes nothing.

Each finding is a plain sentence that ends in what to do. Versions are compared with the bounds of the distribution's
own metadata, so that they are stated in one place only (pyproject.toml).
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

GIB = 2**30


def examine() -> dict:
    """Return `python`, `packages`, `devices`, `machine`, `caches` and `problems` (a list of sentences)."""
    problems: list[str] = []
    return {
        "ecg_jax": importlib.metadata.version("ecg-jax"),
        "python": platform.python_version(),
        "packages": _packages(problems),
        "devices": _devices(problems),
        "machine": _machine(problems),
        "caches": _caches(problems),
        "problems": problems,
    }


def _packages(problems: list[str]) -> dict[str, str]:
    from packaging.requirements import Requirement

    found = {}
    for line in importlib.metadata.requires("ecg-jax") or []:
        need = Requirement(line)
        optional = "extra ==" in line
        if need.marker and not need.marker.evaluate({"extra": ""}) and not optional:
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                problems.append(f"{need.name} is not installed: pip install '{need.name}{need.specifier}'")
            continue
        found[need.name] = version
        if not need.specifier.contains(version, prereleases=True):
            problems.append(
                f"{need.name} {version} is outside {need.specifier}: pip install '{need.name}{need.specifier}'"
            )
    return dict(sorted(found.items()))


def _devices(problems: list[str]) -> list[str]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a driver or plug-in raises, the doctor must go on
        problems.append(f"JAX cannot start a device ({' '.join(str(error).split())[:200]}): try JAX_PLATFORMS=cpu")
        return []
    nvidia = shutil.which("nvidia-smi") is not None
    if nvidia and devices[0].platform == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        problems.append("an NVIDIA driver is here but JAX uses the CPU: pip install 'ecg-jax[cuda13]' (or cuda12)")
    lines = []
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        lines.append(
            f"{device.platform}:{device.id} {device.device_kind}" + (f" {memory / GIB:.0f} GiB" if memory else "")
        )
    return lines


def _machine(problems: list[str]) -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    free = shutil.disk_usage(Path.cwd()).free
    if free < GIB:
        problems.append(f"only {free / GIB:.1f} GiB are free in the working folder: shards and checkpoints need more")
    if memory and memory < 4 * GIB:
        problems.append(f"{memory / GIB:.1f} GiB of memory: the demonstration needs up to 4 GiB")
    return {"cores": cores, "memory_gib": round(memory / GIB, 1), "free_disk_gib": round(free / GIB, 1)}


def _caches(problems: list[str]) -> dict[str, str]:
    from ecg_jax.training.runtime import cache_folder

    folder = cache_folder()
    size = sum(f.stat().st_size for f in folder.glob("**/*") if f.is_file()) if folder.is_dir() else 0
    parent = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not os.access(parent, os.W_OK):
        problems.append(
            f"the compile cache {folder} cannot be written: set train.cache_dir or XDG_CACHE_HOME to another folder"
        )
    return {"compiled programs": f"{folder} ({size / 2**20:.0f} MiB)"}


def report_lines(result: dict) -> list[str]:
    """The findings as lines for a terminal."""
    machine = result["machine"]
    memory, disk = machine["memory_gib"], machine["free_disk_gib"]
    lines = [
        f"ecg_jax {result['ecg_jax']}   Python {result['python']}   {sys.platform} {platform.machine()}",
        f"machine   {machine['cores']} cores, {memory} GiB memory, {disk} GiB disk free",
        *(f"device    {line}" for line in result["devices"]),
        *(f"cache     {name}: {place}" for name, place in result["caches"].items()),
    ]
    wanted = re.compile(r"^(jax|flax|optax|orbax|numpy|scipy|tensorflow|wfdb|h5py)")
    shown = [f"{name} {version}" for name, version in result["packages"].items() if wanted.match(name)]
    lines.append("packages  " + ", ".join(shown))
    lines += [f"PROBLEM   {problem}" for problem in result["problems"]] or ["all is well"]
    return lines
