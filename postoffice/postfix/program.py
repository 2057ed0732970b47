"""A command of Postfix, run: what it wrote, in bounded time, and what its failures mean."""

from __future__ import annotations

import os
import selectors
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, cast

from postoffice.postfix.errors import (
    OutputCut,
    PostfixDown,
    PostfixError,
    PostfixMissing,
    PostfixRefused,
    PostfixSilent,
)

__all__ = ["LONGEST_LINE", "Ending", "Output", "Program", "failure", "run"]

#: Bytes; a message with 400,000 recipients has a line as long in a listing.
LONGEST_LINE = 64 << 20
_Pipes = tuple[IO[bytes], IO[bytes]]

# What a pipe holds.
_CHUNK = 1 << 16
#: As much of what a command says of its troubles is kept.
_SAID = 1 << 16
# Where Postfix's commands are; an ordinary user's PATH has no sbin.
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")
_GRACE = 2.0
# The status of env(1) and of a shell.
_NO_COMMAND = 127
_REFUSALS = (
    "permission denied",
    "operation not permitted",
    "not allowed",
    "is reserved for",
    "use of this command",
    "unauthorized configuration directory",
    "a password is required",
    "a terminal is required",
    "not in the sudoers",
    "may not run sudo",
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a command ended.

    :ivar status: its exit status; negative, the signal that ended it.
    :ivar said: what it wrote to standard error, the first 64 KiB.
    """

    status: int
    said: str


@dataclass(frozen=True, slots=True)
class Output:
    """All that a command wrote, and how it ended.

    :ivar status: its exit status; negative, the signal that ended it.
    :ivar stdout: what it wrote to standard output.
    :ivar said: what it wrote to standard error, the first 64 KiB.
    """

    status: int
    stdout: bytes
    said: str


class Program:
    """A command that runs; leaving the context ends it, whatever it is at.

    :ivar exhausted: whether all of its output was read.
    """

    def __init__(self, words: Sequence[str], timeout: float, given: bytes = b"") -> None:
        """Start it.

        :param words: the command and its arguments; no shell sees them.
        :param timeout: seconds for which it may say nothing and take nothing.
        :param given: what it reads from standard input.
        :raises PostfixMissing: there is no such command.
        :raises PostfixRefused: it may not be run.
        :raises PostfixError: it cannot be run.
        """
        self._words = list(words)
        self._timeout = timeout
        self._given = memoryview(given)
        self._said = bytearray()
        self.exhausted = False
        folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
        path = os.pathsep.join([*folders, *(name for name in _SBIN if name not in folders)])
        try:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE if given else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=os.environ | {"PATH": path, "LC_ALL": "C"},
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PostfixMissing(_no_command(self._words[0])) from error
        except PermissionError as error:
            raise PostfixRefused(
                f"{self._words[0]} may not be run by this user; run as root or set sudo"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PostfixError(f"{self._words[0]} cannot be run: {reason}") from error

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        for end in (process.terminate, process.kill):
            if process.poll() is not None:
                return
            # Under sudo it is not ours to end: its next write ends it, now that nobody reads.
            with suppress(PermissionError):
                end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)

    def chunks(self) -> Iterator[bytes]:
        """Yield what it writes to standard output, as it comes; then it has closed both outputs.

        :raises PostfixSilent: it neither said nor took anything for too long.
        """
        stdin = self._process.stdin
        # Both are pipes, so they are there.
        stdout, stderr = cast("_Pipes", (self._process.stdout, self._process.stderr))
        with selectors.DefaultSelector() as waiting:
            waiting.register(stdout, selectors.EVENT_READ)
            waiting.register(stderr, selectors.EVENT_READ)
            if stdin is not None:
                os.set_blocking(stdin.fileno(), False)
                waiting.register(stdin, selectors.EVENT_WRITE)
            while waiting.get_map():
                ready = waiting.select(self._timeout)
                if not ready:
                    raise PostfixSilent(
                        f"{self._words[0]} said nothing for {self._timeout:g} s and was ended;"
                        " see Postfix's log"
                    )
                for key, _ in ready:
                    if stdin is not None and key.fileobj is stdin:
                        if not self._give(key.fd):
                            waiting.unregister(stdin)
                            stdin.close()
                        continue
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        waiting.unregister(key.fileobj)
                    elif key.fileobj is stdout:
                        yield chunk
                    else:
                        self._said += chunk[: _SAID - len(self._said)]
        self.exhausted = True

    def _give(self, pipe: int) -> bool:
        """Write some of what it is given; return whether there is more to give."""
        try:
            written = os.write(pipe, self._given[:_CHUNK])
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        self._given = self._given[written:]
        return bool(self._given)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of its standard output, without their ends; the last may lack its end.

        :raises PostfixSilent: it neither said nor took anything for too long.
        :raises OutputCut: a line is longer than :data:`LONGEST_LINE`.
        """
        pending: list[bytes] = []
        length = 0
        for chunk in self.chunks():
            first, *others = chunk.split(b"\n")
            pending.append(first)
            length += len(first)
            if length > LONGEST_LINE:
                raise OutputCut("the listing has a line longer than any of Postfix's")
            if others:
                yield b"".join(pending)
                yield from others[:-1]
                pending = [others[-1]]
                length = len(others[-1])
        rest = b"".join(pending)
        if rest:
            yield rest

    def ended(self) -> Ending:
        """Wait for its end, after all of its output was read.

        :raises PostfixSilent: it closed its outputs and goes on.
        """
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired as error:
            raise PostfixSilent(
                f"{self._words[0]} did not end within {self._timeout:g} s; see Postfix's log"
            ) from error
        return Ending(status, self._said.decode("utf-8", "replace"))


def run(words: Sequence[str], timeout: float, given: bytes = b"") -> Output:
    """Run a command and return all that it wrote; its exit status is the caller's to judge.

    :param words: the command and its arguments; no shell sees them.
    :param timeout: seconds for which it may say nothing and take nothing.
    :param given: what it reads from standard input.
    :raises PostfixMissing: there is no such command.
    :raises PostfixRefused: it may not be run.
    :raises PostfixSilent: it said nothing for too long.
    """
    with Program(words, timeout, given) as program:
        stdout = b"".join(program.chunks())
        ending = program.ended()
    return Output(ending.status, stdout, ending.said)


def failure(words: Sequence[str], status: int, said: str) -> PostfixError:
    """Return the error that a failed command stands for.

    :param words: the command and its arguments.
    :param status: its exit status.
    :param said: what it wrote to standard error.
    """
    name = words[0]
    what = _fault(said)
    lowered = said.lower()
    if status == _NO_COMMAND or "command not found" in lowered:
        return PostfixMissing(_no_command(next(iter(words[1:]), name), what))
    if any(refusal in lowered for refusal in _REFUSALS):
        return PostfixRefused(
            f"{what or name}: this user may not; run as root, set sudo, or see"
            " authorized_mailq_users and alternate_config_directories in main.cf"
        )
    if "mail system is down" in lowered:
        # Root is served without it, and is told of that first; so what failed is not the asking.
        otherwise = "" if "accessing queue directly" in lowered else ", or ask as root"
        return PostfixDown(f"{what}; the mail system is down: start it (postfix start){otherwise}")
    ended = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return PostfixError(f"{name} {ended}: {what or 'it said nothing; see the log of Postfix'}")


def _fault(said: str) -> str:
    """Return the line in which a command names its trouble; the last where none stands out."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    for mark in ("fatal:", "error:"):
        for line in lines:
            if mark in line:
                return line[:500]
    return lines[-1][:500] if lines else ""


def _no_command(name: str, said: str = "") -> str:
    what = said or f"there is no command {name}"
    return f"{what}; install Postfix, or name its command in [postfix]"
