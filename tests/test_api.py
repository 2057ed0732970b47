"""The post office: queues made and mail imported as a configuration file says."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import transaction
import ZODB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError

from postoffice import config
from postoffice.api import PostOffice
from postoffice.exceptions import (
    ConfigurationError,
    DepotFormatError,
    DepotUnavailable,
    FolderMissing,
)
from postoffice.intake.archive import local_day
from postoffice.intake.maildir import Maildir, make_maildir
from postoffice.queue import Queue
from postoffice.routing import AUTO_RESPONSE, OVERSIZE, THROTTLED
from tests.spools import QUEUES, Spool, digest, large, mail


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An empty spool."""
    return Spool(tmp_path / "spool")


def queue_names(spool: Spool) -> list[str]:
    """Return the names of the queues in the depot."""
    with PostOffice(spool.ini) as office, office.connection() as connection:
        return office.folder(connection).names()


def marks(spool: Spool, name: str = "all") -> list[tuple[str, ...]]:
    """Return the marks of what waits in a queue."""
    with PostOffice(spool.ini) as office, office.connection() as connection:
        return [entry.marks for entry in Queue(office.folder(connection).get(name)).entries()]


def run(spool: Spool, *expected: tuple[str, int]) -> None:
    """Import, and compare the verdicts."""
    with PostOffice(spool.ini) as office:
        outcome = office.import_messages()
    assert outcome.counts == dict(expected)


# -- queues ----------------------------------------------------------------------------------------


def test_new_queues_are_made(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    """Queues of the configuration that the depot does not have are made, once, with a line each."""
    with caplog.at_level(logging.INFO), PostOffice(spool.ini) as office:
        assert sorted(office.reconcile_queues()) == ["all", "list"]
        assert office.reconcile_queues() == []
    assert queue_names(spool) == ["all", "list"]
    assert "queue 'list' is new" in caplog.text


def test_queues_that_are_gone_stay(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    """A queue that the configuration has no more is a warning, and keeps what it holds."""
    spool.put(mail("to a list", List_Id="<list.example.org>"))
    run(spool, ("queued", 1))
    spool.configure("", "[queue:all]\nfilters =\n    header_regexp: ^Subject:\n")
    with PostOffice(spool.ini) as office:
        assert office.reconcile_queues() == []
    assert "queue 'list' is not in" in caplog.text
    assert "postoffice queues remove" in caplog.text
    assert spool.raws("list") == [mail("to a list", List_Id="<list.example.org>")]


def test_queues_are_made_once_by_two_at_once(spool: Spool) -> None:
    """Several that make the same queues at once make each once, and the depot is whole."""
    queues = "".join(
        f"[queue:q{number}]\nfilters =\n    header_regexp: ^Subject: {number}\n"
        for number in range(20)
    )
    spool.configure("", queues)
    made: list[str] = []
    with PostOffice(spool.ini) as office:
        threads = [
            threading.Thread(target=lambda: made.extend(office.reconcile_queues()))
            for _ in range(4)
        ]
        _ = office.database
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(made) == sorted(f"q{number}" for number in range(20))


def test_a_depot_that_was_never_made_is_named(spool: Spool) -> None:
    """Looking for a depot that nobody has made yet says how one is made."""
    with (
        PostOffice(spool.ini) as office,
        pytest.raises(FolderMissing, match="first intake of mail makes it"),
        office.connection() as connection,
    ):
        office.folder(connection)


def test_something_else_in_the_place_of_the_depot_is_refused(spool: Spool) -> None:
    """Data of another kind at the depot's path is left alone, and so is the mail."""
    database = ZODB.DB(
        FileStorage(str(spool.folder / "depot.fs"), blob_dir=str(spool.folder / "blobs"))
    )
    with database.transaction() as connection:
        connection.root()["postoffice"] = {"some": "thing"}
    database.close()
    spool.put(mail("waits"))
    with PostOffice(spool.ini) as office, pytest.raises(DepotFormatError, match="not a depot"):
        office.import_messages()
    assert len(spool.waiting()) == 1


# -- the database ----------------------------------------------------------------------------------


def test_a_locked_database_is_a_temporary_error(spool: Spool) -> None:
    """While another process has the database, the import says which, and the mail waits."""
    spool.put(mail("waits"))
    with PostOffice(spool.ini) as first, PostOffice(spool.ini) as second:
        assert first.database is not None
        with pytest.raises(DepotUnavailable, match=f"process {os.getpid()}"):
            second.import_messages()
    run(spool, ("queued", 1))


@pytest.mark.parametrize("content", [None, b""])
def test_a_blob_folder_that_was_being_made_is_finished(spool: Spool, content: bytes | None) -> None:
    """A process that was killed while it made the blob folder does not lock out the next one."""
    (spool.folder / "blobs" / "tmp").mkdir(parents=True)
    if content is not None:
        (spool.folder / "blobs" / ".layout").write_bytes(content)
    spool.put(large("blob"))
    run(spool, ("queued", 1))
    assert (spool.folder / "blobs" / ".layout").read_bytes() == b"bushy"


def test_a_blob_folder_that_cannot_be_made_is_told(spool: Spool) -> None:
    """What stands in the way of the blob folder is a temporary error."""
    (spool.folder / "blobs" / "tmp").mkdir(parents=True)
    (spool.folder / "blobs" / ".layout").symlink_to("/nowhere/to/be/found")
    with PostOffice(spool.ini) as office, pytest.raises(DepotUnavailable, match="folder of blobs"):
        assert office.database


def test_errors_of_the_database_are_temporary(spool: Spool) -> None:
    """An error of ZODB's within a connection is told in one line as ours."""
    with (
        PostOffice(spool.ini) as office,
        pytest.raises(DepotUnavailable, match="the database failed"),
        office.connection(),
    ):
        raise POSKeyError(b"\0" * 8)


def test_closing_twice_does_no_harm(spool: Spool) -> None:
    """A post office can be closed again, and used again."""
    office = PostOffice(config.load(spool.ini))
    assert office.reconcile_queues()
    office.close()
    office.close()
    assert office.reconcile_queues() == []
    office.close()


# -- verdicts --------------------------------------------------------------------------------------


def test_every_verdict(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    """Queued, rejected, discarded, duplicate: each is counted, logged with reason and archived."""
    spool.configure("reject_filters =\n    header_regexp: ^Subject: .*spam")
    raws = {
        "matched": mail("fine"),
        "reject-filter": mail("much spam"),
        "from-is-to": mail("myself", To="ann@example.org"),
        "no-sender": mail("nobody", From=""),
        "ricochet": mail("notice", X_Postoffice="Bounced"),
        "no-queue": mail("", From="", Return_Path="<ann@example.org>"),
        "duplicate": mail("fine"),
    }
    for second, raw in enumerate(raws.values()):
        spool.put(raw, f"name{second}", second=second)
    with caplog.at_level(logging.INFO):
        run(spool, ("queued", 1), ("discarded", 5), ("rejected", 1))
    lines = [line for line in caplog.messages if line.startswith("name")]
    for number, (reason, raw) in enumerate(raws.items()):
        assert reason in lines[number]
        message_id = raw.split(b"Message-ID: ")[1].split(b"\n")[0].decode()
        assert f"Message-ID: {message_id}" in lines[number]
    assert "header_regexp: ^Subject: .*spam" in lines[1]
    assert Counter(path.read_bytes() for path in spool.archived()) == Counter(raws.values())


def test_nothing_of_a_message_reaches_the_log_raw(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """Terminal escapes, line breaks and odd bytes in headers are escapes in the log."""
    nasty = "\x1b[2J\x07\r\u202e\x85\u2028"
    for number, place in enumerate(("Subject", "From", "To", "Message-ID")):
        spool.put(mail(f"mail {number}", **{place: f"a{nasty}@example.org"}))
    spool.put(b"Subject: =?utf-8?q?=1B=5B2J=0Aforged_line?=\nFrom: \xff\x1b\n\n")
    with caplog.at_level(logging.DEBUG), PostOffice(spool.ini) as office:
        office.import_messages()
    assert len(caplog.messages) >= 5
    assert all(line.isprintable() for line in caplog.messages if line.startswith("17"))


def test_oversize_mail_keeps_its_header(spool: Spool) -> None:
    """Mail above the limit is queued with a notice for a body; the original is in the archive."""
    spool.configure("max_message_size = 2k")
    sizes = [2048, 2049, 300_000]
    for number, size in enumerate(sizes):
        spool.put(large(f"mail {number}", size))
    run(spool, ("queued", 3))
    assert marks(spool) == [(), (OVERSIZE,), (OVERSIZE,)]
    raws = spool.raws()
    assert raws[0] == large("mail 0", 2048)
    assert b"had 300000 bytes" in raws[2]
    assert len(raws[2]) < 1000
    assert sorted(path.stat().st_size for path in spool.archived()) == sizes


def test_loops_are_throttled(spool: Spool) -> None:
    """A sender above the frequency is marked until the period is over; others are not."""
    spool.configure("ooo_loop_frequency = 60 # a minute\nooo_throttle_period = 5m")
    for second, sender in [(0, "a"), (1, "b"), (1, "a"), (1, "a"), (100, "a"), (500, "a")]:
        number = len(spool.waiting())
        spool.put(mail(f"mail {number}", From=f"{sender}@example.org"), second=second)
    run(spool, ("queued", 6))
    assert marks(spool) == [(), (), (), (THROTTLED,), (THROTTLED,), ()]


def test_automatic_mail_is_marked(spool: Spool) -> None:
    """What says of itself that a program sent it is queued with a mark."""
    spool.put(mail("one", Auto_Submitted="auto-replied"))
    spool.put(mail("two", Auto_Submitted="no"))
    run(spool, ("queued", 2))
    assert marks(spool) == [(AUTO_RESPONSE,), ()]


def test_a_catastrophic_expression_costs_one_message(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """A message on which an expression takes too long is set aside; the run goes on behind it."""
    spool.configure("", "[queue:all]\nfilters =\n    header_regexp: Subject: (\\w+\\s?)*\\1!\n")
    spool.put(mail("ab!"), second=0)
    spool.put(mail("a" * 40), second=1)
    spool.put(mail("cd!"), second=2)
    with PostOffice(spool.ini) as office:
        outcome = office.import_messages()
    assert outcome.set_aside == 1
    assert outcome.total == 3
    (name,) = spool.set_aside()
    assert "longer than" in (spool.failed / f"{name}.reason").read_text()
    assert f"{name} is set aside" in caplog.text
    assert spool.waiting() == []


# -- the archive, as configured --------------------------------------------------------------------


def test_the_archive_is_in_the_maildir_by_default(spool: Spool) -> None:
    """Originals go to the day's folder of the Maildir, and the entry says where."""
    path = spool.put(mail("one"))
    run(spool, ("queued", 1))
    day = f"{local_day(time.time()):%Y.%m.%d}"
    assert spool.archived() == [spool.maildir / f".{day}" / "cur" / path.name]
    with PostOffice(spool.ini) as office, office.connection() as connection:
        (entry,) = Queue(office.folder(connection).get("all")).entries()
        assert entry.archive == f"{day}/{path.name}"


def test_the_archive_can_have_its_own_folder(tmp_path: Path) -> None:
    """``archive`` names a folder, which is made."""
    spool = Spool(tmp_path / "spool", archive=tmp_path / "originals")
    raw = mail("one")
    spool.put(raw)
    run(spool, ("queued", 1))
    assert [digest(path.read_bytes()) for path in spool.archived()] == [digest(raw)]
    assert not list(spool.maildir.glob(".2*"))


def test_the_archive_can_be_waived(spool: Spool) -> None:
    """With ``archive = none`` nothing is kept, of what is discarded either."""
    spool.configure("archive = none\narchive_keep = 1d")
    for raw in (mail("one"), large("two"), mail("nobody", From="")):
        spool.put(raw)
    run(spool, ("queued", 2), ("discarded", 1))
    assert sorted(os.listdir(spool.maildir)) == [".postoffice.lock", "cur", "new", "tmp"]
    assert spool.raws() == [mail("one"), large("two")]


def test_each_import_expires_the_archive(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    """Days older than ``archive_keep`` go, whether or not there is mail; the rest stays."""
    old, young = spool.maildir / ".2020.01.01", spool.maildir / ".2999.01.01"
    for day in (old, young):
        (day / "cur").mkdir(parents=True)
        (day / "cur" / "mail").write_bytes(b"raw")
    run(spool)
    assert old.exists()
    spool.configure("archive_keep = 7d")
    with caplog.at_level(logging.INFO):
        run(spool)
    assert not old.exists()
    assert (young / "cur" / "mail").exists()
    assert "archive of .2020.01.01 has expired" in caplog.text


# -- again -----------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_version_and_configuration(spool: Spool) -> None:
    """What is set aside knows the version and the configuration that could not process it."""
    first = PostOffice(spool.ini).fingerprint
    assert PostOffice(spool.ini).fingerprint == first
    spool.configure("max_message_size = 1m", QUEUES)
    assert PostOffice(spool.ini).fingerprint != first


def test_importing_nothing_is_cheap_and_changes_nothing(spool: Spool) -> None:
    """An import of an empty Maildir writes nothing to the database."""
    spool.put(mail("one"))
    run(spool, ("queued", 1))
    size = (spool.folder / "depot.fs").stat().st_size
    run(spool)
    assert (spool.folder / "depot.fs").stat().st_size == size


def test_what_an_application_took_does_not_come_again(spool: Spool) -> None:
    """A message that was imported and taken is known: the same message again is a duplicate."""
    spool.put(mail("one"))
    run(spool, ("queued", 1))
    with PostOffice(spool.ini) as office:
        connection = office.database.open()
        queue = Queue(office.folder(connection).get("all"))
        assert queue.pop_next().raw == mail("one")
        transaction.commit()
        connection.close()
    spool.put(mail("one"))
    run(spool, ("discarded", 1))
    assert spool.raws() == []


def test_an_import_without_a_queue_is_refused(tmp_path: Path) -> None:
    """All mail would be discarded; so nothing is touched, and the mend is named."""
    spool = Spool(tmp_path / "spool", queues="")
    spool.put(mail("a"))
    with pytest.raises(ConfigurationError, match=r"no section \[queue:NAME\]"):
        spool.run()
    assert len(spool.waiting()) == 1


def test_histories_expire_without_mail(spool: Spool) -> None:
    """What a queue remembers goes when it is old, though nothing comes to the queue any more."""
    spool.configure("ooo_loop_frequency = 60\n")
    spool.put(mail("one"))
    run(spool, ("queued", 1))

    def slots(office: PostOffice) -> tuple[int, int]:
        with office.connection() as connection:
            record = office.folder(connection).get("all")
            return len(record.duplicates.numbers()), len(record.arrivals.numbers())

    now = int(time.time())
    with PostOffice(spool.ini) as office:
        office.expire_histories(now)
        assert slots(office) == (1, 1)
        office.expire_histories(now + 3600)
        assert slots(office) == (1, 0)
        office.expire_histories(now + 2 * 24 * 60 * 60)
        assert slots(office) == (0, 0)


def test_an_importer_runs_again_and_again(spool: Spool) -> None:
    """One importer empties the Maildir as often as it is told to, and knows what came before."""
    make_maildir(spool.maildir)
    with PostOffice(spool.ini) as office, office.open_importer() as importer:
        for count in range(3):
            spool.put(mail("one", Message_ID="<one@example.org>"), f"{count}.host")
            maildir = Maildir(spool.maildir)
            try:
                outcome = importer.run(maildir)
            finally:
                maildir.close()
            assert outcome.counts == {"discarded" if count else "queued": 1}
    assert len(marks(spool)) == 1
