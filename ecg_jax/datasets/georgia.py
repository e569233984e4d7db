"""Georgia 12-lead ECG (G12EC) as in the PhysioNet/CinC Challenges 2020 and 2021: E#####.{hea,mat}, any folders.

No options. Diagnoses are SNOMED CT codes in the header (`#Dx`), some of them repeated. Two tasks: `snomed`, every code
that occurs, in the order of the code numbers, named by the Challenge's abbreviation or, for a code outside its table,
"SNOMED:<code>"; and `scored`, the 26 classes that the Challenge 2021 scores, with the codes that it takes for one
diagnosis put together (CLBBB = LBBB, CRBBB = RBBB, PAC = SVPB, PVC = VPB). A record without codes has unknown labels.

Traps: headers whose first line names the record "E00271.mat" are read all the same. The first release of 2020 says
4880 steps per mV where the later ones say 1000, with the same samples: such a header is read at 1000. Samples marked
invalid (huge spikes in E04603, E06072, E06909, E07675, E07941 and E08321) arrive as NaN. Some recordings are in the
release twice (E07509 and E07510): one of them goes to the quarantine. There are no patient ids: a recording is its own
group. Invariant: labels depend on the headers found and on nothing else.
"""

from functools import partial
from pathlib import Path

from ecg_jax.datasets import check_options
from ecg_jax.datasets.snomed import (
    ABBREVIATIONS,
    SCORED_COLUMN,
    SCORED_NAMES,
    SCORED_POLICY,
    all_codes,
    code_labels,
    find_records,
    read_facts,
    read_records,
    report,
    where_of,
)
from ecg_jax.datasets.source import Item, Source, pack
from ecg_jax.errors import DataError

REPAIRS = ("record-name-suffix",)
EARLY_GAIN, GAIN = 4880.0, 1000.0  # steps per mV: as the release of 2020 says, and as it is


def open_georgia(source_dir: Path, options: dict[str, str]) -> Source:
    """Open the folder that holds E#####.hea and E#####.mat, in folders of any depth.

    Raises `UsageError` for any option, `DataError` for a folder without such records or with one of them twice. A
    record that lacks one of its files, or whose files are broken, is refused when it is read.
    """
    check_options("georgia", options, ())
    found = find_records(source_dir, r"E\d{5}")
    ids = found.ids()
    if not ids:
        raise DataError(f"{source_dir}: no E#####.hea in it or below; give the folder that holds the Georgia records")
    headers = [found.headers.get(record) for record in ids]
    every = read_facts(source_dir, headers)
    codes = all_codes(source_dir, every)
    names = tuple(ABBREVIATIONS.get(code, f"SNOMED:{code}") for code in codes)
    column = {code: i for i, code in enumerate(codes)}
    early = sum(EARLY_GAIN in facts.gains for facts in every)

    def items():
        for record, header, facts in zip(ids, headers, every, strict=True):
            labels = {"scored": code_labels(facts, SCORED_COLUMN, len(SCORED_NAMES))}
            if names:
                labels["snomed"] = code_labels(facts, column, len(names))
            where = where_of(header, facts, labels)
            if EARLY_GAIN in facts.gains:
                if len(facts.gains) > 1:
                    detail = (
                        f"{source_dir / str(header)}.hea: some leads have {EARLY_GAIN:.0f} steps per mV, others not"
                    )
                    where["refused"] = ("unreadable-header", detail)
                else:
                    where["step"] = 1 / GAIN
            yield Item(record, record, None, where)

    tasks = {"scored": SCORED_NAMES} | ({"snomed": names} if names else {})
    return Source(
        name="georgia",
        version="1.0.3",
        unit="mV",
        tasks=tasks,
        items=pack(items()),
        read=partial(read_records, source_dir, REPAIRS, None),
        about={
            "licence": "CC BY 4.0",
            "doi": "10.13026/34va-7q14",
            "records": len(ids),
            "codes": dict(zip(names, codes, strict=True)),
            "scored": SCORED_POLICY,
            "gain_policy": f"headers with {EARLY_GAIN:.0f} steps per mV are read at {GAIN:.0f}, as later releases say",
            "headers_with_early_gain": early,
            "groups": "no patient ids are published: each recording is its own group",
            "contained_in": "the PhysioNet/CinC Challenges 2020 and 2021, under the same names",
        }
        | report(every, ABBREVIATIONS),
        skipped={"records of another data set": len(found.others)} if found.others else {},
    )
