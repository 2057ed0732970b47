"""The command as an administrator meets it: what it prints, and how it ends."""

from __future__ import annotations

import fcntl
import grp
import hashlib
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import transaction
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB.FileStorage import FileStorage

from postoffice.api import PostOffice
from postoffice.cli.output import age, local_time, size
from postoffice.intake.archive import Failure
from postoffice.message import Envelope, Message
from postoffice.queue import open_queue
from tests.depots import QUEUE, Depot, zeo_depot
from tests.sites import HOSTILE, QUEUES, URI, Site, mail

MAILS = Path(__file__).parent / "mail"
# Characters that must not reach a terminal: all controls but the line break, and C1's.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a site with two queues and nothing in it."""
    return Site(tmp_path / "site")


def snapshot(folder: Path) -> dict[str, str]:
    """Return what every file of a folder holds, and every folder's name."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


# -- import ----------------------------------------------------------------------------------------


def test_import_is_silent(site: Site) -> None:
    """Without a subcommand the command imports, and prints nothing when all is well."""
    site.deliver(mail("one"), mail("two"))
    assert site.done() == ""
    assert not list((site.maildir / "new").iterdir())
    assert [one["subject"] for one in site.json("messages", "billing")["messages"]] == [
        "one",
        "two",
    ]


@pytest.mark.parametrize("line", [["-v"], ["-v", "import"], ["import", "-v"]])
def test_import_verbose(site: Site, line: list[str]) -> None:
    """With -v each message has a line with the time, and the end is a summary by verdict."""
    site.deliver(mail("one"), mail("one"), b"Subject: from nobody\n\n", mail("x " + HOSTILE[:-1]))
    result = site.run(*line)
    assert result.exit_code == 0
    assert re.search(
        r"^4 messages in \d+\.\d s: 2 discarded, 2 queued$", result.stdout, re.MULTILINE
    )
    lines = [one for one in result.stderr.splitlines() if " INFO " in one and ".test " in one]
    assert len(lines) == 4
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO 0001.M1.test ", lines[0])
    assert not CONTROLS.search(result.output)


def test_import_sets_aside(site: Site) -> None:
    """A message newly set aside ends the run with 75 and the way to retry, later runs with 0."""
    site.configure(queues=QUEUES.replace("To:", r"Subject: (\\w+\\s?)*\\1$".replace("\\\\", "\\")))
    site.deliver(mail("a" * 40 + "!", to="x@y.example"), mail("fine"))
    result = site.run()
    assert result.exit_code == 75
    last = result.stderr.splitlines()[-1]
    assert last.startswith("postoffice: 1 message could not be processed; it is set aside in ")
    assert str(site.maildir / ".failed") in last
    assert "`postoffice import --failed`" in last
    assert site.run().exit_code == 0
    assert len(site.ids("billing")) == 1
    site.configure(queues=QUEUES)
    assert site.run().exit_code == 0
    assert len(site.ids("rest")) == 1


def test_import_failed(site: Site) -> None:
    """With --failed, all that was set aside is tried again."""
    path = site.folder / "mail"
    path.write_bytes(mail("one"))
    site.maildir.joinpath("new").mkdir(exist_ok=True)
    with PostOffice(site.ini) as post_office:
        archive = post_office.archive()
        archive.set_aside(str(path), Failure("mail", "for a test", post_office.fingerprint, 1))
    assert "warning  archive: 1 message is set aside in " in site.done("check")
    assert site.done() == ""
    assert site.ids("billing") == []
    assert site.done("import", "--failed") == ""
    assert len(site.ids("billing")) == 1


def test_import_meets_another(site: Site) -> None:
    """A second import of a Maildir says that another is running, and ends with 0."""
    site.done()
    with (site.maildir / ".postoffice.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = site.run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(f"postoffice: another import of {site.maildir} is running")


def test_import_warns_of_a_queue_that_is_gone(site: Site) -> None:
    """A queue that is no longer in the file gets a warning on standard error, and stays."""
    site.done()
    site.configure(queues=QUEUES.replace("billing]", "bills]"))
    result = site.run()
    assert result.exit_code == 0
    assert "WARNING queue 'billing' is not in" in result.stderr


def test_import_with_a_full_archive(site: Site) -> None:
    """An archive that cannot be written ends the run with 75 and one line that names the place."""
    site.configure("archive = archive")
    archive = site.folder / "archive"
    archive.mkdir()
    # The archive's days are those of the local clock; the second is for a run at midnight.
    today = datetime.now().astimezone().date()
    for day in (today, today + timedelta(1)):
        (archive / f"{day:%Y.%m.%d}").write_text("in the way")
    site.deliver(mail("one"))
    result = site.run()
    assert result.exit_code == 75
    assert result.stderr.startswith(f"postoffice: {archive}/")
    assert result.stderr.count("\n") == 1


def test_logging_of_the_file(site: Site) -> None:
    """Logging goes where the file's own sections say, and not to standard error."""
    sections = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ('%(here)s/import.log',)
formatter = plain
[formatter_plain]
format = %(levelname)s|%(message)s
"""
    site.configure(queues=QUEUES + sections)
    site.deliver(mail("one"))
    with site.process() as process:
        assert process.communicate() == (b"", b"")
    assert "INFO|0001.M1.test to queue 'billing'" in (site.folder / "import.log").read_text()


# -- route -----------------------------------------------------------------------------------------


def test_route_shows_every_rule(site: Site) -> None:
    """Each rule has its answer, in order, and nothing of the site changes."""
    site.configure("reject_filters =", "    header_regexp: Subject: .*lottery")
    site.deliver(mail("one"))
    (path,) = (site.maildir / "new").iterdir()
    before = snapshot(site.folder)
    lines = site.done("route", str(path)).splitlines()
    assert lines[0].startswith(f"{path}: queue billing (matched: to_hostname: billing.example.com")
    answers = [re.split(r"  +", line.strip()) for line in lines[2:]]
    assert answers == [
        ["no-sender", "no"],
        ["from-is-to", "no"],
        ["ricochet", "no"],
        ["reject_filters", "header_regexp: Subject: .*lottery", "no"],
        ["queue:billing", "to_hostname: billing.example.com", "YES", "billing.example.com in To"],
        ["queue:rest", "header_regexp: To:", "YES", "a header"],
    ]
    assert snapshot(site.folder) == before


def test_route_reads_standard_input(site: Site) -> None:
    """Without a file, the message is read from standard input, and --json tells the same."""
    (told,) = json.loads(site.done("route", "--json", input=mail("one", to="x@y.example")))
    assert (told["file"], told["verdict"], told["queue"]) == ("-", "queued", "rest")
    assert told["trail"][3] == {
        "rule": "queue:billing",
        "filter": "to_hostname: billing.example.com",
        "answer": None,
        "fault": None,
    }
    assert site.done("route", input=b"Subject: x\n\n").startswith("standard input: discarded (no-")


def test_route_goes_on_after_a_file_that_cannot_be_read(site: Site) -> None:
    """A missing file and a folder get a line each, the others are told, and it ends with 66."""
    path = site.folder / "mail"
    path.write_bytes(mail("one"))
    result = site.run("route", "/no/such\x1b", str(site.folder), str(path))
    assert result.exit_code == 66
    assert result.stderr.splitlines() == [
        r"postoffice: /no/such\x1b: No such file or directory",
        f"postoffice: {site.folder}: Is a directory",
    ]
    assert f"{path}: queue billing" in result.stdout


def test_route_never_prints_raw_bytes(site: Site) -> None:
    """Neither a file's name nor a message's text reaches the terminal unescaped."""
    path = site.folder / "m\x1b[31m\udcff"
    path.write_bytes(mail(HOSTILE, body=HOSTILE))
    for options in ([], ["--json"]):
        assert not CONTROLS.search(site.done("route", str(path), *options))


def test_route_agrees_with_the_import(site: Site) -> None:
    """For each message of the collection, route foretells the queue and marks of the import."""
    site.configure("max_message_size = 2k")
    names = sorted(MAILS.glob("*.eml"))
    site.maildir.joinpath("new").mkdir(exist_ok=True)
    for path in names:
        (site.maildir / "new" / path.name).write_bytes(path.read_bytes())
    told = site.json("route", *(str(site.maildir / "new" / path.name) for path in names))
    foretold = {Path(one["file"]).name: (one["queue"], one["marks"]) for one in told}
    result = site.run("-v")
    assert result.exit_code == 0, result.stderr
    queued = {}
    for queue in ("billing", "rest"):
        with open_queue(site.uri, queue) as found:
            for entry in found.entries():
                queued[entry.source] = (queue, list(entry.marks))
    duplicates = {
        line.split()[3] for line in result.stderr.splitlines() if " discarded: duplicate" in line
    }
    expected = {name: (queue, marks) for name, (queue, marks) in foretold.items() if queue}
    assert queued == {name: one for name, one in expected.items() if name not in duplicates}
    assert len(queued) > 30
    assert any(marks for _, marks in queued.values())


# -- check -----------------------------------------------------------------------------------------


def test_check_makes_nothing(site: Site) -> None:
    """A check before the first import, and one after it, changes no file and finds no fault."""
    (site.maildir / "tmp").rmdir()
    before = snapshot(site.folder)
    first = site.done("check")
    assert "the first intake of mail makes it" in first
    assert snapshot(site.folder) == before
    site.deliver(mail("one"))
    site.done()
    site.deliver(mail("two"))
    before = snapshot(site.folder)
    lines = site.done("check").splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert f"ok       maildir: {site.maildir}; 1 message waiting to be imported" in lines
    assert "ok       depot: /postoffice, format 1, 2 queues" in lines
    assert snapshot(site.folder) == before


def test_check_names_a_configuration_error(site: Site) -> None:
    """A configuration that cannot be used is one line, and ends the check with 2."""
    site.configure("maildri = x")
    result = site.run("check")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean 'maildir'?" in result.stderr


def test_check_warns(site: Site) -> None:
    """Queues that get nothing or have left the file are warnings, and warnings end with 0."""
    site.done()
    site.configure(queues="[queue:empty]\n[queue:rest]\nfilters = header_regexp: To:\n")
    output = site.done("check")
    assert "a queue without filters gets no messages" in output
    assert "warning  queue billing: is in the depot and not in the configuration" in output
    assert "ok       queue empty: will be made by the next intake of mail" in output
    assert output.endswith("0 errors, 2 warnings\n")


def test_check_of_a_locked_database(site: Site) -> None:
    """A locked database ends with 75, names its holder and the mend; the rest is checked too."""
    site.done()
    storage = FileStorage(str(site.folder / "var" / "depot.fs"))
    try:
        checked, imported = site.run("check"), site.run()
    finally:
        storage.close()
    for result in (checked, imported):
        assert result.exit_code == 75
        assert f"is locked by process {os.getpid()} (" in result.output
        assert "start `postoffice serve`" in result.output
    assert "ok       maildir: " in checked.stdout
    assert checked.stdout.endswith("1 error, 0 warnings\n")


def test_check_of_an_unreachable_server(site: Site) -> None:
    """A server that is not there ends the check with 75 and a question."""
    uri = "zodb_uri = zeo://%(here)s/no.sock?blob_dir=%(here)s/blobs&wait_timeout=1"
    site.ini.write_text(site.ini.read_text().replace(URI, uri))
    result = site.run("check")
    assert result.exit_code == 75
    assert "is its server running?" in result.stdout


def test_check_of_folders_in_the_way(site: Site) -> None:
    """A Maildir and an archive that do not exist yet will be made, and that is said."""
    site.configure("archive = kept")
    for name in ("new", "cur", "tmp"):
        (site.maildir / name).rmdir()
    site.maildir.rmdir()
    output = site.done("check")
    assert f"ok       maildir: {site.maildir} is not there yet; made when it is needed" in output
    assert (
        f"ok       archive: {site.folder}/kept is not there yet; made when it is needed" in output
    )


def test_check_of_what_is_no_folder(site: Site) -> None:
    """A file where a folder should be is an error with its path, and the rest is checked too."""
    (site.maildir / "new").rmdir()
    (site.maildir / "new").touch()
    (site.maildir / ".failed").touch()
    result = site.run("check")
    assert result.exit_code == 75
    assert f"error    maildir: {site.maildir}/new is no folder" in result.stdout
    assert f"error    archive: {site.maildir}/.failed: Not a directory" in result.stdout
    assert "ok       database: " in result.stdout


def test_check_of_what_is_no_depot(site: Site) -> None:
    """Other data at the depot's path ends the check with 69."""
    site.done()
    with PostOffice(site.ini) as post_office, post_office.connection() as connection:
        connection.root()["postoffice"] = "something else"
        connection.root()["folder"] = PersistentMapping()
        connection.transaction_manager.commit()
    result = site.run("check")
    assert result.exit_code == 69
    assert "error    depot: /postoffice of the database holds " in result.stdout
    site.configure("zodb_path = /folder/depot")
    assert "/folder/depot will be made by the first intake of mail" in site.done("check")


# -- check of a listener ---------------------------------------------------------------------------


@contextmanager
def listener(opened: socket.socket, *said: bytes) -> Iterator[None]:
    """Listen, and say this to whoever comes: a piece every 10 ms, then nothing, or hang up."""
    done = threading.Event()

    def serve() -> None:
        with opened.accept()[0] as session:
            for piece in said:
                if not piece:
                    return
                try:
                    session.sendall(piece)
                except ConnectionError:
                    return
                done.wait(0.01)
            done.wait()

    opened.listen()
    opened.settimeout(60)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def unix_socket(path: Path) -> socket.socket:
    """Open a unix socket at a path."""
    opened = socket.socket(socket.AF_UNIX)
    opened.bind(str(path))
    return opened


def test_check_without_a_listener(site: Site) -> None:
    """Where no LMTP listener is configured, there is no word of one."""
    assert "lmtp" not in site.done("check")


def test_check_of_a_unix_socket(site: Site) -> None:
    """Mode and group of the socket are shown, and whether a listener answers there now."""
    path = site.folder / "lmtp"
    site.configure("lmtp = unix:lmtp")
    nobody = f"warning  lmtp: nobody listens at unix:{path} now\n"
    name = grp.getgrgid(os.getegid()).gr_name
    site.folder.chmod(0o750)
    output = site.done("check")
    assert f"ok       lmtp: {path}, mode 0660, group {name}\n{nobody}" in output
    assert not path.exists()
    site.configure("lmtp = unix:lmtp", "lmtp_mode = 0620", f"lmtp_group = {name}")
    with unix_socket(path) as opened:
        with listener(opened, b"220 mx.example.com LMTP\r\n"):
            output = site.done("check")
        assert f"ok       lmtp: {path}, mode 0620, group {name}\n" in output
        assert f"ok       lmtp: a listener answers at unix:{path}\n" in output
    # A dead listener has left its socket.
    assert path.exists()
    assert nobody in site.done("check")


@pytest.mark.parametrize(
    ("family", "host", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1:{}"),
        (socket.AF_INET6, "::1", "[::1]:{}"),
    ],
)
def test_check_of_a_port(site: Site, family: socket.AddressFamily, host: str, shown: str) -> None:
    """Whether a listener answers at a port is told, also one that has no room now."""
    with socket.socket(family) as opened:
        try:
            opened.bind((host, 0))
        except OSError:
            # A machine without IPv6.
            site.configure(f"lmtp = {shown.format(2424)}")
            assert f"lmtp: {shown.format(2424)} cannot be reached: " in site.run("check").stdout
            return
        place = shown.format(opened.getsockname()[1])
        site.configure(f"lmtp = {place}")
        with listener(opened, b"4", b"21 4.3.2 too many ", b"connections\r\n"):
            assert f"ok       lmtp: a listener answers at {place}\n" in site.done("check")
    assert f"warning  lmtp: nobody listens at {place} now\n" in site.done("check")


@pytest.mark.parametrize("said", [b"", b"HTTP/1.0 400 Bad Request\r\n", b"\x00" * 4096])
def test_check_of_another_listener(site: Site, said: bytes) -> None:
    """Whatever does not greet as a mail server does is an error."""
    site.configure("lmtp = unix:lmtp")
    with unix_socket(site.folder / "lmtp") as opened, listener(opened, said):
        result = site.run("check")
    assert result.exit_code == 75
    assert f"error    lmtp: what answers at unix:{site.folder}/lmtp is no mail" in result.stdout
    assert "ok       database: " in result.stdout


@pytest.mark.parametrize("said", [[], [b"2"] * 300])
def test_check_of_a_stalled_listener(site: Site, said: list[bytes]) -> None:
    """A listener that says nothing, or a letter from time to time, holds the check up briefly."""
    site.configure("lmtp = unix:lmtp")
    with unix_socket(site.folder / "lmtp") as opened, listener(opened, *said):
        output = site.done("check")
    assert "lmtp does not answer within 2 s\n" in output


def test_check_of_a_crowded_listener(site: Site) -> None:
    """A listener that takes no connection off its full backlog holds nothing up either."""
    path = site.folder / "lmtp"
    site.configure("lmtp = unix:lmtp")
    with unix_socket(path) as opened, socket.socket(socket.AF_UNIX) as first:
        opened.listen(0)
        first.connect(str(path))
        assert "lmtp does not answer within 2 s\n" in site.done("check")


def test_check_of_a_folder_closed_to_the_group(site: Site) -> None:
    """A folder that the socket's group cannot pass is warned of."""
    site.configure("lmtp = unix:lmtp", f"lmtp_group = {os.getegid()}")
    for mode, passes in ((0o700, False), (0o701, False), (0o710, True), (0o777, True)):
        site.folder.chmod(mode)
        assert ("does not let the group" not in site.done("check")) is passes


AS_NOBODY = """
import os, sys
from pathlib import Path
from postoffice.cli.checking import _of_listener
from postoffice.config import UnixPlace

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for finding in _of_listener(UnixPlace(Path(sys.argv[1]), 0o660, int(sys.argv[2]))):
    print(finding.level, finding.status, finding.text)
"""


def as_nobody(path: Path, group: int) -> str:
    """Return what is found of a socket by a user who is not root."""
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, path, str(group)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_check_of_a_socket_in_a_folder_that_gives_it_its_group() -> None:
    """In a folder with the setgid bit the socket has the folder's group, whoever makes it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to a group that it is not in")
    other = next(one for one in grp.getgrall() if one.gr_gid not in (0, 65534))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chown(folder, 65534, other.gr_gid)
        folder.chmod(0o2750)
        said = as_nobody(folder / "lmtp", other.gr_gid).split("\n")
        assert said[0] == f"ok 0 {folder}/lmtp, mode 0660, group {other.gr_name}"


def test_check_of_a_socket_without_the_right_to_it() -> None:
    """A folder that cannot be written, and a group that cannot be given, are errors."""
    mine = {os.getegid(), *os.getgroups(), 65534} - ({0} if os.geteuid() == 0 else set())
    other = next(one for one in grp.getgrall() if one.gr_gid not in mine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "lmtp"
        folder.chmod(0o777)
        assert re.match(
            rf"error 75 .* is not in the group {other.gr_name}, and cannot give the socket to it\n"
            rf"warning 0 nobody listens at unix:{path} now\n",
            as_nobody(path, other.gr_gid),
        )
        folder.chmod(0o555)
        closed = as_nobody(path, other.gr_gid)
        assert closed.startswith(f"error 75 {folder}, where the socket goes, cannot be written by ")
        folder.chmod(0)
        assert f"unix:{path} cannot be reached: Permission denied\n" in as_nobody(path, 0)
        folder.chmod(0o700)


# -- init ------------------------------------------------------------------------------------------


def test_init_lays_out_what_works(tmp_path: Path) -> None:
    """What init makes passes check and import at once, and its next steps name real commands."""
    folder = tmp_path / "a site"
    result = Site.run_alone("init", str(folder))
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == [
        "Maildir",
        "postoffice.ini",
        "var",
        "zeo.conf",
    ]
    ini = str(folder / "postoffice.ini")
    for command in ("check", "serve", "import"):
        assert f" postoffice -C {shlex.quote(ini)} {command}" in result.stdout
    for command in ("check", "import", "queues"):
        done = Site.run_alone(command, "-C", ini)
        assert (done.exit_code, done.stderr) == (0, ""), done.output


@pytest.mark.parametrize("name", ["postoffice.ini", "zeo.conf", "Maildir", "var"])
def test_init_overwrites_nothing(tmp_path: Path, name: str) -> None:
    """If anything that it would make exists, init names it, makes nothing and ends with 73."""
    (tmp_path / name).symlink_to("nowhere")
    result = Site.run_alone("init", str(tmp_path))
    assert (result.exit_code, result.stdout) == (73, "")
    assert result.stderr == f"postoffice: {tmp_path / name} exists already; nothing was made\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a?b", "a%b", "a\nb"])
def test_init_refuses_what_no_uri_can_hold(tmp_path: Path, name: str) -> None:
    """A folder whose path would read otherwise in a URI is refused before anything is made."""
    result = Site.run_alone("init", str(tmp_path / name))
    assert result.exit_code == 73
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_init_where_no_folder_can_be(tmp_path: Path) -> None:
    """Below a file, init makes nothing and says so in one line."""
    (tmp_path / "file").touch()
    result = Site.run_alone("init", str(tmp_path / "file" / "site"))
    assert result.exit_code == 73
    assert result.stderr == f"postoffice: {tmp_path}/file/site: Not a directory\n"


def test_zeo_conf_shares_the_database(site: Site) -> None:
    """With the server of zeo.conf, the import runs while an application has the queue open."""
    runzeo = Path(sys.executable).parent / "runzeo"
    socket = site.folder / "var" / "zeo.sock"
    query = f"blob_dir={site.folder}/var/blobs&shared_blob_dir=true"
    assert f"zeo://{socket}?{query}" in (site.folder / "zeo.conf").read_text()
    site.ini.write_text(site.ini.read_text().replace(URI, f"zodb_uri = zeo://{socket}?{query}"))
    server = subprocess.Popen(
        [runzeo, "-C", site.folder / "zeo.conf"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert "the first intake of mail makes it" in site.done("check")
        site.deliver(mail("one"))
        site.done()
        with open_queue(f"zeo://{socket}?{query}", "billing") as queue:
            site.deliver(mail("two", body="x" * 300_000))
            site.done()
            assert len(site.ids("billing")) == 2
            assert queue.pop_next()["Subject"] == "one"
            assert site.json("queues")[0]["held"] == 1
        assert "ok       depot: /postoffice, format 1, 2 queues" in site.done("check")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


# -- queues ----------------------------------------------------------------------------------------


def test_queues(site: Site) -> None:
    """The queues are listed in the file's order, with what waits, is held and in quarantine."""
    site.deliver(mail("one"), mail("two"), mail("three"))
    site.done()
    site.quarantine(1)
    site.configure(queues="[queue:new one]\nfilters =\n  to_hostname: x.example\n" + QUEUES)
    assert [re.split(r"  +", line) for line in site.done("queues").splitlines()][1][:1] == [
        "new one"
    ]
    new, billing, rest = site.json("queues")
    assert (new["name"], new["made"], new["waiting"]) == ("new one", False, 0)
    assert billing == {
        "name": "billing",
        "waiting": 2,
        "held": 0,
        "deferred": 0,
        "quarantined": 1,
        "oldest": "2025-06-15T15:06:42.000+00:00",
        "configured": True,
        "made": True,
    }
    assert (rest["waiting"], rest["oldest"]) == (0, None)


@pytest.mark.parametrize(
    "arguments", [["queues"], ["messages", "billing"], ["queues", "remove", "billing"]]
)
def test_depot_that_was_not_made_yet(site: Site, arguments: list[str]) -> None:
    """Before the first import, one line says what makes the depot, and nothing is made."""
    before = snapshot(site.folder)
    result = site.run(*arguments)
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.count("\n") == 1
    assert "the first intake of mail makes it" in result.stderr
    assert snapshot(site.folder) == before


def test_queues_remove(site: Site) -> None:
    """A queue is removed once it holds nothing; until then the command says what it holds."""
    site.deliver(mail("one"))
    site.done()
    held = site.run("queues", "remove", "billing")
    assert held.exit_code == 69
    assert "still holds 1 waiting and 0 quarantined messages" in held.stderr
    site.quarantine(1)
    assert "0 waiting and 1 quarantined" in site.run("queues", "remove", "billing").stderr
    site.done("discard", "billing", "--yes", *site.ids("billing", "--quarantined"))
    assert "so the next intake of mail makes it again" in site.done("queues", "remove", "billing")
    missing = site.run("queues", "remove", "nix")
    assert missing.exit_code == 69
    assert missing.stderr == "postoffice: no queue 'nix'; there are: 'rest'\n"


# -- messages and show -----------------------------------------------------------------------------


def test_messages_page(site: Site) -> None:
    """Pages follow each other by --after, in order, and the last one says no more."""
    site.deliver(*(mail(f"no {number}") for number in range(7)))
    site.done()
    seen: list[str] = []
    after: list[str] = []
    while True:
        page = site.json("messages", "billing", "--limit", "3", *after)
        seen += [one["subject"] for one in page["messages"]]
        if page["next_after"] is None:
            break
        after = ["--after", page["next_after"]]
    assert seen == [f"no {number}" for number in range(7)]
    result = site.run("messages", "billing", "--limit", "3")
    assert f"the next page: add --after {site.ids('billing')[2]}\n" in result.stderr
    assert site.done("messages", "rest") == "no messages in rest\n"
    behind = str(2**63 - 2)
    assert site.done("messages", "billing", "--after", behind).startswith("no messages in billing")
    assert site.run("messages", "billing", "--after", "9" * 30).exit_code == 2


def test_messages_tell_their_envelopes(site: Site) -> None:
    """Each message has its envelope, its way in and the mail server's id for it beside it."""
    heads = (
        b"Return-Path: <>\nX-Original-To: in+1@x.example\n",
        b"Return-Path: <bo@steel.example>\nDelivered-To: in+2@x.example\n",
        b"",
    )
    site.deliver(*(head + mail(f"no {number}") for number, head in enumerate(heads)))
    site.done()
    envelope = Envelope("di@glass.example", ("in+3@x.example",), 1_750_000_000 * 10**9, "4XyZ")
    with open_queue(site.uri, "billing") as queue:
        queue.add(Message.from_bytes(mail("no 3"), envelope=envelope))
        transaction.commit()
    listed = site.json("messages", "billing")["messages"]
    assert [(one["envelope"]["sender"], one["envelope"]["recipients"]) for one in listed] == [
        ("", ["in+1@x.example"]),
        ("bo@steel.example", ["in+2@x.example"]),
        (None, []),
        ("di@glass.example", ["in+3@x.example"]),
    ]
    assert [one["way"] for one in listed] == ["maildir"] * 3 + ["application"]
    assert [one["mta_queue_id"] for one in listed] == [None, None, None, "4XyZ"]
    assert {one["to"] for one in listed} == {"in@billing.example.com"}
    lines = [re.split(r"  +", line) for line in site.done("messages", "billing").splitlines()]
    assert lines[0] == ["id", "arrived", "from", "to", "subject", "size"]
    assert [line[3] for line in lines[1:]] == [
        *("in+1@x.example", "in+2@x.example"),
        # The envelope is unknown: what the header says.
        *("in@billing.example.com", "in+3@x.example"),
    ]
    assert [line[2] for line in lines[1:]] == ["<>", *["Ann <ann@paper.example>"] * 3]
    senders = ("<> (the null sender: a notice", "bo@steel.example", "unknown", "di@glass.example")
    for one, sender in zip(listed, senders, strict=True):
        told = site.json("show", "billing", one["id"])
        assert {key: told[key] for key in one} == one
        shown = site.done("show", "billing", one["id"])
        assert f"\nsender:      {sender}" in shown
        assert f"\nrecipients:  {', '.join(told['envelope']['recipients']) or 'unknown'}\n" in shown
        assert f", by {one['way']}\n" in shown
        assert ("\nMTA's id:    4XyZ\n" in shown) is (one["mta_queue_id"] == "4XyZ")


def test_messages_to_many(site: Site) -> None:
    """An envelope of many recipients is cut in the table, and whole in the JSON."""
    recipients = tuple(f"in+{number}@x.example" for number in range(1000))
    site.done()
    with open_queue(site.uri, "billing") as queue:
        queue.add(Message.from_bytes(mail("one"), envelope=Envelope("", recipients, 1)))
        transaction.commit()
    assert max(map(len, site.done("messages", "billing").splitlines())) < 300
    (one,) = site.json("messages", "billing")["messages"]
    assert one["envelope"]["recipients"] == list(recipients)


def test_messages_read_no_bodies(site: Site) -> None:
    """A listing works though the body of a message is gone; showing that one is an error."""
    site.deliver(mail("large", body="x" * 300_000))
    site.done()
    blobs = [path for path in (site.folder / "var" / "blobs").rglob("*") if path.suffix == ".blob"]
    assert len(blobs) == 1
    blobs[0].unlink()
    assert "large" in site.done("messages", "billing")
    result = site.run("show", "billing", *site.ids("billing"))
    assert result.exit_code == 75
    assert result.stderr.splitlines()[-1].startswith("postoffice: the database failed: ")
    assert "Traceback" not in result.stderr


def test_messages_quarantined(site: Site) -> None:
    """The quarantine is listed with the error and the attempts, in one line each."""
    site.deliver(mail("one"), mail("two"))
    site.done()
    site.quarantine(2)
    heading, *lines = site.done("messages", "billing", "--quarantined").splitlines()
    assert re.split(r"  +", heading)[-2:] == ["tries", "error"]
    assert len(lines) == 2
    assert r"1  ValueError: no. 0: \x1b[2J" in lines[0]
    (first, _) = site.json("messages", "billing", "--quarantined")["messages"]
    assert (first["state"], first["attempts"]) == ("quarantined", 1)
    assert first["error"] == {"type": "ValueError", "message": f"no. 0: {HOSTILE}"}


def test_show(site: Site) -> None:
    """All that is known of a message is shown, with its headers and its first text."""
    raw = b"Return-Path: <>\nX-Original-To: in@x.example\n" + mail("one", body="Dear,\n\nyours.\n")
    site.deliver(raw)
    site.done()
    (id,) = site.quarantine(1)
    facts, headers, text = site.done("show", "billing", id).split("\n\n", 2)
    for fact in (
        f"id:          {id}",
        "state:       quarantined since ",
        ", by maildir",
        f"sha256:      {hashlib.sha256(raw).hexdigest()}",
        "sender:      <> (the null sender",
        "recipients:  in@x.example",
        "file:        0001.M1.test",
        "reason:      matched: all filters of the queue match",
        "  queue:billing  to_hostname: billing.example.com  YES  billing.example.com in To",
        r"last error:  ValueError: no. 0: \x1b[2J",
        "  Traceback (most recent call last):",
    ):
        assert fact in facts
    (archive,) = re.findall(r"archive:     (.*)", facts)
    assert Path(archive).read_bytes() == raw
    assert headers.startswith(f"X-Postoffice-Id: {id}\n")
    assert "Subject: one" in headers
    assert text == "Dear,\n\nyours.\n"
    told = site.json("show", "billing", id)
    assert (told["id"], told["archive_path"], told["text"]) == (id, archive, "Dear,\n\nyours.")
    assert told["envelope"] == {"sender": "", "recipients": ["in@x.example"]}
    Path(archive).unlink()
    assert f"{archive} (not there now)" in site.done("show", "billing", id)


def test_show_is_bounded(site: Site) -> None:
    """A message of any size shows the beginning of its text and headers, and says so."""
    header = "".join(f"X-{number}: y\n" for number in range(300))
    text = "long " * 1000 + "\n" + "line\n" * 5000
    raw = header.encode() + mail("one", body=text)
    site.deliver(raw)
    site.done()
    (id,) = site.ids("billing")
    shown = site.done("show", "billing", id)
    assert len(shown.splitlines()) < 450
    assert "more headers]\n" in shown
    assert shown.endswith("[more; --raw shows all]\n")
    assert site.json("show", "billing", id)["text_cut"]


def test_show_raw_is_every_byte(site: Site) -> None:
    """The raw message is what arrived, byte for byte, whatever the bytes."""
    raw = mail("one") + bytes(range(256)) * 3 + b"\r\n\r\rno end of line"
    site.deliver(raw)
    site.done()
    (id,) = site.ids("billing")
    assert site.run("show", "billing", id, "--raw").stdout_bytes == raw
    assert site.run("show", "billing", id, "--raw", "--json").exit_code == 2


@pytest.mark.parametrize("id", ["17", "-1", "x\x1b", "9" * 30])
def test_show_of_no_message(site: Site, id: str) -> None:
    """An id that no message has is one line and status 69."""
    site.done()
    result = site.run("show", "billing", "--", id)
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.count("\n") == 1
    assert not CONTROLS.search(result.stderr)


# -- claims ----------------------------------------------------------------------------------------

HERE = f"{socket.gethostname()} {os.getpid()}"


@pytest.fixture
def shared(site: Site, tmp_path: Path) -> Iterator[Depot]:
    """The site's depot, behind a ZEO server, with three messages that wait."""
    with zeo_depot(tmp_path) as depot:
        site.configure(
            main=f"[post office]\nzodb_uri = {depot.uri}\nmaildir = %(here)s/Maildir\n",
            queues=f"[queue:{QUEUE}]\nfilters = header_regexp: To:\n",
        )
        depot.seat().add("one", "two", "three")
        yield depot


def test_messages_tell_who_holds_them(site: Site, shared: Depot) -> None:
    """A message that a consumer holds has its machine, its process and its lease beside it."""
    seat = shared.seat()
    (claimed,) = seat.queue.claim(lease=900)
    lines = site.done("messages", QUEUE).splitlines()
    assert [HERE in line for line in lines] == [False, True, False, False]
    assert lines[1].endswith(f"  held by {HERE}")
    one, two, _ = site.json("messages", QUEUE)["messages"]
    assert (one["claim"]["host"], one["claim"]["pid"]) == (socket.gethostname(), os.getpid())
    lease = datetime.fromisoformat(one["claim"]["until"]) - datetime.fromisoformat(
        one["claim"]["since"]
    )
    assert lease == timedelta(seconds=900)
    assert (two["claim"], two["not_before"], two["attempts"]) == (None, None, 0)
    assert [row["held"] for row in site.json("queues")] == [1]
    assert f"held by:     {HERE} since " in site.done("show", QUEUE, str(claimed.id))
    assert site.json("show", QUEUE, str(claimed.id))["claim"] == one["claim"]
    claimed.release()
    assert HERE not in site.done("messages", QUEUE)
    assert "held by" not in site.done("show", QUEUE, str(claimed.id))


def test_messages_tell_when_they_are_due(site: Site, shared: Depot) -> None:
    """A deferred message has when it is due, its failed attempts and the last error beside it."""
    (claimed,) = shared.seat().queue.claim()
    claimed.defer(200, ValueError(HOSTILE))
    output = site.done("messages", QUEUE)
    assert not CONTROLS.search(output)
    assert output.count("  deferred, due in 3 min, 1 failed attempt\n") == 1
    (deferred,) = [one for one in site.json("messages", QUEUE)["messages"] if one["not_before"]]
    assert (deferred["subject"], deferred["state"]) == ("one", "queued")
    assert (deferred["claim"], deferred["attempts"]) == (None, 1)
    assert deferred["error"] == {"type": "ValueError", "message": HOSTILE}
    (row,) = site.json("queues")
    assert (row["waiting"], row["held"], row["deferred"]) == (3, 0, 1)
    shown = site.done("show", QUEUE, str(claimed.id))
    assert not CONTROLS.search(shown)
    assert "deferred:    due 2" in shown
    assert "attempts:    1 failed" in shown
    assert "last error:  ValueError: " in shown


def test_release_of_deferred_messages(site: Site, shared: Depot) -> None:
    """Deferred messages can be taken at once, the named ones or all, and nobody is asked."""
    seat = shared.seat()
    ids = []
    for claimed in seat.queue.claim(3):
        claimed.defer(3600)
        ids.append(str(claimed.id))
    seat.begin()
    assert not seat.queue
    assert site.done("release", QUEUE, ids[1]) == f"1 message released in {QUEUE}\n"
    seat.begin()
    assert seat.queue.pop_next()["Subject"] == "two"
    seat.commit()
    seat.queue.release()
    assert site.done("release", QUEUE, "--all") == f"2 messages released in {QUEUE}\n"
    seat.begin()
    assert {seat.queue.pop_next()["Subject"] for _ in range(2)} == {"one", "three"}


def test_release_of_held_messages_asks(site: Site, shared: Depot) -> None:
    """What a process of this machine holds is released after a yes, and not after a no."""
    holder, other = shared.seat(), shared.seat()
    (held,) = holder.queue.claim()
    for answer in ("n\n", ""):
        result = site.run("release", QUEUE, str(held.id), input=answer)
        assert result.exit_code == 1
        assert f"held by process {os.getpid()} of this machine" in result.stderr
        assert "nothing was " in result.stderr
    other.begin()
    assert other.queue.peek()["Subject"] == "two"
    assert site.run("release", QUEUE, "--all", input="y\n").exit_code == 0
    other.begin()
    assert other.queue.peek()["Subject"] == "one"


def test_release_without_asking(site: Site, shared: Depot) -> None:
    """With --yes nobody is asked; and only one of two that worked on a message commits."""
    holder, other = shared.seat(), shared.seat()
    holder.begin()
    (held,) = holder.queue.claim()
    assert site.done("release", QUEUE, "--yes", str(held.id)).startswith("1 message released")
    other.begin()
    assert other.queue.pop_next().id == held.id
    other.commit()

    def finish() -> None:
        held.ack()
        holder.commit()

    with pytest.raises(TransientError):
        finish()
    holder.abort()


def test_release_of_what_is_not_there(site: Site, shared: Depot) -> None:
    """If one of the messages does not wait, none is released; ids or --all have to be given."""
    (deferred,) = shared.seat().queue.claim()
    deferred.defer(3600)
    result = site.run("release", QUEUE, str(deferred.id), "17")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (69, "", 1)
    assert [row["deferred"] for row in site.json("queues")] == [1]
    for arguments in ([], [str(deferred.id), "--all"]):
        result = site.run("release", QUEUE, *arguments)
        assert result.exit_code == 2
        assert "either the ids of messages, or --all" in result.stderr


# -- quarantine ------------------------------------------------------------------------------------


def test_requeue(site: Site) -> None:
    """Messages go back by their ids or all together, in order of arrival, and are counted."""
    site.deliver(*(mail(f"no {number}") for number in range(4)))
    site.done()
    ids = site.quarantine(4)
    assert site.done("requeue", "billing", ids[2], ids[0]) == "2 messages requeued in billing\n"
    assert site.done("requeue", "billing", "--all") == "2 messages requeued in billing\n"
    assert site.ids("billing") == [ids[0], ids[2], ids[1], ids[3]]
    assert site.ids("billing", "--quarantined") == []


def test_requeue_is_all_or_nothing(site: Site) -> None:
    """If one of the messages is not in quarantine, none is requeued."""
    site.deliver(mail("one"), mail("two"))
    site.done()
    (id,) = site.quarantine(1)
    (waiting,) = site.ids("billing")
    for wrong in ("17", waiting):
        assert site.run("requeue", "billing", id, wrong).exit_code == 69
    assert site.ids("billing", "--quarantined") == [id]


@pytest.mark.parametrize("arguments", [[], ["1", "--all"]])
def test_requeue_wants_ids_or_all(site: Site, arguments: list[str]) -> None:
    """Neither ids nor --all, and both, are wrong command lines."""
    result = site.run("requeue", "billing", *arguments)
    assert result.exit_code == 2
    assert "either the ids of messages, or --all" in result.stderr


def test_discard_asks(site: Site) -> None:
    """A message is discarded for good after a yes, and stays after a no or no answer."""
    site.deliver(mail("one"))
    site.done()
    (id,) = site.quarantine(1)
    for answer in ("n\n", ""):
        result = site.run("discard", "billing", id, input=answer)
        assert result.exit_code == 1
        assert "nothing was d" in result.stderr
        assert site.ids("billing", "--quarantined") == [id]
    done = site.run("discard", "billing", id, input="y\n")
    assert (done.exit_code, done.stdout.strip()) == (0, "1 message discarded")
    assert site.ids("billing", "--quarantined") == []
    assert site.run("discard", "billing", "--yes", id).exit_code == 69


# -- debug -----------------------------------------------------------------------------------------


def test_debug(site: Site) -> None:
    """The shell has the depot in it, and what is not committed there has not happened."""
    site.deliver(mail("one"))
    site.done()
    script = (
        "print('subject', queues['billing'].pop_next()['subject'])\n"
        "print('left', len(queues['billing']), list(queues), len(queues), queues)\n"
        "print(root.names(), type(connection).__name__, postoffice.settings.queue_names)\n"
    )
    with site.process("debug", stdin=subprocess.PIPE) as process:
        output, said = process.communicate(script.encode())
    assert process.returncode == 0
    assert b"Nothing is changed but by transaction.commit()" in said
    assert b"subject one\n" in output
    assert b"left 0 ['billing', 'rest'] 2 <queues 'billing', 'rest'>" in output
    assert b"['billing', 'rest'] Connection ('billing', 'rest')" in output
    assert len(site.ids("billing")) == 1


# -- how it ends -----------------------------------------------------------------------------------


def test_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file is found, one line lists the places that were looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv" / "bin" / "postoffice")])
    result = Site.run_alone("queues")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"no postoffice.ini in . or ./etc or {tmp_path}/venv/etc or /etc;" in result.stderr


def test_shared_options_stand_anywhere(site: Site) -> None:
    """The configuration may be named before or behind the subcommand, or behind its own."""
    site.done()
    ini = str(site.ini)
    lines = [
        ["-C", ini, "queues"],
        ["queues", "-C", ini],
        ["queues", "--config", ini, "--json"],
        ["-C", "/no/such", "queues", "-C", ini],
        ["queues", "remove", "-C", ini, "rest"],
    ]
    for line in lines:
        result = Site.run_alone(*line)
        assert result.exit_code == 0, result.output
    assert Site.run_alone("-C", "/no/such", "queues").exit_code == 2


def test_unexpected_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect is one line and status 75; its traceback shows with -v alone."""

    def fail(self: PostOffice) -> None:
        raise RuntimeError("a defect\x1b\nof ours")

    site.done()
    monkeypatch.setattr(PostOffice, "queues", fail)
    quiet, verbose = site.run("queues"), site.run("queues", "-v")
    assert quiet.exit_code == verbose.exit_code == 75
    assert quiet.stderr.startswith(r"postoffice: unexpected RuntimeError: a defect\x1b of ours;")
    assert quiet.stderr.count("\n") == 1
    assert "Traceback" in verbose.stderr


def test_interrupt(site: Site) -> None:
    """Ctrl-C ends the command with 130 and without a traceback."""
    with site.process("route", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        # More than the pipe holds: once it is all written, the command is reading, and goes on
        # until its input ends.
        process.stdin.write(mail("one", body="line\n" * 100_000))
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip() == b"postoffice: interrupted"


def test_reader_goes_away(site: Site) -> None:
    """When the reader of the output has seen enough, the command ends without a word."""
    site.deliver(*(mail(f"{number} {'x' * 150}") for number in range(600)))
    site.done()
    with site.process("messages", "billing", "--limit", "600") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"id ")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_terminal_of_another_encoding(site: Site) -> None:
    """A character that the output's encoding lacks shows as an escape and is no error."""
    site.deliver(mail("snow ☃ man"))
    site.done()
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with site.process("messages", "billing", env=environment) as process:
        output, said = process.communicate()
    assert (process.returncode, said) == (0, b"")
    assert rb"snow \u2603 man" in output


# -- on a terminal ---------------------------------------------------------------------------------


def on_terminal(site: Site, *arguments: str) -> str:
    """Run the command on a terminal of 100 columns and return all that it wrote to it."""
    controller, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    with site.process(*arguments, stdout=terminal, stderr=terminal, env=environment):
        os.close(terminal)
        output = b""
        while True:
            try:
                more = os.read(controller, 65536)
            except OSError:
                # So Linux tells that nobody has the other end open any more.
                break
            output += more
    os.close(controller)
    return output.decode()


def test_tables_on_a_terminal(site: Site) -> None:
    """A table fits the terminal, and the text in it is neither obeyed nor taken for markup."""
    site.deliver(mail("[red]x[/red] \x1b[2J\x9b31m\u202e" + "long " * 40))
    site.done()
    output = on_terminal(site, "messages", "billing")
    # The styles of headings are the table's own.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output).replace("\r\n", "\n")
    assert not CONTROLS.search(plain)
    assert "[red]x[/red]" in plain
    assert max(map(len, plain.split("\n"))) <= 100
    assert "…" in plain


def test_raw_on_a_terminal(site: Site) -> None:
    """On a terminal even the raw message shows its controls as escapes, and says so."""
    site.deliver(mail("one", body=HOSTILE))
    site.done()
    (id,) = site.ids("billing")
    output = on_terminal(site, "show", "billing", id, "--raw").replace("\r\n", "\n")
    assert not CONTROLS.search(output)
    assert r"\x1b[2J\x1b]0;own\x07\x9b31m\u202ertl [red]x[/red]" in output
    assert "redirect the output" in output


def test_progress_on_a_terminal(site: Site) -> None:
    """On a terminal the import shows how far it is, and leaves nothing behind."""
    site.deliver(mail("one"), mail("two"))
    output = on_terminal(site)
    assert "importing" in output
    assert "2/2" in output
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).rstrip().endswith("0:00:00")


# -- the pieces ------------------------------------------------------------------------------------


def test_times_and_sizes() -> None:
    """Times beyond the calendar, ages and sizes are shown, whatever their number."""
    assert local_time(10**30) == f"@{10**21}"
    assert local_time(-(10**30)).startswith("@-")
    ages = [age(0, seconds * 10**9) for seconds in (-5, 119, 120, 7199, 7200, 172_799, 172_800)]
    assert ages == ["0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d"]
    assert [size(number) for number in (0, 1023, 1024, 1536, 1 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KB",
        "1.5 KB",
        "1.0 MB",
        "5120.0 GB",
    ]


def test_help_opens_nothing_heavy() -> None:
    """The help of the command imports neither the database nor the tables."""
    script = (
        "import sys\n"
        "from postoffice.cli.group import postoffice\n"
        "try:\n"
        "    postoffice(['--help'], prog_name='postoffice')\n"
        "except SystemExit as ending:\n"
        "    assert ending.code == 0\n"
        "print(sorted({'ZODB', 'ZEO', 'BTrees', 'rich', 're2'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")
