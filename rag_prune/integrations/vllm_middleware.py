"""Prune the documents of chat requests inside `vllm serve`, before the model sees them.

    vllm serve MODEL --middleware rag_prune.integrations.vllm_middleware.ContextPruning

    {"messages": […], "documents": […], "prunekit": {"threshold": 0.1}}

A request is pruned only if it has the field `prunekit` (taken out before the model's server sees
it), or if the operator's `default` says so. Response headers say what was done: `x-prunekit-kept-
chars`, `-dropped-chars` and `-ms`, or `x-prunekit-skipped` with the reason. Whatever goes wrong,
the request goes on as it came. docs/vllm.md has the settings.

Plain ASGI: no import of vLLM, so any server of chat completions can wrap its app in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import yaml

from prune_core.errors import InputError, PruneError, RecipeError
from prune_core.recipe import parse_recipe
from rag_prune.context.pruner import DEFAULT_THRESHOLD, ContextPruner
from rag_prune.context.result import Budget, PassageLike
from rag_prune.integrations.chat_documents import Found, find
from rag_prune.integrations.documents import load_tokenizer
from rag_prune.server.batching import Batcher

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Spans = list[tuple[int, int]]

FILE = "PRUNEKIT_MIDDLEWARE"  # names a YAML file of settings
PREFIX = f"{FILE}_"  # and PRUNEKIT_MIDDLEWARE_THRESHOLD=0.2 is one of them
MAX_QUESTION = 20_000  # characters; longer ones are no questions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the operator decides.

    Attributes:
        default: Prune requests that do not say; a request can still say `"prunekit": false`.
        threshold, keep_ratio, max_tokens, top_k: As for `ContextPruner.prune`, where a request
            gives no budget of its own.
        pruner, method, device: As for `ContextPruner.from_pretrained`, for pruning in this process;
            on the CPU unless told otherwise, since a GPU's memory is the model's.
        url: Prune with the `prunekit serve-context` there, and load nothing here.
        url_api_key: Its key.
        tokenizer: Folder of the tokenizer that `max_tokens` is counted with.
        api_key: The key that clients must have, behind a server that does not check as vLLM does.
        max_body: Bytes of a request; larger ones are not read.
        max_documents, max_characters: Of a request, question included; above, it is not pruned.
        timeout: Seconds that pruning may take.
    """

    default: bool = False
    threshold: float | None = None
    keep_ratio: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    pruner: str | None = None
    method: str | None = None
    device: str = "cpu"
    url: str | None = None
    url_api_key: str | None = None
    tokenizer: str | None = None
    api_key: str | None = None
    max_body: int = 4_000_000
    max_documents: int = 256
    max_characters: int = 400_000
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.url and (self.pruner or self.method or self.tokenizer):
            raise InputError(
                "Give url, or pruner, method and tokenizer: with url nothing is loaded here."
            )
        for name in ("max_body", "max_documents", "max_characters", "timeout"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, got {getattr(self, name)}.")
        if options := Asked().options(self):  # a budget that cannot be stops the server
            _budget(options, self.tokenizer or self.url)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """The YAML file that `PRUNEKIT_MIDDLEWARE` names, and variables that begin with it.

        Raises RecipeError for an unknown setting and one of a wrong type, naming it.
        """
        given: dict[str, Any] = {}
        if path := environment.get(FILE):
            try:
                given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise RecipeError(
                    f"{FILE} names '{path}', which cannot be read: {error}"
                ) from error
            if not isinstance(given, dict):
                raise RecipeError(f"'{path}' must hold settings, like `threshold: 0.2`.")
        texts = {f.name for f in fields(cls) if "str" in str(f.type)}
        for name, value in environment.items():
            if name.startswith(PREFIX):
                key = name.removeprefix(PREFIX).lower()
                given[key] = value if key in texts else yaml.safe_load(value)
        return parse_recipe(given, cls)


@dataclass(frozen=True)
class Asked:
    """The field `prunekit` of a request; what is not given is the operator's setting."""

    question: str | None = None
    threshold: float | None = None
    keep_ratio: float | None = None
    max_tokens: int | None = None
    top_k: int | None = None

    def options(self, settings: Settings) -> dict[str, Any]:
        """The options of `ContextPruner.prune` that hold for this request."""
        names = ("threshold", "keep_ratio", "max_tokens")
        own = any(getattr(self, name) is not None for name in names)
        options = {name: getattr(self if own else settings, name) for name in names}
        options["top_k"] = settings.top_k if self.top_k is None else self.top_k
        return {name: value for name, value in options.items() if value is not None}


class Prunes(Protocol):
    """Where pruning happens: kept spans of each passage of one question."""

    async def prune(
        self, question: str, passages: list[PassageLike], options: dict[str, Any]
    ) -> list[Spans]: ...


class _Skip(Exception):
    """This request is not pruned: (what to count it as, the reason in a sentence)."""


class InProcess:
    """A pruner in this process, in one thread, batched across requests."""

    def __init__(self, settings: Settings) -> None:
        self.batcher = Batcher(
            ContextPruner.from_pretrained(
                settings.pruner, method=settings.method, device=settings.device
            )
        )
        self.tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None

    async def prune(
        self, question: str, passages: list[PassageLike], options: dict[str, Any]
    ) -> list[Spans]:
        budget = _budget(options, self.tokenizer)
        result = await self.batcher.prune(question, passages, budget)
        return [[(s.start, s.end) for s in passage.kept] for passage in result.passages]


class Remote:
    """A `prunekit serve-context` elsewhere."""

    def __init__(self, settings: Settings) -> None:
        import httpx

        key = settings.url_api_key
        self.client = httpx.AsyncClient(
            base_url=str(settings.url),
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
            timeout=settings.timeout,
        )

    async def prune(
        self, question: str, passages: list[PassageLike], options: dict[str, Any]
    ) -> list[Spans]:
        body = {"question": question, "passages": passages, **options}
        # As ASCII: httpx's own JSON refuses the lone surrogates that a request may hold.
        response = await self.client.post("/v1/prune", content=json.dumps(body))
        if response.status_code in (400, 413):  # the request's fault; all else is the operator's
            raise InputError(f"{response.json()['error']['message']}")
        response.raise_for_status()
        return [[(s["start"], s["end"]) for s in p["kept"]] for p in response.json()["passages"]]


@dataclass(frozen=True)
class _Done:
    """The new body, and the characters that stayed and went."""

    body: bytes
    kept: int
    dropped: int


class ContextPruning:
    """The middleware; vLLM calls it with the app alone, so settings are read from the environment.

    `counts` has how many requests ended in each way, and the characters kept and dropped.

    Raises:
        PruneError: A setting that cannot be, or a pruner that cannot be loaded; the server stops.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        self.settings = settings or Settings.read(os.environ)
        self.keys = _key_digests(app, self.settings)
        self.prunes: Prunes = (
            Remote(self.settings) if self.settings.url else InProcess(self.settings)
        )
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_chat(scope) or not self._is_authorised(scope):
            await self.app(scope, receive, send)
            return
        messages, body = await self._read(scope, receive)
        headers: list[tuple[bytes, bytes]] = []
        if body is not None:
            started = time.perf_counter()
            try:
                done = await self._pruned(body)
            except _Skip as skip:
                outcome, reason = skip.args
                self._count(outcome)
                log.info("Not pruned: %s", reason)
                headers = [(b"x-prunekit-skipped", _printable(reason))]
            else:
                if done:
                    self._count("pruned")
                    self._count_characters(done)
                    milliseconds = f"{1000 * (time.perf_counter() - started):.1f}"
                    headers = [
                        (b"x-prunekit-kept-chars", str(done.kept).encode()),
                        (b"x-prunekit-dropped-chars", str(done.dropped).encode()),
                        (b"x-prunekit-ms", milliseconds.encode()),
                    ]
                    scope = {**scope, "headers": _with_length(scope["headers"], len(done.body))}
                    messages = [
                        {"type": "http.request", "body": done.body, "more_body": False},
                        *(m for m in messages if m["type"] != "http.request"),
                    ]
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self.app(scope, replay, send_with_headers if headers else send)

    def _is_authorised(self, scope: Scope) -> bool:
        """As vLLM's own check, which comes only after this one: middleware added last is first."""
        if not self.keys:
            return True
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        # Each key is compared, so that the time does not tell which was near.
        same = [secrets.compare_digest(digest, known) for known in self.keys]
        return scheme.lower() == "bearer" and any(same)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[list[Message], bytes | None]:
        """The messages read, to be replayed, and the body; None if too large or the client left.

        What is declared as too large is not read at all.
        """
        messages: list[Message] = []
        declared = _header(scope, b"content-length")
        size, received = int(declared) if declared.isdigit() else 0, 0
        while size <= self.settings.max_body:
            messages.append(message := await receive())
            if message["type"] != "http.request":
                return messages, None
            received += len(message.get("body", b""))
            size = max(size, received)
            if not message.get("more_body") and size <= self.settings.max_body:
                return messages, b"".join(m.get("body", b"") for m in messages)
        self._count("too_large")
        return messages, None

    async def _pruned(self, body: bytes) -> _Done | None:
        """The body pruned; None if that was not asked, or what is asked cannot be told.

        Raises _Skip for what was asked and cannot be done.
        """
        if not self.settings.default and b'"prunekit"' not in body:
            return None
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(request, dict):
            return None
        given = request.pop("prunekit", self.settings.default)
        if given is False:
            return None
        try:
            asked = parse_recipe({} if given is True else given, Asked)
            options = asked.options(self.settings)
            found = find(request, asked.question)
            self._check_size(found)
            return await asyncio.wait_for(self._cut(request, found, options), self.settings.timeout)
        except TimeoutError:
            log.warning("Pruning took too long, the request goes on as it came.")
            raise _Skip("timeout", f"it took more than {self.settings.timeout} s") from None
        except PruneError as error:  # a bad option, or too many waiting
            raise _Skip("refused", str(error)) from error
        except _Skip:
            raise
        except Exception as error:
            log.warning("Pruning failed, the request goes on as it came: %r", error)
            raise _Skip("failed", f"{type(error).__name__} in the pruner") from error

    def _check_size(self, found: list[Found]) -> None:
        if not found:
            raise _Skip("no_documents", "no documents and a question to them were found")
        documents = sum(len(f.passages) for f in found)
        characters = sum(len(f.question) + sum(len(_text(p)) for p in f.passages) for f in found)
        if documents > self.settings.max_documents:
            raise _Skip("too_large", f"more than {self.settings.max_documents} documents")
        if characters > self.settings.max_characters:
            raise _Skip("too_large", f"more than {self.settings.max_characters} characters")
        if any(len(f.question) > MAX_QUESTION for f in found):
            raise _Skip("too_large", f"a question of more than {MAX_QUESTION} characters")

    async def _cut(
        self, request: dict[str, Any], found: list[Found], options: dict[str, Any]
    ) -> _Done:
        # What answers the same question shares the budget.
        by_question: dict[str, list[Found]] = {}
        for f in found:
            by_question.setdefault(f.question, []).append(f)
        spans = await asyncio.gather(
            *(
                self.prunes.prune(question, [p for f in same for p in f.passages], options)
                for question, same in by_question.items()
            )
        )
        kept = dropped = 0
        for same, answer in zip(by_question.values(), spans, strict=True):
            left = iter(answer)
            for f in same:
                texts = [_text(p) for p in f.passages]
                cut = ["".join(t[a:b] for a, b in next(left)) for t in texts]
                kept += sum(map(len, cut))
                dropped += sum(map(len, texts)) - sum(map(len, cut))
                if cut != texts:
                    f.put([text or None for text in cut])
        return _Done(json.dumps(request, allow_nan=False).encode(), kept, dropped)

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        if metrics := _prometheus():
            metrics[0].labels(outcome).inc()

    def _count_characters(self, done: _Done) -> None:
        for fate, n in (("kept", done.kept), ("dropped", done.dropped)):
            self.counts[f"{fate}_characters"] += n
            if metrics := _prometheus():
                metrics[1].labels(fate).inc(n)


def _budget(options: dict[str, Any], tokenizer: Any) -> Budget:
    default = {"threshold": DEFAULT_THRESHOLD} if set(options) <= {"top_k"} else {}
    return Budget(**default | options, tokenizer=tokenizer)


def _is_chat(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/v1/chat/completions" and not _header(scope, b"content-encoding")


def _header(scope: Scope, name: bytes) -> str:
    """The first value of a request's header, which is the one that vLLM reads too."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _key_digests(app: Any, settings: Settings) -> list[bytes]:
    """SHA-256 of the keys that vLLM's authentication, further inside, will accept.

    vLLM has them from its command line, a file or the environment, and keeps only the digests.
    """
    layer = app
    while layer is not None:
        if hasattr(layer, "api_tokens"):
            return list(layer.api_tokens)
        layer = getattr(layer, "app", None)
    key = settings.api_key or os.environ.get("VLLM_API_KEY")
    return [hashlib.sha256(key.encode()).digest()] if key else []


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    framing = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in framing]
    return [*kept, (b"content-length", str(length).encode())]


def _text(passage: PassageLike) -> str:
    return passage if isinstance(passage, str) else str(passage["text"])


def _printable(reason: str) -> bytes:
    """A reason may quote the client, so it is made fit for a header."""
    return "".join(c if " " <= c <= "~" else "?" for c in reason)[:200].encode("ascii")


@cache
def _prometheus() -> tuple[Any, Any] | None:
    """Counters in the process's registry, which vLLM's /metrics shows; None without the client."""
    try:
        from prometheus_client import Counter as Metric
    except ImportError:
        return None
    return (
        Metric("prunekit_middleware_requests", "Chat requests, by how they ended", ["outcome"]),
        Metric("prunekit_middleware_characters", "Characters of documents, by fate", ["fate"]),
    )
