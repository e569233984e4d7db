"""The stored form of an ECG: `tf.train.Example` bytes, the TFRecord frame around them, the offset index
beside them.

Encodes and decodes all three by hand, without TensorFlow and without protobuf, so that the bytes depend on
nothing but the record. It decides nothing about grouping or order (`grouping`, `writer`).

Invariants: the field order is fixed, `signal` first and every field of fixed size next, so that inside one
data folder `age`, `sex`, labels, `source` and `signature` stand at constant distances after the signal
(`fixed_offsets`); what comes out of `read_frames` has passed its CRC32C.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import google_crc32c
import numpy as np

from ecg_jax.errors import DataError
from ecg_jax.records.leads import INDEPENDENT, LEADS
from ecg_jax.records.record import Prepared

RATE = 100  # stored samples per second
LENGTH = 1000  # stored samples per record
SOURCE_BYTES, SIGNATURE_BYTES = 32, 16
Leads = Literal["8", "12"]
LEAD_NAMES: dict[str, tuple[str, ...]] = {"12": LEADS, "8": INDEPENDENT}
_EIGHT = [LEADS.index(lead) for lead in INDEPENDENT]

# One row per record, in file order. Bytes: `frame` and `signal` count from the start of the shard, `id` from
# `frame`.
IndexRow = np.dtype(
    [
        ("frame", "<u8"),  # where the frame (length, checksum, payload, checksum) starts
        ("length", "<u4"),  # bytes of the payload; the frame has FRAME_EXTRA more
        ("signal", "<u8"),  # where the int16 samples start
        ("id", "<u4"),  # where the record id starts, after `frame`
        ("id_length", "<u2"),
        ("shard", "<u2"),
        ("valid", "<i2", (2,)),
        ("split_hash", "<u8"),
        ("shard_hash", "<u8"),
        ("order_hash", "<u8"),
        ("group", "<u8"),
        ("record", "<u8"),
    ]
)
FRAME_EXTRA = 16
# Names inside a data folder. The card is written last; STATE holds what a cut conversion goes on from.
CARD, QUARANTINE, SIGNATURES, STATE = "card.json", "quarantine.jsonl", "signatures.npy", ".convert"
CARD_FORMAT = 1
HEADER = 12  # length and its checksum, before the payload
INDEX_SUFFIX = ".index.npy"
REPAIR = "delete that shard and run the same `ecg-jax convert` again: it rewrites only what is missing"


class Encoded(NamedTuple):
    """A serialized Example, and where in it the samples and the record id start (bytes)."""

    payload: bytes
    signal: int
    id: int
    id_length: int


# ------------------------------------------------------------------------------------------ protobuf, writing


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative int64 are written as their two's complement, ten bytes long
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


_BYTES, _FLOAT, _INT64 = 1, 2, 3  # field numbers of the three kinds in tf.train.Feature


@lru_cache(maxsize=4096)
def _head(key: str, kind: int, length: int) -> bytes:
    """Everything of a `Features.feature` entry that precedes a list whose one element or packed run has
    `length` bytes.

    Nesting, outside in: map entry (field 1) > key (1), value (2) > kind list > value (1).
    """
    value = b"\x0a" + _varint(length)
    feature_length = len(value) + length
    feature = bytes([kind << 3 | 2]) + _varint(feature_length)
    inner = b"\x12" + _varint(len(feature) + feature_length) + feature + value
    name = _delimited(1, key.encode())
    return b"\x0a" + _varint(len(name) + len(inner) + length) + name + inner


def _entry(key: str, kind: int, content: bytes) -> bytes:
    return _head(key, kind, len(content)) + content


_NAN = struct.pack("<I", 0x7FC00000)


def _float(value: float) -> bytes:
    # A NaN has many bit patterns; one is written, so that bytes do not depend on where it came from.
    return struct.pack("<f", value) if value == value else _NAN


def meta_json(meta: Mapping[str, Any]) -> bytes:
    """`meta` as UTF-8 JSON with sorted keys; NumPy numbers and arrays become numbers and lists, NaN becomes
    null."""
    try:
        return _encode(meta).encode()
    except (TypeError, ValueError):  # NaN, or keys that are no text
        return _encode(_plain(meta)).encode()


def _default(value: Any) -> Any:
    plain = _plain(value)
    if plain is value:
        raise TypeError(f"{type(value).__name__} is no JSON")
    return plain


_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_default
).encode


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value


def encode_indexed(p: Prepared, leads: Leads = "12") -> Encoded:
    """`p` as a serialized `tf.train.Example`, with the places that the offset index needs. Raises ValueError
    for a `Prepared` that breaks its own contract (shapes, types, sizes): a bug, not bad data."""
    signal = p.signal
    if signal.shape != (LENGTH, len(LEADS)) or signal.dtype != np.int16:
        raise ValueError(f"{p.record_id}: signal {signal.dtype} {signal.shape}, not int16 ({LENGTH}, {len(LEADS)})")
    if len(p.source) != SOURCE_BYTES or len(p.signature) != SIGNATURE_BYTES:
        raise ValueError(f"{p.record_id}: source of {len(p.source)} bytes, signature of {len(p.signature)}")
    start, length = (int(v) for v in p.valid)
    if not (0 <= start and 0 < length and start + length <= LENGTH):
        raise ValueError(f"{p.record_id}: valid {p.valid} leaves the {LENGTH} samples")
    samples = np.ascontiguousarray(signal if leads == "12" else signal[:, _EIGHT], "<i2").tobytes()
    head = _head("signal", _BYTES, len(samples))
    parts = [head, samples, _entry("age", _FLOAT, _float(p.age)), _entry("sex", _FLOAT, _float(p.sex))]
    for task in sorted(p.labels):
        labels = p.labels[task]
        if labels.ndim != 1 or labels.dtype != np.int8:
            raise ValueError(f"{p.record_id}: labels {task!r} are {labels.dtype} {labels.shape}, not int8 [K]")
        parts.append(_entry(f"labels/{task}", _BYTES, labels.tobytes()))
    parts += [_entry("source", _BYTES, p.source), _entry("signature", _BYTES, p.signature)]
    record_id = p.record_id.encode()
    id_head = _head("record_id", _BYTES, len(record_id))
    id_at = sum(map(len, parts)) + len(id_head)
    parts += [id_head, record_id]
    parts.append(_entry("patient_id", _BYTES, p.patient_id.encode()))
    parts.append(_entry("valid", _INT64, _varint(start) + _varint(length)))
    parts.append(_entry("quality", _INT64, _varint(int(p.quality))))
    parts.append(_entry("rpeaks", _BYTES, np.ascontiguousarray(p.rpeaks, "<i2").tobytes()))
    parts.append(_entry("meta", _BYTES, meta_json(p.meta)))
    body = b"".join(parts)
    outer = b"\x0a" + _varint(len(body))
    return Encoded(outer + body, len(outer) + len(head), len(outer) + id_at, len(record_id))


def encode(p: Prepared, leads: Leads = "12") -> bytes:
    """`p` as a serialized `tf.train.Example`: int16 [1000, L] first, then the fields of DESIGN section 3."""
    return encode_indexed(p, leads).payload


@lru_cache(maxsize=64)
def fixed_offsets(leads: Leads, tasks: tuple[tuple[str, int], ...]) -> dict[str, tuple[int, int]]:
    """field -> (bytes from the start of the samples to its value, bytes of the value) for the fields of fixed
    size.

    `tasks` are (name, number of labels). This is what lets a table read a million labels in one gather.
    """
    at = 2 * LENGTH * len(LEAD_NAMES[leads])
    out: dict[str, tuple[int, int]] = {"signal": (0, at)}
    sizes = [("age", _FLOAT, 4), ("sex", _FLOAT, 4)]
    sizes += [(f"labels/{task}", _BYTES, count) for task, count in sorted(tasks)]
    sizes += [("source", _BYTES, SOURCE_BYTES), ("signature", _BYTES, SIGNATURE_BYTES)]
    for key, kind, size in sizes:
        at += len(_head(key, kind, size))
        out[key] = (at, size)
        at += size
    return out


# ------------------------------------------------------------------------------------------ protobuf, reading


class _Malformed(Exception):
    pass


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Malformed("a number runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of one message."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _read_varint(data, at)
        elif wire in (1, 2, 5):
            size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _read_varint(data, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise _Malformed("a field runs past the end")
        else:
            raise _Malformed(f"wire type {wire}")
        yield tag >> 3, wire, value


def _feature(data: memoryview) -> bytes | list[int] | np.ndarray:
    """One feature: bytes (of a list of exactly one), a list of int, or float32 [n]. Packed and unpacked lists
    alike."""
    for kind, _, content in _fields(data):
        if kind == _BYTES:
            values = [bytes(value) for number, wire, value in _fields(content) if (number, wire) == (1, 2)]
            if len(values) != 1:
                raise _Malformed(f"{len(values)} byte strings where one is expected")
            return values[0]
        if kind == _FLOAT:
            packed = b"".join(bytes(value) for _, wire, value in _fields(content) if wire in (2, 5))
            if len(packed) % 4:
                raise _Malformed("a broken float list")
            return np.frombuffer(packed, "<f4")
        if kind == _INT64:
            numbers: list[int] = []
            for _, wire, value in _fields(content):
                at = 0
                while wire == 2 and at < len(value):
                    number, at = _read_varint(value, at)
                    numbers.append(number)
                if wire == 0:
                    numbers.append(value)
            return [n - (1 << 64) if n >> 63 else n for n in numbers]
    raise _Malformed("an empty feature")


def _features(payload: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, wire, features in _fields(memoryview(payload)):
        if (number, wire) == (1, 2):
            found |= _entries(features)
    return found


def _entries(features: memoryview) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, wire, entry in _fields(features):
        if (number, wire) == (1, 2):
            parts = {n: value for n, w, value in _fields(entry) if w == 2}
            if 1 not in parts or 2 not in parts:
                raise _Malformed("a feature without name or value")
            found[bytes(parts[1]).decode()] = _feature(parts[2])
    return found


def decode_tail(tail: bytes) -> dict[str, Any]:
    """The raw features that follow `record_id` in a payload that has passed its checksum: `meta` without the
    samples."""
    return _entries(memoryview(tail))


def decode(payload: bytes) -> dict[str, Any]:
    """The fields of a serialized Example of ours, in any field order.

    signal int16 [1000, L]; valid (start, length); record_id, patient_id str; age, sex float; quality int;
    labels {task: int8 [K]}; rpeaks int16 [n]; source, signature bytes; meta dict. Raises DataError for
    anything else.
    """
    try:
        raw = _features(payload)
        samples = raw["signal"]
        n_leads, rest = divmod(len(samples), 2 * LENGTH)
        if rest or str(n_leads) not in LEAD_NAMES:
            raise _Malformed(f"field 'signal' has {len(samples)} bytes")
        start, length = raw["valid"]
        if not (0 <= start and 0 < length and start + length <= LENGTH):
            raise _Malformed(f"field 'valid' is {start}, {length}")
        if len(raw["source"]) != SOURCE_BYTES or len(raw["signature"]) != SIGNATURE_BYTES:
            raise _Malformed("field 'source' or 'signature' has a wrong size")
        (age,), (sex,), (quality,) = raw["age"], raw["sex"], raw["quality"]
        return {
            "signal": np.frombuffer(samples, "<i2").reshape(LENGTH, n_leads),
            "valid": (start, length),
            "record_id": raw["record_id"].decode(),
            "patient_id": raw["patient_id"].decode(),
            "age": float(age),
            "sex": float(sex),
            "quality": quality,
            "labels": {
                k[len("labels/") :]: np.frombuffer(v, np.int8) for k, v in raw.items() if k.startswith("labels/")
            },
            "rpeaks": np.frombuffer(raw["rpeaks"], "<i2"),
            "source": raw["source"],
            "signature": raw["signature"],
            "meta": json.loads(raw["meta"]),
        }
    except KeyError as error:
        raise DataError(f"a stored record lacks the field {error}: the shard is not one of ecg-jax's") from None
    except (_Malformed, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"a stored record cannot be decoded ({error}): the shard is damaged, {REPAIR}") from None


# ----------------------------------------------------------------------------------------------------- frames


def mask(crc: int) -> int:
    """Rotate and offset a CRC32C as the TFRecord format asks (a stored checksum must not checksum to
    itself)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    return mask(google_crc32c.value(data))


def frame_parts(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """A TFRecord frame in the pieces to write one after the other: length u64 and its masked CRC32C u32, the payload
    (not copied), its masked CRC32C u32."""
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))


def frame(payload: bytes) -> bytes:
    """`payload` in a TFRecord frame."""
    return b"".join(frame_parts(payload))


def damaged(path: Path, offset: int, what: str) -> DataError:
    """The error for a damaged frame of the shard at `path`."""
    return DataError(f"{path}: record at byte {offset}: {what}; {REPAIR}")


def read_frames(path: Path) -> Iterator[bytes]:
    """The payloads of the TFRecord file at `path`, in order, each after its checksums have been verified.

    Raises DataError naming file, byte offset of the record and remedy for a file that is truncated or
    damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REPAIR}") from None
    with file:
        offset = 0
        while offset < size:
            header = file.read(HEADER)
            if len(header) < HEADER:
                raise damaged(path, offset, "the file ends inside a header")
            length, crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != crc:
                raise damaged(path, offset, "the checksum of the length is wrong")
            if offset + length + FRAME_EXTRA > size:
                raise damaged(path, offset, "the file ends inside the record")
            payload = file.read(length)
            footer = file.read(4)
            if len(footer) < 4 or masked_crc(payload) != struct.unpack("<I", footer)[0]:
                raise damaged(path, offset, "the checksum of the content is wrong")
            yield payload
            offset += length + FRAME_EXTRA
