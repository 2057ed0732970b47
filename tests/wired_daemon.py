"""A Postfix, ``postoffice serve`` behind it, and applications behind that: each is a process."""

from __future__ import annotations

import json
import pwd
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.application import Application
from tests.postfix import ACCOUNT, ROOT, Postfix, fragment, python_of_account, require_postfix
from tests.serving import Serving

__all__ = ["DOMAINS", "QUEUES", "WiredDaemon"]

#: A domain goes by each way; what is in front of the @ names the queue.
DOMAINS = ("maildir.example.com", "lmtp.example.com")
QUEUES = ("billing", "sales")
_SAMPLE_DOMAINS = "virtual_mailbox_domains = apps.example.com billing.example.com\n"


class WiredDaemon:
    """All of it, which belongs to a user who is not root.

    :ivar folder: of that user: the configuration, the Maildir and the database.
    :ivar uri: of the database, as an application opens it.
    :ivar serving: the daemon that was started last.
    """

    def __init__(self) -> None:
        """Lay everything out; nothing runs yet.

        Skips the test, aloud, where no private Postfix can be started.
        """
        require_postfix()
        self._python = python_of_account()
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="po"))
        self._stack.callback(shutil.rmtree, self.folder)
        owner = pwd.getpwnam(ACCOUNT)
        self._as_account: dict[str, Any] = {
            "python": self._python,
            "user": owner.pw_uid,
            "group": owner.pw_gid,
            "extra_groups": [],
        }
        self.folder.chmod(0o755)
        shutil.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self.postfix = Postfix(self._main(owner))
        self._stack.callback(self.postfix.remove)
        place = self.postfix.queue_directory / "postoffice"
        place.mkdir()
        shutil.chown(place, ACCOUNT, "postfix")
        place.chmod(0o2750)
        self.data = self.folder / "data"
        self.uri = f"file://{self.data}/depot.fs?blobstorage_dir={self.data}/blobs"
        self.ini = self.folder / "postoffice.ini"
        self._options = f"lmtp = unix:{place}/lmtp\nmaildir = {self.data}/Maildir\n"
        self.configure()
        self.serving: Serving

    def _main(self, owner: pwd.struct_passwd) -> str:
        numbers = {
            "uid_maps = static:5000": f"uid_maps = static:{owner.pw_uid}",
            "gid_maps = static:5000": f"gid_maps = static:{owner.pw_gid}",
        }
        paths = {"/srv/postoffice": f"{self.folder}/data"}
        by_maildir, by_lmtp = DOMAINS
        return "".join(
            [
                f"virtual_mailbox_domains = {by_maildir} {by_lmtp}\n",
                f"transport_maps = inline:{{ {by_maildir}=virtual: "
                f"{by_lmtp}=lmtp:unix:postoffice/lmtp }}\n",
                # More than anybody here sends at once would be put off, though all is well.
                "smtpd_client_connection_rate_limit = 0\n",
                fragment("main.cf.maildir", {_SAMPLE_DOMAINS: "", **paths, **numbers}),
                fragment(
                    "main.cf.lmtp",
                    {_SAMPLE_DOMAINS: "", "virtual_transport = lmtp:unix:postoffice/lmtp\n": ""},
                ),
            ]
        )

    def configure(self, more: str = "") -> None:
        """Write the configuration, with these lines at its end."""
        queues = "".join(
            f"[queue:{name}]\nfilters =\n    envelope_to: {name}@.example.com\n" for name in QUEUES
        )
        self.ini.write_text(
            f"[post office]\nzodb_uri = {self.uri}\n{self._options}\n{queues}{more}"
        )

    def make_data(self) -> None:
        """Make the folder for the Maildir and the database, unless something is there."""
        self.data.mkdir(exist_ok=True)
        shutil.chown(self.data, ACCOUNT)
        self.data.chmod(0o700)

    def mount_data(self, megabytes: int) -> None:
        """Make that folder a small disk of its own, in memory."""
        self.data.mkdir()
        size = f"size={megabytes}m"
        mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.data)]
        if subprocess.run(mount, check=False).returncode:
            self._stack.close()
            pytest.skip("no file system can be mounted")
        umount = ["umount", "--lazy", str(self.data)]
        self._stack.callback(subprocess.run, umount, check=True)
        self.make_data()

    # -- its life ----------------------------------------------------------------------------------

    def serve(self) -> Serving:
        """Start the daemon; return it when it is ready."""
        words = ("-m", "postoffice.cli", "-C", str(self.ini), "-v", "serve")
        self.serving = Serving(self.ini, words=words, umask=0o027, **self._as_account)
        self._stack.callback(self.serving.__exit__)
        return self.serving.wait_ready()

    def lay_out(self, *names: str) -> None:
        """Make the trees of applications, by a process of the user."""
        code = "import sys; from tests.application import *; lay_out(sys.argv[1], sys.argv[2:])"
        self._run("-c", code, self.uri, *names)

    def taken(self) -> dict[str, list[float]]:
        """Return when each message was taken, as :func:`tests.application.taken` does."""
        code = (
            "import json, sys; from tests.application import taken; "
            "json.dump(taken(sys.argv[1]), sys.stdout)"
        )
        found: dict[str, list[float]] = json.loads(self._run("-c", code, self.uri))
        return found

    def _run(self, *words: str) -> bytes:
        options = dict(self._as_account)
        words = (*options.pop("python"), *words)
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            words, cwd=ROOT, check=True, capture_output=True, **options
        )
        return done.stdout

    def application(self, queue: str, name: str, seconds: float) -> Application:
        """Start an application; it ends with the rest."""
        said = self.folder / f"{name}.said"
        started = Application(self.uri, queue, name, said, seconds, **self._as_account)
        return self._stack.enter_context(started)

    def is_delivered(self) -> bool:
        """Have Postfix try all that it has put off; tell whether it has nothing left."""
        waiting = self.postfix.queue()
        if any(one["queue_name"] == "deferred" for one in waiting.values()):
            self.postfix.flush()
        return not waiting

    def __enter__(self) -> WiredDaemon:
        """Start Postfix and the daemon."""
        self.make_data()
        self.postfix.start()
        self.serve()
        return self

    def __exit__(self, *error: object) -> None:
        """End and remove everything."""
        self._stack.close()
