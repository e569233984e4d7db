"""Weights out of PyTorch files, without PyTorch and without running the pickle in them.

Reads both formats of `torch.save`: the zip archive (from 1.6 on) and the older stream of pickles followed by raw
storages. The opcodes are interpreted here: a pickle can build numbers, strings, containers and tensors, and nothing
else; whatever else it names refuses the file. Invariants: no byte of the file is executed; every array is a view into
the file's bytes, so that memory is bounded by its size; every refusal is a DataError of one line.

Source of the formats: torch/serialization.py and torch/_utils.py of PyTorch 1.2 and 2.x.
"""

import dataclasses
import io
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ecg_jax.errors import DataError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
ZIP_START = b"PK\x03\x04"
LEGACY_PROTOCOL = 1001
PICKLE_BYTES = 1 << 20  # a checkpoint of forty units with its optimizer has a tenth of this
INTEGER_BITS = 80  # the magic number is the longest there is
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
STATES = ("model", "state_dict", "model_state_dict")  # where a checkpoint keeps the weights
# What lies beside the weights: numbers of NumPy (a best loss, a learning rate) that the pickle calls for, and the
# command line of the training script, an object that it makes. Let through unread, as None; nothing is called or made.
IGNORED = {
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "_codecs encode",
}
IGNORED_OBJECTS = {"argparse Namespace"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat run of `numel` numbers, by its key in the file."""

    dtype: np.dtype
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle named; called, it goes through `_call`."""

    name: str


class _BadPickle(ValueError):
    """Not a pickle that torch writes."""


def is_torch_file(data: bytes) -> bool:
    """Whether `data` starts like a file of `torch.save`."""
    return data.startswith((ZIP_START, LEGACY_START))


def state_dict(data: bytes, path: str) -> dict[str, np.ndarray]:
    """The weights in the bytes of a torch file: name -> read-only array (a view).

    They are the top level itself, or what a checkpoint there holds under one of STATES. `path` is for messages only.
    Raises DataError for a file that is damaged, is not torch's, names anything but tensors and plain values, or whose
    tensors claim more than the file holds.
    """
    try:
        root, view = _zip(data) if data.startswith(ZIP_START) else _legacy(data)
        state = _state(root)
        arrays = {key: _array(key, value, view) for key, value in state.items()}
    except _BadPickle as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, struct.error, LookupError, TypeError, OverflowError, EOFError, AttributeError) as error:
        raise DataError(f"{path}: not a torch file, or a damaged one ({short(error)})") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: damaged zip archive ({short(error)})") from None
    if sum(array.nbytes for array in arrays.values()) > len(data):
        raise DataError(f"{path}: its tensors claim more than the file's {len(data)} bytes")
    return arrays


def short(what: object) -> str:
    """Of an error or of something that a file said, a readable line of ASCII, at most 100 characters.

    Containers are named by type only: shared parts can make their text longer than any memory.
    """
    text = str(what) if isinstance(what, Exception) else repr(what) if isinstance(what, str) else type(what).__name__
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())[:100]


def _state(root: Any) -> dict[str, Any]:
    if isinstance(root, dict):
        for found in (root, *(root.get(name) for name in STATES)):
            if isinstance(found, dict) and any(isinstance(value, Tensor) for value in found.values()):
                return found
    raise _BadPickle(f"no weights at the top level nor under {', '.join(STATES)}")


def _array(key: Any, value: Any, view: Callable[[Storage], memoryview]) -> np.ndarray:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise _BadPickle(f"key {short(key)} holds no tensor")
    storage = value.storage
    size = 1
    for length in value.shape:
        size *= length
    last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True))
    if size > storage.numel or (size and last >= storage.numel):
        raise _BadPickle(f"key {short(key)}: its shape does not fit its storage of {storage.numel}")
    raw = view(storage)
    if len(raw) != storage.numel * storage.dtype.itemsize:
        raise _BadPickle(f"key {short(key)}: its storage has {len(raw)} bytes, not {storage.numel} numbers")
    flat = np.frombuffer(raw, storage.dtype)
    if not size:
        return np.zeros(value.shape, storage.dtype)
    strides = [step * storage.dtype.itemsize for step in value.strides]
    return np.lib.stride_tricks.as_strided(flat[value.offset :], value.shape, strides, writeable=False)


def _zip(data: bytes) -> tuple[Any, Callable[[Storage], memoryview]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _BadPickle("a zip archive, but not one of torch.save (no data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order and bytes(_stored(data, order)) != b"little":
        raise _BadPickle("written on a big-endian machine")
    checked: dict[str, memoryview] = {}

    def view(storage: Storage) -> memoryview:
        if storage.key not in checked:
            info = members.get(f"{folder}data/{storage.key}")
            if info is None:
                raise _BadPickle(f"storage {short(storage.key)} is missing")
            checked[storage.key] = _stored(data, info)
        return checked[storage.key]

    stream = io.BytesIO(_stored(data, members[pickles[0]])[: PICKLE_BYTES + 1])
    return _Machine({}).load(stream), view


def _stored(data: bytes, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed member, checked against its CRC."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise _BadPickle(f"member {short(info.filename)} is compressed, which torch never does")
    at = info.header_offset
    mark, name, extra = struct.unpack("<4s22xHH", data[at : at + 30])
    start = at + 30 + name + extra
    found = memoryview(data)[start : start + info.file_size]
    if mark != ZIP_START or len(found) != info.file_size or zlib.crc32(found) != info.CRC:
        raise _BadPickle(f"member {short(info.filename)} is damaged")
    return found


def _legacy(data: bytes) -> tuple[Any, Callable[[Storage], memoryview]]:
    storages: dict[str, Storage] = {}
    at = 0

    def load() -> Any:
        nonlocal at
        stream = io.BytesIO(data[at : at + PICKLE_BYTES + 1])
        found = _Machine(storages).load(stream)
        at += stream.tell()
        return found

    if load() != LEGACY_MAGIC:
        raise _BadPickle("not a torch file")
    if load() != LEGACY_PROTOCOL or load().get("little_endian") is not True:
        raise _BadPickle("of another protocol of torch, or of a big-endian machine")
    root, keys = load(), load()
    if not isinstance(keys, list) or {type(key) for key in keys} - {str} or sorted(keys) != sorted(storages):
        raise _BadPickle("its list of storages is damaged")
    found: dict[str, memoryview] = {}
    for key in keys:
        storage = storages[key]
        (numel,) = struct.unpack("<q", data[at : at + 8])
        stop = at + 8 + numel * storage.dtype.itemsize
        if numel != storage.numel or stop > len(data):
            raise _BadPickle(f"storage {short(key)} is cut short")
        found[key] = memoryview(data)[at + 8 : stop]
        at = stop
    return root, lambda storage: found[storage.key]


class _Machine:
    """Interprets the opcodes that torch writes (pickle protocol 2), with data only.

    `storages` collects what the pickle refers to. No method of an object from the file is ever called.
    """

    def __init__(self, storages: dict[str, Storage]):
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self, stream: io.BytesIO) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `pickletools`, about backslashes in a damaged name
            for opcode, arg, _ in pickletools.genops(stream):
                if stream.tell() > PICKLE_BYTES:
                    raise _BadPickle(f"its pickle is longer than {PICKLE_BYTES} bytes")
                self.step(opcode.name, arg)
                if opcode.name == "STOP":
                    return self.stack.pop()
        raise _BadPickle("its pickle has no end")

    def step(self, name: str, arg: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if arg.bit_length() > INTEGER_BITS:
                    raise _BadPickle("a number in its pickle is too long")
                push(arg)
            case "BINUNICODE" | "BINFLOAT":
                push(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE":
                push(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([pop() for _ in range(int(name[-1]))])))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[arg])
            case "APPEND" | "APPENDS":
                values = [pop()] if name == "APPEND" else self.since_mark()
                list.extend(self.stack[-1], values)
            case "SETITEM" | "SETITEMS":
                values = [pop(), pop()][::-1] if name == "SETITEM" else self.since_mark()
                self.set_items(values)
            case "GLOBAL":
                push(_Name(arg))
            case "BINPERSID":
                push(self.storage(pop()))
            case "REDUCE":
                args = pop()
                push(_call(pop(), args))
            case "NEWOBJ":
                args = pop()
                push(_new(pop(), args))
            case "BUILD":  # the attributes of a state dict (`_metadata`) or of a command line: not needed
                pop()
            case _:
                raise _BadPickle(f"opcode {name} in its pickle is none that torch writes")

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def set_items(self, values: list[Any]) -> None:
        """Only text and numbers are keys: the hash of a tuple can be made to take forever."""
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _BadPickle("a dictionary in its pickle has a key that is neither text nor number")
            dict.__setitem__(self.stack[-1], key, value)

    def storage(self, reference: Any) -> Storage:
        """('storage', type, key, location, numel[, None]) as torch names a storage that lies outside the pickle."""
        kind, of, key, _, numel, *view = reference
        named = of.name.split(" ") if isinstance(of, _Name) else ["", ""]
        if kind != "storage" or named[0] != "torch" or named[1] not in DTYPES or view not in ([], [None]):
            raise _BadPickle(f"storage of an unknown kind ({short(named[-1])})")
        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise _BadPickle("storage without a key or a length")
        found = Storage(np.dtype(DTYPES[named[1]]), key, numel)
        if self.storages.setdefault(key, found) != found:
            raise _BadPickle(f"storage {short(key)} is described twice")
        return found


def _call(called: Any, args: Any) -> Any:
    """What the pickle calls: an OrderedDict, a tensor, or nothing."""
    if not isinstance(called, _Name) or not isinstance(args, tuple):
        raise _BadPickle("its pickle calls something that has no name")
    if called.name in IGNORED:
        return None
    if called.name == "collections OrderedDict" and args == ():
        return {}
    if called.name == "torch._utils _rebuild_parameter" and isinstance(args[0], Tensor):
        return args[0]
    if called.name == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides = args[:4]
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise _BadPickle("a tensor of impossible shape")
        return Tensor(storage, offset, tuple(shape), tuple(strides))
    raise _BadPickle(f"it asks for {short(called.name)}, which no weights need: not read")


def _new(kind: Any, args: Any) -> None:
    """An object that the pickle makes of a class, if it is one that weights may have beside them."""
    if not isinstance(kind, _Name) or kind.name not in IGNORED_OBJECTS or args != ():
        named = kind.name if isinstance(kind, _Name) else "something that has no name"
        raise _BadPickle(f"it makes an object of {short(named)}, which no weights need: not read")
