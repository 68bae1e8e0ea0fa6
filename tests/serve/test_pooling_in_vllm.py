"""The bundled pruner, exported and hosted by vLLM, decides what it decides in process."""

import asyncio
import json

import httpx
import numpy as np
import pytest
from scipy.special import logit

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.retrieve import Retriever
from rag_prune import ContextPruner
from rag_prune.context.export import export
from serving import served

pytestmark = pytest.mark.slow
ODD = [
    "",
    "  \n ",
    "[SEP] Who found radium? [CLS]",
    "日本語の文。次の文。",
    "Emoji 👩‍👩‍👧 here. CRLF\r\nthere.",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "pruner"
    export(folder)
    arguments = ("--model", str(folder), "--served-model-name", "pruner", "--runner", "pooling")
    with served(folder.parent / "log", *arguments) as url:
        yield url


@pytest.fixture(scope="module")
def here():
    return ContextPruner.from_pretrained(method="provence", device="cpu")


def pool(url, **data):
    return httpx.post(
        f"{url}/pooling",
        content=json.dumps({"model": "pruner", "data": data}),
        headers={"content-type": "application/json"},
        timeout=600,
    )


def spans(answer):
    return [
        [[(s["start"], s["end"]) for s in p[fate]] for fate in ("kept", "dropped")]
        for p in answer["passages"]
    ]


def test_real_passages_are_cut_as_in_process(url, here, record_property):
    retriever = Retriever(demo_passages())
    scale = here.scorer.checkpoint.settings.calibration["provence"].scale
    furthest = sentences = 0
    for asked in demo_questions():
        passages = [
            {"title": p["title"], "text": p["text"]} for p in retriever.search(asked["question"], 5)
        ]
        answer = pool(url, question=asked["question"], passages=passages)
        assert answer.status_code == 200, answer.text
        theirs = answer.json()["data"]
        ours = here.prune(asked["question"], passages).to_dict()
        assert theirs["text"] == ours["text"]
        assert spans(theirs) == spans(ours)
        for a, b in zip(theirs["passages"], ours["passages"], strict=True):
            apart = [abs(logit(a["relevance"]) - logit(b["relevance"]))]
            for fate in ("kept", "dropped"):
                x, y = (np.array([s["score"] for s in p[fate]]) for p in (a, b))
                apart += (abs(logit(x) - logit(y)) / scale).tolist()
            sentences += len(apart) - 1
            furthest = max(furthest, *apart)
    record_property("sentences", sentences)
    record_property("max_logit_difference", furthest)
    print(f"{sentences} sentences, largest difference of logits {furthest:.1e}")
    assert sentences > 500
    assert furthest < 1e-4


@pytest.mark.parametrize("options", [{}, {"keep_ratio": 0.3}, {"threshold": 0.4, "top_k": 2}])
def test_odd_passages_and_every_budget(url, here, options):
    question = "Who found radium?"
    theirs = pool(url, question=question, passages=ODD, reorder=False, **options).json()["data"]
    ours = here.prune(question, ODD, reorder=False, **options).to_dict()
    assert spans(theirs) == spans(ours)
    assert theirs["keep_ratio"] == ours["keep_ratio"]


def test_nothing_to_read(url):
    for passages in ([], [""], [" \n"]):
        assert pool(url, question="Who?", passages=passages).json()["data"]["text"] == ""


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"question": "Who?", "passages": ["\ud800 lone."]}, "half of a character"),
        ({"question": " ", "passages": ["a"]}, "The question must be a string with some text"),
        ({"question": "Who?"}, "passages"),
        ({"question": "Who?", "passages": [3]}, "Passage 0 must be a string"),
        ({"question": "Who?", "passages": [], "treshold": 1}, "Did you mean 'threshold'"),
        ({"question": "Who?", "passages": [], "threshold": 4}, "threshold must be a number"),
        ({"question": "Who?", "passages": ["a"] * 1001}, "1000 passages, got 1001"),
        ({"question": "Who?", "passages": ["a" * 1_000_001]}, "1000000 characters"),
    ],
)
def test_bad_requests_are_answered_with_a_sentence(url, data, sentence):
    answer = pool(url, **data)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_requests_of_one_id_get_their_own_answers(url):
    """The id is the client's, so two may send the same one at the same time."""

    async def all_at_once():
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            return await asyncio.gather(
                *(
                    client.post(
                        "/pooling",
                        json={
                            "model": "pruner",
                            "data": {"question": "Who?", "passages": [f"Number {i} did it."]},
                        },
                        headers={"x-request-id": "same"},
                    )
                    for i in range(12)
                )
            )

    answers = [answer.json()["data"] for answer in asyncio.run(all_at_once())]
    assert [a["passages"][0]["text"] for a in answers] == [f"Number {i} did it." for i in range(12)]
