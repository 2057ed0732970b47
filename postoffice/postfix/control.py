"""Acting on messages of Postfix's queue, by ``postsuper``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from postoffice.postfix.errors import PostfixError
from postoffice.postfix.ids import is_queue_id
from postoffice.postfix.mail import Mail
from postoffice.postfix.program import failure, run
from postoffice.postfix.settings import PostfixSettings
from postoffice.postfix.store import PostqueueStore

__all__ = ["Outcome", "QueueControl"]

# What postsuper says of each is kept, up to 64 KiB for a run.
_BATCH = 500
_DONE = re.compile(
    r"^\S*postsuper: ([A-Za-z0-9]+): "
    r"(?:placed on hold|released from hold|requeued|removed|expired)$",
    re.MULTILINE,
)
_LOG_FILE = "fatal: open logfile"
_NO_SUCH_OPTION = re.compile(r"invalid option|illegal option|usage: postsuper")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the messages on which Postfix was to act; each id is in one of the four.

    :ivar done: the ids of which Postfix said that it was done.
    :ivar unchanged: those of which it said nothing: they were so already, or left a moment before.
    :ivar gone: those that were not in the queue any more.
    :ivar replaced: those that were another message's by then; nothing was done to that one.
    :ivar said: the lines that Postfix wrote.
    """

    done: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


class QueueControl:
    """Has one Postfix hold, release, requeue, delete or expire messages.

    Postfix uses a short queue id again once its message has left.  So the queue is listed once more
    before each action, and what arrived at another time or from another sender than the
    :class:`Mail` that was given is left alone.

    Every method takes any number of messages, and raises:

    * :exc:`ValueError`: what is given for an id is none; nothing was done.
    * :exc:`PostfixRefused`: this user may not list or change the queue.
    * :exc:`PostfixMissing`: there is no such command on this machine.
    * :exc:`PostfixDown`, :exc:`PostfixSilent`, :exc:`OutputCut`: the queue could not be listed.
    * :exc:`PostfixError`: the action failed, in Postfix's own words; the text says how many
      messages were done before.

    Each can be called again: it does nothing twice.
    """

    def __init__(self, settings: PostfixSettings | None = None) -> None:
        """Act on the Postfix of these settings."""
        self._settings = PostfixSettings() if settings is None else settings

    def hold(self, mails: Iterable[Mail]) -> Outcome:
        """Keep these messages from being delivered, until they are released."""
        return self._act("-h", mails)

    def release(self, mails: Iterable[Mail]) -> Outcome:
        """Let held messages be delivered again."""
        return self._act("-H", mails)

    def requeue(self, mails: Iterable[Mail]) -> Outcome:
        """Have these messages go through Postfix anew, with what its configuration is now.

        A message gets another id by that, within a minute.
        """
        return self._act("-r", mails)

    def delete(self, mails: Iterable[Mail]) -> Outcome:
        """Delete these messages, for good; nobody is told."""
        return self._act("-d", mails)

    def expire(self, mails: Iterable[Mail]) -> Outcome:
        """Have these messages returned to their senders as undeliverable, when next tried.

        Held ones stay until they are released.  Needs Postfix 3.5.
        """
        return self._act("-e", mails)

    def _act(self, option: str, mails: Iterable[Mail]) -> Outcome:
        wanted = {mail.qid: mail for mail in mails}
        for qid in wanted:
            if not is_queue_id(qid):
                raise ValueError(f"{qid!r} is no id of a message in Postfix's queue")
        if not wanted:
            return Outcome()
        there = self._listed()
        ids = [qid for qid, mail in wanted.items() if _same(mail, there.get(qid))]
        replaced = [qid for qid in wanted if qid in there and not _same(wanted[qid], there[qid])]
        said: list[str] = []
        done: list[str] = []
        for start in range(0, len(ids), _BATCH):
            self._run(option, ids[start : start + _BATCH], said, done)
        known = frozenset(done)
        return Outcome(
            done=tuple(done),
            unchanged=tuple(qid for qid in ids if qid not in known),
            gone=tuple(qid for qid in wanted if qid not in there),
            replaced=tuple(replaced),
            said=tuple(said),
        )

    def _listed(self) -> dict[str, Mail]:
        store = PostqueueStore(self._settings)
        store.load()
        return {mail.qid: mail for mail in store.mails}

    def _run(self, option: str, ids: Sequence[str], said: list[str], done: list[str]) -> None:
        words = self._settings.command("control", option, "-")
        given = "".join(f"{qid}\n" for qid in ids).encode("ascii")
        output = run(words, self._settings.timeout, given)
        done += _DONE.findall(output.said)
        said += output.said.splitlines()
        if output.status == 0:
            return
        if option == "-e" and _NO_SUCH_OPTION.search(output.said):
            raise PostfixError(
                "this postsuper has no option -e: expiring messages came with Postfix 3.5; "
                "delete them, or wait"
            )
        error = failure(words, output.status, output.said)
        if _LOG_FILE in output.said:
            # With maillog_file, only a Postfix that runs can write the log for its commands.
            error = PostfixError(
                "postsuper cannot write Postfix's log (maillog_file) while Postfix is stopped; "
                "start it"
            )
        if done:
            were = "message was" if len(done) == 1 else "messages were"
            error = type(error)(f"{error}; {len(done)} {were} done before")
        raise error


def _same(mail: Mail, other: Mail | None) -> bool:
    """Return whether an id is still that of the message that it was given for."""
    return other is not None and (mail.date, mail.sender) == (other.date, other.sender)
