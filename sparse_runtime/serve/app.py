"""The HTTP side: routes, key, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparse_runtime.serve.failures import RequestFailure
from sparse_runtime.serve.generation import Generator, Job
from sparse_runtime.serve.metrics import Metrics
from sparse_runtime.serve.parts import Piece
from sparse_runtime.serve.requests import (
    ChatRequest,
    GenerationRequest,
    StreamOptions,
    TextRequest,
)
from sparse_runtime.serve.responses import DONE, ChatResponses, Responses, TextResponses, event
from sparse_runtime.serve.served_model import ServedModel
from sparse_runtime.version import __version__

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
# Far beyond the longest prompts, as JSON.
_MOST_BODY_BYTES = 32 * 2**20
#: nginx's, for a client that has left before its answer; nobody sees it but a log.
_LEFT = 499


def build_app(
    models: Mapping[str, ServedModel], generator: Generator, *, api_key: str | None = None
) -> FastAPI:
    """The application.

    Args:
        models: name -> model, warmed up.
        generator: that generates.
        api_key: that requests below ``/v1`` have to bear; None for no key.
    """
    metrics = Metrics()
    app = FastAPI(title="sparse-runtime", version=__version__)
    app.add_middleware(_BodyLimit)
    app.exception_handler(RequestFailure)(_failed)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)
    app.exception_handler(Exception)(_broken)
    api = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(api_key))])
    service = _Service(models, generator, metrics)

    @api.post("/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await service.answer(request, body, _CHAT)

    @api.post("/completions", response_model=None)
    async def completions(request: Request, body: TextRequest) -> Response:
        return await service.answer(request, body, _TEXT)

    @api.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_entry(served) for served in models.values()]}

    @api.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        return _model_entry(service.served(name))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "requests_in_flight": generator.jobs,
            "one_at_a_time": True,
            "models": {name: _activation(served) for name, served in models.items()},
        }

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(api)
    return app


class _BodyLimit:
    """Stops reading a body before it fills the memory; it is read before its key is looked at."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _MOST_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {_MOST_BODY_BYTES} bytes")
            return message

        await self._app(scope, limited, send)


class _Service:
    """Answers requests of both kinds."""

    def __init__(
        self, models: Mapping[str, ServedModel], generator: Generator, metrics: Metrics
    ) -> None:
        self._models, self._generator, self._metrics = models, generator, metrics

    def served(self, name: str) -> ServedModel:
        """The model of a name. Raises RequestFailure."""
        if name not in self._models:
            raise RequestFailure(
                f"there is no model {name!r}; this server has {', '.join(self._models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def answer(self, request: Request, body: GenerationRequest, endpoint: str) -> Response:
        """The response to a request, as a stream where it asks for one."""
        served = self.served(body.model)
        try:
            # Beside the event loop: a long text takes a while.
            prompt = await asyncio.to_thread(_prompt, served, body)
            job = Job(served, body, prompt, partial(self._metrics.add, served.name))
        except RequestFailure:
            self._metrics.count(served.name, endpoint, "refused")
            raise
        responses = (ChatResponses if endpoint == _CHAT else TextResponses)(served.name)
        pieces = self._pieces(job, served.name, endpoint)
        if not body.stream:
            return await _unless_left(request, _whole(job, responses, pieces))
        options = body.stream_options or StreamOptions()
        return _Stream(_events(job, responses, pieces, usage=options.include_usage))

    async def _pieces(self, job: Job, model: str, endpoint: str) -> AsyncGenerator[Piece]:
        """A job's answer as it comes; its end is counted."""
        outcome = "left"
        try:
            async with aclosing(self._generator.answer(job)) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = "answered"
        except RequestFailure:
            outcome = "failed"
            raise
        finally:
            self._metrics.count(model, endpoint, outcome)


def _prompt(served: ServedModel, body: GenerationRequest) -> list[int]:
    if isinstance(body, ChatRequest):
        return served.chat_prompt(body)
    assert isinstance(body, TextRequest)
    return served.text_prompt(body)


async def _whole(job: Job, responses: Responses, pieces: AsyncGenerator[Piece]) -> Response:
    async with aclosing(pieces):
        answer = [piece async for piece in pieces]
    assert job.figures is not None
    return JSONResponse(responses.response(answer, job.answer.finish_reason, job.figures))


async def _events(
    job: Job, responses: Responses, pieces: AsyncGenerator[Piece], *, usage: bool
) -> AsyncGenerator[str]:
    try:
        for chunk in responses.opening():
            yield event(chunk)
        async with aclosing(pieces):
            async for piece in pieces:
                yield event(responses.chunk(piece))
        assert job.figures is not None
        yield event(responses.chunk(None, job.answer.finish_reason))
        if usage:
            yield event(responses.usage_chunk(job.figures))
    except RequestFailure as failure:  # too late for a status
        yield event(failure.body)
    yield DONE


class _Stream(StreamingResponse):
    """Events, whose source is closed at once where the client leaves."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, *connection: Any) -> None:
        async with aclosing(self._events):
            await super().__call__(*connection)


async def _unless_left(request: Request, response: Coroutine[Any, Any, Response]) -> Response:
    """A response, or an end to making it where the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    made, gone = asyncio.ensure_future(response), asyncio.ensure_future(left())
    try:
        await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else Response(status_code=_LEFT)
    finally:
        made.cancel()
        gone.cancel()


def _key_check(api_key: str | None) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(key.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestFailure(
                "the API key is missing or wrong; expected the header 'Authorization: Bearer KEY' with "
                "the key that the server was started with",
                status=401,
                code="invalid_api_key",
            )

    return check


def _model_entry(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "sparse-runtime",
        "max_model_len": served.limits.context,
    }


def _activation(served: ServedModel) -> dict[str, Any]:
    activation = served.activation
    assert activation is not None
    return {
        "layers": activation.layers,
        "sparse_layers": activation.sparse_layers,
        "backends": list(activation.backends),
        "why_dense": list(activation.why_dense),
        "max_prompt_tokens": served.limits.prompt,
        "max_new_tokens": served.limits.answer,
    }


def _response(failure: RequestFailure) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if failure.status == 401 else None
    return JSONResponse(failure.body, failure.status, headers)


async def _failed(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, RequestFailure)
    return _response(failure)


async def _invalid(request: Request, error: Exception) -> Response:
    """What pydantic says: of the ways to read a field, the one that came furthest."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    parts = (str(part) for part in first["loc"][1:])
    place = ".".join(part for part in parts if part.isalnum() or part.isidentifier())
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return _response(
            RequestFailure(f"the body is not valid JSON: {reason} ({first['loc'][-1]})")
        )
    if first["type"] == "extra_forbidden":
        return _response(
            RequestFailure(
                f"{place} is not known here, or not supported; leave it out", param=place
            )
        )
    return _response(RequestFailure(f"{place or 'the body'}: {first['msg']}", param=place or None))


async def _refused(request: Request, error: Exception) -> Response:
    """What starlette says: no such route, a wrong method, a body that is too large."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code in (404, 405):
        text += "; expected one of the routes in /docs"
    return _response(RequestFailure(text, status=error.status_code))


async def _broken(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the server's log has the traceback."""
    text = f"the server failed ({type(error).__name__}); its log says where"
    return _response(RequestFailure(text, status=500, kind="server_error"))
