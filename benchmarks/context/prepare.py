"""Turn public data sets into training rows, held-back rows, and some of them to calibrate on.

    python benchmarks/context/prepare.py --data DIR --out runs/context

Rows are split by title (by passage where there is none), so that no title and no question stands
on both sides. QED's text is tokenised ("Röntgen , of Germany ,") and other sources' is not; half of
its rows are detokenised, or a model would learn that spaces before commas mean "keep".
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from prune_core.storage import atomic_write, read_jsonl
from rag_prune.context.sentences import split

# How often a row is drawn against a row of encyclopaedic text with one human evidence sentence.
WEIGHT = {
    "qed": 3.0,
    "nq": 1.5,
    "squadshifts_wiki": 1.5,
    "squadshifts_wiki_none": 0.5,
    "squadshifts_amazon": 0.25,
    "squadshifts_reddit": 0.25,
    "selqa": 1.0,
    "clapnq": 2.0,
    "hotpotqa": 2.0,
    "2wikimultihop": 0.4,
    "musique": 1.5,
    "tatqa": 1.0,
    "adversarial_qa": 1.0,
    "quoref": 1.0,
    "duorc": 0.5,
}
# What a threshold must mean the same on: as many evidence sentences of each calibrate it.
KINDS = (
    ("qed",),
    ("squadshifts_wiki",),
    ("squadshifts_reddit",),
    ("selqa",),
    ("clapnq", "hotpotqa", "musique"),
)
EVIDENCE = 50
DEV_SHARE = {"qed": 0.25, "nq": 0.15}  # the rest: 0.04


def read(folder: Path, name: str) -> list[dict]:
    return list(read_jsonl(folder / f"{name}.jsonl.gz"))


def unit_hash(key: str) -> float:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def detokenise(text: str, marks: list[int]) -> tuple[str, list[int]]:
    """Remove the spaces that tokenisation put in; the character positions `marks` move along."""
    drop = set()
    for pattern in (
        r" (?=[,.;:!?%)\]}]|'s\b|'t\b|'re\b|'ve\b|'ll\b|'d\b|n't\b)",
        r"(?<=[(\[{$]) ",
        r"(?<=\w) (?=-- )|(?<=\w) (?=- \w)|(?<=\w -) (?=\w)",
    ):
        drop |= {m.start() for m in re.finditer(pattern, text)}
    # `` and '' are pairs: no space inside
    for m in re.finditer(r'" ([^"]*?) "', text):
        drop |= {m.start() + 1, m.end() - 2}
    new_position, kept, out = [], 0, []
    for i, char in enumerate(text):
        new_position.append(kept)
        if i not in drop:
            out.append(char)
            kept += 1
    new_position.append(kept)
    return "".join(out), [new_position[m] for m in marks]


def sentence_of(spans, position: int) -> tuple[int, int]:
    return next(span for span in spans if span[0] <= position < span[1])


def qed_rows(folder: Path) -> list[dict]:
    rows = []
    for row in read(folder, "qed"):
        note, text = row["annotation"], row["paragraph_text"]
        bounds = [*row["sentence_starts"], len(text)]
        spans = list(pairwise(bounds))
        if note["explanation_type"] == "single_sentence":
            chosen = note["selected_sentence"]
            evidence = [[chosen["start"], chosen["end"]]]
        elif note["explanation_type"] == "multi_sentence":
            # Which sentences explain is not marked: the ones that hold an answer are evidence.
            positions = {a["start"] for answers in row["original_nq_answers"] for a in answers}
            evidence = sorted({sentence_of(spans, p) for p in positions})
        else:
            continue
        if not evidence:
            continue
        marks = [m for span in evidence for m in span]
        plain = unit_hash("form" + row["question_text"]) < 0.5
        if plain:
            text, marks = detokenise(text, marks)
        answers = sorted({a["string"] for answers in row["original_nq_answers"] for a in answers})
        if plain:
            answers = [detokenise(a, [])[0] for a in answers]
        rows.append(
            {
                "source": "qed",
                "question": row["question_text"],
                "title": row["title_text"],
                "passage": text,
                "answers": answers,
                "evidence": [list(p) for p in zip(marks[::2], marks[1::2], strict=True)],
                "single": note["explanation_type"] == "single_sentence",
                "plain": plain,
            }
        )
    return rows


def answer_sentence(question: str, text: str, answers: list[str]) -> list[list[int]]:
    """The sentence that holds an answer and shares most words with the question."""
    wanted = set(normal(question).split())
    best, where = -1, []
    for start, end in split(text):
        sentence = text[start:end]
        if any(a.lower() in sentence.lower() for a in answers):
            shared = len(wanted & set(normal(sentence).split()))
            if shared > best:
                best, where = shared, [[start, end]]
    return where


def nq_rows(folder: Path, known: set[str]) -> list[dict]:
    rows = []
    for row in read(folder, "nq_open_oracle"):
        gold = row["nq_annotated_gold"]
        answers = [a for a in row["answers"] if len(a) > 1]
        for text in (gold["long_answer"], row["ctxs"][0]["text"]):
            evidence = answer_sentence(row["question"], text, answers) if len(text) < 3000 else []
            if evidence and "<" not in text and normal(row["question"]) not in known:
                rows.append(
                    {
                        "source": "nq",
                        "question": row["question"],
                        "title": gold["title"],
                        "passage": text,
                        "answers": answers,
                        "evidence": evidence,
                    }
                )
                break
    return rows


def reading_rows(folder: Path) -> list[dict]:
    rows = []
    for row in read(folder, "qa_reading"):
        if row["source"] == "sciq":  # non-commercial licence
            continue
        evidence = answer_sentence(row["question"], row["context"], [row["answer"]])
        if evidence:
            rows.append(
                {
                    "source": row["source"],
                    "question": row["question"],
                    "title": None,
                    "passage": row["context"],
                    "answers": [row["answer"]],
                    "evidence": evidence,
                }
            )
    return rows


def calibration_rows(rows: list[dict]) -> list[dict]:
    """Rows of each of the KINDS in hashed order, until they have EVIDENCE sentences."""
    chosen = []
    for sources in KINDS:
        found = 0
        for row in sorted(rows, key=lambda r: unit_hash("calibrate" + r["question"])):
            if row["source"] in sources and row.get("single", True) and found < EVIDENCE:
                chosen.append(row)
                found += len(row["evidence"])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    qed = qed_rows(args.data)
    rows = qed + nq_rows(args.data, {normal(r["question"]) for r in qed}) + reading_rows(args.data)
    for row in read(args.data, "evidence"):
        keep = ("source", "question", "title", "passage", "answers", "evidence")
        rows.append({k: row[k] for k in keep} | {"id": row["id"]})
    counts = Counter()
    dev_questions = set()
    parts = {"train": [], "dev": []}
    for row in rows:
        key = normal(row["title"]) if row["title"] else row.get("id", row["passage"])
        key = re.sub(r"-none$", "", key)
        if row["source"].startswith("squadshifts") and not row["title"]:
            key = row["passage"]
        row["part"] = "dev" if unit_hash(key) < DEV_SHARE.get(row["source"], 0.04) else "train"
        if row["part"] == "dev":
            dev_questions.add(normal(row["question"]))
    dev_titles = {normal(r["title"]) for r in rows if r["title"] and r["part"] == "dev"}
    for row in rows:
        part = row.pop("part")
        shared = normal(row["question"]) in dev_questions or (
            row["title"] and normal(row["title"]) in dev_titles
        )
        if part == "train" and shared:
            continue
        row["weight"] = WEIGHT[row["source"]]
        parts[part].append(row)
        counts[part, row["source"]] += 1
    parts["calibration"] = calibration_rows(parts["dev"])
    args.out.mkdir(parents=True, exist_ok=True)
    for part, chosen in parts.items():
        with atomic_write(args.out / f"{part}.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    for (part, source), n in sorted(counts.items()):
        print(f"{part:6}{source:24}{n:7}")


if __name__ == "__main__":
    main()
