"""`ecg-jax fit`: eval logs in; `laws.json`, `multipliers.json`, `predictions.csv`, figures and
`report.html` out.

The order of things: read, group into families, fit every set, compare families, predict, draw, write.
Everything is computed before anything is written, and each file is written under a temporary name and
renamed, so a failure leaves no half output.

It holds no statistics of its own. Invariant: the same inputs and seed give the same files, byte for byte.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecg_jax import __version__
from ecg_jax.errors import DataError, MachineError, UsageError
from ecg_jax.progress import track
from ecg_jax.scaling import claims, export, families, multipliers, probed, table, trajectories, transfer, tuning
from ecg_jax.scaling.analysis import Options, analyse, choose_forms
from ecg_jax.scaling.families import RunSet, SeedNoise

FIGURES = "figures"


def fit(
    paths: Sequence[Path] | Path,
    out: Path,
    *,
    form: str = "auto",
    loss: str = "log-huber",
    delta: float | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    predict: Path | None = None,
    columns: Mapping[str, str] | None = None,
    melt: Sequence[str] = (),
    metric: str | None = None,
    fixed: Mapping[str, float | str] | None = None,
    title: str | None = None,
    banner: str | None = None,
    probes: Sequence[Path] = (),
    resample: str = "auto",
    weights: str = "equal",
) -> dict[str, Any]:
    """Fit laws to the eval logs or run folders `paths` and write everything into the folder `out`.

    form: auto (the one that extrapolates best) or a name of `analysis.FORMS`. loss, delta: see `solve`.
    bootstrap: draws, 0 for no intervals. predict: a table of (n_params, n_records) to predict. columns,
    melt, metric: see `table.read`. fixed: parameters held at a number or tied to another, by name. title:
    the report's heading; banner: a line over it, such as "demonstration, not a study". probes: CSVs of
    `ecg-jax table`, shown in the report. resample, weights: kind of bootstrap and weights of the runs
    (`analysis.Options`). Returns the paths written, the laws and the multipliers as in their JSON files, and
    notes. Deterministic by `seed`. Raises
    UsageError (options), DataError (tables), MachineError (disk).
    """
    options = Options(
        form, loss, delta, bootstrap, level, seed, tuple((fixed or {}).items()), resample, weights
    ).checked()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the report")
    if predict is not None and not Path(predict).is_file():
        raise DataError(f"{predict}: no such file (--predict)")
    tables_of_probes = probed.read(probes)
    read = table.read([paths] if isinstance(paths, str | Path) else paths, columns=columns, melt=melt, metric=metric)
    sets = families.group(read)
    chosen = choose_forms(sets, options)
    results = [
        analyse(s, options, noise_for(s, sets), c)
        for s, c in track(list(zip(sets, chosen, strict=True)), "laws", unit="fits")
    ]
    moved = transfer.transfers(results, options)
    compared = multipliers.compare_all(results, level=level)
    compared += multipliers.corrected(list(claims.extra(results, moved, options)))
    compared += list(claims.largest(compared, level=level))
    compared = claims.under_other_forms(compared, results, options, level=level)
    compared = tuning.matched(compared, results, read, options)
    laws_json = [export.law_json(r, options) for r in results]
    multipliers_json = [export.multiplier_json(m) for m in compared]
    texts = {"laws.json": _json(laws_json), "multipliers.json": _json(multipliers_json)}
    if moved:
        texts["transfer.json"] = _json([transfer.transfer_json(t, export.clean) for t in moved])
    if predict is not None:
        texts["predictions.csv"] = export.predictions(Path(predict), results, columns or {}, options)

    from ecg_jax.scaling import figures, report  # Matplotlib from here on

    drawings = figures.draw_all(results, trajectories.load(read, sets), compared, level=level)
    texts |= {f"{FIGURES}/{d.name}.svg": d.file for d in drawings}
    study = report.Study(
        title=title or "Scaling laws",
        banner=banner,
        version=__version__,
        options=options,
        table=read,
        results=tuple(results),
        multipliers=tuple(compared),
        transfers=tuple(moved),
        drawings=tuple(drawings),
        predicted=texts.get("predictions.csv"),
        probed=tuple(tables_of_probes),
    )
    texts["report.html"] = report.render(study)
    summary = {
        "version": __version__,
        "options": {
            "form": form,
            "loss": loss,
            "delta": delta,
            "bootstrap": bootstrap,
            "level": level,
            "seed": seed,
            "resample": resample,
            "weights": weights,
        },
        "rows": {"read": read.read, "fitted": len(read.rows), "left_out": read.left_out},
        "defaults_used": list(read.defaults),
        "notes": list(read.notes),
        "files": sorted([*texts, "fit.json"]),
    }
    texts["fit.json"] = _json(summary)
    _write(out, texts)
    return summary | {
        "out": str(out),
        "report": str(out / "report.html"),
        "identified": sum(r.identified for r in results),
        "laws": laws_json,
        "multipliers": multipliers_json,
    }


def noise_for(runs: RunSet, sets: Sequence[RunSet]) -> SeedNoise | None:
    """Seed noise of a set: its own with three degrees of freedom or more, else pooled over the families
    measured alike.

    Families of one paradigm only: losses of another paradigm's own task have another unit.
    """
    own = families.seed_noise([runs])
    if own is not None and own.df >= 3:
        return own
    alike = [s for s in sets if s.key.measured == runs.key.measured and s.key.paradigm == runs.key.paradigm]
    return families.seed_noise(alike)


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """What the command prints: one line per law, one per condition that failed, one per multiplier, and
    where things are."""
    lines = []
    for law in result["laws"]:
        name = " / ".join(law[f] for f in ("architecture", "paradigm", "input"))
        what = f"{name}, {law['dataset']} {law['task']} {law['domain']}"
        if law["identified"]:
            shown = (_ends(k, law["parameters"][k], law["intervals"][k]) for k in law["parameters"] if k not in "AB")
            lines.append(f"{what}: {law['formula']}; " + ", ".join(shown))
        else:
            lines.append(f"{what}: law not identified")
        for c in law["identification"]:
            lines.append(
                f"    {'fails' if c['ok'] is False else 'holds' if c['ok'] else 'open '}  {c['name']}: {c['text']}"
            )
        for c in law["lack_of_fit"]:
            if c["rejected"]:
                lines.append(f"    LACK OF FIT  {c['name']}: {c['text']}, p = {c['p']:.2g}; intervals assume the form")
    for m in result["multipliers"]:
        if m["identified"] and m["value"] is not None:
            note = f"; {m['note']}" if m["note"] else ""
            label = f"{m['kind']} {m['dataset']} {m['task']} {m['domain']} ({m['meaning']}{note})"
            lines.append(_ends(label, m["value"], m["interval"]))
    count = len(result["laws"])
    lines.append(f"{result['identified']} of {count} laws identified; report: {result['report']}")
    return lines


def _ends(label: str, value: float, interval: Sequence[float | None]) -> str:
    low, high = ("unbounded" if e is None else f"{e:.4g}" for e in interval)
    return f"{label} {value:.4g} [{low}, {high}]"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _write(out: Path, texts: Mapping[str, str]) -> None:
    """Write every file atomically; what an earlier fit wrote into the same folder and this one did not is
    removed."""
    earlier = out / "fit.json"
    try:
        old = json.loads(earlier.read_text(encoding="utf-8"))["files"] if earlier.is_file() else []
    except (ValueError, KeyError, TypeError):
        old = []
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            part = out / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, out / name)
        for name in old:
            if isinstance(name, str) and name not in texts and (out / name).resolve().is_relative_to(out.resolve()):
                (out / name).unlink(missing_ok=True)
    except OSError as err:
        raise MachineError(f"{out}: cannot write the report: {err.strerror}") from err
