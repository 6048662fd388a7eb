"""The contract of every decoder in DECODERS."""

import math

import pytest
import torch

from config import load_config
from data.vocab import EOS, PAD, SOS
from models.decoder import Decoder, group_by_image
from models.model import DECODERS
from models.search import search
from training.losses import cross_entropy

V, D, L = 300, 24, 9
TOKENS = torch.tensor([[SOS, 5, 6, 7, 8, EOS], [SOS, 9, 5, EOS, PAD, PAD], [SOS, 7, 7, 10, EOS, PAD]])
LENGTHS = 6, 4, 5
IMAGE_INDEX = torch.tensor([0, 1, 0])


@pytest.fixture(params=sorted(DECODERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, *overrides: str) -> Decoder:
    torch.manual_seed(0)
    sizes = ["decoder.embed_size=16", "decoder.hidden_size=32", "decoder.num_heads=4", f"decoder.name={name}"]
    return DECODERS[name](load_config(overrides=[*sizes, *overrides]).decoder, D, V).eval()


def features(name: str, images: int = 2) -> torch.Tensor:
    shape = (images, L, D) if DECODERS[name].spatial else (images, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def read(
    decoder: Decoder, seen: torch.Tensor, tokens: torch.Tensor = TOKENS, image_index: torch.Tensor = IMAGE_INDEX
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, alphas = decoder(seen, tokens, image_index)
    return decoder.output(hidden), alphas


def loss_of(decoder: Decoder, seen: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    return cross_entropy(decoder.output, decoder(seen, tokens[:, :-1], image_index)[0], tokens[:, 1:], 0)[0]


def take_gradients(decoder: Decoder) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(decoder.parameters()))
    decoder.zero_grad()
    return gradients


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_captions_are_grouped_by_image_and_found_again() -> None:
    tokens = torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4]])
    rows, row = group_by_image(tokens, torch.tensor([2, 0, 2, 1]), 4)
    assert rows[:, 0].tolist() == [2, 0, 4, 0, 1, 3, 0, 0]
    assert torch.equal(rows[row], tokens)


def test_the_first_loss_is_close_to_the_log_of_the_vocabulary(name: str) -> None:
    tokens = torch.randint(4, V, (40, 12), generator=torch.Generator().manual_seed(0))
    loss = loss_of(build(name), features(name, 40), tokens, torch.arange(40))
    assert loss.item() == pytest.approx(math.log(V), rel=0.05)


def test_the_forget_gate_of_an_lstm_is_open_at_first() -> None:
    """Its bias starts at 1 (Jozefowicz et al. 2015)."""
    for gates in (
        build("lstm").get_parameter("lstm.bias_ih_l0"),
        build("attention").get_parameter("from_word.bias")[32:],
    ):
        assert [gate.mean().item() for gate in gates.chunk(4)] == pytest.approx([0, 1, 0, 0], abs=0.15)


def test_one_batch_can_be_learned_by_heart(name: str) -> None:
    decoder, seen = build(name, "decoder.dropout=0").train(), features(name)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(150):
        loss = loss_of(decoder, seen, TOKENS, IMAGE_INDEX)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # The captions of image 0 start with different words: that choice is all that cannot be learned.
    assert loss.item() < 2 * math.log(2) / 12 + 0.05


@pytest.mark.parametrize("settings", [[], ["decoder.num_layers=2", "decoder.encoder_layers=1"]])
def test_steps_give_the_logits_alphas_and_gradients_of_teacher_forcing(name: str, settings: list[str]) -> None:
    decoder, seen = build(name, *(settings[1:] if name == "attention" else settings)), features(name)
    tokens = torch.cat([TOKENS, TOKENS + 1])  # three captions of each picture
    together, alphas = read(decoder, seen, tokens, torch.tensor([0, 0, 0, 1, 1, 1]))
    together.square().sum().backward()
    gradients = take_gradients(decoder)
    assert (alphas is not None) == decoder.spatial
    if alphas is not None:
        torch.testing.assert_close(alphas.sum(3), torch.ones(6, 6, decoder.heads))
    memory = decoder.prepare(seen)
    state, total = tuple(part.repeat_interleave(3, 0) for part in decoder.start(memory)), torch.zeros(())
    for t, token in enumerate(tokens.T):
        logits, state, alpha = decoder.step(token, state, memory)
        total = total + logits.square().sum()
        assert_close(logits, together[:, t])
        assert_close(alpha, None if alphas is None else alphas[:, t])
    total.backward()
    for found, expected in zip(take_gradients(decoder), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_logits_do_not_depend_on_padding_other_captions_their_order_or_who_shares_the_image(name: str) -> None:
    decoder, seen, order = build(name), features(name), torch.tensor([2, 0, 1])
    logits, _ = read(decoder, seen)
    assert_close(read(decoder, seen, TOKENS[order], IMAGE_INDEX[order])[0], logits[order])
    assert_close(read(decoder, seen[IMAGE_INDEX], TOKENS, torch.arange(3))[0], logits)
    for caption, length in enumerate(LENGTHS):
        one = slice(caption, caption + 1)
        assert_close(read(decoder, seen, TOKENS[one, :length], IMAGE_INDEX[one])[0], logits[one, :length])


@torch.inference_mode()
def test_a_word_is_predicted_from_the_image_and_earlier_words_only(name: str) -> None:
    decoder, seen, later = build(name), features(name), TOKENS.clone()
    later[:, 3:] = 11
    logits, changed = read(decoder, seen)[0], read(decoder, seen, later)[0]
    assert_close(logits[:, :3], changed[:, :3])
    assert not torch.allclose(logits[:, 3:], changed[:, 3:])
    assert not torch.allclose(logits, read(decoder, seen + 1.5 * torch.rand(D))[0])


@pytest.mark.parametrize("width", [1, 4])
@torch.inference_mode()
def test_search_gives_the_probability_and_the_attention_of_teacher_forcing(name: str, width: int) -> None:
    decoder, seen = build(name), features(name)
    options = load_config(overrides=[f"search.beam={width}", "search.max_length=6"]).search
    for image, found in enumerate(search(decoder, seen, options, width, keep_attention=True)):
        assert len({tuple(one.ids) for one in found}) == width
        for one in found:
            words = [*one.ids, EOS][:6]
            logits, alphas = read(decoder, seen, torch.tensor([[SOS, *words[:-1]]]), torch.tensor([image]))
            assert one.log_prob == pytest.approx(
                logits[0].log_softmax(1)[range(len(words)), words].sum().item(), abs=1e-4
            )
            assert_close(one.attention, None if alphas is None else alphas[0, : len(one.ids)])


@pytest.mark.parametrize("name", [name for name, kind in DECODERS.items() if kind.spatial])  # LSTMs in bf16 need AVX512
def test_in_bf16_the_gradient_points_where_it_does_in_fp32(name: str) -> None:
    gradients = []
    for enabled in (False, True):
        decoder = build(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(decoder, features(name), TOKENS, IMAGE_INDEX)
        loss.backward()
        gradients.append(torch.cat([gradient.flatten() for gradient in take_gradients(decoder)]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
