import asyncio
import copy
import threading

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tracers.context import collect_runs

from prune_core.errors import InputError
from rag_prune import ContextPruner
from rag_prune.context.baselines import BM25
from rag_prune.integrations.langchain import PruningCompressor

QUESTION = "Who found radium?"


class Recorder(BM25):
    """BM25, which notes when it is called."""

    name = "recorder"

    def __init__(self):
        self.calls, self.threads = [], []

    def score(self, requests):
        self.calls.append(requests)
        self.threads.append(threading.current_thread())
        return super().score(requests)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def compressor(recorder):
    return PruningCompressor(pruner=ContextPruner(recorder), threshold=0.5)


@pytest.fixture
def documents():
    return [
        Document("Cats sleep a lot. Dogs bark at cats.", metadata={"source": "b.txt", "title": 7}),
        Document(
            "It is a metal. Pierre and Marie Curie found radium. They liked cycling.",
            id="curie",
            metadata={"title": "Curie", "pages": [3, 4]},
        ),
        Document("Radium was found in 1898.", metadata={"relevance_score": -3.0}),
    ]


def test_documents_come_back_cut_ranked_and_with_their_metadata(compressor, documents):
    before = copy.deepcopy(documents)
    kept = compressor.compress_documents(documents, QUESTION)
    # The last document is the best, and the first one shares no word with the question.
    assert [d.page_content for d in kept] == [
        "Radium was found in 1898.",
        "Pierre and Marie Curie found radium. ",
    ]
    best, curie = kept
    assert curie.id == "curie"
    assert curie.page_content == documents[1].page_content[15:52]
    score = curie.metadata.pop("relevance_score")
    assert curie.metadata == {
        "title": "Curie",
        "pages": [3, 4],
        "kept_spans": [[15, 52]],
        "keep_ratio": 37 / 71,
    }
    assert 0 < score < best.metadata["relevance_score"] == 1
    assert documents == before
    assert not {id(d) for d in kept} & {id(d) for d in documents}


def test_the_pruner_sees_titles_that_are_strings(compressor, recorder, documents):
    compressor.compress_documents(documents, QUESTION)
    [[request]] = recorder.calls
    assert [p.title for p in request.passages] == [None, "Curie", None]


def test_options_are_those_of_prune(recorder, documents):
    pruner = ContextPruner(recorder)
    for options in (
        {"keep_ratio": 0.4},
        {"max_tokens": 9, "tokenizer": type("Words", (), {"encode": str.split})},
        {"threshold": 0.0, "top_k": 1},
        {"threshold": 0.0, "reorder": False},
    ):
        kept = PruningCompressor(pruner=pruner, **options).compress_documents(documents, QUESTION)
        passages = [
            {"text": d.page_content, "title": "Curie" if d.id == "curie" else None}
            for d in documents
        ]
        result = pruner.prune(QUESTION, passages, **options)
        assert [d.page_content for d in kept] == [p.text for p in result.remaining]


def test_a_subclass_of_document_keeps_its_type_and_fields(compressor):
    class Page(Document):
        number: int

    [kept] = compressor.compress_documents([Page("Radium. Was found.", number=4)], QUESTION)
    assert type(kept) is Page
    assert kept.number == 4


def test_no_documents(compressor):
    assert compressor.compress_documents([], QUESTION) == []
    assert compressor.batch([]) == []


def test_many_queries_are_one_call_and_give_what_each_gives_alone(compressor, recorder, documents):
    queries = [(QUESTION, documents), ("Do dogs bark?", documents[:2]), ("cats", [])]
    alone = [compressor.compress_documents(docs, query) for query, docs in queries]
    recorder.calls.clear()
    assert compressor.compress_many(queries) == alone
    assert asyncio.run(compressor.acompress_many(queries)) == alone
    assert [len(requests) for requests in recorder.calls] == [3, 3]


def test_async_leaves_the_event_loop_free(compressor, recorder, documents):
    entered, go_on = threading.Event(), threading.Event()
    score = recorder.score

    def slow(requests):
        entered.set()
        assert go_on.wait(timeout=30)
        return score(requests)

    recorder.score = slow

    async def main():
        chain_input = {"question": QUESTION, "documents": documents}
        running = [
            asyncio.create_task(compressor.acompress_documents(documents, QUESTION)),
            asyncio.create_task(compressor.ainvoke(chain_input)),
            asyncio.create_task(compressor.abatch([chain_input])),
        ]
        while not entered.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # only a loop that is free gets here
        return await asyncio.gather(*running)

    single, invoked, [batched] = asyncio.run(main())
    assert single == invoked == batched == compressor.compress_documents(documents, QUESTION)
    assert threading.main_thread() not in recorder.threads[:3]  # the fourth is the one just asked


def test_a_step_of_a_chain(compressor, recorder, documents):
    retriever = RunnableLambda(lambda question: documents)
    chain = {"question": RunnablePassthrough(), "documents": retriever} | compressor
    expected = compressor.compress_documents(documents, QUESTION)
    assert chain.invoke(QUESTION) == expected
    assert asyncio.run(chain.ainvoke(QUESTION)) == expected
    assert list(chain.stream(QUESTION)) == [expected]
    assert compressor.invoke({"query": QUESTION, "documents": documents}) == expected
    questions = [QUESTION, "Do dogs bark?", "cats"]
    one_by_one = [chain.invoke(question) for question in questions]
    recorder.calls.clear()
    assert chain.batch(questions) == one_by_one
    assert asyncio.run(chain.abatch(questions)) == one_by_one
    assert [len(requests) for requests in recorder.calls] == [3, 3]


def test_runs_are_traced(compressor, documents):
    with collect_runs() as collected:
        compressor.invoke({"question": QUESTION, "documents": documents})
    assert [run.name for run in collected.traced_runs] == ["PruningCompressor"]


def test_one_bad_input_of_a_batch_costs_only_itself(compressor, documents):
    good = {"question": QUESTION, "documents": documents}
    batch = [good, {"question": " ", "documents": documents}, good, {"documents": documents}]
    for answers in (
        compressor.batch(batch, return_exceptions=True),
        asyncio.run(compressor.abatch(batch, return_exceptions=True)),
    ):
        assert answers[0] == answers[2] == compressor.compress_documents(documents, QUESTION)
        assert "question must be a string with some text" in str(answers[1])
        assert "'question' (or 'query') and 'documents', got keys ['documents']" in str(answers[3])
    with pytest.raises(InputError, match="question must be a string"):
        compressor.batch(batch[:3])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 0.1, "keep_ratio": 0.5}, "got threshold and keep_ratio: choose one budget"),
        ({"threshold": 1.5}, r"threshold must be a number in \[0, 1\], got 1.5"),
        ({"max_tokens": 5}, "max_tokens needs tokenizer"),
        ({"top_k": 0}, "top_k must be a whole number of passages >= 1, got 0"),
        ({"treshold": 0.1}, "treshold\n  Extra inputs are not permitted"),
    ],
)
def test_bad_options_are_refused_at_once(recorder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruningCompressor(pruner=ContextPruner(recorder), **options)
    assert not recorder.calls


def test_what_is_no_document_is_refused(compressor):
    with pytest.raises(InputError, match="A document must be LangChain's, got str"):
        compressor.invoke({"question": QUESTION, "documents": ["Radium."]})
    with pytest.raises(InputError, match=r"The input must be a mapping .* got str"):
        compressor.invoke(QUESTION)


def test_in_the_retriever_of_langchain_classic(compressor, documents):
    pytest.importorskip("langchain_classic")
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.retrievers import BaseRetriever

    class All(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return documents

    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=All())
    expected = compressor.compress_documents(documents, QUESTION)
    assert retriever.invoke(QUESTION) == expected
    assert asyncio.run(retriever.ainvoke(QUESTION)) == expected
