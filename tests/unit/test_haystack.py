import asyncio
import copy
import threading

import pytest
from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.core.errors import DeserializationError
from haystack.dataclasses import ByteStream
from haystack.document_stores.in_memory import InMemoryDocumentStore

from prune_core.errors import CheckpointError, InputError
from rag_prune import ContextPruner
from rag_prune.context.baselines import BM25
from rag_prune.integrations.haystack import PruningRanker

QUESTION = "Who found radium?"
TEMPLATE = "{% for d in documents %}{{ d.content }}|{% endfor %}{{ question }}"


@pytest.fixture
def prune():
    return PruningRanker(method="bm25", threshold=0.5)


@pytest.fixture
def documents():
    return [
        Document(content="Cats sleep a lot. Dogs bark.", score=0.9, meta={"title": 7}),
        Document(
            id="curie",
            content="It is a metal. Pierre and Marie Curie found radium. They liked cycling.",
            meta={"title": "Curie", "pages": [3, 4]},
            embedding=[0.5, 1.0],
        ),
        Document(content="Radium was found in 1898.", score=0.1),
        Document(blob=ByteStream(b"GIF89a", mime_type="image/gif")),
    ]


def contents(documents):
    return [document.content for document in documents]


def test_documents_come_back_cut_ranked_and_with_all_else(prune, documents):
    before = copy.deepcopy(documents)
    best, curie = prune.run(QUESTION, documents)["documents"]
    # The first document shares no word with the question, and the last one has no text.
    assert contents([best, curie]) == [
        "Radium was found in 1898.",
        "Pierre and Marie Curie found radium. ",
    ]
    assert 0 < curie.score < best.score == 1
    assert (best.id, curie.id) == (documents[2].id, "curie")
    assert curie.embedding == [0.5, 1.0]
    assert curie.meta == {
        "title": "Curie",
        "pages": [3, 4],
        "relevance_score": curie.score,
        "keep_ratio": 37 / 71,
        "kept_spans": [[15, 52]],
    }
    assert documents == before
    assert not {id(d) for d in (best, curie)} & {id(d) for d in documents}
    assert Document.from_dict(curie.to_dict()) == curie


def test_the_pruner_sees_titles_that_are_strings(prune, documents, monkeypatch):
    seen, score = [], BM25.score
    monkeypatch.setattr(BM25, "score", lambda self, r: (seen.extend(r), score(self, r))[1])
    prune.run(QUESTION, documents)
    assert [p.title for p in seen[0].passages] == [None, "Curie", None, None]


def test_options_are_those_of_prune(documents, tmp_path):
    from tiny import wordpiece

    tokenizer = wordpiece(["radium", "was", "found", "in", "1898", "."])
    tokenizer.save_pretrained(tmp_path)
    passages = [
        {"text": d.content or "", "title": "Curie" if d.id == "curie" else None} for d in documents
    ]
    pruner = ContextPruner(BM25())
    for options in (
        {"keep_ratio": 0.4},
        {"max_tokens": 9, "tokenizer": str(tmp_path)},
        {"threshold": 0.0, "top_k": 1},
        {"threshold": 0.0, "reorder": False},
    ):
        kept = PruningRanker(method="bm25", **options).run(QUESTION, documents)["documents"]
        if "tokenizer" in options:
            options["tokenizer"] = tokenizer
        result = pruner.prune(QUESTION, passages, **options)
        assert contents(kept) == [p.text for p in result.remaining] != []


def test_top_k_of_a_run_goes_before_that_of_the_component(documents):
    prune = PruningRanker(method="bm25", threshold=0.0, top_k=1)
    assert len(prune.run(QUESTION, documents)["documents"]) == 1
    assert len(prune.run(QUESTION, documents, top_k=2)["documents"]) == 2
    with pytest.raises(InputError, match="top_k must be a whole number of passages >= 1, got 0"):
        prune.run(QUESTION, documents, top_k=0)


def build(prune, documents):
    store = InMemoryDocumentStore()
    store.write_documents([d for d in documents if d.content])
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store))
    pipeline.add_component("prune", prune)
    pipeline.add_component("prompt", PromptBuilder(TEMPLATE, required_variables="*"))
    pipeline.connect("retriever.documents", "prune.documents")
    pipeline.connect("prune.documents", "prompt.documents")
    return pipeline


def asked(question):
    return {
        "retriever": {"query": question},
        "prune": {"query": question},
        "prompt": {"question": question},
    }


def test_in_a_pipeline(prune, documents):
    pipeline = build(prune, documents)
    expected = "Radium was found in 1898.|Pierre and Marie Curie found radium. |Who found radium?"
    assert pipeline.run(asked(QUESTION)) == {"prompt": {"prompt": expected}}
    assert asyncio.run(pipeline.run_async(asked(QUESTION))) == {"prompt": {"prompt": expected}}
    nothing = "Do zebras swim?"
    assert pipeline.run(asked(nothing)) == {"prompt": {"prompt": nothing}}


def test_a_pipeline_survives_being_saved(documents, tiny_checkpoint):
    prune = PruningRanker(
        str(tiny_checkpoint), method="late", device="cpu", keep_ratio=0.5, top_k=2, reorder=False
    )
    pipeline = build(prune, documents)
    text = pipeline.dumps()  # YAML
    again = Pipeline.loads(text, allowed_modules=["rag_prune"])
    assert again.to_dict()["components"] == pipeline.to_dict()["components"]
    assert again.run(asked(QUESTION)) == pipeline.run(asked(QUESTION))
    loaded = again.get_component("prune")
    assert loaded.run(QUESTION, documents) == prune.run(QUESTION, documents)
    with pytest.raises(DeserializationError):  # why the docs say allowed_modules
        Pipeline.loads(text)


def test_to_dict_holds_every_argument():
    arguments = {
        "model": "a/b",
        "method": "late",
        "device": "cpu",
        "threshold": None,
        "keep_ratio": None,
        "max_tokens": 512,
        "tokenizer": "c/d",
        "top_k": 3,
        "reorder": False,
    }
    saved = PruningRanker(**arguments).to_dict()
    assert saved["type"] == "rag_prune.integrations.haystack.PruningRanker"
    assert saved["init_parameters"] == arguments
    assert PruningRanker.from_dict(saved).to_dict() == saved


def test_the_model_is_loaded_once_and_not_before_warm_up(prune, documents, monkeypatch):
    loaded, load = [], ContextPruner.from_pretrained

    def recorded(*arguments, **options):
        loaded.append(options["method"])
        return load(*arguments, **options)

    monkeypatch.setattr(ContextPruner, "from_pretrained", recorded)
    prune.warm_up()
    asyncio.run(prune.warm_up_async())
    prune.run(QUESTION, documents)
    assert loaded == ["bm25"]
    missing = PruningRanker("no/where/here")
    with pytest.raises(CheckpointError, match="no/where/here"):
        missing.warm_up()


def test_async_leaves_the_event_loop_free(prune, documents, monkeypatch):
    expected = prune.run(QUESTION, documents)
    entered, go_on, threads, score = threading.Event(), threading.Event(), [], BM25.score

    def slow(self, requests):
        threads.append(threading.current_thread())
        entered.set()
        assert go_on.wait(timeout=30)
        return score(self, requests)

    monkeypatch.setattr(BM25, "score", slow)

    async def main():
        running = asyncio.create_task(prune.run_async(QUESTION, documents))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # only a loop that is free gets here
        return await running

    assert asyncio.run(main()) == expected
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 0.1, "keep_ratio": 0.5}, "got threshold and keep_ratio: choose one budget"),
        ({"threshold": 1.5}, r"threshold must be a number in \[0, 1\], got 1.5"),
        ({"max_tokens": 5}, "max_tokens needs tokenizer"),
        ({"top_k": 0}, "top_k must be a whole number of passages >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PruningRanker(**options)


def test_bad_calls_are_told_so(prune):
    with pytest.raises(InputError, match="question must be a string with some text"):
        prune.run(" ", [])
    with pytest.raises(InputError, match="A document must be Haystack's, got str"):
        prune.run(QUESTION, ["Radium."])
    assert prune.run(QUESTION, []) == {"documents": []}
