"""Postfix's own queue, loaded: its messages as they were at one moment, and their summary."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, BinaryIO, ClassVar

from postoffice.postfix.errors import OutputCut, PostfixError
from postoffice.postfix.listing import Listed, latest, read_json, read_listing, read_text
from postoffice.postfix.mail import Mail, distinct_reasons
from postoffice.postfix.program import LONGEST_LINE, Ending, Program, failure, run
from postoffice.postfix.settings import SPOOL_PATH, PostfixSettings
from postoffice.postfix.spool import Spool

__all__ = ["PostqueueStore"]

# Of the busiest senders, recipients, domains and errors.
_TOP = 5
_NO_SUCH_OPTION = re.compile(r"invalid option|usage: ")
_READ_DIRECTLY = "mail system is down"


class PostqueueStore:
    """The messages in the queue of one Postfix, as :meth:`load` found them.

    ::

        store = PostqueueStore()
        store.load()
        for mail in store.mails:
            print(mail.qid, mail.status, mail.sender or "<>", *mail.recipients)

    One thread at a time uses a store.

    :ivar mails: the :class:`Mail` values, in the order of the listing.
    :ivar loaded_at: when :meth:`load` last succeeded, in local time and naive; ``None`` before.
    :ivar notice: a line on what was odd about the last load; empty where nothing was.
    :ivar settings: how Postfix is reached.
    :ivar spool_path: the folder of the queue directories, from the settings.
    """

    #: The states that a summary always names.
    postqueue_mailstatus: ClassVar[list[str]] = ["active", "deferred", "hold"]
    #: An id of Postfix, as ``postqueue -p`` writes it; for callers: nothing here depends on it.
    mail_id_re = re.compile(r"^([A-F0-9]{8,12}|[B-Zb-z0-9]{11,16})[*!]?$")
    #: A usual address; for callers: nothing here depends on it.
    mail_addr_re = re.compile(r"^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]+$")
    #: What :attr:`mails` consists of: this or a class derived from it.
    MailClass: type[Mail] = Mail
    spool_path: str = SPOOL_PATH

    mails: list[Mail]
    loaded_at: datetime | None
    notice: str

    def __init__(
        self,
        settings: PostfixSettings | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Hold no messages yet.

        :param settings: how Postfix is reached; by default, the machine's own Postfix.
        :param clock: returns the local time, naive.
        """
        self.settings = PostfixSettings() if settings is None else settings
        self.spool_path = self.settings.spool_path
        self.mails = []
        self.loaded_at = None
        self.notice = ""
        self._clock = clock

    @property
    def postqueue_cmd(self) -> list[str]:
        """The command, with its arguments, by which the method ``postqueue`` lists the queue."""
        return self.settings.command("list_queue", "-p")

    @property
    def known_headers(self) -> list[str]:
        """The names of the header fields of all messages that were parsed, sorted."""
        return sorted({name for mail in self.mails for name in mail.head})

    # -- loading -----------------------------------------------------------------------------------

    def load(
        self,
        method: str | None = None,
        filename: str | os.PathLike[str] | None = None,
        parse: bool = False,
    ) -> None:
        """Load the queue's messages in place of those that are here.

        When it raises, the store is as it was.

        :param method: ``json`` (``postqueue -j``, Postfix 3.1), ``postqueue`` (``postqueue -p``) or
            ``spool`` (the queue directories); by default, ``json`` where Postfix has it, otherwise
            ``postqueue``.  A derived class adds one by a method ``_load_from_NAME``.
        :param filename: a file with the output of ``postqueue -j``, ``postqueue -p`` or ``mailq``,
            told apart by its content; then Postfix is not asked.
        :param parse: whether all messages' headers are read too, many by one command.
        :raises ValueError: there is no such method, or it reads no file.
        :raises OSError: the file cannot be read.
        :raises PostfixMissing: there is no such command on this machine.
        :raises PostfixRefused: this user may not list the queue.
        :raises PostfixDown: the mail system is down, and this user may not list the queue then.
        :raises PostfixSilent: the command said nothing for too long.
        :raises OutputCut: a listing is truncated or not of Postfix.
        :raises PostfixError: the command failed for another reason, in its own words.
        """
        load = getattr(self, f"_load_from_{method or 'default'}", None)
        if load is None or (method == "spool" and filename is not None):
            raise ValueError(
                f"nothing loads {'the queue' if filename is None else 'a file'} by the method"
                f" {method!r}; there are json, postqueue, and spool without a file"
            )
        before = self.mails, self.notice
        self.notice = ""
        try:
            if filename is None:
                load(parse=parse)
            else:
                load(filename=filename, parse=parse)
        except BaseException:
            self.mails, self.notice = before
            raise
        self.loaded_at = self._clock()

    def _load_from_default(
        self, filename: str | os.PathLike[str] | None = None, parse: bool = False
    ) -> None:
        """Load by the best method that this Postfix has."""
        try:
            self._load_from_json(filename, parse)
        except _NoJson:
            self._load_from_postqueue(filename, parse)

    def _load_from_json(
        self, filename: str | os.PathLike[str] | None = None, parse: bool = False
    ) -> None:
        """Load from the output of ``postqueue -j``, or from a file."""
        if filename is not None:
            self._load_from_file(filename, parse)
            return
        words = self.settings.command("list_queue", "-j")
        with Program(words, self.settings.timeout) as program:
            try:
                listed = latest(read_json(_decoded(program.lines())))
            except OutputCut:
                # The command's own account of it is better, where it has one.
                if program.exhausted:
                    self._judge(words, program.ended())
                raise
            self._judge(words, program.ended())
        self._take(listed, parse)

    def _load_from_postqueue(
        self, filename: str | os.PathLike[str] | None = None, parse: bool = False
    ) -> None:
        """Load from the lines of :meth:`_get_postqueue_output`, or from a file."""
        if filename is not None:
            self._load_from_file(filename, parse)
            return
        self._take(latest(read_text(self._get_postqueue_output(), self._clock())), parse)

    def _load_from_file(self, filename: str | os.PathLike[str], parse: bool = False) -> None:
        """Load from a file that holds what either option of ``postqueue`` printed."""
        with open(filename, "rb") as file:
            listed = latest(read_listing(_decoded(_lines(file)), self._clock()))
        self._take(listed, parse)

    def _load_from_spool(self, parse: bool = False) -> None:
        """Load from the queue directories."""
        self.mails = [self._adopted(mail) for mail in self._spool.mails(parse)]

    def _get_postqueue_output(self) -> list[str]:
        """Return the lines that the command in :attr:`postqueue_cmd` prints."""
        words = self.postqueue_cmd
        output = run(words, self.settings.timeout)
        self._judge(words, Ending(output.status, output.said))
        return output.stdout.decode("utf-8", "replace").split("\n")

    def _judge(self, words: list[str], ending: Ending) -> None:
        """Raise what the end of a listing means; note a Postfix that does not run."""
        if ending.status:
            if _NO_SUCH_OPTION.search(ending.said):
                if words[-1] == "-j":
                    raise _NoJson(
                        f"{words[0]} has no option -j, which came with Postfix 3.1;"
                        " load by the method 'postqueue'"
                    )
                raise PostfixError(
                    f"{' '.join(words)} is no way to list the queue;"
                    " list_queue names postqueue, without options"
                )
            raise failure(words, ending.status, ending.said)
        if _READ_DIRECTLY in ending.said.lower():
            self.notice = "the mail system is down: its queue was read without it"

    # -- the values --------------------------------------------------------------------------------

    @property
    def _spool(self) -> Spool:
        return Spool(replace(self.settings, spool_path=self.spool_path))

    def _take(self, listed: Iterable[Listed], parse: bool) -> None:
        mails = [self._mail(one) for one in listed]
        if parse:
            self._spool.headers(mails)
        self.mails = mails

    def _mail(self, listed: Listed) -> Mail:
        qid, size, date, sender, status, forced_expire, recipients = listed
        # Four arguments, as documented: a derived class need not know of others.
        mail = self.MailClass(qid, size, date, sender)
        mail.status = status
        mail.forced_expire = forced_expire
        mail.recipients = recipients
        mail.errors = distinct_reasons(recipients)
        mail.settings = self.settings
        return mail

    def _adopted(self, mail: Mail) -> Mail:
        if self.MailClass is Mail:
            return mail
        ours = self.MailClass(mail.qid, mail.size, mail.date, mail.sender)
        vars(ours).update(vars(mail))
        return ours

    def _is_mail_id(self, mail_id: str) -> bool:
        """Return whether :attr:`mail_id_re` knows this text as an id of Postfix."""
        return self.mail_id_re.match(mail_id) is not None

    # -- the summary -------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Summarize the messages that were loaded.

        Sizes are bytes, ages those at the time of loading.  Each ``top_`` list holds up to five
        pairs of a value and its count, the most frequent first, except ``top_status``, which holds
        every state.  The null sender counts as a sender, the empty string, and has no domain.
        Domains are in lower case.
        """
        mails = self.mails
        sizes = [mail.size for mail in mails]
        senders = Counter(mail.sender for mail in mails)
        recipients = Counter(str(one) for mail in mails for one in mail.recipients)
        sender_domains = _domains(senders)
        recipient_domains = _domains(recipients)
        states = Counter(dict.fromkeys(self.postqueue_mailstatus, 0))
        states.update(mail.status for mail in mails)
        return {
            "total_mails": len(mails),
            "mails_by_age": self._ages(),
            "total_mails_size": sum(sizes),
            "average_mail_size": sum(sizes) / len(sizes) if sizes else 0,
            "max_mail_size": max(sizes, default=0),
            "min_mail_size": min(sizes, default=0),
            "top_status": states.most_common(),
            "unique_senders": len(senders),
            "unique_sender_domains": len(sender_domains),
            "unique_recipients": len(recipients),
            "unique_recipient_domains": len(recipient_domains),
            "top_senders": senders.most_common(_TOP),
            "top_sender_domains": sender_domains.most_common(_TOP),
            "top_recipients": recipients.most_common(_TOP),
            "top_recipient_domains": recipient_domains.most_common(_TOP),
            "top_errors": Counter(error for mail in mails for error in mail.errors).most_common(
                _TOP
            ),
        }

    def _ages(self) -> dict[str, int]:
        now = self.loaded_at or self._clock()
        ages = dict.fromkeys(("last_24h", "1_to_4_days_ago", "older_than_4_days"), 0)
        for mail in self.mails:
            if mail.date is None:
                continue
            age = now - mail.date
            if age <= timedelta(days=1):
                ages["last_24h"] += 1
            elif age <= timedelta(days=4):
                ages["1_to_4_days_ago"] += 1
            else:
                ages["older_than_4_days"] += 1
        return ages


class _NoJson(PostfixError):
    """This Postfix is older than ``postqueue -j``."""


def _domains(addresses: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for address, count in addresses.items():
        _, at, domain = address.rpartition("@")
        if at and domain:
            found[domain.lower()] += count
    return found


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        yield line.decode("utf-8", "replace")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise OutputCut("the listing has a line longer than any of Postfix's")
        yield line.removesuffix(b"\n")
