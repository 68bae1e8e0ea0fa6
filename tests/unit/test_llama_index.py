import asyncio
import copy
import pickle
import threading

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SentenceEmbeddingOptimizer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)

from prune_core.errors import CheckpointError, InputError
from rag_prune import ContextPruner
from rag_prune.context.baselines import BM25
from rag_prune.integrations.llama_index import PruningPostprocessor

QUESTION = "Who found radium?"
CURIE = "It is a metal. Pierre and Marie Curie found radium. They liked cycling."


@pytest.fixture
def prune():
    return PruningPostprocessor(method="bm25", threshold=0.5)


@pytest.fixture
def nodes():
    return [
        NodeWithScore(node=TextNode(text="Cats sleep a lot. Dogs bark.", id_="cats"), score=0.9),
        NodeWithScore(
            node=TextNode(
                text=CURIE,
                id_="curie",
                embedding=[0.5, 1.0],
                metadata={"title": "Curie", "pages": [3, 4]},
                excluded_llm_metadata_keys=["pages"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")},
                start_char_idx=100,
                end_char_idx=171,
            ),
            score=0.8,
        ),
        NodeWithScore(node=TextNode(text="Radium was found in 1898.", metadata={"title": 7})),
    ]


def texts(nodes):
    return [found.node.get_content(MetadataMode.NONE) for found in nodes]


def test_nodes_come_back_cut_ranked_and_with_all_else(prune, nodes):
    before = copy.deepcopy(nodes)
    best, curie = prune.postprocess_nodes(nodes, query_str=QUESTION)
    assert texts([best, curie]) == [
        "Radium was found in 1898.",
        "Pierre and Marie Curie found radium. ",
    ]
    assert 0 < curie.score < best.score == 1
    assert curie.node.metadata == {
        "title": "Curie",
        "pages": [3, 4],
        "relevance_score": curie.score,
        "keep_ratio": 37 / 71,
        "kept_spans": [[15, 52]],
    }
    given = nodes[1].node
    for field in ("id_", "embedding", "relationships", "start_char_idx", "end_char_idx"):
        assert getattr(curie.node, field) == getattr(given, field)
    assert nodes == before
    assert not {id(n.node) for n in (best, curie)} & {id(n.node) for n in nodes}
    curie.node.metadata["title"] = "changed"
    assert nodes == before


def test_what_metadata_gains_is_shown_to_no_model(prune, nodes):
    [_, curie] = prune.postprocess_nodes(nodes, query_str=QUESTION)
    cut = "Pierre and Marie Curie found radium."
    assert curie.node.get_content(MetadataMode.LLM) == f"title: Curie\n\n{cut}"
    assert curie.node.get_content(MetadataMode.EMBED) == f"title: Curie\npages: [3, 4]\n\n{cut}"
    [again] = prune.postprocess_nodes([curie], query_str=QUESTION)  # no key is listed twice
    assert again.node.excluded_llm_metadata_keys == curie.node.excluded_llm_metadata_keys


def test_the_pruner_reads_the_text_alone_under_titles_that_are_strings(prune, nodes, monkeypatch):
    seen, score = [], BM25.score
    monkeypatch.setattr(BM25, "score", lambda self, r: (seen.extend(r), score(self, r))[1])
    prune.postprocess_nodes(nodes, query_str=QUESTION)
    assert [p.title for p in seen[0].passages] == [None, "Curie", None]
    assert [p.text for p in seen[0].passages] == [found.node.text for found in nodes]


def test_options_are_those_of_prune(nodes, tmp_path):
    from tiny import wordpiece

    tokenizer = wordpiece(["radium", "was", "found", "in", "1898", "."])
    tokenizer.save_pretrained(tmp_path)
    passages = [
        {"text": n.node.text, "title": "Curie" if n.node.id_ == "curie" else None} for n in nodes
    ]
    pruner = ContextPruner(BM25())
    for options in (
        {"keep_ratio": 0.4},
        {"max_tokens": 9, "tokenizer": str(tmp_path)},
        {"threshold": 0.0, "top_k": 1},
        {"threshold": 0.0, "reorder": False},
    ):
        prune = PruningPostprocessor(method="bm25", **options)
        kept = prune.postprocess_nodes(nodes, query_str=QUESTION)
        if "tokenizer" in options:
            options["tokenizer"] = tokenizer
        result = pruner.prune(QUESTION, passages, **options)
        assert texts(kept) == [p.text for p in result.remaining] != []


def test_every_kind_of_node_keeps_its_type_and_fields(prune):
    image = MediaResource(data=b"GIF89a", mimetype="image/gif")
    given = [
        Document(text=f"{CURIE} a", doc_id="document"),
        Node(
            text_resource=MediaResource(text=f"{CURIE} b"), image_resource=image, id_="multimodal"
        ),
        IndexNode(text=f"{CURIE} c", index_id="other", id_="index"),
        ImageNode(text=f"{CURIE} d", image_url="file:///radium.png", id_="image"),
        ImageNode(image_url="file:///silent.png", id_="without text"),
    ]
    before = copy.deepcopy(given)
    kept = prune.postprocess_nodes([NodeWithScore(node=n) for n in given], query_str=QUESTION)
    assert {n.node.node_id: type(n.node) for n in kept} == {
        n.node_id: type(n) for n in given if n.node_id != "without text"
    }
    assert texts(kept) == ["Pierre and Marie Curie found radium. "] * 4
    by_id = {n.node.node_id: n.node for n in kept}
    assert by_id["multimodal"].image_resource == image
    assert by_id["index"].index_id == "other"
    assert by_id["image"].image_url == "file:///radium.png"
    assert given == before


def test_a_query_engine_sends_the_model_what_is_left(prune, nodes):
    index = VectorStoreIndex([n.node for n in nodes], embed_model=MockEmbedding(embed_dim=2))
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = RetrieverQueryEngine(
        retriever=index.as_retriever(similarity_top_k=3),
        node_postprocessors=[prune],
        response_synthesizer=get_response_synthesizer(llm=MockLLM()),  # it repeats its prompt
        callback_manager=CallbackManager([debug]),
    )
    answer = engine.query(QUESTION)
    assert texts(answer.source_nodes) == [
        "Radium was found in 1898.",
        "Pierre and Marie Curie found radium. ",
    ]
    prompt = str(answer)
    assert prompt.index("Radium was found in 1898.") < prompt.index("Curie found radium.")
    for dropped in ("Cats", "metal", "cycling", "kept_spans", "keep_ratio", "relevance_score"):
        assert dropped not in prompt
    assert len(debug.get_event_pairs(CBEventType.QUERY)) == 1
    assert str(asyncio.run(engine.aquery(QUESTION))) == prompt
    assert str(engine.query("Do zebras swim?")) == "Empty Response"  # nothing is left, no error


def test_calls_are_seen_by_the_instrumentation(prune, nodes):
    handler, dispatcher = SimpleSpanHandler(), get_dispatcher()
    dispatcher.add_span_handler(handler)
    try:
        prune.postprocess_nodes(nodes, query_str=QUESTION)
        asyncio.run(prune.apostprocess_nodes(nodes, query_str=QUESTION))
    finally:
        dispatcher.span_handlers.remove(handler)
    spans = {span.id_.split("-")[0] for span in handler.completed_spans}
    assert "PruningPostprocessor._postprocess_nodes" in spans
    assert not handler.open_spans


def test_async_leaves_the_event_loop_free(prune, nodes, monkeypatch):
    expected = prune.postprocess_nodes(nodes, query_str=QUESTION)
    entered, go_on, threads, score = threading.Event(), threading.Event(), [], BM25.score

    def slow(self, requests):
        threads.append(threading.current_thread())
        entered.set()
        assert go_on.wait(timeout=30)
        return score(self, requests)

    monkeypatch.setattr(BM25, "score", slow)

    async def main():
        running = asyncio.create_task(prune.apostprocess_nodes(nodes, query_str=QUESTION))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # only a loop that is free gets here
        return await running

    assert asyncio.run(main()) == expected
    assert threading.main_thread() not in threads


def test_it_survives_being_saved(nodes, tiny_checkpoint):
    prune = PruningPostprocessor(
        model=str(tiny_checkpoint), method="late", device="cpu", keep_ratio=0.5, top_k=2
    )
    kept = prune.postprocess_nodes(nodes, query_str=QUESTION)
    saved = prune.to_dict()
    assert saved["class_name"] == PruningPostprocessor.class_name() == "PruningPostprocessor"
    assert saved["model"] == str(tiny_checkpoint)
    for again in (
        PruningPostprocessor.from_dict(saved),
        PruningPostprocessor.from_json(prune.to_json()),
        pickle.loads(pickle.dumps(prune)),
    ):
        assert again.to_dict() == saved
        assert again.postprocess_nodes(nodes, query_str=QUESTION) == kept


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"threshold": 0.1, "keep_ratio": 0.5}, ValueError, "threshold and keep_ratio: choose one"),
        ({"threshold": 1.5}, ValueError, r"threshold must be a number in \[0, 1\], got 1.5"),
        ({"max_tokens": 5}, ValueError, "max_tokens needs tokenizer"),
        ({"top_k": 0}, ValueError, "top_k must be a whole number of passages >= 1, got 0"),
        ({"treshold": 0.1}, ValueError, "treshold\n  Extra inputs are not permitted"),
        ({"method": "bm52"}, ValueError, "Did you mean 'bm25'"),
        ({"tokenizer": "no/where/here"}, CheckpointError, "tokenizer='no/where/here' is neither"),
    ],
)
def test_bad_options_are_refused_at_once(options, error, sentence):
    with pytest.raises(error, match=sentence):
        PruningPostprocessor(**{"method": "bm25", **options})


def test_bad_calls_are_told_so(prune, nodes):
    with pytest.raises(InputError, match="Pruning needs the question: call postprocess_nodes"):
        prune.postprocess_nodes(nodes)
    with pytest.raises(InputError, match="question must be a string with some text"):
        prune.postprocess_nodes(nodes, query_str=" ")
    with pytest.raises(InputError, match="A node must be a NodeWithScore, got TextNode"):
        prune.postprocess_nodes([nodes[0].node], query_str=QUESTION)
    assert prune.postprocess_nodes([], query_str=QUESTION) == []


class FirstWord(MockEmbedding):
    """Texts that begin alike are alike: "d…" most like the question, then "b…"; "z…" not at all."""

    def _get_text_embedding(self, text):
        likeness = {"d": 1.0, "b": 0.9}.get(text[0], 0.0)
        return [likeness, (1 - likeness**2) ** 0.5]

    def _get_query_embedding(self, query):
        return [1.0, 0.0]

    get_agg_embedding_from_queries = _get_query_embedding


def test_the_faults_of_the_sentence_optimizer_are_not_ours():
    """It joins by likeness, repeats neighbours, edits in place and fails when nothing is alike."""
    text = "a cat. b radium. c dog. d radium radium. e owl."
    optimizer = SentenceEmbeddingOptimizer(
        embed_model=FirstWord(embed_dim=2),
        threshold_cutoff=0.5,
        tokenizer_fn=lambda text: text.split(". "),  # its own needs a download
    )
    node = NodeWithScore(node=TextNode(text=text))
    optimizer.postprocess_nodes([node], query_str="radium")
    assert node.node.text == "c dog d radium radium e owl. a cat b radium c dog"
    nothing = NodeWithScore(node=TextNode(text="z cat. z dog."))
    with pytest.raises(ValueError, match="zero sentences"):
        optimizer.postprocess_nodes([nothing], query_str="radium")

    # The splitter wants capitals at sentence ends.
    text = "A cat. B radium. C dog. D radium radium. E owl."
    node = NodeWithScore(node=TextNode(text=text))
    prune = PruningPostprocessor(method="bm25", threshold=0.3)
    [kept] = prune.postprocess_nodes([node], query_str="radium")
    assert kept.node.text == "B radium. D radium radium. "
    assert node.node.text == text
    assert prune.postprocess_nodes([nothing], query_str="radium") == []
