"""A file of torch.save from anybody is read as what it is, or refused before it takes memory or time."""

import argparse
import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.safe_load import DAMAGED, safe_load

resource = pytest.importorskip("resource", reason="memory is measured on Linux and macOS only")
MOST = 100  # MB
GOOD = {"words": ["a", "dog"], "weight": torch.arange(6.0).view(2, 3), "half": torch.ones(2).half(), "step": 3}


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def is_refused(path: Path) -> bool:
    before, began = memory(), time.process_time()
    with pytest.raises(DAMAGED):
        safe_load(path)
    return memory() - before < MOST and time.process_time() - began < 10


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_what_was_saved_comes_back(zipped: bool, tmp_path: Path) -> None:
    shared = torch.arange(8.0)
    content: dict[str, Any] = GOOD | {
        "state": torch.nn.BatchNorm1d(3).state_dict(),
        "parts": [shared[:4], shared[4:], shared[::2]],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numbers": [1, -2, 2**40, 1.5, float("inf"), True, None, "ä", (1, (2,))],
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6).view(2, 3).T,
    }
    path = saved(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found, expected = safe_load(path), torch.load(path, weights_only=True)
    assert found.keys() == expected.keys() and found["numbers"] == content["numbers"]
    assert torch.equal(found["parts"][2], shared[::2]) and torch.equal(found["transposed"], content["transposed"])
    assert isinstance(found["state"], OrderedDict) and found["state"].keys() == content["state"].keys()


def test_objects_that_are_allowed_come_back_and_no_others(tmp_path: Path) -> None:
    path = saved({"options": argparse.Namespace(lr=1), "weight": torch.ones(2)}, tmp_path / "a.pth")
    assert safe_load(path, [argparse.Namespace])["options"].lr == 1
    assert is_refused(path)


# ---- values ----------------------------------------------------------------------------------------------------------


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def endless() -> list:
    value: list = []
    value.append(value)
    return value


def endless_dict() -> dict:
    value: dict = {}
    value["a"] = [value]
    return value


def laughs(levels: int) -> list:
    value: list = ["ha"]
    for _ in range(levels):
        value = [value] * 10
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "a list in itself": endless,
    "a dict in itself": endless_dict,
    "lists in lists": lambda: deep(100),
    "a value shared without end": lambda: laughs(12),
    "a tensor with thousands of names": lambda: dict.fromkeys(range(3000), torch.zeros(100_000)),
    "a number of many digits": lambda: 10**400,
    "a name of many letters": lambda: {"x" * 5000: 1},
    "a name that is none": lambda: {(1, 2): 3},
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a tensor without values": lambda: torch.zeros(10**6, 10**6, device="meta"),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "an expanded tensor": lambda: torch.ones(1).expand(10**9),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_plain_or_unfold_are_refused(name: str, tmp_path: Path) -> None:
    assert is_refused(saved({"format": "any", "value": VALUES[name]()}, tmp_path / "a.pth"))


# ---- a pickle that claims what is not there --------------------------------------------------------------------------


def rewritten(change: Callable[[bytes], bytes], tmp_path: Path) -> Path:
    """Return a checkpoint with another pickle in it."""
    saved(GOOD, tmp_path / "good.pth")
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(tmp_path / "good.pth") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a longer storage": lambda content: content.replace(b"cpuq\x0aK\x06", b"cpuq\x0a" + number(2**31 - 1)),
    "a storage that is not there": lambda content: content.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
    "a larger tensor": lambda content: content.replace(b"K\x02K\x03\x86", number(2**30) + number(2**30) + b"\x86"),
    "a tensor of fewer than no rows": lambda content: content.replace(b"K\x02K\x03\x86", number(-2) + b"K\x03\x86"),
    "a tensor that starts behind its storage": lambda content: content.replace(
        b"QK\x00K\x02K\x03", b"QK\x05K\x02K\x03"
    ),
    "steps out of the storage": lambda content: content.replace(b"K\x03K\x01\x86", number(10**6) + b"K\x01\x86"),
    "a memo of gigabytes": lambda content: content.replace(b"q\x00", b"r\xf0\xff\xff\x7f", 1),
    "bytes of gigabytes": lambda _: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "a text of gigabytes": lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "millions of lists": lambda _: b"\x80\x02" + b"]" * (1 << 25) + b".",
    "no end": lambda content: content[:-1],
    "nothing": lambda _: b"",
    "an extension code": lambda _: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_pickle_that_claims_what_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    path = rewritten(CHANGES[name], tmp_path)
    with zipfile.ZipFile(path) as changed, zipfile.ZipFile(tmp_path / "good.pth") as good:
        [name] = (each for each in good.namelist() if each.endswith("data.pkl"))
        assert changed.read(name) != good.read(name)
    assert is_refused(path)


def test_an_unchanged_pickle_in_another_zip_is_read(tmp_path: Path) -> None:
    assert safe_load(rewritten(lambda content: content, tmp_path))["words"] == ["a", "dog"]


def test_a_file_from_before_pytorch_1_6_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = saved({"weight": torch.zeros(7)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x07", number(2**31 - 1)))
    assert is_refused(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert is_refused(path)


# ---- a zip that two readers understand in two ways -------------------------------------------------------------------


def archive(**contents: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def with_two_directories() -> bytes:
    """A zip whose 64-bit end names another directory than the one that lies before it."""
    hidden, shown = archive(evil=torch.zeros(1000)), archive(good=torch.zeros(3))
    moved = bytearray(hidden + shown)
    start = len(moved) - 98
    assert moved[start : start + 4] == b"PK\6\6"
    at = hidden.rindex(b"PK\6\6")
    struct.pack_into("<Q", moved, len(moved) - 34, at)  # where the locator says the 64-bit end is
    return bytes(moved)


def with_comment() -> bytes:
    content = archive(good=torch.zeros(3))
    return content[:-2] + struct.pack("<H", 22) + b"PK\5\6" + bytes(18)


def compressed(swell: int = 1) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive(good=torch.zeros(3)))) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(swell) if name.endswith("data/0") else old.read(name))
    return buffer.getvalue()


def with_the_same_name() -> bytes:
    buffer = io.BytesIO(archive(good=torch.zeros(3)))
    with zipfile.ZipFile(buffer, "a") as content:
        content.writestr("archive/DATA.pkl", b"N.")
    return buffer.getvalue()


ZIPS: dict[str, Callable[[], bytes]] = {
    "two directories": with_two_directories,
    "one zip behind another": lambda: archive(evil=torch.zeros(9)) + archive(good=torch.zeros(3)),
    "something before it": lambda: b"#!/bin/sh\n" + archive(good=torch.zeros(3)),
    "a comment with another end": with_comment,
    "compressed": compressed,
    "a bomb": lambda: compressed(300_000_000),
    "two records of one name": with_the_same_name,
    "no pickle": lambda: archive(good=1).replace(b"data.pkl", b"data.pk_"),
    "an empty zip": lambda: b"PK\5\6" + bytes(18),
    "a pickle alone": lambda: pickle.dumps({"weight": 1}),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_is_not_as_torch_writes_it_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(ZIPS[name]())
    assert is_refused(tmp_path / "a.pth")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DAMAGED):
        safe_load(tmp_path)


def overlapping() -> torch.Tensor:
    """A tensor whose numbers share places, at the end of its storage."""
    return torch.zeros(12).as_strided((3, 4), (1, 1), 6)


@pytest.mark.parametrize("tensor", [overlapping(), torch._neg_view(torch.ones(3)), torch.ones(3).expand(3, 3)])
def test_tensors_that_are_not_what_they_seem_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """PyTorch's fused optimisers take a tensor for as long as its shape says, and would write beyond its end."""
    assert is_refused(saved({"weight": tensor}, tmp_path / "a.pth"))
