"""LlamaIndex: retrieve, then keep only the sentences that help, word for word.

python examples/llama_index_rag.py          (or with a checkpoint folder: … llama_index_rag.py DIR)
"""

import sys

from llama_index.core import Document, SummaryIndex
from llama_index.core.llms import MockLLM

from rag_prune.integrations.llama_index import PruningPostprocessor

DOCUMENTS = [
    Document(
        text="Marie Curie was born in Warsaw. In 1898 she found radium together with Pierre Curie. "
        "She liked to travel by bicycle.",
        metadata={"title": "Marie Curie", "source": "a.txt"},
    ),
    Document(text="Warsaw lies on the Vistula. It has many parks.", metadata={"source": "b.txt"}),
    Document(text="Bananas are rich in potassium. They are yellow.", metadata={"source": "c.txt"}),
]
index = SummaryIndex(DOCUMENTS)  # any index of yours
engine = index.as_query_engine(
    node_postprocessors=[PruningPostprocessor(model=sys.argv[1] if sys.argv[1:] else None)],
    llm=MockLLM(),  # your language model; this one repeats what it is sent
)
answer = engine.query("Who found radium?")
for found in answer.source_nodes:
    print(f"{found.score:.2f}", found.node.metadata["source"])
    print(f"     {found.node.text}")
print(answer)
