"""A private Postfix in a temporary folder, as Debian configures it, for tests and rehearsals."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

__all__ = ["ACCOUNT", "Postfix", "fragment", "python_of_account", "require_postfix"]

ROOT = Path(__file__).resolve().parent.parent

# Who plays the user postoffice: Postfix runs no command as root.
ACCOUNT = "nobody"

_PROGRAMS = ("postfix", "postconf", "postqueue", "postsuper", "postalias", "sendmail")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_SERVICES = Path("/etc/postfix/master.cf")
_SECONDS = 30
_JAILED = ("hosts", "localtime", "nsswitch.conf", "resolv.conf", "services")
# Ends and removes the Postfix in this folder when its standard input does: however our process
# ends.
_UNDERTAKER = """
read -r _
if [ -s "$0/spool/pid/master.pid" ]; then postfix -c "$0/etc" stop; fi
rm -rf -- "$0"
"""

_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/log/mail.log
maillog_file_prefixes = {folder}
myhostname = mx.example.net
mydomain = example.net
myorigin = mx.example.net
mydestination = mx.example.net
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
local_recipient_maps =
recipient_delimiter = +
biff = no
message_size_limit = 40960000
# Nothing leaves this machine.
default_transport = error:5.4.4 no mail leaves this test
relay_transport = error:5.4.4 no mail leaves this test
# What is deferred comes again soon.
queue_run_delay = 2s
minimal_backoff_time = 2s
maximal_backoff_time = 2s
transport_retry_time = 2s
"""


def require_postfix() -> None:
    """Skip the test, aloud, where no private Postfix can be started."""
    if os.getuid() != 0:
        pytest.skip("Postfix is started by root only")
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"Postfix is not installed: {' '.join(missing)}")
    if not _SERVICES.is_file():
        pytest.skip(f"Postfix has no {_SERVICES} to begin with")


def fragment(name: str, changes: Mapping[str, str]) -> str:
    """Return a sample of ``etc``, each of these strings in it replaced by another.

    :raises ValueError: the sample has no such string; then it is not what the caller takes it for.
    """
    text = (ROOT / "etc" / name).read_text()
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"etc/{name} has no {old!r}")
        text = text.replace(old, new)
    return text


def python_of_account() -> list[str]:
    """Return the words of a command that runs our Python with our packages as ``ACCOUNT``.

    The one that runs the tests may be in a folder which that user cannot enter; then the system's
    will do, if it has the same version.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = ":".join([str(ROOT), *(entry for entry in sys.path if entry.endswith("-packages"))])
    for interpreter in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        words = ["/usr/bin/env", f"PYTHONPATH={path}", interpreter]
        try:
            tried = subprocess.run(
                [*words, "-c", "import ZODB, postoffice"],
                capture_output=True,
                check=False,
                cwd="/",
                user=ACCOUNT,
                group=grp.getgrgid(pwd.getpwnam(ACCOUNT).pw_gid).gr_name,
                extra_groups=[],
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return words
    pytest.skip(f"the user {ACCOUNT} can run no {version} with these packages")


class Postfix:
    """A Postfix of our own: SMTP on a port of the loopback interface, and no way out.

    Its services are in a chroot where Debian's are.  It may be stopped and started again, and keeps
    what it has queued.

    :ivar folder: all that is its own; anybody may pass through it.
    :ivar queue_directory: the root of its jail.
    :ivar smtp_port: where it takes mail on 127.0.0.1.
    """

    def __init__(self, main: str = "", master: str = "") -> None:
        """Configure it; it does not run yet.  It is removed when this process ends.

        :param main: what is added to ``main.cf``.
        :param master: what is added to ``master.cf``.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="postoffice-postfix-"))
        self._undertaker = subprocess.Popen(
            ["sh", "-c", _UNDERTAKER, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": _PATH},
        )
        self.folder.chmod(0o755)
        self.queue_directory = self.folder / "spool"
        for name in ("etc", "spool", "data", "log"):
            (self.folder / name).mkdir(mode=0o755)
        shutil.chown(self.folder / "data", "postfix")
        self.smtp_port = _free_port()
        self._configure(main, master)
        self._fill_jail()

    def _configure(self, main: str, master: str) -> None:
        added = set(re.findall(r"^(\w+) *=", main, re.MULTILINE))
        ours = _MAIN.format(folder=self.folder).splitlines()
        kept = [line for line in ours if line.partition(" =")[0] not in added]
        (self.configuration / "main.cf").write_text("\n".join([*kept, main]))
        services, found = re.subn(
            r"^smtp +inet",
            f"127.0.0.1:{self.smtp_port} inet",
            _SERVICES.read_text(),
            count=1,
            flags=re.MULTILINE,
        )
        assert found, f"{_SERVICES} has no SMTP server"
        (self.configuration / "master.cf").write_text(f"{services}\n{master}")

    def _fill_jail(self) -> None:
        """Copy what Debian's start-up copies for the services that cannot see the system."""
        (self.queue_directory / "etc").mkdir()
        for name in _JAILED:
            source = Path("/etc") / name
            if source.exists():
                shutil.copy(source, self.queue_directory / "etc" / name)

    def _run(
        self, *words: str, input: bytes | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            words, input=input, capture_output=True, check=False, env={"PATH": _PATH}, timeout=60
        )
        if check and done.returncode:
            said = (done.stdout + done.stderr).decode("utf-8", "replace")
            raise AssertionError(f"{' '.join(words)}: status {done.returncode}\n{said}{self.log}")
        return done

    @property
    def configuration(self) -> Path:
        """The folder to name in ``-c`` and ``-C``."""
        return self.folder / "etc"

    @property
    def log(self) -> str:
        """What it has logged up to now."""
        try:
            return (self.folder / "log" / "mail.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # -- its life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, and wait until it takes mail."""
        self._run("postfix", "-c", str(self.configuration), "start")
        self.wait(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.smtp_port)) == 0

    def stop(self) -> None:
        """Stop it, and wait until it has ended.  What it has queued stays."""
        self._run("postfix", "-c", str(self.configuration), "stop")

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop it and remove its folder with all that is in it."""
        self._undertaker.communicate()

    def __enter__(self) -> Postfix:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove it."""
        self.remove()

    # -- mail --------------------------------------------------------------------------------------

    def send(
        self, sender: str, recipients: Iterable[str], raw: bytes, options: Iterable[str] = ()
    ) -> dict[str, tuple[int, bytes]]:
        """Send a message by SMTP; return whom it refused, and with which reply.

        :param raw: a message whose lines end in LF.
        :param options: what follows the sender in the MAIL command, as ``SMTPUTF8``.
        :raises smtplib.SMTPException: it refused the sender or the message.
        """
        with smtplib.SMTP("127.0.0.1", self.smtp_port, timeout=_SECONDS) as client:
            try:
                return client.sendmail(
                    sender, list(recipients), raw.replace(b"\n", b"\r\n"), list(options)
                )
            except smtplib.SMTPRecipientsRefused as error:
                return error.recipients

    def sendmail(self, sender: str, recipients: Iterable[str], raw: bytes) -> None:
        """Send a message by the ``sendmail`` command."""
        words = ("sendmail", "-C", str(self.configuration), "-i", "-f", sender, "--")
        self._run(*words, *recipients, input=raw)

    def flush(self) -> None:
        """Have it try everything that is deferred, now."""
        self._run("postqueue", "-c", str(self.configuration), "-f")

    def queue(self) -> dict[str, dict[str, object]]:
        """Return what it has queued: what ``postqueue -j`` tells of each message, by its id."""
        listed = self._run("postqueue", "-c", str(self.configuration), "-j").stdout
        messages = [json.loads(line) for line in listed.splitlines()]
        return {message["queue_id"]: message for message in messages}

    def delete_all(self) -> None:
        """Drop all that it has queued."""
        self._run("postsuper", "-c", str(self.configuration), "-d", "ALL")

    # -- waiting -----------------------------------------------------------------------------------

    def wait(self, until: Callable[[], object], seconds: float = _SECONDS) -> None:
        """Wait until this is true; fail, with the log, when it takes too long."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def wait_for_log(self, text: str, seconds: float = _SECONDS) -> None:
        """Wait until this text is in the log."""
        self.wait(lambda: text in self.log, seconds)

    def wait_until_empty(self, seconds: float = _SECONDS) -> None:
        """Wait until all mail has been delivered or returned."""
        self.wait(lambda: not self.queue(), seconds)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
