"""Captions and pictures in batches: what is read, what is predicted, and in which order."""

import copy
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from data import dataset, formats
from data.dataset import Batch, Flickr8kDataset, batch_indices, read_batches, share_of
from data.features import Features
from data.transforms import Transform, View, open_picture
from data.vocab import EOS, PAD, SOS, Vocabulary, build_vocab

CAPTIONS = ["one", "one two", "one two three"] * 20 + ["one two three four five six"]


@pytest.fixture(scope="module")
def vocab() -> Vocabulary:
    return build_vocab(CAPTIONS, 1)


@pytest.fixture
def captions(vocab: Vocabulary) -> Flickr8kDataset:
    """61 captions of 21 pictures, whose feature is their number."""
    names = [f"{number // 3}.jpg" for number in range(len(CAPTIONS))]
    rows = np.arange(21, dtype=np.float16)[:, None]
    features = Features([torch.from_numpy(rows)], [f"{number}.jpg" for number in range(21)])
    table = pd.DataFrame({"image": names, "caption": CAPTIONS})
    return Flickr8kDataset(table, vocab, Path(), Transform(32), features)


def test_each_word_is_predicted_from_the_words_before_it(captions: Flickr8kDataset, vocab: Vocabulary) -> None:
    batch = captions[2]
    words = vocab.numericalize("one two three")
    assert batch.inputs.tolist() == [[SOS, *words]]
    assert batch.targets.tolist() == [[*words, EOS]]


def test_sos_is_never_a_target(captions: Flickr8kDataset) -> None:
    targets = captions.__getitems__(list(range(len(captions)))).targets
    assert not (targets == SOS).any()
    assert ((targets == EOS).sum(1) == 1).all()


def test_padding_stands_only_at_the_end_and_is_no_word(captions: Flickr8kDataset) -> None:
    batch = captions.__getitems__([60, 0, 1])
    assert (batch.targets == PAD).tolist() == [[False] * 7, [False] * 2 + [True] * 5, [False] * 3 + [True] * 4]
    assert batch.words == 7 + 2 + 3


def test_owner_names_the_picture_of_each_caption(captions: Flickr8kDataset) -> None:
    indices = [60, 0, 30, 2, 31, 1]
    batch = captions.__getitems__(indices)
    assert batch.pictures[batch.owner].flatten().tolist() == [20, 0, 10, 0, 10, 0]
    assert len(batch.pictures) == 3


def test_a_batch_moves_whole() -> None:
    moved = Batch(*(torch.zeros(1) for _ in range(5))).to(torch.device("meta"))
    assert {part.device.type for part in vars(moved).values()} == {"meta"}


def test_a_batch_names_its_pictures(captions: Flickr8kDataset) -> None:
    batch = captions.__getitems__([60, 0, 30, 2])
    assert [captions.images[place] for place in batch.images] == ["0.jpg", "10.jpg", "20.jpg"]


def test_pictures_are_shown_in_every_view_as_often(captions: Flickr8kDataset) -> None:
    names = [f"{number}.jpg" for number in range(21)]
    for view, sign in ((View(mirrored=True), -1), (View(corner=0), 100)):
        captions.views = {**captions.views, view: Features([sign * torch.arange(21.0).half()[:, None]], names)}
    for seed in (0, 1):
        captions.choose_views(np.random.default_rng(seed))
        read = captions.__getitems__(list(range(61))).pictures.flatten()
        assert torch.equal(read, torch.arange(21).half() * torch.tensor([1, -1, 100])[captions.shown])
        assert min(Counter(captions.shown.tolist())[view] for view in range(3)) > 2
    again = copy.copy(captions)
    again.choose_views(np.random.default_rng(0))
    assert (again.shown != captions.shown).any()


def test_captions_of_a_mirrored_picture_have_left_for_right() -> None:
    table = pd.DataFrame({"image": ["a.jpg", "b.jpg"] * 2, "caption": ["the left side", "right"] * 2})
    vocab = build_vocab(["the left right side"], 1)
    features = Features([torch.zeros(2, 1).half()], ["a.jpg", "b.jpg"])
    views = {View(corner=1): features, View(mirrored=True): features}
    captions = Flickr8kDataset(table, vocab, Path(), Transform(32), features, views)
    captions.shown = np.array([2, 1])
    read = [vocab.decode(ids.tolist()[1:]) for ids in captions.__getitems__([0, 1, 2, 3]).tokens]
    assert read == ["the right side", "right"] * 2
    captions.shown = np.array([0, 2])
    assert vocab.decode(captions[1].tokens[0].tolist()[1:]) == "left"
    assert vocab.decode(captions[0].tokens[0].tolist()[1:]) == "the left side"


def test_views_may_lie_on_another_device_than_the_whole_pictures(captions: Flickr8kDataset) -> None:
    names = [f"{number}.jpg" for number in range(21)]
    assert captions.features
    with FakeTensorMode(allow_non_fake_inputs=True):
        captions.features.shards = [torch.zeros(21, 1, device="cuda")]
        captions.views = {View(mirrored=True): Features([torch.zeros(21, 1)], names)}
        captions.shown[:10] = 1
        assert captions.read(np.arange(21)).device.type == "cuda"


def test_pixels_are_shown_in_the_view_chosen(archive: Path, vocab: Vocabulary) -> None:
    table = formats.read(archive / "captions.csv")
    views = dict.fromkeys([View(mirrored=True), View(corner=3)])
    pixels = Flickr8kDataset(table, vocab, archive / "images", Transform(32), views=views)
    picture = open_picture(archive / "images" / pixels.images[0])
    for shown, view in enumerate([View(), *views]):
        pixels.shown[0] = shown
        assert torch.equal(pixels[0].pictures[0], Transform(32).resize(view(picture)))


def test_each_picture_of_a_batch_is_read_once(
    archive: Path, vocab: Vocabulary, monkeypatch: pytest.MonkeyPatch, tiny_model: torch.nn.Module
) -> None:
    opened: list[str] = []

    def note_and_open(path: Path) -> Image.Image:
        opened.append(path.name)
        return Image.open(path)

    monkeypatch.setattr(dataset, "open_picture", note_and_open)
    table = formats.read(archive / "captions.csv")
    pixels = Flickr8kDataset(table, vocab, archive / "images", Transform(32))
    batch = pixels.__getitems__([7, 0, 5, 1, 9, 12])
    assert sorted(opened) == ["00.jpg", "01.jpg", "02.jpg"]
    assert (batch.pictures.shape, batch.pictures.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert batch.owner.tolist() == [1, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("by_image", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_every_caption_comes_exactly_once(
    captions: Flickr8kDataset, by_image: bool, batch_size: int, rng: np.random.Generator | None
) -> None:
    batches = batch_indices(captions, batch_size, by_image, rng)
    assert sorted(index for batch in batches for index in batch) == list(range(len(captions)))


@pytest.mark.parametrize("by_image", [True, False])
def test_the_order_is_drawn_from_the_generator_alone(captions: Flickr8kDataset, by_image: bool) -> None:
    first, again, other = (batch_indices(captions, 8, by_image, np.random.default_rng([0, n])) for n in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("by_image", [True, False])
def test_every_epoch_has_as_many_batches(captions: Flickr8kDataset, by_image: bool) -> None:
    assert len({len(batch_indices(captions, 8, by_image, np.random.default_rng([0, n]))) for n in range(5)}) == 1


def test_pictures_stay_whole_where_each_is_encoded_once_per_step(captions: Flickr8kDataset) -> None:
    batches = batch_indices(captions, 8, True, np.random.default_rng(0))
    homes = Counter(image for batch in batches for image in set(captions.image_of[batch]))
    assert set(homes.values()) == {1}


def test_batches_hold_about_as_many_captions_as_asked_for(captions: Flickr8kDataset) -> None:
    sizes = [len(batch) for batch in batch_indices(captions, 12, True, np.random.default_rng(0))]
    assert 9 <= np.mean(sizes) <= 13
    assert {len(batch) for batch in batch_indices(captions, 20, False, None)} == {20, 1}


def test_captions_of_one_length_stand_together(captions: Flickr8kDataset) -> None:
    batches = batch_indices(captions, 10, False, np.random.default_rng(0))
    assert max(np.ptp(captions.lengths[batch]) for batch in batches if len(batch) > 1) == 0


def test_batches_of_different_lengths_are_mixed(captions: Flickr8kDataset) -> None:
    lengths = [captions.lengths[batch].max() for batch in batch_indices(captions, 5, False, np.random.default_rng(0))]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_batch_by_pictures_and_weigh_by_words(captions: Flickr8kDataset, size: int) -> None:
    batch = [60, 0, 30, 2, 31, 1]  # three pictures
    shares = [share_of(captions, batch, rank, size) for rank in range(size)]
    working = [share for share in shares if share.part]
    assert sorted(index for share in working for index in share.indices) == sorted(batch)
    images = [set(captions.image_of[share.indices]) for share in working]
    assert sum(map(len, images)) == len(set.union(*images)) == 3
    assert {share.words for share in shares} == {captions.__getitems__(batch).words}
    assert sum(share.part for share in shares) == pytest.approx(1)
    for share in working:
        assert share.part == pytest.approx(captions.__getitems__(share.indices).words / share.words)


def test_a_process_without_a_picture_stands_by(captions: Flickr8kDataset) -> None:
    share = share_of(captions, [60], 1, 2)
    assert share.indices == [60] and share.part == 0


def test_a_missing_picture_is_one_sentence_from_whichever_process_reads_it(
    archive: Path, vocab: Vocabulary, refused: Callable
) -> None:
    pixels = Flickr8kDataset(formats.read(archive / "captions.csv"), vocab, archive / "images", Transform(32))
    (archive / "images/01.jpg").unlink()
    for workers in (0, 1):
        batches = read_batches(pixels, [[0], [7]], workers)
        assert next(batches).words > 0
        with refused("01.jpg", "check the path"):
            next(batches)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_leaves_the_reading_processes_at_work(archive: Path, vocab: Vocabulary) -> None:
    pixels = Flickr8kDataset(formats.read(archive / "captions.csv"), vocab, archive / "images", Transform(32))
    batches = read_batches(pixels, [[number] for number in range(60)], 1)
    next(batches)
    [reader] = multiprocessing.active_children()
    assert reader.pid
    os.kill(reader.pid, signal.SIGINT)
    assert len(list(batches)) == 59


def test_some_of_its_pictures_are_spread_over_all() -> None:
    table = pd.DataFrame({"image": [f"{number}.jpg" for number in range(10)], "caption": "a dog"})
    dataset = Flickr8kDataset(table, build_vocab(["a dog"], 1), Path(), None)  # type: ignore[arg-type]
    assert dataset.spread(4) == ["0.jpg", "2.jpg", "5.jpg", "7.jpg"]
    assert dataset.spread(10) == dataset.spread(99) == dataset.images
    assert len(dataset.spread(9)) == 9
