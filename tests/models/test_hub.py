"""Captioners on the Hub, by its own client and a small server: pushed, loaded, cached, and refused where bad."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from captioners import save_captioner
from hub_server import READER, WRITER, Files, Hub, serve_hub

import calibrate
import evaluate
import inference_visualize
import train
from captioning import Captioner
from cli import options
from config import Config, load_config
from models import consensus, export, hub, publish
from models.checkpoint import load_model
from models.confidence import INPUTS, Confidence
from models.consensus import Consensus
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint

pytest.importorskip("huggingface_hub", reason="the Hub needs requirements-extras.txt")
safetensors = pytest.importorskip("safetensors.torch", reason="the Hub needs requirements-extras.txt")
ALEXNET = ("encoder.name=alexnet", "encoder.image_size=96", "search.max_length=7", "search.min_length=3")
PRIVATE = ("data.root=/home/private/archive", "data.cache=/home/private/cache", "train.num_workers=7")


def forget_client() -> None:
    """Let huggingface_hub be imported anew: it reads its settings from the environment when it is."""
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, serve_hub() as running:
        settings = {"HF_ENDPOINT": running.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for name, value in settings.items():
            patch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        forget_client()
        yield running
        forget_client()


@pytest.fixture
def there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, empty, for somebody who may write."""
    server.repositories.clear()
    server.requests.clear()
    server.broken = 0
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return server


@pytest.fixture(scope="module")
def trained(drawn: Path, tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all that one can hold: backbone, consensus, calibration, scores; and private settings."""
    path = tmp_path_factory.mktemp("trained") / "checkpoints.pth"
    config = tiny_config(*ALEXNET, *PRIVATE, "decoder.name=attention", "search.beam=2", "search.consensus=5")
    model = save_captioner(path, config, drawn / "images")
    words = torch.tensor([model.vocab.numericalize(text) for text in ("a small red circle", "a large blue star")])
    size = model.encoder.feature_shape[-1]
    Consensus(torch.eye(2, size), torch.zeros(size), words, torch.arange(2)).save(path.with_name(consensus.FILE))
    confidence = Confidence((0.5,) * len(INPUTS), -0.5).state()
    save_checkpoint(path, load_checkpoint(path) | {"scores": {"val_cider": 12.5}, "confidence": confidence})
    return path


@pytest.fixture(scope="module")
def files(trained: Path) -> Files:
    """What a repository with this captioner holds."""
    checkpoint = publish.publishable(load_model(trained), {"val_cider": 12.5})
    return hub.separate(checkpoint) | {"README.md": b"---\nlicense: mit\n---\n"}


@pytest.fixture
def pictures(drawn: Path) -> list[Path]:
    return sorted((drawn / "images").iterdir())[:4]


def test_a_model_that_was_pushed_is_loaded_again_with_all_it_had(
    there: Hub, trained: Path, pictures: list[Path], call: Callable[..., int], tmp_path: Path
) -> None:
    own = load_model(trained)
    assert own.push_to_hub("me/all") == f"{there.endpoint}/me/all"
    assert there.repositories["me/all"].files().keys() == {"model.safetensors", "config.json", "README.md"}
    assert call(publish.main, trained, tmp_path / "given.pth") == 0
    found, given = CaptionModel.from_pretrained("me/all"), load_model(tmp_path / "given.pth")
    assert not found.training
    for name, tensor in given.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.config == given.config and found.transform == given.transform
    assert found.vocab.words == given.vocab.words and found.encoder.identity == given.encoder.identity
    assert found.confidence == own.confidence and found.consensus is not None
    everything = [Captioner(model).caption(pictures) for model in (found, given)]
    assert everything[0] == everything[1] and len(set(everything[0])) > 1
    rest = json.loads(there.repositories["me/all"].files()["config.json"])
    assert "/home/private" not in json.dumps(rest) and rest["config"]["data"]["root"] == "archive"


def test_the_card_tells_the_hub_what_kind_of_model_it_is_and_people_how_to_use_it(there: Hub, trained: Path) -> None:
    load_model(trained).push_to_hub("me/card")
    card = there.repositories["me/card"].files()["README.md"].decode()
    about = yaml.safe_load(card.split("---\n")[1])
    assert (about["pipeline_tag"], about["language"], "license" in about) == ("image-to-text", "en", False)
    assert "image-captioning" in about["tags"]
    assert "--checkpoint hf://me/card" in card and "# card" in card and "`model.safetensors` has" in card


def test_publishing_writes_to_the_hub_with_a_card_of_ones_own(
    there: Hub, trained: Path, call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.md").write_text("my own words")
    assert call(publish.main, trained, "hf://me/own", "--private", "--card", tmp_path / "card.md", "search.beam=4") == 0
    assert f"wrote {there.endpoint}/me/own" in capsys.readouterr().out
    repository = there.repositories["me/own"]
    assert repository.private and repository.files()["README.md"] == b"my own words"
    assert CaptionModel.from_pretrained("me/own").config.search.beam == 4
    assert call(publish.main, trained, "hf://me/own") == 0
    assert repository.files()["README.md"] == b"my own words"  # what is there stays, as beside a file
    assert json.loads(repository.files()["config.json"])["scores"] == {"val_cider": 12.5}

    assert call(publish.main, "hf://me/own", tmp_path / "back.pth") == 0
    assert load_checkpoint(tmp_path / "back.pth")["scores"] == {"val_cider": 12.5}


def test_a_card_that_lies_beside_the_checkpoint_goes_with_it(
    there: Hub, trained: Path, call: Callable[..., int], tmp_path: Path
) -> None:
    assert call(publish.main, trained, tmp_path / "mine.pth") == 0
    (tmp_path / "mine.md").write_text("what only I know")
    assert call(publish.main, tmp_path / "mine.pth", "hf://me/beside") == 0
    assert there.repositories["me/beside"].files()["README.md"] == b"what only I know"


def test_a_revision_is_a_branch_or_a_commit(there: Hub, trained: Path) -> None:
    model = load_model(trained)
    model.push_to_hub("me/two")
    model.config = model.config.model_copy(
        update={"search": model.config.search.model_copy(update={"beam": 7, "max_length": 9})}
    )
    model.push_to_hub("me/two", revision="v2")
    sha = there.repositories["me/two"].branches["main"]
    assert CaptionModel.from_pretrained("me/two").config.search.beam == 2
    assert CaptionModel.from_pretrained("me/two", revision="v2").config.search.beam == 7
    assert load_model(f"hf://me/two@{sha}").config.search.beam == 2
    assert load_model("hf://me/two@v2", ["search.beam=3"]).config.search.beam == 3


def test_every_script_takes_a_captioner_from_the_hub(
    there: Hub,
    trained: Path,
    files: Files,
    archive: Path,
    call: Callable[..., int],
) -> None:
    there.add("me/scripts", files)
    name, picture, scored = "hf://me/scripts", archive / "images/11.jpg", ("--split", "val", "--tokeniser", "words")
    assert call(publish.main, trained, "given.pth") == 0
    for checkpoint, out in ((name, "a"), ("given.pth", "b")):
        assert call(inference_visualize.main, picture, "--checkpoint", checkpoint, "--out", out) == 0
        assert call(evaluate.main, "--checkpoint", checkpoint, "--out", out, *scored) == 0
    for file in ("predictions.json", "predictions-val.json"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    assert json.loads(Path("a/scores-val.json").read_text())["checkpoint"] == name
    start = ("train.start=hf://me/scripts", "run=on", "train.epochs=1", "train.batch_size=20", "data.min_count=1")
    small = ("decoder.embed_size=16", "decoder.hidden_size=32", "decoder.name=attention", *ALEXNET[:2])
    assert call(train.main, *start, *small, "encoder.weights=null", "train.precision=fp32") == 0
    assert load_checkpoint("runs/on/checkpoints.pth")["vocabulary"] == load_checkpoint("given.pth")["vocabulary"]
    assert call(evaluate.main, "--checkpoint", name, "--checkpoint", "given.pth", "--out", "c", *scored) == 0
    assert json.loads(Path("c/scores-val.json").read_text())["checkpoint"] == f"{name}, given.pth"


def test_what_would_be_written_beside_a_checkpoint_needs_a_place(
    there: Hub, archive: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for main in (inference_visualize.main, evaluate.main, export.main):
        assert call(main, "--checkpoint", "hf://me/scripts") == 2
        assert "belongs to no run; add --out FOLDER" in capsys.readouterr().err
    assert call(calibrate.main, "--checkpoint", "hf://me/scripts") == 2
    refusal = "hf://me/scripts is only read; make a file of it to calibrate: python -m models.publish hf://me/scripts"
    assert refusal in capsys.readouterr().err
    assert not there.requests


def test_the_second_time_needs_no_download_and_no_network(
    there: Hub, files: Files, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    there.add("me/cached", files)
    first = load_model("hf://me/cached")
    there.requests.clear()
    assert torch.equal(load_model("hf://me/cached").feature_mean, first.feature_mean)
    assert not [request for request in there.requests if "/resolve/" in request and request.startswith("GET")]
    there.broken = 503
    load_model("hf://me/cached")
    with refused("answered 503 about hf://me/other", "try again later"):
        load_model("hf://me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there.requests.clear()
    load_model("hf://me/cached")
    with refused("hf://me/other is not in the cache", "HF_HUB_OFFLINE"):
        load_model("hf://me/other")
    assert not there.requests


def test_without_a_network_one_sentence_says_so(there: Hub, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with refused("cannot reach http://127.0.0.1:9 for hf://me/far", "check the network"):
        load_model("hf://me/far")
    with refused("cannot reach http://127.0.0.1:9", "check the network"):
        hub.upload({}, "hf://me/far")


def test_a_private_or_gated_captioner_is_for_those_who_may(
    there: Hub, files: Files, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.add("me/private", files, private=True)
    there.add("me/gated", files, gated=True)
    monkeypatch.delenv("HF_TOKEN")
    with refused("there is no hf://me/private, or it is private", "hf auth login"):
        load_model("hf://me/private")
    with refused("hf://me/gated is gated", f"{there.endpoint}/me/gated", "hf auth login"):
        load_model("hf://me/gated")
    CaptionModel.from_pretrained("me/private", token=READER)
    monkeypatch.setenv("HF_TOKEN", READER)
    load_model("hf://me/gated")


def test_only_who_may_write_pushes_and_never_over_another_model(
    there: Hub, trained: Path, files: Files, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(trained)
    other = {"config.json": b'{"architectures": ["Blip"]}', "model.safetensors": b"theirs"}
    for name, content in (("a", other), ("b", {"model.safetensors": b"theirs"}), ("c", {"config.json": b"[]"})):
        repository = there.add(f"me/{name}", content)
        with refused(f"hf://me/{name}"):
            model.push_to_hub(f"me/{name}")
        assert repository.files() == content
    for token in (READER, None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with refused("there is no permission to write hf://me/new", "hf auth login"):
            model.push_to_hub("me/new")
    assert "me/new" not in there.repositories


@pytest.mark.parametrize(
    "name", ["hf://", "hf://me", "hf:me/x", "hf:/me/x", "hf://me/x/y", "hf://me/x@", "hf://mé/x@1 2"]
)
def test_a_name_of_another_form_is_explained_before_anything_is_asked(
    name: str, there: Hub, archive: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--checkpoint", name], [name]):
        assert call(options.evaluate, *words) == 2
        assert "write hf://user/name or hf://user/name@revision" in capsys.readouterr().err
    assert call(inference_visualize.main, archive / "images/00.jpg", "--checkpoint", name) == 2
    assert "write hf://user/name" in capsys.readouterr().err
    assert not there.requests


@pytest.mark.parametrize("name", ["hf://me/none", "hf://me/here@v9", "hf://me/a--b", "hf://-/x"])
def test_what_is_not_there_is_named(name: str, there: Hub, files: Files, refused: Callable) -> None:
    there.add("me/here", files)
    with refused(name.partition("@")[0]):
        load_model(name)


def test_without_the_extra_one_sentence_names_it(
    archive: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    sentence = "hf://me/x needs huggingface_hub; install it: pip install -r requirements-extras.txt"
    assert call(options.evaluate, "--checkpoint", "hf://me/x") == 2
    assert sentence in capsys.readouterr().err
    assert call(publish.main, "nowhere.pth", "hf://me/x") == 2
    assert sentence in capsys.readouterr().err


OTHER_MODELS = {
    "no_files": {},
    "only_a_pickle": {"pytorch_model.bin": b"cos\nsystem\n", "config.json": b"{}"},
    "a_checkpoint": {"checkpoints.pth": b"PK"},
    "no_config": {"model.safetensors": b"x"},
    "another_config": {"model.safetensors": b"x", "config.json": b'{"architectures": ["Blip"]}'},
    "an_older_format": {"model.safetensors": b"x", "config.json": b'{"format": "image-captioning/1"}'},
    "no_json": {"model.safetensors": b"x", "config.json": b"\x80\x04"},
    "a_list": {"model.safetensors": b"x", "config.json": b"[" * 100_000},
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_repository_with_something_else_is_refused_and_its_pickles_are_not_even_downloaded(
    kind: str, there: Hub, refused: Callable
) -> None:
    there.add(f"me/{kind}", OTHER_MODELS[kind])
    with refused(f"hf://me/{kind}", "no captioner of this project", "name another one"):
        load_model(f"hf://me/{kind}")
    asked = [request for request in there.requests if "/resolve/" in request]
    assert not [request for request in asked if not request.endswith((".safetensors", "config.json"))]


def test_files_beyond_their_limits_are_neither_downloaded_nor_read(
    there: Hub, files: Files, refused: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there.add("me/large", files | {"config.json": files["config.json"] + b" " * 2**24})
    with refused("config.json of hf://me/large has 16 MiB, and at most 16"):
        load_model("hf://me/large")
    assert not [request for request in there.requests if "/resolve/" in request]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(hub.LIMITS, "model.safetensors", 1000)
    with refused("model.safetensors of here has"):
        hub.read_folder(tmp_path, "here")


def changed(files: Files, **parts: Any) -> Files:
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | parts).encode()}


HOSTILE_PARTS: dict[str, dict[str, Any]] = {
    "config_is_text": {"config": "x"},
    "config_has_a_list": {"config": {"data": []}},
    "unknown_setting": {"config": {"data": {"evil": 1}}},
    "wrong_type": {"config": {"search": {"beam": "many"}}},
    "huge_decoder": {"config": {"decoder": {"hidden_size": 10**9}}},
    "another_decoder": {"config": {"decoder": {"name": "lstm"}}},
    "no_such_decoder": {"config": {"decoder": {"name": "os.system"}}},
    "no_such_encoder": {"config": {"encoder": {"name": "../../x"}}},
    "words_are_numbers": {"vocabulary": {"words": [1, 2], "language": "en"}},
    "words_missing": {"vocabulary": {"words": [], "language": "en"}},
    "no_such_language": {"vocabulary": {"words": ["<pad>"], "language": "xx"}},
    "huge_pictures": {
        "transform": {"image_size": 10**6, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}
    },
    "another_interpolation": {
        "transform": {"image_size": 96, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "x"}
    },
    "short_mean": {"transform": {"image_size": 96, "mean": [0], "std": [1, 1, 1], "interpolation": "bilinear"}},
    "no_encoder": {"encoder": None},
    "encoder_with_more": {"encoder": {"name": "x", "source": None, "sha256": "", "stride_in_1x1": False, "more": 1}},
    "confidence_of_words": {"confidence": {"weights": ["a"], "bias": 0.0}},
    "short_confidence": {"confidence": {"weights": [1.0], "bias": 0.0}},
    "endless_confidence": {"confidence": {"weights": [float("nan")] * 4, "bias": 0.0}},
}


@pytest.mark.parametrize("kind", HOSTILE_PARTS)
def test_a_hostile_config_ends_in_one_sentence(kind: str, there: Hub, files: Files, refused: Callable) -> None:
    there.add(f"me/{kind}", changed(files, **HOSTILE_PARTS[kind]))
    with refused(""):
        load_model(f"hf://me/{kind}")


HOSTILE_TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    "missing": {"feature_mean": None},
    "another_shape": {"feature_mean": torch.zeros(3)},
    "another_type": {"feature_scale": torch.ones(1, dtype=torch.int64)},
    "not_finite": {"feature_mean": torch.full((256,), float("nan"))},
    "a_part_of_the_config": {"config.run": torch.zeros(1)},
    "one_more": {"decoder.evil": torch.zeros(1)},
    "no_name": {"decoder.": torch.zeros(1)},
    "consensus_of_one_number": {"consensus.weights": torch.tensor(1.0)},
    "consensus_of_another_size": {"consensus.codes": torch.zeros(3)},
    "consensus_of_another_type": {"consensus.projection": torch.zeros(256, 256, dtype=torch.float64)},
    "consensus_in_part": {"consensus.codes": None},
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_hostile_tensors_end_in_one_sentence(kind: str, there: Hub, files: Files, refused: Callable) -> None:
    tensors: dict[str, Any] = safetensors.load(files["model.safetensors"]) | HOSTILE_TENSORS[kind]
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    there.add(f"me/{kind}", files | {"model.safetensors": safetensors.save(kept)})
    with refused(f"me/{kind}"):
        load_model(f"hf://me/{kind}")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_tensors_that_were_cut_short_end_in_one_sentence(cut: int, there: Hub, files: Files, refused: Callable) -> None:
    there.add(f"me/cut{cut % 1000}", files | {"model.safetensors": files["model.safetensors"][:cut]})
    with refused(f"model.safetensors of hf://me/cut{cut % 1000} is damaged"):
        load_model(f"hf://me/cut{cut % 1000}")


def test_settings_of_another_machine_are_not_taken_over(there: Hub, files: Files) -> None:
    own = load_config().data
    flat = {"data.cache": "/etc/evil", "train.start": "/etc/passwd", "data.root": "/etc"}
    nested = json.loads(files["config.json"])["config"]
    nested["data"] |= {"cache": "/etc/evil", "shards": "/etc/evil", "images": "/etc", "captions": "/etc/passwd"}
    encoder = json.loads(files["config.json"])["encoder"] | {"source": None}
    for number, config in enumerate((nested, nested | flat)):
        there.add(f"me/paths{number}", changed(files, config=config, encoder=encoder))
        found = load_model(f"hf://me/paths{number}").config
        assert (found.data.cache, found.data.root, found.data.shards) == (own.cache, own.root, own.shards)
        assert found.train.start is None
        assert "/etc" not in found.model_dump_json()
    there.add("me/source", changed(files, encoder=encoder | {"source": "/etc/passwd"}))
    assert hub.read_checkpoint("hf://me/source")["encoder"]["source"] == "passwd"


def test_an_ensemble_is_not_one_captioner(there: Hub, trained: Path, refused: Callable) -> None:
    from models.ensemble import Ensemble

    model = load_model(trained)
    model.decoder = Ensemble([load_model(trained), load_model(trained)])
    with refused("an ensemble is several models"):
        model.push_to_hub("me/ensemble")
    assert not there.repositories
