"""Captions and pictures in batches: what is read, what is predicted, in which order, and how little memory it takes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from config import load_config
from data import dataset, formats
from data.dataset import Batch, Flickr8kDataset, captions_per_step, make_batches, read_shares, share_of
from data.features import Features
from data.folders import ImageFolders
from data.tokens import tokenise
from data.transforms import WHOLE, Transform, View, open_picture
from data.vocab import EOS, PAD, SOS, Vocabulary, build_vocab
from training.setup import index_images

CAPTIONS = ["one", "one two", "one two three"] * 20 + ["one two three four five six"]
PICTURES = [f"{number}.jpg" for number in range(21)]
VOCAB = build_vocab(CAPTIONS, 1)
SIDES = build_vocab(["the left right side"], 1)


def make(
    captions: Sequence[str],
    vocab: Vocabulary = VOCAB,
    features: Features | None = None,
    views: Mapping[View, Features | None] | None = None,
) -> Flickr8kDataset:
    """Captions of the pictures 0.jpg, 1.jpg …, three of each, whose features are by default their numbers."""
    names = PICTURES[: -(-len(captions) // 3)]
    features = features or Features([torch.arange(len(names)).half()[:, None]], names)
    tokens = tokenise(captions, "en").numericalize(vocab)
    return Flickr8kDataset(
        names, np.arange(len(captions)) // 3, tokens, vocab, ImageFolders({}), Transform(32), features, views or {}
    )


@pytest.fixture
def captions() -> Flickr8kDataset:
    """61 captions of 21 pictures."""
    return make(CAPTIONS)


@pytest.fixture
def pixels(archive: Path) -> Flickr8kDataset:
    """60 captions of 12 pictures that are read anew each time."""
    table = formats.read(archive / "captions.csv")
    tokens = tokenise(table["caption"].tolist(), "en").numericalize(VOCAB)
    return Flickr8kDataset(*index_images(table), tokens, VOCAB, ImageFolders({"": archive / "images"}), Transform(32))


def words_of(batch: Batch) -> list[str]:
    return [SIDES.decode(ids.tolist()[1:]) for ids in batch.tokens]


def test_each_word_is_predicted_from_the_words_before_it(captions: Flickr8kDataset) -> None:
    batch = captions[[2]]
    words = VOCAB.numericalize("one two three")
    assert batch.inputs.tolist() == [[SOS, *words]]
    assert batch.targets.tolist() == [[*words, EOS]]


def test_padding_stands_only_at_the_end_and_is_no_target(captions: Flickr8kDataset) -> None:
    targets = captions[[60, 0, 1]].targets
    assert (targets == PAD).tolist() == [[False] * 7, [False] * 2 + [True] * 5, [False] * 3 + [True] * 4]
    assert captions.lengths[[60, 0, 1]].tolist() == [7, 2, 3] == (targets != PAD).sum(1).tolist()
    assert not (targets == SOS).any() and ((targets == EOS).sum(1) == 1).all()


def test_each_caption_has_its_picture(captions: Flickr8kDataset) -> None:
    batch = captions[[60, 0, 30, 2, 31, 1]]
    assert batch.features[batch.image_index].flatten().tolist() == [20, 0, 10, 0, 10, 0]
    assert [captions.images[number] for number in batch.image_ids] == ["0.jpg", "10.jpg", "20.jpg"]


def test_a_caption_takes_at_most_80_bytes() -> None:
    count, words = 20_000, "a man in a red shirt rides his bike up hills"
    images = [f"{number}.jpg" for number in range(count // 5)]
    tokens = tokenise([words] * count, "en").numericalize(build_vocab([words], 1))
    features = Features([torch.zeros(len(images), 1).half()], images)
    given = (np.arange(count) // 5, tokens, VOCAB, ImageFolders({}), Transform(32), features)
    whole = Flickr8kDataset(images, *given, views={View(mirrored=True): features})
    parts = [*vars(whole).values(), *vars(whole.tokens).values(), *whole.places.values()]
    held = sum(part.nbytes for part in parts if isinstance(part, np.ndarray | torch.Tensor))
    assert (tokens.lengths == 11).all() and 44 * count < held <= 80 * count


# ---- how pictures are shown ------------------------------------------------------------------------------------------


def test_pictures_are_shown_in_every_view_as_often(captions: Flickr8kDataset) -> None:
    signs = {WHOLE: 1, View(mirrored=True): -1, View(corner=0): 100}
    whole, *others = (Features([sign * torch.arange(21.0).half()[:, None]], PICTURES) for sign in signs.values())
    captions = replace(captions, features=whole, views=dict(zip(list(signs)[1:], others, strict=True)))
    drawn = []
    for seed in (0, 0, 1):
        captions.start_epoch(0, 0, np.random.default_rng(seed))
        drawn.append(captions.view_of)
        read = captions[range(61)].features.flatten()
        assert torch.equal(read, torch.arange(21).half() * torch.tensor([1, -1, 100])[captions.view_of])
        assert min(Counter(captions.view_of.tolist())[view] for view in range(3)) > 2
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_captions_of_a_mirrored_picture_have_left_for_right() -> None:
    texts = ["the left side"] * 3 + ["right"] * 3
    features = Features([torch.zeros(2, 1).half()], PICTURES[:2])
    mirrored = make(texts, SIDES, features, {View(corner=1): features, View(mirrored=True): features})
    mirrored.view_of = np.array([2, 1])
    assert words_of(mirrored[[0, 3]]) == ["the right side", "right"]
    assert mirrored[[0, 3]].mirrored.tolist() == [True, False]
    mirrored.view_of = np.array([0, 2])
    assert words_of(mirrored[[0, 3]]) == ["the left side", "left"]


def test_views_may_lie_on_another_device_than_the_whole_pictures() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = Features([torch.zeros(21, 1, device="cuda")], PICTURES)
        both = make(CAPTIONS, features=on_gpu, views={View(mirrored=True): Features([torch.zeros(21, 1)], PICTURES)})
        both.view_of[:10] = 1
        assert both.read(np.arange(21)).device.type == "cuda"


def test_pixels_are_shown_in_the_view_chosen(pixels: Flickr8kDataset) -> None:
    pixels = replace(pixels, views=dict.fromkeys([View(mirrored=True), View(corner=3)]))
    picture = open_picture(pixels.folders.path("00.jpg"))
    for number, view in enumerate(pixels.shown):
        pixels.view_of[0] = number
        assert torch.equal(pixels[[0]].features[0], Transform(32).resize(picture, view))


def test_augmentations_are_drawn_from_seed_epoch_and_picture(pixels: Flickr8kDataset) -> None:
    (pixels.folders.path("01.jpg")).write_bytes((pixels.folders.path("00.jpg")).read_bytes())
    plain = pixels.read(np.arange(12))
    pixels.augmentations = ["random_crop", "color_jitter"]

    def read(seed: int, epoch: int, *images: int) -> torch.Tensor:
        pixels.start_epoch(seed, epoch, np.random.default_rng())
        return pixels.read(np.array(images))

    first = read(0, 0, *range(12))
    assert torch.equal(first, read(0, 0, *range(12)))
    assert torch.equal(first[[3, 7]], read(0, 0, 3, 7))  # whatever else is read, and before it
    every = [plain, first, read(0, 1, *range(12)), read(1, 0, *range(12))]
    changes = [(one != other).flatten(1).any(1) for n, one in enumerate(every) for other in every[:n]]
    assert torch.stack(changes).all()  # every picture changes each time
    assert torch.equal(plain[0], plain[1]) and not torch.equal(first[0], first[1])  # and so do two that are the same
    pixels.start_epoch(0, 0, np.random.default_rng())
    [[(_, batch)]] = read_shares(pixels, [np.array([0, 5, 10])], workers=1)
    assert torch.equal(batch.features, first[:3])  # in another process, too


def test_each_picture_of_a_batch_is_read_once(pixels: Flickr8kDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def note_and_open(path: Path, least: int) -> Image.Image:
        opened.append(path.name)
        return Image.open(path)

    monkeypatch.setattr(dataset, "open_picture", note_and_open)
    batch = pixels[[7, 0, 5, 1, 9, 12]]
    assert sorted(opened) == ["00.jpg", "01.jpg", "02.jpg"]
    assert (batch.features.shape, batch.features.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert batch.image_index.tolist() == [1, 0, 1, 0, 1, 2]


# ---- batches and their order -----------------------------------------------------------------------------------------


def batches_of(captions: Flickr8kDataset, size: int, by_image: bool, *seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed) if seed else None
    return [batch.tolist() for batch in make_batches(captions, size, by_image, rng)]


@pytest.mark.parametrize("by_image", [True, False])
@pytest.mark.parametrize("seed", [(), (0, 1)])
@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_every_caption_comes_once_in_an_order_drawn_from_the_seed(
    captions: Flickr8kDataset, by_image: bool, seed: tuple[int, ...], size: int
) -> None:
    batches = batches_of(captions, size, by_image, *seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(captions)))
    assert batches == batches_of(captions, size, by_image, *seed)
    others = [batches_of(captions, size, by_image, 0, epoch) for epoch in range(2, 6)]
    assert all(batches != other or size == 1000 for other in others)
    assert {len(other) for other in others} == {len(batches)}  # as many in every epoch


def test_pictures_stay_whole_where_each_is_encoded_once_per_step(captions: Flickr8kDataset) -> None:
    batches = batches_of(captions, 12, True, 0)
    homes = Counter(image for batch in batches for image in set(captions.image_of[batch]))
    assert set(homes.values()) == {1}
    assert 9 <= np.mean([len(batch) for batch in batches]) <= 13


def test_captions_of_one_length_stand_together_and_batches_are_mixed(captions: Flickr8kDataset) -> None:
    batches = batches_of(captions, 10, False, 0)
    assert max(np.ptp(captions.lengths[batch]) for batch in batches if len(batch) > 1) == 0
    longest = [captions.lengths[batch].max() for batch in batches_of(captions, 5, False, 0)]
    assert longest != sorted(longest)
    assert {len(batch) for batch in batches_of(captions, 20, False)} == {20, 1}


def test_some_of_its_pictures_are_spread_over_all(captions: Flickr8kDataset) -> None:
    assert captions.sample_images(4) == ["0.jpg", "5.jpg", "10.jpg", "15.jpg"]
    assert captions.sample_images(21) == captions.sample_images(99) == PICTURES


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_a_batch_by_pictures_and_weigh_by_words(captions: Flickr8kDataset, size: int) -> None:
    batch = np.array([60, 0, 30, 2, 31, 1])  # three pictures, words and ends: 7 + 2 + 2 + 4 + 3 + 3
    shares = [share_of(captions, batch, rank, size) for rank in range(size)]
    working = [share for share in shares if share.fraction]
    assert sorted(index for share in working for index in share.indices) == sorted(batch)
    images = [set(captions.image_of[share.indices]) for share in working]
    assert sum(map(len, images)) == len(set.union(*images)) == 3
    assert {share.batch_words for share in shares} == {21}
    assert sum(share.fraction for share in shares) == pytest.approx(1)
    for share in working:
        assert share.fraction == pytest.approx(captions.lengths[share.indices].sum() / 21)
    for share in shares:  # where no picture is left, a caption stands in
        assert share.fraction or share.indices.tolist() == [60]


def test_batches_are_read_in_order(captions: Flickr8kDataset) -> None:
    batches = make_batches(captions, 7, False, np.random.default_rng(0))
    for [(share, read)], batch in zip(read_shares(captions, batches), batches, strict=True):
        assert share.indices.tolist() == batch.tolist() and share.batch_words == captions.lengths[batch].sum()
        assert torch.equal(read.tokens, captions[batch].tokens)


def test_a_batch_may_be_read_in_parts_that_are_together_the_whole(captions: Flickr8kDataset) -> None:
    batches = make_batches(captions, 12, True, np.random.default_rng(0))
    for parts, batch in zip(read_shares(captions, batches, parts=3), batches, strict=True):
        assert len(parts) == 3 and sum(share.fraction for share, _ in parts) == pytest.approx(1)
        used = [index for share, _ in parts if share.fraction for index in share.indices]
        assert sorted(used) == sorted(batch)


@pytest.mark.parametrize(
    ("captions", "size"), [(100, 4), (1_500, 4), (3_000, 8), (24_000, 64), (30_000, 64), (1_000_000, 64)]
)
def test_small_sets_have_small_batches_so_that_there_are_steps_to_learn_by(captions: int, size: int) -> None:
    assert captions_per_step(load_config().train, captions) == size
    fixed = load_config(overrides=["train.batch_size=20", "train.accumulate=3"])
    assert captions_per_step(fixed.train, captions) == 60


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_picture_is_one_sentence_from_whichever_thread_reads_it(
    workers: int, pixels: Flickr8kDataset, refused: Callable
) -> None:
    (pixels.folders.path("01.jpg")).unlink()
    batches = read_shares(pixels, [np.array([0]), np.array([7])], workers)
    assert next(batches)[0][1].features.shape == (1, 3, 32, 32)
    with refused("archive/images/01.jpg", "check the path"):
        next(batches)


def test_other_features_of_the_same_captions(captions: Flickr8kDataset) -> None:
    other = captions.with_features(Features([100 + torch.arange(21.0).half()[:, None]], PICTURES[::-1]))
    assert other[[0]].features.tolist() == [[120]] and captions[[0]].features.tolist() == [[0]]
    assert torch.equal(other[[60]].tokens, captions[[60]].tokens)
