"""The pruner behind HTTP: an ASGI app for any server, and `serve`, which runs it with uvicorn.

    POST /v1/prune      question and passages in; kept and dropped sentences, scores, reasons out
    POST /v1/rerank     the schema of Jina, Cohere and vLLM; /rerank and /v2/rerank are the same
    GET  /health        open to all, and answers while a long batch runs
    GET  /metrics       Prometheus

Whoever has no key is turned away before a byte of the body is read, what is too large while it is
read; an error is an object as OpenAI's clients know it, with a sentence in it. docs/server.md says
more.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import prune_core
from prune_core.errors import InputError, Overloaded
from rag_prune.context.pruner import ContextPruner
from rag_prune.context.result import PrunedContext
from rag_prune.context.sentences import readable
from rag_prune.server.batching import Batcher, characters
from rag_prune.server.metrics import Metrics
from rag_prune.server.schema import (
    Asked,
    prune_answer,
    read_json,
    read_prune,
    read_rerank,
    rerank_answer,
    write_json,
)

log = logging.getLogger("prunekit.server")

PRUNE = ("/v1/prune",)
RERANK = ("/v1/rerank", "/v2/rerank", "/rerank")
WATCH = ("/health", "/metrics")

# A client may send its whole body before it looks at the answer: so much too much is thrown away
# as it comes, and the refusal is read; beyond it the connection is cut.
PATIENCE = 8

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    499: "client_closed_request",
    500: "internal_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may cost.

    Attributes:
        body_bytes: Bytes of one body.
        passages: Passages of one request.
        characters: Characters that the model reads for one request: the question counts for each
            passage.
        seconds: From the first byte of a request to its answer.
        requests: Requests at a time.
        queue_characters: Characters that wait or run at a time, of all requests.

    Raises:
        InputError: A limit that is not positive.
    """

    body_bytes: int = 4 * 2**20
    passages: int = 1000
    characters: int = 400_000
    seconds: float = 60
    requests: int = 256
    queue_characters: int = 2_000_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not (value := getattr(self, limit.name)) > 0:
                raise InputError(f"The limit {limit.name} must be more than 0, got {value!r}.")


class Refusal(Exception):
    """An answer other than 200: its status, a sentence, and maybe seconds to wait."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message if len(message) <= 500 else f"{message[:499]}…")
        self.status, self.retry_after = status, retry_after

    def response(self) -> Response:
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": None, "code": self.status}
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return _json({"error": error}, self.status, headers)


def create_app(
    pruner: ContextPruner,
    *,
    model: str = "prunekit",
    limits: Limits | None = None,
    api_key: str | None = None,
    tokenizer: Any = None,
) -> Starlette:
    """The ASGI app.

    Args:
        pruner: What prunes, in one thread.
        model: Its name in answers.
        limits: What a request may cost.
        api_key: Asked for as `Authorization: Bearer …` everywhere but at `/health`.
        tokenizer: That of the model that reads the text, for `max_tokens`.

    Raises:
        InputError: An API key that is empty or holds what a header cannot.
    """
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise InputError("The API key must be ASCII characters without spaces around them.")
    service = _Service(pruner, model, limits or Limits(), tokenizer)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.batcher.close()

    app = Starlette(
        routes=[
            *(Route(path, service.prune, methods=["POST"]) for path in PRUNE),
            *(Route(path, service.rerank, methods=["POST"]) for path in RERANK),
            Route("/health", service.health, methods=["GET"]),
            Route("/metrics", service.metrics_page, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _unknown, Refusal: _refused},
        lifespan=lifespan,
    )
    app.add_middleware(_Door, service=service, api_key=api_key)
    return app


def serve(
    pruner: ContextPruner,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    **options: Any,
) -> None:
    """Run `create_app(pruner, **options)` until SIGTERM or Ctrl-C; requests begun are answered.

    Raises:
        InputError: As `create_app` does.
        OSError: The address is taken or not to be had.
    """
    app = create_app(pruner, **options)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    if not options.get("api_key") and not _is_local(host):
        log.warning("Anyone who reaches %s may use this server: it has no API key.", host)
    limits = options.get("limits") or Limits()
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listening:
        log.info("Serving on http://%s:%s", *listening.getsockname()[:2])
        uvicorn.Server(config).run([listening])


class _Service:
    """The routes and what they share."""

    def __init__(self, pruner: ContextPruner, model: str, limits: Limits, tokenizer: Any) -> None:
        self.model, self.limits, self.tokenizer = model, limits, tokenizer
        self.metrics = Metrics(lambda: (self.batcher.requests, self.batcher.characters))
        self.batcher = Batcher(
            pruner, queue_characters=limits.queue_characters, on_batch=self.metrics.on_batch
        )
        checkpoint = getattr(pruner.scorer, "checkpoint", None)
        # A copy: the pruner's own is not to be shared between threads.
        self._counter = checkpoint and copy.deepcopy(checkpoint.tokenizer.backend_tokenizer)

    async def prune(self, request: Request) -> Response:
        def answer(asked: Asked, result: PrunedContext) -> Any:
            return prune_answer(result, self.model)

        return await self._answer(request, lambda body: read_prune(body, self.tokenizer), answer)

    async def rerank(self, request: Request) -> Response:
        def answer(asked: Asked, result: PrunedContext) -> Any:
            return rerank_answer(asked, result, self.model, self._tokens(asked))

        return await self._answer(request, read_rerank, answer)

    async def health(self, request: Request) -> Response:
        return _json(
            {
                "status": "ok",
                "model": self.model,
                "method": self.batcher.pruner.scorer.name,
                "version": prune_core.__version__,
            }
        )

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(
        self,
        request: Request,
        read: Callable[[dict[str, Any]], Asked],
        answer: Callable[[Asked, PrunedContext], Any],
    ) -> Response:
        """Read, prune among others, answer; what cannot be done is a Refusal."""
        waited_for = 408
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(request)
                waited_for = 504
                asked = read(await asyncio.to_thread(read_json, body))
                self._check_size(asked)
                result = await _unless_left(
                    request,
                    self.batcher.prune(
                        asked.question, asked.passages, asked.budget, reorder=asked.reorder
                    ),
                )
                self._note(request, asked, result)
                # Large answers take their time as well, and others wait for the loop.
                return await asyncio.to_thread(lambda: _json(answer(asked, result)))
        except InputError as error:
            raise Refusal(400, str(error)) from None
        except Overloaded as error:
            raise Refusal(503, str(error), error.retry_after) from None
        except ClientDisconnect:
            raise Refusal(499, "The client left before it was answered.") from None
        except TimeoutError:
            what = "The body did not arrive" if waited_for == 408 else "There was no answer"
            raise Refusal(
                waited_for,
                f"{what} within {self.limits.seconds:g} s: send less, or try again later.",
            ) from None
        except Refusal:
            raise
        except Exception:
            log.exception("A request failed.")
            raise Refusal(500, "The server failed at this request; its log says why.") from None

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A form of a foreign web page can send any other kind to a server on its visitor's machine.
        if kind != "application/json":
            raise Refusal(
                415, f"The body must come as content-type application/json, got '{kind[:100]}'."
            )
        most = self.limits.body_bytes
        body = bytearray()
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > PATIENCE * most:
                break
            if size <= most:
                body += chunk
            else:
                body.clear()
        if size > most:
            raise Refusal(
                413, f"The body has more than {most} bytes: send fewer or shorter passages."
            )
        return bytes(body)

    def _check_size(self, asked: Asked) -> None:
        if (n := len(asked.passages)) > self.limits.passages:
            raise Refusal(
                413, f"{n} passages are more than {self.limits.passages}: send them in parts."
            )
        if (n := characters(asked.question, asked.passages)) > self.limits.characters:
            raise Refusal(
                413,
                f"{n} characters are more than {self.limits.characters}, the question and some "
                "overhead counted for each passage: send fewer or shorter passages.",
            )

    def _note(self, request: Request, asked: Asked, result: PrunedContext) -> None:
        given = sum(map(len, asked.texts))
        kept = sum(len(p.text) for p in result.passages)
        self.metrics.characters_in.inc(given)
        self.metrics.characters_kept.inc(kept)
        request.scope["prunekit"] = f"{len(result.passages)} passages, {given} → {kept} characters"

    def _tokens(self, asked: Asked) -> int:
        """Tokens of the passages, and of the question for each; 0 for a method without a model."""
        if self._counter is None:
            return 0
        encoded = self._counter.encode_batch(
            [readable(text) for text in (asked.question, *asked.texts)], add_special_tokens=False
        )
        question, *passages = (len(e.ids) for e in encoded)
        return len(passages) * question + sum(passages)


class _Door:
    """Around every route: the key, the number of requests at a time, the metrics and the log."""

    def __init__(self, app: ASGIApp, service: _Service, api_key: str | None) -> None:
        self.app, self.metrics, self.most = app, service.metrics, service.limits.requests
        self.key = None if api_key is None else _digest(api_key.encode())
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"]
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        costs = path not in WATCH
        self.inside += costs
        try:
            await self._enter(scope, receive, noting)
        finally:
            self.inside -= costs
            seconds = time.perf_counter() - started
            route = path if path in (*PRUNE, *RERANK, *WATCH) else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if status >= 400:
                self.metrics.rejected.labels(TYPES.get(status, "invalid_request_error")).inc()
            if costs:
                log.info(
                    "%s %s %s %.0f ms %s",
                    scope["method"],
                    route,
                    status,
                    1000 * seconds,
                    scope.get("prunekit", ""),
                )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["path"] != "/health" and not self._has_key(scope):
            refusal = Refusal(401, "The header 'Authorization: Bearer KEY' is absent or wrong.")
        elif self.inside > self.most and scope["path"] not in WATCH:
            refusal = Refusal(503, f"{self.most} requests are here already: try again.", 1)
        if refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self.key is None:
            return True
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                given = given.strip() if scheme.lower() == b"bearer" else b""
        return hmac.compare_digest(_digest(given), self.key)


async def _unless_left(request: Request, work: Any) -> Any:
    """The result of `work`, cancelled when the client hangs up. Raises ClientDisconnect then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body was read: only a goodbye comes
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return refusal.response()


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ", ".join((*PRUNE, *RERANK, *WATCH))
    said = f"{request.method} {request.url.path[:100]} is not served here. There are {known}."
    response = Refusal(error.status_code, said).response()
    response.headers.update(error.headers or {})
    return response


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(write_json(value), status, headers, "application/json")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
