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


def window(count, recent, sinks, step=16):
    """The tokens that each query reads whole, whether it sees them or not; bool [count, count]."""
    s = torch.arange(count)
    return (s >= (s[:, None] + 1 - recent).clamp(min=0) // step * step) | (s < sinks)


def attend(query, key, value, far_key, far_value, whole, scale, seen=None):
    """Causal attention, [..., heads, T, D], to tokens as `whole` [T, T] says.

    query: [..., heads, T, D].   keys and values: [..., H, T, D].
    seen: bool, to be spread over [..., heads, T, T]; False for the padding.
    """
    group, s = query.shape[-3] // key.shape[-3], torch.arange(query.shape[-2])
    key, value, far_key, far_value = (
        x.repeat_interleave(group, -3) for x in (key, value, far_key, far_value)
    )
    logits = torch.where(whole, query @ key.mT, query @ far_key.mT) * scale
    logits = logits.masked_fill(s > s[:, None], -math.inf)
    if seen is not None:
        logits = logits.masked_fill(~seen, -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return (weights * whole) @ value + (weights * ~whole) @ far_value


def oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    rule, count, size = RULE, query.shape[2], query.shape[3]
    far_keys = _pruned_keys(query, key, module.layer_idx)
    far_values = largest(value, size - int(size * rule["value_ratio"]))
    whole = window(count, rule["recent"], rule["sinks"])
    if rule["method"] == "think" and rule["policy"] == "prompt":
        whole[: rule["prompt"]] = True
    seen = None if attention_mask is None else attention_mask[:, None, None]
    out = attend(query, key, value, far_keys, far_values, whole, scaling, seen)
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
