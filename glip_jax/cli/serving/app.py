"""The HTTP server's paths: `/` the page, `/detect`, `/labels`, `/health`, `/openapi.json`, and those of Label Studio."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from glip_jax import UserError
from glip_jax.cli.query import Query
from glip_jax.cli.serving import label_studio
from glip_jax.cli.serving.batching import QueueFullError
from glip_jax.cli.serving.guard import Guard
from glip_jax.cli.serving.service import Answer, Service, UnknownLabelsError
from glip_jax.io.image_files import ImageFileError

__all__ = ["PAGE", "create_app"]

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_ALIVE_SECONDS = 0.1
"""How often a request that waits looks whether its client is still there."""
_GONE = 499
"""nginx's status of a client that went away; nobody reads it."""
_Result = TypeVar("_Result")


def create_app(service: Service, token: str = "", hosts: Sequence[str] = (), files: str = "") -> FastAPI:
    """The application. `token`, `hosts`: as `Guard` takes them; `files`: folder of images of Label Studio, "" for none.

    Every answer is JSON; one that is no success has the one field `error`, a line.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="glip_jax", version=service.model.about["versions"]["glip_jax"], lifespan=lifespan, docs_url=None, redoc_url=None,
                  description="Detects in images what names or a text describe.")  # fmt: skip
    app.add_middleware(Guard, limits=service.limits, token=token, hosts=hosts)
    _say_errors(app)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    _add_paths(app, service)
    label_studio.add_paths(app, service, files, _answered)
    return app


def _add_paths(app: FastAPI, service: Service) -> None:
    limits, model = service.limits, service.model

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/health", summary="Whether the server can answer, and what it is")
    async def health() -> dict[str, Any]:
        batcher = service.batcher
        return {"status": "UP", "model_class": "GLIP", "waiting": batcher.waiting, "images": batcher.images, "batches": batcher.batches,
                "threshold": model.threshold, "canvases": sorted([width, height] for height, width in service.canvases),
                "limits": {"images": limits.images, "names": limits.names, "bytes": limits.bytes_, "seconds": limits.seconds, "queue": limits.queue},
                **model.about}  # fmt: skip

    @app.post("/labels", summary="Keep a list of names, to be asked by its identifier")
    async def labels(
        names: Annotated[str | list[str], Body(embed=True, description="names with commas between, or a list")],
    ) -> dict[str, Any]:
        begin = time.monotonic()
        identifier, query = await asyncio.to_thread(service.keep, names)
        return {
            "labels": identifier,
            "names": list(query.names),
            "prompts": len(query.prompts),
            "notes": _notes(query),
            **_about(service, begin),
        }

    @app.post("/detect", summary="Detect what names or a text describe", response_model=None)
    async def detect(
        request: Request,
        image: Annotated[list[UploadFile], File(description="image files, or NumPy files (.npy) of uint8[H W 3]")],
        names: Annotated[str, Form(description="names with commas between")] = "",
        text: Annotated[str, Form(description='phrases with " . " between, or a sentence')] = "",
        labels: Annotated[str, Form(description="identifier that POST /labels gave")] = "",
        threshold: Annotated[float | None, Form(ge=0, lt=1, description="lowest score")] = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        begin = time.monotonic()
        if len(image) > limits.images:
            raise HTTPException(413, f"{len(image)} images: expected at most {limits.images}; send several requests")
        query = await asyncio.to_thread(service.query, names, text, labels)
        least = model.threshold if threshold is None else threshold
        called = [
            f"image {number} of {len(image)} ({each.filename or 'without a name'!s:.80})"
            for number, each in enumerate(image, 1)
        ]
        found = await _answered(
            request,
            limits.seconds,
            service.detect([(name, each.file.read) for name, each in zip(called, image)], query, least),
        )
        answers = [_content(service, query, each, least, begin) for each in found]
        return answers[0] if len(answers) == 1 else answers


def _content(service: Service, query: Query, answer: Answer, threshold: float, begin: float) -> dict[str, Any]:
    """What `/detect` says of an image."""
    phrases = list(query.names) or [phrase.text for phrase in query.phrases]
    return {"detections": answer.detections, "width": answer.width, "height": answer.height, "phrases": phrases, "threshold": threshold,
            "notes": [*_notes(query), *answer.notes], **_about(service, begin)}  # fmt: skip


def _notes(query: Query) -> list[str]:
    return [note.removeprefix("note: ") for note in query.notes if note.startswith("note: ")]


def _about(service: Service, begin: float) -> dict[str, Any]:
    return {**service.model.about, "seconds": round(time.monotonic() - begin, 4)}


async def _answered(request: Request, seconds: float, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled where it takes longer than `seconds` (504) or the client goes away."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_ALIVE_SECONDS)

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if watch in done:
            raise HTTPException(_GONE, "the client went away")
        raise HTTPException(
            504, f"no answer within {seconds:g} s: the server is busy; try again later, or with fewer images and names"
        )
    finally:
        for each in (task, watch):
            each.cancel()


def _say_errors(app: FastAPI) -> None:
    """One field `error` for every error."""
    statuses: dict[type[UserError], int] = {UnknownLabelsError: 404, QueueFullError: 429}

    def said(text: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
        # What a client sent may hold halves of characters, which no encoding of the answer has.
        return JSONResponse({"error": text.encode(errors="backslashreplace").decode()}, status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return said(str(error.detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        return said("; ".join(faults[:5]), 422)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        status = statuses.get(type(error), 422)
        if isinstance(error, ImageFileError):
            status = 413 if error.kind == "large" else 415 if error.reason.startswith("is no image") else 422
        return said(" ".join(str(error).split()), status, {"retry-after": "1"} if status == 429 else None)
