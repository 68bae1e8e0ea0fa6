"""How near does a real 135M model stay to itself when its KV cache is pruned?

    python benchmarks/kv/fidelity.py --text wikitext2_test.txt.gz \\
        --calibration wikitext2_valid.txt.gz --retrieval kv_retrieval_75.jsonl.gz

Each text's first tokens are the prompt; those after it come one by one through the real cache, as
in generation, and the next-token distributions are compared with those of the whole cache. Peers
that keep no smaller cache are computed by a mask over the whole one: ThinK as published (the last
32 tokens of the prompt and all that follow stay whole), kvpress (the whole prompt is pruned, what
follows stays whole), and key norms alone with our window. Retrieval asks for the value of one of
20 keys, after two that are given; keys and values are cut to 8 characters, which the whole model
can do; static channels are calibrated on Wikipedia, and once on such prompts too, of other rows.
Each row of the result is written when it is there, and a run goes on after the last: to measure
again, delete the file.
"""

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
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

RATIOS = (0.4, 0.5, 0.6)
PEERS = [("published", r) for r in RATIOS] + [("kvpress", r) for r in RATIOS] + [("key norm", 0.5)]

PEER: dict[Any, Any] = {}  # the rule of the peer that is being computed, and each layer's channels


def peer_attention(module, query, key, value, mask, scaling=None, **_):  # type: ignore[no-untyped-def]
    """Attention of one sequence under a peer's rule; its first call is the prompt."""
    count, new = key.shape[2], query.shape[2]
    if count == new:
        scores = channel_scores(query[:, :, -32:], key)
        if PEER["rule"] == "key norm":
            scores = key.square().mean(2)
        kept = best_channels(scores, key.shape[-1] - int(key.shape[-1] * PEER["ratio"]))
        PEER[module.layer_idx] = torch.zeros_like(scores).scatter(-1, kept, 1.0)[:, :, None], count
    kept, prompt = PEER[module.layer_idx]
    at, t = torch.arange(count), torch.arange(count - new, count)[:, None]
    far = {
        "published": at < prompt - 32,
        "kvpress": at < prompt,
        "key norm": (at < (t + 1 - 64).clamp(min=0) // 16 * 16) & (at >= 4),
    }[PEER["rule"]] & (t >= prompt)
    group = query.shape[1] // key.shape[1]
    whole, thin, value = (x.repeat_interleave(group, 1) for x in (key, key * kept, value))
    logits = torch.where(far, query @ thin.transpose(2, 3), query @ whole.transpose(2, 3)) * scaling
    logits = logits.masked_fill(at > t, -math.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("kv_peer", peer_attention)
AttentionMaskInterface.register("kv_peer", sdpa_mask)


class Subject:
    """The model, its texts, and the distributions of the whole cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        loaded = LocalModel.from_pretrained(small_model())
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        with gzip.open(arguments.text, "rt", encoding="utf-8") as file:
            ids = self.tokenizer(file.read(), return_tensors="pt", verbose=False).input_ids[0]
        length = PROMPT + FOLLOWING
        apart = len(ids) // arguments.documents
        self.texts = torch.stack(
            [ids[i * apart : i * apart + length] for i in range(arguments.documents)]
        )
        self.asked = retrieval(arguments.retrieval, range(arguments.questions))
        self.whole = self.by_cache(self.whole_cache)

    def whole_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

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

    def compare(self, new_cache: Callable[[], Any]) -> dict[str, Any]:
        """Mean KL(whole ‖ pruned) in nats and agreement on the likeliest token, by text; and the
        share of values that are found."""
        found = self.by_cache(new_cache)
        divergence = (self.whole.exp() * (self.whole - found)).sum(-1).mean(1)
        same = (self.whole.argmax(-1) == found.argmax(-1)).float().mean(1)
        return {
            "kl": mean_interval(divergence.numpy()),
            "top1": mean_interval(same.numpy()),
            "retrieval": self.retrieve(new_cache),
        }

    def retrieve(self, new_cache: Callable[[], Any]) -> dict[str, Any]:
        right = []
        for prompt, wanted in self.asked:
            asked = self.tokenizer(prompt, return_tensors="pt")
            out = self.model.generate(
                **asked, past_key_values=new_cache(), max_new_tokens=10, do_sample=False
            )
            answer = self.tokenizer.decode(out[0, asked.input_ids.shape[1] :])
            right.append(float(answer.startswith(wanted)))
        return mean_interval(torch.tensor(right).numpy())


def retrieval(path: Path, rows: range) -> list[tuple[str, str]]:
    """Prompts that end before a value, and the values."""
    asked = []
    for i, row in enumerate(read_jsonl(path)):
        if i not in rows:
            continue
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


def configs(masks: Path, like: Path, random: Path) -> dict[str, dict[str, Any]]:
    """masks: of Wikipedia; like: of text like all that is asked; random: of no text."""
    found = {}
    for ratio in RATIOS:
        think = {"method": "think", "key_ratio": ratio}
        static = think | {"policy": "static", "masks": masks}
        found[f"ThinK {ratio}, prompt"] = think
        found[f"ThinK {ratio}, static"] = static
        if ratio == 0.5:
            found["ThinK 0.5, static, calibrated on both"] = static | {"masks": like}
            found["ThinK 0.5, static, 128 recent"] = static | {"recent": 128}
            found["ThinK 0.5 + values 0.5, static"] = static | {"value_ratio": 0.5}
        found[f"ThinK {ratio}, causal"] = think | {"policy": "causal"}
    found["random channels 0.5"] = think | {"key_ratio": 0.5, "policy": "static", "masks": random}
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
    settings = {
        "texts": arguments.documents,
        "prompt": PROMPT,
        "following": FOLLOWING,
        "questions": arguments.questions,
        "pairs": PAIRS,
    }
    out = HERE / "fidelity.json"
    before = json.loads(out.read_text()) if out.exists() else {}
    done = before["rows"] if settings.items() <= before.items() else {}
    subject = Subject(arguments)
    model, tokenizer = subject.model, subject.tokenizer

    def pruned(options: dict[str, Any]) -> dict[str, Any]:
        return subject.compare(enable_kv_pruning(model, KVPruneConfig(**options)))

    def peer(rule: str, ratio: float) -> dict[str, Any]:
        model.set_attn_implementation("kv_peer")
        PEER.update(rule=rule, ratio=ratio)
        return subject.compare(subject.whole_cache)

    with tempfile.TemporaryDirectory() as folder:
        masks, like, random = (Path(folder, name) for name in ("masks", "like", "random"))
        with gzip.open(arguments.calibration, "rt", encoding="utf-8") as file:
            wikipedia = file.read()[:100_000]
        others = range(arguments.questions, arguments.questions + 24)
        prompts = [prompt + value for prompt, value in retrieval(arguments.retrieval, others)]
        calibrate_masks(model, tokenizer, [wikipedia], masks)
        calibrate_masks(model, tokenizer, [wikipedia, *prompts], like)
        generator = torch.Generator().manual_seed(0)
        shape = (model.config.num_hidden_layers, model.config.num_key_value_heads, 64)
        save_masks(torch.rand(shape, generator=generator), random, model.config)
        jobs: dict[str, Callable[[], dict[str, Any]]] = {
            "whole cache": lambda: {"retrieval": subject.retrieve(subject.whole_cache)}
        }
        for name, options in configs(masks, like, random).items():
            jobs[name] = partial(pruned, options)
        for rule, ratio in PEERS:
            jobs[f"{rule} {ratio}"] = partial(peer, rule, ratio)
        for name, job in tqdm(jobs.items(), desc="measured"):
            if name in done:
                continue
            done[name] = job()
            rows = {name: done[name] for name in jobs if name in done}
            write_json(out, {"rows": rows, **settings, "provenance": provenance()})
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
