"""Regular expressions answer as Python's do, and always in time."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postoffice.exceptions import LimitExceeded, MatchTimeout, TemporaryError
from postoffice.expressions import Expression, ExpressionList, parsing, worker
from postoffice.expressions.cost import effort
from postoffice.expressions.programs import ANCHORED, UNANCHORED
from postoffice.expressions.translation import ASCII_LINES, UNICODE_LINES, VARIANTS

MATCH = ANCHORED
SEARCH = UNANCHORED

# Letters with odd folding of case, digits and spaces outside ASCII, what is a line end elsewhere.
CHARACTERS = [
    *"abAB kKsSiI1_:-\n\t\x0b\x1c",
    *"\x85\xa0éÉßſİıKσςΣ٣\u2028\u0345日\U00010400\U00010428",
]
ASCII_CHARACTERS = [character for character in CHARACTERS if character.isascii()]

categories = st.sampled_from([r"\w", r"\W", r"\d", r"\D", r"\s", r"\S"])
literals = st.sampled_from(CHARACTERS).map(re.escape)
ranges = st.tuples(st.sampled_from(CHARACTERS), st.sampled_from(CHARACTERS)).map(
    lambda ends: "-".join(re.escape(end) for end in sorted(ends))
)
sets = st.builds(
    "[{}{}]".format,
    st.sampled_from(["", "^"]),
    st.lists(st.one_of(literals, ranges, categories), min_size=1, max_size=4).map("".join),
)
characters = st.one_of(literals, literals, st.just("."), categories, sets)
places = st.sampled_from(["^", "$", r"\A", r"\Z", r"\b", r"\B"])
repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "{0}", "*?", "+?", "??"])
groups = st.sampled_from(["(", "(?:", "(?i:", "(?s:", "(?m:", "(?-i:", "(?a:", "(?im:", "(?x: "])


def larger(smaller: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Make sequences, alternatives, groups and repeats out of smaller expressions."""
    return st.one_of(
        st.lists(smaller, min_size=2, max_size=4).map("".join),
        st.lists(smaller, min_size=2, max_size=3).map("|".join).map("(?:{})".format),
        st.builds("{}{})".format, groups, smaller),
        st.builds("(?:{}){}".format, smaller, repeats),
    )


sources = st.builds(
    "{}{}".format,
    st.sampled_from(["", "", "(?i)", "(?s)", "(?m)", "(?x)", "(?im)", "(?a)", "(?ai)"]),
    st.recursive(
        st.one_of(characters, st.builds("{}{}".format, characters, repeats), places),
        larger,
        max_leaves=8,
    ),
)
flags = st.sampled_from([0, 0, re.MULTILINE, re.IGNORECASE, re.DOTALL])
texts = st.one_of(
    st.text(st.sampled_from(ASCII_CHARACTERS), max_size=14),
    st.text(st.sampled_from(CHARACTERS), max_size=14),
    st.text(st.sampled_from("ab\n "), max_size=14),
)

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def cheap(expression: Expression, text: str) -> bool:
    """Say whether re itself, which each answer is held against, ends soon."""
    return effort(expression._parsed(), len(text))[1] < 1e6


@fuzzed
@given(sources, flags, st.lists(texts, min_size=1, max_size=6))
def test_re2_answers_as_re(source: str, flag: int, some: list[str]) -> None:
    """Whatever RE2 is asked in place of re, it answers as re does."""
    expression = Expression(source, flag)
    pattern = re.compile(source, flag)
    for text in some:
        if not cheap(expression, text):
            continue
        for variant in (one for pair in VARIANTS for one in pair):
            if (variant.ascii and not text.isascii()) or (variant.lines and "\n" in text):
                continue
            program = expression._program(variant)
            if program is not None:
                data = text.encode()
                assert program.found(MATCH, data) == bool(pattern.match(text))
                assert program.found(SEARCH, data) == bool(pattern.search(text))


@fuzzed
@given(sources, flags, st.lists(texts, min_size=1, max_size=4))
def test_an_expression_answers_as_re(source: str, flag: int, some: list[str]) -> None:
    """Whichever engine is chosen, match and search answer as re does."""
    expression = Expression(source, flag)
    pattern = re.compile(source, flag)
    for text in some:
        if cheap(expression, text):
            assert expression.match(text) == bool(pattern.match(text))
            assert expression.search(text) == bool(pattern.search(text))


@fuzzed
@given(sources, flags, texts)
def test_the_process_answers_as_re(source: str, flag: int, text: str) -> None:
    """The process of its own answers as re does, whether it is asked with re or with RE2."""
    expression = Expression(source, flag)
    pattern = re.compile(source, flag)
    if not cheap(expression, text):
        return
    asked = [("m", "s", source.encode(), text.encode())]
    program = expression._program(VARIANTS[text.isascii()]["\n" not in text])
    if program is not None:
        asked.append(("M", "S", program.source, text.encode()))
    for match, search, expressed, data in asked:
        ask = worker.shared.ask
        assert ask(expression, match, expressed, data) == bool(pattern.match(text))
        assert ask(expression, search, expressed, data) == bool(pattern.search(text))


@fuzzed
@given(st.lists(sources, min_size=1, max_size=4), flags, st.lists(texts, max_size=4))
def test_a_list_answers_as_its_expressions(some: list[str], flag: int, asked: list[str]) -> None:
    """A list finds an expression if, and only if, one of its expressions matches a text."""
    if not all(cheap(Expression(source, flag), text) for source in some for text in asked):
        return
    several = ExpressionList(some, flag)
    patterns = {source: re.compile(source, flag) for source in some}
    for chosen in (asked, [text for text in asked if "\n" not in text]):
        found = several.match_any(chosen)
        if found is None:
            assert not any(one.match(text) for one in patterns.values() for text in chosen)
        else:
            assert any(patterns[found].match(text) for text in chosen)
        found = several.search_any(chosen)
        if found is None:
            assert not any(one.search(text) for one in patterns.values() for text in chosen)
        else:
            assert any(patterns[found].search(text) for text in chosen)


@pytest.mark.parametrize(
    "source",
    [
        r"(\w)\1",
        r"(?P<one>a+)b(?P=one)",
        r"(?=ab)a",
        r"a(?!b)",
        r"(?<=a)b",
        r"(?<!a)b",
        r"(a)?(?(1)b|a)",
        r"(?>a+)b",
        r"a++b",
        r"\Bb",
        r"(?a:\S)",
        r"(?:a*)*b",
        r"(?:a?){3}$|$b",
        r"(?:a{1000}){1000}|b",
    ],
)
@pytest.mark.parametrize(
    "text", ["", "a", "b", "ab", "aab", "abab", "bb\n", "\udc80ab", "éab", "\x85"]
)
def test_what_re2_cannot_say(source: str, text: str) -> None:
    """Expressions that RE2 has no equivalent for have the answers of re."""
    expression = Expression(source)
    assert expression.match(text) == bool(re.match(source, text))
    assert expression.search(text) == bool(re.search(source, text))
    assert bool(ExpressionList([source]).match_any([text])) == bool(re.match(source, text))
    assert bool(ExpressionList([source]).search_any([text])) == bool(re.search(source, text))


@pytest.mark.parametrize(
    "source", [r"\w", r"\W", r"\d", r"\s", r"(?i)k", r"(?i)[^s]", r"(?i)[à-ý]"]
)
def test_sets_are_those_of_re(source: str) -> None:
    """RE2 takes, over all of Unicode, the characters that re takes."""
    program = Expression(source)._program(UNICODE_LINES)
    assert program is not None
    pattern = re.compile(source)
    everything = [chr(point) for point in range(0x2000)] + ["\u212a", "\U0001f600", "\U0010ffff"]
    for character in everything:
        if character != "\n":
            found = program.found(MATCH, character.encode())
            assert found == bool(pattern.match(character)), ascii(character)


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        (r"^(\w+\s?)*$", "a" * 40 + "!", False),
        (r"(a+)+$", "a" * 100_000 + "!", False),
        (r"(.*)(.*)(.*)(.*)x", "a" * 100_000, False),
        (r"(.*)(.*)(.*)(.*)x", "é" * 100_000 + "x", True),
        (r"\s+x", " " * 1_000_000, False),
        (r"\s+x", " " * 1_000_000 + "x", True),
        (r"(?i)(?:x|y|xy)*z", "xyXY" * 50_000, False),
    ],
)
def test_catastrophes_of_backtracking_are_answered(source: str, text: str, expected: bool) -> None:
    """What would keep re busy for ever is answered soon where RE2 can say the same."""
    began = time.monotonic()
    assert Expression(source).search(text) is expected
    assert (ExpressionList([source, "never"]).search_any([text]) is not None) is expected
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"(a*)*$", "a" * 40 + "!"),
        (r"(?=a)(a+)+$", "a" * 40 + "!"),
        (r"(a|aa)+\1!$", "a" * 60),
        (r"(?!b)\s+x", " " * 1_000_000),
        (r"(?:(?=(.*))(.*))*x", "a" * 100_000),
    ],
)
def test_a_match_that_takes_too_long(source: str, text: str) -> None:
    """A match that cannot be answered in time ends with an error, and the next one is answered."""
    began = time.monotonic()
    with pytest.raises(MatchTimeout, match=r"longer than 0\.2 s"):
        Expression(source, limit=0.2).search(text)
    assert time.monotonic() - began < 3
    assert Expression(r"(?=a)(a+)+b").search("a" * 400 + "b")


def test_a_text_too_long_for_re2_here() -> None:
    """A text on which RE2 may take long is given to the process, and answered there."""
    expression = Expression(r"[ab]*a[ab]{300}c", limit=0.5)
    program = expression._program(ASCII_LINES)
    assert program is not None
    text = "ab" * program.longest
    assert not expression.match(text)
    assert expression.match(text + "bc")
    assert ExpressionList([expression.source]).match_any([text + "bc"]) == expression.source


def test_re2_is_stopped_too() -> None:
    """RE2 on a text so long that even linear time exceeds the limit ends with an error."""
    expression = Expression(r"[ab]*a[ab]{900}c", limit=0.02)
    text = "".join(random.Random(1).choices("ab", k=200_000))
    with pytest.raises(MatchTimeout):
        expression.match(text)


@pytest.fixture
def fresh_worker() -> Iterator[None]:
    """Let the next match start a process, and the next test another."""
    worker.shared.stop()
    yield
    worker.shared.stop()


@pytest.mark.usefixtures("fresh_worker")
def test_a_match_that_needs_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A match that needs more memory than any may have ends with an error, not with the machine."""
    monkeypatch.setattr(worker, "WORKER_MEMORY", 128 << 20)
    hungry = Expression(r"(?:(?=(a))(?:(a)|(b)))*(?!a)c", limit=20.0)
    with pytest.raises(LimitExceeded, match="more memory"):
        hungry.match("a" * 2_000_000)
    assert Expression(r"(?=a)(a+)+b").search("a" * 400 + "b")


def slow() -> Expression:
    """Return an expression that only the process may be asked."""
    return Expression(r"(?=a)a+b(?:x|yy)*")


SLOW_TEXT = "a" * 400 + "b"


def test_a_process_that_was_killed_is_replaced() -> None:
    """When someone kills the process, the next match starts another."""
    assert slow().match(SLOW_TEXT)
    process = worker.shared._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    assert slow().match(SLOW_TEXT)
    assert worker.shared._process is not process


def test_a_process_that_is_killed_at_work() -> None:
    """When the process is killed during a match, the match is asked once more."""
    assert slow().match(SLOW_TEXT)
    process = worker.shared._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    killer = threading.Timer(0.1, process.send_signal, [signal.SIGKILL])
    killer.start()
    assert slow().match(SLOW_TEXT)
    killer.join()


@pytest.mark.usefixtures("fresh_worker")
def test_a_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that uses no time, yet gives no answer, is ended too."""
    monkeypatch.setattr(worker, "WORKER_GRACE", 0.1)
    still = Expression(slow().source, limit=0.1)
    assert still.match(SLOW_TEXT)
    process = worker.shared._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(MatchTimeout):
        still.match(SLOW_TEXT)
    assert process.poll() is not None
    assert slow().match(SLOW_TEXT)


@pytest.mark.usefixtures("fresh_worker")
@pytest.mark.parametrize("executable", ["/nonexistent", "/bin/true"])
def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    """Where no process can be started, the error is a temporary one."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(TemporaryError, match="no process"):
        slow().match(SLOW_TEXT)
    monkeypatch.undo()
    assert slow().match(SLOW_TEXT)


def test_without_the_parser_of_cpython(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python's parser cannot be used, the answers are the same."""
    monkeypatch.setattr(parsing, "parser", None)
    assert Expression("a.*b$").match("axxb\n")
    assert not Expression("a.*b$").search("axxbx")
    assert ExpressionList(["q", "a.*b$"]).match_any(["x", "ab"]) == "a.*b$"


def test_an_interrupted_match_leaves_no_answer_behind() -> None:
    """After an exception out of the middle of a match, the next match gets its own answer."""
    assert slow().match(SLOW_TEXT)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            Expression(r"(a*)*$").match("a" * 40 + "!")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert slow().match(SLOW_TEXT)
    assert not slow().match("a" * 20)


def test_a_forked_child_starts_its_own_process() -> None:
    """A forked child answers by a process of its own, and leaves the parent's alone."""
    assert slow().match(SLOW_TEXT)
    process = worker.shared._process
    assert process is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            found = slow().match(SLOW_TEXT)
            own = worker.shared._process
            if found and own is not None and own.pid != process.pid:
                status = 0
            worker.shared.stop()
        finally:
            os._exit(status)
    os.close(writing)
    os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.shared._process is process
    assert process.poll() is None
    assert slow().match(SLOW_TEXT)


def test_threads_get_their_own_answers() -> None:
    """Threads that ask at once get each the answer to what it asked."""
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(20):
            ending = "b" if (turn + number) % 2 else "c"
            if slow().match("a" * 400 + ending) != (ending == "b"):
                wrong.append(ending)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


ORPHAN = r"""
import os, signal, threading
from postoffice import expressions
from postoffice.expressions import worker
busy = expressions.Expression(r"(a*)*$", limit=0.5)
threading.Thread(target=busy.match, args=("a" * 40 + "!",), daemon=True).start()
while worker.shared._channel is None or worker.shared._process is None:
    pass
print(worker.shared._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_does_not_outlive_its_parent() -> None:
    """When the parent is killed, even during a match, the process ends within the limit."""
    ended = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False, timeout=30
    )
    try:
        orphan = os.pidfd_open(int(ended.stdout))
    except ProcessLookupError:
        return
    try:
        assert select.select([orphan], [], [], 10)[0]
    finally:
        os.close(orphan)


def test_an_exit_is_quiet() -> None:
    """A program that used the process ends without a warning."""
    program = (
        "from postoffice.expressions import *; print(Expression('(?=a)(a+)+b').match('a'*400+'b'))"
    )
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("True\n", "", 0)


@pytest.mark.parametrize(
    "source",
    [
        "(",
        "[a",
        "*",
        "a{2,1}",
        "a{99999999999999999999}",
        "(" * 5000 + ")" * 5000,
        "(?u)(?a)b",
        r"\N{NO}",
    ],
)
def test_what_is_no_expression(source: str) -> None:
    """Whatever cannot be compiled is an re.error that names its source."""
    with pytest.raises(re.error) as single:
        Expression(source)
    assert single.value.pattern == source
    with pytest.raises(re.error) as several:
        ExpressionList(["fine", source])
    assert several.value.pattern == source


def test_contradicting_flags() -> None:
    """Flags that contradict the expression are an re.error."""
    with pytest.raises(re.error):
        Expression("(?a)b", re.UNICODE)


@given(st.text(st.sampled_from("ab()[]{}|*+?^$\\.-,:=!<>PiamsxLu0129#&~ \n\ud800é"), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_expression_or_an_error(source: str) -> None:
    """Any text either compiles, and can be asked, or is an re.error."""
    try:
        expression = Expression(source)
    except re.error:
        return
    assert expression.match("ab é") == bool(quiet(source).match("ab é"))
    assert expression.search("ab\n") == bool(quiet(source).search("ab\n"))


def quiet(source: str) -> re.Pattern[str]:
    """Compile *source* with re, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(source)


def test_warnings_do_not_escape() -> None:
    """An expression of which re warns is valid, and gives no warning."""
    assert Expression("[[a]").match("[")
    assert ExpressionList(["[a&&b]"]).match_any(["a"]) == "[a&&b]"
    assert ExpressionList(["[[a]"]).search_any(["b["]) == "[[a]"


def test_no_texts_and_no_expressions() -> None:
    """Nothing is found where nothing is asked."""
    assert ExpressionList([""]).match_any([]) is None
    assert ExpressionList([""]).search_any([]) is None
    assert ExpressionList([]).match_any(["a"]) is None
    assert ExpressionList([]).search_any(["a"]) is None
    assert ExpressionList([""]).match_any([""]) == ""
    assert len(ExpressionList(["a", "b"])) == 2


def test_a_long_list() -> None:
    """Of a list too long for one question, the one expression that matches is found."""
    several = ExpressionList(f"Subject: word{number}z" for number in range(1500))
    assert several.match_any(["To: a", "Subject: word1499z"]) == "Subject: word1499z"
    assert several.search_any(["line\nSubject: word700z"]) == "Subject: word700z"
    assert several.match_any(["To: a", " Subject: word7z"]) is None


def test_texts_with_line_feeds_in_a_list() -> None:
    """A line feed within one text does not make two of it."""
    several = ExpressionList(["Subject: b", r"(?s)From: a.To: c$"])
    assert several.match_any(["From: a\nSubject: b", "x"]) is None
    assert several.match_any(["From: a\nTo: c", "x"]) == r"(?s)From: a.To: c$"


def test_expressions_are_values() -> None:
    """Expressions are equal when source and flags are."""
    assert Expression("a") == Expression("a")
    assert Expression("a") != Expression("a", re.IGNORECASE)
    assert Expression("a") != "a"
    assert len({Expression("a"), Expression("a")}) == 1
    assert repr(Expression("a")) == "Expression('a', 0)"
