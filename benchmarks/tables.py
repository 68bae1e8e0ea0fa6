"""Fill the tables of README.md and docs/ from results files and the methods table.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; none of it is written by hand.
With --check nothing is written, and a table that would change is an error: the tests run that.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import data_prune
import model_prune
import rag_prune

ROOT = Path(__file__).parents[1]
CARD = ROOT / "rag_prune" / "context" / "default" / "README.md"
PAGES = [ROOT / "README.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
KV_RESULTS = ROOT / "benchmarks" / "kv" / "results"
MODEL_RESULTS = ROOT / "benchmarks" / "model" / "results"
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def results(name: str, claim: str = "context") -> Any:
    return json.loads((ROOT / "benchmarks" / claim / "results" / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def share(figure: dict[str, Any], digits: int = 1) -> str:
    return f"{100 * figure['value']:.{digits}f} %"


def with_interval(figure: dict[str, Any], scale: float = 1, digits: int = 3) -> str:
    low, high = figure["interval"]
    return (
        f"{scale * figure['value']:.{digits}f} ({scale * low:.{digits}f}–{scale * high:.{digits}f})"
    )


def median(figure: dict[str, float], spec: str = "") -> str:
    """A median over rounds, with the lowest and the highest; spec: of their format."""
    return f"{figure['median']:{spec}} ({figure['min']:{spec}}–{figure['max']:{spec}})"


def demo() -> str:
    f = results("demo")["figures"]
    full, pruned = f["full"], f["pruned"]
    return table(
        [
            f"`make demo`: {f['questions']} questions on Python's reference",
            "full context",
            "pruned",
        ],
        [
            ["characters kept", "100 %", f"{100 * f['keep_ratio']:.0f} %"],
            ["evidence sentences kept", str(f["evidence_found"]), str(f["evidence_kept"])],
            ["right passage, MRR", f"{f['mrr_before']:.2f}", f"{f['mrr_after']:.2f}"],
            ["prompt tokens", f"{full['prompt_tokens']:.0f}", f"{pruned['prompt_tokens']:.0f}"],
            ["seconds an answer, 2 cores", f"{full['seconds']:.1f}", f"{pruned['seconds']:.1f}"],
            [
                "right answers of a 135M model",
                *(f"{x['right']} of {x['answerable']}" for x in (full, pruned)),
            ],
        ],
    )


def quality() -> str:
    groups = results("quality")["groups"]
    easy, hard = groups["qed, random distractors"], groups["qed, bm25 distractors"]
    rows = [
        [
            f"`{name}`",
            share(easy["methods"][name]["compression_at_0.95"]),
            f"{easy['methods'][name]['mrr']['value']:.3f}",
            share(hard["methods"][name]["compression_at_0.95"]),
            f"{hard['methods'][name]['mrr']['value']:.3f}",
        ]
        for name in easy["methods"]
    ]
    rows.append(
        ["oracle", f"{100 * easy['oracle']:.1f} %", "1", f"{100 * hard['oracle']:.1f} %", "1"]
    )
    return table(
        [f"n = {easy['tasks']}", "dropped at 95 %", "MRR", "hard: dropped at 95 %", "hard: MRR"],
        rows,
    )


def quality_full() -> str:
    out = []
    for title, group in results("quality")["groups"].items():
        names = [
            "recall",
            "compression",
            *(f"compression_at_{r}" for r in ("0.90", "0.95", "0.98")),
            "mrr",
            "ece",
        ]
        rows = [
            [f"`{name}`", *(with_interval(m[n]) for n in names)]
            for name, m in group["methods"].items()
        ]
        head = ["", "recall at 0.1", "dropped at 0.1", "dropped at .90", "at .95", "at .98"]
        head += ["MRR", "calibration error"]
        out.append(
            f"**{title}** (n = {group['tasks']}; an oracle drops {group['oracle']:.3f})\n\n"
            + table(head, rows)
        )
    return "\n".join(out)


def languages() -> str:
    report = results("languages")["languages"]
    rows = [
        [
            language,
            str(group["tasks"]),
            *(f"{ours[n]['value']:.3f}" for n in ("recall", "compression", "compression_at_0.95")),
            f"{bm25['compression_at_0.95']['value']:.3f}",
            *(f"{m['mrr']['value']:.3f}" for m in (ours, bm25)),
        ]
        for language, group in report.items()
        for ours, bm25 in [(group["methods"]["both"], group["methods"]["bm25"])]
    ]
    head = ["", "n", "recall at 0.1", "dropped at 0.1", "dropped at .95", "BM25: dropped at .95"]
    return table([*head, "MRR", "BM25: MRR"], rows)


def answers() -> str:
    report = results("answers")
    rows = [
        [
            name,
            with_interval(c["f1"]),
            with_interval(c["contains"]),
            f"{c['context_tokens']['value']:.0f}",
            f"{c['seconds']['value']:.2f}",
            f"{c['answer_in_context']['value']:.2f}",
        ]
        for name, c in report["contexts"].items()
    ]
    gain = report["pruned_over_full"]
    columns = ("f1", "contains", "context_tokens", "seconds")
    rows.append(["pruned / full", *(with_interval(gain[c], digits=2) for c in columns), ""])
    head = [
        f"n = {report['questions']}, with 95 % intervals",
        "token F1",
        "answer in the output",
        "context tokens",
        "seconds",
        "answer in the context",
    ]
    return table(head, rows)


def cost() -> str:
    c = results("cost")
    per_second = c["passages_per_second"]
    return table(
        ["cost, one run", ""],
        [
            ["prune over rank alone, seconds", median(c["prune_over_rank"])],
            ["computed over real tokens", str(c["computed_over_real_tokens"])],
            ["`provence`, passages a second", str(per_second["prune"])],
            ["rank alone, passages a second", str(per_second["rank"])],
            ["`late`, first time", str(per_second["prune_late_first"])],
            ["`late`, passages indexed", str(per_second["prune_late_again"])],
            ["re-cut, ms for 100 passages", str(c["recut_milliseconds_per_100_passages"])],
        ],
    )


def labels() -> str:
    r = results("labels")
    chosen = r["agreement_with_people"]
    names = {
        "first look": f"`{r['labelling']['model']}`, first look",
        "verified": f"`{r['labelling']['model']}`, verified",
        "bundled pruner": "the bundled pruner's best sentence",
        "bm25": "BM25's best sentence",
        "first sentence": "the first sentence",
        "random sentence": "a random sentence",
        "every sentence": "every sentence",
    }
    return table(
        ["sentences, beside those that people marked", "passages", "precision", "recall", "F1"],
        [
            [shown, str(chosen[name]["passages"])]
            + [
                "–" if (share := chosen[name][figure]) is None else f"{share:.2f}"
                for figure in ("precision", "recall", "f1")
            ]
            for name, shown in names.items()
        ],
    )


def vllm_middleware() -> str:
    report = results("vllm_middleware")
    names = {"retrieved": "each with its own documents", "fixed": "all with the same documents"}
    rows = []
    for name, what in names.items():
        r = report[name]
        for figure, digits in (("prompt_tokens", 0), ("seconds", 2)):
            rows.append(
                [
                    f"{r['requests']} requests, {what}: {figure.replace('_', ' ')}",
                    f"{r['full'][figure]['value']:.{digits}f}",
                    f"{r['pruned'][figure]['value']:.{digits}f}",
                    with_interval(r["pruned_over_full"][figure], digits=2),
                    f"{r['pruned']['pruner_milliseconds']['value']:.0f} ms",
                ]
            )
    head = ["with 95 % intervals", "full", "pruned", "pruned / full", "in the pruner"]
    return table(head, rows)


def vllm_pooling() -> str:
    r = results("vllm_pooling")
    return table(
        [f"{r['passages']} passages, hosted against in process", ""],
        [
            ["sentence decisions equal", f"{r['decisions_equal']} of {r['sentences']}"],
            ["largest difference of logits", f"{r['max_logit_difference']:.1e}"],
            ["seconds, hosted / in process", median(r["hosted_over_in_process_seconds"])],
        ],
    )


def throughput() -> str:
    t = results("throughput")
    rows = [
        [
            f"`{path}`",
            str(t["passages_per_second"][path]),
            *(
                median(t["times_as_fast"][f"{path} / {peer}{form}"])
                for form in ("", ", equal")
                for peer in ("open_provence", "provence")
            ),
            median(t["over_matrices"][path]) if path in t["over_matrices"] else "",
        ]
        for path in ("ours", "ours_fast32", "ours_fast")
    ]
    head = [
        f"{t['passages']['mixed']} passages, {t['threads']} threads",
        "passages a second",
        "× OpenProvence's path",
        "× Provence's path",
        "equal lengths: × OpenProvence's",
        "equal: × Provence's",
        "over matrix time",
    ]
    return table(head, rows)


def throughput_parts() -> str:
    t = results("throughput")
    s, of = t["seconds"], t["tokens_of_a_passage"]["mixed"]
    fast = t["fast"]
    lengths = ", ".join(f"{k} {of[k]}" for k in ("min", "p25", "median", "p75", "p95", "max"))
    return table(
        ["the same run", ""],
        [
            ["tokens of a passage", lengths],
            ["computed over real tokens", str(t["computed_over_real_tokens"])],
            ["splitting / matrix time", f"{100 * s['split'] / s['matrices']:.1f} %"],
            ["tokenising / matrix time", f"{100 * s['tokenise'] / s['matrices']:.1f} %"],
            [
                "fast decides as float32",
                f"{100 * fast['equal_decisions']:.2f} % of {fast['sentences']} sentences",
            ],
            ["the same best passage", f"{100 * fast['equal_best_passage']:.1f} %"],
            [
                "fast without bfloat16 decides as float32",
                f"{100 * t['fast32']['equal_decisions']:.2f} %",
            ],
            ["`late`, passages indexed, × `ours`", median(t["late_over_ours"])],
        ],
    )


def heads() -> str:
    r = results("ph3", "heads")
    test, gain = r["test"], r["gain"]
    counts = {prefer: len(heads) for prefer, heads in r["pruned"].items()}
    names = {
        "none": "all heads",
        "prefer context": f'`prefer="context"`, heads pruned: {counts["context"]}',
        "random heads, anywhere": "as many random heads",
        "random heads, same layers": "— of the same layers",
        "prefer memory": f'`prefer="memory"`, heads pruned: {counts["memory"]}',
        "none, chat": "in a chat: all heads",
        "prefer context, chat": 'in a chat: `prefer="context"`',
        "prefer memory, chat": 'in a chat: `prefer="memory"`',
    }
    gains = {f"prefer {name}": figure for name, figure in gain.items()}
    rows = [
        [
            label,
            *(with_interval(test[name][which], 100, 0) for which in ("context", "memory")),
            with_interval(gains[name], 100, 0) if name in gains else "",
        ]
        for name, label in names.items()
    ]
    head = [
        f"{r['facts']['test']} facts, %, with 95 % intervals",
        "follow the context",
        "follow the memory",
        "gain of what is preferred",
    ]
    return table(head, rows)


def heads_counts() -> str:
    r = results("ph3", "heads")
    right = r["dev questions, right"]
    rows = []
    for count, shares in {"0": r["dev"]["none"], **r["dev"]["context"]}.items():
        asked = right["none"] if count == "0" else right.get(f"{count} heads")
        figures = [shares["context"], shares["memory"], asked]
        rows.append([count, *("" if f is None else f"{100 * f:.0f}" for f in figures)])
    head = [
        "pruned memory heads; %",
        f"{r['facts']['dev']} facts: follow the context",
        "follow the memory",
        "questions with a faithful passage: right",
    ]
    return table(head, rows)


def kv_fidelity() -> str:
    r = results("fidelity", "kv")
    names = {
        "published": "ThinK as published, {}",
        "kvpress": "kvpress's rule, {}",
        "key norm": "key norms alone, {}, our window",
        "random channels": "random channels, {}, our window",
    }
    rows = []
    for name, row in r["rows"].items():
        start, ratio = name.rsplit(" ", 1)
        label = names[start].format(ratio) if start in names else name
        cells = [with_interval(row[k]) if k in row else "" for k in ("kl", "top1", "retrieval")]
        rows.append([label, *cells])
    head = [
        f"{r['texts']} texts, {r['following']} tokens after {r['prompt']}; 95 % intervals",
        "KL to the whole cache, nats",
        "same likeliest token",
        f"retrieval from {r['pairs']} pairs, {r['questions']} questions",
    ]
    return table(head, rows)


def kv_transformers() -> str:
    r = results("transformers", "kv")
    rows = [
        [
            name,
            *(f"{row[k]:.3f}" for k in ("bytes after the prompt", "bytes at the end")),
            *(median(row[k]) for k in ("prompt, × dense", "step, × dense")),
        ]
        for name, row in r["rows"].items()
    ]
    head = [
        f"{r['batch']} × {r['tokens']} tokens, {r['steps']} more; × `DynamicCache` and SDPA",
        "bytes after the prompt",
        "bytes at the end",
        "seconds of the prompt",
        "seconds a step",
    ]
    return table(head, rows)


ENGINES = {
    "stock": "stock",
    "none": "our kernels, nothing dropped",
    "think .5": "ThinK 0.5",
    "think .5, values .5": "ThinK 0.5 + values 0.5",
    "mustafar .5": "Mustafar 0.5/0.5",
    "mustafar .7": "Mustafar 0.7/0.7",
}


def kv_capacity() -> str:
    r = results("serving", "kv")
    sizes = r["capacity"]
    head = [f"× stock vLLM, {r['pool_bytes'] >> 30} GiB of float32, 3 heads of 64"]
    for size, engines in sizes.items():
        contexts = engines["stock"]["times_the_sequences"]
        head += [f"blocks of {size}: tokens", *(f"sequences of {int(n):,}" for n in contexts)]
    rows = []
    for name, label in ENGINES.items():
        row = [label]
        for engines in sizes.values():
            of = engines[name]
            times = of["times_the_blocks"], *of["times_the_sequences"].values()
            row += [f"{x:.2f}" for x in times]
        rows.append(row)
    return table(head, rows[2:])


def kv_load() -> str:
    r = results("serving", "kv")["load"]
    rows = []
    for name, of in r["engines"].items():
        times, bounds = of["times_stock"], of["bounds_of_decode"]
        rows.append(
            [
                ENGINES[name],
                median(times["tokens_per_second"], ".2f"),
                median(times["decode_tokens_per_second"], ".2f"),
                f"{of['decode_batch']['median']:.1f}",
                f"{of['decode_attention_share']['median']:.0%}",
                *(f"{bounds[k]:.2f}" for k in ("equal_batch", "batch_limited_by_memory")),
                f"{of['preemptions']['median']:.0f}",
            ]
        )
    head = [
        f"{r['requests']} requests, {r['prompt_tokens']:,} tokens and {r['new_tokens']:,} new, "
        f"{r['pool_bytes'] >> 20} MiB",
        "tokens/s, × stock",
        "in decode steps alone",
        "sequences in such a step",
        "attention's share of it",
        "bound, batch as before",
        "bound, batch limited by memory",
        "preemptions",
    ]
    return table(head, rows)


def kv_attention() -> str:
    """Each file of results is a column; all hold the same paths."""
    runs = [results(path.stem, "kv") for path in sorted(KV_RESULTS.glob("attention-*.json"))]
    names = {"dense": "our kernel, all kept", "vllm": "vLLM's kernel", "sdpa_float32": "SDPA"}
    head = ["one decode step, × faster than our kernel with all kept"]
    for run in runs:
        of = run["attention"]
        head.append(
            f"{of['dtype']}, {of['heads']}/{of['kv_heads']} heads of {of['head_size']}, "
            f"{of['threads']} thread{'s' * (of['threads'] > 1)}, {of['build']}"
        )
    rows = []
    for path in runs[0]["times_as_fast_as"]["dense"]:
        cells = [f"{run['times_as_fast_as']['dense'][path]['median']:.2f}" for run in runs]
        rows.append([names.get(path, path), *cells])
    return table(head, rows)


def heads_questions() -> str:
    r = results("ph3", "heads")["questions"]
    names = {
        "none": "all heads",
        "prefer context": '`prefer="context"`',
        "prefer memory": '`prefer="memory"`',
    }
    figures = ("faithful passage, right", "change", "replaced, context", "replaced, memory")
    head = [f"{r['n']} questions, %, with 95 % intervals", "faithful passage: right", "change"]
    return table(
        [*head, "answer replaced: follows the passage", "gives the true answer"],
        [
            [label, *(with_interval(r[name][figure], 100, 0) for figure in figures)]
            for name, label in names.items()
        ],
    )


def prune_quality(name: str, head: str, share: str) -> str:
    """share: "removed" or "zeros", whichever the table is about."""
    report = results("quality", "model")

    def perplexity(figure: dict[str, float]) -> str:
        # Methods that break the model differ by powers of ten, which digits would hide.
        shown = "{:.1f}" if figure["perplexity"] < 1000 else "{:.1e}"
        return shown.format(figure["perplexity"])

    def ratio(figure: dict[str, float]) -> str:
        if figure["ratio"] > 100:
            return f"×{figure['ratio']:.0e}"
        return f"×{figure['ratio']:.2f} ({figure['low']:.2f}–{figure['high']:.2f})"

    dense = [f"{report['dense'][text]:.1f}" for text in ("test", "second")]
    rows = [["dense", dense[0], "", dense[1], "", "", ""]]
    for method, row in report["tables"][name].items():
        texts = [f(row[text]) for text in ("test", "second") for f in (perplexity, ratio)]
        rows.append([method, *texts, f"{100 * row[share]:.2f} %", f"{row['seconds']:.0f}"])
    return table(
        [head, "WikiText-2", "to dense", "other text", "to dense", share, "seconds"],
        rows,
    )


def prune_elements() -> str:
    return prune_quality("elements", "half of the weights zero", "zeros")


def prune_pattern() -> str:
    return prune_quality("2:4", "two of four zero", "zeros")


def prune_units() -> str:
    return prune_quality("units", "a fifth of the layers' weights cut", "removed")


def prune_layers() -> str:
    return prune_quality("layers", "a tenth of the layers removed", "removed")


def prune_flips() -> str:
    """Means over seeds."""
    rows = results("flips", "model")["rows"]

    def mean(of: str, **case: Any) -> float:
        return statistics.fmean(row[of] for row in rows if case.items() <= row.items())

    found = []
    cases = dict.fromkeys((row["start"], row["share"]) for row in rows if "start" in row)
    for start, share in cases:
        case = {"start": start, "share": share}
        figures = [f"{100 * mean('accuracy', row='start', **case):.1f}"] + [
            f"{100 * mean('accuracy', row=row, **case):.1f} ({mean('loss', row=row, **case):.2f})"
            for row in ("icbs", "alone", "cleaned")
        ]
        flipped = mean("flipped", row="icbs", **case)
        found.append([f"{start}, {share:.0%} zero", *figures, f"{100 * flipped:.1f} %"])
    head = f"accuracy, % (loss); dense {100 * mean('accuracy', row='dense'):.1f}"
    return table([head, "start", "iCBS", "each weight alone", "code's clean-up", "flipped"], found)


def prune_solver() -> str:
    """Shares of the best gain that anything found in a block."""
    rows = results("solver", "model")["rows"]
    finders = [name for name, found in rows[0].items() if isinstance(found, dict)]
    found = []
    for name in finders:
        shares = [row[name]["gain"] / max(row[each]["gain"] for each in finders) for row in rows]
        seconds = statistics.fmean(row[name]["seconds"] for row in rows)
        mean, least = f"{100 * statistics.fmean(shares):.2f} %", f"{100 * min(shares):.1f} %"
        found.append([name, mean, least, f"{seconds:.3f}"])
    head = f"{len(rows)} blocks of {rows[0]['weights']} weights"
    return table([head, "of the best gain found, mean", "least", "seconds a block"], found)


def prune_policy() -> str:
    """Of random rows the mean over seeds."""
    report = results("policy", "model")
    rows = []
    for case, group in report["tables"].items():
        draws = [row for name, row in group.items() if name.startswith("random")]
        mean = {key: statistics.fmean(row[key] for row in draws) for key in draws[0]}
        named = {name: row for name, row in group.items() if not name.startswith("random")}
        for name, row in {f"random rows, mean of {len(draws)}": mean, **named}.items():
            seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
            figures = [f"{row['distance']:.4f}", f"{row['perplexity']:.1f}", seconds]
            rows.append([case, name, *figures])
    dense = f"perplexity; dense {report['dense']:.1f}, sibling {report['sibling']:.1f}"
    return table(["cut", "neurons kept", "KS distance", dense, "training, s"], rows)


def prune_serving() -> str:
    """Each file of results is three columns."""
    runs = [results(path.stem, "model") for path in sorted(MODEL_RESULTS.glob("serving-*.json"))]
    names = {
        "dense": "dense",
        "units": "a quarter of the layers' weights cut in units",
        "transformers": "the same, through vLLM's transformers backend",
        "depth": "a quarter cut in depth",
    }
    head = [f"{runs[0]['batch']} sequences, 1 thread"]
    rows = [[label] for label in names.values()] + [["bound by products with weights, units"]]
    for run in runs:
        head += [f"{run['model']}: prefill", "decode", "tokens that fit"]
        for row, name in zip(rows[:-1], names, strict=True):
            row += served(run["engines"][name]) if name in run["engines"] else [""] * 3
        bounds = run["cuts"]["units"]
        rows[-1] += [f"×{bounds[f'{phase}_bound']:.2f}" for phase in ("prefill", "decode")] + [""]
    return table(head, rows)


def served(engine: dict[str, Any]) -> list[str]:
    times = [engine["times_dense"][f"{k}_tokens_per_second"] for k in ("prefill", "decode")]
    cache = f"{engine['cache_tokens']:,} (×{engine['times_the_cache']:.2f})"
    return [*(f"×{median(ratio, '.2f')}" for ratio in times), cache]


def prune_agreement() -> str:
    report = results("agreement", "model")
    rows = []
    for case, layers in report["rows"].items():
        errors = [layer["error"] for layer in layers]
        same = min(layer["masks"] for layer in layers)
        rows.append(
            [case, f"{100 * same:.3f} %", f"×{min(errors):.4f} to ×{max(errors):.4f}"],
        )
    layers = ", ".join(str(layer["layer"]) for layer in next(iter(report["rows"].values())))
    return table([f"layers {layers}", "same mask, at least", "official error / ours"], rows)


def prune_speed() -> str:
    report = results("speed", "model")
    rows = [
        [
            row["case"],
            f"{statistics.median(pair['official']['seconds'] for pair in row['rounds']):.0f}",
            f"{statistics.median(pair['ours']['seconds'] for pair in row['rounds']):.0f}",
            f"×{median(row['speed-up'], '.2f')}",
            f"×{median(row['memory'], '.2f')}",
            f"{100 * row['same']:.2f} %",
        ]
        for row in report["rows"]
    ]
    head = f"{report['windows']} windows of {report['tokens']} tokens"
    columns = [head, "official, s", "ours, s", "speed", "memory", "same"]
    return table(columns, rows)


def prune_memory() -> str:
    report = results("memory", "model")
    gib = 2**30
    rows = [
        [
            name,
            f"{row['peak'] / gib:.2f}",
            f"{row['imported'] / gib:.2f}",
            f"{sum(row['seconds'].values()):.0f}",
        ]
        for name, row in report["rows"].items()
    ]
    whole = report["whole_model_by_arithmetic"]
    for name, size in (("in half precision", "float16"), ("in float32", "float32")):
        rows.append([f"the model alone {name}, by arithmetic", f"{whole[size] / gib:.2f}", "", ""])
    return table(["3.2 billion weights", "peak, GiB", "libraries", "seconds"], rows)


def prune_memory_methods() -> str:
    report = results("memory-methods", "model")
    rows = [
        [f"`{name}`", *(f"{row[kind] / 2**30:.2f}" for kind in ("peak", "peak_anonymous"))]
        for name, row in report["rows"].items()
    ]
    whole = f"{report['whole_model_by_arithmetic']['float32'] / 2**30:.2f}"
    rows.append(["the model alone in float32, by arithmetic", "", whole])
    return table(["135 million weights", "peak, GiB", "of it not mapped"], rows)


KINDS = ("ResNet", "MobileNet", "ViT", "BERT", "GRU cell")


def over_seeds(rows: Iterable[dict[str, float]], figure: str) -> str:
    """Mean and standard deviation, in per cent."""
    values = [100 * row[figure] for row in rows]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def anything_dense() -> list[str]:
    networks = results("anything", "model")["networks"]
    return [over_seeds(networks[kind].values(), "dense") for kind in KINDS]


def anything_after(share: float) -> str:
    networks = results("anything", "model")["networks"]
    own = {kind: [seed["after"] for seed in networks[kind].values()] for kind in KINDS}
    names = [key for key in own["ResNet"][0] if key.startswith(f"{share}: ")]
    head, rows = [f"{share:.0%} of FLOPs removed"], [["dense"]]
    for kind, dense in zip(KINDS, anything_dense(), strict=True):
        normed = "settled" in own[kind][0][names[0]]
        head += [kind, "settled"] if normed else [kind]
        rows[0] += [dense, ""] if normed else [dense]
    for name in names:
        row = [name.partition(": ")[2]]
        for kind in KINDS:
            found = [seed[name] for seed in own[kind]]
            row += [over_seeds(found, f) for f in ("accuracy", "settled") if f in found[0]]
        rows.append(row)
    return table(head, rows)


def anything_trained() -> str:
    networks = results("anything", "model")["networks"]
    rows = [["dense", *anything_dense()]]
    for kind, said in (("before", "cut, then trained"), ("tuned", "cut, then trained on")):
        own = {one: [seed[kind] for seed in networks[one].values()] for one in KINDS}
        rows += [
            [
                f"{said}: {key.partition(': ')[2]}",
                *(over_seeds([seed[key] for seed in own[one]], "accuracy") for one in KINDS),
            ]
            for key in own["ResNet"][0]
        ]
    return table(["70% of FLOPs removed", *KINDS], rows)


def anything_cost() -> str:
    cost, gib = results("anything", "model")["cost"], 2**30
    seconds, memory = cost["seconds"], cost["memory"]
    rows = [
        ["seconds to find and try all channels", f"{seconds['trace']:.0f}"],
        ["to choose by magnitude", f"{seconds['magnitude']:.0f}"],
        [f"to choose and refit by OBSPA, {cost['images']} images", f"{seconds['obspa']:.0f}"],
        ["GiB of memory with network and images", f"{memory['before'] / gib:.2f}"],
        ["GiB at the peak", f"{memory['peak'] / gib:.2f}"],
    ]
    name = f"ResNet-50, {cost['weights'] / 1e6:.1f} million weights, {cost['families']} families"
    return table([name, "1 thread"], rows)


def anything_decoder() -> str:
    rows = results("anything", "model")["decoder"]
    shown = [
        [
            name,
            f"{row['perplexity']:.1f}" if row["perplexity"] < 1000 else f"{row['perplexity']:.1e}",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
        for name, row in rows.items()
    ]
    return table(["a fifth of the layers' weights cut", "WikiText-2", "seconds"], shown)


def experts(name: str) -> str:
    figures = results(name, "model")["figures"]
    names = {
        "dense": "the dense model, untrained",
        "all": "all 8 experts",
        "premoe": "4: PreMoe, of the task",
        "frequency": "4: chosen most often",
        "others": "4: PreMoe, of the other tasks (mean)",
        "random": "4: random (mean of 3 seeds)",
        "2 experts, premoe": "2: PreMoe, of the task",
        "2 experts, others": "2: PreMoe, of the other tasks (mean)",
        "2 experts, random": "2: random (mean of 3 seeds)",
    }
    rows = []
    for choice, label in names.items():
        found = [figures[family][choice] for family in figures]
        cells = [f"{f['loss']:.2f} · {100 * f['tokens']:.0f} %" for f in found]
        loss, tokens, right = (
            sum(f[what] for f in found) / len(found) for what in ("loss", "tokens", "right")
        )
        mean = [f"{loss:.2f} · {100 * tokens:.0f} %", f"{100 * right:.1f} %"]
        rows.append([label, *cells, *mean])
    return table(["experts that stay in a layer", *figures, "mean", "answers right, mean"], rows)


def experts_margins() -> str:
    figures = results("experts", "model")["figures"]
    names = {
        "all": "4: all 8 experts",
        "frequency": "4: chosen most often",
        "random": "4: random",
        "others": "4: of the other tasks",
        "2 experts, random": "2: random",
        "2 experts, others": "2: of the other tasks",
    }
    rows = []
    for choice, label in names.items():
        cells = []
        for family in figures:
            found = figures[family]["loss of premoe less that of"][choice]
            low, high = found["interval"]
            cells.append(f"{found['value']:+z.2f} ({low:+z.2f} to {high:+z.2f})")
        rows.append([label, *cells])
    return table(["loss of PreMoe's less that of", *figures], rows)


def experts_cost() -> str:
    report = results("experts", "model")
    loading, writing = report["loading"], report["writing"]
    names = {"all": "all 8", "half": "4", "quarter": "2"}
    return table(
        [
            *("experts in a layer", "file, MB", "memory to load it, MB", "seconds"),
            *("memory to write it, MB", "seconds"),
        ],
        [
            [label, f"{loading[size]['file'] / 1e6:.0f}"]
            + [
                cell
                for took in (loading[size], writing.get(size))
                for cell in (
                    (f"{took['memory'] / 1e6:.0f}", f"{took['seconds']:.1f}") if took else ("", "")
                )
            ]
            for size, label in names.items()
        ],
    )


def data_training() -> str:
    labels = {"0% of the labels wrong": "clean", "20% of the labels wrong": "a fifth wrong"}
    shares = ("0.1", "0.2", "0.4", "0.6")
    found = results("training_metrics", "data")
    names = [name for name in found[next(iter(labels))]["accuracy"] if name != "all rows"]
    return table(
        [
            "kept",
            *(f"{label}, {100 * float(f):.0f} %" for label in labels.values() for f in shares),
        ],
        [
            [name]
            + [
                f"{100 * cell['mean']:.1f} ± {100 * cell['error']:.1f}"
                for group in labels
                for cell in (found[group]["accuracy"][name][share] for share in shares)
            ]
            for name in names
        ],
    )


def data_distill() -> str:
    rows = [r for r in results("distill", "data")["rows"] if r["row"] == "student"]
    rows = [r for r in rows if r["noise"] == 0.2 and r["learning_rate"] == 0.003]
    shares = sorted({r["keep_ratio"] for r in rows})
    columns: dict[str, dict[str, Any]] = {
        "random, alone": {"choice": "random", "weight": 0.0, "teacher": 64},
        "α .5": {"choice": "random", "weight": 0.5, "teacher": 64},
        "α 1": {"choice": "random", "weight": 1.0, "teacher": 64},
        "small teacher": {"choice": "random", "weight": 1.0, "teacher": 16},
        "large teacher": {"choice": "random", "weight": 1.0, "teacher": 256},
        "hardest, alone": {"choice": "el2n_hard", "weight": 0.0, "teacher": 64},
        "hardest, α 1": {"choice": "el2n_hard", "weight": 1.0, "teacher": 64},
    }

    def cell(share: float, wanted: dict[str, Any]) -> str:
        for r in rows:
            if r["keep_ratio"] == share and all(r[k] == v for k, v in wanted.items()):
                return f"{r['accuracy']:.1f} ± {r['standard_error']:.1f}"
        return ""

    return table(
        ["kept", *columns],
        [[f"{100 * f:.0f} %", *(cell(f, wanted) for wanted in columns.values())] for f in shares],
    )


def data_divergence() -> str:
    asked = {"common": "both know the tokens", "own": "each knows its own"}
    return table(
        ["weights zero", "k", "asked", "width / ln 2", "rank correlation, rows", "tokens"],
        [
            [
                f"{100 * float(sparsity):.0f} %",
                str(r["k"]),
                asked[r["asked"]],
                f"{r['mean_width_over_ln2']:.2f}",
                f"{r['spearman_rows']:.2f}",
                f"{r['spearman_tokens']:.2f}",
            ]
            for sparsity, rows in results("divergence", "data")["intervals"].items()
            for r in rows
        ],
    )


def data_prototypes() -> str:
    rows = [r for r in results("prototypes", "data")["rows"] if r["metric"] != "all"]
    cells = {(r["metric"], r["share"]): f"{r['accuracy']:.1f} ± {r['error']:.1f}" for r in rows}
    shares = sorted({share for _, share in cells})
    return table(
        ["kept", *(f"{100 * share:.0f} %" for share in shares)],
        [
            [name, *(cells[name, share] for share in shares)]
            for name in dict.fromkeys(name for name, _ in cells)
        ],
    )


def data_budgets() -> str:
    found = results("budgets", "data")
    return table(
        [f"{found['rows']:,} rows", "seconds"],
        [[name, median(taken, ".3f")] for name, taken in found["seconds"].items()],
    )


def data_targets() -> str:
    found = results("targets", "data")["precision"]
    names = list(next(iter(found.values())))
    return table(
        ["target rows", *names],
        [
            [count, *(f"{100 * row[name]['mean']:.1f} %" for name in names)]
            for count, row in found.items()
        ],
    )


def data_self_distill() -> str:
    found = results("self_distill", "data")
    sets = {"GSM8K": found["gsm8k"], "T0": found["instructions"]}
    checks = list(dict.fromkeys(name for one in sets.values() for name in one["checks"]))

    def check(one: dict[str, Any], name: str) -> str:
        tally = one["checks"].get(name)
        return f"{tally['passed']} of {tally['of']}" if tally else "–"

    def nats(one: dict[str, Any]) -> str:
        found = one["nats_a_token"]["accepted"]
        return (
            f"{found['original']:.2f} → {found['rewrite']:.2f} "
            f"(over rows {found['difference']:+.2f} ± {found['error']:.2f})"
        )

    ones = sets.values()
    return table(
        ["", *sets],
        [
            ["accepted", *(f"{one['accepted']} of {one['rows']}" for one in ones)],
            *([name.replace("_", " "), *(check(one, name) for one in ones)] for name in checks),
            ["SDFT's rule would take", *(str(one["sdft"]["accepted"]) for one in ones)],
            ["nats a token of the accepted, answer → rewrite", *(nats(one) for one in ones)],
        ],
    )


def data_theory() -> str:
    rows = results("theory", "data")["table"]
    names = {
        "all": (1.0, None),
        **{
            f"{keep} {100 * f:.0f} %": (f, keep)
            for f in (0.5, 0.2)
            for keep in ("easy", "random", "hard")
        },
    }

    def cell(alpha: float, share: float, keep: str | None) -> str:
        [found] = [
            r
            for r in rows
            if r["alpha_total"] == alpha
            and r["keep_ratio"] == share
            and r["keep"] in (keep, None if keep else r["keep"])
        ][:1]
        return f"{100 * found['theory']:.1f} ({100 * found['simulation']:.1f})"

    return table(
        ["rows per dimension", *names],
        [
            [f"{alpha:g}", *(cell(alpha, *wanted) for wanted in names.values())]
            for alpha in sorted({r["alpha_total"] for r in rows if r["keep_ratio"] == 0.2})
        ],
    )


def install() -> str:
    rows = [
        [f"`{r['what']}`", str(r["packages"]), str(r["megabytes"]), str(r["seconds"]), r["torch"]]
        for r in results("install", "install")["installs"]
    ]
    return table(["", "packages", "megabytes", "seconds", "torch"], rows)


def methods() -> str:
    def paper(row: dict[str, Any]) -> str:
        return (
            f"{row['paper']} ({row['year']}, arXiv:{row['arxiv']})"
            if row["arxiv"]
            else row["paper"]
        )

    return table(
        ["name", "family", "paper", "needs", "costs"],
        [
            [f"`{r['name']}`", r["family"], paper(r), r["needs"], r["cost"]]
            for package in (rag_prune, data_prune, model_prune)
            for r in (m.to_dict() for m in package.METHODS)
        ],
    )


TABLES = {
    "anything_30": lambda: anything_after(0.3),
    "anything_50": lambda: anything_after(0.5),
    "anything_70": lambda: anything_after(0.7),
    "anything_cost": anything_cost,
    "anything_decoder": anything_decoder,
    "anything_trained": anything_trained,
    "data-budgets": data_budgets,
    "data-distill": data_distill,
    "data-divergence": data_divergence,
    "data-prototypes": data_prototypes,
    "data-self-distill": data_self_distill,
    "data-targets": data_targets,
    "data-theory": data_theory,
    "data-training": data_training,
    "demo": demo,
    "quality": quality,
    "quality-full": quality_full,
    "languages": languages,
    "answers": answers,
    "cost": cost,
    "labels": labels,
    "vllm-middleware": vllm_middleware,
    "vllm-pooling": vllm_pooling,
    "throughput": throughput,
    "throughput-parts": throughput_parts,
    "experts": lambda: experts("experts"),
    "experts_3": lambda: experts("experts_3"),
    "experts_margins": experts_margins,
    "experts_cost": experts_cost,
    "heads": heads,
    "kv_attention": kv_attention,
    "kv_capacity": kv_capacity,
    "kv_fidelity": kv_fidelity,
    "kv_load": kv_load,
    "kv_transformers": kv_transformers,
    "heads-counts": heads_counts,
    "heads-questions": heads_questions,
    "install": install,
    "methods": methods,
    "prune_agreement": prune_agreement,
    "prune_elements": prune_elements,
    "prune_layers": prune_layers,
    "prune_memory": prune_memory,
    "prune_memory_methods": prune_memory_methods,
    "prune_pattern": prune_pattern,
    "prune_flips": prune_flips,
    "prune_policy": prune_policy,
    "prune_serving": prune_serving,
    "prune_solver": prune_solver,
    "prune_speed": prune_speed,
    "prune_units": prune_units,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        filled = MARK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if filled != text and args.check:
            sys.exit(
                f"{page.name} has a table that is not up to date: run python benchmarks/tables.py"
            )
        if filled != text:
            page.write_text(filled)


if __name__ == "__main__":
    main()
