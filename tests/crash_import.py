"""A process that imports on request, each time in a child that strace may kill or fail.

Run as a program: it takes requests as lines of JSON and answers each with one.  The child is
forked from a process that has imported once before, so that it makes no system calls but those of
the import itself, and strace attaches to it before the first of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from postoffice.exceptions import PostofficeError
from postoffice.intake import maildir
from tests.spools import Spool, large, mail, post_office

BUSY, FAILED, DEFECT = 3, 75, 70
_PR_SET_PTRACER = 0x59616D61
_LONGEST_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Ended:
    """How an import ended.

    :ivar status: its exit status, or minus the signal that killed it.
    :ivar output: what it said.
    """

    status: int
    output: str


class ImportServer:
    """The process, from the side of the tests."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_import"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, ini: Path, strace: list[str] | None = None, batch: int = 8, kill_after: float = 0
    ) -> Ended:
        """Import, under strace with these options, or killed after so many seconds.

        :param batch: messages a transaction.
        """
        request = {"ini": str(ini), "strace": strace, "batch": batch, "kill_after": kill_after}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return Ended(**json.loads(stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def _import(ini: str, batch: int) -> int:
    maildir.BATCH = batch
    try:
        with post_office(ini) as office:
            outcome = office.import_messages()
            print(outcome)
            return 0
    except maildir.MaildirBusy as error:
        print(error)
        return BUSY
    except (PostofficeError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        return FAILED


def _child(request: dict[str, Any], output: int, go: int) -> NoReturn:
    status = DEFECT
    try:
        # Where a security module lets only parents trace, strace is none of ours.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for as long as the process
        os.read(go, 1)
        status = _import(request["ini"], request["batch"])
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        # What strace fails last is what this program says of itself.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        go, start = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(start)
            _child(request, output.fileno(), go)
        os.close(go)
        tracer = None
        if request["strace"] is not None:
            tracer = subprocess.Popen(
                ["strace", "-p", str(pid), *request["strace"]], stderr=subprocess.PIPE, text=True
            )
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            if "attached" not in said:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise RuntimeError(f"strace: {said}{tracer.stderr.read()}")
        os.write(start, b"g")
        os.close(start)
        if request["kill_after"]:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        signal.alarm(_LONGEST_SECONDS)
        _, status = os.waitpid(pid, 0)
        signal.alarm(0)
        if tracer is not None:
            tracer.communicate()
        output.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "output": output.read().decode("utf-8", "replace"),
        }


def _warm_up() -> None:
    """Import once, so that every module is there."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool")
        spool.put(mail("one"))
        spool.put(large("two"))
        spool.run()
        spool.run()


def main() -> None:
    """Serve until the end of the input."""
    _warm_up()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
