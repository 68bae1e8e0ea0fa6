"""A model without PH3's heads, folded away and served by vLLM: its logits are those of the mask."""

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rag_prune.heads import PH3
from serving import served

pytestmark = pytest.mark.slow
PROMPTS = [
    f"The capital of {country} is {told}. The capital of {country} is"
    for country, told in (("France", "Rome"), ("Peru", "Bern"), ("Japan", "Oslo"))
]
# Some that matter: masked, they change the logprobs by far more than the tolerance.
PRUNED = PH3(heads=((23, 2), (24, 2), (24, 8), (0, 1)))


@pytest.fixture(scope="module")
def folder():
    from pipelines.small_model import small_model

    return small_model()


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """vLLM's first tokens with their logprobs, and its greedy answers, of the folded model."""
    saved = tmp_path_factory.mktemp("folded")
    PRUNED.fold(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    log = tmp_path_factory.mktemp("vllm") / "log"
    with served(log, "--model", str(saved), "--served-model-name", "folded") as url:
        asked = {"model": "folded", "prompt": PROMPTS, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked | {"logprobs": 5}, timeout=120)
        return answer.raise_for_status().json()["choices"]


def first_logprobs(model, tokenizer, prompt):
    with torch.inference_mode():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    return logits.log_softmax(-1)


def test_folded_in_vllm_is_masked_in_transformers(folder, answers):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = first_logprobs(model, tokenizer, prompt)
        with PRUNED.apply(model), torch.inference_mode():
            masked = first_logprobs(model, tokenizer, prompt)
            asked = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**asked, max_new_tokens=8, do_sample=False)
        top = answer["logprobs"]["top_logprobs"][0]
        ids = [tokenizer.encode(token, add_special_tokens=False)[0] for token in top]
        served_logprobs = torch.tensor(list(top.values()))
        torch.testing.assert_close(served_logprobs, masked[ids], atol=1e-3, rtol=0)
        assert (whole[ids] - masked[ids]).abs().max() > 0.05
        assert answer["text"] == tokenizer.decode(out[0, asked.input_ids.shape[1] :])
