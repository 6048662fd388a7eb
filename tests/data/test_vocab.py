"""One tokeniser for everything, ids always in range, and no downloaded data."""

import os
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from dataset_files import run
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data import vocab
from data.vocab import EOS, PAD, SOS, SPECIALS, UNK, EnglishTokeniser, Vocabulary, build_vocab
from utils import load_checkpoint

ROOT = Path(vocab.__file__).parents[1]
TOKENISE = EnglishTokeniser()
SENTENCES = [
    "A dog's toy isn't in the child's hand .",
    "Two men , one with a T-shirt , ride 3 horses .",
    'A sign reads " no-parking " ; people can\'t park here !',
    "They're at Joe's - the boys' room -- and it's 5:30 .",
]
FAMILIAR = build_vocab(SENTENCES, min_count=1)


def test_in_the_mirror_left_is_right_and_all_else_what_it_is() -> None:
    words = ["left", "right", "bright", "left-hand", "right-hand", "左边", "右边", "leftover", "左右"]
    others = ["right", "left", "bright", "right-hand", "left-hand", "右边", "左边", "leftover", "左右"]
    known = Vocabulary([*SPECIALS, *words])
    assert [known.words[i] for i in known.mirrored()] == [*SPECIALS, *others]


def test_words_seen_too_rarely_are_left_out(refused: Callable) -> None:
    built = build_vocab(["a dog", "A dog runs", "a cat"], min_count=2)
    assert built.words[4:] == ["a", "dog"]
    assert built.numericalize("a cat") == [built.numericalize("a")[0], UNK]
    assert build_vocab(reversed(SENTENCES), 1).words == FAMILIAR.words  # in an order of their own
    with refused("5 times", "data.min_count"):
        build_vocab(["a dog"], min_count=5)


def test_training_takes_words_from_train_captions_only(archive: Path) -> None:
    captions = archive / "captions.csv"
    captions.write_text(captions.read_text() + "00.jpg,trainword\n08.jpg,valword\n10.jpg,testword\n")
    assert run(train.main, *TINY, "train.epochs=1") == 0
    words = load_checkpoint("runs/flickr8k/checkpoints.pth")["vocabulary"]["words"]
    assert {"trainword", "valword", "testword"} & set(words) == {"trainword"}


@given(st.text() | st.lists(st.sampled_from([*SPECIALS, "dog"])).map(" ".join))
@settings(deadline=None, derandomize=True)
def test_ids_are_never_out_of_range_nor_those_of_special_words(text: str) -> None:
    assert all(i == UNK or len(SPECIALS) <= i < len(FAMILIAR) for i in FAMILIAR.numericalize(text))


@pytest.mark.parametrize("caption", SENTENCES)
def test_known_words_survive_encoding_and_decoding(caption: str) -> None:
    ids = FAMILIAR.numericalize(caption)
    assert UNK not in ids
    assert FAMILIAR.numericalize(FAMILIAR.decode([SOS, *ids, EOS])) == ids


def test_decoding_stops_at_eos_and_writes_no_special_word() -> None:
    a, unknown, dog = FAMILIAR.numericalize("A zebra dog .")
    assert unknown == UNK
    assert FAMILIAR.decode([SOS, PAD, a, UNK, dog, EOS, a, a]) == "a dog"
    assert FAMILIAR.decode([EOS]) == FAMILIAR.decode([]) == ""


def test_contractions_and_possessives_join_back() -> None:
    for text in ("a dog's toy isn't here", "they're at joe's", "he can't", "we'll go and i've gone", "it's red"):
        assert TOKENISE.join(TOKENISE(text)) == text


def test_case_and_punctuation_are_dropped() -> None:
    assert TOKENISE('A DOG , runs ; " fast " : ( now ) [ x ] - ... -- ? !') == ["a", "dog", "runs", "fast", "now", "x"]


def test_no_nltk_data_is_needed(tmp_path: Path) -> None:
    check = (
        "import nltk, nltk.data\n"
        "def refuse(*words, **options): raise LookupError('NLTK data was asked for')\n"
        "nltk.data.find = nltk.data.load = nltk.download = refuse\n"
        "from data.vocab import build_vocab\n"
        "words = build_vocab([\"A dog isn't. Here! Mr. Smith's.\"], 1)\n"
        "assert words.decode(words.numericalize('a dog')) == 'a dog'\n"
    )
    environment = os.environ | {"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize(
    "state",
    [
        {"words": ["a", "dog"]},
        {"words": ["<sos>", "<pad>", "<eos>", "<unk>", "a"]},
        {"words": [*SPECIALS, "a", "dog", "a"]},
        {"words": [*SPECIALS, "a"], "language": "klingon"},
    ],
)
def test_a_damaged_word_list_is_refused(state: dict[str, Any], refused: Callable) -> None:
    with refused("vocabulary"):
        Vocabulary(**state)


@pytest.mark.usefixtures("java")
def test_the_tokeniser_agrees_with_the_one_papers_score_with() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(SENTENCES)})
    assert [" ".join(TOKENISE(text)) for text in SENTENCES] == [theirs[i][0] for i in range(len(SENTENCES))]


CHINESE = {
    "一只狗，在草地上。": ("一 只 狗 ， 在 草 地 上", "一只 狗 ， 在 草地 上"),
    "穿Ｔ恤的２个男人 on the Beach！！": ("穿 t 恤 的 2 个 男 人 on the beach", "穿 t 恤 的 2 个 男人 on the beach"),
    "两只猫🐱👨‍👩‍👧🇨🇳好👍🏽": ("两 只 猫 🐱 👨‍👩‍👧 🇨🇳 好 👍🏽", "两只 猫 🐱 👨‍👩‍👧 🇨🇳 好 👍🏽"),
    "don’t 한국 カメラ3.5米《球》": ("don’t 한국 カ メ ラ 3.5 米 《 球 》", "don’t 한국 カ メ ラ 3.5 米 《 球 》"),
    "。": ("", ""),
}


@pytest.mark.parametrize(("place", "language"), [(0, "zh-characters"), (1, "zh")])
@pytest.mark.parametrize("text", CHINESE)
def test_chinese_is_split_into_characters_or_words_and_joined_without_blanks(
    text: str, place: int, language: str
) -> None:
    tokeniser = vocab.TOKENISERS[language]()
    words = tokeniser(text)
    assert words == CHINESE[text][place].split()  # all else stays whole
    joined = tokeniser.join(words)
    assert tokeniser(joined) == words
    assert joined.count(" ") == (2 if "Beach" in text else "한" in text)  # between foreign words alone


def test_a_vocabulary_remembers_how_chinese_is_split() -> None:
    captions = ["一只狗在草地上。", "一只猫"]
    for language, first in (("zh", "一只"), ("zh-characters", "一")):
        built = build_vocab(captions, 1, language)
        again = pickle.loads(pickle.dumps(Vocabulary(built.words, built.language)))
        assert first in again.words
        assert again.decode(again.numericalize(captions[0])) == "一只狗在草地上"


OF_LANGUAGES = {
    "Thai": ("สุนัขสีน้ำตาลกำลังวิ่ง", ["สุ", "นั", "ข", "สี", "น้", "ำ", "ต", "า", "ล", "ก", "ำ", "ลั", "ง", "วิ่", "ง"]),
    "Japanese": ("犬が草の上を走っています。", list("犬が草の上を走っています")),
    "Hindi": ("एक भूरा कुत्ता घास पर दौड़ रहा है।", ["एक", "भूरा", "कुत्ता", "घास", "पर", "दौड़", "रहा", "है"]),
    "Arabic": ("كلب بني يركض على العشب", ["كلب", "بني", "يركض", "على", "العشب"]),
    "Hebrew": ("כלב חום רץ.", ["כלב", "חום", "רץ"]),
    "Korean": ("갈색 개가 달린다", ["갈색", "개가", "달린다"]),
    "Russian": ("Собака бежит по траве!", ["собака", "бежит", "по", "траве"]),
    "German": ("Ein Hündchen läuft, sehr schnell.", ["ein", "hündchen", "läuft", "sehr", "schnell"]),
    "French": ("L'herbe est-elle verte ?", ["l'herbe", "est-elle", "verte"]),
    "mixed": ("Tシャツの犬 2匹", ["t", *"シャツの犬", "2", "匹"]),
}


@pytest.mark.parametrize("language", OF_LANGUAGES)
def test_any_language_is_cut_into_words_or_characters_and_joined_again(language: str) -> None:
    text, expected = OF_LANGUAGES[language]
    tokeniser = vocab.TOKENISERS["unicode"]()
    words = [unicodedata.normalize("NFC", word) for word in expected]
    assert tokeniser(text) == tokeniser(unicodedata.normalize("NFD", text)) == words
    assert tokeniser(tokeniser.join(words)) == words
    if language in ("Thai", "Japanese"):
        assert " " not in tokeniser.join(words)


def test_what_is_too_long_is_no_word() -> None:
    vocab = build_vocab(["a dog", "a " + "x" * 201, "a " + "y" * 200], 1)
    assert vocab.words[4:] == ["a", "dog", "y" * 200]
