"""The app over ASGI: what clients send, what they get, and a sentence for each thing wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import httpx
import numpy as np
import pytest

from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.result import Scores
from rag_prune.server.app import PATIENCE, Limits, create_app
from tiny import PASSAGES, QUESTION

DOCUMENTS = ["The cat sat. It slept.", "Radium was found by Curie. It glows.", "Paris is a city."]
RERANK = {"model": "rerank-v3.5", "query": QUESTION, "documents": DOCUMENTS}


class Gated:
    """Waits for its gate, if it has one; raises where a passage says so."""

    name = "gated"

    def __init__(self):
        self.gate = threading.Event()
        self.seen = []

    def score(self, requests):
        self.seen += [r.question for r in requests]
        assert self.gate.wait(20)
        if any("boom" in p.text for r in requests for p in r.passages):
            raise RuntimeError("secret of the server")
        return [[Scores(0.5, np.ones(len(p.spans))) for p in r.passages] for r in requests]


class Words:
    @staticmethod
    def encode(text):
        return text.split()


def talk(main, pruner, **options):
    """Run `main(client)` against an app of `pruner`; the app is shut down after it."""

    async def whole():
        app = create_app(pruner, **options)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://pruner") as client,
        ):
            try:
                return await asyncio.wait_for(main(client), 30)
            finally:
                if isinstance(pruner.scorer, Gated):
                    pruner.scorer.gate.set()

    return asyncio.run(whole())


def post(pruner, path, body, *, headers=None, **options):
    """One answer; `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | (headers or {})
    return talk(
        lambda client: client.post(path, content=content, headers=headers), pruner, **options
    )


def refused(response, status):
    """Its sentence; the error is the object that OpenAI's clients know."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert " " in error["message"]
    assert error["message"][-1] in ".…"
    return error["message"]


@pytest.fixture(scope="module")
def bm25():
    return ContextPruner.from_pretrained(method="bm25")


@pytest.fixture
def gated():
    return ContextPruner(Gated())


# --------------------------------------------------------------------------------------- /v1/prune


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"threshold": 0.5},
        {"keep_ratio": 0.3, "top_k": 2, "reorder": False},
        {"threshold": 1, "keep_ratio": None},
        {"max_tokens": 6},
    ],
)
def test_prune_answers_as_the_pruner_does(tiny_pruner, budget):
    passages = [*PASSAGES, "\ud800 你好。👍", ""]
    body = {"question": QUESTION, "passages": passages, **budget}
    answer = post(tiny_pruner, "/v1/prune", body, tokenizer=Words).json()
    words = {"tokenizer": Words} if "max_tokens" in budget else {}
    direct = tiny_pruner.prune(QUESTION, passages, **budget, **words)
    assert answer.pop("id").startswith("prune-")
    assert answer.pop("model") == "prunekit"
    expected = direct.to_dict()
    for told, passage in zip(expected["passages"], direct.passages, strict=True):
        told["text"] = passage.text
    assert answer == expected
    for told, given in zip(answer["passages"], passages, strict=True):
        text = given if isinstance(given, str) else given["text"]
        assert "".join(text[s["start"] : s["end"]] for s in told["kept"]) == told["text"]


def test_nothing_to_prune_is_an_empty_answer(tiny_pruner):
    answer = post(tiny_pruner, "/v1/prune", {"question": QUESTION, "passages": []}).json()
    assert (answer["text"], answer["passages"], answer["keep_ratio"]) == ("", [], 1.0)
    assert post(tiny_pruner, "/v1/rerank", RERANK | {"documents": []}).json()["results"] == []


GOOD = {"question": QUESTION, "passages": DOCUMENTS}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/prune", b"", "The body is not JSON"),
        ("/v1/prune", b"question=radium", "The body is not JSON"),
        ("/v1/prune", b"\xff\xfe\xfa", "The body is not JSON"),
        ("/v1/prune", b"[" * 100_000, "The body is not JSON"),
        ("/v1/prune", b"9" * 5000, "The body is not JSON"),
        ("/v1/prune", b'{"threshold": NaN}', "The body has NaN, which is not JSON"),
        ("/v1/prune", b'{"threshold": -Infinity}', "The body has -Infinity"),
        ("/v1/prune", b'{"threshold": 0, "threshold": 1}', "The field 'threshold' stands twice"),
        ("/v1/prune", [1], "The body must be a JSON object, got a list."),
        ("/v1/prune", {}, "The body must have 'question', a string; it has []."),
        ("/v1/prune", {"question": "a"}, "The body must have 'passages', a list"),
        ("/v1/prune", GOOD | {"question": 7}, "'question' must be a string, got a number."),
        ("/v1/prune", GOOD | {"question": " \n"}, "The question must be a string with some text"),
        ("/v1/prune", GOOD | {"question": " " * 5000}, "The question must be a string"),
        ("/v1/prune", GOOD | {"passages": "radium"}, "'passages' must be a list, got a string."),
        ("/v1/prune", GOOD | {"passages": ["a", 7]}, "Passage 1 must be a string, or a mapping"),
        ("/v1/prune", GOOD | {"passages": [{"txt": "a"}]}, "got dict with ['txt']"),
        ("/v1/prune", GOOD | {"passages": [{"text": "a", "title": 1}]}, "Passage 0 must be"),
        (
            "/v1/prune",
            GOOD | {"treshold": 1},
            "Unknown field 'treshold'. Did you mean 'threshold'?",
        ),
        ("/v1/prune", GOOD | {"threshold": 1, "keep_ratio": 1}, "got threshold and keep_ratio"),
        (
            "/v1/prune",
            GOOD | {"threshold": "0.5"},
            "threshold must be a number in [0, 1], got '0.5'",
        ),
        ("/v1/prune", GOOD | {"threshold": True}, "threshold must be a number in [0, 1], got True"),
        ("/v1/prune", GOOD | {"keep_ratio": 1e999}, "Infinity"),
        ("/v1/prune", GOOD | {"top_k": 0}, "top_k must be a whole number of passages >= 1, got 0"),
        ("/v1/prune", GOOD | {"reorder": "yes"}, "'reorder' must be true or false, got a string."),
        ("/v1/prune", GOOD | {"model": 3}, "'model' must be a string, got a number."),
        ("/v1/prune", GOOD | {"max_tokens": 9}, "this server was started without --tokenizer"),
        ("/v1/rerank", {"query": "a"}, "The body must have 'documents', a list; it has ['query']."),
        ("/v1/rerank", RERANK | {"query": ["a"]}, "'query' must be a string, got a list."),
        ("/v1/rerank", RERANK | {"query": ""}, "The question must be a string with some text"),
        ("/v1/rerank", RERANK | {"top_n": -1}, "'top_n' must be a whole number >= 0, got -1."),
        ("/v1/rerank", RERANK | {"top_n": True}, "'top_n' must be a whole number >= 0, got true."),
        (
            "/v1/rerank",
            RERANK | {"rank_fields": ["body"]},
            "rank_fields may name 'title' and 'text'",
        ),
        (
            "/v1/rerank",
            RERANK | {"relevant_spans": {"mode": "on"}},
            "must be 'enabled' or 'disabled'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(bm25, path, body, says):
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    message = refused(post(bm25, path, body), 400)
    assert says in message
    assert len(message) <= 500


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_may_come(bm25, kind):
    response = post(bm25, "/v1/prune", GOOD, headers={"content-type": kind})
    assert "must come as content-type application/json" in refused(response, 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/prune", 405), ("POST", "/health", 405), ("POST", "/v1/prun", 404)],
)
def test_what_is_not_served_is_said(bm25, method, path, status):
    response = talk(lambda client: client.request(method, path), bm25)
    assert f"{method} {path} is not served here. There are /v1/prune" in refused(response, status)


# -------------------------------------------------------------------------------------- /v1/rerank


@pytest.mark.parametrize(
    "body",
    [
        # As the clients of Jina, Cohere v1, Cohere v2, vLLM and LiteLLM write it.
        {"model": "jina-reranker-v2-base-multilingual", "top_n": 3, "return_documents": True},
        {"model": "rerank-v3.5", "rank_fields": ["text"], "max_chunks_per_doc": 10},
        {"model": "rerank-v3.5", "max_tokens_per_doc": 4096, "priority": 0},
        {"model": "BAAI/bge-reranker-base", "top_n": 0, "truncate_prompt_tokens": -1, "user": "a"},
        {"top_n": None, "return_documents": None},
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_answers_the_bodies_of_known_clients(tiny_pruners, path, body):
    pruner = tiny_pruners["provence"]
    documents = [
        DOCUMENTS[0],
        {"text": DOCUMENTS[1], "id": 7},
        {"title": "P", "text": DOCUMENTS[2]},
    ]
    answer = post(pruner, path, body | {"query": QUESTION, "documents": documents}).json()
    assert set(answer) == {"id", "object", "model", "results", "usage", "meta"}
    direct = pruner.prune(QUESTION, documents)
    expected = sorted(direct.passages, key=lambda p: p.rank)
    assert [r["index"] for r in answer["results"]] == [p.index for p in expected]
    scores = [r["relevance_score"] for r in answer["results"]]
    assert scores == pytest.approx([p.relevance for p in expected])
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert [r["document"] for r in answer["results"]] == [
        {"text": DOCUMENTS[r["index"]]} for r in answer["results"]
    ]
    tokenizer = pruner.scorer.checkpoint.tokenizer
    count = [len(tokenizer.encode(t, add_special_tokens=False)) for t in (QUESTION, *DOCUMENTS)]
    read = 3 * count[0] + sum(count[1:])
    assert answer["usage"] == {"prompt_tokens": read, "total_tokens": read}


def test_rerank_gives_the_best_alone_without_their_text(tiny_pruners):
    pruner = tiny_pruners["late"]
    body = RERANK | {"top_n": 1, "return_documents": False}
    [best] = post(pruner, "/rerank", body).json()["results"]
    assert set(best) == {"index", "relevance_score"}
    assert (
        best["index"] == min(pruner.prune(QUESTION, DOCUMENTS).passages, key=lambda p: p.rank).index
    )


def test_relevant_spans_are_the_kept_sentences_best_first(tiny_pruners):
    pruner = tiny_pruners["both"]
    spans = {"mode": "enabled", "threshold": 0.3, "max_spans": 2}
    answer = post(pruner, "/v2/rerank", RERANK | {"relevant_spans": spans}).json()
    direct = pruner.prune(QUESTION, DOCUMENTS, threshold=0.3)
    assert any(p.kept for p in direct.passages)
    for told in answer["results"]:
        kept = sorted(direct.passages[told["index"]].kept, key=lambda s: -s.score)[:2]
        expected = [(s.start, s.end, pytest.approx(s.score)) for s in kept]
        found = [(s["start"], s["end"], s["score"]) for s in told.get("relevant_spans", [])]
        assert found == expected
    off = RERANK | {"relevant_spans": {"mode": "disabled"}}
    assert all(
        "relevant_spans" not in told for told in post(pruner, "/rerank", off).json()["results"]
    )


# ------------------------------------------------------------------------------------- the limits


def test_a_large_body_is_refused_while_it_comes(bm25):
    sent = 0

    async def endless():  # chunked: no content-length says how much will come
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 1000

    async def main(client):
        headers = {"content-type": "application/json"}
        return await client.post("/v1/prune", content=endless(), headers=headers)

    response = talk(main, bm25, limits=Limits(body_bytes=10_000))
    assert "The body has more than 10000 bytes" in refused(response, 413)
    assert sent <= 10 * PATIENCE + 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"passages": ["a"] * 11}, "11 passages are more than 10"),
        ({"passages": ["a" * 600, {"text": "b" * 600}]}, "characters are more than 1000"),
        ({"passages": [{"text": "b", "title": "t" * 1200}]}, "characters are more than 1000"),
        ({"question": "q" * 300, "passages": ["a"] * 4}, "characters are more than 1000"),
    ],
)
def test_too_many_passages_or_characters(bm25, body, says):
    limits = Limits(passages=10, characters=1000)
    response = post(bm25, "/v1/prune", {"question": "q", **body}, limits=limits)
    assert says in refused(response, 413)


@pytest.mark.parametrize("name", ["body_bytes", "passages", "characters", "seconds", "requests"])
def test_limits_are_positive(name):
    with pytest.raises(InputError, match=f"The limit {name} must be more than 0, got 0"):
        Limits(**{name: 0})


def test_who_waits_too_long_is_told_so(gated):
    response = post(gated, "/v1/prune", GOOD, limits=Limits(seconds=0.1))
    assert "There was no answer within 0.1 s" in refused(response, 504)


def test_a_body_that_does_not_come_is_not_waited_for(bm25):
    async def slow():
        yield b'{"question"'
        await asyncio.sleep(10)

    async def main(client):
        headers = {"content-type": "application/json"}
        return await client.post("/v1/prune", content=slow(), headers=headers)

    response = talk(main, bm25, limits=Limits(seconds=0.1))
    assert "The body did not arrive within 0.1 s" in refused(response, 408)


async def _until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("It never happened.")


@pytest.mark.parametrize("limits", [Limits(requests=2), Limits(queue_characters=300)])
def test_a_full_house_says_come_back_and_health_answers(gated, limits):
    async def main(client):
        waiting = [asyncio.create_task(client.post("/v1/prune", json=GOOD)) for _ in range(2)]
        await _until(lambda: gated.scorer.seen)
        await asyncio.sleep(0.02)
        health = await client.get("/health")
        full = await client.post("/v1/rerank", json=RERANK)
        page = (await client.get("/metrics")).text
        gated.scorer.gate.set()
        return health, full, page, await asyncio.gather(*waiting)

    health, full, page, waited = talk(main, gated, limits=limits)
    assert health.json()["status"] == "ok"
    refused(full, 503)
    assert int(full.headers["retry-after"]) >= 1
    assert waited[0].status_code == 200
    assert 'prunekit_rejected_total{reason="overloaded_error"}' in page
    assert "prunekit_queue_requests 0.0" not in page


def test_a_client_that_leaves_is_not_scored(gated):
    async def main(client):
        first = asyncio.create_task(client.post("/v1/prune", json=GOOD))
        await _until(lambda: gated.scorer.seen)
        statuses = []
        app = client._transport.app
        body = json.dumps(GOOD | {"question": "Who left?"}).encode()
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive():
            if len(messages) == 1:
                await asyncio.sleep(0.05)
            return messages.pop(0)

        async def send(message):
            statuses.append(message.get("status"))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/prune", "headers": headers}
        await app(scope | {"query_string": b""}, receive, send)
        gated.scorer.gate.set()
        await first
        return statuses

    assert talk(main, gated)[0] == 499
    assert gated.scorer.seen == [QUESTION]


def test_a_fault_of_the_server_is_500_and_tells_no_secret(gated, caplog):
    gated.scorer.gate.set()
    message = refused(post(gated, "/v1/prune", GOOD | {"passages": ["boom"]}), 500)
    assert "secret" not in message
    assert "secret" in caplog.text


# ------------------------------------------------------------------------------------- the key


class Unread:
    """A body that nobody may ask for."""

    def __aiter__(self):
        return self

    async def __anext__(self):
        raise AssertionError("The body was read.")


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Basic key-1", "Bearer key-1x", "key-1", "Bearer é"]
)
def test_without_the_key_the_body_is_not_read(bm25, header):
    headers = {"content-type": "application/json"}
    if header:
        headers["authorization"] = header.encode()

    async def main(client):
        paths = ("/v1/prune", "/v1/rerank", "/metrics", "/nothing")
        health = await client.get("/health")
        return health, [
            await client.post(path, content=Unread(), headers=headers) for path in paths
        ]

    health, responses = talk(main, bm25, api_key="key-1")
    assert health.status_code == 200
    for response in responses:
        refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"


def test_with_the_key_all_is_open(bm25):
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} key-1"}
        assert post(bm25, "/v1/prune", GOOD, headers=headers, api_key="key-1").status_code == 200


@pytest.mark.parametrize("key", ["", " a", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(bm25, key):
    with pytest.raises(InputError, match="The API key must be ASCII characters"):
        create_app(bm25, api_key=key)


# -------------------------------------------------------------------------------- metrics and log


def test_metrics_count_what_happened(bm25, caplog):
    async def main(client):
        await asyncio.gather(*(client.post("/v1/prune", json=GOOD) for _ in range(3)))
        await client.post("/v1/prune", json={})
        await client.get("/nothing")
        return (await client.get("/metrics")).text

    with caplog.at_level(logging.INFO, "prunekit.server"):
        page = talk(main, bm25)
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    assert lines['prunekit_requests_total{route="/v1/prune",status="200"}'] == "3.0"
    assert lines['prunekit_requests_total{route="/v1/prune",status="400"}'] == "1.0"
    assert lines['prunekit_requests_total{route="other",status="404"}'] == "1.0"
    assert lines['prunekit_rejected_total{reason="invalid_request_error"}'] == "1.0"
    assert lines['prunekit_request_seconds_count{route="/v1/prune"}'] == "4.0"
    assert lines["prunekit_batch_requests_sum"] == "3.0"
    assert lines["prunekit_queue_requests"] == "0.0"
    given = sum(map(len, DOCUMENTS))
    kept = sum(len(p.text) for p in bm25.prune(QUESTION, DOCUMENTS).passages)
    assert float(lines["prunekit_characters_in_total"]) == 3 * given
    assert float(lines["prunekit_characters_kept_total"]) == 3 * kept
    said = [record.message for record in caplog.records if record.name == "prunekit.server"]
    assert sum(f"3 passages, {given} → {kept} characters" in line for line in said) == 3
    assert len(said) == 5
    assert not any(QUESTION in line for line in said)
