"""Downloads come whole, go on where they were cut off, and never write outside their folder."""

from cli import run_script

import hashlib
import io
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import config
from data import annotations, download
from data.download import Source, fetch


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__MACOSX__", "__MACOSX/").replace("s__", "s/").replace("t__", "t/"), content)
    return buffer.getvalue()


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
    thread = threading.Thread(target=served.http.serve_forever)
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def test_a_download_is_unpacked_checked_and_cleared_away(server: Server, tmp_path: Path) -> None:
    fetch([server.offer("pictures.zip", zipped(images__a=b"a dog", __MACOSX__x=b"a shadow"))], tmp_path / "new")
    assert (tmp_path / "new/images/a").read_bytes() == b"a dog"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".downloaded", "images"]


def test_a_dropped_connection_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    source = server.offer("pictures.zip", zipped(a=bytes(range(256)) * 40))
    server.limit = 4000
    fetch([source], tmp_path)
    assert server.asked == [None, "bytes=4000-", "bytes=8000-"]
    assert (tmp_path / "a").read_bytes() == bytes(range(256)) * 40


def test_an_interrupted_download_goes_on_the_next_time(server: Server, tmp_path: Path) -> None:
    content = zipped(a=b"a dog" * 1000)
    (tmp_path / "pictures.zip.part").write_bytes(content[:3000])
    fetch([server.offer("pictures.zip", content)], tmp_path)
    assert server.asked == ["bytes=3000-"]
    (tmp_path / "more.zip.part").write_bytes(content)
    fetch([server.offer("more.zip", content)], tmp_path)
    assert server.asked[1:] == [f"bytes={len(content)}-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    content = zipped(a=b"a dog" * 1000)
    (tmp_path / "pictures.zip.part").write_bytes(b"x" * 3000)
    fetch([server.offer("pictures.zip", content)], tmp_path)
    assert (tmp_path / "a").read_bytes() == b"a dog" * 1000


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = server.offer("pictures.zip", zipped(a=b"a dog"))
    fetch([source], tmp_path)
    fetch([source], tmp_path)
    assert len(server.asked) == 1
    assert "already" in capsys.readouterr().out


def test_a_damaged_file_is_deleted_and_said(server: Server, tmp_path: Path, refused: Callable) -> None:
    source = server.offer("pictures.zip", zipped(a=b"a dog"), "md5:0123")
    with refused("pictures.zip came damaged", "0123"):
        fetch([source], tmp_path)
    assert list(tmp_path.iterdir()) == []
    source = server.offer("page.zip", b"<html>", None)
    with refused("page.zip is not a zip file"):
        fetch([Source(source.url, 6, None)], tmp_path)


def test_a_server_that_gives_nothing_ends_in_a_sentence(server: Server, tmp_path: Path, refused: Callable) -> None:
    with refused("404", "--source"):
        fetch([Source(f"{server.url}/nothing.zip", 1, None)], tmp_path)
    source = server.offer("pictures.zip", zipped(a=b"a dog"))
    server.limit = 0
    with refused("cannot download", "the same command goes on"):
        fetch([source], tmp_path)
    assert len(server.asked) == 1 + download.ATTEMPTS
    with refused("cannot download", "refused"):
        fetch([Source("http://127.0.0.1:1/pictures.zip", 1, None)], tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_no_path_leaves_the_folder(name: str, server: Server, tmp_path: Path, refused: Callable) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("good", "a dog")
        archive.writestr(zipfile.ZipInfo(name), "a wolf")
    with refused("pictures.zip", "leaves the folder"):
        fetch([server.offer("pictures.zip", buffer.getvalue())], tmp_path / "in")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "pictures.zip.part"]


def test_a_link_is_not_unpacked(server: Server, tmp_path: Path, refused: Callable) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc")
    with refused("'link'", "leaves the folder"):
        fetch([server.offer("pictures.zip", buffer.getvalue())], tmp_path)


def test_an_archive_that_swells_is_not_unpacked(server: Server, tmp_path: Path, refused: Callable) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    with refused("pictures.zip", "would unpack to 0.0 GB"):
        fetch([server.offer("pictures.zip", buffer.getvalue())], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.zip.part"]


def test_the_disk_is_looked_at_first(server: Server, tmp_path: Path, refused: Callable) -> None:
    with refused("room for", "10000000.0 GB are needed", "--to"):
        fetch([Source(f"{server.url}/huge.zip", 5 * 10**15, None)], tmp_path)
    assert server.asked == []


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["download.py", *words])
    return run_script(download.main)


def test_a_mirror_or_a_folder_can_take_the_place_of_the_source(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = "a.jpg#zhc#0 一只狗\n".encode()
    server.offer("flickr8kzhc.caption.txt", captions)
    assert run(monkeypatch, "flickr8k_cn", "--to", str(tmp_path / "one"), "--source", f"{server.url}/") == 0
    (tmp_path / "flickr8kzhc.caption.txt").write_bytes(captions)
    assert run(monkeypatch, "flickr8k_cn", "--to", str(tmp_path / "two"), "--source", str(tmp_path)) == 0
    assert (tmp_path / "one/flickr8kzhc.caption.txt").read_bytes() == captions
    assert (tmp_path / "two/flickr8kzhc.caption.txt").read_bytes() == captions
    assert f"python -m data.annotations {tmp_path / 'two'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", download.BY_HAND)
def test_what_has_no_open_address_is_told_step_by_step(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name) == 0
    assert "  1. " in capsys.readouterr().out


@pytest.mark.parametrize("line", ["", "flickr8k --too x", "flickr8k --to", "flickr8k run=x"])
def test_a_wrong_command_line_ends_in_one_sentence(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("name", "hint"), [("flickr9k", "did you mean flickr8k?"), ("cifar", "karpathy")])
def test_an_unknown_dataset_is_refused_with_the_nearest(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name) == 2
    error = capsys.readouterr().err
    assert name in error and hint in error and error.count("\n") == 1


def test_what_flickr8k_unpacks_to_is_found(server: Server, tmp_path: Path) -> None:
    text = {
        "Flickr8k.token.txt": b"a.jpg#0\tA dog .\n",
        "Flickr_8k.trainImages.txt": b"a.jpg\n",
        "readme.txt": b"hello",
    }
    sources = [
        server.offer("Flickr8k_Dataset.zip", zipped(Flicker8k_Dataset__a=b"")),
        server.offer("Flickr8k_text.zip", zipped(**text)),
    ]
    fetch(sources, tmp_path)
    (tmp_path / "Flicker8k_Dataset/a").rename(tmp_path / "Flicker8k_Dataset/a.jpg")
    table = annotations.load(config.load_config(overrides=[f"data.root={tmp_path}"]).data)
    assert table[["image", "split"]].to_numpy().tolist() == [["a.jpg", "train"]]
