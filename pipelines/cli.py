"""`prunekit`: a thin layer over the functions; every command is one of them with its arguments.

Exit codes: 0; 2 for what the user got wrong, with one line on standard error; 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from prune_core.errors import InputError, PruneError, require

app = typer.Typer(
    help="Shed what a RAG stack does not need, and see exactly what was dropped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _OrPrune(typer.core.TyperGroup):
    """`prunekit context` prunes, unless its first word is one of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args[:1] and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["prune", *args])


context_app = typer.Typer(
    cls=_OrPrune,
    help="Prune passages (`prune`, which need not be said), label them, train a pruner.",
)
app.add_typer(context_app, name="context")
rag_app = typer.Typer(help="Retrieve, prune, answer.", no_args_is_help=True)
app.add_typer(rag_app, name="rag")
kv_app = typer.Typer(
    help="Prune the KV cache: see whether it pays, calibrate.", no_args_is_help=True
)
app.add_typer(kv_app, name="kv")

Model = Annotated[
    str | None, typer.Option(help="Pruner: a folder or a hub name; the bundled one by default.")
]
MethodName = Annotated[str | None, typer.Option(help="A name from `prunekit methods`.")]
Precision = Annotated[
    Literal["float32", "fast"],
    typer.Option(help="float32, or fast: bfloat16, through OpenVINO where installed."),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Keep sentences at least this probable, 0 to 1; 0.1 by default."),
]
KeepRatio = Annotated[float | None, typer.Option(help="Keep this share of the characters, 0 to 1.")]
TopK = Annotated[int | None, typer.Option(help="Keep at most this many passages.")]
Page = Annotated[Path | None, typer.Option("--html", help="Also write a page to look at.")]
Windows = Annotated[int | None, typer.Option(help="Windows of it to read; the paper's by default.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of a window; the paper's by default.")]
Seed = Annotated[int, typer.Option(help="Of which windows are drawn.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="A further setting, as NAME=VALUE; may be repeated."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one by default.")]


@context_app.command("prune")
def context(
    question: Annotated[
        str | None,
        typer.Option(help="Then each input line is a passage: a JSON string or {text, title}."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Argument(help="JSONL file; standard input by default.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file; standard output by default.")
    ] = None,
    model: Model = None,
    method: MethodName = None,
    precision: Precision = "float32",
    threshold: Threshold = None,
    keep_ratio: KeepRatio = None,
    top_k: TopK = None,
    html: Page = None,
) -> None:
    """Prune passages.

    With --question the lines are passages, and the ones that keep something come out, best first,
    shortened, with `relevance_score` and `kept_spans`. Without it each line is a request
    {"question": …, "passages": […]}, and each answer is the whole result as one line.
    """
    from tqdm.auto import tqdm

    from rag_prune import ContextPruner

    def load() -> ContextPruner:
        return ContextPruner.from_pretrained(model, method=method, precision=precision)

    options: dict[str, Any] = {"threshold": threshold, "keep_ratio": keep_ratio, "top_k": top_k}
    pages = []
    with _reader(source) as lines, _writer(out) as write:
        if question is None:
            results = load().stream(_requests(lines), **options)
            # Only on a terminal: a log wants the errors and nothing else.
            for result in tqdm(results, desc="pruning", unit=" requests", disable=None):
                whole = result.to_dict()
                write(whole)
                if html:
                    pages.append(whole)
        else:
            passages = _passages(lines)  # first, so that a bad line is reported without a wait
            result = load().prune(question, passages, **options)
            for passage in result.remaining:
                given = passage.pruned
                row = {"text": given} if isinstance(given, str) else dict(given)
                spans = [[sentence.start, sentence.end] for sentence in passage.kept]
                write(row | {"relevance_score": passage.relevance, "kept_spans": spans})
            pages.append(result.to_dict())
        if html:
            from rag_prune.context.highlight import write_page

            write_page(pages, html)


@context_app.command("label")
def label(
    questions: Annotated[
        Path,
        typer.Argument(help="JSONL: {question, passage, title} or {question, passages} a line."),
    ],
    out: Annotated[Path, typer.Option(help="Training rows to write, as JSONL.")],
    llm: Annotated[
        str,
        typer.Option(help="The model that labels: the server's name for it, or a folder or hub."),
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server; without one vLLM runs in this process."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="For --endpoint.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Prompts that the server is asked at a time.")
    ] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120,
    html: Page = None,
) -> None:
    """Label passages with a language model, and check each label twice.

    The same command goes on where it was stopped, and asks nothing again: replies stay in
    OUT's .replies folder. What was dropped and a report come out beside OUT.
    """
    from pipelines.ask import AskEndpoint, AskVllm
    from pipelines.language_model import Endpoint
    from rag_prune.context.label import Ask, read_items
    from rag_prune.context.label import label as label_items

    items = read_items(questions)
    ask: Ask
    if endpoint:
        ask = AskEndpoint(Endpoint(endpoint, llm, api_key, timeout), concurrency)
    else:
        ask = AskVllm.from_pretrained(llm)
    labels = label_items(items, ask, out.with_suffix(".replies"))
    typer.echo(labels.summary(), err=True)
    labels.save(out, html)


@context_app.command("train")
def train(
    rows: Annotated[Path, typer.Argument(help="JSONL rows to learn from, see docs.")],
    base: Annotated[str, typer.Option(help="Encoder to start from: a folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.")],
    dev: Annotated[
        Path | None, typer.Option(help="JSONL rows of other titles, to calibrate on and report.")
    ] = None,
    method: Annotated[str, typer.Option(help="Default engine: provence, late or both.")] = "both",
    int8: Annotated[bool, typer.Option("--int8", help="Store matrices as rows of int8.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with fields of TrainConfig.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to take.")] = None,
    questions: Annotated[int | None, typer.Option(help="Questions a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that one pass reads.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn.")] = None,
) -> None:
    """Train a pruner on rows of question, passage and evidence.

    The same command goes on where it was stopped. Options override the recipe's fields. With --dev
    the report says how much evidence is kept, how much text dropped, and how the passages rank.
    """
    from prune_core.recipe import load_recipe
    from rag_prune.context import train as training

    config = load_recipe(recipe, training.TrainConfig) if recipe else training.TrainConfig()
    given: dict[str, Any] = {
        "steps": steps,
        "questions": questions,
        "learning_rate": learning_rate,
        "max_tokens": max_tokens,
        "save_every": save_every,
        "seed": seed,
    }
    config = replace(config, **{name: v for name, v in given.items() if v is not None})
    folder = training.train(
        config,
        rows,
        base,
        out,
        dev_file=dev,
        method=method,  # type: ignore[arg-type]  # checked there
        int8=int8,
    )
    typer.echo(folder)
    if report := training.report(out):
        typer.echo(report, err=True)


@app.command("serve-context")
def serve_context(
    model: Model = None,
    method: MethodName = None,
    precision: Precision = "float32",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PRUNEKIT_API_KEY", help="Ask clients for this bearer token."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the reading model's tokenizer, for max_tokens."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Of one request's body.")] = 4 * 2**20,
    max_passages: Annotated[int, typer.Option(help="Of one request.")] = 1000,
    max_characters: Annotated[
        int, typer.Option(help="Of one request; the question counts for each passage.")
    ] = 400_000,
    max_seconds: Annotated[float, typer.Option(help="For one request.")] = 60,
    max_requests: Annotated[int, typer.Option(help="At a time.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Characters waiting at a time.")] = 2_000_000,
) -> None:
    """Serve pruning and re-ranking over HTTP: /v1/prune, /v1/rerank, /health, /metrics."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package, extra="server", purpose="`prunekit serve-context`")
    from rag_prune import ContextPruner
    from rag_prune.integrations.documents import load_tokenizer
    from rag_prune.server.app import Limits, serve

    limits = Limits(max_bytes, max_passages, max_characters, max_seconds, max_requests, max_queue)
    serve(
        ContextPruner.from_pretrained(model, method=method, precision=precision),
        host=host,
        port=port,
        model=Path(model).name if model else "prunekit",
        limits=limits,
        api_key=api_key,
        tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
    )


@rag_app.command("ask")
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    docs: Annotated[Path, typer.Option(help="Folder of .txt, .md and .jsonl documents.")],
    k: Annotated[int, typer.Option("-k", help="Passages to retrieve.")] = 5,
    llm: Annotated[
        str | None,
        typer.Option(help="Language model: a folder or hub name; a small one by default."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Ask an OpenAI-compatible server, such as http://localhost:8000/v1"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="For --endpoint.")
    ] = None,
    model: Model = None,
    method: MethodName = None,
    threshold: Threshold = None,
    keep_ratio: KeepRatio = None,
    html: Page = None,
) -> None:
    """Answer a question from a folder of documents, and show what the answer was read from."""
    from pipelines.language_model import Endpoint, LanguageModel, LocalModel
    from pipelines.rag import answer
    from pipelines.retrieve import Retriever
    from pipelines.small_model import small_model
    from rag_prune import ContextPruner

    if endpoint and not llm:
        raise InputError("--endpoint needs --llm, the name of the model that the server serves.")
    retriever = Retriever.from_folder(docs)
    pruner = ContextPruner.from_pretrained(model, method=method)
    reader: LanguageModel
    if endpoint and llm:
        reader = Endpoint(endpoint, llm, api_key)
    else:
        reader = LocalModel.from_pretrained(llm or small_model())
    budget: dict[str, Any] = {"threshold": threshold, "keep_ratio": keep_ratio}
    result = answer(question, retriever=retriever, pruner=pruner, model=reader, k=k, **budget)
    if result.completion is None:
        typer.echo("The documents do not answer this: no sentence of the passages found was kept.")
    else:
        typer.echo(result.text)
        for passage in result.context.remaining:
            where = passage.passage["id"] if isinstance(passage.passage, Mapping) else passage.index
            for sentence in passage.kept:
                typer.echo(f"  [{where}] {' '.join(sentence.text.split())}")
        cost = result.completion
        typer.echo(
            f"{result.context.keep_ratio:.0%} of {len(result.context.passages)} passages kept; "
            f"{cost.prompt_tokens} prompt tokens, {cost.seconds:.1f} s",
            err=True,
        )
    if html:
        result.context.to_html(html)


@kv_app.command("plan")
def kv_plan(
    model: Annotated[str, typer.Option(help="A folder with config.json, or a hub name.")],
    gpu_memory: Annotated[str, typer.Option(help="Of the GPU, or for a CPU: 24GiB, 80GB, bytes.")],
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")],
    method: Annotated[
        str | None, typer.Option(help="think or mustafar; four rows of both by default.")
    ] = None,
    key_ratio: Annotated[
        float | None, typer.Option(help="Share of each key dropped, 0 to 1; 0.5 by default.")
    ] = None,
    value_ratio: Annotated[
        float | None, typer.Option(help="Share of each value dropped, 0 to 1; 0 by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    block_size: Annotated[
        int, typer.Option(help="Tokens of a page: 16 on GPUs, 128 on CPUs in vLLM.")
    ] = 16,
    recent: Annotated[int, typer.Option(help="Newest tokens that stay whole.")] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="As a JSON object; without --method a list of them.")
    ] = False,
) -> None:
    """See whether pruning the KV cache pays: what fits, and how much less a step reads."""
    from rag_prune.kv.config import KVPruneConfig
    from rag_prune.kv.plan import plan, report

    given: dict[str, Any] = {"key_ratio": key_ratio, "value_ratio": value_ratio}
    given = {name: ratio for name, ratio in given.items() if ratio is not None}
    if method is None and given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(f"--{option} needs --method: name think or mustafar.")
    rows = [
        ("think", 0.5, 0.0),
        ("think", 0.5, 0.5),
        ("mustafar", 0.5, 0.5),
        ("mustafar", 0.7, 0.7),
    ]
    configs = [
        KVPruneConfig(method=name, key_ratio=keys, value_ratio=values, recent=recent)
        for name, keys, values in rows
    ]
    if method is not None:
        configs = [KVPruneConfig(method=method, recent=recent, **given)]
    size: dict[str, Any] = {"memory": gpu_memory, "context": context, "block_size": block_size}
    plans = [plan(model, config, dtype=dtype, **size) for config in configs]
    if as_json:
        whole = [each.to_dict() for each in plans]
        typer.echo(json.dumps(whole[0] if method else whole, indent=2))
    else:
        typer.echo(report(plans))


@kv_app.command("calibrate")
def kv_calibrate(
    model: Annotated[str, typer.Argument(help="A causal language model: a folder or a hub name.")],
    texts: Annotated[
        list[Path], typer.Argument(help="Text files, UTF-8, like what will be served.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("masks.safetensors"),
    tokens: Annotated[int, typer.Option(help="Texts are cut into pieces of so many.")] = 1024,
    obs_window: Annotated[int, typer.Option(help="Newest queries of a piece that score.")] = 32,
) -> None:
    """Find the key channels that ThinK keeps under the policy `static`, for any key ratio."""
    from prune_core.storage import read_text

    contents = [read_text(path) for path in texts]
    from pipelines.language_model import LocalModel
    from rag_prune.kv.masks import calibrate_masks

    reader = LocalModel.from_pretrained(model)
    calibrate_masks(
        reader.model, reader.tokenizer, contents, out, tokens=tokens, obs_window=obs_window
    )
    typer.echo(f"Wrote {out}.")


@app.command("data")
def data(
    source: Annotated[
        Path, typer.Argument(metavar="ROWS", help="A .jsonl, .jsonl.gz, .csv or .parquet file.")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Rows that stay: a number like 500, or a share like 20%.")
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Instead: tokens that stay; with --tokenizer.")
    ] = None,
    metric: Annotated[str, typer.Option(help="A data metric from `prunekit methods`.")] = (
        "prototypes"
    ),
    setting: Setting = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The column of the prompts.")] = None,
    response: Annotated[str | None, typer.Option(help="The column of the responses.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of rows that are one text.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of the classes.")] = None,
    row_id: Annotated[str | None, typer.Option("--id", help="The column of your own ids.")] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="A sentence-transformers model, or .npy numbers (rows, width)."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Rows of what the model shall be good at (dsir, rds).")
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Whose losses are asked (ifd): a folder or a hub name.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The model before pruning (paser): a folder or a hub name.")
    ] = None,
    pruned: Annotated[
        str | None, typer.Option(help="The model after pruning (paser); with --original.")
    ] = None,
    scores: Annotated[
        str | None, typer.Option(help="The column of scores made elsewhere (imported).")
    ] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option(help="The folder of a TrainingLog; one a run, where there are several."),
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="A column of groups, for the next two options.")
    ] = None,
    min_per_group: Annotated[
        float | None, typer.Option(help="Rows that each group keeps; below 1, of the budget.")
    ] = None,
    max_per_group: Annotated[
        float | None, typer.Option(help="Rows that a group keeps at most; below 1, of the budget.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The reading model's: a folder or a hub name.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; all cores by default.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray Data instead of threads.")] = False,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost; score nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Choose the rows of a training set that are worth their place, each with a reason.

    OUT gets the rows kept, rows.parquet with every row's score and reason, and a page. The same
    command goes on where it was stopped: what models said of a text stays in the cache.
    """
    import numpy as np

    from data_prune import Budget, Local, Ray, select
    from data_prune.costs import estimate
    from data_prune.selector import metric_of_name

    if (budget is None) == (budget_tokens is None):
        raise InputError("Give a --budget (500, 20%) or --budget-tokens: one of the two.")
    if out is None and not dry_run:
        raise InputError("Name the folder to write with --out, or look first with --dry-run.")
    if (original is None) != (pruned is None):
        raise InputError("--original and --pruned go together: name both models.")
    if out is not None and out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise InputError(f"'{out}' is there already: name another folder, or pass --overwrite.")
    limits: dict[str, Any] = {"group_by": group_by}
    for name, bound in (("min_per_group", min_per_group), ("max_per_group", max_per_group)):
        if bound is not None:
            limits[name] = bound if bound < 1 else int(bound)
    whole = Budget(tokens=budget_tokens) if budget is None else Budget.of(budget)
    given: dict[str, Any] = {
        "metric": metric_of_name(metric, _settings(setting)),
        "budget": replace(whole, **limits),
        "seed": seed,
        "prompt": prompt,
        "response": response,
        "text": text,
        "label": label,
        "id": row_id,
        "embeddings": embeddings,
    }
    if embeddings and embeddings.endswith(".npy"):
        try:
            given["embeddings"] = np.load(embeddings, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"Cannot read the array '{embeddings}': {error}.") from error
    if dry_run:
        typer.echo(estimate(source, **given))
        return
    if tokenizer:
        from rag_prune.integrations.documents import load_tokenizer

        given["tokenizer"] = load_tokenizer(tokenizer)
    if language_model:
        from data_prune.causal import Losses
        from pipelines.language_model import LocalModel

        loaded = LocalModel.from_pretrained(language_model)
        given["losses"] = Losses(loaded.model, loaded.tokenizer)
    if original and pruned:
        from data_prune.divergence import ResponseDivergence
        from pipelines.language_model import LocalModel

        before, after = (LocalModel.from_pretrained(name) for name in (original, pruned))
        given["degradation"] = ResponseDivergence(before.model, after.model, before.tokenizer)
    if log:
        from data_prune.training_log import TrainingLog, runs

        given["log"] = runs([TrainingLog.load(folder) for folder in log])
    if workers is not None or ray:
        chosen = Ray if ray else Local
        given["engine"] = chosen() if workers is None else chosen(workers)
    with _notes_as_lines():
        selection = select(source, target=target, scores=scores, **given)
    assert out is not None
    selection.save(out, overwrite)
    typer.echo(selection)


@contextmanager
def _notes_as_lines() -> Iterator[None]:
    """Warnings as one line each on standard error, without the place in the code."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: typer.echo(f"note: {message}", err=True)
        yield


@app.command("model")
def model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder of transformers', a hub name, or any network's .onnx."
        ),
    ],
    method: Annotated[
        str | None, typer.Option(help="A weight-pruning method from `prunekit methods`.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of single weights that become zero, 0 to 1.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M: of every M weights in a row N stay, such as 2:4.")
    ] = None,
    remove: Annotated[
        float | None, typer.Option(help="Share of the layers' weights that is cut out, 0 to 1.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Prune only these, such as 'mlp.*'; may be repeated.")
    ] = None,
    setting: Setting = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text, UTF-8, plain or .gz; may be repeated. Of .onnx: .npz or .npy."),
    ] = None,
    windows: Windows = None,
    tokens: Tokens = None,
    seed: Seed = 0,
    plan: Annotated[
        Path | None, typer.Option(help="A saved plan to follow, in place of a method.")
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="Keep the plan: JSON, and a folder of tensors beside it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go; write no model.")
    ] = False,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure perplexity on, before and after; may be repeated."),
    ] = None,
    html: Page = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    device: Device = None,
) -> None:
    """Prune a model's weights, units or layers into a folder that transformers and vLLM load.

    The same command goes on where it was stopped: what was found of each layer stays in OUT.work
    until the model is written. An .onnx file becomes a smaller one, by spa or obspa.
    """
    from model_prune import Plan, load_method
    from model_prune.prune import describe, plan_model, prune_model, work_of, write_pruned
    from prune_core.storage import read_text

    if (method is None) == (plan is None):
        raise InputError("Name a --method to plan by, or a --plan to follow: one of the two.")
    if out is None and not dry_run:
        raise InputError("Name the folder to write with --out, or look first with --dry-run.")
    given: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "remove": remove}
    given |= {"targets": target or None}
    given = {name: value for name, value in given.items() if value is not None}
    given |= _settings(setting)
    if source.endswith(".onnx"):
        wrong: dict[str, Any] = {"windows": windows, "tokens": tokens, "plan": plan}
        wrong |= {"save-plan": save_plan, "evaluate": evaluate, "device": device}
        for name, value in wrong.items():
            if value is not None:
                raise InputError(f"An ONNX file takes no --{name}.")
        written = None if dry_run else out
        settings = {"method": method, "overwrite": overwrite, "seed": seed, **given}
        _prune_onnx_file(source, written, calibration or [], html, settings)
        return
    read: dict[str, Any] = {"windows": windows, "tokens": tokens, "seed": seed, "device": device}
    writing: dict[str, Any] = {
        "texts": {path.name: read_text(path) for path in evaluate or ()},
        "overwrite": overwrite,
    }
    if method is not None and out is not None and not dry_run:
        report = prune_model(
            source,
            method=load_method(method, **given),
            out=out,
            calibration=calibration,
            save_plan=save_plan,
            **read,
            **writing,
        )
    else:
        if method is not None:
            kept = work_of(out) if out else None  # so that the run without --dry-run goes on there
            chosen = load_method(method, **given)
            made = plan_model(source, chosen, calibration, work=kept, **read)
        else:
            made = Plan.load(str(plan))
        if save_plan is not None:
            made.save(save_plan)
        if dry_run or out is None:
            report = describe(source, made)
        else:
            report = write_pruned(source, out, made, **writing)
    typer.echo(report)
    if html:
        report.to_html(html)


def _settings(given: list[str] | None) -> dict[str, Any]:
    """What --set says, each value read as YAML."""
    import yaml

    settings = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set takes NAME=VALUE, got '{text}'.")
        settings[name] = yaml.safe_load(value)
    return settings


def _prune_onnx_file(
    source: str,
    out: Path | None,
    calibration: list[Path],
    html: Path | None,
    settings: dict[str, Any],
) -> None:
    from model_prune.prune_onnx import prune_onnx

    if len(calibration) > 1:
        raise InputError("An ONNX file takes one file of --calibration, .npz or .npy.")
    report = prune_onnx(source, out, data=calibration[0] if calibration else None, **settings)
    typer.echo(report)
    if html:
        report.to_html(html)


@app.command()
def experts(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A mixture: a folder, or a hub name.")
    ],
    library: Annotated[Path, typer.Argument(help="The folder of patterns, made if need be.")],
    task: Annotated[
        str | None, typer.Option(help="A task: to remember, with --calibration, or to plan for.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="A text, to find the task that it is nearest to.")
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text of the task, plain or .gz; may be repeated.")
    ] = None,
    windows: Windows = None,
    tokens: Tokens = None,
    seed: Seed = 0,
    keep: Annotated[
        int | None, typer.Option(help="Experts that stay in every layer; half of them.")
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="Where to keep the plan, for `model --plan`.")
    ] = None,
    device: Device = None,
) -> None:
    """Remember which experts a task uses, and plan to keep those of a task or of a query's."""
    from transformers import AutoTokenizer

    from model_prune import Calibration, load_method
    from model_prune.patterns import Patterns
    from model_prune.prune import local_folder

    if (task is None) == (query is None):
        raise InputError("Name a --task, or give a --query to find it by: one of the two.")
    if task is None and calibration:
        raise InputError("--calibration is the text of a task: name the task with --task.")
    patterns, folder = Patterns(library), local_folder(source)
    method: Any = load_method("premoe", keep=keep)
    if query is not None or calibration:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if query is not None:
        ids = tokenizer(query, return_tensors="pt", add_special_tokens=False)["input_ids"]
        found = patterns.nearest(folder, ids[0], device=device)
        for one in found:
            typer.echo(f"{one.task}: distance {one.distance:.3f}")
        task = found[0].task
    elif calibration:
        read = Calibration.read(
            calibration,
            tokenizer,
            windows=windows or method.windows,
            tokens=tokens or method.tokens,
            seed=seed,
        )
        patterns.add(str(task), folder, read, method, device=device)
    if save_plan is not None:
        patterns.plan(str(task), folder, method, device=device).save(save_plan)


@app.command("model-eval")
def model_eval(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a hub name.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, UTF-8, plain or .gz; may be repeated."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, to say how many times its perplexity.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Windows of each text; all of them.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of the lm-evaluation-harness (.[eval]); may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON object.")] = False,
) -> None:
    """Measure a model, pruned or not: perplexity and bits a byte of texts, scores of tasks."""
    from model_prune.evaluate import compare, evaluate_folder, lm_eval_tasks
    from prune_core.storage import read_text

    if not text and not task:
        raise InputError("Name what to measure on: --text FILE, or --task NAME.")
    texts = {path.name: read_text(path) for path in text or ()}
    sizes: dict[str, Any] = {"tokens": tokens, "max_windows": windows, "device": device}
    found = evaluate_folder(folder, texts, **sizes) if texts else {}
    other = evaluate_folder(against, texts, **sizes) if against and texts else {}
    scores = lm_eval_tasks(folder, task, device=device) if task else {}
    if as_json:
        whole = {"perplexity": {name: one.to_dict() for name, one in found.items()}}
        typer.echo(json.dumps(whole | {"tasks": scores}, indent=2, default=str))
        return
    for name, one in found.items():
        count = len(one.window_nll)
        typer.echo(
            f"{name}: perplexity {one.value:.2f}, {one.bits_per_byte:.3f} bits a byte "
            f"({count} windows of {tokens} tokens, {one.protocol.dtype})"
        )
        if name in other:
            typer.echo(f"  {compare(other[name], one)}, against {against}")
    for name, score in scores.items():
        typer.echo(f"{name}: {score}")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """List every method, its paper, what it needs and what it costs."""
    import data_prune
    import model_prune
    import rag_prune

    packages = (rag_prune, data_prune, model_prune)
    rows = [method.to_dict() for package in packages for method in package.METHODS]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        arxiv = f" (arXiv {row['arxiv']})" if row["arxiv"] else ""
        typer.echo(f"{row['name']:{width}}  {row['paper']}{arxiv}")
        typer.echo(f"{'':{width}}  needs {row['needs']}; costs {row['cost']}")


@app.command()
def demo(
    questions: Annotated[
        int | None, typer.Option(help="How many questions; all by default.")
    ] = None,
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    results: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Prune real passages for real questions, answer them, and write a page to look at."""
    from pipelines.demo.run import run

    run(html, questions=questions, results=results, say=typer.echo)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character shows its number
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        raise SystemExit(app(prog_name="prunekit", standalone_mode=False))
    except typer.TyperException as error:  # an unknown option, a number that is none, no command
        said = error.format_message()
    except PruneError as error:
        said = str(error)
    except OSError as error:
        said = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if said:  # without a command the help was shown, and nothing is left to say
        typer.echo(f"prunekit: {' '.join(said.split())}", err=True)
    raise SystemExit(2)


@contextmanager
def _reader(source: Path | None) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        try:
            lines = stack.enter_context(source.open("rb")) if source else sys.stdin.buffer
        except OSError as error:
            raise InputError(
                f"Cannot read '{source}' ({error.strerror}): name a JSONL file, or leave it out to "
                "read standard input."
            ) from None
        yield lines


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes one JSON line; a file appears only when everything was written."""
    from prune_core.storage import atomic_write, json_line

    with ExitStack() as stack:
        try:
            file = stack.enter_context(atomic_write(out, "wb")) if out else sys.stdout.buffer
        except OSError as error:
            raise InputError(
                f"Cannot write '{out}' ({error.strerror}): name a file in a folder that can be "
                "written."
            ) from None

        def write(row: Mapping[str, Any]) -> None:
            file.write(json_line(row))

        yield write
        file.flush()


def _json_lines(lines: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
                raise InputError(
                    f"Line {number} is not JSON ({error}). Give one JSON string or object a line."
                ) from None


def _passages(lines: IO[bytes]) -> list[Any]:
    passages = [value for _, value in _json_lines(lines)]
    if not passages:
        raise InputError("There are no passages: give one JSON string or object a line.")
    return passages


def _requests(lines: IO[bytes]) -> Iterator[tuple[str, list[Any]]]:
    number = 0
    for number, row in _json_lines(lines):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("question"), str)
            or not isinstance(row.get("passages"), list)
        ):
            raise InputError(
                f"Line {number} must be an object with 'question', a string, and 'passages', a "
                "list; to prune bare passages, name the question with --question."
            )
        yield row["question"], row["passages"]
    if not number:
        raise InputError("There are no requests: give one {question, passages} object a line.")


if __name__ == "__main__":
    main()
