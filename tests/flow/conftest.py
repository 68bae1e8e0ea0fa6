"""The small real model, for the tests that need one."""

import pytest


@pytest.fixture(scope="session")
def folder():
    """The folder of SmolLM2-135M-Instruct."""
    from pipelines.small_model import small_model

    return small_model(progress=False)


@pytest.fixture(scope="session")
def tokenizer():
    """Its tokenizer."""
    from transformers import AutoTokenizer

    from pipelines.small_model import small_model

    return AutoTokenizer.from_pretrained(small_model(progress=False))
