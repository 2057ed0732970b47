"""Acting on the queue of a real Postfix; what became of it is what Postfix itself lists."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from postoffice.postfix import (
    Mail,
    Outcome,
    PostfixError,
    PostfixMissing,
    QueueControl,
)
from tests.postfix import ACCOUNT, Postfix, python_of_account, require_postfix
from tests.postfix_queue import (
    configuration,
    emptied,
    letter,
    loaded,
    settings_of,
    wait_for_states,
)

SUDOERS = f"{ACCOUNT} ALL=(root) NOPASSWD: /usr/sbin/postsuper, /usr/sbin/postqueue\n"


@pytest.fixture(scope="module", params=[False, True], ids=["short", "long"])
def running(request: pytest.FixtureRequest) -> Iterator[Postfix]:
    """A Postfix that defers all mail, with short ids and then long ones."""
    require_postfix()
    with Postfix(configuration(request.param)) as postfix:
        yield postfix


@pytest.fixture
def postfix(running: Postfix) -> Postfix:
    """A Postfix with four deferred messages."""
    emptied(running)
    for name in ("a", "b", "c"):
        running.send(f"{name}@example.org", [f"{name}@down.test"], letter(name))
    running.send("", ["d@down.test"], letter("d"))
    wait_for_states(running, deferred=4)
    return running


def by_sender(postfix: Postfix) -> dict[str, Mail]:
    """Return its messages, by their senders."""
    return {mail.sender: mail for mail in loaded(postfix)}


def states(postfix: Postfix) -> dict[object, object]:
    """Return what Postfix says of the state of each message, by its sender."""
    return {message["sender"]: message["queue_name"] for message in postfix.queue().values()}


def test_hold_and_release(postfix: Postfix) -> None:
    """Messages are held and released, others are not, and one that is so already is unchanged."""
    control = QueueControl(settings_of(postfix))
    mails = by_sender(postfix)
    ids = {mails["a@example.org"].qid, mails[""].qid}
    outcome = control.hold([mails["a@example.org"], mails[""]])
    assert set(outcome.done) == ids
    assert "postsuper: Placed on hold: 2 messages" in outcome.said
    expected = {
        "a@example.org": "hold",
        "MAILER-DAEMON": "hold",
        "b@example.org": "deferred",
        "c@example.org": "deferred",
    }
    assert states(postfix) == expected
    again = control.hold([mails["a@example.org"]])
    assert (again.done, again.unchanged) == ((), (mails["a@example.org"].qid,))
    assert set(control.release(loaded(postfix)).done) == ids
    assert set(states(postfix).values()) == {"deferred"}


def test_delete(postfix: Postfix) -> None:
    """Deleted messages are gone, and those that were gone before are told apart."""
    control = QueueControl(settings_of(postfix))
    mails = by_sender(postfix)
    doomed = [mails["a@example.org"], mails["b@example.org"]]
    assert set(control.delete(doomed).done) == {mail.qid for mail in doomed}
    assert states(postfix).keys() == {"c@example.org", "MAILER-DAEMON"}
    again = control.delete([*doomed, mails[""]])
    assert set(again.gone) == {mail.qid for mail in doomed}
    assert again.done == (mails[""].qid,)
    assert states(postfix).keys() == {"c@example.org"}


def test_requeue(postfix: Postfix) -> None:
    """Requeued messages go through Postfix again, which gives them other ids."""
    mail = by_sender(postfix)["c@example.org"]
    assert QueueControl(settings_of(postfix)).requeue([mail]).done == (mail.qid,)
    # Postfix looks for requeued mail once a minute, and when local mail comes.
    postfix.sendmail("e@example.org", ["e@down.test"], letter("e"))
    wait_for_states(postfix, deferred=5)
    assert mail.qid not in postfix.queue()
    assert by_sender(postfix)["c@example.org"].date == mail.date


def test_expire(postfix: Postfix) -> None:
    """Expired messages are marked, and returned when Postfix tries them."""
    control = QueueControl(settings_of(postfix))
    mail = by_sender(postfix)["b@example.org"]
    assert control.expire([mail]).done == (mail.qid,)
    assert postfix.queue()[mail.qid]["forced_expire"] is True
    assert control.expire([mail]).unchanged == (mail.qid,)
    postfix.flush()
    postfix.wait_for_log(f"{mail.qid}: from=<b@example.org>, status=force-expired")


@pytest.mark.parametrize("action", ["hold", "release", "requeue", "delete", "expire"])
def test_an_id_that_is_used_again(postfix: Postfix, action: str) -> None:
    """An id that is another message's by now, by its arrival or its sender, is left alone."""
    before = postfix.queue()
    earlier, other = (copy.copy(mail) for mail in loaded(postfix)[:2])
    assert earlier.date is not None
    earlier.date = earlier.date.replace(year=2001)
    other.sender = "somebody@else.example"
    outcome = getattr(QueueControl(settings_of(postfix)), action)([earlier, other])
    assert outcome == Outcome(replaced=(earlier.qid, other.qid))
    assert postfix.queue() == before


@pytest.mark.parametrize(
    "qid", ["ALL", "", "-", "-r", "../A", "A B", "A\nALL", "ÄÖÜ", "deferred/A", "x" * 65]
)
def test_what_is_no_id(postfix: Postfix, qid: str) -> None:
    """What is no id never reaches postsuper, and nothing is done to the others either."""
    before = postfix.queue()
    with pytest.raises(ValueError, match="is no id of a message"):
        QueueControl(settings_of(postfix)).delete([*loaded(postfix), Mail(qid)])
    assert postfix.queue() == before


def test_nothing_to_do(postfix: Postfix) -> None:
    """Without messages nothing is run."""
    settings = settings_of(postfix, control=("/nowhere/postsuper",))
    assert QueueControl(settings).delete([]) == Outcome()


def test_a_stopped_postfix_with_a_log_of_its_own(postfix: Postfix) -> None:
    """Where only a running Postfix can write the log, a line says to start it."""
    postfix.stop()
    try:
        with pytest.raises(PostfixError, match=r"while Postfix is stopped; start it; 1 message"):
            QueueControl(settings_of(postfix)).hold([by_sender(postfix)[""]])
    finally:
        postfix.start()


def test_a_stopped_postfix() -> None:
    """The queue of a Postfix that does not run is changed as well, where syslog has its log."""
    require_postfix()
    with Postfix(f"{configuration()}maillog_file =\n") as postfix:
        postfix.send("a@example.org", ["a@down.test"], letter("a"))
        wait_for_states(postfix, deferred=1)
        postfix.stop()
        control = QueueControl(settings_of(postfix))
        control.hold(loaded(postfix))
        assert [mail.status for mail in loaded(postfix)] == ["hold"]
        control.delete(loaded(postfix))
        assert loaded(postfix) == []


def test_commands_that_are_not_there(postfix: Postfix, tmp_path: Path) -> None:
    """An absent postsuper, and one that is too old, are an error of one line each."""
    mails = loaded(postfix)
    with pytest.raises(PostfixMissing, match="no command /nowhere/postsuper"):
        QueueControl(settings_of(postfix, control=("/nowhere/postsuper",))).hold(mails)
    old = tmp_path / "postsuper"
    old.write_text(
        "#!/bin/sh\necho \"postsuper: invalid option -- 'e'\" >&2\n"
        "echo 'postsuper: fatal: usage: postsuper [-c config_dir] [-d queue_id (delete)]' >&2\n"
        "exit 1\n"
    )
    old.chmod(0o755)
    with pytest.raises(PostfixError, match=r"came with Postfix 3\.5"):
        QueueControl(settings_of(postfix, control=(str(old),))).expire(mails)


def test_a_failure_on_the_way(postfix: Postfix, tmp_path: Path) -> None:
    """A failure behind a part of the messages says how many were done."""
    mails = loaded(postfix)
    failing = tmp_path / "postsuper"
    failing.write_text(
        f"#!/bin/sh\necho 'postsuper: {mails[0].qid}: removed' >&2\n"
        "echo 'postsuper: fatal: no space left' >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    with pytest.raises(PostfixError, match=r"no space left; 1 message was done before$"):
        QueueControl(settings_of(postfix, control=(str(failing),))).delete(mails)


# -- rights ----------------------------------------------------------------------------------------

# Lists and holds as another user.
_PROGRAM = """
import sys
from postoffice.postfix import Mail, PostfixRefused, PostfixSettings, PostqueueStore, QueueControl
settings = PostfixSettings(config_directory=sys.argv[1], sudo=tuple(sys.argv[2:]))
store = PostqueueStore(settings)
try:
    store.load()
    print(len(QueueControl(settings).hold(store.mails).done))
except PostfixRefused as error:
    print(error)
"""


def as_account(postfix: Postfix, before: list[str], *sudo: str) -> str:
    """Hold all mail as an ordinary user; return what became of it."""
    words = [*python_of_account(), "-c", _PROGRAM, str(postfix.configuration), *sudo]
    become = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={os.getgid()}", "--clear-groups"]
    done = subprocess.run(
        [*before, *become, *words], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def require_sudo() -> None:
    """Skip the test, aloud, where there is no sudo."""
    if subprocess.run(["sh", "-c", "command -v sudo"], capture_output=True, check=False).returncode:
        pytest.skip("sudo is not installed")


def test_without_the_right(postfix: Postfix) -> None:
    """Who has no right is told so in one line, and nothing is changed."""
    said = as_account(postfix, [])
    assert "this user may not; run as root, set sudo" in said
    assert "\n" not in said
    assert set(states(postfix).values()) == {"deferred"}


def test_sudo_that_does_not_let_him(postfix: Postfix) -> None:
    """Where sudo would ask for a password, one line says so."""
    require_sudo()
    said = as_account(postfix, [], "sudo", "-n")
    assert "this user may not" in said
    assert "\n" not in said
    assert set(states(postfix).values()) == {"deferred"}


def test_by_sudo(postfix: Postfix, tmp_path: Path) -> None:
    """An ordinary user whom sudo lets run the commands changes the queue."""
    require_sudo()
    folder = tmp_path / "sudoers.d"
    folder.mkdir(mode=0o755)
    (folder / "postoffice").write_text(SUDOERS)
    (folder / "postoffice").chmod(0o440)
    # The machine's own rules stay as they are: only this process and its children see ours.
    seen = f'mount --bind "{folder}" /etc/sudoers.d && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", seen, "sh"]
    tried = subprocess.run([*before, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine has no mount namespaces: {tried.stderr.strip()}")
    assert as_account(postfix, before, "sudo", "-n") == "4"
    assert set(states(postfix).values()) == {"hold"}
