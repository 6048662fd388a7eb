"""Caption pictures over HTTP, for programs in other languages and on other machines.

python -m serve                                                 the newest run, or pretrained/
curl -F pictures=@a.jpg -F pictures=@b.jpg http://127.0.0.1:8000/caption
"""

from cli import UserError, answer_early, options, run_script, say

if __name__ == "__main__":
    answer_early(options.serve, "PyTorch")  # --help and mistakes, before PyTorch is imported

import asyncio
import queue
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline  # FastAPI, with the scripts of its pages from here and not from a CDN
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from captioning import SEARCH_BATCH, Captioner, prediction
from config import SearchConfig, change_search
from data.transforms import open_picture
from inference_visualize import choose_checkpoints

MEBIBYTE = 2**20
PICTURE_BYTES = 20 * MEBIBYTE  # of one picture, as in the demo; open_picture refuses too many pixels
PICTURES = 32  # in a request
REQUEST_BYTES = 100 * MEBIBYTE
HELD_BYTES = 1024 * MEBIBYTE  # of all requests together that are not answered yet
QUEUE = 1024  # pictures that wait
CAPTIONS = 10  # of a picture
HYPOTHESES = 5 * SEARCH_BATCH  # searched at once: a wide beam takes fewer pictures at a time
READING = 60  # seconds that a request may take to arrive
RETRY_AFTER = 5  # seconds until somebody who found the queue full should come again
FINISHING = 60  # seconds in which, at the end, what is queued is finished
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")  # as addresses, and as clients name them


class Text(BaseModel):
    caption: str
    log_prob: float


class Captioned(BaseModel):
    """A picture's entry, as in predictions.json; `error` says what is wrong with one that has no caption."""

    image_id: str
    caption: str | None = None
    confidence: float | None = None
    perhaps: list[str] | None = None
    captions: list[Text] | None = None
    error: str | None = None


class Answer(BaseModel):
    pictures: list[Captioned]


class Health(BaseModel):
    ready: bool
    model: str
    waiting: int


@dataclass(frozen=True)
class Job:
    """A picture to caption, and the entry that it will have."""

    name: str
    content: bytes
    search: SearchConfig
    num_captions: int
    entry: Future[dict[str, Any]] = field(default_factory=Future)


class Worker(threading.Thread):
    """The one thread that uses the captioner: it takes the pictures that wait, of all requests, in batches."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__(name="captioner", daemon=True)
        self.captioner = captioner
        self.jobs: queue.Queue[Job | None] = queue.Queue(QUEUE)

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Let these wait for their turn, all or none; returns whether there is room. For one thread alone."""
        if self.jobs.qsize() + len(jobs) > QUEUE:
            return False
        for job in jobs:
            self.jobs.put_nowait(job)
        return True

    def run(self) -> None:
        for batch in iter(self.next_batch, []):
            alive = [job for job in batch if job.entry.set_running_or_notify_cancel()]
            try:
                self.caption(alive)
            except Exception as error:  # such as a full memory: these fail, and the next batch may not
                for job in alive:
                    if not job.entry.done():
                        job.entry.set_exception(error)

    def next_batch(self) -> list[Job]:
        """Return the pictures that wait, and wait for one where there is none; nothing more after `stop`."""
        batch = [self.jobs.get()]
        while batch[-1] and len(batch) < SEARCH_BATCH and not self.jobs.empty():
            batch.append(self.jobs.get())
        if batch[-1] is None and len(batch) > 1:
            self.jobs.put(None)  # for the next turn
        return [job for job in batch if job]

    def caption(self, jobs: Sequence[Job]) -> None:
        good: dict[tuple[str, int], list[tuple[Job, torch.Tensor]]] = {}  # by what is searched in the same way
        openers = (partial(open_picture, job.name, job.content) for job in jobs)
        for job, features in zip(jobs, self.captioner.encode(openers), strict=True):
            if isinstance(features, UserError):
                job.entry.set_result({"image_id": job.name, "error": str(features)})
            else:
                good.setdefault((job.search.model_dump_json(), job.num_captions), []).append((job, features))
        for group in good.values():
            for part in parts_of(group):
                self.search(part)

    def search(self, part: Sequence[tuple[Job, torch.Tensor]]) -> None:
        first, model = part[0][0], self.captioner.model
        features = torch.stack([each for _, each in part])  # (B, D) or (B, L, D)
        torch.manual_seed(model.config.train.seed)  # drawn captions are the same each time
        try:
            found = model.generate(features, first.search, first.num_captions)
        except UserError as error:
            for job, _ in part:
                job.entry.set_result({"image_id": job.name, "error": str(error)})
            return
        for (job, _), captions in zip(part, found, strict=True):
            job.entry.set_result(prediction(job.name, captions, job.num_captions))

    def stop(self) -> None:
        """End after the batch at hand. What still waits then is of nobody: the server has answered all, or gave up."""
        while not self.jobs.empty():
            self.jobs.get()
        self.jobs.put(None)
        self.join()


def parts_of(group: Sequence[tuple[Job, torch.Tensor]]) -> Iterator[Sequence[tuple[Job, torch.Tensor]]]:
    first = group[0][0]
    size = max(1, HYPOTHESES // max(first.search.beam, first.num_captions, 5))
    for start in range(0, len(group), size):
        yield group[start : start + size]


class Intake:
    """Reads requests, and counts the bytes of those that are not answered yet."""

    def __init__(self) -> None:
        self.held = 0

    async def read(self, request: Request) -> tuple[list[tuple[str, bytes]], int]:
        """Return the name and the content of each picture of a request, and how many bytes are now held for it.

        Raises HTTPException for a request that is too large, too slow, or holds no pictures.
        """
        size = 0

        async def receive() -> Any:
            nonlocal size
            message = await request.receive()
            arrived = len(message.get("body", b""))
            self.held, size = self.held + arrived, size + arrived
            check_size(size)
            if self.held > HELD_BYTES:
                raise busy()
            return message

        check_size(int(request.headers.get("content-length") or 0))
        try:
            async with asyncio.timeout(READING):
                return await pictures_in(Request(request.scope, receive)), size
        except BaseException as error:
            self.held -= size
            if isinstance(error, TimeoutError):
                raise HTTPException(408, f"the request took longer than {READING} s to arrive; send less") from None
            raise


def check_size(size: int) -> None:
    if size > REQUEST_BYTES:
        raise HTTPException(413, f"a request may have {REQUEST_BYTES // MEBIBYTE} MiB; send the pictures in several")


def busy() -> HTTPException:
    return HTTPException(503, "too many pictures wait; come again later", {"Retry-After": str(RETRY_AFTER)})


async def pictures_in(request: Request) -> list[tuple[str, bytes]]:
    """Return the name and the content of each picture in a form, or of the one that is the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=PICTURES, max_fields=PICTURES) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                found = [(file.filename or "picture", await file.read()) for file in files]
        except HTTPException as error:
            if error.status_code != 400:
                raise
            advice = f"send up to {PICTURES} pictures as files, and little else"
            raise HTTPException(400, f"the form is not read ({error.detail.rstrip('.')}); {advice}") from None
        if not found:
            raise HTTPException(400, "the form holds no files; send pictures as files: curl -F pictures=@photo.jpg")
        return found
    image = re.fullmatch(r"image/([a-z0-9.+-]+)|application/octet-stream", kind)
    if not image:
        raise HTTPException(
            415, "send pictures as files of a form (multipart/form-data), or one as a body of a type such as image/jpeg"
        )
    return [(f"picture.{image[1]}" if image[1] else "picture", await request.body())]


def make_app(captioner: Captioner, worker: Worker, model: str, hosts: Sequence[str]) -> FastAPI:
    """Return the endpoint; `hosts` are the names by which it may be asked, of which a page elsewhere has none."""
    app = FastAPIOffline(title="Image captioning", redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    intake = Intake()

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = error.errors()[0]
        reason = f"{wrong['loc'][-1]} cannot be used ({wrong['msg']}); /docs says what it means"
        return JSONResponse({"detail": reason}, 422)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/health")
    async def health() -> Health:
        """Whether the model is there to caption, which one it is, and how many pictures wait."""
        return Health(ready=worker.is_alive(), model=model, waiting=worker.jobs.qsize())

    @app.post("/caption", response_model=Answer, openapi_extra={"requestBody": BODY}, responses=REFUSALS)
    async def caption(
        request: Request,
        beam: Annotated[
            int | None, Query(description="hypotheses kept in the search; the model's own by default")
        ] = None,
        num_captions: Annotated[int, Query(ge=1, le=CAPTIONS, description="of each picture, the best first")] = 1,
    ) -> JSONResponse:
        """Caption pictures: each gets a caption, or an error of its own."""
        unknown = request.query_params.keys() - {"beam", "num_captions"}
        if unknown:
            raise HTTPException(422, f"there is no {min(unknown)}; beam and num_captions can be set")
        try:
            config = change_search(captioner.model.config, {} if beam is None else {"beam": beam})
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        try:
            pictures, held = await intake.read(request)
        except ClientDisconnect:
            return JSONResponse({}, 400)  # to nobody
        try:
            jobs = [Job(name, content, config.search, num_captions) for name, content in pictures]
            small = [job for job in jobs if len(job.content) <= PICTURE_BYTES]
            for job in jobs:
                if len(job.content) > PICTURE_BYTES:
                    reason = f"{job.name} has more than {PICTURE_BYTES // MEBIBYTE} MiB; send a smaller one"
                    job.entry.set_result({"image_id": job.name, "error": reason})
            if not worker.is_alive() or not worker.submit(small):
                raise busy()
            entries = await asyncio.gather(*(asyncio.wrap_future(job.entry) for job in jobs))
        finally:
            intake.held -= held
        return JSONResponse({"pictures": entries})

    return app


BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "pictures": {
                        "type": "array",
                        "maxItems": PICTURES,
                        "items": {"type": "string", "format": "binary"},
                    }
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A request without pictures, with too many, or by another name of this host"},
    408: {"description": f"A request that took longer than {READING} s to arrive"},
    422: {"description": "Settings of the search that cannot be used"},
    413: {"description": f"A request of more than {REQUEST_BYTES // MEBIBYTE} MiB"},
    415: {"description": "A body that is neither a form nor a picture"},
    503: {"description": "Too many pictures wait; Retry-After says when to come again"},
}


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises UserError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError of what can be no host
        reason = str(getattr(error, "strerror", None) or "no such host").partition(" (")[0]  # Python adds an attempt
        raise UserError(f"cannot listen at {host}:{port} ({reason}); choose another with --host and --port") from None


def main() -> int:
    args = options.serve()
    listening = listen(args.host, args.port)
    checkpoints = choose_checkpoints(args)
    captioner, named = Captioner.load(checkpoints, args.overrides), ", ".join(map(str, checkpoints))
    worker = Worker(captioner)
    worker.start()
    app = make_app(captioner, worker, named, LOOPBACK if args.host in LOOPBACK else ["*"])
    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=FINISHING)
    signal.signal(signal.SIGTERM, lambda *_: None)  # which uvicorn sends again when all is finished: exit code 0
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    say(f"captioning at {address}/caption with {named}; {address}/docs says how to ask, and Ctrl-C stops it")
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    finally:
        worker.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
