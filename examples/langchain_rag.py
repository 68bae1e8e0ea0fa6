"""LangChain: retrieve, then keep only the sentences that help, word for word.

python examples/langchain_rag.py          (or with a checkpoint folder: … langchain_rag.py DIR)
"""

import sys

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from rag_prune import ContextPruner
from rag_prune.integrations.langchain import PruningCompressor

DOCUMENTS = [
    Document(
        "Marie Curie was born in Warsaw. In 1898 she found radium together with Pierre Curie. "
        "She liked to travel by bicycle.",
        metadata={"title": "Marie Curie", "source": "a.txt"},
    ),
    Document("Warsaw lies on the Vistula. It has many parks.", metadata={"source": "b.txt"}),
    Document("Bananas are rich in potassium. They are yellow.", metadata={"source": "c.txt"}),
]
retriever = RunnableLambda(lambda question: DOCUMENTS)  # any retriever of yours
prune = PruningCompressor(pruner=ContextPruner.from_pretrained(*sys.argv[1:]))


def show(documents: list[Document]) -> str:
    for found in documents:
        print(f"{found.metadata['relevance_score']:.2f}", found.metadata["source"])
        print(f"     {found.page_content}")
    return "\n\n".join(found.page_content for found in documents)


context = {"question": RunnablePassthrough(), "documents": retriever} | prune | show
prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
chain = {"question": RunnablePassthrough(), "context": context} | prompt  # | your chat model
print(chain.invoke("Who found radium?").to_string())
