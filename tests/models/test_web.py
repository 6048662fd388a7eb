"""A captioner as a web page, in Chromium: its captions are PyTorch's, it asks nobody, and nothing given to it acts."""

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import HOSTILE, needs_chromium
from exports import exported
from PIL import Image, PngImagePlugin

from benchmarks import web as driver
from captioning import Captioner, Picture, doubt
from cli import UserError
from config import load_config
from data.transforms import Transform, open_picture
from data.vocab import TOKENISERS
from models import export, web
from models.decoder import Decoder, Memory, State
from models.model import DECODERS, Caption, CaptionModel
from models.search import search
from render.attention import AttentionMaps, split_before
from utils import PRETRAINED

for package in ("safetensors", "onnx", "onnxscript", "onnxruntime", "playwright"):
    pytest.importorskip(package)
ROOT = Path(export.__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "images" / "examples").glob("*.jpg"))
CACHE = ROOT / "cache"


@pytest.fixture(scope="session")
def runtime() -> dict[str, bytes]:
    """onnxruntime-web's files, from npm, or from cache/ beside the code once they are there."""
    try:
        return web.fetch_runtime(CACHE)
    except UserError as error:
        pytest.skip(f"needs onnxruntime-web: {error}")


@pytest.fixture(scope="session")
def page_of(
    runtime: dict[str, bytes], call: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Return the checkpoint of a small model with this decoder, and the folder of its page: to read, not to change."""
    out = tmp_path_factory.mktemp("pages")

    def write(name: str) -> tuple[Path, Path]:
        path, graphs = exported(name, tmp_path_factory)
        if not (out / name).is_dir():
            traced = tuple((graphs / each).read_bytes() for each in (export.ENCODER, export.STEP))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "trace", lambda model, facts: traced)
                words = ("--web", "--checkpoint", path, "--out", out / name, "search.beam=4", f"data.cache={CACHE}")
                assert call(export.main, *words) == 0
        return path, out / name

    return write


@pytest.fixture
def opened(page_of: Callable) -> Iterator[tuple[Any, set[str]]]:
    """The page of the attention model, ready, and the hosts that it has asked for something."""
    with driver.serve(page_of("attention")[1]) as address, driver.open_chromium() as (page, hosts):
        page.goto(address)
        driver.wait_until_ready(page)
        yield page, hosts


def pytorch(checkpoint: Path, pictures: list[Path], count: int = 3, **settings: Any) -> list[list[Caption]]:
    captioner = Captioner.load(checkpoint, [f"search.{name}={value}" for name, value in settings.items()])
    model = captioner.model
    train = model.config.train.model_copy(update={"precision": "fp32"})
    model.config = model.config.model_copy(update={"train": train})
    given = [Picture(path, path.name, path.name) for path in pictures]
    [(captioned, failed)] = Captioner(model).caption_pictures(given, None, count, keep_attention=True)
    assert not failed
    return [captions for _, captions in captioned]


def check_equal(shown: list[dict[str, Any]], expected: list[list[Caption]]) -> None:
    for each, captions in zip(shown, expected, strict=True):
        assert [own["text"] for own in each["captions"]] == [caption.text for caption in captions]
        for own, caption in zip(each["captions"], captions, strict=True):
            assert own["logProb"] == pytest.approx(caption.log_prob, abs=0.03)
            assert own["pieces"] == split_before(caption.text, caption.words)
            if maps := AttentionMaps.of(caption):
                levels = maps.levels().reshape(len(caption.words), -1).astype(int)
                assert np.abs(np.array(own["levels"]) - levels).max() <= 2
            if caption.confidence is not None:
                assert own["confidence"] == pytest.approx(caption.confidence, abs=0.005)
                assert own["perhaps"] == list(caption.perhaps)


@needs_chromium
@pytest.mark.parametrize("name", DECODERS)
def test_captions_are_those_of_pytorch_and_nobody_else_is_asked(name: str, drawn: Path, page_of: Callable) -> None:
    checkpoint, folder = page_of(name)
    pictures = sorted((drawn / "images").iterdir())[:6]
    with driver.serve(folder) as address, driver.open_chromium() as (page, hosts):
        page.goto(address)
        device = driver.wait_until_ready(page)
        shown = driver.caption(page, pictures)
        assert "thread" in device and page.evaluate("crossOriginIsolated"), "several threads, on any host"
    expected = pytorch(checkpoint, pictures, beam=4)
    check_equal(shown, expected)
    assert len({captions[0].text for captions in expected}) > 2
    assert [each["name"] for each in shown] == [picture.name for picture in pictures]
    assert hosts == {"localhost"}


@needs_chromium
def test_the_shipped_captioner_writes_what_pytorch_does(
    runtime: dict[str, bytes], call: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = EXAMPLES
    if (ROOT.parent / "shared").is_dir():
        dev = ROOT.parent / "shared" / "flickr8k"
        names = (dev / "Flickr_8k.devImages.txt").read_text().split()[:10]
        pictures = [*EXAMPLES, *(dev / "images" / name for name in names)]
    assert call(export.main, "--web", "--checkpoint", PRETRAINED, "--out", tmp_path, f"data.cache={CACHE}") == 0
    assert "open http://localhost:8000" in capsys.readouterr().out
    graphs = [path for path in tmp_path.iterdir() if path.suffix == ".onnx"]
    assert sum(path.stat().st_size for path in graphs) < 40e6
    with driver.serve(tmp_path) as address, driver.open_chromium() as (page, hosts):
        page.goto(address)
        driver.wait_until_ready(page)
        page.evaluate("count = 1")  # others of a beam differ where two are about as probable, for weights are halves
        shown = driver.caption(page, pictures)
        doubts = page.locator("article .doubt").all_text_contents()
    expected = pytorch(PRETRAINED, pictures, 1)
    check_equal(shown, expected)
    assert doubts == [doubt(captions[0]) for captions in expected]
    assert any(doubts) and hosts == {"localhost"}


SETTINGS: tuple[dict[str, Any], ...] = (
    {"beam": 1},
    {"beam": 7, "length_penalty": 0.0},
    {"max_length": 3},
    {"min_length": 7},
    {"no_repeat_ngram": 1, "min_length": 5},
    {"no_repeat_ngram": 2, "length_penalty": 2.0},
)


BOUNDS = {"beam": (1, 6), "max_length": (1, 9), "min_length": (0, 9), "no_repeat_ngram": (0, 4)}


@needs_chromium
def test_settings_search_as_those_of_pytorch(opened: tuple, page_of: Callable, drawn: Path) -> None:
    page, _ = opened
    pictures = sorted((drawn / "images").iterdir())[:3]
    driver.caption(page, pictures)
    found = []
    for settings in SETTINGS:
        changed = {"beam": 4} | settings
        page.evaluate("changed => { options = {...usual, ...changed}; count = changed.beam; captionAgain(); }", changed)
        shown = driver.finished(page)
        expected = pytorch(page_of("attention")[0], pictures, changed["beam"], **changed)
        check_equal(shown, expected)
        found.append(str([captions[0].text for captions in expected]))
    assert len(set(found)) == len(SETTINGS), "each setting changes something"


class Bigrams(Decoder):
    """A decoder whose next word depends on the last one and on the place alone: `logits` (T, V, V)."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def prepare(self, features: torch.Tensor) -> Memory:
        return (features,)

    def start(self, memory: Memory) -> State:
        return (memory[0],)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, None]:
        place = int(state[0][0])
        return self.logits[place, token], (state[0] + 1,), None


@needs_chromium
def test_search_is_that_of_pytorch_for_any_decoder_and_settings() -> None:
    rng, words = np.random.default_rng(0), 9
    usual = load_config(overrides=["search.consensus=0", "search.classes=0"]).search
    script = """([logits, options, wanted, forbidden, bonus]) => search(
        async (tokens, [place]) => {
            const next = {dims: [1, 1], data: [place.data[0] + 1]};
            return {logits: Float32Array.from(tokens.flatMap(token => logits[place.data[0]][token])), state: [next]};
        },
        [{data: [0]}], options, wanted, forbidden, logits[0].length, bonus)"""
    with driver.open_chromium() as (page, _):
        page.add_script_tag(path=web.PAGE / "captioner.js")
        page.evaluate("globalThis.takeRows = part => part")  # the same for all hypotheses here
        for _ in range(100):
            logits = torch.tensor(rng.normal(0, 2, (8, words, words)), dtype=torch.float32)
            changed = {name: int(rng.integers(low, high)) for name, (low, high) in BOUNDS.items()}
            options = usual.model_copy(update=changed | {"length_penalty": float(rng.choice([0, 0.7, 2]))})
            wanted, forbidden = int(rng.integers(1, 5)), tuple(rng.integers(2, words, rng.integers(0, 2)).tolist())
            bonus = torch.zeros(1, words)
            bonus[0, 5:] = torch.tensor(rng.choice([0, 1.5], words - 5))
            more = bonus if rng.random() < 0.5 else None
            expected = search(Bigrams(logits), torch.zeros(1, 1), options, wanted, forbidden, bonus=more)[0]
            pairs = None if more is None else [[i, bonus[0, i].item()] for i in range(words) if bonus[0, i]]
            found = page.evaluate(script, [logits.tolist(), options.model_dump(), wanted, forbidden, pairs])
            assert [each["ids"] for each in found] == [each.ids for each in expected], options
            for name in ("score", "logProb"):
                own = [getattr(each, name.replace("P", "_p")) for each in expected]
                assert [each[name] for each in found] == pytest.approx(own, abs=1e-4), options


@needs_chromium
def test_sliders_change_the_search_and_little_temperature_draws_the_likeliest_words(
    opened: tuple, page_of: Callable, drawn: Path
) -> None:
    page, _ = opened
    pictures = sorted((drawn / "images").iterdir())[:2]
    driver.caption(page, pictures)

    def slide(**values: float) -> list[list[str]]:
        page.click("#settings")
        for name, value in values.items():
            page.locator(f"input[name={name}]").fill(str(value))
        page.click("dialog .main")
        return [[own["text"] for own in each["captions"]] for each in driver.finished(page)]

    expected = [[each.text for each in captions] for captions in pytorch(page_of("attention")[0], pictures, 5, beam=6)]
    assert slide(count=5, beam=6) == expected
    (greedy,), (other,) = (
        [each.text for each in captions] for captions in pytorch(page_of("attention")[0], pictures, 1, beam=1)
    )
    assert slide(count=2, temperature=0.05) != slide(count=2, temperature=2)
    page.evaluate("options.temperature = 1e-4; captionAgain()")
    assert [[own["text"] for own in each["captions"]] for each in driver.finished(page)] == [[greedy] * 2, [other] * 2]
    first = slide(count=3, temperature=1)
    page.evaluate("captionAgain()")
    assert [[own["text"] for own in each["captions"]] for each in driver.finished(page)] == first, "as drawn before"
    assert all(len(set(texts)) > 1 for texts in first)


@needs_chromium
def test_pictures_are_resized_to_the_bit_as_in_training() -> None:
    with driver.open_chromium() as (page, _):
        page.add_script_tag(path=web.PAGE / "captioner.js")

        def squeeze(content: bytes, size: int, interpolation: str) -> np.ndarray:
            script = """async ([content, size, bicubic]) => {
                const file = await (await fetch("data:;base64," + content)).blob();
                const pixels = squeeze(await openPicture(file), size, bicubic);
                return Array.from(pixels, level => String.fromCharCode(level)).join("");
            }"""
            words = [base64.b64encode(content).decode(), size, interpolation == "bicubic"]
            return np.frombuffer(page.evaluate(script, words).encode("latin-1"), np.uint8).reshape(3, size, size)

        rng, known = np.random.default_rng(0), "AVX" in torch.backends.cpu.get_cpu_capability()
        sizes = [
            (500, 375),
            (1, 1),
            (1, 90),
            (90, 1),
            (31, 70),
            (95, 96),
            (97, 95),
            (96, 96),
            (12, 300),
            (4200, 1001),
        ]
        for size in sizes:
            picture = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size)
            noise = rng.integers(-5, 6, (size[1], size[0], 3))
            picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
            for interpolation in ("bilinear", "bicubic"):
                content = as_file(picture, "PNG", compress_level=1)
                trained_on = Transform(96, interpolation=interpolation).resize(picture).numpy()
                off = np.abs(squeeze(content, 96, interpolation).astype(int) - trained_on)
                assert off.max() <= (0 if known else 1), (size, interpolation)

        photo = Image.open(EXAMPLES[0]).convert("RGB").resize((123, 77))
        exif = Image.Exif()
        exif[0x112] = 6  # lies on its side
        clear = photo.copy()
        clear.putalpha(Image.fromarray(rng.integers(0, 256, (77, 123), dtype=np.uint8)))
        files = [as_file(photo, "JPEG", exif=exif), as_file(photo, "JPEG", progressive=True), as_file(clear, "PNG")]
        files += [as_file(photo.convert(mode), "PNG") for mode in ("L", "P", "1", "LA")]
        darker = PngImagePlugin.PngInfo()
        darker.add(b"gAMA", (100_000).to_bytes(4, "big"))  # which a browser would show, and Pillow does not read
        files.append(as_file(photo, "PNG", pnginfo=darker))
        for number, content in enumerate(
            [*files, as_file(photo, "WEBP"), as_file(photo, "BMP"), as_file(photo, "GIF")]
        ):
            trained_on = Transform(96).resize(open_picture("a picture", content)).numpy()
            assert np.abs(squeeze(content, 96, "bilinear").astype(int) - trained_on).max() <= 1, number


def as_file(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@needs_chromium
def test_words_are_joined_as_each_language_does() -> None:
    words = {
        "en": ["a", "dog", "'s", "n't", "don", "'", "'x-y", "été", "'été", "n'tx", "t-shirt", "3"],
        "zh-characters": ["一", "件", "red", "t恤", "恤t", "é", "3", "。", "🙂", "d'or"],
        "unicode": ["สวัสดี", "ก", "ไ", "dog", "犬", "が", "ー", "々", "မြ", "e\u0301", "한국", "'", "3"],
    }
    rng = np.random.default_rng(0)
    with driver.open_chromium() as (page, _):
        page.add_script_tag(path=web.PAGE / "captioner.js")
        for language, known in words.items():
            for _ in range(60):
                caption = [str(word) for word in rng.choice(known, rng.integers(0, 9))]
                joined = TOKENISERS[language]().join(caption)
                assert page.evaluate("([words, language]) => join(words, language)", [caption, language]) == joined
                pieces = page.evaluate("([text, words]) => splitBefore(text, words)", [joined, caption])
                assert pieces == split_before(joined, caption)


@needs_chromium
def test_it_works_without_a_network_after_the_first_visit_and_takes_a_new_export(
    page_of: Callable, drawn: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(page_of("lstm")[1], tmp_path / "page"))
    picture = drawn / "images" / "00.jpg"
    with driver.serve(folder) as address, driver.open_chromium() as (page, _):
        page.goto(address)
        driver.wait_until_ready(page)
        before = driver.caption(page, [picture])
        page.context.set_offline(True)
        page.goto(address)
        driver.wait_until_ready(page)
        assert driver.caption(page, [picture]) == before

        page.context.set_offline(False)
        worker, config = folder / "service-worker.js", json.loads((folder / "captioner.json").read_text())
        worker.write_text(re.sub('VERSION = "[^"]*"', 'VERSION = "other"', worker.read_text()))
        (folder / "captioner.json").write_text(json.dumps(config | {"about": "another model"}))
        page.goto(address)  # finds the new one, and shows the old one, or, where that is found soon enough, the new one
        driver.wait_until_ready(page)
        assert page.inner_text("#about") in (config["about"], "another model")
        found = "(await navigator.serviceWorker.getRegistration()).waiting"
        driver.wait(page, f"{found} || (await caches.keys()).join() === 'other'")
        page.goto(address)
        driver.wait_until_ready(page)
        assert page.inner_text("#about") == "another model"
        assert page.evaluate("caches.keys()") == ["other"], "nothing is left of the old one"


@needs_chromium
def test_from_a_disk_it_asks_for_its_folder(page_of: Callable, drawn: Path) -> None:
    checkpoint, folder = page_of("lstm")
    picture = drawn / "images" / "00.jpg"
    with driver.open_chromium() as (page, _):
        page.goto((folder / "index.html").as_uri())
        driver.wait(page, "!document.querySelector('#folder').hidden")
        assert "choose its folder here, or serve it" in page.inner_text("output")
        page.set_input_files("#folder input", folder)
        assert driver.wait_until_ready(page) == "one thread"
        check_equal(driver.caption(page, [picture]), pytorch(checkpoint, [picture], beam=4))


@needs_chromium
def test_names_and_captions_that_would_act_are_shown_as_they_are(
    page_of: Callable, drawn: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(page_of("attention")[1], tmp_path / "page"))
    config = json.loads((folder / "captioner.json").read_text())
    words = [*config["words"][:4], *(HOSTILE[number % 4] + str(number) for number in range(len(config["words"]) - 4))]
    (folder / "captioner.json").write_text(json.dumps(config | {"words": words, "about": HOSTILE[1]}))
    content = (drawn / "images" / "00.jpg").read_bytes()
    names = [f"{text.replace('/', '_')}.jpg" for text in HOSTILE] + ["a.jpg", "a.jpg", "=1+1.jpg"]
    files = [{"name": name, "mimeType": "image/jpeg", "buffer": content} for name in names]
    files.append({"name": "<b>no picture</b>.jpg", "mimeType": "image/jpeg", "buffer": b"<svg onload=alert(1)>"})
    with driver.serve(folder) as address, driver.open_chromium() as (page, hosts):
        page.goto(address)
        driver.wait_until_ready(page)
        *shown, broken = driver.caption(page, files)
        captions = page.locator("p.caption").all_inner_texts()
        assert page.title() == "Image captioning" and page.inner_text("#about") == HOSTILE[1]
        assert captions[0].split() == shown[0]["captions"][0]["text"].split() and HOSTILE[0][:8] in str(captions[:4])
        assert len({each["name"].lower() for each in shown}) == len(names) and "a-2.jpg" in [n["name"] for n in shown]
        assert page.locator("main :is(script, iframe, b, svg), main img[onerror]").count() == 0
        assert hosts == {"localhost"}
    assert broken["error"] == "this browser cannot read it as a picture; take a JPEG, PNG or WebP"
    assert captions[-1] == f"<b>no picture</b>.jpg has no caption: {broken['error']}."


@needs_chromium
def test_captions_are_copied_downloaded_and_lit_word_by_word(opened: tuple, drawn: Path) -> None:
    page, _ = opened
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    files = [
        {"name": name, "mimeType": "image/jpeg", "buffer": (drawn / f"images/{number:02}.jpg").read_bytes()}
        for number, name in enumerate(['a "1", b.jpg', "two\n.jpg"])
    ]
    shown = driver.caption(page, files)
    first, second = (each["captions"] for each in shown)

    def download(kind: str) -> str:
        with page.expect_download() as started:
            page.select_option("#download", kind)
        return Path(started.value.path()).read_text(encoding="utf-8")

    one, two = (each["name"] for each in shown)
    text = f"{one}\t{first[0]['text']}\n{two.replace(chr(10), ' ')}\t{second[0]['text']}\n"
    assert download("txt") == text
    page.click("#copy")
    driver.wait(page, "document.querySelector('#copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == text
    header, *rows = csv.reader(io.StringIO(download("csv"), newline=""))
    assert header == ["image", "caption", "log_prob"]
    pairs = [(each["name"], own["text"]) for each in shown for own in each["captions"]]
    assert [(name, own) for name, own, _ in rows] == pairs
    predictions = json.loads(download("json"))
    assert [(row["image_id"], row["caption"]) for row in predictions] == [
        (one, first[0]["text"]),
        (two, second[0]["text"]),
    ]
    assert [own["caption"] for own in predictions[0]["captions"]] == [own["text"] for own in first]

    word = page.locator("article").first.locator(".word").nth(1)
    word.hover()
    overlay = page.locator("article").first.locator("canvas")
    assert overlay.count() == 1 and "active" in (word.get_attribute("class") or "")
    seen = page.evaluate("[...overlay.getContext('2d').getImageData(0, 0, overlay.width, overlay.height).data]")
    opacity = np.array(seen).reshape(64, 64, 4)[:, :, 3]
    corners = [opacity[0, 0], opacity[0, -1], opacity[-1, 0], opacity[-1, -1]]  # those of the four regions
    order = sorted(range(4), key=lambda region: -first[0]["levels"][1][region])
    assert sorted(range(4), key=lambda region: corners[region]) == order, "darkest where the model looked least"
    page.click("#clear")
    assert page.locator("article, canvas").count() == 0


@needs_chromium
def test_pictures_are_dropped_pasted_and_tried(opened: tuple, page_of: Callable) -> None:
    page, hosts = opened
    events = {"dropped": "DragEvent('drop', {dataTransfer", "pasted": "ClipboardEvent('paste', {clipboardData"}
    for kind, event in events.items():
        script = f"""async ([example, name]) => {{
            const given = new DataTransfer();
            given.items.add(new File([await (await fetch(example)).blob()], name));
            dispatchEvent(new {event}: given, cancelable: true}}));
        }}"""
        page.evaluate(script, [f"examples/{EXAMPLES[0].name}", f"{kind}.jpg"])
    shown = driver.finished(page)
    assert [each["name"] for each in shown] == ["pasted.jpg", "dropped.jpg"], "the newest first"
    page.click("#clear")
    page.click(f"#examples img[alt='{EXAMPLES[0].name}']")
    driver.wait(page, "pictures.length")
    shown += driver.finished(page)
    assert shown[-1]["name"] == EXAMPLES[0].name
    for each in shown:
        check_equal([each], pytorch(page_of("attention")[0], EXAMPLES[:1], beam=4))
    assert page.locator("article figure img").get_attribute("src").startswith("blob:") and hosts == {"localhost"}


def test_what_is_fetched_is_what_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    place = tmp_path / "registry" / "onnxruntime-web" / "-" / web.RUNTIME
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri())
    with refused("cannot fetch", f"put that file at {tmp_path / 'cache' / web.RUNTIME}"):
        web.fetch_runtime(tmp_path / "cache")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with refused("sha512", str(tmp_path / "cache")):
        web.fetch_runtime(tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "nothing is kept of it"


def test_a_page_is_not_poured_into_a_folder_of_other_files(
    call: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("somebody's")
    assert call(export.main, "--web", "--checkpoint", PRETRAINED, "--out", tmp_path) == 2
    assert f"{tmp_path} holds other files; name a folder of its own with --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_page_is_of_what_knows_photographs(
    call: Callable,
    tiny_model: CaptionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///nowhere")
    asked: list[Path] = []

    def load(path: str, overrides: list[str]) -> CaptionModel:
        asked.append(Path(path))
        return tiny_model

    monkeypatch.setattr(export, "load_model", load)
    for name, data in (("photographs", "auto"), ("drawings", "sample")):
        assert call(export.main, "--web") == 2, "there is no runtime"
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoints.pth").touch()
        (tmp_path / "runs" / name / "config.yaml").write_text(f"data: {{format: {data}}}")
    assert call(export.main, "--web") == call(export.main, "--web", "--run", "drawings") == 2
    own = Path("runs/photographs/checkpoints.pth")
    assert asked == [PRETRAINED, own, own, Path("runs/drawings/checkpoints.pth")]
    said = capsys.readouterr()
    assert "error: cannot fetch file:///nowhere" in said.err
    assert said.out.count("this is the newest run; --checkpoint ") == 2, "where it was not asked for by name"


def test_a_kept_runtime_needs_no_network(runtime: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///nowhere")
    assert web.fetch_runtime(CACHE) == runtime
    assert b"MIT License" in runtime["runtime/LICENSE.txt"] and b"1.30.0" in runtime["runtime/LICENSE.txt"]
