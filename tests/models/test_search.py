"""Search: what it finds, what it may not write, when it ends, and that nobody gets what is another's."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch.nn.functional import pad

from config import SearchConfig, load_config
from data.vocab import EOS, PAD, SOS, UNK
from models.decoder import Decoder, DecoderRNN, Memory, State
from models.search import Hypothesis, search

A, B, C, D = range(4, 8)
V = L = 12
CHANCES = {A: 0.5, B: 0.3, C: 0.15, EOS: 0.05}

Script = Callable[[int, tuple[int, ...]], dict[int, float]]

in_every_way = pytest.mark.parametrize(("width", "temperature"), [(1, 0), (3, 0), (3, 1)])


class Scripted(Decoder):
    """The script names the next words of a picture's hypothesis and their probabilities; others have next to none.

    A picture's features are its number. Attention tells this number, `<sos>` and the words behind it, then zeros.
    """

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.rows: list[tuple[int, int]] = []  # of memory and state, at each step

    def prepare(self, features: torch.Tensor) -> Memory:
        return (features.long(),)

    def start(self, memory: Memory) -> State:
        return (memory[0].clone(),)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        self.rows.append((len(memory[0]), len(token)))
        each = len(token) // len(memory[0])
        assert state[0][:, 0].tolist() == memory[0][:, 0].repeat_interleave(each).tolist()
        past = torch.cat([state[0], token.unsqueeze(1)], dim=1)  # (N, 2 + t): number, <sos>, words
        scripts = [self.script(picture, tuple(words)) for picture, _, *words in past.tolist()]
        logits = torch.tensor([[script.get(word, 1e-9) for word in range(V)] for script in scripts]).log()
        return logits, (past,), pad(past, (0, L - past.shape[1]))


def always(words: dict[int, float]) -> Script:
    return lambda picture, past: words


def by_chance(picture: int, past: tuple[int, ...]) -> dict[int, float]:
    """Every picture and every beginning has its own probabilities."""
    chance = random.Random(f"{picture} {past}")
    weights = [chance.random() ** 3 for _ in range(5)]
    return dict(zip((EOS, A, B, C, D), (weight / sum(weights) for weight in weights), strict=True))


def lengths_differ(picture: int, past: tuple[int, ...]) -> dict[int, float]:
    """A picture has as many words as its number says."""
    return {EOS if len(past) == picture else A: 1}


def short_or_long(picture: int, past: tuple[int, ...]) -> dict[int, float]:
    """Either `A` with probability 0.54, or `B B B B` with 0.4."""
    if not past:
        return {A: 0.6, B: 0.4}
    return {EOS: 0.9, C: 0.1} if past == (A,) else {EOS if len(past) >= 4 else B: 1}


def numbered(*pictures: int) -> torch.Tensor:
    return torch.tensor(pictures).unsqueeze(1)


def options(**changes: float) -> SearchConfig:
    return SearchConfig(**load_config().search.model_dump() | {"max_length": 6, "length_penalty": 0.0} | changes)


def captions(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[hypothesis.ids for hypothesis in each] for each in found]


def random_decoder(seed: int, vocab_size: int = V) -> DecoderRNN:
    torch.manual_seed(seed)
    config = load_config(overrides=["decoder.embed_size=8", "decoder.hidden_size=8"]).decoder
    decoder = DecoderRNN(config, 6, vocab_size).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(4)  # so that captions differ
    decoder.get_parameter("output.bias").data = torch.eye(vocab_size)[EOS] / 2  # and their lengths too
    return decoder


def random_pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def teacher_forced(decoder: Decoder, picture: torch.Tensor, ids: Sequence[int], max_length: int) -> float:
    """The log-probability of a caption; it has no `<eos>` where it has no room for one."""
    targets = [*ids, EOS][:max_length]
    hidden, _ = decoder(picture.unsqueeze(0), torch.tensor([[SOS, *targets[:-1]]]), torch.tensor([0]))
    logits = decoder.output(hidden)
    return logits[0].log_softmax(1)[range(len(targets)), targets].sum().item()


def plain_beam_search(script: Script, picture: int, beam: int, penalty: float, max_length: int) -> list[list[int]]:
    running: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for length in range(1, max_length + 1):
        ways = [([*past, w], lp + math.log(p)) for past, lp in running for w, p in script(picture, tuple(past)).items()]
        best = sorted(ways, key=lambda way: -way[1])[: beam - len(ended)]
        over = [way for way in best if way[0][-1] == EOS or length == max_length]
        running = [way for way in best if way not in over]
        ended += [(past, log_prob / length**penalty) for past, log_prob in over]
    return [[word for word in past if word != EOS] for past, _ in sorted(ended, key=lambda one: -one[1])]


@pytest.mark.parametrize("penalty", [0, 0.7, 2])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_many_pictures_at_once_are_searched_as_one_by_one_with_plain_lists(beam: int, penalty: float) -> None:
    settings = options(beam=beam, length_penalty=penalty)
    for count in {1, beam}:
        found = search(Scripted(by_chance), numbered(*range(25)), settings, num_captions=count)
        expected = [plain_beam_search(by_chance, picture, beam, penalty, 6)[:count] for picture in range(25)]
        assert captions(found) == expected


@pytest.mark.parametrize("penalty", [0, 0.7, 1])
@pytest.mark.parametrize(("words", "longest", "possible"), [(2, 4, 31), (3, 3, 40)])
@torch.inference_mode()
def test_a_beam_with_room_for_all_captions_finds_the_best(
    words: int, longest: int, possible: int, penalty: float
) -> None:
    decoder, pictures = random_decoder(seed=0, vocab_size=4 + words), random_pictures(3)
    settings = options(beam=possible, max_length=longest, length_penalty=penalty)
    every = [ids for n in range(longest + 1) for ids in product(range(4, 4 + words), repeat=n)]
    assert len(every) == possible
    for number, picture in enumerate(pictures):
        log_probs = {ids: teacher_forced(decoder, picture, ids, longest) for ids in every}
        scores = {ids: log_prob / min(len(ids) + 1, longest) ** penalty for ids, log_prob in log_probs.items()}
        best = sorted(every, key=lambda ids: -scores[ids])
        for count in (1, 4, possible):
            found = search(decoder, pictures, settings, num_captions=count)[number]
            assert [tuple(one.ids) for one in found] == best[:count]
            assert [one.score for one in found] == pytest.approx([scores[ids] for ids in best[:count]], abs=1e-4)


@torch.inference_mode()
def test_the_log_probability_is_the_decoders_own_however_it_was_searched() -> None:
    decoder, pictures = random_decoder(1), random_pictures(5)
    for settings in (options(temperature=0.3, top_k=3, top_p=0.9), options(no_repeat_ngram=1)):
        for picture, each in zip(pictures, search(decoder, pictures, settings, num_captions=5), strict=True):
            expected = [teacher_forced(decoder, picture, one.ids, 6) for one in each]
            assert [one.log_prob for one in each] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("beam", "temperature"), [(1, 0), (5, 1)])
def test_pictures_that_are_done_are_dropped_and_the_others_go_on(beam: int, temperature: float) -> None:
    decoder = Scripted(lengths_differ)
    found = search(decoder, numbered(3, 0, 4, 3, 1), options(beam=beam, temperature=temperature))
    assert captions(found) == [[[A] * words] for words in (3, 0, 4, 3, 1)]
    assert decoder.rows == [(5, 5), (4, 4), (3, 3), (3, 3), (1, 1)]


@in_every_way
def test_a_hypothesis_has_the_attention_with_which_its_own_words_were_written(width: int, temperature: float) -> None:
    torch.manual_seed(0)
    settings = options(beam=width, temperature=temperature)
    found = search(Scripted(by_chance), numbered(*range(12)), settings, num_captions=width, keep_attention=True)
    assert [len(each) for each in found] == [width] * 12
    for picture, each in enumerate(found):
        for one in each:
            read = [[picture, SOS, *one.ids[:t]] for t in range(len(one.ids))]
            assert one.attention is not None
            assert one.attention.tolist() == [[*words, *[0] * (L - len(words))] for words in read]


def test_there_is_no_attention_where_it_is_not_asked_for_or_the_decoder_has_none() -> None:
    unasked = search(Scripted(by_chance), numbered(0), options(beam=2), num_captions=2)
    without = search(random_decoder(0), random_pictures(1), options(beam=2), num_captions=2, keep_attention=True)
    assert [one.attention for one in unasked[0] + without[0]] == [None] * 4


@in_every_way
def test_a_caption_that_never_ends_is_taken_as_it_is_at_the_longest_length(width: int, temperature: float) -> None:
    words = {A: 0.5, B: 0.3, C: 0.2}
    settings = options(beam=width, temperature=temperature)
    found = search(Scripted(always(words)), numbered(0, 1), settings, num_captions=width, keep_attention=True)
    for one in [*found[0], *found[1]]:
        assert len(one.ids) == 6
        assert one.attention is not None
        assert one.attention.shape == (6, L)
        assert one.log_prob == pytest.approx(sum(math.log(words[word]) for word in one.ids))


@in_every_way
def test_captions_are_plain_integers_of_words_that_may_be_written(width: int, temperature: float) -> None:
    decoder = Scripted(always({PAD: 0.2, SOS: 0.2, UNK: 0.2, A: 0.2, B: 0.1, C: 0.1, EOS: 0.01}))
    settings = options(beam=width, temperature=temperature)
    found = search(decoder, numbered(0, 1), settings, num_captions=width, forbidden=(A, C))
    words = [word for each in found for one in each for word in one.ids]
    assert set(words) == {B}
    assert {type(word) for word in words} == {int}


@pytest.mark.parametrize(
    ("penalty", "count", "best", "steps"),
    [(0, 1, [A], 2), (0.2, 1, [A], 2), (0, 2, [A], 5), (0.7, 1, [B] * 4, 5), (1, 1, [B] * 4, 5)],
)
def test_search_goes_on_as_long_as_a_longer_caption_can_overtake_those_that_ended_and_no_longer(
    penalty: float, count: int, best: list[int], steps: int
) -> None:
    decoder = Scripted(short_or_long)
    found = search(decoder, numbered(0), options(beam=2, length_penalty=penalty), num_captions=count)
    assert found[0][0].ids == best
    assert len(decoder.rows) == steps


@pytest.mark.parametrize(("least", "words"), [(0, 0), (2, 2), (5, 5), (6, 6), (9, 6)])
def test_a_caption_has_a_least_length_unless_the_longest_is_less(least: int, words: int) -> None:
    decoder = Scripted(always({EOS: 0.9, A: 0.1}))
    assert captions(search(decoder, numbered(0), options(min_length=least))) == [[[A] * words]]


@pytest.mark.parametrize(("n", "expected"), [(0, [A] * 10), (1, [A, B]), (2, [A, A, B, A]), (3, [A, A, A, B, A, A])])
def test_so_many_words_in_a_row_never_come_twice(n: int, expected: list[int]) -> None:
    decoder = Scripted(always({A: 0.7, B: 0.2, EOS: 0.1}))
    assert captions(search(decoder, numbered(0), options(beam=1, max_length=10, no_repeat_ngram=n))) == [[expected]]


def test_a_vocabulary_of_one_word_gives_as_many_captions_as_there_are() -> None:
    decoder, pictures = random_decoder(0, vocab_size=5), random_pictures(2)
    found = search(decoder, pictures, options(beam=5, max_length=3), num_captions=5)
    assert [sorted(each) for each in captions(found)] == [[[], [4], [4, 4], [4, 4, 4]]] * 2
    too_short = search(decoder, pictures, options(beam=3, no_repeat_ngram=1, min_length=5), num_captions=3)
    assert captions(too_short) == [[[4]]] * 2  # no word is left to write


def test_more_captions_than_the_beam_is_wide_widen_it() -> None:
    decoder, pictures = Scripted(by_chance), numbered(*range(10))
    widened, wide = (search(decoder, pictures, options(beam=beam), num_captions=4) for beam in (1, 4))
    assert widened == wide
    assert all(len(each) == 4 for each in widened)


def frequencies(max_length: int, /, **changes: float) -> dict[tuple[int, ...], float]:
    """How often each caption is drawn where every word has its probability in CHANCES."""
    torch.manual_seed(0)
    settings = options(max_length=max_length, **{"temperature": 1} | changes)
    (found,) = captions(search(Scripted(always(CHANCES)), numbered(0), settings, num_captions=4000))
    return {caption: count / 4000 for caption, count in Counter(map(tuple, found)).items()}


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_captions_are_drawn_as_often_as_they_are_probable_at_this_temperature(temperature: float) -> None:
    powers = [chance ** (1 / temperature) for chance in CHANCES.values()]
    *words, (_, end) = zip(CHANCES, (power / sum(powers) for power in powers), strict=True)
    expected: dict[tuple[int, ...], float] = {(): end} | {(word,): chance * end for word, chance in words}
    expected |= {(one, two): chance * other for one, chance in words for two, other in words}
    assert frequencies(2, temperature=temperature) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *(({"top_k": 1}, "A"), ({"top_k": 3}, "ABC"), ({"top_k": 99}, "ABC.")),
        *(({"top_p": 0.4}, "A"), ({"top_p": 0.6}, "AB"), ({"top_p": 0.9}, "ABC"), ({"top_p": 0.99}, "ABC.")),
        *(({"top_k": 2, "top_p": 0.9}, "AB"), ({"top_k": 3, "top_p": 0.6}, "AB")),
        ({"top_p": 0.6, "temperature": 0.5}, "A"),
    ],
)
def test_only_the_most_probable_words_are_drawn(changes: dict[str, float], expected: str) -> None:
    captions = {"A": (A,), "B": (B,), "C": (C,), ".": ()}
    assert set(frequencies(1, **changes)) == {captions[one] for one in expected}


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, 1, 1.0), (1, 0, 1e-6), (1e-4, 0, 1.0), (1e-6, 0, 1.0)])
def test_drawing_with_the_least_freedom_is_greedy_search(temperature: float, top_k: int, top_p: float) -> None:
    decoder, pictures = random_decoder(0), random_pictures(15)
    settings = options(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = captions(search(decoder, pictures, options(beam=1)))
    assert captions(search(decoder, pictures, settings, num_captions=2)) == [each * 2 for each in expected]


@pytest.mark.parametrize("width", [1, 3])
def test_a_bonus_brings_a_word_in_once_and_leaves_the_decoders_probability_as_it_is(width: int) -> None:
    decoder, pictures = random_decoder(3), random_pictures(5)
    bonus = torch.zeros(5, V)
    bonus[2, D] = 50.0
    plain = search(decoder, pictures, options(beam=width))
    found = search(decoder, pictures, options(beam=width), bonus=bonus)
    assert captions(found)[:2] + captions(found)[3:] == captions(plain)[:2] + captions(plain)[3:]  # the others' own
    [best] = found[2]
    assert D in best.ids and D not in plain[2][0].ids
    for picture, [hypothesis] in zip(pictures, found, strict=True):
        expected = teacher_forced(decoder, picture, hypothesis.ids, 6)
        assert hypothesis.log_prob == pytest.approx(expected, abs=1e-3)
    assert best.score == pytest.approx(best.log_prob + 50, abs=1e-3)


def test_a_word_that_is_certain_to_be_written_gains_nothing_twice() -> None:
    bonus = torch.zeros(1, V)
    bonus[0, A] = 1.0
    [[best]] = search(Scripted(always({A: 0.4, B: 0.6})), numbered(0), options(beam=1, max_length=3), bonus=bonus)
    assert best.ids == [A, B, B]
