"""By `encoder.precision=int8` pictures are encoded in 8 bits, as near to fp32 as captions need, or it says why not."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from exports import exported
from torch import nn

import inference_visualize
import train
from cli import UserError
from data.features import Extractor
from data.transforms import Transform, open_picture
from models import export, int8
from models.encoder import EncoderCNN
from models.model import CaptionModel

for package in int8.PACKAGES:
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def few_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "CALIBRATION", 8)


@pytest.fixture(scope="module")
def graph(tiny_model: CaptionModel) -> bytes:
    """The ONNX graph of the tiny model's encoder: to trace it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantise", lambda graph, *_: graph)
        return int8.make(tiny_model.encoder, tiny_model.transform)


@pytest.fixture(scope="module")
def pixels(tiny_model: CaptionModel) -> torch.Tensor:
    return int8.drawings(tiny_model.transform)[:8]


@pytest.fixture(scope="module")
def made(graph: bytes, pixels: torch.Tensor) -> bytes:
    """The 8-bit copy of the tiny model's encoder."""
    return int8.quantise(graph, pixels, int8.weight_bits(), "resnet18")


def extractor(model: CaptionModel, precision: torch.dtype, folder: Path) -> Extractor:
    return Extractor(model.encoder, model.transform, precision, torch.device("cpu"), folder)


def difference(rows: torch.Tensor, exact: torch.Tensor) -> float:
    """Return by how much features (P, D) differ, against how much those of pictures differ from their mean."""
    return float((rows - exact).norm() / (exact - exact.mean(0)).norm())


def test_features_are_those_of_fp32_but_for_a_little_and_the_copy_is_made_once(
    tiny_model: CaptionModel,
    made: bytes,
    drawn: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "make", lambda encoder, transform: made)
    pictures = [open_picture(path) for path in sorted((drawn / "images").iterdir())]
    pixels = torch.stack([tiny_model.transform.resize(picture) for picture in pictures])
    exact = extractor(tiny_model, torch.float32, tmp_path)(pixels)
    rows = extractor(tiny_model, torch.int8, tmp_path)(pixels)
    assert (rows.dtype, rows.shape) == (exact.dtype, exact.shape)
    assert 0 < difference(rows.float(), exact.float()) < 0.15
    [path] = tmp_path.iterdir()
    assert capsys.readouterr().out == f"making an 8-bit copy of resnet18, once, in {tmp_path}/\n"
    assert path.stat().st_size < 1.2 * sum(each.numel() for each in tiny_model.encoder.parameters())

    assert torch.equal(extractor(tiny_model, torch.int8, tmp_path)(pixels), rows)
    assert capsys.readouterr().out == ""
    middle = len(made) // 2
    for damaged in (made[:1000], made[:middle] + bytes([made[middle] ^ 255]) + made[middle + 1 :]):
        path.write_bytes(damaged)
        assert torch.equal(extractor(tiny_model, torch.int8, tmp_path)(pixels), rows)
        assert "making an 8-bit copy" in capsys.readouterr().out


def test_many_pictures_are_encoded_by_several_threads_in_order_and_broken_ones_are_named(
    tiny_model: CaptionModel, made: bytes, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Transform]()

    def make(encoder: EncoderCNN, transform: Transform) -> bytes:
        asked.append(transform)
        return made

    monkeypatch.setattr(int8, "make", make)
    threads = torch.get_num_threads()
    paths = [*sorted((drawn / "images").iterdir()), tmp_path / "missing.jpg"] * 5
    try:
        torch.set_num_threads(3)
        several = extractor(tiny_model, torch.int8, tmp_path)
        rows = [row for batch in several.encode(partial(open_picture, path) for path in paths) for row in batch]
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 1, "made once, however many threads want it"
    assert len(rows) == len(paths)
    for path, row in zip(paths, rows, strict=True):
        if path.name == "missing.jpg":
            assert isinstance(row, UserError) and "missing.jpg" in str(row)
        else:
            assert isinstance(row, torch.Tensor)
            alone = several(tiny_model.transform.resize(open_picture(path))[None])[0]
            assert torch.equal(row, alone), path


def test_a_run_is_trained_and_pictures_are_captioned_in_8_bits(
    made: bytes,
    archive: Path,
    call: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "make", lambda encoder, transform: made)  # the backbone is the same one
    encoded, own = list[torch.Tensor](), int8.Int8Encoder.forward

    def note_and_encode(self: int8.Int8Encoder, pixels: torch.Tensor) -> torch.Tensor:
        encoded.extend(pixels)
        return own(self, pixels)

    monkeypatch.setattr(int8.Int8Encoder, "forward", note_and_encode)
    assert call(train.main, *TINY, "encoder.precision=int8", "train.epochs=1", "run=eight") == 0
    assert capsys.readouterr().out.count("making an 8-bit copy") == 1
    assert len(encoded) == 12, "all pictures, once"
    cached = [path.name for path in Path("cache").iterdir() if path.is_dir()]
    assert call(inference_visualize.main, "archive/images", "--run", "eight", "--out", "eight") == 0
    captions = {row["image_id"]: row["caption"] for row in json.loads(Path("eight/predictions.json").read_text())}
    assert len(captions) == 12 and len(encoded) == 2 * 12
    assert "making" not in capsys.readouterr().out

    # without the package, or on another machine, the same captioner encodes as others do
    assert call(inference_visualize.main, "archive/images", "--run", "eight", "encoder.precision=auto") == 0
    assert call(train.main, *TINY, "train.epochs=1", "run=auto") == 0
    assert len([path for path in Path("cache").iterdir() if path.is_dir()]) == len(cached) + 1, "features lie apart"
    assert len(encoded) == 2 * 12

    # on a processor that needs weights of fewer bits, another copy encodes all pictures again
    monkeypatch.setattr(int8, "weight_bits", lambda: 6)
    assert call(train.main, *TINY, "encoder.precision=int8", "train.epochs=1", "run=six") == 0
    assert len(encoded) == 3 * 12


def test_what_is_missing_or_does_not_go_together_is_named(
    tiny_model: CaptionModel,
    graph: bytes,
    tiny_config: Callable,
    tmp_path: Path,
    refused: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refused("encoder.precision=int8", "encoder.frozen=true", "encoder.precision=auto"):
        tiny_config("encoder.precision=int8", "encoder.frozen=false")
    with refused("encoder.precision = 'int4'", "auto", "int8"):
        tiny_config("encoder.precision=int4")
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(int8, "WORST", 0.001)
        patch.setattr(int8, "to_onnx", lambda *_: graph)
        with refused("8 bits spoil the features of resnet18", "of their spread", "encoder.precision=auto"):
            extractor(tiny_model, torch.int8, tmp_path)(pixels)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(9, 9))
    transformer = SimpleNamespace(identity={"name": "vit"}, spatial=False, backbone=backbone)
    with refused("8 bits are for convolutions, which have 37% of the weights of vit", "encoder.precision=auto"):
        int8.Int8Encoder(transformer, tiny_model.transform, tmp_path)
    (tmp_path / "file").touch()
    with refused(f"cannot be kept in {tmp_path / 'file'} (File exists)", "data.cache=FOLDER"):
        extractor(tiny_model, torch.int8, tmp_path / "file")(pixels)
    for package in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with refused("needs onnxscript, onnxruntime;", "requirements-extras.txt", "encoder.precision=auto"):
        extractor(tiny_model, torch.int8, tmp_path)(pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_first_convolutions_stay_in_floats_where_a_backbone_needs_that(
    graph: bytes, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, sizes = int8.round_layers, dict[int, int]()

    def note_and_round(graph: bytes, pixels: torch.Tensor, bits: int, floats: int) -> bytes:
        found = rounded(graph, pixels, bits, floats)
        sizes[floats] = len(found)
        return graph if floats == int8.FIRST else found  # the graph itself differs by nothing

    monkeypatch.setattr(int8, "round_layers", note_and_round)
    monkeypatch.setattr(int8, "WORST", 0.0)
    assert int8.quantise(graph, pixels, 8, "resnet18") == graph
    assert list(sizes) == [0, int8.FIRST] and sizes[0] < sizes[int8.FIRST]


def test_the_exported_encoder_is_in_8_bits_too(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    drawn: Path,
    call: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, folder = exported("lstm", tmp_path_factory)
    capsys.readouterr()
    assert call(export.main, "--checkpoint", path, "--out", tmp_path, "encoder.precision=int8") == 0
    assert f"{export.ENCODER} in 8 bits: " in capsys.readouterr().out
    sizes = [(each / export.ENCODER).stat().st_size for each in (tmp_path, folder)]
    assert sizes[0] < sizes[1] / 2
    monkeypatch.syspath_prepend(str(Path(export.__file__).parents[1] / "docs"))
    import caption_with_onnx

    assert caption_with_onnx.Captioner(tmp_path)(open_picture(drawn / "images" / "00.jpg"))
