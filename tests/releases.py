"""Tiny checkpoints with random weights, laid out as the released ones are: names, fields, files.

Written from the owners' code, and independent of ours: a state dict is built by name, from the
stock encoder's own tensors and the heads' shapes.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tiny import wordpiece

CHARACTERS = [*string.ascii_letters, *string.digits, *string.punctuation, *"。你好日本語é"]
FAMILIES = ("provence_debertav3", "xprovence", "open_provence", "llmlingua2")
SPREAD = 0.4  # standard deviation of the weights: random scores shall lie far apart


def unigram(marks: dict[str, str], template: tuple[str, str]) -> Any:
    """A SentencePiece-like tokenizer; `marks` are its special tokens by role."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = list(dict.fromkeys(marks.values()))
    words = ["▁.", "▁,", "▁the", "▁cat", "▁radium", "▁curie", "found", "▁found", "ing", "▁in", "▁"]
    vocabulary = [(p, 0.0) for p in pieces] + [(w, -2.0) for w in words]
    vocabulary += [(c, -5.0) for c in CHARACTERS]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.index(marks["unk_token"])))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" +", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    ids = [(p, i) for i, p in enumerate(pieces)]
    backend.post_processor = processors.TemplateProcessing(template[0], template[1], ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def deberta_tokenizer() -> Any:
    names = ("pad", "cls", "sep", "unk", "mask")
    marks = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return unigram(marks, ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"))


def xlmr_tokenizer() -> Any:
    marks = {
        **{"cls_token": "<s>", "bos_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"},
        **{"eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    }
    return unigram(marks, ("<s> $A </s>", "<s> $A </s> </s> $B </s>"))


def bytes_tokenizer() -> Any:
    """ModernBERT's kind: byte-level, a space belongs to the word after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "in"), ("e", "r")]
    pieces = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 0), ("[SEP]", 1)]
    )
    named = {f"{s[1:-1].lower()}_token": s for s in specials}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def bert_tokenizer() -> Any:
    from tokenizers import processors

    words = ["the", "cat", "radium", "curie", "found", "##ing", "##ed", "##s"]
    tokenizer = wordpiece([*CHARACTERS, *(f"##{c}" for c in CHARACTERS), *words])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", cls), ("[SEP]", sep)]
    )
    return tokenizer


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def random_state(model: Any, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """A stock model's tensors with random values, under released names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: value.detach().clone()
        if "norm" in name.lower() or not value.is_floating_point()
        else torch.randn(value.shape, generator=generator) * SPREAD
        for name, value in model.state_dict().items()
    }


def linear(name: str, rows: int, columns: int = 32, scale: float = 0.8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.weight": torch.randn(rows, columns, generator=generator) * scale,
        f"{name}.bias": torch.randn(rows, generator=generator) * 0.1,
    }


def write(
    folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], tokenizer: Any
) -> Path:
    """config.json, model.safetensors, the tokenizer's files, and a module that must not run."""
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for module in ("modeling_provence", "modeling_xprovence_hf", "modeling_open_provence"):
        (folder / f"{module}.py").write_text("raise SystemExit('remote code was run')")
    return folder


def provence(folder: Path, window: int = 128) -> Path:
    from transformers import DebertaV2Config, DebertaV2Model

    tokenizer = deberta_tokenizer()
    fields = {
        **SMALL,
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "layer_norm_eps": 1e-07,
        "max_position_embeddings": window,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pad_token_id": tokenizer.pad_token_id,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": 32,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 16,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "vocab_size": len(tokenizer),
    }
    state = random_state(DebertaV2Model(DebertaV2Config(**fields)), "deberta.")
    state |= linear("pooler.dense", 32) | linear("classifier", 1) | linear("token_classifier", 2)
    config = {
        **fields,
        "architectures": ["Provence"],
        "auto_map": {
            "AutoConfig": "modeling_provence.ProvenceConfig",
            "AutoModel": "modeling_provence.Provence",
        },
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "model_type": "Provence",
        "torch_dtype": "float32",
        "transformers_version": "4.46.3",
    }
    return write(folder, config, state, tokenizer)


def xlmr_fields(tokenizer: Any, window: int) -> dict[str, Any]:
    return {
        **SMALL,
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": window + tokenizer.pad_token_id + 1,
        "pad_token_id": tokenizer.pad_token_id,
        "type_vocab_size": 1,
        "vocab_size": len(tokenizer),
    }


def xprovence(folder: Path, window: int = 128, pooled: bool = True) -> Path:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    tokenizer = xlmr_tokenizer()
    fields = xlmr_fields(tokenizer, window)
    encoder = XLMRobertaModel(XLMRobertaConfig(**fields), add_pooling_layer=pooled)
    state = random_state(encoder, "roberta.") | linear("token_classifier", 2)
    if pooled:
        state |= linear("classifier", 1)
    else:
        state |= linear("classifier.dense", 32) | linear("classifier.out_proj", 1)
    config = {
        **fields,
        "architectures": ["XProvence"],
        "auto_map": {"AutoModel": "modeling_xprovence_hf.XProvence"},
        "id2label": {"0": "LABEL_0"},
        "model_type": "XProvence",
    }
    return write(folder, config, state, tokenizer)


def open_provence(
    folder: Path, encoder: str = "modernbert", window: int = 96, prefixed: bool = True
) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if encoder == "modernbert":
        tokenizer = bytes_tokenizer()
        fields: dict[str, Any] = {
            **SMALL,
            "classifier_pooling": "mean",
            "global_attn_every_n_layers": 2,
            "global_rope_theta": 80000.0,  # transformers 4's names, as released
            "local_rope_theta": 5000.0,
            "local_attention": 16,
            "max_position_embeddings": 512,
        }
        marks = ("pad", "cls", "sep", "bos", "eos")
        fields |= {f"{m}_token_id": getattr(tokenizer, f"{m}_token_id") or 0 for m in marks}
    elif encoder == "xlm-roberta":
        tokenizer = xlmr_tokenizer()
        fields = xlmr_fields(tokenizer, 512)
    else:
        tokenizer = bert_tokenizer()
        fields = {**SMALL, "max_position_embeddings": 512, "type_vocab_size": 2}
    fields["vocab_size"] = len(tokenizer)
    stock = AutoConfig.for_model(encoder, **fields, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(stock)
    state = random_state(model, "ranking_model." if prefixed else "")
    state |= linear("pruning_head.classifier", 2)
    for name in list(state):  # a norm of ones would hide which side of it the head reads
        if name.endswith("final_norm.weight"):
            state[name] = torch.linspace(0.2, 2.0, 32)
    config = {
        "architectures": ["OpenProvenceForSequenceClassification"],
        "auto_map": {"AutoModel": "modeling_open_provence.OpenProvenceForSequenceClassification"},
        "base_model_config": {**fields, "model_type": encoder},
        "base_model_name_or_path": "someone/reranker",
        "default_threadshold": 0.25,
        "max_length": window,
        "mode": "reranking_pruning",
        "model_type": "open_provence",
        "num_labels": 1,
        "num_pruning_labels": 2,
        "pruning_config": {
            "classifier_dropout": 0.1,
            "hidden_size": 32,
            "num_labels": 2,
            "sentence_pooling": "mean",
            "use_weighted_pooling": False,
        },
        "tokenizer_name_or_path": None,
    }
    return write(folder, config, state, tokenizer)


def llmlingua2(folder: Path, encoder: str = "bert") -> Path:
    from transformers import AutoConfig, AutoModelForTokenClassification

    if encoder == "bert":
        tokenizer = bert_tokenizer()
        fields = {**SMALL, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    else:
        tokenizer = xlmr_tokenizer()
        fields = xlmr_fields(tokenizer, 512)
    stock = AutoConfig.for_model(encoder, **fields, num_labels=2)
    state = random_state(AutoModelForTokenClassification.from_config(stock))
    name = {"bert": "Bert", "xlm-roberta": "XLMRoberta"}[encoder]
    config = {
        **fields,
        "architectures": [f"{name}ForTokenClassification"],
        "model_type": encoder,
        "torch_dtype": "float32",
    }
    return write(folder, config, state, tokenizer)


def build(family: str, folder: Path) -> Path:
    """The tiny release of a family, by its row of METHODS."""
    makers = (provence, xprovence, open_provence, llmlingua2)
    return dict(zip(FAMILIES, makers, strict=True))[family](folder)
