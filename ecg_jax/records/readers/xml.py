"""ECG exported as XML: Philips (Sierra), HL7 aECG and GE MUSE, told apart by the document's root.

Reads the rhythm recording and its start, nothing about the patient, and never the median or representative beat.
Invariant: whatever the file holds, the answer is a `Reading` or a `Refused`; nothing outside the file is opened.
"""

import hashlib
from pathlib import Path

from ecg_jax.records.readers import xml_tree
from ecg_jax.records.readers.export import load, naming
from ecg_jax.records.readers.reading import Reading
from ecg_jax.records.readers.xml_aecg import read_aecg
from ecg_jax.records.readers.xml_muse import read_muse
from ecg_jax.records.readers.xml_philips import read_philips
from ecg_jax.records.record import Refused

_HL7 = "urn:hl7-org:v3"
_PHILIPS = "http://www3.medical.philips.com"
# By the root's name and namespace; some exporters leave the namespace out.
_DIALECTS = {
    ("restingecgdata", _PHILIPS): read_philips,
    ("restingecgdata", ""): read_philips,
    ("AnnotatedECG", _HL7): read_aecg,
    ("AnnotatedECG", ""): read_aecg,
    ("RestingECG", ""): read_muse,
}


def read_xml(path: Path) -> Reading:
    """Read the XML file at `path`, in millivolt.

    Refuses with missing-file, unreadable-file, too-large (beyond 64 MB), unreadable-xml, unsafe-xml, unknown-dialect,
    and what `read_philips`, `read_aecg` and `read_muse` refuse.
    """
    data = load(path, xml_tree.MAX_BYTES)
    root, space = xml_tree.parse(data, path)
    read = _DIALECTS.get((root.node.tag, space))
    if read is None:
        what = f"{root.node.tag[:60]!r} of namespace {space[:60]!r}"
        raise Refused("unknown-dialect", f"{path}: root {what} is none of Philips, HL7 aECG and GE MUSE")
    with naming(path):
        return read(root, hashlib.sha256(data).digest())
