"""Attention under KV pruning as its definition says: whole keys and values and a mask a position.

Independent of pages, rings and kernels; slow, for tests.
"""

import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

RULE = {}  # of the forward pass under way


def tiny_llama(seed=0, **changes):
    """Random weights, spread so that its logits depend on what it attends to."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def cut(position, recent, step=16):
    return max(0, position + 1 - recent) // step * step


def largest(x, kept):
    """x with all but the `kept` largest entries of each token zero."""
    out = torch.zeros_like(x)
    index = x.abs().argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return out.scatter(-1, index, x.gather(-1, index))


def score(q, k):
    """The published mean of squares, averaged over the heads of a group; [B, H, D]."""
    group = q.shape[1] // k.shape[1]
    squares = q.pow(2).mean(2).unflatten(1, (k.shape[1], group)).mean(2)
    return squares * k.pow(2).mean(2)


def channel_mask(scores, kept):
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


def _pruned_keys(q, k, layer):
    rule, size = RULE, k.shape[-1]
    kept = size - int(size * rule["key_ratio"])
    if rule["method"] == "mustafar":
        return largest(k, kept)
    if rule["policy"] == "static":
        return k * channel_mask(rule["scores"][layer], kept)[None, :, None]
    window, prompt = rule.get("obs_window", 32), rule["prompt"]
    if rule["policy"] == "prompt":
        mask = channel_mask(score(q[:, :, :prompt][:, :, -window:], k[:, :, :prompt]), kept)
        return k * mask[:, :, None]
    out, mask, page = torch.empty_like(k), None, rule["page"]
    for start in range(0, k.shape[2], page):
        end = min(start + page, prompt)
        if start < prompt and (mask is None or end >= window):
            first = max(0, end - window)
            mask = channel_mask(score(q[:, :, first:end], k[:, :, first:end]), kept)
        out[:, :, start : start + page] = k[:, :, start : start + page] * mask[:, :, None]
    return out


def oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    rule = RULE
    heads, count, size = key.shape[1], query.shape[2], query.shape[3]
    group = query.shape[1] // heads
    far_keys = _pruned_keys(query, key, module.layer_idx)
    far_values = largest(value, size - int(size * rule.get("value_ratio", 0.0)))
    out = torch.empty_like(query)
    for t in range(count):
        start = cut(t, rule["recent"])
        if rule["method"] == "think" and rule["policy"] == "prompt" and t < rule["prompt"]:
            start = 0
        s = torch.arange(t + 1)
        far = ((s < start) & (s >= rule["sinks"]))[None, None, :, None]
        k = torch.where(far, far_keys[:, :, : t + 1], key[:, :, : t + 1])
        v = torch.where(far, far_values[:, :, : t + 1], value[:, :, : t + 1])
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = (query[:, :, t : t + 1] @ k.transpose(2, 3)) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[:, None, None, : t + 1], -math.inf)
        out[:, :, t : t + 1] = logits.softmax(-1).nan_to_num(0.0) @ v
    return out.transpose(1, 2).contiguous(), None


def _mask(*, attention_mask=None, **kwargs):
    return None if attention_mask is None or attention_mask.all() else attention_mask.bool()


AttentionInterface.register("kv_oracle", oracle_attention)
AttentionMaskInterface.register("kv_oracle", _mask)


@torch.inference_mode()
def oracle_logits(model, ids, *, prompt, attention_mask=None, **rule):
    """Logits of all tokens, [B, T, vocabulary], as if those after `prompt` came one by one."""
    defaults = {
        "method": "think",
        "key_ratio": 0.5,
        "value_ratio": 0.0,
        "recent": 64,
        "sinks": 4,
        "policy": "prompt",
        "page": 16,
    }
    RULE.clear()
    RULE.update(defaults | rule | {"prompt": prompt})
    before = model.config._attn_implementation
    model.set_attn_implementation("kv_oracle")
    try:
        return model(ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
