"""The web demo: drop pictures, read captions, see where the model looked. Start it with: streamlit run app.py

What models write and what files are called is shown by `show`, as plain text:
Streamlit's own texts are Markdown, in which a stranger's word could load a picture from elsewhere.
"""

from cli import Parser, UserError  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import streamlit as st
import torch
from PIL import Image

from captioning import Captioner, Encoded, Picture, doubt, prediction
from config import SearchConfig
from data.folders import PICTURE_SUFFIXES
from data.vocab import SPECIALS
from models.hub import is_on_hub
from models.model import Caption
from render.attention import AttentionMaps, heat_map, split_before
from render.caption import display_size
from render.fonts import plain_text
from utils import LANGUAGES, RUNS, as_json, knows_photographs, unique_name

TITLE = "Image captioning"
EXAMPLES = Path(__file__).with_name("docs") / "images" / "examples"
KNOWS = {  # the captioners that come with the project
    "en": "It knows people and dogs best, has seen 1,381 pictures of other things, and none of screens, documents, "
    "drawings or X-rays; it captions them all the same.",
    "zh": "It knows people, dogs and sports, and little else; it captions everything all the same.",
}
STYLE = Path(__file__).with_name("render") / "app.css"


def main() -> None:
    if not st.runtime.exists():
        raise SystemExit("error: this is a page for Streamlit; start it with: streamlit run app.py")
    st.set_page_config(page_title=TITLE, layout="wide")
    st.html(STYLE)  # a path to CSS becomes a style element
    st.title(TITLE)
    with refusals():
        paths = choose_models(find_checkpoints())
        options, num_captions = choose_search(load(paths[0]).model.config.search)
        for path, own in zip(paths, caption_uploads(paths, options, num_captions), strict=True):
            if own:
                of = f" of {name_of(path)}" if len(paths) > 1 else ""
                st.download_button(f"Download captions{of}", as_json(own), "predictions.json", "application/json")


@contextmanager
def refusals() -> Iterator[None]:
    """Show the sentence of a UserError in the place where it ends the work."""
    try:
        yield
    except UserError as error:
        show("refusal", str(error))


def show(kind: str, text: str) -> None:
    """Write a paragraph of plain text, whatever is in it; `kind` is its look in STYLE."""
    st.html(f'<p class="{kind}">{html.escape(plain_text(text))}</p>')


def find_checkpoints() -> list[Path | str]:
    """Return those in `streamlit run app.py -- --checkpoint FILE`, where FILE may be hf://user/name, those of runs, and
    pretrained/; models of shapes last.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--checkpoint", nargs="*", default=[])
    named = [name if is_on_hub(name) else Path(name) for name in parser.parse_options().checkpoint]
    runs = sorted(RUNS.glob("*/checkpoints.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    given = [path for path in LANGUAGES.values() if path.is_file()]
    found = sorted([*runs, *given], key=lambda path: not knows_photographs(path.parent))
    if not named and not found:
        raise UserError(f"there is no trained captioner under {RUNS}/ yet; train one with: python train.py")
    return list(dict.fromkeys([*named, *found]))


def name_of(path: Path | str) -> str:
    if isinstance(path, str):  # on the Hub
        return plain_text(path)
    if path in LANGUAGES.values():
        return "pretrained" if path == LANGUAGES["en"] else "pretrained, Chinese"
    return plain_text((path.parent if path.name == "checkpoints.pth" else path).as_posix())


def choose_models(found: list[Path | str]) -> list[Path | str]:
    """Return the model chosen, and the one that it is to be compared with, where there is one."""
    with st.sidebar:
        first = st.selectbox("Model", found, format_func=name_of)
        introduce(first)
        others = [path for path in found if path != first]
        other = st.selectbox("Compare with", others, None, name_of, placeholder="no other") if others else None
        if other:
            introduce(other)
    return [first, other] if other else [first]


def introduce(path: Path | str) -> None:
    model = load(path).model
    words = len(model.vocab) - len(SPECIALS)
    show("quiet", f"{model.config.decoder.name} on {model.config.encoder.name}, {words:,} words")
    if model.config.data.format == "sample":
        show("quiet", "It learned from drawn shapes and knows no photographs.")
    else:
        known = next((KNOWS[language] for language, given in LANGUAGES.items() if given == path), None)
        show("quiet", known or "It knows what it was trained on, and captions all else the same.")


def stamp(path: Path) -> tuple[str, int]:
    """Return what a model is cached by: its file, and when that was written."""
    return str(path), path.stat().st_mtime_ns if path.is_file() else 0


@st.cache_resource(max_entries=3, show_spinner="Reading the model …", hash_funcs={type(Path()): stamp})
def load(path: Path | str) -> Captioner:
    return Captioner.load(path)


def choose_search(own: SearchConfig) -> tuple[SearchConfig, int]:
    """Return how captions are to be searched, by default in the model's `own` way, and how many."""
    with st.sidebar:
        num_captions = st.slider("Captions", 1, 10, 3)
        beam = st.slider("Beam", 1, max(10, own.beam), own.beam, help="Hypotheses kept while a caption is searched.")
        ranked = "Captions are ranked by log-probability / length to this power; 0 favours short ones."
        penalty = st.slider("Length penalty", 0.0, max(2.0, own.length_penalty), own.length_penalty, 0.05, help=ranked)
        longest = st.slider("Most words", 1, max(50, own.max_length), own.max_length)
        drawn = "Above 0, words are drawn instead of searched: 1 as the model says, less is more careful."
        temperature = st.slider("Temperature", 0.0, max(2.0, own.temperature), own.temperature, 0.05, help=drawn)
    chosen = {"beam": beam, "length_penalty": penalty, "max_length": longest, "temperature": temperature}
    return own.model_copy(update=chosen), num_captions


def caption_uploads(paths: list[Path | str], options: SearchConfig, num_captions: int) -> list[list[dict]]:
    """Show the pictures dropped, each with its captions; return the rows of predictions.json of each model."""
    endings = [ending.removeprefix(".") for ending in sorted(PICTURE_SUFFIXES)]
    files = st.file_uploader("Drop pictures here", endings, accept_multiple_files=True)
    dropped = [(file.file_id, file.name, file.getvalue()) for file in files]
    examples = {path.stem: path for path in sorted(EXAMPLES.glob("*.jpg"))}
    chosen = st.pills("Or try one of these photographs", examples, selection_mode="multi") if examples else []
    dropped += [(name, f"{name}.jpg", examples[name].read_bytes()) for name in chosen]
    rows: list[list[dict]] = [[] for _ in paths]
    taken: dict[str, int] = {}
    for key, own_name, content in dropped:
        name = unique_name(own_name, taken)
        with st.container(border=True), refusals():
            for column, path, own in zip(st.columns(len(paths)), paths, rows, strict=True):
                with column:
                    encoded, model = encode(path, own_name, content), load(path).model
                    torch.manual_seed(model.config.train.seed)  # drawn captions are the same each time
                    usual = model.config.search  # what not every model has
                    of_model = {"consensus": usual.consensus, "classes": usual.classes}
                    own_options = options.model_copy(update=of_model)
                    features = encoded.features.unsqueeze(0)  # (1, D) or (1, L, D)
                    (captions,) = model.generate(features, own_options, num_captions, keep_attention=True)
                    own.append(prediction(name, captions, num_captions))
                    title = f"{name_of(path)}: {name}" if len(paths) > 1 else name
                    panel(f"{key} {path}", title, encoded.shown, captions, len(paths))
    return rows


@st.cache_data(max_entries=100, show_spinner=False, hash_funcs={type(Path()): stamp})
def encode(path: Path | str, name: str, content: bytes) -> Encoded:
    """Return the picture as it is shown, and its features; raises UserError for a broken one."""
    [encoded] = load(path).read([Picture(Path(name), name, name, content=content)])
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


@st.fragment
def panel(key: str, title: str, picture: Image.Image, captions: list[Caption], columns: int) -> None:
    """Show a picture with its captions: beside it, or below it where there are several columns of pictures."""
    best, *others = captions
    attention = AttentionMaps.of(best)
    left, right = st.columns([3, 2], gap="large") if columns == 1 else (st.container(), st.container())
    with right:
        text = st.empty()
        if doubt(best):
            show("doubt", doubt(best))
        word = 0
        if attention and attention.words:
            word = st.slider("Attention, word by word", 0, len(attention.words), key=str(hash((key, best.words))))
        text.html(f'<p class="caption">{marked(best, word)}</p>')
        if others:
            st.html("".join(f'<p class="other">{html.escape(plain_text(each.text))}</p>' for each in others))
    with left:
        enlarged = picture.resize(display_size(picture.size), Image.Resampling.LANCZOS)
        lit = heat_map(enlarged, attention.levels()[word - 1]) if attention and word else enlarged
        st.image(lit, output_format="JPEG")
        show("quiet", title)


def marked(caption: Caption, word: int) -> str:
    """Return a caption as HTML, with this word marked, counted from 1."""
    pieces = [html.escape(piece) for piece in split_before(caption.text, caption.words)]
    if word:
        pieces[word - 1] = re.sub(r"(\s*)(.*)", r"\1<mark>\2</mark>", pieces[word - 1], count=1)
    return "".join(pieces)


main()
