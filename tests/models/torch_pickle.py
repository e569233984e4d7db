"""Files of `torch.save`, written opcode by opcode: torch is not needed to test its format."""

import io
import struct
import zipfile

import numpy as np

from ecg_jax.models import torch_file


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integer(n):
    return b"J" + struct.pack("<i", n)


def numbers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def call(name, args):
    return b"c" + name.replace(" ", "\n").encode() + b"\n" + args + b"R"


def reference(key, numel, kind="FloatStorage"):
    named = b"ctorch\n" + kind.encode() + b"\n"
    return b"(" + text("storage") + named + text(key) + text("cpu") + integer(numel) + b"tQ"


def tensor(key, shape, numel=None, offset=0, strides=None, kind="FloatStorage"):
    strides = strides or [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    numel = int(np.prod(shape)) if numel is None else numel
    args = reference(key, numel, kind) + integer(offset) + numbers(shape) + numbers(strides) + b"\x89"
    return call("torch._utils _rebuild_tensor_v2", b"(" + args + call("collections OrderedDict", b")") + b"t")


def dictionary(entries):
    """Of keys, text or integers, and ready opcodes."""
    body = b"".join((text(key) if isinstance(key, str) else integer(key)) + value for key, value in entries.items())
    return b"}(" + body + b"u"


def pickle_of(entries, **beside):
    """A checkpoint: the weights under "model", beside them the epoch and more."""
    return b"\x80\x02" + dictionary({"model": dictionary(entries), "epoch": integer(3), **beside}) + b"."


def entries_of(arrays):
    return {key: tensor(str(i), array.shape) for i, (key, array) in enumerate(arrays.items())}


def zip_file(arrays, pickled=None, compress=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        archive.writestr("model/data.pkl", pickled or pickle_of(entries_of(arrays)))
        archive.writestr("model/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"model/data/{i}", array.tobytes())
    return out.getvalue()


def old_file(arrays, pickled=None, little=b"\x88"):
    keys = sorted(map(str, range(len(arrays))))
    values = list(arrays.values())
    head = torch_file.LEGACY_START + b"\x80\x02M\xe9\x03." + b"\x80\x02}" + text("little_endian") + little + b"s."
    listed = b"\x80\x02](" + b"".join(map(text, keys)) + b"e."
    raw = b"".join(struct.pack("<q", values[int(k)].size) + values[int(k)].tobytes() for k in keys)
    return head + (pickled or pickle_of(entries_of(arrays))) + listed + raw


# --- what the checkpoint of a training script holds beside the weights


def number(value):
    return b"G" + struct.pack(">d", value)


def numpy_number(value):
    """A float64 of NumPy, as a learning rate out of a schedule is one."""
    dtype = call("numpy dtype", b"(" + text("f8") + b"\x89\x88t") + b"(K\x03" + text("<") + b"NNN" + integer(-1) * 2
    dtype += b"K\x00tb"
    raw = call("_codecs encode", b"(" + text(struct.pack("<d", value).decode("latin1")) + text("latin1") + b"t")
    return call("numpy.core.multiarray scalar", b"(" + dtype + raw + b"t")


def made(name, attributes=None):
    """An object that the pickle makes without arguments and gives attributes to."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n)\x81" + (attributes + b"b" if attributes else b"")
