"""Self-data distillation: the model before pruning rewrites the targets that will retrain it.

Fine-tuning a pruned model on answers that others wrote moves it away from what it was. So the
original model is shown each prompt with its answer and writes the answer in its own words; a
rewrite that keeps what the answer says becomes the target, and where none does the answer stays.

Papers: Thangarasa et al., "Self-data distillation for recovering quality in pruned large language
    models" (MLSys 2025, arXiv:2410.09982); the request and the rule "a rewrite that passes, or
    else the original" are those of Yang et al., "Self-distillation bridges distribution gap in
    language model fine-tuning" (ACL 2024, arXiv:2402.13669) and its code (sail-sg/sdft).
Differs from the code: rewrites are joined to rows by what was asked, not by their place in a file;
    the request is one user's message of our own wording, for models that know no system's; a
    reply that was cut off is no rewrite; decoding is greedy unless a temperature is set; several
    rewrites may be tried; what is checked follows from each row (`data_prune.rewrite_checks`).
Cost: one generation a row and attempt, which reads the row and writes about as much as its answer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeGuard, TypeVar

from data_prune.rewrite_checks import BOUNDS, CHECKS, SAFE, Check, judge, length
from prune_core.errors import InputError, did_you_mean, unknown_name
from prune_core.provenance import provenance
from prune_core.storage import Shards, StrPath, write_json, write_jsonl

KEEP_EVERY = 32  # replies that a killed run may have to ask for again; a stopped one loses none

TEMPLATE = """\
{prompt}

Here is a reference answer to the above:

{reference}

Answer the above yourself, the way you would write it. Take the facts and the result from the \
reference answer, and give the result in the same form. Write nothing but your answer."""

Rows = TypeVar("Rows")  # a list of dicts, or a Dataset of Hugging Face: what goes in comes out


@dataclass(frozen=True)
class Request:
    """Messages to be answered, each with a `role` and its `content`, and how the reply is drawn.

    The seed is the request's own, so that a reply depends on no other request. At temperature 0
    the likeliest token is taken every time.
    """

    messages: tuple[dict[str, str], ...]
    max_new_tokens: int
    temperature: float
    seed: int


class Reply(Protocol):
    """What the model wrote, in how many tokens; `refused` when it could not: `text` says why."""

    @property
    def text(self) -> str: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def refused(self) -> bool: ...


class Ask(Protocol):
    """A language model. `name` stands for it and for all that its replies depend on."""

    @property
    def name(self) -> str: ...

    def __call__(self, requests: Sequence[Request], /) -> Iterable[tuple[int, Reply]]:
        """Give (index of the request, its reply), each request once, in any order, as they come."""
        ...


@dataclass(frozen=True)
class Rewrite:
    """What became of a row.

    id: 32 hexadecimal digits of prompt and reference; exact copies share it, and the rewrite.
    reference: the row's own answer; None where it has none.
    rewrite: what the model wrote, also where it is not accepted; None where it wrote nothing.
    attempts: how many rewrites were tried.
    passed: of the checks that apply to the row, by name, whether the rewrite passes.
    reason: why it is accepted or not, in a sentence.
    """

    id: str
    prompt: str | None
    reference: str | None
    rewrite: str | None
    attempts: int
    accepted: bool
    passed: dict[str, bool]
    reason: str

    @property
    def target(self) -> str | None:
        """The text to train on."""
        return self.rewrite if self.accepted else self.reference


@dataclass(frozen=True, kw_only=True)
class SelfDistill:
    """Replace each answer by the model's own rewrite of it, where that keeps what it says.

    template: the request, with `{prompt}` and `{reference}` in it.
    checks: names of `rewrite_checks.CHECKS`; each applies to the rows whose reference holds what
        it compares. All but "code_runs", which runs code that a model wrote as your user.
    length_ratio: least and most characters of a rewrite for one of the reference.
    max_new_tokens: of a rewrite; one that reaches it counts as cut off.
    temperature, seed: of drawing; each row and attempt has a seed of its own.
    attempts: rewrites of a row at most; more than one needs a temperature.
    choose: "first" asks again only where no rewrite has passed yet, and takes the first that
        does; "shortest" makes all attempts and takes the shortest that passes.

    Raises InputError for a setting outside its range.
    """

    template: str = TEMPLATE
    checks: tuple[str, ...] = SAFE
    length_ratio: tuple[float, float] = BOUNDS
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    attempts: int = 1
    choose: Literal["first", "shortest"] = "first"

    def __post_init__(self) -> None:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(self.template)} - {None}
        except ValueError as error:
            raise InputError(
                f"template is not one ({error}): write {{{{ and }}}} for braces of its own."
            ) from error
        if named != {"prompt", "reference"}:
            raise InputError(
                "template must hold {prompt} and {reference} and no other name, got "
                f"{sorted(map(str, named))}: write {{{{ and }}}} for braces of its own."
            )
        for name in self.checks:
            if name not in CHECKS:
                raise unknown_name("check", name, CHECKS)
        if "code_runs" in self.checks and sys.platform == "win32":
            raise InputError("The check 'code_runs' needs a POSIX system: leave it out.")
        low, high = self.length_ratio
        if not 0 <= low < high:
            raise InputError(
                f"length_ratio must be two numbers, 0 <= least < most, got {self.length_ratio}: "
                "try (0.2, 5)."
            )
        if self.max_new_tokens < 1 or self.attempts < 1:
            raise InputError(
                "max_new_tokens and attempts must be at least 1, got "
                f"{self.max_new_tokens} and {self.attempts}."
            )
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.attempts > 1 and self.temperature == 0:
            raise InputError(
                f"{self.attempts} attempts at temperature 0 would all be the same: set a "
                "temperature, such as 0.7, or make one attempt."
            )
        if self.choose not in ("first", "shortest"):
            raise InputError(f"choose must be 'first' or 'shortest', got {self.choose!r}.")

    def run(
        self,
        rows: Rows,
        ask: Ask,
        folder: StrPath | None = None,
        *,
        prompt_field: str = "prompt",
        response_field: str = "response",
    ) -> SelfDistilled[Rows]:
        """Ask `ask`, the model before pruning, for rewrites of the rows' answers and check them.

        Args:
            rows: A list of dicts or a Hugging Face Dataset. A row without a prompt or an answer
                (None, or nothing but spaces) stays as it is.
            ask: See `pipelines.ask` for models of transformers, vLLM and servers.
            folder: Keeps the replies. The same call goes on where it was stopped, and asks only
                for rows that are new; other checks ask for nothing.
            prompt_field, response_field: The fields of a row that hold text.

        Raises:
            InputError: A field is missing or holds something else than text, the folder is of
                other work, or the model refused every request or did not answer each once.
        """
        table = _read(rows, prompt_field, response_field)
        ids = [_id(*pair) for pair in table]
        pairs = {i: pair for i, pair in zip(ids, table, strict=True) if _both(pair)}
        replies = _Replies(ask, folder, self._fingerprint(ask))
        tried: dict[str, list[Rewrite]] = defaultdict(list)
        for attempt in range(self.attempts):
            wanted = [i for i in pairs if self._ask_again(tried[i])]
            requests = {(i, attempt): self._request(i, attempt, *pairs[i]) for i in wanted}
            for (i, _), reply in replies.get(requests).items():
                tried[i].append(self._look(i, *pairs[i], reply))
        firsts = [found[0] for found in tried.values()]
        if firsts and all(first.rewrite is None for first in firsts):
            raise InputError(
                f"'{ask.name}' refused all {len(firsts)} requests. Of the first it said: "
                f"{firsts[0].reason}"
            )
        chosen = {i: self._chosen(found) for i, found in tried.items()}
        rewrites = [chosen.get(i) or _unasked(i, *pair) for i, pair in zip(ids, table, strict=True)]
        return SelfDistilled(rows, tuple(rewrites), self, ask.name, response_field)

    def _fingerprint(self, ask: Ask) -> dict[str, Any]:
        """What a reply to (row, attempt) depends on; the checks and their choice come after it."""
        names = ("template", "max_new_tokens", "temperature", "seed")
        return {"model": ask.name} | {name: getattr(self, name) for name in names}

    def _request(self, i: str, attempt: int, prompt: str, reference: str) -> Request:
        text = _readable(self.template.format(prompt=prompt, reference=reference))
        drawn = hashlib.blake2b(f"{self.seed} {attempt} {i}".encode(), digest_size=4).digest()
        seed = int.from_bytes(drawn) >> 1  # 31 bits: every server and library takes those
        messages = ({"role": "user", "content": text},)
        return Request(messages, self.max_new_tokens, self.temperature, seed)

    def _ask_again(self, tried: Sequence[Rewrite]) -> bool:
        if any(found.rewrite is None for found in tried):
            return False  # refused: it would be again
        return self.choose == "shortest" or not any(found.accepted for found in tried)

    def _look(self, i: str, prompt: str, reference: str, reply: _Kept) -> Rewrite:
        row = (i, prompt, reference)
        if reply.refused:
            return Rewrite(*row, None, 1, False, {}, f"The model did not read it: {reply.text}")
        if reply.new_tokens >= self.max_new_tokens:
            reason = f"It was cut off after {self.max_new_tokens} tokens."
            return Rewrite(*row, reply.text, 1, False, {"complete": False}, reason)
        bounded: Mapping[str, Check] = {"length": partial(length, bounds=self.length_ratio)}
        checks = {name: bounded.get(name, CHECKS[name]) for name in self.checks}
        found = judge(reference, reply.text, checks)
        passed = {"complete": True} | found.passed
        return Rewrite(*row, reply.text, 1, found.accepted, passed, found.reason)

    def _chosen(self, tried: Sequence[Rewrite]) -> Rewrite:
        """The first of those that pass, or the shortest of them; or else the first of all."""
        passing = [found for found in tried if found.accepted] or tried[:1]
        if self.choose == "shortest":
            passing = sorted(passing, key=lambda found: len(found.rewrite or ""))
        return replace(passing[0], attempts=len(tried))


@dataclass(frozen=True, eq=False)
class SelfDistilled(Generic[Rows]):
    """Every row's rewrite and what became of it, in the order of the rows."""

    rows: Rows
    rewrites: tuple[Rewrite, ...]
    settings: SelfDistill
    model: str
    response_field: str

    def dataset(self) -> Rows:
        """The rows as they came, a list or a Dataset, with the targets in the response field."""
        targets = [found.target for found in self.rewrites]
        rows: Any = self.rows
        if isinstance(rows, list):
            pairs = zip(rows, targets, strict=True)
            return [{**row, self.response_field: target} for row, target in pairs]  # type: ignore[return-value]
        names, field = rows.column_names, self.response_field
        feature = rows.features[field]
        replaced = rows.remove_columns(field).add_column(field, targets, feature=feature)
        whole: Rows = replaced.select_columns(names)
        return whole

    @property
    def acceptance(self) -> float:
        """The share of all rows whose rewrite is accepted, in [0, 1]."""
        return _share(self.rewrites)

    def acceptance_by(self, field: str) -> dict[str, float]:
        """The same for each value of another field of the rows, as text; see `acceptance`."""
        groups: dict[str, list[Rewrite]] = defaultdict(list)
        for value, found in zip(_column(self.rows, field), self.rewrites, strict=True):
            groups[str(value)].append(found)
        return {value: _share(groups[value]) for value in sorted(groups)}

    def report(self) -> dict[str, Any]:
        """Counts of rows: accepted, and of those that each check applied to how many passed."""
        checks: dict[str, Counter[str]] = defaultdict(Counter)
        for found in self.rewrites:
            for name, passed in found.passed.items():
                checks[name].update(passed=int(passed), of=1)
        return {
            "model": self.model,
            "rows": len(self.rewrites),
            "accepted": sum(found.accepted for found in self.rewrites),
            "without_rewrite": sum(found.rewrite is None for found in self.rewrites),
            "checks": {name: dict(counts) for name, counts in checks.items()},
        }

    def summary(self) -> str:
        """The report in two lines."""
        report = self.report()
        passed = ", ".join(
            f"{name} {counts['passed']} of {counts['of']}"
            for name, counts in report["checks"].items()
        )
        share = f"{self.acceptance:.1%}"
        return (
            f"{report['accepted']} of {report['rows']} answers rewritten ({share}), "
            f"{report['without_rewrite']} without a rewrite\npassed: {passed or 'nothing to check'}"
        )

    def save(self, out: StrPath) -> None:
        """Write `dataset()` to `out` as JSONL, and beside it what became of each row and a report.

        For rows.jsonl that is rows.rewrites.jsonl and rows.report.json. Raises TypeError for rows
        that JSON cannot hold.
        """
        out = Path(out)
        audit = ({**asdict(found), "target": found.target} for found in self.rewrites)
        write_jsonl(out.with_suffix(".rewrites.jsonl"), audit)
        report = provenance(
            self.settings.seed, report=self.report(), settings=asdict(self.settings)
        )
        write_json(out.with_suffix(".report.json"), report)
        rows: Any = self.dataset()
        write_jsonl(out, rows)


# ------------------------------------------------------------------------------------ rows in, out


_Pair = tuple[str | None, str | None]


def _read(rows: Any, prompt_field: str, response_field: str) -> list[_Pair]:
    """(prompt, reference) of each row."""
    is_dataset = isinstance(rows, getattr(sys.modules.get("datasets"), "Dataset", ()))
    if not isinstance(rows, list) and not is_dataset:
        raise InputError(
            f"rows must be a list of dicts or a Dataset of Hugging Face, got "
            f"{type(rows).__name__}: of a DatasetDict take one split, of a DataFrame "
            "df.to_dict('records')."
        )
    if not len(rows):
        raise InputError("There are no rows: give at least one.")
    texts = []
    for field in (prompt_field, response_field):
        texts.append(column := list(_column(rows, field)))
        for i, text in enumerate(column):
            if not isinstance(text, str | None):
                raise InputError(
                    f"Row {i}: '{field}' must be text, got {type(text).__name__}: of messages "
                    "take the last one's content for the answer, and the others for the prompt."
                )
    return list(zip(texts[0], texts[1], strict=True))


def _column(rows: Any, field: str) -> Iterator[Any]:
    if not isinstance(rows, list):
        if field not in rows.column_names:
            raise InputError(
                f"There is no column '{field}'. {did_you_mean(field, rows.column_names)}"
            )
        yield from rows[field]
        return
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or field not in row:
            known = did_you_mean(field, map(str, row)) if isinstance(row, Mapping) else ""
            raise InputError(f"Row {i} must be a dict with the field '{field}'. {known}".strip())
        yield row[field]


def _id(prompt: str | None, reference: str | None) -> str:
    return hashlib.blake2b(json.dumps([prompt, reference]).encode(), digest_size=16).hexdigest()


def _readable(text: str) -> str:
    """Without lone surrogates, which JSON may spell and which are no characters."""
    return text.encode("utf-8", "replace").decode()


def _both(pair: _Pair) -> TypeGuard[tuple[str, str]]:
    return all(text and text.strip() for text in pair)


def _unasked(i: str, prompt: str | None, reference: str | None) -> Rewrite:
    lacking = "answer" if prompt and prompt.strip() else "prompt"
    reason = f"The row has no {lacking}: there is nothing to rewrite."
    return Rewrite(i, prompt, reference, None, 0, False, {}, reason)


def _share(found: Sequence[Rewrite]) -> float:
    return sum(rewrite.accepted for rewrite in found) / len(found)


# ----------------------------------------------------------------------------------------- replies

_Key = tuple[str, int]  # a row's id, and the attempt


@dataclass(frozen=True)
class _Kept:
    """A reply as it is kept; one that was refused is not, as another setting may help."""

    text: str
    new_tokens: int
    refused: bool = False


class _Replies:
    """The model's replies by row and attempt: those that earlier runs left, and new ones."""

    def __init__(self, ask: Ask, folder: StrPath | None, fingerprint: Mapping[str, Any]) -> None:
        self.ask = ask
        self.shards = None if folder is None else Shards(folder, fingerprint)
        kept = () if self.shards is None else self.shards.rows()
        self.kept = {
            (row["id"], row["attempt"]): _Kept(row["text"], row["new_tokens"]) for row in kept
        }
        self.numbers = itertools.count()

    def get(self, requests: Mapping[_Key, Request]) -> dict[_Key, _Kept]:
        """The replies to requests, in their order; the model gets only those that are not kept."""
        from tqdm.auto import tqdm

        new = [key for key in requests if key not in self.kept]
        answered: dict[int, _Kept] = {}
        unsaved: list[dict[str, Any]] = []
        bar = tqdm(total=len(new), desc="rewriting", unit=" rows", disable=None)
        try:
            for i, reply in self.ask([requests[key] for key in new]) if new else ():
                if i in answered or not 0 <= i < len(new):
                    raise self._wrong(f"gave a reply number {i} twice or unasked", len(new))
                text = _readable(reply.text).strip()
                answered[i] = _Kept(text, reply.new_tokens, reply.refused)
                bar.update()
                if reply.refused:
                    continue
                self.kept[new[i]] = answered[i]
                id_, attempt = new[i]
                unsaved.append({"id": id_, "attempt": attempt, **asdict(answered[i])})
                if len(unsaved) == KEEP_EVERY:
                    self._save(unsaved)
        finally:
            bar.close()
            self._save(unsaved)
        if len(answered) < len(new):
            raise self._wrong(f"gave {len(answered)} replies", len(new))
        refused = {new[i]: reply for i, reply in answered.items() if reply.refused}
        return {key: refused.get(key) or self.kept[key] for key in requests}

    def _wrong(self, did: str, asked: int) -> InputError:
        return InputError(
            f"'{self.ask.name}' {did}, and must answer each of {asked} requests once: yield "
            "(index, reply) for each."
        )

    def _save(self, rows: list[dict[str, Any]]) -> None:
        if rows and self.shards is not None:
            self.shards.write(next(i for i in self.numbers if i not in self.shards), rows)
        rows.clear()
