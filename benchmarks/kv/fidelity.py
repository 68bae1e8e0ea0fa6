"""How near does a real 135M model stay to itself when its KV cache is pruned?

    python benchmarks/kv/fidelity.py --text wikitext2_test.txt.gz \\
        --calibration wikitext2_valid.txt.gz --retrieval kv_retrieval_75.jsonl.gz

Each text's first tokens are the prompt; those after it come one by one through the real cache, as
in generation, and the next-token distributions are compared with those of the whole cache. Peers
that keep no smaller cache are computed by a mask: ThinK as published (the last 32 tokens of the
prompt and all that follow stay whole), kvpress (the whole prompt is pruned, what follows stays
whole), and key norms alone with our window. Retrieval asks for the value of one of 20 keys, after
two that are given; keys and values are cut to 8 characters, which the whole model can do. All
figures are of one run.
"""

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from pipelines.language_model import LocalModel
from pipelines.small_model import small_model
from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune.context.evaluate import mean_interval
from rag_prune.kv import KVPruneConfig, calibrate_masks, enable_kv_pruning
from rag_prune.kv.masks import save_masks
from rag_prune.kv.think import best_channels, channel_scores

HERE = Path(__file__).parent / "results"
PROMPT, FOLLOWING, BATCH = 640, 96, 8
PAIRS, CHARACTERS, GIVEN = 20, 8, 2

PEER: dict[str, Any] = {}  # the rule of the peer that is being computed


def peer_attention(module, query, key, value, mask, scaling=None, **_):  # type: ignore[no-untyped-def]
    """Attention under a peer's rule; the first PEER["prompt"] tokens are the prompt."""
    prompt, ratio, rule = PEER["prompt"], PEER["ratio"], PEER["rule"]
    count = key.shape[2]
    at = torch.arange(count)
    scores = channel_scores(query[:, :, prompt - 32 : prompt], key[:, :, :prompt])
    if rule == "key norm":
        scores = key[:, :, :prompt].square().mean(2)
    kept = best_channels(scores, key.shape[-1] - int(key.shape[-1] * ratio))
    thin = key * torch.zeros_like(scores).scatter(-1, kept, 1.0)[:, :, None]
    far = {
        "published": (at < prompt - 32)[None] & (at >= prompt)[:, None],
        "kvpress": (at < prompt)[None] & (at >= prompt)[:, None],
        "key norm": (at < ((at + 1 - 64).clamp(min=0) // 16 * 16)[:, None])
        & (at >= 4)[None]
        & (at >= prompt)[:, None],
    }[rule]
    group = query.shape[1] // key.shape[1]
    whole, thin, value = (x.repeat_interleave(group, 1) for x in (key, thin, value))
    logits = torch.where(far, query @ thin.transpose(2, 3), query @ whole.transpose(2, 3)) * scaling
    logits = logits.masked_fill(at > at[:, None], -math.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("kv_peer", peer_attention)
AttentionMaskInterface.register("kv_peer", sdpa_mask)


class Subject:
    """The model, its texts, and the distributions of the whole cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        loaded = LocalModel.from_pretrained(small_model())
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        with gzip.open(arguments.text, "rt", encoding="utf-8") as file:
            ids = self.tokenizer(file.read(), return_tensors="pt", verbose=False).input_ids[0]
        length = PROMPT + FOLLOWING
        apart = len(ids) // arguments.documents
        self.texts = torch.stack(
            [ids[i * apart : i * apart + length] for i in range(arguments.documents)]
        )
        self.asked = retrieval(arguments)
        self.whole = self.by_cache(lambda: DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def by_cache(self, new_cache: Callable[[], Any]) -> Tensor:
        """Log-probabilities after each token that follows a prompt, [texts, FOLLOWING, words]."""
        found = []
        for batch in self.texts.split(BATCH):
            cache, steps = new_cache(), []
            for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, batch.shape[1]))]:
                out = self.model(batch[:, start:stop], past_key_values=cache, logits_to_keep=1)
                steps.append(out.logits[:, -1].log_softmax(-1))
            found.append(torch.stack(steps[:-1], 1))
        return torch.cat(found)

    @torch.inference_mode()
    def by_peer(self, rule: str, ratio: float) -> Tensor:
        PEER.update(rule=rule, ratio=ratio, prompt=PROMPT)
        self.model.set_attn_implementation("kv_peer")
        found = [
            self.model(batch, use_cache=False, logits_to_keep=FOLLOWING + 1).logits[:, :-1]
            for batch in self.texts.split(2)
        ]
        return torch.cat(found).log_softmax(-1)

    def compare(self, found: Tensor) -> dict[str, Any]:
        """Mean KL(whole ‖ pruned) in nats and agreement on the likeliest token, by text."""
        divergence = (self.whole.exp() * (self.whole - found)).sum(-1).mean(1)
        same = (self.whole.argmax(-1) == found.argmax(-1)).float().mean(1)
        return {"kl": mean_interval(divergence.numpy()), "top1": mean_interval(same.numpy())}

    def retrieve(self, new_cache: Callable[[], Any]) -> dict[str, Any]:
        right = []
        for start in range(0, len(self.asked), BATCH):
            batch = self.asked[start : start + BATCH]
            asked = self.tokenizer([p for p, _ in batch], return_tensors="pt", padding=True)
            out = self.model.generate(
                **asked, past_key_values=new_cache(), max_new_tokens=10, do_sample=False
            )
            answers = self.tokenizer.batch_decode(out[:, asked.input_ids.shape[1] :])
            right += [float(a.startswith(v)) for a, (_, v) in zip(answers, batch, strict=True)]
        return mean_interval(torch.tensor(right).numpy())


def retrieval(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Prompts that end before a value, and the values."""
    asked = []
    for i, row in enumerate(read_jsonl(arguments.retrieval)):
        if i == arguments.questions:
            break
        pairs = [(k[:CHARACTERS], v[:CHARACTERS]) for k, v in row["ordered_kv_records"][:PAIRS]]
        told = ", ".join(f'"{k}": "{v}"' for k, v in pairs)
        wanted = pairs[i * 7 % PAIRS]
        given = [pairs[(i * 7 + 3 * (j + 1)) % PAIRS] for j in range(GIVEN)]
        again = ", ".join(f'"{k}": "{v}"' for k, v in given)
        asked.append(
            (
                f'JSON data:\n{{{told}}}\n\nSome of them again:\n{{{again}, "{wanted[0]}": "',
                wanted[1],
            )
        )
    return asked


def configs(masks: Path, random: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for ratio in (0.4, 0.5, 0.6):
        think = {"method": "think", "key_ratio": ratio}
        found[f"ThinK {ratio}, prompt"] = think
        found[f"ThinK {ratio}, static"] = think | {"policy": "static", "masks": masks}
        found[f"ThinK {ratio}, causal"] = think | {"policy": "causal"}
        if ratio == 0.5:
            static = think | {"policy": "static", "masks": masks}
            found["ThinK 0.5, static, 128 recent"] = static | {"recent": 128}
            found["ThinK 0.5 + values 0.5, static"] = static | {"value_ratio": 0.5}
            found["random channels 0.5"] = think | {"policy": "static", "masks": random}
    for keys, values in ((0.5, 0.0), (0.5, 0.5), (0.7, 0.7)):
        found[f"Mustafar {keys}/{values}"] = {
            "method": "mustafar",
            "key_ratio": keys,
            "value_ratio": values,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("text", "calibration", "retrieval"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=32)
    arguments = parser.parse_args()
    subject = Subject(arguments)
    model = subject.model
    rows: dict[str, Any] = {
        "whole cache": {"retrieval": subject.retrieve(lambda: DynamicCache(config=model.config))}
    }
    with tempfile.TemporaryDirectory() as folder:
        masks, random = Path(folder, "masks.safetensors"), Path(folder, "random.safetensors")
        with gzip.open(arguments.calibration, "rt", encoding="utf-8") as file:
            text = file.read()[:100_000]
        calibrate_masks(model, subject.tokenizer, [text], masks)
        generator = torch.Generator().manual_seed(0)
        shape = (model.config.num_hidden_layers, model.config.num_key_value_heads, 64)
        save_masks(torch.rand(shape, generator=generator), random, model.config)
        for name, options in tqdm(configs(masks, random).items(), desc="pruned"):
            new_cache = enable_kv_pruning(model, KVPruneConfig(**options))
            row = subject.compare(subject.by_cache(new_cache))
            row["retrieval"] = subject.retrieve(new_cache)
            rows[name] = row
    for rule in ("published", "kvpress", "key norm"):
        for ratio in (0.4, 0.5, 0.6) if rule != "key norm" else (0.5,):
            rows[f"{rule} {ratio}"] = subject.compare(subject.by_peer(rule, ratio))
    write_json(
        HERE / "fidelity.json",
        {
            "rows": rows,
            "texts": len(subject.texts),
            "prompt": PROMPT,
            "following": FOLLOWING,
            "questions": len(subject.asked),
            "pairs": PAIRS,
            "provenance": provenance(),
        },
    )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
