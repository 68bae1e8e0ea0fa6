"""What a rewrite must keep: each check by hand, and numbers in the ways that people write them."""

from __future__ import annotations

import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prune import rewrite_checks
from data_prune.rewrite_checks import (
    CHECKS,
    SAFE,
    SHORT_TEXT,
    answer,
    code,
    code_runs,
    final_number,
    judge,
    leakage,
    length,
    number,
    python_code,
    refusal,
    run_python,
    stated_number,
)

# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # GSM8K
        ("He has 3.\n#### 72", 72),
        ("#### -5", -5),
        ("#### $18", 18),
        ("#### 1,234", 1234),
        ("#### x = 7", 7),
        # said
        ("The answer is 5.", 5),
        ("so the answer is: **$1,234.50** dollars.", "1234.5"),
        ("Answer: 42", 42),
        ("**Answer**: 42", 42),
        ("Answer:\n42", 42),
        ("The final answer is approximately 3.14.", "3.14"),
        ("The answer is 10 - 3 = 7", 7),
        ("The answer is 5. Since 2 + 4 = 6, it is not 6.", 5),
        ("The answer is 4. No: the answer is 5.", 5),
        # LaTeX
        (r"so \boxed{72}", 72),
        (r"the answer is $\boxed{5}$", 5),
        (r"\boxed{x = -5}", -5),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
        (r"\boxed{\frac{-1}{2}}", "-1/2"),
        (r"\boxed{1\frac{1}{2}}", "3/2"),
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{12\,000}", 12000),
        (r"\boxed{5\text{ cm}^2}", 5),
        (r"\boxed{\$18}", 18),
        (r"\boxed{25\%}", 25),
        # the whole text
        ("72", 72),
        (" 72. ", 72),
        ("(72)", 72),
        ("-3", -3),
        ("−3", -3),
        ("$1,200", 1200),
        ("-$5", -5),
        ("€ 5", 5),
        ("72 clips", 72),
        ("5 km/h", 5),
        ("50%", 50),
        ("90°", 90),
        ("3/4", "3/4"),
        ("1 1/2", "3/2"),
        (".5", "1/2"),
        ("2.50", "5/2"),
        ("3e2", 300),
        ("1,00,000 rupees", 100000),
        ("1\u202f000", 1000),
        ("٣", 3),
    ],
)
def test_a_result_is_read_exactly(text: str, value: int | str) -> None:
    assert stated_number(text) == Fraction(value)
    assert final_number(text) == Fraction(value)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("", None),
        ("No number.", None),
        ("He was born in 1934.", 1934),
        ("The answer is Tom, who has 3.", 3),
        ("48/2 = 24 and 48+24 = <<48+24=72>>72 clips.", 72),
        ("10-3", 3),
        ("(10)-3", 3),
        ("10 - 3", 3),
        ("- 5 apples", 5),  # a bullet or a sign: not a result
        ("#### 1. First step", 1),  # a heading
        (r"\boxed{x + 1}", 1),
        (r"\boxed{(3, 4)}", 4),
        (r"\boxed{5\sqrt{2}}", 2),
        ("5-10", 10),
        ("The answer is 10:30.", 30),
        ("12/25/2020", None),
        ("v1.2.3", None),
        ("x2", None),
        ("3/0", None),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_a_mention_is_no_result(text: str, last: int | None) -> None:
    assert stated_number(text) is None
    assert final_number(text) == last


MANNERS = (
    "{}",
    "#### {}",
    "Steps 1 and 2.\n#### {}\n",
    "The answer is {}.",
    "First 3, then 4.\n\nThe final answer is: **{}**",
    r"We get $\boxed{{{}}}$ in 2 steps.",
    r"\boxed{{x = {}}}",
    "Answer: ${}",
)
ENDS = ("It comes to {}", "12 of them make {} in all.", "so 2 * 3 = {}")


@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(MANNERS + ENDS),
)
def test_any_decimal_is_read_back(digits: int, places: int, commas: bool, manner: str) -> None:
    value = Fraction(digits, 10**places)
    whole, part = divmod(abs(digits), 10**places)
    text = f"{whole:,}" if commas else str(whole)
    text = ("-" if digits < 0 else "") + text + (f".{part:0{places}d}" if places else "")
    text = manner.format(text)
    assert final_number(text) == value
    assert stated_number(text) == (None if manner in ENDS else value)


@given(
    st.integers(-(10**6), 10**6),
    st.integers(1, 10**6),
    st.sampled_from(("{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}")),
    st.sampled_from(MANNERS),
)
def test_any_fraction_is_read_back(top: int, bottom: int, form: str, manner: str) -> None:
    assert stated_number(manner.format(form.format(top, bottom))) == Fraction(top, bottom)


@given(st.text())
def test_no_text_breaks_a_check(text: str) -> None:
    for name in SAFE:
        for pair in ((text, "The answer is 5."), ("def f(): pass", text), ("(B)", text)):
            verdict = CHECKS[name](*pair)
            assert verdict is None or isinstance(verdict, str)


@pytest.mark.parametrize(
    ("reference", "rewrite", "verdict"),
    [
        ("#### 72", "She sold 72 clips.", ""),
        ("#### 72", "She sold 72 clips, 24 of them in May.", "Its final number is 24"),
        ("#### 72", "24 in May.\n#### 72\n", ""),
        ("#### 72", "She sold some.", "The reference's result is 72, and the rewrite holds no"),
        ("#### 0.5", r"\boxed{\frac{1}{2}}", ""),
        ("#### 1200", "It costs $1,200.00 in all", ""),
        ("#### 5", "The answer is -5", "Its final number is -5, and the reference's 5."),
        ("It was 1934.", "It was 1935.", None),
    ],
)
def test_number(reference: str, rewrite: str, verdict: str | None) -> None:
    found = number(reference, rewrite)
    assert found == verdict or (verdict and found and found.startswith(verdict))


# ------------------------------------------------------------------------------- leaks and refusals


@pytest.mark.parametrize(
    ("reference", "rewrite", "phrase"),
    [
        ("Paris.", "As the Reference Answer says, Paris.", "reference answer"),
        ("Paris.", "Here is my response: Paris.", "my response"),
        ("Paris.", "Now it’s your turn!", "now it's your turn"),
        ("Paris.", " Your turn: Paris.", "your turn"),
        ("Paris.", "In my own words: Paris.", "own words"),
        ("Paris.", "It is Paris. It is your turn to say.", None),
        ("A reference answer is a model.", "A reference answer is an example.", None),
    ],
)
def test_leakage(reference: str, rewrite: str, phrase: str | None) -> None:
    found = leakage(reference, rewrite)
    assert found == "" if phrase is None else f"'{phrase}'" in (found or "")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I do not know.",
        "Sorry, I do not know.",
        "I cannot assist with this.",
        "I am unable to provide medical advice.",
        "As an AI language model, I have no age.",
        '"I apologize, but no."',
        "I don't have access to the internet.",
        "I am just an AI.",
    ],
)
def test_refusals_go_with_refusals(text: str) -> None:
    assert refusal("It is 5.", text) == "It declines to answer, and the reference does not."
    assert refusal(text, "It is 5.") == "It answers what the reference declines to answer."
    assert refusal(text, "I can't assist with that.") == ""


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that.",
        "I can't believe it.",
        "The king said: I am sorry.",
        "Sorry is what she was.",
        "As an airline, it failed.",
        "I don't have a car.",
    ],
)
def test_what_is_no_refusal(text: str) -> None:
    assert refusal("It is 5.", text) == ""


# ------------------------------------------------------------------------------------ short answers


@pytest.mark.parametrize(
    ("reference", "rewrite", "verdict"),
    [
        ("Paris", "The capital of France is paris.", ""),
        ("The Eiffel Tower.", "It is the 'Eiffel tower'", ""),
        ("Paris", "The Parisian way", "The reference's answer, 'Paris', does not stand in it."),
        ("rock 'n' roll", "It's Rock n Roll!", ""),
        ("don’t know", "They don't know.", ""),
        ("居里夫人", "发现镭的是居里夫人。", ""),
        ("居里夫人", "爱因斯坦。", "The reference's answer, '居里夫人', does not stand in it."),
        # yes and no
        ("Yes", "Yes, it is.", ""),
        ("yes.", "It is so.", "The reference's answer, 'yes.', does not stand in it."),
        ("No, it is not.", "No.", ""),
        ("No", "Yes.", "The reference says 'no', and the rewrite says 'yes'."),
        ("False", "It is false, not true", "The reference says 'false', and the rewrite says"),
        ("No one", "Yes, no one came.", ""),
        # no short answer
        ("It is the capital of France and Paris is its name.", "Berlin", None),
        ("Paris\nis a city", "Berlin", None),
        ("72", "Berlin", None),
        ("3/4", "Berlin", None),
        ("?!", "Berlin", None),
        ("72 clips", "She sold 72 clips.", ""),
        ("72 clips", "She sold 72 of them.", "The reference's answer, '72 clips', does not"),
    ],
)
def test_short_answers(reference: str, rewrite: str, verdict: str | None) -> None:
    found = answer(reference, rewrite)
    assert found == verdict or (verdict and found and found.startswith(verdict))


@pytest.mark.parametrize("reference", ["B", "(B)", "B.", "b is so.\nThe answer is (B).", "B) Rome"])
@pytest.mark.parametrize(
    ("rewrite", "chosen"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B), as Rome is.", "B"),
        ("Rome is in Italy.\nAnswer: B", "B"),
        ("Option B is right.", "B"),
        ("**B)** Rome", None),
        ("B) Rome", "B"),
        ("The answer is (A). Or no: the answer is B because it is.", "B"),
        ("C", "C"),
        ("The answer is A dog", None),
        ("The answer is Berlin", None),
        ("Rome.", None),
    ],
)
def test_choices(reference: str, rewrite: str, chosen: str | None) -> None:
    assert (
        answer(reference, rewrite)
        == {
            "B": "",
            "C": "It chooses C, and the reference B.",
            None: "The reference chooses B, and the rewrite names no choice.",
        }[chosen]
    )


# ------------------------------------------------------------------------------------------- length


def test_length() -> None:
    reference = "x" * 1000
    bounds = (0.5, 2.0)
    assert length(reference, "x" * 499, bounds) == (
        "It has 499 characters, less than 0.5 times the reference's 1000."
    )
    assert length(reference, "x" * 500, bounds) == length(reference, "x" * 2000, bounds) == ""
    assert length(reference, "x" * 2001, bounds) == (
        "It has 2001 characters, more than 2 times the reference's 1000."
    )
    assert length("Paris", "x" * 2 * SHORT_TEXT, bounds) == ""
    assert "more than" in (length("Paris", "x" * (2 * SHORT_TEXT + 1), bounds) or "")


# --------------------------------------------------------------------------------------------- code

FENCED = "Here it is:\n```python\ndef f(x):\n    return x + 1\n```\nDone."


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (FENCED, "def f(x):\n    return x + 1\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("```\nclass A: pass\n```", "class A: pass\n"),
        ("1. Do\n   ```py\n   x = 1\n   ```", "x = 1\n"),
        ("```python\nx = 1\n```\nand\n```Python\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("```python\nnot (\n```", "not (\n"),
        ("```\nls -l\n```", None),
        ("```bash\ndef\n```", None),
        ("Hello", None),
        ("x = 1", None),  # so does an equation look
    ],
)
def test_where_python_is(text: str, source: str | None) -> None:
    assert python_code(text) == source


@pytest.mark.parametrize(
    ("reference", "rewrite", "verdict"),
    [
        ("No code.", "None either.", None),
        (FENCED, FENCED, ""),
        (FENCED, "def g(): pass\n\ndef f(y): return y", ""),
        (FENCED, "It adds one.", "The reference holds Python code, and the rewrite none."),
        (FENCED, "```python\ndef g(): pass\n```", "Its Python code does not define f."),
        (FENCED, "```python\ndef f(x) return\n```", "Its Python code does not compile: Syntax"),
        (FENCED, "```python\nreturn 1\n```", "Its Python code does not compile: SyntaxError"),
        (FENCED, "```python\nx = '\0'\n```", "Its Python code does not compile: "),
        (FENCED, f"```python\nx = {'(' * 500}\n```", "Its Python code does not compile: "),
        ("```python\ndef f(\n```", "```python\nx = '\\d'\n```", ""),  # and no warning
        ("```python\ndef f(\n```", "```python\nx = \n```", "Its Python code does not compile"),
    ],
)
def test_code(reference: str, rewrite: str, verdict: str | None) -> None:
    found = code(reference, rewrite)
    assert found == verdict or (verdict and found and found.startswith(verdict))


def fenced(source: str) -> str:
    return f"```python\n{source}\n```"


def test_nothing_is_run_unless_it_is_asked_for(tmp_path: Path) -> None:
    left = tmp_path / "left"
    writes = fenced(f"open({str(left)!r}, 'w').close()")
    assert "code_runs" not in SAFE
    assert code(writes, writes) == ""
    assert not left.exists()
    assert code_runs(writes, writes) == ""
    assert left.exists()  # no sandbox, as its docstring says


def test_code_runs_where_the_reference_does() -> None:
    assert code_runs("No code.", "x") is None
    assert code_runs(fenced("import not_there"), fenced("1 / 0")) is None
    assert code_runs(fenced("x = 1"), "No code.") == (
        "The reference holds Python code, and the rewrite none."
    )
    assert code_runs(fenced("x = 1"), fenced("1 / 0")) == (
        "Its Python code does not run: ZeroDivisionError: division by zero."
    )
    assert code_runs(fenced("x = 1"), fenced("import sys; sys.exit(3)")) == (
        "Its Python code does not run: it ended with status 3."
    )


def test_what_runs_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("")
    assert run_python("print('ok')") == ""
    assert run_python("import os; assert 'SECRET' not in os.environ") == ""
    assert run_python("import beside").startswith("ModuleNotFoundError")
    assert run_python("import os; assert os.listdir() == []") == ""
    assert run_python("input()").startswith("EOFError")
    assert run_python("x = 'x' * (1 << 31)") == "MemoryError"
    assert "File too large" in run_python("open('f', 'wb').write(b'x' * (1 << 22))")
    assert run_python("print('\ud800')").startswith("")  # no character, and no error of ours
    assert not list(tmp_path.glob("f"))


def test_what_runs_too_long_ends_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rewrite_checks, "RUN_SECONDS", 1)
    left = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    source = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(left)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    assert run_python(source) == "it took more than 1 seconds"
    pid = int(left.read_text())
    for _ in range(100):  # killed: gone, or not yet collected by its new parent
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("its child still runs")


# --------------------------------------------------------------------------------------- judgements


def test_the_first_problem_is_the_reason_and_every_check_is_put() -> None:
    checks = {name: CHECKS[name] for name in SAFE}
    found = judge("#### 72", "My response: 71", checks)
    assert not found.accepted
    assert found.passed == {
        "not_empty": True,
        "leakage": False,
        "refusal": True,
        "number": False,
        "length": True,
    }
    assert found.reason.startswith("It says 'my response'")
    good = judge("#### 72", "It is 72.", checks)
    assert good.accepted
    assert good.reason == "It passes not_empty, leakage, refusal, number, length."
    empty = judge("#### 72", " \n", checks)
    assert (empty.accepted, empty.passed, empty.reason) == (
        False,
        {"not_empty": False},
        "The rewrite is empty.",
    )
