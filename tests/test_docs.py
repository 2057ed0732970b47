"""The documents: what they show runs, and what they list is all that there is."""

from __future__ import annotations

import ast
import configparser
import doctest
import io
import itertools
import os
import re
import shlex
import socketserver
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from email.message import Message as AnyMessage
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import click
import pytest
from pyramid.request import Request
from ZODB.POSException import ConflictError
from zope.interface import implementer

import postoffice
from postoffice import config, exceptions, filters, headers, interfaces, message, mime, routing
from postoffice.api import PostOffice
from postoffice.cli.group import postoffice as command
from postoffice.config.rules import QUEUE_OPTIONS
from postoffice.database import open_database
from postoffice.delivery import Intake
from postoffice.depot.history import Throttles
from postoffice.depot.queue import QueueRecord
from postoffice.expressions import MATCH_LIMIT
from postoffice.intake.reading import LONGEST_SECONDS
from postoffice.queue import Queue
from tests.test_structure import RANK

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The words of the folder in examples; a test puts its own in their place.
PLACE = "/srv/postoffice"


# -- what a page shows -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code on a page.

    :ivar line: number of its first line in the page.
    :ivar options: of the directive: ``name``, ``caption``, ``class``.
    """

    page: str
    line: int
    language: str
    text: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where to find it."""
        return f"{self.page}:{self.line}"


_DIRECTIVE = re.compile(r"( *)\.\. code-block:: (\S+)$")
_OPTION = re.compile(r" +:(\w+): *(.*)$")


def page_text(name: str) -> str:
    """Return the source of a page."""
    return (DOCS / f"{name}.rst").read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of code on a page, in order."""
    found = []
    lines = page_text(page).split("\n")
    for number, line in enumerate(lines):
        directive = _DIRECTIVE.match(line)
        if directive is None:
            continue
        at, options = number + 1, {}
        while option := _OPTION.match(lines[at]):
            options[option[1]] = option[2]
            at += 1
        start = at + 1
        indent = len(directive[1]) + 3
        deeper = " " * indent
        code = []
        for one in lines[start:]:
            if one.strip() and not one.startswith(deeper):
                break
            code.append(one[indent:])
        text = "\n".join(code).rstrip("\n") + "\n"
        found.append(Block(page, start + 1, directive[2], text, options))
    return found


PAGES = sorted(path.stem for path in DOCS.glob("*.rst"))
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(name: str) -> Block:
    """Return the block that has this name."""
    (block,) = [block for block in BLOCKS if block.options.get("name") == name]
    return block


def captioned(caption: str) -> Block:
    """Return the block that is the file of this name."""
    (block,) = [block for block in BLOCKS if block.options.get("caption") == caption]
    return block


def by_place(block: Block) -> str:
    """Return what a block is called among the tests."""
    return block.place


def terms(page: str, name: str) -> dict[str, str]:
    """Return the terms of a list between ``NAME-begin`` and ``NAME-end``, each with its text."""
    text = page_text(page).partition(f".. {name}-begin")[2].partition(f".. {name}-end")[0]
    found = re.findall(r"^``(.+)``\n((?: {3}.*\n|\n)+)", text, re.MULTILINE)
    return {term: " ".join(meaning.split()) for term, meaning in found}


# -- the world that examples run in ----------------------------------------------------------------

INI = """\
[post office]
zodb_uri = file://%(here)s/depot.fs?blobstorage_dir=%(here)s/blobs
maildir = %(here)s/Maildir

[queue:billing]
filters =
    to_hostname: billing.example.com
[queue:support]
filters =
    to_hostname: example.com
"""


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail by SMTP, and keeps it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.taken: list[tuple[str, list[str], AnyMessage]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Session(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        sender, recipients = "", []
        self._say("220 mail")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"MAIL":
                sender = _angled(line)
            elif verb == b"RCPT":
                recipients.append(_angled(line))
            elif verb == b"DATA":
                self._say("354 go on")
                data = b"".join(iter(self.rfile.readline, b".\r\n"))
                mail = BytesParser().parsebytes(data.replace(b"\r\n..", b"\r\n."))
                self.server.taken.append((sender, recipients, mail))
            self._say("221 bye" if verb == b"QUIT" else "250 ok")
            if verb == b"QUIT":
                break

    def _say(self, text: str) -> None:
        self.wfile.write(text.encode("ascii") + b"\r\n")


def _angled(line: bytes) -> str:
    return line.decode("ascii").partition("<")[2].partition(">")[0]


def _mail(queue: str, subject: str) -> message.Message:
    address = "support@example.com" if queue == "support" else "in@billing.example.com"
    raw = f"From: ann@example.org\nTo: {address}\nSubject: {subject}\n\nHello\n"
    envelope = message.Envelope("ann@example.org", (address,), time.time_ns())
    return message.Message.from_bytes(raw.encode(), envelope=envelope)


class World:
    """A depot with two queues, and whatever else the examples speak of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "postoffice.ini").write_text(INI)
        self.uri = config.load(folder / "postoffice.ini").zodb_uri
        self.mail_server = MailServer()
        self.processed: list[str] = []
        self.printed = ""
        self.rounds = itertools.count()
        with self.post_office() as post_office:
            post_office.reconcile_queues()
        self.names: dict[str, Any] = {
            "__name__": __name__,
            "uri": self.uri,
            "process": self.process,
            "stopping": lambda: next(self.rounds) == 5,
            "mail_host": "127.0.0.1",
            "mail_port": self.mail_server.server_address[1],
            "outgoing": str(folder / "outgoing"),
            "lines": [],
        }

    def close(self) -> None:
        self.mail_server.close()

    def post_office(self) -> PostOffice:
        return PostOffice(self.folder / "postoffice.ini")

    def process(self, message: AnyMessage) -> None:
        """Fail on messages with the subject "broken"."""
        if message["Subject"] == "broken":
            raise LookupError("no such customer")
        self.processed.append(message["Subject"])

    def fill(self) -> None:
        """Have three messages be in each queue, and nothing else."""
        with self.post_office() as post_office, post_office.connection() as connection:
            for name in post_office.settings.queue_names:
                queue = Queue(post_office.folder(connection).get(name))
                queue.requeue_quarantined_messages()
                queue.give_all_back()
                connection.transaction_manager.commit()
                connection.transaction_manager.begin()
                while queue:
                    queue.pop_next()
                for subject in ("first", "broken", "last"):
                    queue.add(_mail(name, subject))
            connection.transaction_manager.commit()
        self.rounds = itertools.count()
        self.processed.clear()
        self.mail_server.taken.clear()

    def run(self, block: Block) -> None:
        """Run a block with the names that those before it have defined."""
        output = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, f"docs/{block.page}.rst", "exec")
        with redirect_stdout(output):
            exec(code, self.names)  # noqa: S102  # it is our own page
        self.printed = output.getvalue()

    def held(self, name: str) -> tuple[list[str], list[str]]:
        """Return the subjects of what waits in a queue, and of what is in its quarantine."""
        with self.post_office() as post_office, post_office.queue(name) as queue:
            return (
                [entry.subject for entry in queue.entries()],
                [entry.subject for entry in queue.entries(state="quarantined")],
            )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A depot with two queues."""
    with closing(World(tmp_path)) as made:
        yield made


# -- what the examples come to ---------------------------------------------------------------------


def all_is_processed(world: World) -> None:
    assert world.processed == ["first", "last"]
    assert world.held("billing") == ([], ["broken"])


def fails_are_deferred(world: World) -> None:
    assert world.processed == ["first", "last"]
    assert world.held("billing") == (["broken"], [])
    with world.post_office() as post_office, post_office.queue("billing") as queue:
        (entry,) = queue.entries()
        assert entry.not_before > time.time_ns()


def takes_the_first(world: World) -> None:
    assert world.processed == ["first"]
    assert world.held("support")[0] == ["broken", "last"]


def names_the_queues(world: World) -> None:
    assert world.printed == named("no-queue-output").text


def serves_requests(world: World) -> None:
    app = world.names["app"]
    assert Request.blank("/next").get_response(app).text == "first"
    with pytest.raises(LookupError):
        Request.blank("/next").get_response(app)
    tries: list[AnyMessage] = []

    def conflict_at_first(message: AnyMessage) -> None:
        tries.append(message)
        if len(tries) == 1:
            raise ConflictError("somebody else was quicker")

    world.names["process"] = conflict_at_first
    found = [Request.blank("/next").get_response(app).text for _ in range(3)]
    assert found == ["broken", "last", "no bills"]
    assert len(tries) == 3
    world.names["process"] = world.process
    for database in app.registry._zodb_databases.values():
        database.close()


def says_what_it_is(world: World) -> None:
    compared = 0
    for line in named("message").text.splitlines():
        code, _, remark = line.partition("  #")
        shown = remark.partition(";")[0].strip()
        if shown.startswith(("(", '"')):
            assert eval(code, world.names) == ast.literal_eval(shown), line  # noqa: S307  # ours
            compared += 1
    assert compared == 4
    one = world.names["message"]
    assert one["X-Postoffice-Id"] == str(one.id)
    assert one["Subject"] == "first"


def tells_marked_messages(world: World) -> None:
    wants = world.names["wants"]
    assert wants(message.Message.from_bytes(b"Subject: x\n\n"))
    own = [("X-Postoffice-Rejected", "Throttled")]
    assert not wants(message.Message.from_bytes(b"Subject: x\n\n", own))


def sends_a_notice(world: World) -> None:
    ((sender, recipients, notice),) = world.mail_server.taken
    assert (sender, recipients) == ("", ["ann@example.org"])
    assert notice["X-Postoffice"] == "Bounced"
    assert world.held("support")[0] == ["broken", "last"]


def queues_a_notice(world: World) -> None:
    (path,) = (world.folder / "outgoing" / "new").iterdir()
    assert b"X-Postoffice: Bounced" in path.read_bytes()


def puts_back(world: World) -> None:
    assert world.printed.startswith("1 in quarantine\n")
    assert world.printed.endswith(" first  no such customer\n")
    assert world.held("support") == (["broken", "last", "first"], [])
    assert len(world.mail_server.taken) == 1


def removes_nothing(world: World) -> None:
    assert world.printed.splitlines()[:3] == ["first", "broken", "last"]
    assert world.names["next_page"] == world.names["failed"] == []
    assert world.held("support")[0] == ["first", "broken", "last"]


def adds_one(world: World) -> None:
    assert world.held("support")[0][-1] == "Question"


def hears_of_it(world: World) -> None:
    ((_, _, kind, reason),) = world.names["lines"]
    assert (kind, reason) == ("taken", "taken")


OUTCOMES: dict[str, Callable[[World], None]] = {
    "one-minute": all_is_processed,
    "loop": all_is_processed,
    "consumer": fails_are_deferred,
    "retry": takes_the_first,
    "claim": all_is_processed,
    "no-queue": names_the_queues,
    "pyramid": serves_requests,
    "message": says_what_it_is,
    "wanted": tells_marked_messages,
    "bounce": sends_a_notice,
    "bounce-repoze": queues_a_notice,
    "quarantine": puts_back,
    "looking": removes_nothing,
    "several": all_is_processed,
    "adding": adds_one,
    "sink": hears_of_it,
}


def examples_of(page: str) -> list[Block]:
    """Return the examples of a page that are no files."""
    return [
        block
        for block in BLOCKS
        if block.page == page and block.language == "python" and "caption" not in block.options
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)])
def test_examples_do_what_they_say(world: World, page: str) -> None:
    """Each example runs after those before it on its page, and does what the page says."""
    for block in examples_of(page):
        world.fill()
        world.run(block)
        if "name" in block.options:
            OUTCOMES[block.options["name"]](world)


def test_outcomes_are_of_examples() -> None:
    """Each outcome is that of an example, and each example with a name has one."""
    assert OUTCOMES.keys() == {
        block.options["name"]
        for block in BLOCKS
        if block.language == "python" and "name" in block.options
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page != "commands"])
def test_sessions_show_what_comes_out(page: str) -> None:
    """What stands below >>> is what comes out."""
    outcome = doctest.testfile(str(DOCS / f"{page}.rst"), module_relative=False, encoding="utf-8")
    assert not outcome.failed


def test_the_tests_of_an_application_pass(tmp_path: Path) -> None:
    """The tests that an application could have pass."""
    (tmp_path / "test_bills.py").write_text(captioned("test_bills.py").text)
    # Plugins of ours are no part of what an application has, and slow to load.
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in run.stdout, run.stdout


def test_a_filter_of_another_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of the example offers its filter, and the configuration uses it."""
    (tmp_path / "ticketing.py").write_text(captioned("ticketing.py").text)
    project = tomllib.loads(captioned("pyproject.toml").text)["project"]
    information = tmp_path / "ticketing-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {project['name']}\nVersion: 1.0\n")
    points = configparser.ConfigParser()
    points.read_dict(project["entry-points"])
    with (information / "entry_points.txt").open("w") as file:
        points.write(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ticketing", None)
    del sys.modules["ticketing"]
    settings = config.load(write_ini(named("own-filter"), tmp_path))

    def decide(name: str) -> routing.Decision:
        raw = (
            "From: a@example.org\nTo: b@example.com\n"
            f'Content-Disposition: attachment; filename="{name}"\n\n'
        )
        return routing.route(settings.routing, message.Message.from_bytes(raw.encode()))

    assert decide("Bill.PDF").detail == "attachment: pdf csv matches bill.pdf"
    assert decide("Bill.doc").reason == "no-queue"


# -- the configuration -----------------------------------------------------------------------------


def write_ini(block: Block, folder: Path) -> Path:
    """Write an example of a configuration, with what it leaves out, and the files of its page."""
    for name in ("var", "incoming"):
        (folder / name).mkdir(exist_ok=True)
    for other in BLOCKS:
        caption = other.options.get("caption", "")
        if other.page == block.page and other.language == "text" and "." in caption:
            (folder / caption).write_text(other.text)
    text = block.text
    if "[post office]" not in text:
        text = f"[post office]\n\n{text}"
    for line in INI.splitlines()[1:3]:
        if line.partition(" ")[0] not in text:
            text = text.replace("[post office]\n", f"[post office]\n{line}\n")
    # What is Postfix's need not be here.
    text = text.replace("unix:/var/spool/postfix/postoffice/", f"unix:{folder}/var/")
    path = folder / "postoffice.ini"
    path.write_text(text.replace(PLACE, str(folder)), encoding="utf-8")
    return path


def configurations(*, refused: bool) -> list[Block]:
    """Return the examples of configurations that cannot, or can, be used."""
    return [
        block
        for block in BLOCKS
        if block.language == "ini"
        and "caption" not in block.options
        and block.options.get("name") != "own-filter"
        and (block.options.get("class") == "refused") is refused
    ]


@pytest.mark.parametrize("block", configurations(refused=False), ids=by_place)
def test_configurations_can_be_used(block: Block, tmp_path: Path) -> None:
    """Each example of a configuration is one that postoffice takes."""
    settings = config.load(write_ini(block, tmp_path))
    assert [one for one in settings.warnings if "no queue" not in one] == []


@pytest.mark.parametrize("block", configurations(refused=True), ids=by_place)
def test_refusals_are_shown_in_full(block: Block, tmp_path: Path) -> None:
    """A configuration that is shown with an error has just that error."""
    said = next(
        other
        for other in BLOCKS
        if other.page == block.page and other.line > block.line and other.language == "text"
    )
    with pytest.raises(exceptions.ConfigurationError) as caught:
        config.load(write_ini(block, tmp_path))
    assert str(caught.value) == " ".join(said.text.replace(PLACE, str(tmp_path)).split())


def test_a_locked_database_says_what_is_shown(tmp_path: Path) -> None:
    """What a locked database says is what the page on storages shows."""
    (said,) = [block for block in BLOCKS if "is locked by" in block.text]
    (tmp_path / "var").mkdir()
    uri = f"file://{tmp_path}/var/depot.fs?blobstorage_dir={tmp_path}/var/blobs"
    with closing(open_database(uri)), pytest.raises(exceptions.DepotUnavailable) as caught:
        open_database(uri)
    text = str(caught.value).replace(str(tmp_path), PLACE)
    mine = "process 4711 (python billing.py); a file"
    text = re.sub(r"process \d+ \(.*\); a file", mine, text)
    assert f"postoffice: {text}".split() == said.text.split()


def test_logging_is_set_up_as_shown(tmp_path: Path) -> None:
    """The example of logging sections is what the standard library takes."""
    (block,) = [block for block in BLOCKS if "[loggers]" in block.text]
    ini = write_ini(block, tmp_path)
    program = (
        "import logging, sys; from postoffice import config;"
        "assert config.set_up_logging(config.load(sys.argv[1]));"
        "logging.getLogger('postoffice').info('hello')"
    )
    subprocess.run([sys.executable, "-c", program, str(ini)], check=True)
    assert (tmp_path / "import.log").read_text().endswith(" INFO hello\n")


def test_each_option_has_its_entry() -> None:
    """The options that the reference has are those that postoffice knows."""
    found = re.findall(r"^\.\. confval:: (\w+)$", page_text("configuration"), re.MULTILINE)
    assert found == [*config.MAIN_OPTIONS, *QUEUE_OPTIONS]


def test_each_filter_has_its_entry() -> None:
    """The filters that are described are those that postoffice has."""
    found = re.findall(r"^\.\. object:: (\w+):", page_text("routing"), re.MULTILINE)
    assert sorted(found) == sorted(filters.FACTORIES)


# -- lists -----------------------------------------------------------------------------------------


def test_reasons_and_marks_are_listed() -> None:
    """The lists of reasons and of marks are those of the program, with the same meanings."""
    assert terms("routing", "reasons") == routing.REASONS
    assert terms("routing", "marks") == routing.MARKS


@implementer(interfaces.IEventSink)
class _Pairs:
    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()

    def record(self, event: interfaces.Event) -> None:
        self.found.add((event.kind, event.reason))


def test_events_are_listed_with_their_reasons(world: World) -> None:
    """The kinds of events that are listed are all that there are, each with its reasons."""
    sink = _Pairs()
    world.fill()
    with world.post_office() as post_office, post_office.connection() as connection:
        queue = Intake(post_office.folder(connection), None, sink).queue("support")
        queue.add_entry({"arrived": 0, "size": 1, "digest": b"", "reason": "matched"}, b"\n")
        queue.add(b"Subject: x\n\n")
        one = queue.pop_next()
        queue.quarantine(one, "failed")
        queue.requeue_quarantined_messages()
        queue.quarantine(queue.pop_next(), "failed")
        ((one, _),) = queue.get_quarantined_messages()
        queue.remove_from_quarantine(one)
    listed = terms("consuming", "events")
    assert {kind: text.partition(" Reason")[0] for kind, text in listed.items()} == (
        interfaces.EVENT_KINDS
    )
    pairs = {
        (kind, reason)
        for kind, text in listed.items()
        for reason in re.findall("``(.+?)``", text.partition(" Reason")[2])
    }
    assert pairs == sink.found


def test_limits_are_those_of_the_program() -> None:
    """The table of limits has the numbers of the program."""
    table = page_text("concepts").partition(".. _limits:")[2].partition(".. _trust:")[0]
    rows = re.findall(r"^   \* - (.+)\n     - (.+)\n     - .+$", table, re.MULTILINE)
    record = QueueRecord("app")
    assert dict(rows[1:]) == {
        "one regular expression on one text": f"{MATCH_LIMIT:g} s",
        "one filter on one message": f"{filters.MAX_FILTER_SECONDS:g} s",
        "reading and deciding on one message": f"{LONGEST_SECONDS:g} s",
        "header that is looked at": f"{headers.MAX_HEADER >> 20} MiB",
        "header fields": f"{headers.MAX_FIELDS:,}",
        "depth of nested parts": f"{mime.MAX_DEPTH}",
        "parts of a message": f"{mime.MAX_PARTS:,}",
        "duplicates remembered in a queue": f"{record.duplicates.limit:,}",
        "arrivals remembered in a queue": f"{record.arrivals.limit:,}",
        "throttled senders in a queue": f"{Throttles.limit:,}",
    }


def test_numbers_in_the_text_are_those_of_the_program() -> None:
    """The numbers that the concepts name are those of the program."""
    from postoffice.depot.lane import LANES, SEGMENT_SIZE
    from postoffice.depot.policy import Policy
    from postoffice.queue import BLOB_SIZE

    text = " ".join(page_text("concepts").split())
    assert f"A claim lasts {Policy().lease:.0f} seconds" in text
    assert LANES == 4
    assert "four lanes" in text
    assert f"segments of {SEGMENT_SIZE} entries at most" in text
    assert f"A body of less than {BLOB_SIZE >> 10} KiB is a record" in text


def test_rooms_are_listed_in_the_order_of_imports() -> None:
    """The table of rooms has every module of the package, each behind those that it may import."""
    table = page_text("structure").partition(".. rooms-begin")[2].partition(".. rooms-end")[0]
    listed = re.findall(r"``(\w+)``", "\n".join(row[:32] for row in table.splitlines()))
    rooms = {path.stem for path in (ROOT / "postoffice").iterdir() if path.suffix in ("", ".py")}
    assert set(listed) == rooms - {"__init__", "__pycache__", "data"}
    assert [RANK[room] for room in listed] == sorted(RANK[room] for room in listed)


def test_each_exit_status_is_listed() -> None:
    """Each status with which an error ends a command stands in the table of statuses."""
    listed = {int(one) for one in re.findall(r"^(\d+)  +\S", page_text("commands"), re.MULTILINE)}
    errors = [
        value
        for value in vars(exceptions).values()
        if isinstance(value, type) and issubclass(value, exceptions.PostofficeError)
    ]
    assert {error.exit_status for error in errors} <= listed


def test_each_public_name_is_in_the_reference() -> None:
    """What the package exports has a docstring, and its module stands in the reference."""
    reference = page_text("api")
    for name in postoffice.__all__:
        value = getattr(postoffice, name)
        assert value.__doc__, name
        found = re.search(
            rf"^\.\. automodule:: {re.escape(value.__module__)}\n   :members:(.*)$",
            reference,
            re.MULTILINE,
        )
        assert found is not None, name
        assert not found[1] or name in found[1].replace(",", " ").split(), name


# -- commands --------------------------------------------------------------------------------------


def shown_commands() -> list[tuple[str, list[str]]]:
    """Return the places and the words of all commands of ours that are shown on any page."""
    found = []
    for block in BLOCKS:
        for line in block.text.splitlines():
            shown = re.search(r"(?:^\$ |bin/|\| )postoffice(?= |$)(.*)", line)
            if block.language in ("console", "text", "ini") and shown is not None:
                words = shlex.split(shown[1].partition(" | ")[0].partition(" > ")[0], comments=True)
                found.append((f"{block.place}: {line.strip()}", words))
    return found


@pytest.mark.parametrize(("place", "words"), shown_commands(), ids=lambda value: str(value)[:60])
def test_commands_are_there_with_their_options(place: str, words: list[str]) -> None:
    """Each command line that is shown is one that postoffice understands."""
    at: click.Command = command
    context = click.Context(command, info_name="postoffice")
    words = list(itertools.takewhile(lambda word: word != "<", words))
    while words and isinstance(at, click.Group):
        own = at.get_command(context, words[0]) if not words[0].startswith("-") else None
        if own is None:
            break
        at, words = own, words[1:]
    at.make_context(at.name, words)


def test_every_event_of_the_daemon_is_listed() -> None:
    """The page on operating has each event that the daemon logs, and no others."""
    found = set()
    for path in (ROOT / "postoffice" / "daemon").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
                event = re.match(r"(?:%s|serve|lmtp|spool) ([a-z-]+)", str(texts[0]))
                if event is not None and event[1] != "fails":
                    found.add(event[1])
    assert found == set(terms("operating", "events"))
