"""``postoffice mailq`` and ``postoffice queues --all`` as an administrator meets them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len

from postoffice.cli.group import postoffice
from tests.postfix import ACCOUNT, Postfix, python_of_account, require_postfix
from tests.postfix_queue import (
    HOSTILE_ADDRESSES,
    HOSTILE_TEXT,
    configuration,
    emptied,
    letter,
    loaded,
    postsuper,
    wait_for_states,
)
from tests.sites import Site, mail
from tests.test_cli import CONTROLS

SAMPLES = Path(__file__).parent / "postfix_samples"


@pytest.fixture(scope="module")
def running() -> Iterator[Postfix]:
    """A Postfix that defers all mail."""
    require_postfix()
    with Postfix(configuration()) as postfix:
        yield postfix


@pytest.fixture
def postfix(running: Postfix) -> Postfix:
    """A Postfix with a held message and three that are deferred, a hostile one among them."""
    fill(emptied(running))
    return running


def fill(postfix: Postfix) -> None:
    """Send it the four messages."""
    postfix.send("a@example.org", ["b@down.test", "c@up.test"], letter("first", "X-Mark: yes"))
    postfix.send("bulk@example.org", ["b@down.test"], letter("second " + "y" * 3000))
    postfix.send("bulk@example.org", ["d@up.test"], letter("hold"))
    postfix.send("", HOSTILE_ADDRESSES, letter(f"hostile {HOSTILE_TEXT}"))
    wait_for_states(postfix, deferred=3, hold=1)


@pytest.fixture
def ini(postfix: Postfix, tmp_path: Path) -> Path:
    """The configuration that reaches it."""
    return write_ini(postfix, tmp_path)


def write_ini(postfix: Postfix, folder: Path, *more: str) -> Path:
    """Write a configuration that has nothing but how Postfix is reached."""
    path = folder / "postoffice.ini"
    lines = [
        "[postfix]",
        f"config_directory = {postfix.configuration}",
        f"spool_path = {postfix.queue_directory}",
        *more,
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(ini: Path, *words: str, answer: str | None = None) -> Result:
    """Run the command."""
    return CliRunner().invoke(postoffice, ["-C", str(ini), "mailq", *words], input=answer)


def done(ini: Path, *words: str) -> str:
    """Run the command, which is to succeed silently but for what it returns."""
    result = run(ini, *words)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def told(ini: Path, *words: str) -> Any:
    """Run the command for JSON, and read it."""
    return json.loads(done(ini, *words, "--json"))


def failed(ini: Path, status: int, *words: str) -> str:
    """Run the command, which is to end with this status and one line; return the line."""
    result = run(ini, *words)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("postoffice: ")
    return line


def senders(ini: Path, *words: str) -> list[str]:
    """Return the senders of what is selected, sorted."""
    return sorted(one["sender"] for one in told(ini, *words))


def states(postfix: Postfix) -> dict[str, list[object]]:
    """Return the states in which Postfix itself lists messages, by their senders."""
    found: dict[str, list[object]] = {}
    for message in postfix.queue().values():
        found.setdefault(str(message["sender"]), []).append(message["queue_name"])
    return {sender: sorted(names, key=str) for sender, names in found.items()}


# -- looking ---------------------------------------------------------------------------------------


def test_list(postfix: Postfix, ini: Path) -> None:
    """The table has a line for each message, and ends with their number and size."""
    lines = done(ini).splitlines()
    assert re.split(r"  +", lines[0]) == (
        ["id", "status", "age", "size", "sender", "recipients", "reason"]
    )
    assert {line.split()[0] for line in lines[1:-1]} == postfix.queue().keys()
    total = sum(mail.size for mail in loaded(postfix))
    assert lines[-1] == f"4 messages, {total / 1024:.1f} KB"
    (first,) = [line for line in lines if "a@example.org" in line]
    assert re.search(
        r" b@down\.test \+1 .* 127\.0\.0\.1\[127\.0\.0\.1\]:9: Connection refused$", first
    )
    (null,) = [line for line in lines if " <> " in line]
    assert " +4 " in null
    postsuper(postfix, "-e", [lines[1].split()[0]])
    assert "deferred, expired" in done(ini)


def test_list_as_json(postfix: Postfix, ini: Path) -> None:
    """The JSON agrees with what Postfix itself lists."""
    for one in told(ini, "list"):
        theirs = postfix.queue()[one["id"]]
        assert one["status"] == theirs["queue_name"]
        assert one["size"] == theirs["message_size"]
        assert one["forced_expire"] is theirs["forced_expire"]
        assert (one["sender"] or "MAILER-DAEMON") == theirs["sender"]
        assert datetime.fromisoformat(one["arrived"]).timestamp() == theirs["arrival_time"]
        assert [
            {"address": to["address"], **({"delay_reason": to["reason"]} if to["reason"] else {})}
            for to in one["recipients"]
        ] == theirs["recipients"]


def test_every_method_lists_the_same(postfix: Postfix, ini: Path) -> None:
    """By whichever method the queue is read, the same messages are listed."""
    expected = {one["id"]: one["size"] for one in told(ini)}
    for method in ("json", "postqueue", "spool"):
        assert {one["id"]: one["size"] for one in told(ini, "--method", method)} == expected


BULK = "bulk@example.org"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--status", "hold"], [BULK]),
        (["--status", "hold", "--status", "deferred"], ["", "a@example.org", BULK, BULK]),
        (["--sender", "BULK"], [BULK, BULK]),
        (["--sender", "<>"], [""]),
        (["--sender", "bulk", "--exact"], []),
        (["--sender", BULK, "--exact", "--status", "deferred"], [BULK]),
        (["--recipient", "@up.test"], ["a@example.org", BULK]),
        (["--recipient", "b@", "--recipient", "c@"], ["a@example.org"]),
        (["--error", "refused"], ["", "a@example.org", BULK]),
        (["--error", "no such reason"], []),
        (["--header", "x-mark:YES"], ["a@example.org"]),
        (["--header", "Subject: first", "--exact"], ["a@example.org"]),
        (["--header", "Subject:hostile \x1b[2J"], [""]),
        (["--older-than", "1h"], []),
        (["--newer-than", "1h", "--size", "2k.."], [BULK]),
        (["--size", "..2k"], ["", "a@example.org", BULK]),
        (["--size", "0..1"], []),
    ],
)
def test_selections(ini: Path, words: list[str], expected: list[str]) -> None:
    """Each option selects the messages that have what it asks for, and all have to agree."""
    assert senders(ini, *words) == expected


def test_selection_by_ids(postfix: Postfix, ini: Path) -> None:
    """Ids select messages; one that is not there is an error of one line."""
    one, other, *_ = postfix.queue()
    assert {mail["id"] for mail in told(ini, one, other)} == {one, other}
    assert told(ini, one, "--older-than", "1d") == []
    line = failed(ini, 69, one, "ABCDEF")
    assert line == "postoffice: no message ABCDEF in Postfix's queue"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--older-than", "soon"], "'soon' is no duration; write seconds, or 5m"),
        (["--size", "5k"], "'5k' is no range of sizes; write 10k..1m"),
        (["--size", "x.."], "'x' is no size"),
        (["--size", "5m..1k"], "write the smaller one first"),
        (["--older-than", "2h", "--newer-than", "1h"], "nothing is older than"),
        (["--size", "1..0"], "write the smaller one first"),
        (["--status", "corrupt", "--method", "json"], "--method spool has"),
        (["--status", "corrupt", "--from-file", "x"], "--method spool has"),
        (["--error", "x", "--method", "spool"], "hold no errors"),
        (["delete", "--status", "corrupt"], "postsuper does not act on what is corrupt"),
        (["--sender", ""], "the null sender is <>"),
        (["--header", "Subject"], "write NAME:TEXT"),
        (["--header", ": x"], "write NAME:TEXT"),
        (["--status", "gone"], "is not one of"),
        (["--from-file", "x", "--method", "json"], "--method asks our Postfix"),
        (["--from-file", "x", "--header", "A:b"], "--header asks our Postfix"),
        (["delete"], "say which messages"),
        (["delete", "--exact"], "say which messages"),
        (["delete", "--all", "--sender", "x"], "say which messages"),
        (["delete", "--all", "--from-file", "x"], "--from-file"),
        (["hold", "--all", "--method", "spool"], "--method"),
        (["show"], "Missing argument"),
    ],
)
def test_wrong_command_lines(ini: Path, words: list[str], said: str) -> None:
    """What cannot be meant is refused with what would be right, and status 2."""
    result = run(ini, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())


def test_summary(ini: Path) -> None:
    """The summary counts states, sizes, senders, domains and errors, of what is selected."""
    text = done(ini, "summary")
    assert text.startswith("messages    4\nstates      deferred 3, hold 1, active 0\n")
    for line in ("       2  bulk@example.org", "       1  <>", "         7  down.test"):
        assert line in text.splitlines()
    summary = told(ini, "summary", "--sender", "bulk")
    assert summary["total_mails"] == 2
    assert summary["top_senders"] == [["bulk@example.org", 2]]
    assert told(ini, "summary")["top_status"] == [["deferred", 3], ["hold", 1], ["active", 0]]
    assert done(ini, "summary", "--size", "9g..").startswith("messages    0\n")


def test_show(postfix: Postfix, ini: Path) -> None:
    """A message is shown with its envelope, the reason for each recipient, and its headers."""
    (one,) = told(ini, "--sender", "a@")
    lines = done(ini, "show", one["id"]).splitlines()
    assert lines[0] == f"Queue ID:   {one['id']}"
    (recipient,) = [line for line in lines if line.startswith("Recipient:  c@up.test (")]
    assert recipient.endswith("connect to 127.0.0.1[127.0.0.1]:9: Connection refused)")
    at = lines.index("To: bob@example.com")
    assert lines[at + 1 : at + 3] == ["Subject: first", "X-Mark: yes"]
    (shown,) = told(ini, "show", one["id"])
    assert {name: shown[name] for name in one} == one
    assert (shown["headers"]["Subject"], shown["fault"]) == (["first"], None)
    assert failed(ini, 69, "show", "ABCDEF") == "postoffice: no message ABCDEF in Postfix's queue"


def test_age_is_that_of_qshape(postfix: Postfix, ini: Path) -> None:
    """The table of ages has the numbers of Postfix's own qshape."""
    for by, option in (("recipient", []), ("sender", ["-s"])):
        qshape = subprocess.run(
            ["/usr/sbin/qshape", *option, "-c", postfix.configuration, "deferred", "hold"],
            capture_output=True,
            text=True,
            check=True,
        )
        theirs = [line.split() for line in qshape.stdout.splitlines() if line.strip()]
        ours = [line.split() for line in done(ini, "age", "--by", by).splitlines()]
        assert ours[0][1:] == theirs[0]
        expected = {row[0].replace("MAILER-DAEMON", "<>"): row[1:] for row in theirs[1:]}
        assert {row[0]: row[1:] for row in ours[1:]} == expected
        rows = told(ini, "age", "--by", by)
        assert {row["domain"]: row["total"] for row in rows} == {
            domain: int(row[0]) for domain, row in expected.items() if domain != "TOTAL"
        }


def test_ages(tmp_path: Path) -> None:
    """Each message counts in the column of its age, at its limits too."""
    now = int(time.time())
    ages = [0, 4, 5, 9, 10, 79, 80, 1279, 1280, 99999]
    file = tmp_path / "queue.json"
    with file.open("w") as written:
        for number, minutes in enumerate(ages):
            # Far enough from a limit for a slow machine.
            arrival = now - minutes * 60 - (30 if minutes in (4, 9, 79, 1279) else 1)
            facts = {
                "queue_name": "deferred",
                "queue_id": f"ABCDEF{number}",
                "arrival_time": arrival,
                "message_size": 1,
                "forced_expire": False,
                "sender": "a@b.example",
                "recipients": [{"address": "x@y.example"}],
            }
            written.write(json.dumps(facts) + "\n")
    empty = tmp_path / "postoffice.ini"
    empty.write_text("")
    (row,) = told(empty, "age", "--from-file", str(file))
    assert list(row["ages"].values()) == [2, 2, 1, 0, 1, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("name", ["listing.json", "listing.txt"])
def test_from_file(tmp_path: Path, name: str) -> None:
    """What another machine has printed is listed, without any Postfix and any configuration."""
    (tmp_path / "postoffice.ini").write_text("[postfix]\nlist_queue = /nowhere/postqueue\n")
    ini = tmp_path / "postoffice.ini"
    file = str(SAMPLES / name)
    mails = told(ini, "--from-file", file)
    assert mails
    assert told(ini, "summary", "--from-file", file)["total_mails"] == len(mails)
    (shown,) = told(ini, "show", mails[0]["id"], "--from-file", file)
    assert shown["headers"] == {}
    assert mails[0]["id"] in done(ini, "show", mails[0]["id"], "--from-file", file)


def test_from_standard_input() -> None:
    """What another machine prints is read from a pipe, by the name of a dash."""
    words = [sys.executable, "-m", "postoffice.cli", "mailq", "summary", "--from-file", "-"]
    for name in ("listing.json", "listing.txt"):
        piped = subprocess.run(
            words, input=(SAMPLES / name).read_bytes(), capture_output=True, check=False
        )
        assert (piped.returncode, piped.stderr) == (0, b"")
        assert piped.stdout.startswith(b"messages    8\n")


def test_domains_of_odd_addresses(tmp_path: Path) -> None:
    """An address without a domain stands for itself in the table of ages, and has none to sum."""
    facts = json.loads((SAMPLES / "listing.json").read_text().splitlines()[0])
    facts["recipients"] = [{"address": one} for one in ("root", "a@", "b@X.test", "c@x.test")]
    file = tmp_path / "listing"
    file.write_text(json.dumps(facts))
    ini = tmp_path / "postoffice.ini"
    ini.write_text("")
    rows = told(ini, "age", "--from-file", str(file))
    assert {row["domain"]: row["total"] for row in rows} == {"root": 1, "a@": 1, "x.test": 2}
    assert told(ini, "summary", "--from-file", str(file))["top_recipient_domains"] == [
        ["x.test", 2]
    ]
    text = done(ini, "summary", "--from-file", str(file))
    assert "recipients  recipient domains (1)\n         2  x.test\n" in text


def test_files_that_are_none(tmp_path: Path) -> None:
    """A file that is not there, is no listing, or is cut, is an error of one line each."""
    ini = tmp_path / "postoffice.ini"
    ini.write_text("")
    assert failed(ini, 66, "--from-file", "/no/such\x1b") == (
        r"postoffice: /no/such\x1b: No such file or directory"
    )
    cut = tmp_path / "cut"
    cut.write_bytes((SAMPLES / "listing.txt").read_bytes()[:-40])
    failed(ini, 75, "--from-file", str(cut))
    cut.write_bytes(b"\x1b[2Jhello\n")
    assert not CONTROLS.search(failed(ini, 75, "--from-file", str(cut)))


def test_empty_queue(running: Postfix, tmp_path: Path) -> None:
    """An empty queue is said to be empty."""
    ini = write_ini(emptied(running), tmp_path)
    assert done(ini) == "Postfix's queue is empty\n"
    assert told(ini) == []
    assert done(ini, "age").splitlines()[1].split() == ["TOTAL", *["0"] * 11]
    assert done(ini, "delete", "--all", "--yes") == "no message is to be deleted\n"


def test_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration is needed; a broken one of another section is no obstacle."""
    monkeypatch.chdir(tmp_path)
    file = str(SAMPLES / "listing.json")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "postoffice")])
    assert CliRunner().invoke(postoffice, ["mailq", "--from-file", file]).exit_code == 0
    (tmp_path / "postoffice.ini").write_text("[post office]\nnonsense = 1\n")
    assert CliRunner().invoke(postoffice, ["mailq", "--from-file", file]).exit_code == 0
    (tmp_path / "postoffice.ini").write_text("[postfix]\nnonsense = 1\n")
    assert CliRunner().invoke(postoffice, ["mailq", "--from-file", file]).exit_code == 2


# -- terminals -------------------------------------------------------------------------------------


def on_terminal(*words: str) -> str:
    """Run the command on a terminal of 80 columns, and return what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "", "LINES": ""}
    environment = {name: value for name, value in environment.items() if value}
    with subprocess.Popen(
        [sys.executable, "-m", "postoffice.cli", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        close_fds=True,
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:
            # Linux says so when the other end is closed.
            pass
        assert process.wait() == 0, written
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def test_tables_fit_a_terminal(ini: Path) -> None:
    """On a terminal of 80 columns no line is longer, and every column is there."""
    for words in ([], ["age"], ["summary"], ["hold", "--all", "--dry-run"]):
        text = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal("-C", str(ini), "mailq", *words))
        assert max(cell_len(line) for line in text.splitlines()) <= 80, text
        assert not CONTROLS.search(text)
    text = on_terminal("-C", str(ini), "mailq")
    for heading in ("id", "status", "age", "size", "sender", "recipients", "reason"):
        assert heading in text


def test_nothing_of_a_message_reaches_a_terminal_as_it_is(ini: Path) -> None:
    """Whatever a message holds, output is printable text, as a table and as JSON."""
    (hostile,) = told(ini, "--sender", "<>")
    for words in ([], ["summary"], ["show", hostile["id"]], ["age"]):
        for options in ([], ["--json"]):
            assert not CONTROLS.search(done(ini, *words, *options))
    assert r"hostile \x1b[2J\x1b]0;own\x07" in done(ini, "show", hostile["id"])


# -- acting ----------------------------------------------------------------------------------------


def test_acting_asks_first(postfix: Postfix, ini: Path) -> None:
    """Nothing is done without a yes, and the question has the number of messages."""
    before = postfix.queue()
    for answer in ("n\n", "\n", ""):
        result = run(ini, "delete", "--sender", "bulk", answer=answer)
        assert result.exit_code == 1
        assert "Delete 2 messages in Postfix's queue (" in result.stderr
        assert ", from 1 sender)? [y/N]" in result.stderr
        assert "nothing was d" in result.stderr
        assert postfix.queue() == before
    result = run(ini, "delete", "--sender", "bulk", answer="y\n")
    assert (result.exit_code, result.stdout) == (0, "2 messages deleted\n")
    assert states(postfix).keys() == {"a@example.org", "MAILER-DAEMON"}


def test_dry_run(postfix: Postfix, ini: Path) -> None:
    """A dry run lists what would be done, and does nothing."""
    before = postfix.queue()
    for action, words, count in (
        ("hold", "3 messages would be held", 3),
        ("release", "1 message would be released", 1),
        ("requeue", "4 messages would be requeued", 4),
        ("delete", "4 messages would be deleted", 4),
        ("expire", "4 messages would be expired", 4),
    ):
        lines = done(ini, action, "--all", "--dry-run").splitlines()
        assert lines[-1] == words
        assert len(lines) == count + 2
    assert postfix.queue() == before


def test_each_action(postfix: Postfix, ini: Path) -> None:
    """Each action does with the selected messages what Postfix then lists, and with no others."""
    assert done(ini, "hold", "--sender", "a@", "--yes") == "1 message held\n"
    expected = {
        "a@example.org": ["hold"],
        "bulk@example.org": ["deferred", "hold"],
        "MAILER-DAEMON": ["deferred"],
    }
    assert states(postfix) == expected
    assert done(ini, "hold", "--sender", "a@", "--yes") == "no message is to be held\n"
    assert done(ini, "release", "--sender", "a@", "--yes") == "1 message released\n"
    assert states(postfix) == {**expected, "a@example.org": ["deferred"]}
    (qid,) = [one["id"] for one in told(ini, "--sender", "<>")]
    assert done(ini, "expire", qid, "--yes") == "1 message expired\n"
    assert [q for q, one in postfix.queue().items() if one["forced_expire"]] == [qid]
    assert done(ini, "requeue", "--header", "Subject:first", "--yes") == "1 message requeued\n"
    postfix.sendmail("e@example.org", ["e@down.test"], letter("e"))
    wait_for_states(postfix, deferred=4, hold=1)
    assert done(ini, "delete", "--all", "--yes") == "5 messages deleted\n"
    assert postfix.queue() == {}


def test_an_id_that_is_not_there_stops_the_action(postfix: Postfix, ini: Path) -> None:
    """With an id that is not there nothing is done to the others."""
    before = postfix.queue()
    line = failed(ini, 69, "delete", next(iter(before)), "ABCDEF", "--yes")
    assert line == "postoffice: no message ABCDEF in Postfix's queue"
    assert postfix.queue() == before


def test_messages_that_leave_before_the_action(tmp_path: Path) -> None:
    """A command that can do nothing of what it was to do says so, and its status is 75."""
    line = (
        '{"queue_name":"deferred","queue_id":"ABCDEF12","arrival_time":1750000000,'
        '"message_size":9,"sender":"a@b.test","recipients":[{"address":"c@d.test"}]}'
    )
    command = tmp_path / "postqueue"
    # What is asked again finds the queue empty.
    command.write_text(f"#!/bin/sh\n[ -e {tmp_path}/asked ] || echo '{line}'\n>{tmp_path}/asked\n")
    command.chmod(0o755)
    ini = tmp_path / "postoffice.ini"
    ini.write_text(f"[postfix]\nlist_queue = {command}\n")
    result = run(ini, "hold", "ABCDEF12", "--yes")
    assert (result.exit_code, result.stdout) == (75, "0 messages held\n")
    assert result.stderr == "postoffice: 1 message left the queue before: ABCDEF12\n"


def test_corrupt_mail_is_found(postfix: Postfix, ini: Path) -> None:
    """Mail in corrupt, which no listing has, is listed when that state is asked for."""
    assert done(ini, "--status", "corrupt") == "no message is selected\n"
    (one,) = told(ini, "--status", "hold")
    corrupt = postfix.queue_directory / "corrupt"
    copy = corrupt / "C0FFEE"
    shutil.copy(postfix.queue_directory / "hold" / one["id"], copy)
    try:
        (found,) = told(ini, "--status", "corrupt")
        assert (found["id"], found["sender"]) == ("C0FFEE", one["sender"])
        assert told(ini, "age", "--status", "corrupt")[0]["total"] == 1
    finally:
        copy.unlink()


# -- what goes wrong -------------------------------------------------------------------------------


def test_postfix_is_not_there(tmp_path: Path) -> None:
    """Without Postfix one line says so, with status 69."""
    ini = tmp_path / "postoffice.ini"
    ini.write_text("[postfix]\nlist_queue = /nowhere/postqueue\n")
    for words in ([], ["summary"], ["delete", "--all", "--yes"]):
        assert "no command /nowhere/postqueue; install Postfix" in failed(ini, 69, *words)


def test_postfix_is_stopped(postfix: Postfix, ini: Path) -> None:
    """A stopped Postfix is listed all the same, with a line that says so."""
    before = senders(ini)
    postfix.stop()
    try:
        result = run(ini, "--json")
        assert result.exit_code == 0
        assert result.stderr == (
            "postoffice: the mail system is down: its queue was read without it\n"
        )
        assert sorted(one["sender"] for one in json.loads(result.stdout)) == before
    finally:
        postfix.start()


def test_postfix_was_never_started(tmp_path: Path) -> None:
    """Root, who cannot read a Postfix without its directories either, is not sent to root."""
    require_postfix()
    postfix = Postfix()
    try:
        line = failed(write_ini(postfix, tmp_path), 75)
        assert line.endswith("; the mail system is down: start it (postfix start)")
    finally:
        postfix.remove()


def test_output_that_is_cut(tmp_path: Path) -> None:
    """A listing that ends in the middle is an error of one line."""
    command = tmp_path / "postqueue"
    command.write_text(f"#!/bin/sh\nhead -c 900 {SAMPLES}/listing.json\n")
    command.chmod(0o755)
    ini = tmp_path / "postoffice.ini"
    ini.write_text(f"[postfix]\nlist_queue = {command}\n")
    assert failed(ini, 75)


def test_without_the_right(postfix: Postfix) -> None:
    """Who has no right is told so in one line, with status 77."""
    become = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={os.getgid()}", "--clear-groups"]
    # Where everybody may go, other than to pytest's own folders.
    ini = write_ini(postfix, postfix.folder)
    words = ["-C", str(ini), "mailq", "--header", "A:b", "--method", "spool"]
    run = subprocess.run(
        [*become, *python_of_account(), "-m", "postoffice.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert (run.returncode, run.stdout) == (77, ""), run.stderr
    assert run.stderr.count("\n") == 1
    assert "reading the queue directories needs root" in run.stderr


# -- queues --all ----------------------------------------------------------------------------------


@pytest.fixture
def site(postfix: Postfix, tmp_path: Path) -> Site:
    """A site with two queues beside this Postfix."""
    made = Site(tmp_path / "site")
    lines = write_ini(postfix, tmp_path).read_text()
    made.ini.write_text(made.ini.read_text() + lines)
    return made


def test_queues_with_all_stages(postfix: Postfix, site: Site) -> None:
    """The Postfix queue and the Maildir stand above the queues, in the table and in JSON."""
    site.deliver(mail("one"), mail("two"))
    site.done()
    site.deliver(mail("three"))
    found = site.json("queues", "--all")
    assert found["queues"] == site.json("queues")
    assert found["daemon"] is None
    oldest = min(int(str(one["arrival_time"])) for one in postfix.queue().values())
    assert found["postfix"].pop("states") == {"deferred": 3, "hold": 1}
    moment = datetime.fromisoformat(found["postfix"].pop("oldest"))
    assert moment.timestamp() == oldest
    assert found["postfix"] == {"messages": 4, "fault": None}
    assert (found["maildir"]["messages"], found["maildir"]["fault"]) == (1, None)
    assert datetime.fromisoformat(found["maildir"]["oldest"]).timestamp() == 1_750_000_003
    lines = site.done("queues", "--all").splitlines()
    assert re.split(r"  +", lines[0]) == ["before the queues", "messages", "oldest", "of these"]
    assert re.match(r"Postfix queue +4 +\d+ s  3 deferred, 1 hold$", lines[1])
    assert re.match(r"Maildir +1 +\d+ d$", lines[2])
    assert lines[3:] == ["", "daemon: not running", "", *site.done("queues").splitlines()]


def test_queues_with_stages_that_cannot_be_had(site: Site) -> None:
    """A Postfix and a Maildir that are not there are a line each, and nothing else changes."""
    site.deliver(mail("one"))
    site.done()
    site.ini.write_text(site.ini.read_text() + "list_queue = /nowhere/postqueue\n")
    (site.maildir / "new").rename(site.maildir / "newer")
    text = site.done("queues", "--all")
    assert "Postfix queue: there is no command /nowhere/postqueue" in text
    assert f"Maildir: there is no folder {site.maildir}/new yet" in text
    assert text.endswith(site.done("queues"))
    found = site.json("queues", "--all")
    assert found["postfix"]["messages"] is found["maildir"]["messages"] is None
    assert "/nowhere/postqueue" in found["postfix"]["fault"]
    assert len(found["queues"]) == 2


def test_queues_with_a_depot_that_cannot_be_had(site: Site) -> None:
    """Without a depot the stages before it are shown, and the status is what it would be."""
    without = site.run("queues")
    for options in ([], ["--json"]):
        result = site.run("queues", "--all", *options)
        assert (result.exit_code, result.stderr) == (69, without.stderr)
        assert "deferred" in result.stdout
    found = json.loads(result.stdout)
    assert found["queues"] is None
    assert "there is no database" in found["fault"]
