"""An XML file parsed safely into a small tree, and what the three ECG dialects need to get at it.

Knows no dialect. No document type is fetched, no entity is expanded: a file that declares one is refused, as is one
that is too large or too deep. Invariant: whatever is wrong with the file is a `Refused` that names the file, and the
element where there is one.
"""

import base64
import binascii
import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from ecg_jax.records.readers.export import MAX_RATE
from ecg_jax.records.record import Refused

MAX_BYTES = 64 << 20  # a resting ECG is 50 kB to 2 MB
MAX_ELEMENTS = 200_000
MAX_DEPTH = 200
MAX_URI = 200
MAX_NAME = 40
MAX_SAMPLES = 1_000_000  # per lead: over half an hour at 500 Hz
MAX_LEADS = 32
_INSTANCE = "http://www.w3.org/2001/XMLSchema-instance"
# Single- and double-byte code pages that hospitals' systems write and expat does not know all of.
_LEGACY = re.compile(r"cp\d+|gb\w+|big5\w*|shift_jis\w*|euc_\w+|iso8859-\d+|koi8-\w|tis-620")
_EXPAT_KNOWS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "iso8859-1", "ascii")


@dataclass(frozen=True)
class Tree:
    """An element of the file at `path`: names without namespace, `xsi:type` as attribute "xsi:type"."""

    path: Path
    node: ElementTree.Element
    trail: str  # names from the root to here

    @property
    def text(self) -> str:
        return (self.node.text or "").strip()

    def all(self, name: str) -> list["Tree"]:
        """Children of that name; `name` may go deeper, "a/b/c"."""
        found = [self]
        for part in name.split("/"):
            found = [
                Tree(self.path, node, f"{tree.trail}/{part}")
                for tree in found
                for node in tree.node
                if node.tag == part
            ]
        return found

    def find(self, name: str) -> "Tree | None":
        """The first of them, or None."""
        found = self.all(name)
        return found[0] if found else None

    def one(self, name: str) -> "Tree":
        """The first of them. Refuses with missing-element."""
        found = self.find(name)
        if found is None:
            raise self.refuse("missing-element", f"has no {name}")
        return found

    def attribute(self, name: str) -> str:
        """Refuses with missing-element where there is none."""
        value = self.node.get(name)
        if value is None:
            raise self.refuse("missing-element", f"has no attribute {name}")
        return value.strip()

    def number(self, text: str, what: str) -> float:
        """`text` as a finite number; `what` names it. Refuses with bad-number."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or "_" in text:
            raise self.refuse("bad-number", f"{what} is {text[:40]!r}, a number was expected")
        return value

    def count(self, text: str, what: str, most: int) -> int:
        """`text` as a whole number from 0 to `most`. Refuses with bad-number."""
        value = self.number(text, what)
        if not value.is_integer() or not 0 <= value <= most:
            raise self.refuse("bad-number", f"{what} is {text[:40]!r}, a whole number from 0 to {most} was expected")
        return int(value)

    def refuse(self, reason: str, why: str) -> Refused:
        """To be raised: file, element, what is wrong with it."""
        return Refused(reason, f"{self.path}: {self.trail} {why}")


def parse(data: bytes, path: Path) -> tuple[Tree, str]:
    """The root of the document `data` (the content of `path`), and the root's namespace.

    Refuses with unsafe-xml (declares entities or a document type, or nested beyond reason), unreadable-xml (not
    well-formed, or in an encoding that is not known).
    """
    data, encoding = _decode(data, path)
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate(encoding=encoding, namespace_separator=" ")
    parser.buffer_text = True
    space, depth, count = "", 0, 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal space, depth, count
        uri, _, local = name.rpartition(" ")
        space = uri if not count else space
        depth, count = depth + 1, count + 1 + len(attributes)
        if depth > MAX_DEPTH or count > MAX_ELEMENTS:
            raise Refused("unsafe-xml", f"{path}: more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels of them")
        builder.start(local, {_attribute(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.rpartition(" ")[2])

    def entity(name: str, *_: object) -> None:
        raise Refused("unsafe-xml", f"{path} declares or uses an entity, {name[:40]!r}; no ECG needs one")

    def doctype(name: str, system: str | None, public: str | None, internal: int) -> None:
        # GE MUSE names a document type, which stays unread. One written into the file can blow up attributes.
        if internal:
            raise Refused("unsafe-xml", f"{path} declares its own document type; no ECG needs one")

    def namespace(prefix: str | None, uri: str | None) -> None:
        # Every name below carries it: a long one multiplies the file.
        if len(uri or "") > MAX_URI:
            raise Refused("unsafe-xml", f"{path}: a namespace of more than {MAX_URI} letters")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.EntityDeclHandler, parser.SkippedEntityHandler = entity, entity
    parser.StartDoctypeDeclHandler, parser.StartNamespaceDeclHandler = doctype, namespace
    try:
        parser.Parse(data, True)
        root = builder.close()
    except Refused:
        raise
    except Exception as error:  # expat's own, and whatever its decoding of names runs into
        raise Refused("unreadable-xml", f"{path}: {str(error)[:200]}") from None
    return Tree(path, root, root.tag), space


def _attribute(name: str) -> str:
    uri, _, local = name.rpartition(" ")
    return f"xsi:{local}" if uri == _INSTANCE else local


def _decode(data: bytes, path: Path) -> tuple[bytes, str | None]:
    """The document in an encoding of expat's, and its name where the declaration must be overruled."""
    declared = re.match(rb"""\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{1,40})["']""", data)
    if declared is None:
        return data, None
    given = declared[1].decode("ascii")
    try:
        name = codecs.lookup(given).name
        if name in _EXPAT_KNOWS:
            return data, None
        if _LEGACY.fullmatch(name) is None:
            raise LookupError
        return data.decode(name).encode("utf-8"), "utf-8"
    except LookupError:
        raise Refused("unreadable-xml", f"{path}: unknown encoding {given!r}; save it as UTF-8") from None
    except UnicodeDecodeError as error:
        raise Refused("unreadable-xml", f"{path} is not {given} at byte {error.start}; save it as UTF-8") from None


def from_base64(tree: Tree) -> bytes:
    """The element's text decoded. Refuses with corrupt-waveform."""
    try:
        return base64.b64decode("".join((tree.node.text or "").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise tree.refuse("corrupt-waveform", f"is not Base64: {error}") from None


def samples(tree: Tree) -> np.ndarray:
    """The element's text as float64 numbers; "nan" is a sample that is not there. Refuses with bad-number, too-long."""
    words = (tree.node.text or "").split(maxsplit=MAX_SAMPLES)
    if len(words) > MAX_SAMPLES:
        raise too_long(tree)
    try:
        values = np.fromiter(map(float, words), np.float64, len(words))
    except (ValueError, OverflowError) as error:
        raise tree.refuse("bad-number", f"holds something else than numbers: {str(error)[:80]}") from None
    if np.isinf(values).any() or "_" in (tree.node.text or ""):
        raise tree.refuse("bad-number", "holds something else than finite numbers")
    return values


def too_long(tree: Tree) -> Refused:
    return tree.refuse("too-long", f"has more than {MAX_SAMPLES} samples a lead; cut the recording")


def check_rate(tree: Tree, rate: float) -> float:
    """Refuses with bad-rate unless it can be a sampling rate."""
    if not 1.0 <= rate <= MAX_RATE:
        raise tree.refuse("bad-rate", f"gives {rate:g} samples a second, 1 to {MAX_RATE:g} were expected")
    return rate


def same_length(tree: Tree, names: Sequence[str], columns: Sequence[np.ndarray]) -> np.ndarray:
    """Columns as one array [T, n]. Refuses with wrong-count unless all are of one length, and not empty."""
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or not lengths.pop():
        found = ", ".join(f"{name}: {len(column)}" for name, column in zip(names, columns, strict=True))
        raise tree.refuse("wrong-count", f"has leads of no or unequal length ({found[:200] or 'no lead'})")
    return np.stack(columns, axis=1)


def lead_name(tree: Tree, name: str) -> str:
    """Refuses with bad-lead-name what is too long to be one: names go into messages and into the stored record."""
    if len(name) > MAX_NAME:
        raise tree.refuse("bad-lead-name", f"names a lead with {len(name)} letters, {MAX_NAME} at most can be read")
    return name
