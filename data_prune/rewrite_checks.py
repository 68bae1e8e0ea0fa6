"""What a rewritten answer must keep of the reference it was made from; each check is a function.

A check reads the reference and the rewrite, and returns None where the reference holds nothing
that it compares, "" where the rewrite passes, and a sentence that says why where it fails.

Source: Yang et al., "Self-distillation bridges distribution gap in language model fine-tuning"
(ACL 2024, arXiv:2402.13669) and its code (sail-sg/sdft), which refuses a list of phrases, compares
the last whole number where the data set's name says mathematics, and accepts all other rewrites.
Differs from the code: what is compared follows from each row's reference and not from the name of
its data set; numbers are exact, and of the reference only one that is given as its result counts;
short answers, choices, refusals, lengths and Python code are compared as well. A check that is
unsure fails: the price is a target that stays as it was.
Cost: none in model calls; `code_runs` starts two processes a row.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

Verdict = str | None
Check = Callable[[str, str], Verdict]


@dataclass(frozen=True)
class Judgement:
    """passed: of the checks that apply, by name, whether the rewrite passes.

    reason: the first failing check's sentence, or one that says what was passed.
    """

    passed: dict[str, bool]
    reason: str

    @property
    def accepted(self) -> bool:
        """Whether it passes all that apply."""
        return all(self.passed.values())


def judge(reference: str, rewrite: str, checks: Mapping[str, Check]) -> Judgement:
    """Put a rewrite to every check, in their order; an empty one passes none."""
    if not rewrite.strip():
        return Judgement({"not_empty": False}, "The rewrite is empty.")
    verdicts = {name: check(reference, rewrite) for name, check in checks.items()}
    passed = {name: not verdict for name, verdict in verdicts.items() if verdict is not None}
    passed = {"not_empty": True} | passed
    problems = [verdict for verdict in verdicts.values() if verdict]
    return Judgement(passed, problems[0] if problems else f"It passes {', '.join(passed)}.")


# ------------------------------------------------------------------------------- leaks and refusals

# Of a model that speaks of the request instead of answering it; the first five are SDFT's.
LEAKS = (
    "reference answer",
    "your response",
    "my response",
    "your own response",
    "now it's your turn",
    "reference solution",
    "given reference",
    "provided reference",
    "own words",
)
_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am)(?: really| very| so)? sorry(?! to hear| for)"
    r"|sorry, (?:but )?i\b|i apologi[sz]e"
    r"|i(?: can ?not| can't| won't| will not|(?:'m| am) (?:unable|not able) to) (?:help|assist"
    r"|answer|provide|give|offer|fulfil|comply|create|write|generate|share|support|do)\b"
    r"|i (?:do not|don't) have (?:access|the ability|personal|real-time|enough information)"
    r"|(?:as|i'm|i am)(?: just| only)? an? (?:ai|(?:large )?language model|assistant)\b)"
)


def leakage(reference: str, rewrite: str) -> Verdict:
    """It does not speak of the request for a rewrite, unless the reference has the same words."""
    known, said = _folded(reference), _folded(rewrite)
    for phrase in LEAKS:
        if phrase in said and phrase not in known:
            return f"It says '{phrase}', which belongs to the request and not to an answer."
    if said.lstrip().startswith("your turn"):
        return "It begins with 'your turn', which belongs to the request and not to an answer."
    return ""


def refusal(reference: str, rewrite: str) -> Verdict:
    """It declines to answer if and only if the reference does."""
    declined, declines = (bool(_REFUSAL.match(_folded(text))) for text in (reference, rewrite))
    if declines and not declined:
        return "It declines to answer, and the reference does not."
    if declined and not declines:
        return "It answers what the reference declines to answer."
    return ""


def _folded(text: str) -> str:
    return text.casefold().replace("’", "'")


# ------------------------------------------------------------------------------------------ numbers

LONGEST_NUMBER = 100  # characters; a model that rambles in digits states no result

# Thousands stand apart by a comma or a narrow space; two digits between commas are India's way.
_MAGNITUDE = (
    r"(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)"
    r"|(?P<digits>\d{1,3}(?:[,\u00a0\u2009\u202f]\d{2,3})*[,\u00a0\u2009\u202f]\d{3}(?!\d)(?:\.\d+)?"
    r"|\d*\.?\d+)(?P<exponent>[eE][+-]?\d{1,3}(?!\d))?"
)
# A minus right before a number is its sign, and after a number or a bracket it takes away. The
# first part of a time, a date, a range or a version is no number.
_CURRENCY = r"[$€£¥₹]\s?"
_NUMBER = re.compile(
    rf"(?<![\w./])(?P<sign>{_CURRENCY}-|(?:(?<![)\]])[+-])?(?:{_CURRENCY})?)(?:{_MAGNITUDE})"
    r"(?![.:/-]?\d|[eE][+-]?\d)",
    re.ASCII,
)
_UNIT = re.compile(r"(?:\s?°?[^\W\d_]+(?:[ /-][^\W\d_]+)?(?:\^?[23])?)?\W*")
_ANYTHING = re.compile(r".*", re.DOTALL)
_MARK = re.compile(
    r"####[ \t]*(?P<hash>[^\n#]+)"
    r"|\\f?boxed\{(?P<box>[^{}]*)\}"
    r"|(?i:\banswer\**(?:\s+is|\s+was|\s*[:=]))(?=\s*(?P<said>[^\n]*))"
)
_BARE = re.compile(r"[^\w-]*")  # a minus that stands apart may be a sign or a bullet: not read
_HEDGED = re.compile(r"[^\w-]*(?:(?i:about|approximately|exactly|roughly|equal to)[^\w-]+)?")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_LATEX = (
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),  # one and a half
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,; ](?=\d{3})"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:left|right|[,;:! ()\[\]])"), " "),
    (re.compile("−"), "-"),
)


def stated_number(text: str) -> Fraction | None:
    """The number that a text gives as its result, exactly; units and currencies are left out.

    The whole text is one ("$1,200", "72 clips", "3/4"), or the last of these marks holds one:
    "#### 72" (GSM8K), "\\boxed{72}", "the answer is 72". Of an equation it is what follows the
    last "=". None for a text that merely mentions numbers.
    """
    text = _plain(text)
    found = _read(text, _BARE, _UNIT)
    for mark in reversed(list(_MARK.finditer(text))):
        if found is not None:
            break
        if mark["said"] is None:
            found = _read((mark["hash"] or mark["box"]).rpartition("=")[2], _BARE, _UNIT)
        else:
            sentence = _SENTENCE_END.split(mark["said"], maxsplit=1)[0]
            found = _read(sentence.rpartition("=")[2], _HEDGED, _ANYTHING)
    return found


def final_number(text: str) -> Fraction | None:
    """The number a text states as its result, or else the last one in it; None without any."""
    stated = stated_number(text)
    if stated is not None:
        return stated
    values = [_value(match) for match in _NUMBER.finditer(_plain(text))]
    return next((value for value in reversed(values) if value is not None), None)


def number(reference: str, rewrite: str) -> Verdict:
    """Where the reference states a number as its result, the rewrite's final number is the same."""
    wanted = stated_number(reference)
    if wanted is None:
        return None
    found = final_number(rewrite)
    if found is None:
        return f"The reference's result is {wanted}, and the rewrite holds no number."
    return "" if found == wanted else f"Its final number is {found}, and the reference's {wanted}."


def _plain(text: str) -> str:
    """Digits and signs of all scripts and of LaTeX in their plain form."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in text)


def _read(text: str, before: re.Pattern[str], after: re.Pattern[str]) -> Fraction | None:
    """The first number of a text, if what stands before and after it is what may stand there."""
    match = _NUMBER.search(text)
    if match is None or not before.fullmatch(text, 0, match.start()):
        return None
    return _value(match) if after.fullmatch(text, match.end()) else None


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    try:
        if match["bottom"]:
            value = Fraction(int(match["top"]), int(match["bottom"]))
            if match["whole"] and value < 1:
                value += int(match["whole"])
        else:
            digits = re.sub(r"[,\u00a0\u2009\u202f]", "", match["digits"])
            value = Fraction(digits + (match["exponent"] or ""))
    except ZeroDivisionError:
        return None
    return -value if "-" in match["sign"] else value


# ------------------------------------------------------------------------------------ short answers

SHORT = 5  # words, without articles: an answer this short must stand in the rewrite as it is
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_POLAR = re.compile(r"\W*(?i:yes|no|true|false)\b\s*(?:[^\w\s]|$)")
_CHOICE_ALONE = re.compile(r"\W{0,3}([A-H])(?:\W{0,3}|[).:][ \t]+\S[^\n]*)")
_CHOICE_SAID = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+is|\s*[:=])?)(?:\s+option)?\W{0,4}([A-H])"
    r"(?=\W*$|[^\w\s]|\s+(?:is|because|since|as|and)\b)",
    re.MULTILINE,
)
# Scripts that do not put spaces between words: each character counts as one.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")


def answer(reference: str, rewrite: str) -> Verdict:
    """A short answer of the reference stands in the rewrite, word for word; a choice is the same.

    Case, punctuation and articles do not count. After "yes" and "no", or "true" and "false", the
    opposite must not occur. Numbers without a unit in words are left to `number`.
    """
    letter = _choice(reference)
    if letter:
        chosen = _choice(rewrite)
        if chosen is None:
            return f"The reference chooses {letter}, and the rewrite names no choice."
        return "" if chosen == letter else f"It chooses {chosen}, and the reference {letter}."
    if "\n" in reference.strip() or not any(c.isalpha() for c in reference):
        return None
    words, said = _words(reference), _words(rewrite)
    if not 1 <= len(words) <= SHORT:
        return None
    if _POLAR.match(reference):
        words, opposite = words[:1], _OPPOSITE[words[0]]
        if opposite in said:
            return f"The reference says '{words[0]}', and the rewrite says '{opposite}'."
    if f" {' '.join(words)} " not in f" {' '.join(said)} ":
        return f"The reference's answer, '{reference.strip()}', does not stand in it."
    return ""


def _choice(text: str) -> str | None:
    said = _CHOICE_SAID.findall(text)
    if said:
        return str(said[-1])
    alone = _CHOICE_ALONE.fullmatch(text.strip())
    return alone[1] if alone else None


def _words(text: str) -> list[str]:
    text = _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text))
    words: list[str] = re.findall(r"\w+", _folded(text).replace("'", ""))
    return [word for word in words if word not in ("a", "an", "the")]


# ------------------------------------------------------------------------------------------- length

BOUNDS = (0.2, 5.0)  # our own: neither paper limits lengths
SHORT_TEXT = 200  # characters; an answer shorter than this may grow to what one this long may


def length(reference: str, rewrite: str, bounds: tuple[float, float] = BOUNDS) -> Verdict:
    """It has between `bounds` times as many characters as the reference.

    To the upper bound a reference counts for `SHORT_TEXT` at least: a word becomes a sentence.
    """
    low, high = bounds
    n, given = len(rewrite.strip()), len(reference.strip())
    if n < low * given:
        return f"It has {n} characters, less than {low:g} times the reference's {given}."
    if n > high * max(given, SHORT_TEXT):
        return f"It has {n} characters, more than {high:g} times the reference's {given}."
    return ""


# --------------------------------------------------------------------------------------------- code

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_PYTHON = ("python", "python3", "py")


def python_code(text: str) -> str | None:
    """The Python in a text: its fenced blocks, joined, or all of it where that defines something.

    A fence without a language counts where its code compiles. None where there is no Python.
    """
    fenced = [(tag.lower(), textwrap.dedent(block)) for tag, block in _FENCE.findall(text)]
    blocks = [block for tag, block in fenced if tag in _PYTHON]
    if not blocks:
        whole = [text] if not fenced else [block for tag, block in fenced if not tag]
        blocks = [block for block in whole if _defined(block)]
    return "\n".join(blocks) if blocks else None


def code(reference: str, rewrite: str) -> Verdict:
    """Where the reference holds Python, the rewrite's compiles and defines the same functions.

    Of the reference's functions and classes at the top level none may be missing, where it
    compiles itself. Nothing is run.
    """
    wanted = python_code(reference)
    if wanted is None:
        return None
    written = python_code(rewrite)
    if written is None:
        return "The reference holds Python code, and the rewrite none."
    tree = _tree(written)
    if isinstance(tree, str):
        return f"Its Python code does not compile: {tree}."
    missing = sorted(_defined(wanted) - _defined(written))
    return f"Its Python code does not define {', '.join(missing)}." if missing else ""


def code_runs(reference: str, rewrite: str) -> Verdict:
    """Where the reference's Python runs to its end, so does the rewrite's: see `run_python`."""
    wanted = python_code(reference)
    if wanted is None or run_python(wanted):
        return None
    written = python_code(rewrite)
    if written is None:
        return "The reference holds Python code, and the rewrite none."
    problem = run_python(written)
    return f"Its Python code does not run: {problem}." if problem else ""


def _tree(source: str) -> ast.Module | str:
    """The syntax tree of code that compiles, or else what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source, "<rewrite>")
            compile(tree, "<rewrite>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return tree


def _defined(source: str) -> set[str]:
    """The functions and classes at the top level of code; empty where it does not compile."""
    tree = _tree(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = [] if isinstance(tree, str) else tree.body
    return {node.name for node in body if isinstance(node, kinds)}


RUN_SECONDS, RUN_MEMORY, RUN_FILE = 10, 1 << 30, 1 << 20  # bytes

# Set by the child itself, hard limits and all, before it reads the code.
_LAUNCH = """\
import resource, sys
def limit(what, most):
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))
limit(resource.RLIMIT_CPU, {seconds})
limit(resource.RLIMIT_AS, {memory})
limit(resource.RLIMIT_FSIZE, {file})
limit(resource.RLIMIT_CORE, 0)
exec(compile(sys.stdin.read(), "<rewrite>", "exec"), {{"__name__": "__main__"}})
"""


def run_python(source: str) -> str:
    """Run code in a process of its own; "" where it ends well, else what went wrong.

    It gets 10 seconds, 1 GiB of memory, files of 1 MiB, an empty folder, no environment, no input,
    and Python's isolated mode. **That is no sandbox**: it is your user, who may read your files
    and use the network. Run only code that you would run by hand, or do this in a container.
    POSIX only.
    """
    limits = {"seconds": RUN_SECONDS, "memory": RUN_MEMORY, "file": RUN_FILE}
    command = [sys.executable, "-I", "-X", "utf8", "-c", _LAUNCH.format(**limits)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        with subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # so that what it starts ends with it
        ) as child:
            try:
                child.communicate(source.encode("utf-8", "replace"), timeout=RUN_SECONDS)
            except subprocess.TimeoutExpired:
                return f"it took more than {RUN_SECONDS} seconds"
            finally:
                with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
                    os.killpg(child.pid, signal.SIGKILL)
        if child.returncode == 0:
            return ""
        said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else f"it ended with status {child.returncode}"


CHECKS: dict[str, Check] = {
    "leakage": leakage,
    "refusal": refusal,
    "number": number,
    "answer": answer,
    "code": code,
    "length": length,
    "code_runs": code_runs,
}
SAFE = tuple(name for name in CHECKS if name != "code_runs")
