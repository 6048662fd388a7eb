"""The contract of every decoder in DECODERS."""

import math

import pytest
import torch
from training.objectives import caption_loss

from config import load_config
from data.vocab import EOS, PAD, SOS
from models.decoder import Decoder, Dropout, first_rows
from models.model import DECODERS
from models.search import search

V, D, L = 300, 24, 9
TOKENS = torch.tensor([[SOS, 5, 6, 7, 8, EOS], [SOS, 9, 5, EOS, PAD, PAD], [SOS, 7, 7, 10, EOS, PAD]])
IMAGE_INDEX = torch.tensor([0, 1, 0])


@pytest.fixture(params=sorted(DECODERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, *overrides: str) -> Decoder:
    torch.manual_seed(0)
    sizes = ["decoder.embed_size=16", "decoder.hidden_size=32", "decoder.num_heads=4", f"decoder.name={name}"]
    return DECODERS[name](load_config(overrides=[*sizes, *overrides]).decoder, D, V)


def logits_of(decoder: Decoder, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, attention = decoder(*inputs)
    return decoder.output(hidden), attention


def features(name: str, pictures: int = 2) -> torch.Tensor:
    shape = (pictures, L, D) if DECODERS[name].spatial else (pictures, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [0.3, 0.5, 0.999])
def test_dropout_keeps_the_share_asked_for_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(1001, 1001))
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=1 / 256)
    assert dropped.mean().item() == pytest.approx(1, rel=0.03)
    assert (dropped[:-1, 0] == dropped[1:, 0]).float().mean().item() == pytest.approx(p**2 + (1 - p) ** 2, abs=0.05)


def test_dropout_has_the_gradient_of_what_is_kept_and_rests_after_training() -> None:
    values = torch.rand(7, 5, dtype=torch.bfloat16, requires_grad=True)
    dropped = (dropout := Dropout(0.4))(values)
    dropped.sum().backward()
    assert values.grad is not None and torch.equal(values.grad.eq(0), dropped.eq(0))
    assert dropped.dtype == torch.bfloat16
    assert torch.equal(dropout.eval()(values), values)


def test_forward_scores_every_word_for_every_place(name: str) -> None:
    logits, attention = logits_of(build(name), features(name), TOKENS, IMAGE_INDEX)
    assert logits.shape == (3, 6, V)
    assert attention is None or attention.shape[:2] + attention.shape[3:] == (3, 6, L)
    assert (attention is not None) == DECODERS[name].spatial


def test_the_first_loss_is_close_to_the_log_of_the_vocabulary(name: str) -> None:
    decoder, tokens = build(name).eval(), torch.randint(4, V, (40, 12), generator=torch.Generator().manual_seed(0))
    hidden, _ = decoder(features(name, 40), tokens[:, :-1], torch.arange(40))
    loss = caption_loss(decoder.output, hidden, tokens[:, 1:], 0)[1]
    assert loss.item() == pytest.approx(math.log(V), rel=0.05)


def test_one_batch_can_be_learned_by_heart(name: str) -> None:
    decoder, seen = build(name, "decoder.dropout=0").train(), features(name)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(150):
        loss = caption_loss(decoder.output, decoder(seen, TOKENS[:, :-1], IMAGE_INDEX)[0], TOKENS[:, 1:], 0)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # The captions of picture 0 start with different words: that choice is all that cannot be learned.
    assert loss.item() < 2 * math.log(2) / 12 + 0.05


@pytest.mark.parametrize("settings", [[], ["decoder.num_layers=2", "decoder.encoder_layers=1"]])
@torch.inference_mode()
def test_steps_give_the_logits_of_teacher_forcing(name: str, settings: list[str]) -> None:
    if name == "attention":
        settings = settings[1:]
    decoder, seen = build(name, *settings).eval(), features(name, 3)
    together, attention = logits_of(decoder, seen, TOKENS, torch.arange(3))
    memory = decoder.prepare(seen)
    state = decoder.start(memory)
    for t in range(TOKENS.shape[1]):
        logits, state, looked = decoder.step(TOKENS[:, t], state, memory)
        torch.testing.assert_close(logits, together[:, t], rtol=1e-4, atol=1e-5)
        if attention is not None:
            torch.testing.assert_close(looked, attention[:, t], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_hypotheses_of_one_picture_may_be_reordered_by_their_state(name: str) -> None:
    decoder, seen = build(name).eval(), features(name)
    memory = decoder.prepare(seen)
    twice = torch.tensor([0, 0, 1, 1])
    state = tuple(part[twice] for part in decoder.start(memory))
    _, state, _ = decoder.step(torch.tensor([5, 6, 7, 8]), state, memory)
    order = torch.tensor([1, 0, 3, 3])
    logits, _, maps = decoder.step(torch.tensor([9, 9, 9, 9]), tuple(part[order] for part in state), memory)
    expected, attention = logits_of(decoder, seen, torch.tensor([[6, 9], [5, 9], [8, 9], [8, 9]]), twice)
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-4, atol=1e-5)
    if attention is not None:
        torch.testing.assert_close(maps, attention[:, -1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_padding_and_other_captions_of_the_batch_do_not_matter(name: str) -> None:
    decoder, seen = build(name).eval(), features(name)
    together, _ = logits_of(decoder, seen, TOKENS, IMAGE_INDEX)
    for caption, length in enumerate((6, 4, 5)):
        alone, _ = logits_of(decoder, seen, TOKENS[caption : caption + 1, :length], IMAGE_INDEX[caption : caption + 1])
        torch.testing.assert_close(alone[0], together[caption, :length], rtol=1e-4, atol=1e-5)


def test_captions_learn_in_a_long_batch_what_they_learn_alone(name: str) -> None:
    decoder, seen, lengths = build(name).eval(), features(name, 8), [3, 20, 5, 5, 9, 4, 4, 12]
    captions = [torch.randint(4, V, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    together = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=PAD)  # (8, 20)
    hidden, _ = decoder(seen, together[:, :-1], torch.arange(8))
    caption_loss(decoder.output, hidden, together[:, 1:], 0)[0].backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    decoder.zero_grad()
    for picture, caption in enumerate(captions):
        hidden, _ = decoder(seen[picture][None], caption[None, :-1], torch.tensor([0]))
        loss = caption_loss(decoder.output, hidden, caption[None, 1:], 0)[0]
        (loss * (len(caption) - 1) / sum(length - 1 for length in lengths)).backward()
    for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_words_are_computed_in_multiples_of_64() -> None:
    real = torch.rand(20, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    first = first_rows(real)
    assert len(first) == 128 > real.sum() > 64
    assert torch.equal(first[: real.sum()], real.flatten().nonzero().squeeze(1))
    assert len(first_rows(real[:3])) == 30


@torch.inference_mode()
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    decoder, seen = build(name).eval(), features(name)
    order = torch.tensor([2, 0, 1])
    shuffled, _ = logits_of(decoder, seen, TOKENS[order], IMAGE_INDEX[order])
    torch.testing.assert_close(shuffled, logits_of(decoder, seen, TOKENS, IMAGE_INDEX)[0][order], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_captions_that_share_a_picture_are_scored_as_if_each_had_its_own(name: str) -> None:
    decoder, seen = build(name).eval(), features(name)
    copied, _ = logits_of(decoder, seen[IMAGE_INDEX], TOKENS, torch.arange(3))
    torch.testing.assert_close(logits_of(decoder, seen, TOKENS, IMAGE_INDEX)[0], copied, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_word_is_predicted_from_the_picture_and_earlier_words_only(name: str) -> None:
    decoder, seen = build(name).eval(), features(name)
    later = TOKENS.clone()
    later[:, 3:] = 11
    logits, changed = logits_of(decoder, seen, TOKENS, IMAGE_INDEX)[0], logits_of(decoder, seen, later, IMAGE_INDEX)[0]
    torch.testing.assert_close(logits[:, :3], changed[:, :3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[:, 3:], changed[:, 3:])
    assert not torch.allclose(logits, logits_of(decoder, seen + 1.5 * torch.rand(D), TOKENS, IMAGE_INDEX)[0])


@torch.inference_mode()
def test_each_map_sums_to_one(name: str) -> None:
    _, attention = build(name).eval()(features(name), TOKENS, IMAGE_INDEX)
    if attention is not None:
        torch.testing.assert_close(attention.sum(3), torch.ones(attention.shape[:3]))


@pytest.mark.parametrize("width", [1, 4])
def test_what_search_finds_is_scored_and_looked_at_as_by_teacher_forcing(name: str, width: int) -> None:
    decoder, seen = build(name).eval(), features(name)
    options = load_config(overrides=[f"search.beam={width}", "search.max_length=6"]).search
    for picture, found in enumerate(search(decoder, seen, options, width, keep_attention=True)):
        assert len({tuple(one.ids) for one in found}) == width
        for one in found:
            words = [*one.ids, EOS][:6]
            with torch.inference_mode():
                logits, attention = logits_of(
                    decoder, seen, torch.tensor([[SOS, *words[:-1]]]), torch.tensor([picture])
                )
            log_prob = logits[0].log_softmax(1).gather(1, torch.tensor(words).unsqueeze(1)).sum()
            assert one.log_prob == pytest.approx(log_prob.item(), abs=1e-4)
            if attention is not None:
                torch.testing.assert_close(one.attention, attention[0, : len(one.ids)], rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_can_be_trained(name: str) -> None:
    decoder = build(name).train()
    hidden, _ = decoder(features(name, 1), TOKENS[:1, :-1], torch.tensor([0]))
    caption_loss(decoder.output, hidden, TOKENS[:1, 1:], 0)[0].backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_the_gradient_of_teacher_forcing_is_that_of_the_steps(name: str) -> None:
    decoder, seen = build(name).eval(), features(name, 3)
    logits_of(decoder, seen, TOKENS, torch.arange(3))[0].square().sum().backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    decoder.zero_grad()
    memory = decoder.prepare(seen)
    state, total = decoder.start(memory), torch.zeros(())
    for t in range(TOKENS.shape[1]):
        logits, state, _ = decoder.step(TOKENS[:, t], state, memory)
        total = total + logits.square().sum()
    total.backward()
    for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in DECODERS.items() if kind.spatial])  # LSTMs in bf16 need AVX512
def test_in_bf16_the_gradient_points_where_it_does_in_fp32(name: str) -> None:
    gradients = []
    for enabled in (False, True):
        decoder = build(name, "decoder.dropout=0").train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            hidden, _ = decoder(features(name), TOKENS[:, :-1], IMAGE_INDEX)
            loss = caption_loss(decoder.output, hidden, TOKENS[:, 1:], 0)[0]
        loss.backward()
        gradients.append(torch.cat([part.grad.flatten() for part in decoder.parameters() if part.grad is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_an_lstm_adds_up_its_memory_in_fp32_even_in_bf16() -> None:
    decoder = build("attention")
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.prepare(features("attention"))
        state = decoder.start(memory)
        _, (_, c), _ = decoder.step(TOKENS[:2, 0], state, memory)
    assert state[1].dtype == c.dtype == torch.float32
