"""Mail by SMTP into a real Postfix, and by each of its ways to us into the right queue."""

from __future__ import annotations

import configparser
import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transaction

from postoffice.database import open_database
from postoffice.queue import open_queue
from tests.postfix import ACCOUNT, ROOT, Postfix, fragment, python_of_account, require_postfix
from tests.zeo_server import ZeoServer, free_port

# Each has a domain of its own, WAY.apps.example.com. "pipe" opens the database itself, "handover"
# finds the listener at the unix socket; "tcp" is a second listener, which refuses what it can.
WAYS = ("maildir", "pipe", "handover", "lmtp", "tcp")
QUEUES = """
[queue:billing]
filters =
    envelope_to: billing@.apps.example.com
[queue:apps]
filters =
    envelope_to: @.apps.example.com @mx.example.net
"""
DOMAINS = "virtual_mailbox_domains = apps.example.com billing.example.com\n"
LAUNCHER = "/usr/lib/postoffice/deliver"
UTF8 = ["SMTPUTF8", "BODY=8BITMIME"]
EIGHT_BIT = "Übergrößen\n".encode("latin-1") + b"y" * 5000 + b"\n.\nFrom here on\n"


@dataclass(frozen=True, slots=True)
class Queued:
    """A message that an application has taken out of a queue."""

    queue: str
    sender: str | None
    recipient: str
    mta_queue_id: str
    subject: str
    message_id: str
    raw: bytes

    @property
    def body(self) -> bytes:
        """What follows the header."""
        return self.raw.partition(b"\n\n")[2]


def letter(subject: str, body: bytes = b"Hello.\n") -> bytes:
    """Compose a message that names none of those whom it is for."""
    identity = hashlib.sha256(subject.encode()).hexdigest()[:16]
    head = (
        f"From: Ann <ann@example.org>\nTo: list@example.org\nSubject: {subject}\n"
        f"Message-ID: <{identity}@example.org>\n\n"
    )
    return head.encode() + body


class Unit:
    """The systemd unit of ``etc``, played by us."""

    def __init__(self, python: list[str], ini: Path, **process: Any) -> None:
        """Prepare to run what it runs, with this configuration."""
        unit = configparser.ConfigParser(strict=False)
        unit.read(ROOT / "etc" / "postoffice-lmtp.service")
        service = unit["Service"]
        command = service["ExecStart"].replace("/srv/postoffice/postoffice.ini", str(ini))
        first, *words = shlex.split(command)
        assert first == "/opt/postoffice/bin/postoffice"
        self._words = [*python, "-m", "postoffice.cli", *words]
        self._options = {"umask": int(service["UMask"], 8), **process}
        self._said = ini.with_suffix(".said")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with open(self._said, "wb") as said:
            self._process = subprocess.Popen(
                self._words, stderr=said, start_new_session=True, **self._options
            )
        deadline = time.monotonic() + 30
        while b"listening" not in self._said.read_bytes():
            assert self._process.poll() is None, self._said.read_text()
            assert time.monotonic() < deadline, self._said.read_text()
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it as systemd does; SIGKILL is for all of its processes."""
        if self._process is None:
            return
        if how is signal.SIGKILL:
            os.killpg(self._process.pid, how)
        else:
            self._process.send_signal(how)
        assert self._process.wait(60) in (0, -how), self._said.read_text()
        self._process = None

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it and start it again."""
        self.stop(how)
        self.start()


class Wiring:
    """A Postfix, a depot behind ZEO, and all that leads from the one to the other.

    :ivar folder: of the user who plays postoffice.
    :ivar units: the listeners, at the unix socket and at the port.
    """

    def __init__(self, folder: Path) -> None:
        """Lay everything out; nothing runs yet."""
        self.folder = folder
        owner = pwd.getpwnam(ACCOUNT)
        self._as_account: dict[str, Any] = {
            "user": owner.pw_uid,
            "group": owner.pw_gid,
            "extra_groups": [],
            "cwd": folder,
        }
        self._python = python_of_account()
        self._port = free_port()
        self._make_environment()
        self.postfix = Postfix(self._main(owner), self._master())
        place = self.postfix.queue_directory / "postoffice"
        place.mkdir()
        shutil.chown(place, ACCOUNT, "postfix")
        place.chmod(0o2750)
        storage = folder / "var"
        storage.mkdir()
        shutil.chown(storage, ACCOUNT)
        self.storage = ZeoServer(
            storage, free_port(), [*self._python, "-P"], **self._as_account, umask=0o077
        )
        self.ini = self._configure("postoffice.ini", f"lmtp = unix:{place}/lmtp\n")
        self.strict_ini = self._configure(
            "strict.ini", f"lmtp = 127.0.0.1:{self._port}\nunrouted = reject\n"
        )
        # The one hands over to the listener; the other knows of none.
        self._install("deliver", self.ini, place / "lmtp")
        self._install("deliver-alone", self.strict_ini, folder / "none")
        self.units = [
            Unit(self._python, ini, **self._as_account) for ini in (self.ini, self.strict_ini)
        ]

    def _make_environment(self) -> None:
        """Make what looks like an environment that pip has made."""
        binaries = self.folder / "venv" / "bin"
        binaries.mkdir(parents=True)
        python = binaries / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.join(self._python)} "$@"\n')
        python.chmod(0o755)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.folder / "venv" / "lib" / version / "site-packages"
        packages.mkdir(parents=True)
        (packages / "postoffice").symlink_to(ROOT / "postoffice")

    def _main(self, owner: pwd.struct_passwd) -> str:
        """Return the samples for main.cf, for a domain each."""
        aliases = self.folder / "aliases"
        aliases.write_text(fragment("aliases.pipe", {LAUNCHER: str(self.folder / "deliver")}))
        shutil.chown(aliases, ACCOUNT)
        subprocess.run(["/usr/sbin/postalias", f"hash:{aliases}"], check=True)
        port = f"lmtp:inet:127.0.0.1:{self._port}"
        transports = {
            "maildir": "virtual:",
            "pipe": "postoffice:",
            "handover": "handover:",
            "lmtp": "lmtp:unix:postoffice/lmtp",
            "tcp": port,
            "checked": port,
        }
        domains = {
            f"{way}.{place}.example.com": transport
            for way, transport in transports.items()
            for place in ("apps", "nowhere")
        }
        table = " ".join(f"{domain}={transport}" for domain, transport in domains.items())
        numbers = {f"{kind}_maps = static:5000": "" for kind in ("uid", "gid")}
        numbers = {old: old.replace("5000", str(owner.pw_uid)) for old in numbers}
        numbers["gid_maps = static:5000"] = f"gid_maps = static:{owner.pw_gid}"
        return "".join(
            [
                f"virtual_mailbox_domains = {' '.join(domains)}\n",
                f"transport_maps = inline:{{ {table} }}\n",
                f"alias_maps = hash:{aliases}\n",
                "handover_destination_recipient_limit = 1\n",
                fragment(
                    "main.cf.maildir", {DOMAINS: "", "/srv/postoffice": str(self.folder), **numbers}
                ),
                fragment("main.cf.pipe", {DOMAINS: "", "virtual_transport = postoffice\n": ""}),
                fragment(
                    "main.cf.lmtp",
                    {DOMAINS: "", "virtual_transport = lmtp:unix:postoffice/lmtp\n": ""},
                ),
                fragment(
                    "main.cf.verify",
                    {
                        " apps.example.com": " checked.apps.example.com",
                        " billing.example.com": " checked.nowhere.example.com",
                    },
                ),
                fragment("main.cf.incoming", {}),
            ]
        )

    def _master(self) -> str:
        changes = {"user=postoffice": f"user={ACCOUNT}"}
        alone = {**changes, LAUNCHER: str(self.folder / "deliver-alone")}
        handing = {
            **changes,
            LAUNCHER: str(self.folder / "deliver"),
            "postoffice unix": "handover unix",
        }
        return fragment("master.cf.pipe", alone) + fragment("master.cf.pipe", handing)

    def _configure(self, name: str, options: str) -> Path:
        ini = self.folder / name
        uri = self.storage.uri(wait_seconds=2)
        maildir = f"maildir = {self.folder}/Maildir\n"
        ini.write_text(f"[post office]\nzodb_uri = {uri}\n{maildir}{options}{QUEUES}")
        return ini

    def _install(self, name: str, ini: Path, socket: Path) -> None:
        """Install the launcher, its values corrected."""
        text = (ROOT / "etc" / "postoffice-deliver").read_text()
        values = {
            "PYTHON": self.folder / "venv" / "bin" / "python",
            "CONFIG": ini,
            "SOCKET": socket,
            "TIMEOUT": 100,
        }
        for key, value in values.items():
            text, found = re.subn(rf"(?m)^{key}=.*$", f"{key}={value}", text)
            assert found == 1, key
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def import_maildir(self) -> None:
        """Run the import as cron does."""
        words = [*self._python, "-m", "postoffice.cli", "-C", str(self.ini), "import"]
        done = subprocess.run(
            words, capture_output=True, check=False, umask=0o027, **self._as_account
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def settle(self) -> None:
        """Wait until all mail has left Postfix, and import what went to the Maildir."""
        self.postfix.wait(self._is_delivered, 120)
        self.import_maildir()

    def _is_delivered(self) -> bool:
        waiting = self.postfix.queue()
        if any(one["queue_name"] == "deferred" for one in waiting.values()):
            self.postfix.flush()
        return not waiting

    def taken(self) -> list[Queued]:
        """Take all that is in the queues, as applications do."""
        found = []
        with closing(open_database(self.storage.uri())) as database:
            for name in ("billing", "apps"):
                with open_queue(database, name) as queue:
                    while queue:
                        message = queue.pop_next()
                        envelope = message.envelope
                        assert envelope is not None
                        (recipient,) = envelope.recipients
                        found.append(
                            Queued(
                                name,
                                envelope.sender,
                                recipient,
                                envelope.mta_queue_id,
                                str(message["Subject"]),
                                str(message["Message-ID"]),
                                message.raw,
                            )
                        )
                        transaction.commit()
        return found

    def archived(self) -> list[bytes]:
        """Return the originals in the archive, and empty it."""
        files = list(self.folder.glob("Maildir/.????.??.??/cur/*"))
        found = [path.read_bytes() for path in files]
        for path in files:
            path.unlink()
        return found


@pytest.fixture(scope="module")
def running() -> Iterator[Wiring]:
    """Everything, and all of it runs."""
    require_postfix()
    folder = Path(tempfile.mkdtemp(prefix="postoffice-wiring-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        shutil.chown(folder, ACCOUNT)
        folder.chmod(0o755)
        wiring = Wiring(folder)
        stack.callback(wiring.postfix.remove)
        stack.enter_context(wiring.storage)
        wiring.import_maildir()
        for unit in wiring.units:
            stack.callback(unit.stop, signal.SIGKILL)
            unit.start()
        wiring.postfix.start()
        yield wiring


@pytest.fixture
def wired(running: Wiring) -> Wiring:
    """Everything that runs, its queues and its archive empty."""
    running.taken()
    running.archived()
    return running


@pytest.mark.parametrize("way", WAYS)
def test_each_message_is_in_its_queue_with_its_envelope(wired: Wiring, way: str) -> None:
    """An entry for each recipient has the sender, this recipient and Postfix's queue id."""
    here = f"@{way}.apps.example.com"
    sent: list[tuple[str, list[str], bytes, list[str]]] = [
        ("ann@example.org", ["billing"], b"Hello.\n", []),
        # In one queue and in another, and in one for two.
        ("ann@example.org", ["billing", "support", "sales"], b"Hello.\n", []),
        ("", ["support"], b"Hello.\n", []),
        ("jörg@example.org", ["ü"], "Grüße\n".encode(), UTF8),
        ("ann@example.org", ["support"], EIGHT_BIT, ["BODY=8BITMIME"]),
        ("ann+list=x@example.org", ["support+case-42"], b"Hello.\n", []),
        ('"o\\"ne two"@example.org', ['"a b"'], b"Hello.\n", []),
    ]
    expected = []
    for number, (sender, people, body, options) in enumerate(sent):
        subject = f"no. {number} by {way}"
        recipients = [f"{one}{here}" for one in people]
        assert wired.postfix.send(sender, recipients, letter(subject, body), options) == {}
        expected += [
            ("billing" if one == f"billing{here}" else "apps", sender, one, subject, body)
            for one in recipients
        ]
    wired.settle()
    found = wired.taken()
    told = [(one.queue, one.sender, one.recipient, one.subject, one.body) for one in found]
    assert sorted(told) == sorted(expected)
    for one in found:
        assert f" {one.mta_queue_id}: message-id={one.message_id}\n" in wired.postfix.log
    # Of what is queued, the archive keeps the files of the Maildir alone.
    assert len(wired.archived()) == (len(expected) if way == "maildir" else 0)


def test_a_large_message_goes_every_way(wired: Wiring) -> None:
    """A message of 20 MB arrives unchanged for each of its recipients."""
    body = b"".join(b"%069d\n" % number for number in range(20 * 1024 * 1024 // 70))
    recipients = [f"large@{way}.apps.example.com" for way in WAYS]
    wired.postfix.send("ann@example.org", recipients, letter("large", body))
    wired.settle()
    found = wired.taken()
    assert sorted(one.recipient for one in found) == sorted(recipients)
    assert {hashlib.sha256(one.body).digest() for one in found} == {hashlib.sha256(body).digest()}


def test_an_alias_runs_the_launcher(wired: Wiring) -> None:
    """What an alias's |command gets is in the queue with the envelope of the environment."""
    recipient = "support+x@mx.example.net"
    wired.postfix.send("", [recipient], letter("by alias", EIGHT_BIT))
    wired.settle()
    (one,) = wired.taken()
    assert (one.queue, one.sender, one.recipient) == ("apps", "", recipient)
    assert one.body == EIGHT_BIT
    assert f" {one.mta_queue_id}: message-id=" in wired.postfix.log


def test_what_no_queue_takes_is_discarded(wired: Wiring) -> None:
    """With unrouted = discard it is archived with its envelope, and its sender hears nothing."""
    ways = ("maildir", "handover", "lmtp")
    recipients = [f"who@{way}.nowhere.example.com" for way in ways]
    sender = "ann@maildir.apps.example.com"
    wired.postfix.send(sender, recipients, letter("for nobody"))
    wired.settle()
    assert wired.taken() == []
    envelope = re.compile(rf"Return-Path: <{sender}>\n(?:X-Original-To: .*\n)?Delivered-To: (.*)\n")
    tops = [envelope.match(raw.decode()) for raw in wired.archived()]
    assert sorted(top[1] for top in tops if top is not None) == sorted(recipients)
    assert len(tops) == len(recipients)


def test_what_no_queue_takes_is_returned(wired: Wiring) -> None:
    """With unrouted = reject Postfix returns it to its sender, by LMTP and by command."""
    recipients = [f"who@{way}.nowhere.example.com" for way in ("tcp", "pipe")]
    sender = "ann@maildir.apps.example.com"
    wired.postfix.send(sender, recipients, letter("for nobody"))
    wired.settle()
    bounces = wired.taken()
    assert {(one.sender, one.recipient) for one in bounces} == {("", sender)}
    said = b"".join(one.body for one in bounces).decode()
    for recipient in recipients:
        assert re.search(rf"\nFinal-Recipient: rfc822; {recipient}\n(.+\n)*Status: 5.1.1\n", said)
    assert str(wired.folder) not in said


def test_what_no_queue_takes_is_refused_while_its_sender_is_connected(wired: Wiring) -> None:
    """With main.cf.verify it gets 550 in the SMTP session; the other recipient's mail arrives."""
    known, unknown = "in@checked.apps.example.com", "who@checked.nowhere.example.com"
    refused = wired.postfix.send("ann@maildir.apps.example.com", [known, unknown], letter("asked"))
    assert {one: code for one, (code, _) in refused.items()} == {unknown: 550}
    wired.settle()
    assert [one.recipient for one in wired.taken()] == [known]
    assert wired.archived() == []


def test_all_arrive_once_whatever_stands_still(wired: Wiring) -> None:
    """Mail sent while the listeners, the storage or Postfix itself is stopped waits for them."""
    recipients = [f"support@{way}.apps.example.com" for way in WAYS]
    expected: list[tuple[str, str]] = []

    def send(send_it: Callable[[str, list[str], bytes], object], subject: str) -> None:
        send_it("ann@example.org", recipients, letter(subject))
        expected.extend((subject, one) for one in recipients)

    postfix = wired.postfix
    for unit in wired.units:
        unit.stop()
    send(postfix.send, "no listener")
    postfix.wait(lambda: re.search(r"to=<support@tcp\..*status=deferred", postfix.log))
    wired.storage.stop()
    for unit in wired.units:
        unit.start()
    send(postfix.send, "no storage")
    postfix.wait(lambda: re.search(r"to=<support@lmtp\..*dsn=4.3.0, status=deferred", postfix.log))
    postfix.wait(lambda: re.search(r"to=<support@pipe\..*dsn=4.3.0, status=deferred", postfix.log))
    postfix.stop()
    send(postfix.sendmail, "no Postfix")
    wired.storage.start()
    postfix.start()
    wired.settle()
    assert sorted((one.subject, one.recipient) for one in wired.taken()) == sorted(expected)


def test_all_arrive_once_whatever_is_killed(wired: Wiring) -> None:
    """Mail that is under way while a part is killed is not lost, and not doubled."""
    recipients = [f"support@{way}.apps.example.com" for way in WAYS]

    def kill_listeners() -> None:
        for unit in wired.units:
            unit.restart(signal.SIGKILL)

    def kill_storage() -> None:
        wired.storage.stop("SIGKILL")
        wired.storage.start()

    expected = []
    for number, strike in enumerate([kill_listeners, kill_storage, wired.postfix.restart]):
        for one in range(3):
            subject = f"{number}.{one}"
            wired.postfix.send("ann@example.org", recipients, letter(subject))
            expected += [(subject, recipient) for recipient in recipients]
        strike()
    wired.settle()
    assert sorted((one.subject, one.recipient) for one in wired.taken()) == sorted(expected)


def test_samples_and_documents_name_one_launcher() -> None:
    """The launcher has one name in all samples, in its own text and in the documents."""
    names = [*(f"etc/{one}" for one in ("aliases.pipe", "master.cf.pipe", "postoffice-deliver"))]
    for name in [*names, "docs/postfix.rst"]:
        found = set(re.findall(r"/usr/\S+/deliver\b", (ROOT / name).read_text()))
        assert found == {LAUNCHER}, name
