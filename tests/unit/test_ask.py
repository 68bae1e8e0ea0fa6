"""Many prompts at once, to a server (order, retries, refusals, a stop), vLLM and transformers."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data_prune.self_distill import Request
from pipelines.ask import MAX_NEW_TOKENS, AskEndpoint, AskLocal, AskVllm
from pipelines.language_model import Endpoint, EndpointError, LocalModel
from prune_core.errors import InputError, MissingExtra
from rag_prune.context.label import Item, Prompt, Reply, label, prompt
from rag_prune.context.result import Passage
from tiny import toy_language_model, toy_tokenizer

Rule = Callable[[str, int], tuple[int, str]]  # (the prompt, how often it came) -> (status, text)


class Server:
    """Answers each prompt by a rule, and notes what was asked and how much at a time."""

    def __init__(self) -> None:
        self.rule: Rule = lambda text, _: (200, f"to {text}")
        self.delay = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        lock, noted = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with lock:
                    noted.bodies.append(body)
                    noted.at_once += 1
                    noted.most_at_once = max(noted.most_at_once, noted.at_once)
                    times = sum(b["messages"][0]["content"] == text for b in noted.bodies)
                time.sleep(noted.delay)
                status, said = noted.rule(text, times)
                message = {"content": said}
                usage = {"prompt_tokens": 7, "completion_tokens": 3}
                reply = {"choices": [{"message": message}], "usage": usage}
                if status != 200:
                    reply = {"error": {"message": said}}
                data = json.dumps(reply).encode()
                with lock:
                    noted.at_once -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:  # the client gave up
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: object) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def asks(self, timeout: float = 10, **options: Any) -> AskEndpoint:
        return AskEndpoint(Endpoint(self.url, "big", timeout=timeout), pause=0.01, **options)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}", {"type": "object"}) for i in range(n)]


def test_each_prompt_gets_its_own_reply_many_at_a_time(server: Server) -> None:
    server.delay = 0.05
    replies = dict(server.asks(concurrency=4)(prompts(20)))
    assert {i: reply.text for i, reply in replies.items()} == {
        i: f"to prompt {i}" for i in range(20)
    }
    assert (replies[3].prompt_tokens, replies[3].new_tokens, replies[3].refused) == (7, 3, False)
    assert 2 <= server.most_at_once <= 4
    assert server.bodies[0].items() >= {
        "model": "big",
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": {"type": "object"}},
        },
    }.items()  # fmt: skip


def request(text: str, temperature: float = 0.0, seed: int = 0, most: int = 9) -> Request:
    return Request(({"role": "user", "content": text},), most, temperature, seed)


def test_a_request_says_itself_how_it_is_drawn(server: Server) -> None:
    asked = [request("one", 0.7, 5), request("two")]
    assert [reply.text for _, reply in sorted(server.asks(concurrency=1)(asked))] == [
        "to one",
        "to two",
    ]
    drawn, greedy = sorted(server.bodies, key=lambda body: str(body["messages"]))
    assert drawn == {
        "model": "big",
        "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 9,
        "temperature": 0.7,
        "seed": 5,
    }
    assert (greedy["temperature"], "seed" in greedy) == (0, False)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.rule = lambda text, times: (status, "busy") if times < 3 else (200, "well")
    [(_, reply)] = server.asks()(prompts(1))
    assert (reply.text, len(server.bodies)) == ("well", 3)

    server.rule = lambda *_: (status, "busy for ever")
    with pytest.raises(EndpointError, match="busy for ever"):
        list(server.asks(attempts=2)(prompts(1)))


def test_a_reply_that_comes_too_late_is_asked_for_again(server: Server) -> None:
    server.delay = 0.3
    with pytest.raises(EndpointError, match=r"did not answer within 0\.1 seconds"):
        list(server.asks(timeout=0.1, attempts=2)(prompts(1)))
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_will_not_read_stops_no_other(server: Server, status: int) -> None:
    server.rule = lambda text, _: (status, "too long") if text == "prompt 1" else (200, "well")
    replies = dict(server.asks()(prompts(3)))
    assert [replies[i].refused for i in range(3)] == [False, True, False]
    assert replies[1].text.endswith(f"status {status}: too long")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(server: Server, status: int) -> None:
    server.rule = lambda *_: (status, "no")
    with pytest.raises(EndpointError, match=f"status {status}: no"):
        list(server.asks(concurrency=1)(prompts(200)))
    assert len(server.bodies) < 50


def test_who_stops_listening_sends_no_more(server: Server) -> None:
    server.delay = 0.02
    replies = server.asks(concurrency=2)(prompts(200))
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    sent = len(server.bodies)
    time.sleep(0.2)
    assert len(server.bodies) == sent < 20


def test_a_server_that_dies_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    """Through the labeller: what was answered before the end is not asked again."""
    items = [Item("Who?", Passage.read(f"Pierre found {i}. It rained.", 0)) for i in range(10)]

    def rule(text: str, times: int) -> tuple[int, str]:
        said = {"answer": "Pierre", "sentences": [1]} if "Pierre" in text else None
        return 200, json.dumps(said or {"answer": None, "sentences": []})

    def dying(text: str, times: int) -> tuple[int, str]:
        return rule(text, times) if len(server.bodies) <= 5 else (503, "dying")

    server.rule = dying
    with pytest.raises(EndpointError, match="dying"):
        label(items, server.asks(concurrency=1, attempts=1), tmp_path, progress=False)
    before = [body["messages"][0]["content"] for body in server.bodies[:5]]
    server.bodies.clear()
    server.rule = rule
    labels = label(items, server.asks(), tmp_path, progress=False)
    assert [found.outcome for found in labels.labels] == ["answered"] * 10
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(asked) == len(set(asked))
    assert len(asked) + len(before) == 30 - 9  # without their first sentence all are the same
    assert not set(before) & set(asked)


def test_arguments() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "big")
    with pytest.raises(InputError, match="concurrency and attempts must be at least 1, got 0"):
        AskEndpoint(endpoint, concurrency=0)


# ------------------------------------------------------------------------------------------- vLLM


class StandIn:
    """What AskVllm needs of vllm.LLM: notes what it is given, and says how long each prompt is."""

    def __init__(self) -> None:
        self.tokenizer = toy_tokenizer()
        model_config = SimpleNamespace(max_model_len=MAX_NEW_TOKENS + 200)
        self.llm_engine = SimpleNamespace(model_config=model_config)
        self.batches: list[Any] = []

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, inputs: Any, params: Any, use_tqdm: bool) -> Any:
        self.batches.append((inputs, params))
        return [
            SimpleNamespace(
                prompt_token_ids=given["prompt_token_ids"],
                outputs=[SimpleNamespace(text=str(len(given["prompt_token_ids"])), token_ids=[1])],
            )
            for given in inputs
        ]


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two classes that a call needs, as records of their arguments."""
    module = ModuleType("vllm.sampling_params")
    module.SamplingParams = module.StructuredOutputsParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module)


@pytest.mark.usefixtures("no_vllm")
def test_vllm_gets_batches_with_schemas_and_no_prompt_that_is_too_long() -> None:
    llm = StandIn()
    texts = ["cat", "cat " * 500, "[SEP]", "dog"]
    asked = [Prompt(text, {"title": text}) for text in texts]
    replies = dict(AskVllm(llm, "tiny", batch=2)(asked))
    assert [replies[i].refused for i in range(4)] == [False, True, False, False]
    assert "the model reads 200" in replies[1].text
    assert [len(inputs) for inputs, _ in llm.batches] == [1, 2]
    (_, [first]), ([ended, _], _) = llm.batches
    assert (first.temperature, first.structured_outputs.json) == (0, {"title": "cat"})
    assert replies[0].prompt_tokens == int(replies[0].text)
    # A passage that spells the end of a turn does not end it.
    end = llm.tokenizer.convert_tokens_to_ids("[SEP]")
    assert end not in ended["prompt_token_ids"]


@pytest.mark.usefixtures("no_vllm")
def test_vllm_draws_each_request_with_its_own_seed() -> None:
    llm = StandIn()
    window = llm.llm_engine.model_config.max_model_len
    asked = [
        request("cat", 0.7, 5),
        request("cat", most=8),
        request("cat", most=window),
        Prompt("cat", {"title": "cat"}),
    ]
    replies = dict(AskVllm(llm, "tiny")(asked))
    assert [replies[i].refused for i in range(4)] == [False, False, True, False]
    [(_, [drawn, greedy, label])] = llm.batches
    assert vars(drawn) == {
        "temperature": 0.7,
        "seed": 5,
        "max_tokens": 9,
        "structured_outputs": None,
    }
    assert (greedy.temperature, greedy.seed, greedy.max_tokens) == (0, None, 8)
    assert (label.seed, label.max_tokens) == (None, MAX_NEW_TOKENS)


def test_without_vllm_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"prunekit\[serve\]"):
        AskVllm.from_pretrained("folder")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # vLLM's own
def test_a_real_model_keeps_to_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM with the demo's model: every reply is read, and its numbers are those of sentences."""
    pytest.importorskip("vllm")
    from pipelines.small_model import small_model
    from rag_prune.context.label import read_reply

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    ask = AskVllm.from_pretrained(small_model(progress=False))
    text = "Marie was born in Warsaw. With Pierre she found radium. She liked cycling."
    sentences = [f"{part}." for part in text.rstrip(".").split(". ")]
    asked = [prompt("Who found radium?", None, sentences[:n]) for n in (1, 2, 3)]
    replies = dict(ask(asked))
    for i, n in enumerate((1, 2, 3)):
        assert read_reply(replies[i].text, n) is not None, replies[i]
        assert 0 < replies[i].new_tokens < MAX_NEW_TOKENS


# ----------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel.from_pretrained(toy_language_model(tmp_path_factory.mktemp("toy")))


def toy_requests(temperature: float) -> list[Request]:
    words = ["where", "is", "the", "cat", "now", "it", "was", "in", "paris", "long", "ago"]
    return [request(" ".join(words[:n]), temperature, seed=n, most=n + 3) for n in range(1, 11)]


def written(ask: AskLocal, asked: Sequence[Prompt | Request]) -> list[Reply]:
    replies = dict(ask(asked))
    return [replies[i] for i in range(len(asked))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_in_a_batch_changes_no_reply(toy: LocalModel, temperature: float) -> None:
    """Padding and the others' draws leave a reply as it is alone, and as LocalModel answers."""
    asked = toy_requests(temperature)
    alone = [written(AskLocal(toy, "toy", batch=1), [one])[0] for one in asked]
    for batch in (3, 10):
        assert written(AskLocal(toy, "toy", batch=batch), asked) == alone
    assert written(AskLocal(toy, "toy", batch=4), asked[::-1]) == alone[::-1]
    assert [reply.new_tokens for reply in alone] == [one.max_new_tokens for one in asked]
    straight = [toy.complete(one.messages, one.max_new_tokens).text for one in asked]
    assert ([reply.text for reply in alone] == straight) == (temperature == 0)


def test_a_seed_draws_the_same_and_another_something_else(toy: LocalModel) -> None:
    ask = AskLocal(toy, "toy")
    asked = [request("where is the cat", 2.0, seed) for seed in (1, 1, 2, 3)]
    first, same, *others = written(ask, asked)
    assert first == same
    assert first not in others


def test_draws_follow_the_softmax(toy: LocalModel) -> None:
    """4,000 first tokens: each as often as its probability at that temperature says."""
    import numpy as np
    import torch

    from pipelines.language_model import chat_ids

    temperature, n = 2.0, 4000
    asked = [request("where is the cat", temperature, seed, most=1) for seed in range(n)]
    ids = chat_ids(toy.tokenizer, asked[0].messages)
    with torch.no_grad():
        logits = toy.model(torch.tensor([ids])).logits[0, -1]
    expected = (logits / temperature).softmax(0).numpy()
    drawn = [reply.text for reply in written(AskLocal(toy, "toy", batch=1000), asked)]
    names = [
        toy.tokenizer.decode([i], skip_special_tokens=True).strip() for i in range(len(logits))
    ]
    found = np.array([drawn.count(name) for name in names]) / n
    unique = np.array([names.count(name) == 1 for name in names])
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(found - expected) < 5 * error + 1e-3)[unique].all()
    assert expected[unique].max() > 0.05


def test_a_reply_ends_at_its_end_token(toy: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch goes on to write after it belongs to others, and is not counted."""
    asked = toy_requests(0.0)
    whole = written(AskLocal(toy, "toy"), asked)
    [ids] = toy.continue_all([[7, 8, 9]], 9)
    monkeypatch.setattr(toy.model.generation_config, "eos_token_id", [ids[4]])
    assert toy.continue_all([[7, 8, 9]], 9) == [ids[: ids.index(ids[4]) + 1]]
    ended = written(AskLocal(toy, "toy"), asked)
    assert all(b.new_tokens <= a.new_tokens for a, b in zip(whole, ended, strict=True))
    assert sum(b.new_tokens for b in ended) < sum(a.new_tokens for a in whole)


def test_transformers_refuses_what_is_too_long(toy: LocalModel) -> None:
    assert toy.longest is not None
    asked = [request("cat " * toy.longest), request("cat"), Prompt("dog", {})]
    replies = written(AskLocal(toy, "toy"), asked)
    assert [reply.refused for reply in replies] == [True, False, False]
    assert f"the model reads {toy.longest - 9:,}" in replies[0].text
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        AskLocal(toy, "toy", batch=0)
