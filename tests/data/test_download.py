"""Downloads come whole, go on where they were cut off, and never write outside their folder."""

import hashlib
import io
import os
import socketserver
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_files import load, put, run

from data import download
from data.download import Source, fetch


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


DOG = zipped(("a", bytes(range(256)) * 40))
LINK = zipfile.ZipInfo("link")
LINK.external_attr = 0o120777 << 16


class Server:
    """A real server of `files`, which drops each answer after `limit` bytes, and notes the ranges it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.limit: int | None = None
        self.knows_ranges = True
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.headers["Range"])
                content = outer.files.get(self.path.strip("/"))
                if content is None:
                    return self.send_error(404)
                begin = int((self.headers["Range"] or "bytes=0-")[6:-1]) if outer.knows_ranges else 0
                if begin >= len(content):
                    return self.send_error(416)
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                if begin:
                    self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                self.wfile.write(content[begin:][: outer.limit])
                return self.wfile.flush()

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def offer(self, name: str, content: bytes, checksum: str | None = None) -> Source:
        self.files[name] = content
        return Source(f"{self.url}/{name}", len(content), checksum or f"md5:{hashlib.md5(content).hexdigest()}")


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, args=[0.01])
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def unpacked(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_download_is_unpacked_checked_and_cleared_away(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = server.offer("pictures.zip", zipped(("images/a", b"a dog"), ("__MACOSX/x", b"a shadow")))
    for _ in range(2):
        fetch([source], tmp_path / "new")
        assert unpacked(tmp_path / "new") == {"images/a": b"a dog", ".downloaded": b"pictures.zip\n"}
    assert len(server.asked) == 1 and "already" in capsys.readouterr().out


def test_a_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    source, third = server.offer("pictures.zip", DOG), len(DOG) // 3 + 1
    server.limit = third  # a connection that drops
    fetch([source], tmp_path / "one")
    server.limit = None
    for number, begun in enumerate((third, len(DOG))):  # a command that was interrupted
        put(tmp_path, f"{number}/pictures.zip.part", text=DOG[:begun])
        fetch([source], tmp_path / str(number))
    server.knows_ranges = False  # a server that has to start over
    put(tmp_path, "two/pictures.zip.part", text=b"x" * third)
    fetch([source], tmp_path / "two")
    assert server.asked[:5] == [None, *(f"bytes={n}-" for n in (third, 2 * third, third, len(DOG)))]
    assert all((tmp_path / name / "a").read_bytes() == bytes(range(256)) * 40 for name in ("one", "0", "1", "two"))


def test_a_damaged_file_is_deleted_and_said(server: Server, tmp_path: Path, refused: Callable) -> None:
    with refused("pictures.zip came damaged", "0123"):
        fetch([server.offer("pictures.zip", DOG, "md5:0123")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_gives_nothing_ends_in_a_sentence(server: Server, tmp_path: Path, refused: Callable) -> None:
    with refused("404", "--source"):
        fetch([Source(f"{server.url}/nothing.zip", 1, None)], tmp_path)
    source = server.offer("pictures.zip", DOG)
    server.limit = 0
    with refused("cannot download", "the same command resumes"):
        fetch([source], tmp_path)
    assert len(server.asked) == 2 * download.ATTEMPTS
    with refused("cannot download", "refused"):
        fetch([Source("http://127.0.0.1:1/pictures.zip", 1, None)], tmp_path)


# ---- what servers and addresses may do wrong ------------------------------------------------------------------------


def endless(head: str) -> Iterator[bytes]:
    yield head.encode()
    while True:
        yield bytes(1 << 16)


def slowly(text: str, seconds: float = 0.05) -> Iterator[bytes]:
    for character in text:
        yield character.encode()
        time.sleep(seconds)


@contextmanager
def answering(*parts: str | bytes | Callable[[], Iterator[bytes]]) -> Iterator[str]:
    """Yield the address of a server that says these things, one after the other, whatever it is asked."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            with suppress(OSError):  # who asks may have heard enough
                for part in parts:
                    for piece in part() if callable(part) else [part]:
                        self.wfile.write(piece.encode() if isinstance(piece, str) else piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


OK, PART = "HTTP/1.1 200 OK\r\n", "HTTP/1.1 206 Partial Content\r\n"
FOUND = "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
FAULTS: dict[str, tuple[tuple[str | bytes | Callable[[], Iterator[bytes]], ...], str]] = {
    "no end": ((lambda: endless(f"{OK}\r\n"),), "sends more than"),
    "no end, announced": ((lambda: endless(f"{OK}Content-Length: {10**30}\r\n\r\n"),), "sends more than"),
    "no end of chunks": ((f"{OK}Transfer-Encoding: chunked\r\n\r\nfffffffffff\r\n", lambda: endless("")), "sends more"),
    "no end of headers": ((OK, lambda: iter(lambda: b"a: b\r\n", b"")), "headers"),
    "one header without end": ((OK, lambda: endless("")), "header"),
    "an announcement that is no number": ((f"{OK}Content-Length: abc\r\n\r\n", DOG[:-20]), "damaged"),
    "a negative announcement": ((f"{OK}Content-Length: -5\r\n\r\n", DOG[:-20]), "damaged"),
    "a long announcement": ((f"{OK}Content-Length: {'9' * 5000}\r\n\r\n", DOG[:-20]), "damaged"),
    "no announcement": ((f"{OK}\r\n", DOG[:-20]), "damaged"),
    "less than announced": ((f"{OK}Content-Length: {len(DOG)}\r\n\r\n", DOG[:-20]), "cut off"),
    "nothing": ((), "cannot download"),
    "no HTTP": (("hello\r\n\r\n",), "hello"),
    "no content": (("HTTP/1.1 204 No Content\r\n\r\n",), "answers 204"),
    "bytes for headers": ((OK, b"\xff\xfe: \x00\r\n\r\n", bytes(100)), "damaged"),
    "a redirect to itself": ((f"{FOUND}/pictures.zip\r\n\r\n",), "infinite loop"),
    "a redirect without end": ((f"{FOUND}x\r\n\r\n",), "infinite loop"),
    "a redirect to a file": ((f"{FOUND}file:///etc/passwd\r\n\r\n",), "not allowed"),
    "a redirect to FTP": ((f"{FOUND}ftp://127.0.0.1:1/passwd\r\n\r\n",), "unknown url type: ftp"),
    "a redirect to data": ((f"{FOUND}data:,dog\r\n\r\n",), "not allowed"),
    "a redirect to no address": ((f"{FOUND}http://[\r\n\r\n",), "IPv6"),
    "a redirect to no port": ((f"{FOUND}http://127.0.0.1:99999/\r\n\r\n",), "cannot download"),
    "a redirect nowhere": (("HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",), "302"),
    "a part that was not asked for": ((f"{PART}Content-Range: bytes 5-9/10\r\n\r\n", "12345"), "another part"),
    "a part that does not say which": ((f"{PART}\r\n", DOG), "another part"),
    "a letter now and then": ((lambda: slowly(f"{OK}\r\n{'x' * 500}"),), "does not answer in time"),
    "few bytes a second": ((f"{OK}\r\n", lambda: slowly("x" * 500)), "fewer than"),
    "silence": ((lambda: slowly("  ", 1),), "time"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_does_wrong_is_one_sentence(
    fault: str, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.4)
    parts, words = FAULTS[fault]
    with answering(*parts) as url, refused("pictures.zip", words):
        fetch([Source(f"{url}/pictures.zip", len(DOG), None)], tmp_path)
    part = tmp_path / "pictures.zip.part"
    assert not part.exists() or part.stat().st_size <= len(DOG)


RESUMED: dict[str, tuple[str, bytes]] = {  # what a server answers to a request for the rest, and what follows
    "another part": (f"{PART}Content-Range: bytes 1-9/10\r\n\r\n", DOG[1:]),
    "the first bytes alone": (f"{PART}Content-Range: bytes 0-9/{len(DOG)}\r\n\r\n", DOG[:10]),
    "a part of no file": (f"{PART}Content-Range: bytes {'9' * 5000}-0/x\r\n\r\n", DOG),
    "a part that it does not name": (f"{PART}\r\n", DOG),
    "that there is no more, of a longer file": ("HTTP/1.1 416 No\r\nContent-Range: bytes */9999\r\n\r\n", b""),
    "that there is no more": ("HTTP/1.1 416 No\r\n\r\n", b""),
}


@pytest.mark.parametrize("answer", RESUMED)
def test_a_wrong_rest_is_never_put_behind_what_there_is(answer: str, tmp_path: Path, refused: Callable) -> None:
    put(tmp_path, "pictures.zip.part", text=b"PK what came before")
    with answering(*RESUMED[answer]) as url, refused("cannot download"):
        fetch([Source(f"{url}/pictures.zip", len(DOG), None)], tmp_path)
    assert unpacked(tmp_path) == {}  # so that the next command starts over


def test_a_whole_answer_to_a_request_for_the_rest_is_taken_as_a_whole(tmp_path: Path) -> None:
    put(tmp_path, "pictures.zip.part", text=b"PK what came before")
    with answering(f"{OK}Content-Length: {len(DOG)}\r\n\r\n", DOG) as url:
        fetch([Source(f"{url}/pictures.zip", len(DOG), None)], tmp_path)
    assert (tmp_path / "a").stat().st_size == 256 * 40


@pytest.mark.parametrize("cut", [1, 10, len(DOG) // 2, len(DOG) - 1])
def test_a_zip_that_is_cut_short_is_refused_without_a_checksum(
    cut: int, server: Server, tmp_path: Path, refused: Callable
) -> None:
    source = server.offer("pictures.zip", DOG[:cut])
    with refused("pictures.zip came damaged", "run this again"):
        fetch([Source(source.url, len(DOG), None)], tmp_path)
    assert unpacked(tmp_path) == {}


def test_a_zip_that_would_fill_the_disk_is_refused(
    server: Server, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = server.offer("pictures.zip", DOG)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(DOG) * 3))
    with refused("pictures.zip unpacks to", "--to"):
        fetch([source], tmp_path)


WRONG = [
    *("http://[", "http://", "https:///x", "http://127.0.0.1:abc", "http://127.0.0.1:99999", "nonsense://x/y"),
    *("file:///etc", "ftp://127.0.0.1", "javascript://x", "a/captions.csv", "nowhere", "http://a b/"),
    *("http://" + "a" * 70 + ".org", "http://é\ud800/", "/dev/zero", "\x1b[2J"),
]


@pytest.mark.parametrize("place", WRONG)
def test_a_source_that_is_none_is_one_sentence(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a/captions.csv")
    assert run(download.main, "flickr8k_cn", "--source", place) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--source" in error


def test_what_lies_where_a_download_goes_does_not_block_it(server: Server, tmp_path: Path, refused: Callable) -> None:
    source = server.offer("pictures.zip", DOG)
    os.mkfifo(tmp_path / "pictures.zip.part")
    with refused("pictures.zip.part is no file", "move it away"):
        fetch([source], tmp_path)
    (tmp_path / "pictures.zip.part").unlink()
    with open(tmp_path / "pictures.zip.part", "wb") as file:
        file.truncate(1 << 40)  # more than it can have
    put(tmp_path, ".downloaded", text=b"\xff\xfe\n")
    (tmp_path / "elsewhere").mkdir()
    os.truncate((tmp_path / "pictures.zip.part").rename(tmp_path / "elsewhere/pictures.zip"), 1 << 40)
    with refused("elsewhere/pictures.zip has more than", "--source"):
        fetch([source], tmp_path, str(tmp_path / "elsewhere"))
    os.rename(tmp_path / "elsewhere/pictures.zip", tmp_path / "pictures.zip.part")
    fetch([source], tmp_path)
    assert (tmp_path / "a").stat().st_size == 256 * 40 and server.asked == [None]


# ---- where it is unpacked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", LINK])
def test_nothing_is_unpacked_outside_the_folder(name: str | zipfile.ZipInfo, server: Server, tmp_path: Path) -> None:
    fetch([server.offer("pictures.zip", zipped(("good", b"a dog"), (name, b"/etc")))], tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_room_on_the_disk_is_checked_first(server: Server, tmp_path: Path, refused: Callable) -> None:
    with refused("room for", "10000000.0 GB are needed", "--to"):
        fetch([Source(f"{server.url}/huge.zip", 5 * 10**15, None)], tmp_path)
    assert server.asked == []


def test_a_mirror_or_a_folder_can_take_the_place_of_the_source(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = "a.jpg#zhc#0 一只狗\n".encode()
    server.offer("flickr8kzhc.caption.txt", captions)
    put(tmp_path, "flickr8kzhc.caption.txt", text=captions)
    for name, source in (("one", f"{server.url}/"), ("two", tmp_path)):
        assert run(download.main, "flickr8k_cn", "--to", tmp_path / name, "--source", source) == 0
        assert (tmp_path / name / "flickr8kzhc.caption.txt").read_bytes() == captions
        assert f"python -m data.annotations {tmp_path / name}" in capsys.readouterr().out


def test_without_a_name_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(download.main) == 0
    assert "flickr8k_cn" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "hint"), [(["--to", "x", "cifar"], "'karpathy'"), (["cifar"], "'karpathy'")])
def test_a_wrong_dataset_is_one_sentence(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(download.main, *words) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


def test_what_is_downloaded_is_found_as_the_advice_says(server: Server, tmp_path: Path) -> None:
    text = zipped(
        ("Flickr8k.token.txt", b"a.jpg#0\tA dog .\n"),
        ("Flickr_8k.trainImages.txt", b"a.jpg\n"),
        ("readme.txt", b"hello"),
    )
    sources = [server.offer("Flickr8k_Dataset.zip", zipped(("Flicker8k_Dataset/a.jpg", b"")))]
    fetch([*sources, server.offer("Flickr8k_text.zip", text)], tmp_path / "flickr8k")
    assert load(tmp_path / "flickr8k")[["image", "split"]].to_numpy().tolist() == [["a.jpg", "train"]]


def test_a_link_is_not_written_through(server: Server, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "pictures.zip.part").symlink_to("victim")
    with refused("pictures.zip.part is no file; move it away"):
        fetch([server.offer("pictures.zip", DOG)], tmp_path)
    assert (tmp_path / "victim").read_bytes() == b"mine"
