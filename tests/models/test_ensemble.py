"""Several models write one caption."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.vocab import Vocabulary, build_vocab
from models.checkpoint import load_model, model_state
from models.ensemble import load_ensemble
from models.model import CaptionModel
from utils import save_checkpoint

VOCAB = build_vocab(["a brown dog runs over green grass", "two cats sit on a bench"], 1)
PICTURES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save(tmp_path: Path, tiny_config: Callable) -> Callable[..., Path]:
    def build_and_save(name: str, *overrides: str, vocab: Vocabulary = VOCAB) -> Path:
        model = CaptionModel.build(tiny_config("decoder.name=attention", *overrides), vocab)
        torch.manual_seed(0)  # one backbone for all
        for parameter in model.encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.encoder.identity["sha256"] = "one"
        with torch.no_grad():
            model.fit_statistics(model.encoder(model.transform.normalise(PICTURES)) * (1 + len(name)))
            for parameter in model.decoder.parameters():
                parameter.mul_(3)
        path = tmp_path / f"{name}.pth"
        save_checkpoint(path, model_state(model))
        return path

    return build_and_save


def probabilities(model: CaptionModel, ids: list[int]) -> torch.Tensor:
    """Of each next word (words, V), by steps, for the first picture."""
    with torch.inference_mode():
        memory = model.decoder.prepare(model.encode(PICTURES[:1]))
        state, steps = model.decoder.start(memory), []
        for token in ids:
            logits, state, _ = model.decoder.step(torch.tensor([token]), state, memory)
            steps.append(logits.softmax(1))
    return torch.cat(steps)


def test_their_probabilities_are_averaged_at_each_word(save: Callable) -> None:
    paths = [save("one", "train.seed=1"), save("other", "train.seed=2", "decoder.name=transformer")]
    ids = [1, *VOCAB.numericalize("a dog sit on")]
    one, other = (probabilities(load_model(path), ids) for path in paths)
    assert not torch.allclose(one, other, atol=1e-3)
    torch.testing.assert_close(probabilities(load_ensemble(paths), ids), (one + other) / 2)


def test_twice_the_same_model_writes_as_it_does_alone(save: Callable) -> None:
    path = save("one")
    features = torch.randn(3, 1, 512)
    together, alone = (load_ensemble(paths).generate(features, keep_attention=True) for paths in ([path] * 2, [path]))
    for (several,), (single,) in zip(together, alone, strict=True):
        assert several.text == single.text
        assert several.score == pytest.approx(single.score, rel=1e-4)
        torch.testing.assert_close(several.attention, single.attention)


def test_members_that_look_with_other_heads_show_no_attention(save: Callable) -> None:
    paths = [save("one"), save("other", "decoder.name=transformer")]
    ((caption,),) = load_ensemble(paths).generate(torch.randn(1, 1, 512), keep_attention=True)
    assert caption.attention is None


@pytest.mark.parametrize(
    ("settings", "vocab", "told"),
    [
        ([], build_vocab(["a dog"], 1), "other.pth has another vocabulary than"),
        (["decoder.name=lstm"], VOCAB, "other.pth reads other features than"),
        (["encoder.image_size=64"], VOCAB, "other.pth reads other features than"),
        (["encoder.frozen=false"], VOCAB, "fine-tuned"),
    ],
)
def test_members_must_read_the_same_features_and_know_the_same_words(
    settings: list[str], vocab: Vocabulary, told: str, save: Callable, refused: Callable
) -> None:
    paths = [save("one"), save("other", *settings, vocab=vocab)]
    with refused(told, "one.pth"):
        load_ensemble(paths)
