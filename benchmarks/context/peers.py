"""The code paths of two published pruners, re-created on our own network, to be timed against it.

What decides their speed is kept as it is in their code: passages in the order they come, 32 to a
batch, each batch padded to its longest row, at most 512 tokens, and Python loops over sentences.
What does not is shared with ours: the weights, the sentence splitter, untitled passages and the
question as it was given, so that where the rows are equal the logits are, too (a test holds it).
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rag_prune.context.checkpoints import Checkpoint
from rag_prune.context.model import KEEP, RELEVANCE
from rag_prune.context.sentences import split

BATCH, MAX_LENGTH = 32, 512

Asked = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Pruned:
    """What a peer returns for a passage; `logits` are the keep logits of the tokens it read."""

    text: str
    relevance: float
    logits: NDArray[np.float32]


def open_provence(checkpoint: Checkpoint, asked: Asked, threshold: float = 0.1) -> list[Pruned]:
    """OpenProvence's `process()` (hotchpotch/open_provence, MIT).

    Each passage's sentences are tokenised apart, decoded once more, cut into fragments of half the
    length and packed into blocks; ids are joined in Python and the passage is searched in them.
    The network runs without `no_grad`. A sentence's score is the mean of its fragments' mean token
    probabilities. (Its tokens' types, 1 for the passage, stay 0 here: the weights know no other.)
    """
    tokenizer = checkpoint.tokenizer
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    jobs, sentences_of = [], []
    for question, passages in asked:
        question_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        for text in passages:
            sentences = [text[start:end] for start, end in split(text)]
            encoded = tokenizer(
                sentences, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            fragments = []
            for i, ids in enumerate(encoded["input_ids"]):
                ids = [int(token) for token in ids]
                step = MAX_LENGTH // 2
                fragments += [(i, ids[at : at + step]) for at in range(0, len(ids), step)]
            decoded = tokenizer.batch_decode(
                [ids for _, ids in fragments], clean_up_tokenization_spaces=False
            )
            fragments = [f for f, shown in zip(fragments, decoded, strict=True) if shown]
            room = MAX_LENGTH - 3 - len(question_ids)
            blocks, used = [[]], 0
            for i, ids in fragments:
                if blocks[-1] and used + len(ids) > room:
                    blocks.append([])
                    used = 0
                blocks[-1].append((i, ids[:room]))
                used += len(ids)
            jobs += [(len(sentences_of), question_ids, block) for block in blocks]
            sentences_of.append(sentences)

    scores = [defaultdict(list) for _ in sentences_of]
    logits_of = [[] for _ in sentences_of]
    relevance = [0.0] * len(sentences_of)
    for start in range(0, len(jobs), BATCH):
        prepared = []
        for _, question_ids, block in jobs[start : start + BATCH]:
            context = []
            for _, ids in block:
                context.extend(int(token) for token in ids)
            row = [cls, *question_ids, sep, *context, sep]
            found = 0
            while row[found : found + len(context)] != context:
                found += 1
            prepared.append((row, found))
        width = max(len(row) for row, _ in prepared)
        ids_tensor = torch.full((len(prepared), width), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(prepared), width), dtype=torch.long)
        for i, (row, _) in enumerate(prepared):
            ids_tensor[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = torch.tensor([1] * len(row), dtype=torch.long)
        out = checkpoint.model.joint(ids_tensor, mask).detach()
        for (owner, _, block), (_, at), values in zip(
            jobs[start : start + BATCH], prepared, out, strict=True
        ):
            relevance[owner] = max(relevance[owner], torch.sigmoid(values[0, RELEVANCE]).item())
            probabilities = torch.sigmoid(values[:, KEEP]).numpy()
            for i, ids in block:
                scores[owner][i].append(float(probabilities[at : at + len(ids)].mean()))
                logits_of[owner].append(values[at : at + len(ids), KEEP].numpy())
                at += len(ids)
    out = []
    for sentences, score, of_passage, rank in zip(
        sentences_of, scores, logits_of, relevance, strict=True
    ):
        kept = []
        for i, sentence in enumerate(sentences):
            mean = float(np.mean(score[i])) if score[i] else 0.0
            if max(0.0, min(mean, 1.0)) > threshold:
                kept.append(sentence)
        out.append(Pruned("".join(kept), rank, np.concatenate([np.zeros(0, "f4"), *of_passage])))
    return out


def provence(checkpoint: Checkpoint, asked: Asked, threshold: float = 0.1) -> list[Pruned]:
    """Provence's own path (naver/bergen; what it runs is read from a port of its hub file).

    Question and passage are one string with "[SEP]" between, cut at 512 tokens. A token is kept
    where its probability is above the threshold, a sentence where the share of kept tokens is, and
    the kept ids are decoded to text. (Long passages, which it reads in blocks, are cut: less work.)
    """
    tokenizer = checkpoint.tokenizer
    pairs = [(question, text) for question, passages in asked for text in passages]
    out = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        encoded = tokenizer(
            [f"{question} {tokenizer.sep_token} {text}" for question, text in batch],
            padding="longest",
            truncation=True,
            max_length=MAX_LENGTH,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = checkpoint.model.joint(encoded["input_ids"], encoded["attention_mask"])
        ids_of, offsets_of = encoded["input_ids"].tolist(), encoded["offset_mapping"].tolist()
        lengths = encoded["attention_mask"].sum(1).tolist()
        for i, (question, text) in enumerate(batch):
            ids, offsets = ids_of[i], offsets_of[i]
            first, last = ids.index(tokenizer.sep_token_id) + 1, lengths[i] - 1
            shift = len(question) + len(tokenizer.sep_token) + 2
            probabilities = torch.sigmoid(logits[i, :, KEEP]).tolist()
            kept_ids, token = [], first
            for _, end in split(text):
                sentence = []
                while token < last and offsets[token][1] - shift <= end:
                    sentence.append(token)
                    token += 1
                decisions = [1.0 if probabilities[t] > threshold else 0.0 for t in sentence]
                if decisions and sum(decisions) / len(decisions) > threshold:
                    kept_ids.extend(ids[t] for t in sentence)
            text = re.sub(r"\s+", " ", tokenizer.decode(kept_ids, skip_special_tokens=True))
            relevance = torch.sigmoid(logits[i, 0, RELEVANCE]).item()
            out.append(Pruned(text, relevance, logits[i, first:last, KEEP].numpy()))
    return out
