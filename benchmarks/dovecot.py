"""A private Dovecot that takes mail by LMTP and sorts it with Sieve, to be measured against.

It does what ``postoffice lmtp`` does with the like rules, as durably: each message is in a file of
one of three Maildirs, and on the disk by fsync, before Dovecot answers.  Debian has it in the
packages dovecot-lmtpd and dovecot-sieve; root starts it.

    python benchmarks/dovecot.py                    # 10 sessions, 3 KB
    python benchmarks/dovecot.py --sessions 1 --size 100000
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

__all__ = ["MAILBOXES", "Dovecot", "send"]

# Who owns the mail: Dovecot delivers as no user below first_valid_uid, and never as root.
ACCOUNT = "nobody"
MAILBOXES = ("Support", "Billing", "INBOX")

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_START_SECONDS = 30

_CONFIGURATION = """\
protocols = lmtp
listen = 127.0.0.1
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
ssl = no
disable_plaintext_auth = no
first_valid_uid = 1
first_valid_gid = 1
mail_location = maildir:{folder}/mail/Maildir
mail_fsync = always
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  driver = static
  args = uid={account} gid={group} home={folder}/mail allow_all_users=yes
}}
namespace inbox {{
  inbox = yes
}}
service lmtp {{
  process_min_avail = {sessions}
  process_limit = 100
  unix_listener {folder}/lmtp {{
    mode = 0666
  }}
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {port}
  }}
}}
protocol lmtp {{
  postmaster_address = postmaster@example.com
  mail_plugins = sieve
}}
plugin {{
  sieve = {folder}/mail/sort.sieve
}}
"""

# A queue by the envelope, one by the header, and one for the rest.
_SIEVE = """\
require ["envelope", "fileinto", "mailbox"];
if envelope :is "to" ["support@example.com"] {
  fileinto :create "Support";
} elsif header :matches "Subject" ["*invoice*", "*bill*"] {
  fileinto :create "Billing";
} else {
  keep;
}
"""


class Dovecot:
    """A Dovecot of our own, with its mail in a folder of its own.

    :ivar folder: all that is its own.
    :ivar path: the unix socket on which it listens.
    :ivar port: the port of 127.0.0.1 on which it listens as well.
    """

    def __init__(self, parent: Path | None = None, sessions: int = 10) -> None:
        """Configure it; it does not run yet.

        :param parent: where its folder is made; its path is short, for the sockets in it.
        :param sessions: so many processes are there from the start.
        :raises FileNotFoundError: there is no Dovecot.
        """
        program = shutil.which("dovecot", path=_PATH)
        if program is None:
            raise FileNotFoundError("Dovecot is not installed: dovecot-lmtpd, dovecot-sieve")
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="postoffice-dovecot-", dir=parent))
        self.folder.chmod(0o755)
        self.path = self.folder / "lmtp"
        self.port = _free_port()
        owner = pwd.getpwnam(ACCOUNT)
        for name in ("run", "state", "mail"):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "mail" / "sort.sieve").write_text(_SIEVE)
        # The script is compiled beside itself, by the user who owns the mail.
        for path in (self.folder / "mail", self.folder / "mail" / "sort.sieve"):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        (self.folder / "dovecot.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                account=owner.pw_uid,
                group=owner.pw_gid,
                port=self.port,
                sessions=sessions,
            )
        )

    @property
    def log(self) -> str:
        """What it has logged up to now."""
        try:
            return (self.folder / "log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def start(self) -> None:
        """Start it, and wait until it listens.

        :raises RuntimeError: it does not start; the text is its log.
        """
        self._process = subprocess.Popen(
            [self._program, "-F", "-c", str(self.folder / "dovecot.conf")],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Dovecot does not start: {self.log}")
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as one:
            return one.connect_ex(str(self.path)) == 0

    def stop(self) -> None:
        """Stop it, and wait until it has ended."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_START_SECONDS)
            self._process = None

    def delivered(self) -> dict[str, int]:
        """Return how many messages each mailbox has."""
        maildir = self.folder / "mail" / "Maildir"
        counts = {}
        for name in MAILBOXES:
            place = maildir if name == "INBOX" else maildir / f".{name}"
            with contextlib.suppress(FileNotFoundError):
                counts[name] = len(os.listdir(place / "new"))
        return counts

    def __enter__(self) -> Dovecot:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it.  Its mail stays: removing many files makes whatever is measured next slow."""
        self.stop()


def send(address: str, sessions: int, messages: int, size: int, recipient: str) -> float:
    """Send messages by LMTP with Postfix's smtp-source; return the seconds that it took.

    :param address: as smtp-source has it: ``unix:/path`` or ``inet:host:port``.
    """
    words = ["smtp-source", "-L", "-s", str(sessions), "-m", str(messages), "-l", str(size)]
    begun = time.monotonic()
    subprocess.run(
        [*words, "-f", "ann@example.org", "-t", recipient, address],
        check=True,
        env={"PATH": _PATH},
    )
    return time.monotonic() - begun


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Measure Dovecot alone."""
    parser = argparse.ArgumentParser(description="Messages a second that Dovecot takes by LMTP.")
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--size", type=int, default=3000)
    parser.add_argument("--recipient", default="support@example.com")
    chosen = parser.parse_args()
    with Dovecot(sessions=chosen.sessions) as dovecot:
        address = f"unix:{dovecot.path}"
        # The first messages make the mailboxes and compile the script.
        send(address, 1, 10, chosen.size, chosen.recipient)
        taken = send(address, chosen.sessions, chosen.messages, chosen.size, chosen.recipient)
        print(f"{chosen.messages / taken:.0f} messages/s  {dovecot.delivered()}")
        print(f"its mail is in {dovecot.folder}")


if __name__ == "__main__":
    main()
