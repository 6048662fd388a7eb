"""The HTTP endpoint as its clients have it: over a socket, together, and with everything that they should not send."""

import asyncio
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import needs_chromium
from captioners import save_captioner
from demo import find_chromium
from PIL import Image

from captioning import Captioner
from cli import options
from config import Config
from models.confidence import Confidence

for package in ("uvicorn", "fastapi_offline", "python_multipart"):
    pytest.importorskip(package, reason="serving needs requirements-extras.txt")
serve = pytest.importorskip("serve")
load_test = pytest.importorskip("benchmarks.serve")
JPEG = {"Content-Type": "image/jpeg"}
PATIENCE = 60  # seconds: a busy machine takes long to import PyTorch


class Endpoint:
    """The endpoint in threads of this process, with an untrained captioner."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner, self.worker = captioner, serve.Worker(captioner)
        self.worker.start()
        app = serve.make_app(captioner, self.worker, "tiny.pth", serve.LOOPBACK)
        self.listening = serve.listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.server = serve.uvicorn.Server(serve.uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and content of the answer: to a GET, or where there is a body to a POST."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        found = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, found, json.loads(content) if is_json else content.decode()

    def send(self, *files: tuple[str, bytes], path: str = "/caption", field: str = "pictures") -> tuple[int, Any]:
        """Send files as a form; returns status and content of the answer."""
        form = b"".join(
            f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
            + content
            + b"\r\n"
            for name, content in files
        )
        status, _, found = self.ask(path, form + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"})
        return status, found


@pytest.fixture(scope="module")
def checkpoint(drawn: Path, tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny.pth"
    config = tiny_config("decoder.name=attention", "encoder.image_size=96", "search.beam=2", "search.max_length=8")
    save_captioner(path, config, drawn / "images")
    return path


@pytest.fixture(scope="module")
def endpoint(checkpoint: Path) -> Iterator[Endpoint]:
    running = Endpoint(Captioner.load(checkpoint))
    yield running
    running.server.should_exit = True
    running.thread.join()
    running.worker.stop()


@pytest.fixture(scope="module")
def files(drawn: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted((drawn / "images").iterdir())]


class Gate:
    """Holds the captioner's thread where it would encode, until it is opened; notes how many pictures it is given."""

    def __init__(self, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.batches = threading.Event(), threading.Event(), list[int]()
        encode = endpoint.captioner.encode

        def wait_and_encode(openers: Any) -> Any:
            several = list(openers)
            self.batches.append(len(several))
            self.reached.set()
            assert self.opened.wait(PATIENCE)
            return encode(several)

        monkeypatch.setattr(endpoint.captioner, "encode", wait_and_encode)


@pytest.fixture
def gate(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    closed = Gate(endpoint, monkeypatch)
    yield closed
    closed.opened.set()
    wait_for(lambda: endpoint.ask("/health")[2]["waiting"] == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE * 100):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited too long")


def test_many_pictures_get_the_captions_that_they_get_elsewhere(
    endpoint: Endpoint, files: list[tuple[str, bytes]], drawn: Path
) -> None:
    status, found = endpoint.send(*files)
    assert status == 200
    expected = endpoint.captioner.caption([drawn / "images" / name for name, _ in files])
    assert [(each["image_id"], each["caption"]) for each in found["pictures"]] == [
        (name, caption) for (name, _), caption in zip(files, expected, strict=True)
    ]
    assert len(set(expected)) > 2


def test_one_picture_may_be_the_body(endpoint: Endpoint, files: list[tuple[str, bytes]]) -> None:
    for kind, name in (
        ("image/jpeg", "picture.jpeg"),
        ("image/png; x=y", "picture.png"),
        ("IMAGE/WEBP", "picture.webp"),
    ):
        status, _, found = endpoint.ask("/caption", files[0][1], {"Content-Type": kind})
        assert status == 200 and found["pictures"][0]["image_id"] == name
        assert found["pictures"][0]["caption"] == endpoint.send(files[0])[1]["pictures"][0]["caption"]
    assert endpoint.ask("/caption", files[0][1], {"Content-Type": "application/octet-stream"})[0] == 200


def test_a_broken_picture_has_an_error_and_the_others_have_captions(
    endpoint: Endpoint, files: list[tuple[str, bytes]]
) -> None:
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    broken = {"empty.jpg": b"", "text.jpg": b"no picture", "cut.jpg": files[0][1][:500], "bomb.png": huge.getvalue()}
    broken["drawn.svg"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    status, found = endpoint.send(files[0], *broken.items(), files[1])
    assert status == 200
    first, *refused, last = found["pictures"]
    assert first["caption"] and last["caption"] and "error" not in first
    for name, entry in zip(broken, refused, strict=True):
        assert entry.keys() == {"image_id", "error"} and entry["image_id"] == name
        assert re.fullmatch(rf"cannot read the picture {name} \([^\n]+\); replace it or leave it out", entry["error"])


def test_how_sure_a_calibrated_captioner_is_stands_beside_its_captions(
    endpoint: Endpoint, files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoint.send(files[0])[1]["pictures"][0].keys() == {"image_id", "caption"}
    monkeypatch.setattr(endpoint.captioner.model, "confidence", Confidence((0.5, 0, 0, 0), -9.0))
    [entry] = endpoint.send(files[0])[1]["pictures"]
    assert 0 <= entry["confidence"] < 0.5 and entry["perhaps"] == []


def test_the_search_may_be_another_for_each_request(
    endpoint: Endpoint, files: list[tuple[str, bytes]], drawn: Path
) -> None:
    [entry] = endpoint.send(files[0], path="/caption?num_captions=3&beam=4")[1]["pictures"]
    assert entry["captions"][0]["caption"] == entry["caption"]
    assert len(entry["captions"]) == 3 and all(each["log_prob"] < 0 for each in entry["captions"])
    greedy = endpoint.captioner.caption(drawn / "images" / files[0][0], beam=1)
    assert [endpoint.send(files[0], path="/caption?beam=1")[1]["pictures"][0]["caption"]] == greedy


@pytest.mark.parametrize(
    ("query", "named"),
    [
        *(
            ("temperature=1", "there is no temperature; beam and num_captions can be set"),
            ("beams=5", "there is no beams"),
        ),
        *(("beam=0", "search.beam = 0"), ("beam=101", "search.beam = 101"), ("beam=x", "beam cannot be used")),
        *(
            ("num_captions=0", "num_captions"),
            ("num_captions=11", "num_captions"),
            ("num_captions=1e9", "num_captions"),
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_sentence(
    query: str, named: str, endpoint: Endpoint, files: list
) -> None:
    status, found = endpoint.send(files[0], path=f"/caption?{query}")
    assert status == 422 and named in found["detail"] and not re.search(r"[.!?] [A-Z]|\n", found["detail"])


def test_names_are_only_text(endpoint: Endpoint, files: list[tuple[str, bytes]]) -> None:
    names = ["../../etc/passwd", "<script>alert(1)</script>.jpg", "ä 猫 \u202e.jpg", "%00%0a.jpg", "a" * 300]
    status, found = endpoint.send(*((name, files[0][1]) for name in names))
    assert status == 200 and [each["image_id"] for each in found["pictures"]] == names


def test_requests_beyond_the_limits_are_refused(
    endpoint: Endpoint, files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = endpoint.send(*[files[0]] * (serve.PICTURES + 1))
    assert status == 400 and f"send up to {serve.PICTURES} pictures" in found["detail"]
    monkeypatch.setattr(serve, "PICTURE_BYTES", len(files[0][1]) - 1)
    status, found = endpoint.send(files[0], ("small.jpg", b"x"))
    assert status == 200 and "has more than" in found["pictures"][0]["error"]
    assert "unknown format" in found["pictures"][1]["error"]
    monkeypatch.setattr(serve, "REQUEST_BYTES", 1000)
    for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):  # announced, and in chunks
        status, _, found = endpoint.ask("/caption", body, JPEG)  # type: ignore[arg-type]
        assert status == 413 and "send the pictures in several" in found["detail"]
    monkeypatch.setattr(serve, "HELD_BYTES", 100)
    status, headers, found = endpoint.ask("/caption", b"x" * 200, JPEG)
    assert (status, headers["retry-after"]) == (503, str(serve.RETRY_AFTER))


def test_a_request_that_announces_too_much_is_refused_before_it_is_sent(endpoint: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=PATIENCE) as client:
        client.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n")
        client.sendall(b"Content-Length: 999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_what_was_answered_counts_no_more(
    endpoint: Endpoint, files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = files[0][1]
    monkeypatch.setattr(serve, "HELD_BYTES", 2 * len(content))
    monkeypatch.setattr(serve, "REQUEST_BYTES", len(content) + 1)
    for _ in range(3):
        assert endpoint.ask("/caption", content, JPEG)[0] == 200
        assert endpoint.ask("/caption", content, {"Content-Type": "multipart/form-data; boundary=x"})[0] == 400
        assert endpoint.ask("/caption", iter([content, b"xx"]), JPEG)[0] == 413  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "body", "status", "advice"),
    [
        ("text/plain", b"x", 415, "send pictures as files of a form"),
        ("application/x-www-form-urlencoded", b"x", 415, "or one as a body of a type such as image/jpeg"),
        ("application/json", b"{}", 415, "send pictures"),
        ("image/", b"x", 415, "send pictures"),
        ("multipart/form-data", b"x", 400, "the form is not read"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400, "the form holds no files"),
        ("multipart/form-data; boundary=x", b"no form", 400, "the form"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="pictures"\r\n\r\ntext\r\n--x--\r\n',
            *(400, "the form holds no files"),
        ),
    ],
)
def test_what_is_no_picture_is_explained(kind: str, body: bytes, status: int, advice: str, endpoint: Endpoint) -> None:
    found = endpoint.ask("/caption", body, {"Content-Type": kind})
    assert found[0] == status and advice in found[2]["detail"] and not re.search(r"[.!?] [A-Z]|\n", found[2]["detail"])


def test_requests_that_wait_together_are_captioned_together(
    endpoint: Endpoint, files: list[tuple[str, bytes]], gate: Gate
) -> None:
    with ThreadPoolExecutor(12) as clients:
        first = clients.submit(endpoint.send, files[0])
        assert gate.reached.wait(PATIENCE)
        others = [
            clients.submit(endpoint.send, *files[number : number + 2], path=f"/caption?num_captions={1 + number % 3}")
            for number in range(10)
        ]
        wait_for(lambda: endpoint.ask("/health")[2]["waiting"] == 20)
        gate.opened.set()
        answers = [each.result()[1]["pictures"] for each in (first, *others)]
    assert gate.batches == [1, 20]
    for number, answer in enumerate(answers[1:]):
        assert [each["image_id"] for each in answer] == [name for name, _ in files[number : number + 2]]
        assert {len(each.get("captions", [0])) for each in answer} == {1 + number % 3}


def test_a_full_queue_sends_away_and_loses_nothing(
    endpoint: Endpoint, files: list[tuple[str, bytes]], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "QUEUE", 3)
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(endpoint.send, files[0])
        assert gate.reached.wait(PATIENCE)
        second = clients.submit(endpoint.send, *files[:2])
        wait_for(lambda: endpoint.ask("/health")[2]["waiting"] == 2)
        status, found = endpoint.send(*files[:2])  # both or none
        assert (status, found["detail"]) == (503, "too many pictures wait; come again later")
        third = clients.submit(endpoint.send, files[0])
        wait_for(lambda: endpoint.ask("/health")[2]["waiting"] == 3)
        status, headers, _ = endpoint.ask("/caption", files[0][1], JPEG)
        assert (status, headers["retry-after"]) == (503, str(serve.RETRY_AFTER))
        gate.opened.set()
        assert [len(each.result()[1]["pictures"]) for each in (first, second, third)] == [1, 2, 1]


def test_two_hundred_clients_at_once_all_get_their_captions(
    endpoint: Endpoint, files: list[tuple[str, bytes]], drawn: Path
) -> None:
    requests = [load_test.request_of(drawn / "images" / name) for name, _ in files] * 20
    assert len(requests) > load_test.CLIENTS == 200
    assert len(asyncio.run(load_test.ask_all(endpoint.port, requests))) == len(requests)


def test_a_client_that_hangs_up_harms_nobody(
    endpoint: Endpoint, files: list[tuple[str, bytes]], drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = b"Content-Type: multipart/form-data; boundary=x\r\n"
    for kind in (b"Content-Type: image/jpeg\r\n", form):
        with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
            client.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n" + kind + b"\r\nabc")
    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:  # and one that does not wait for its answer
        client.sendall(load_test.request_of(drawn / "images" / files[0][0]))
    assert endpoint.send(files[0])[0] == 200
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_request_that_never_ends_is_ended(
    endpoint: Endpoint, files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "READING", 0.2)
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=PATIENCE) as client:
        client.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n")
        client.sendall(b"Content-Length: 999\r\n\r\nabc")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_what_fails_unforeseen_is_one_answer_and_not_the_end(
    endpoint: Endpoint, files: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(endpoint.captioner.model, "generate", fail)
        assert endpoint.send(files[0])[0] == 500
    assert endpoint.send(files[0])[0] == 200
    assert endpoint.ask("/health")[2]["ready"]


def test_a_page_of_another_site_cannot_ask_by_a_name_of_its_own(endpoint: Endpoint) -> None:
    for host, status in (
        *(("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200), ("LOCALHOST:1", 200)),
        *(("evil.example", 400), ("localhost.evil.example", 400), ("127.0.0.1.evil.example", 400), ("", 400)),
    ):
        assert endpoint.ask("/health", headers={"Host": host})[0] == status, host
    _, headers, _ = endpoint.ask("/health", headers={"Origin": "http://evil.example"})
    assert not [name for name in headers if name.startswith("access-control")]


def test_health_and_description_say_what_there_is(endpoint: Endpoint) -> None:
    assert endpoint.ask("/health")[2] == {"ready": True, "model": "tiny.pth", "waiting": 0}
    described = endpoint.ask("/openapi.json")[2]["paths"]
    assert described.keys() == {"/health", "/caption"}
    asked = described["/caption"]["post"]
    assert asked["requestBody"]["content"].keys() == {"multipart/form-data", "image/*"}
    assert {each["name"] for each in asked["parameters"]} == {"beam", "num_captions"}
    assert {"200", "400", "408", "413", "415", "422", "503"} <= asked["responses"].keys()
    assert endpoint.ask("/")[1]["location"] == "/docs"
    page = endpoint.ask("/docs")[2]
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert endpoint.ask("/redoc")[0] == 404


@needs_chromium
def test_the_page_with_the_description_asks_nobody_else(endpoint: Endpoint) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        page = started.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"]).new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{endpoint.port}/docs")
        page.get_by_text("/caption").first.click()
        page.get_by_text("Caption pictures: each gets a caption").first.wait_for()
    assert len(asked) > 2
    assert not [each for each in asked if not each.startswith((f"http://127.0.0.1:{endpoint.port}/", "data:"))]


def start(checkpoint: Path, folder: Path, *words: str) -> tuple[subprocess.Popen, int]:
    """Start the script as its user does; returns the process, and its port once it listens."""
    command = [sys.executable, serve.__file__ or "", "--checkpoint", str(checkpoint)]
    process = subprocess.Popen(
        [*command, "--port", "0", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    found = re.match(r"captioning at http://127\.0\.0\.1:(\d+)/caption with .*tiny.pth;", process.stdout.readline())
    assert found
    return process, int(found[1])


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGTERM, 0, ""), (signal.SIGINT, 130, "interrupted\n")])
def test_at_the_end_what_waits_is_finished(
    number: int, code: int, said: str, checkpoint: Path, files: list[tuple[str, bytes]], drawn: Path, tmp_path: Path
) -> None:
    process, port = start(checkpoint, tmp_path)
    requests = [load_test.request_of(drawn / "images" / name) for name, _ in files] * 10
    with process:
        connections = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in requests]
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request)
        for _ in range(2):  # once these are answered, what came before them has been read
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).close()
        process.send_signal(number)
        answers = [connection.makefile("rb").read() for connection in connections]
        assert process.wait(PATIENCE) == code
        assert process.stderr
        assert process.stderr.read() == f"loading PyTorch …\n{said}"
    assert sum(b'"caption"' in answer for answer in answers) == len(requests)


def test_a_taken_port_ends_in_one_sentence(
    checkpoint: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call(serve.main, "--checkpoint", checkpoint, "--port", port) == 2
        sentence = f"cannot listen at 127.0.0.1:{port} (Address already in use); choose another with --host and --port"
        assert sentence in capsys.readouterr().err
    for host in ("no.such.host.invalid", "256.0.0.1", "192.0.2.1"):
        assert call(serve.main, "--checkpoint", checkpoint, "--host", host) == 2
        assert f"cannot listen at {host}:8000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "argument --port"),
        (["--port", "x"], "argument --port"),
        (["--checkpoint", "nowhere.pth"], "there is no checkpoint at nowhere.pth"),
        (["--run", "nowhere"], "runs/nowhere holds no checkpoints.pth"),
        (["search.beem=3"], "did you mean 'search.beam'?"),
        (["photo.jpg"], "'photo.jpg' is neither an option nor a setting"),
    ],
)
def test_mistakes_in_the_command_line_are_answered_at_once(
    words: list[str], said: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(options.serve, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "fastapi_offline", "uvicorn", "python_multipart"])
def test_without_the_extra_one_sentence_names_it(
    package: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert call(options.serve) == 2
    assert f"serving needs {package}; install it: pip install -r requirements-extras.txt" in capsys.readouterr().err
