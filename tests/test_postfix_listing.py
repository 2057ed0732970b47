"""What postqueue prints, in both of its forms, true and false, whole and cut."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postoffice.postfix import OutputCut, Recipient
from postoffice.postfix.listing import Listed, latest, read_json, read_listing, read_text

SAMPLES = Path(__file__).parent / "postfix_samples"
NOW = datetime(2026, 11, 21, 23, 0)  # noqa: DTZ001 - local and naive, as listings are
HEADING = "-Queue ID-  --Size-- ----Arrival Time---- -Sender/Recipient-------"
SUMMARY = "-- 4 Kbytes in 2 Requests."
ENTRY = "8AA6422E8BD*     297 Sat Nov 21 14:20:41  alice@depot.test"
OBJECT = {
    "queue_name": "deferred",
    "queue_id": "8AA6422E8BD",
    "arrival_time": 1795270841,
    "message_size": 297,
    "forced_expire": False,
    "sender": "alice@depot.test",
    "recipients": [{"address": "a@hang.test"}],
}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def sample(name: str) -> list[str]:
    """Return the lines of a sample."""
    return (SAMPLES / name).read_text("utf-8").split("\n")


def facts(listed: list[Listed]) -> list[tuple[object, ...]]:
    """Return all that is known of these messages: recipients compare as addresses alone."""
    return [
        (*one[:-1], [(str(to), to.reason, to.state) for to in one.recipients]) for one in listed
    ]


def in_text(*lines: str) -> list[Listed]:
    """Read a complete listing of ``postqueue -p`` with these lines."""
    return list(read_text([HEADING, *lines, SUMMARY, ""], NOW))


def in_json(**members: object) -> list[Listed]:
    """Read one message from ``postqueue -j`` with these members besides the usual ones."""
    return list(read_json([json.dumps(OBJECT | members), ""]))


# -- both ------------------------------------------------------------------------------------------


def test_both_forms_give_the_same_messages() -> None:
    """A queue listed by -p and by -j gives the same values, hostile ones among them."""
    by_text = list(read_text(sample("listing.txt"), NOW))
    by_json = list(read_json(sample("listing.json")))
    assert len(by_text) == 8
    assert facts(by_text) == facts(by_json)


def test_form_is_told_by_its_content() -> None:
    """The first line that says anything tells -j from -p; commands' remarks say nothing."""
    remark = "postqueue: warning: Mail system is down -- accessing queue directly"
    for name in ("listing.txt", "listing.json"):
        listed = list(read_listing(["", remark, *sample(name)], NOW))
        assert len(listed) == 8


@pytest.mark.parametrize("text", ["", "\n", "Mail queue is empty\n", f"{HEADING}\n{SUMMARY}\n"])
def test_empty_queue_has_no_messages(text: str) -> None:
    """An empty queue prints nothing by -j and a line by -p, and is no error."""
    assert list(read_listing(text.split("\n"), NOW)) == []


def test_message_seen_twice_is_there_once() -> None:
    """A message that moved while it was listed counts once, in the state seen last."""
    first = in_json(queue_name="active")
    assert latest([*first, *in_json(queue_name="deferred")]) == in_json(queue_name="deferred")


def test_short_id_used_again_is_another_message() -> None:
    """The same id with another time of arrival stands for two messages."""
    assert len(latest([*in_json(), *in_json(arrival_time=1795270842)])) == 2


# -- postqueue -p ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "status", "expired"),
    [
        ("", "deferred", False),
        ("*", "active", False),
        ("!", "hold", False),
        ("#", "deferred", True),
        ("*#", "active", True),
        ("!#", "hold", True),
    ],
)
def test_marks_after_the_id(marks: str, status: str, expired: bool) -> None:
    """A star is active, an exclamation mark held; a number sign, expired by force, joins them."""
    [one] = in_text(f"8AA6422E8BD{marks}     297 Sat Nov 21 14:20:41  a@depot.test")
    assert (one.qid, one.status, one.forced_expire) == ("8AA6422E8BD", status, expired)


@pytest.mark.parametrize(
    ("printed", "year"),
    [
        ("Sat Nov 21", 2026),  # today
        ("Sun Nov 22", 2026),  # a clock that is ahead of ours
        ("Sun Nov 23", 2025),  # would be Monday this year
        ("Thu Dec 31", 2020),  # the newest Thursday
        ("Wed Dec 31", 2025),
        ("Thu Feb 29", 2024),
        ("Sat Feb 29", 2020),
        ("Mon Feb 29", 2016),
        ("Thu Jan  1", 2026),
    ],
)
def test_year_is_the_newest_that_fits(printed: str, year: int) -> None:
    """The year is the newest in which the day is on its weekday and at most a day ahead."""
    [one] = in_text(f"8AA6422E8BD     297 {printed} 14:20:41  a@depot.test")
    assert one.date.year == year


def test_reasons_belong_to_the_recipients_below_them() -> None:
    """A reason goes with each recipient up to the next reason; one may be unavailable."""
    [one] = in_text(
        ENTRY,
        " " * 41 + "first@x.test",
        "(host x said: 451 (busy) (in reply to RCPT TO command))",
        " " * 41 + "second@x.test",
        " " * 41 + "third@x.test",
        " " * 58 + "(reason unavailable)",
        " " * 41 + "fourth@x.test",
        "",
    )
    reason = "host x said: 451 (busy) (in reply to RCPT TO command)"
    assert [(to, to.reason, to.state) for to in one.recipients] == [
        ("first@x.test", "", "pending"),
        ("second@x.test", reason, "deferred"),
        ("third@x.test", reason, "deferred"),
        ("fourth@x.test", "", "pending"),
    ]


def test_excerpt_without_heading_is_read() -> None:
    """Lines cut out of a listing, indented or not, with or without empty lines, are read."""
    listed = list(read_text([ENTRY, "(why)", "first@x.test", ENTRY, "second@x.test"], NOW))
    assert [one.recipients for one in listed] == [["first@x.test"], ["second@x.test"]]
    assert listed[0].recipients[0].reason == "why"


def test_every_cut_of_a_listing_is_noticed() -> None:
    """A listing of -p that ends anywhere before its last line is refused, in one line."""
    whole = "\n".join(sample("listing.txt"))
    end = whole.index("-- 273 Kbytes")
    for length in range(70, end + len("-- 273 Kbytes in 8 Request"), 7):
        with pytest.raises(OutputCut) as raised:
            list(read_text(whole[:length].split("\n"), NOW))
        assert "list the queue again" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line",
    [
        "no message",
        "    indented where no message is",
        "8AA6422E8BD     297 Sat Nov 31 14:20:41  a@depot.test",
        "8AA6422E8BD     297 Sat Nov 21 25:20:41  a@depot.test",
        "8AA6422E8BD     297 Caturday Nov 21 14:20:41  a@depot.test",
        "8AA6422E8BD     297 Xat Nov 21 14:20:41  a@depot.test",
        "8AA6422E8BD     297 Sat Non 21 14:20:41  a@depot.test",
        "../8AA6422E8BD  297 Sat Nov 21 14:20:41  a@depot.test",
        HEADING,
    ],
)
def test_line_that_postfix_does_not_write_is_refused(line: str) -> None:
    """A line that is none of -p's is refused by its number."""
    with pytest.raises(OutputCut, match=r"line 2 |after 2 lines"):
        in_text(line)


# -- postqueue -j ----------------------------------------------------------------------------------


def test_unknown_members_are_passed_over() -> None:
    """What a later Postfix adds to a message or a recipient does no harm."""
    [one] = in_json(colour="red", recipients=[{"address": "a@x.test", "colour": "red"}])
    assert one.recipients == ["a@x.test"]


def test_release_without_forced_expire() -> None:
    """A Postfix older than 3.5 does not tell of expiry, and no message is expired."""
    members = {name: value for name, value in OBJECT.items() if name != "forced_expire"}
    [one] = read_json([json.dumps(members)])
    assert not one.forced_expire


@pytest.mark.parametrize("length", range(1, len(json.dumps(OBJECT))))
def test_half_an_object_is_refused(length: int) -> None:
    """A line of -j that is cut off anywhere is refused by its number."""
    with pytest.raises(OutputCut, match="line 2 "):
        list(read_json([json.dumps(OBJECT), json.dumps(OBJECT)[:length]]))


@pytest.mark.parametrize(
    "members",
    [
        {"queue_id": "-v"},
        {"queue_id": "../../etc/passwd"},
        {"queue_id": "ALL"},
        {"queue_id": 5},
        {"arrival_time": "yesterday"},
        {"arrival_time": True},
        {"arrival_time": 10**30},
        {"message_size": -1},
        {"message_size": 1.5},
        {"sender": None},
        {"recipients": "a@x.test"},
        {"recipients": [{"address": 1}]},
        {"recipients": [{"address": "a@x.test", "delay_reason": []}]},
        {"recipients": None},
    ],
)
def test_object_that_postfix_does_not_write_is_refused(members: dict[str, object]) -> None:
    """A message whose members are of the wrong kind is refused."""
    with pytest.raises(OutputCut, match="line 1 "):
        in_json(**members)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 100_000, "{}", "[]", "null", "{} {}", "x"])
def test_other_json_is_refused(line: str) -> None:
    """JSON that is no message is refused, however deep or long."""
    with pytest.raises(OutputCut):
        list(read_json([line]))


# -- anything --------------------------------------------------------------------------------------

# A character that ends no line.
within = st.characters(exclude_categories=["Cs"], exclude_characters="\n\r")
reasons = st.text(within, max_size=120).filter(lambda text: text != "reason unavailable")
addresses = st.text(within, min_size=1, max_size=60).filter(lambda text: text[0] not in " \t(")
recipients = st.lists(
    st.builds(Recipient, addresses, st.one_of(st.just(""), reasons)), min_size=1, max_size=4
)
messages = st.builds(
    Listed,
    qid=st.from_regex(r"[0-9A-F]{6,12}|[B-Zb-z0-9]{11,16}", fullmatch=True),
    size=st.integers(0, 10**12),
    date=st.integers(1795302000 - 300 * 86400, 1795302000).map(
        lambda arrival: datetime.fromtimestamp(arrival)  # noqa: DTZ006 - as listings have it
    ),
    sender=st.one_of(st.just(""), addresses.filter(lambda text: text != "MAILER-DAEMON")),
    status=st.sampled_from(["active", "deferred", "hold"]),
    forced_expire=st.booleans(),
    recipients=recipients,
)


def printed_by_p(listed: list[Listed]) -> Iterator[str]:
    """Print messages as ``postqueue -p`` does."""
    yield HEADING
    for one in listed:
        mark = {"active": "*", "hold": "!", "deferred": ""}[one.status]
        mark += "#" if one.forced_expire else ""
        sender = one.sender or "MAILER-DAEMON"
        yield f"{one.qid + mark:<11} {one.size:>7} {one.date:%a %b %d %H:%M:%S}  {sender}"
        said = ""
        for to in one.recipients:
            if to.reason != said:
                said = to.reason
                text = said or "reason unavailable"
                yield " " * max(0, 76 - len(text)) + f"({text})"
            yield " " * 41 + to
        yield ""
    yield f"-- 1 Kbytes in {len(listed)} Requests."
    yield ""


def printed_by_j(listed: list[Listed]) -> Iterator[str]:
    """Print messages as ``postqueue -j`` does."""
    for one in listed:
        members = {
            "queue_name": one.status,
            "queue_id": one.qid,
            "arrival_time": int(one.date.timestamp()),
            "message_size": one.size,
            "forced_expire": one.forced_expire,
            "sender": one.sender or "MAILER-DAEMON",
            "recipients": [
                {"address": to} | ({"delay_reason": to.reason} if to.reason else {})
                for to in one.recipients
            ],
        }
        yield json.dumps(members, ensure_ascii=False)


@given(st.lists(messages, max_size=4))
def test_any_queue_is_read_as_it_was_printed(listed: list[Listed]) -> None:
    """Whatever senders, servers and recipients are called, both forms give back the queue."""
    assert facts(list(read_json(printed_by_j(listed)))) == facts(listed)
    if listed:
        assert facts(list(read_text(printed_by_p(listed), NOW))) == facts(listed)


@given(st.lists(st.one_of(st.text(), st.sampled_from(sample("listing.txt"))), max_size=12))
def test_no_text_raises_anything_else(lines: list[str]) -> None:
    """Any lines at all are read as -p, or refused as no listing."""
    with suppress(OutputCut):
        list(read_text(lines, NOW))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(st.sampled_from([*OBJECT, "address"]), inner)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(OBJECT)), values), st.text())
def test_no_object_raises_anything_else(members: dict[str, object], line: str) -> None:
    """Any object and any line at all are read as -j, or refused as no listing."""
    for lines in ([json.dumps(OBJECT | members)], [line], [json.dumps(members)]):
        with suppress(OutputCut):
            list(read_json(lines))


def test_hostile_lines_take_linear_time() -> None:
    """Megabytes of anything that nearly is a line of -p are read or refused at once."""
    for line in ("A" * 5_000_000, "A " * 2_000_000, "(" * 5_000_000, " " * 5_000_000 + "x"):
        for before in ([], [ENTRY]):
            with suppress(OutputCut):
                list(read_text([*before, line], NOW))
