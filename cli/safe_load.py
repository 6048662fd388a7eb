"""Read a file that torch.save has written, from anybody: what is in it is measured before a tensor is made of it.

`torch.load(weights_only=True)` runs no code of a file, but does believe its sizes. So the file's directory and its
pickle are first read here, with a stand-in for each tensor: all has to fit into the size that the file really has.
"""

import io
import math
import os
import pickle
import pickletools
import stat
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MOST_PLAIN = 1 << 24  # bytes of all that is no tensor: words and settings take some hundred thousand
DEEPEST = 20  # values within values
LONGEST_NAME = 1000  # characters
# What zipfile, pickle and torch raise for damaged files.
DAMAGED = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, MemoryError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OverflowError),
)
ITEM_SIZES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "UntypedStorage": 1},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
}
PLAIN = (("collections", "OrderedDict"), ("torch", "Size"))  # what else torch.save writes of state_dicts
END, END64, LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"  # signatures at the end of a zip


def safe_load(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """Return the plain values and tensors, on the CPU, in a file of torch.save; nothing in it is executed.

    Args:
        allowed: classes of which there may be objects too, as for `torch.serialization.safe_globals`.

    Raises one of DAMAGED for anything else, without taking more memory than a few times the file's size.
    """
    import torch

    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    with open(path, "rb") as file:  # once: what was measured is what is loaded
        measure(file)
        file.seek(0)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)


def measure(file: BinaryIO) -> None:
    """Raise one of DAMAGED unless all that a file says it holds is in it, and plain."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(4) == b"PK\3\4":
        records = directory(file, size)
        [name] = (name for name in records if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = name.removesuffix("data.pkl")
        if records[name] > MOST_PLAIN:
            raise ValueError("too much that is no tensor")
        with zipfile.ZipFile(file) as content:
            pickled = content.read(name)
        sizes = {key.removeprefix(f"{folder}data/"): length for key, length in records.items()}
        left = 0
    else:  # as before PyTorch 1.6: three pickles about the file, that of its content, and the tensors' bytes
        file.seek(0)
        for _ in range(3):
            pickle_at(file)
        pickled, sizes, left = pickle_at(file), None, size
    tensors = Stand(pickled, sizes, left).load_plain()
    check_plain(tensors, most=4 * len(pickled), most_bytes=4 * size)


def directory(file: BinaryIO, size: int) -> dict[str, int]:
    """Return the bytes of each record of a zip without compression, as torch writes it.

    A zip can have two directories, of which one reader finds the first and another the second: here it has one, which
    lies where its end says, right before it.
    """
    file.seek(max(0, size - 98))
    tail = file.read(98)
    if tail[-22:-18] != END or tail[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as it should")
    length, start, place = *struct.unpack("<LL", tail[-10:-2]), size - 22
    if tail[-42:-38] == LOCATOR:
        place -= 76
        if tail[:4] != END64 or struct.unpack("<Q", tail[-34:-26]) != (place,):
            raise zipfile.BadZipFile("it has two ends")
        length, start = struct.unpack("<QQ", tail[40:56])
    if start + length != place:
        raise zipfile.BadZipFile("its directory is elsewhere")
    with zipfile.ZipFile(file) as content:
        members = content.infolist()
    records = {member.filename: member.file_size for member in members}
    stored = all(each.compress_type == zipfile.ZIP_STORED and each.file_size == each.compress_size for each in members)
    if not stored or sum(records.values()) > start or len({name.lower() for name in records}) < len(members):
        raise zipfile.BadZipFile("its records are compressed, overlap, or have the same name")
    return records


def pickle_at(file: BinaryIO) -> bytes:
    """Return the pickle that begins where `file` is, and leave `file` behind it."""
    start = file.tell()
    for _, _, place in pickletools.genops(file):
        if place is None or place - start > MOST_PLAIN:
            raise ValueError("too much that is no tensor")
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor, or of several."""

    length: int  # in items
    item_size: int


@dataclass(frozen=True)
class Tensor:
    """What takes the place of a tensor."""

    nbytes: int


class Stand(pickle.Unpickler):
    """Unpickles plain values, and a stand-in for all else; nothing in the file is called or imported."""

    def __init__(self, pickled: bytes, sizes: dict[str, int] | None, left: int) -> None:
        super().__init__(io.BytesIO(pickled))
        self.pickled, self.sizes, self.left = pickled, sizes, left
        self.claimed = dict[str, int]()

    def load_plain(self) -> Any:
        # Without this pass, one short opcode makes the unpickler reserve gigabytes for its memo.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.pickled)):
            if "PUT" in opcode.name and int(argument or 0) > count:
                raise pickle.UnpicklingError("a memo that is not filled in order")
        return self.load()

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in PLAIN or module in ("torch._utils", "torch._tensor") or name.endswith("Storage")
        return Named(module, name) if known else type(name, (Other,), {})

    def persistent_load(self, about: Any) -> Storage:
        kind, named, key, _, length, *_ = about
        if kind != "storage" or not isinstance(named, Named) or not is_size(length):
            raise pickle.UnpicklingError("not a storage")
        item_size = ITEM_SIZES[named.name]
        if self.sizes is not None and length * item_size > self.sizes[key]:
            raise pickle.UnpicklingError(f"storage {key!r} is shorter than it says")
        self.claimed[str(key)] = length * item_size
        if self.sizes is None and sum(self.claimed.values()) > self.left:
            raise pickle.UnpicklingError("shorter than it says")
        return Storage(length, item_size)


class Other:
    """An object of a class that is unknown here, with what it holds; torch.load decides whether there may be such."""

    def __init__(self, *held: Any) -> None:
        self.held = list(held)

    def __new__(cls, *held: Any) -> "Other":
        self = super().__new__(cls)
        self.__init__(*held)  # type: ignore[misc]  # which unpickling an object leaves out
        return self

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held += [key, value]

    def append(self, value: Any) -> None:
        self.held.append(value)


class Named:
    """A class or function by which PyTorch writes tensors; what it would make has a stand-in."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *arguments: Any) -> Any:
        match self.module, self.name:
            case "collections", "OrderedDict":
                return OrderedDict(*arguments)
            case "torch._utils", "_rebuild_tensor_v2":
                if len(arguments) > 6 and arguments[6]:  # such as that it is to be read with other signs
                    raise pickle.UnpicklingError("a tensor that is a view of another kind")
                return rebuild(*arguments[:4])
            case "torch._utils", "_rebuild_parameter":
                return arguments[0]
            case "torch", "Size":
                return tuple(*arguments)
        raise pickle.UnpicklingError(f"{self.module}.{self.name} makes no plain tensor")


def rebuild(storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
    """Return the stand-in of a tensor, which lies in its storage, without a number in two places: PyTorch's optimisers
    would take it for as large as it says, and write beyond its end.
    """
    fits = isinstance(storage, Storage) and is_size(offset) and isinstance(shape, tuple) and isinstance(stride, tuple)
    if not fits or len(shape) != len(stride) or not all(map(is_size, (*shape, *stride))):
        raise pickle.UnpicklingError("a tensor without shape")
    items = math.prod(shape)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if items else 0
    if items > storage.length or last >= max(1, storage.length):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    taken = 1
    for step, side in sorted((step, side) for side, step in zip(shape, stride, strict=True) if side > 1):
        if step < taken and items:
            raise pickle.UnpicklingError("a tensor that overlaps itself")
        taken = step * side
    return Tensor(items * storage.item_size)


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def check_plain(values: Any, most: int, most_bytes: int) -> None:
    """Raise ValueError for values that are too many, too deep (as those that hold themselves are) or too large, and for
    keys that are no names or numbers.
    """
    left, count, taken = [(values, 0)], 0, 0
    while left:
        value, depth = left.pop()
        count += 1
        taken += value.nbytes if isinstance(value, Tensor) else 0
        if count > most or depth > DEEPEST or taken > most_bytes:
            raise ValueError("more values than it has room for, or too deep")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int) or len(str(key)) > LONGEST_NAME:
                    raise ValueError("a name that is none")
            left += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | tuple | Other):
            left += [(each, depth + 1) for each in (value.held if isinstance(value, Other) else value)]
        elif isinstance(value, int) and abs(value) >= 1 << 64:
            raise ValueError("a number that is too large")
