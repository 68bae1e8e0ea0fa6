"""Haystack: retrieve, then keep only the sentences that help, word for word.

python examples/haystack_rag.py          (or with a checkpoint folder: … haystack_rag.py DIR)
"""

import sys

from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from rag_prune.integrations.haystack import PruningRanker

DOCUMENTS = [
    Document(
        content="Marie Curie was born in Warsaw. In 1898 she found radium together with Pierre "
        "Curie. She liked to travel by bicycle.",
        meta={"title": "Marie Curie", "source": "a.txt"},
    ),
    Document(content="Warsaw lies on the Vistula. It has many parks.", meta={"source": "b.txt"}),
    Document(content="Bananas are rich in potassium. They are yellow.", meta={"source": "c.txt"}),
]
TEMPLATE = "{% for d in documents %}{{ d.content }}\n\n{% endfor %}Question: {{ question }}"
store = InMemoryDocumentStore()
store.write_documents(DOCUMENTS)
rag = Pipeline()
rag.add_component("retriever", InMemoryBM25Retriever(store))
rag.add_component("prune", PruningRanker(*sys.argv[1:]))
rag.add_component("prompt", PromptBuilder(TEMPLATE, required_variables="*"))  # then your generator
rag.connect("retriever.documents", "prune.documents")
rag.connect("prune.documents", "prompt.documents")

query = {"query": "Who found radium?"}
inputs = {"retriever": query, "prune": query, "prompt": {"question": query["query"]}}
done = rag.run(inputs, include_outputs_from={"prune"})
for found in done["prune"]["documents"]:
    print(f"{found.score:.2f}", found.meta["source"])
    print(f"     {found.content}")
print(done["prompt"]["prompt"])
