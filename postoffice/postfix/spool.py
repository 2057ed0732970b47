"""Postfix's queue read from its own directories, with ``postcat`` for what is in the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from postoffice.postfix.directories import CORRUPT, Found, scan
from postoffice.postfix.ids import is_queue_id
from postoffice.postfix.mail import Mail, Recipient
from postoffice.postfix.records import (
    QueueFile,
    read_envelopes,
    read_files,
    read_queue_files,
)
from postoffice.postfix.settings import PostfixSettings

__all__ = ["Spool"]


class Spool:
    """The queue directories of one Postfix.

    They know what Postfix's listings do not, such as mail in ``corrupt``, and need no Postfix that
    runs; they do not know why a delivery failed.  Reading them needs root; :meth:`headers` needs
    what ``postcat`` needs.
    """

    def __init__(self, settings: PostfixSettings | None = None) -> None:
        """Read the Postfix of these settings."""
        self._settings = PostfixSettings() if settings is None else settings

    def mails(self, parse: bool = False) -> Iterator[Mail]:
        """Yield the messages in the queue directories, each once.

        A message that moves meanwhile has the state in which it was read, and one that leaves is
        left out.  Where a file holds text that imitates Postfix's own, ``parse_error`` says so.

        :param parse: whether the headers are read too.
        :raises PostfixRefused: this user may not read the queue.
        :raises PostfixMissing: there is no postcat.
        :raises PostfixError: there is no queue where the settings say.
        """
        found = scan(self._settings.spool_path)
        ids = [one.qid for one in found.values() if one.queue != CORRUPT]
        read = read_queue_files if parse else read_envelopes
        for file in read(self._settings, ids):
            if file.queue:
                yield self._mail(found[file.name], file, parse)
        corrupt = {one.path: one for one in found.values() if one.queue == CORRUPT}
        for file in read_files(self._settings, list(corrupt)):
            yield self._mail(corrupt[file.name], file, parse)

    def _mail(self, found: Found, file: QueueFile, parse: bool) -> Mail:
        mail = Mail(
            found.qid,
            found.size if file.size is None else file.size,
            file.arrival,
            file.sender,
            status=file.queue or found.queue,
            recipients=[Recipient(address) for address in file.recipients],
            forced_expire=found.forced_expire,
            settings=self._settings,
        )
        if parse:
            mail.read_headers(file.header)
        mail.parse_error = file.fault
        return mail

    def headers(self, mails: Iterable[Mail]) -> None:
        """Read the headers of these messages, a thousand to a process.

        Each of them is parsed, or has a ``parse_error``: it left the queue meanwhile, or its id is
        another message's by now.

        :raises PostfixRefused: this user may not read the queue.
        :raises PostfixMissing: there is no postcat.
        """
        wanted: dict[str, list[Mail]] = {}
        for mail in mails:
            if is_queue_id(mail.qid):
                wanted.setdefault(mail.qid, []).append(mail)
            else:
                mail.parse_error = f"{mail.qid!r} is no id of a message in Postfix's queue"
        in_corrupt = [
            qid for qid, same in wanted.items() if any(one.status == CORRUPT for one in same)
        ]
        elsewhere = [qid for qid in wanted if qid not in in_corrupt]
        _hand_out(read_queue_files(self._settings, elsewhere), wanted)
        if in_corrupt:
            found = scan(self._settings.spool_path)
            paths = {found[qid].path: wanted[qid] for qid in in_corrupt if qid in found}
            _hand_out(read_files(self._settings, list(paths)), paths)


def _hand_out(files: Iterable[QueueFile], wanted: Mapping[str, Sequence[Mail]]) -> None:
    for file in files:
        for mail in wanted[file.name]:
            if not file.queue:
                mail.parse_error = file.fault
            elif mail.date is not None and file.arrival not in (None, mail.date):
                mail.parse_error = "its id is another message's by now"
            else:
                mail.read_headers(file.header)
                mail.parse_error = file.fault
