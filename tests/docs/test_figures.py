"""The pictures of the README and docs/ show what the model computed."""

import importlib

import numpy as np
import torch
from conftest import SCENES
from PIL import Image

from data import sample
from models.model import CaptionModel

figures = importlib.import_module("docs.figures")


def test_a_tree_joins_words_between_which_nothing_was_chosen() -> None:
    held = {(7,): -1.0, (8,): -2.0, (7, 4): -1.5, (7, 4, 5): -1.6, (7, 4, 6): -1.9, (7, 4, 5, 2): -1.7}
    tree = figures.grow(held)
    first, dropped = tree.branches
    assert (first.words, first.log_prob) == ((7, 4), -1.5)
    assert [branch.words for branch in first.branches] == [(5, 2), (6,)]
    assert (dropped.words, dropped.branches) == ((8,), [])
    assert figures.count_leaves(tree) == 3


def test_probabilities_and_overlaps_are_those_of_the_model(tiny_model: CaptionModel) -> None:
    picture = sample.draw_scene(SCENES[0], np.random.default_rng(0))
    with torch.inference_mode():
        features = tiny_model.encoder(tiny_model.transform(picture).unsqueeze(0))
    seen = figures.Scene(picture, sample.describe(SCENES[0]), features)
    drawn = {text.get_text() for text in figures.draw_teacher_forcing(tiny_model, seen).axes[0].texts}
    likely = f"{1 / len(tiny_model.vocab):.2f}"  # an untrained model finds all words about as probable
    assert likely in drawn and "not scored" in drawn
    tree = {text.get_text() for text in figures.draw_tree(tiny_model, seen).axes[0].texts}
    best = figures.best(tiny_model, seen)
    assert any(text.startswith("best: ") and f"= {best.score:.3f}" in text for text in tree)
    assert f"greedy search writes: {figures.best(tiny_model, seen, beam=1).text}" in tree
    overlap = [text.get_text() for text in figures.draw_overlap(tiny_model, seen).axes[0].texts]
    assert sum(text.endswith(f" of {len(best.words)}") for text in overlap) == 1


def test_captioned_pictures_keep_their_proportions_and_all_their_words() -> None:
    tall, wide = Image.new("RGB", (100, 200)), Image.new("RGB", (300, 200))
    caption = "a sentence of more words than a line below so narrow a picture holds"
    rows = [[(tall, caption, "red"), (wide, "short", "blue")], [(wide, "alone", "blue")]]
    [axes] = figures.draw_captioned(rows).axes
    frames = [(frame.get_width(), frame.get_height()) for frame in axes.patches]
    assert [round(width / height, 3) for width, height in frames] == [0.5, 1.5, 1.5]
    assert len({height for _, height in frames}) == 1
    assert [text.get_text().split() for text in axes.texts] == [caption.split(), ["short"], ["alone"]]


def test_the_words_with_attention_are_the_longest_each_once_and_in_order() -> None:
    words = ["a", "man", "in", "a", "red", "uniform", "is", "holding", "a", "red", "ball"]
    assert [words[place] for place in figures.longest_words(words)] == ["man", "uniform", "holding", "ball"]
