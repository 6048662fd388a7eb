"""Downloads come whole, go on where they were cut off, and never write outside their folder."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
