"""Several processes on one depot, over servers, some of them killed: each message exactly once."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from BTrees.OOBTree import OOBTree
from transaction import TransactionManager
from transaction.interfaces import TransientError

from postoffice.api import PostOffice
from postoffice.database import open_database
from postoffice.queue import find_queue
from tests.machines import Machine, Run
from tests.postgresql import ServerMissing
from tests.processes import TAKEN
from tests.servers import SERVERS, Server
from tests.torture import Torture, everything, plan

QUEUES = """\
[queue:billing]
filters =
    to_hostname: billing.example.com
[queue:support]
filters =
    to_hostname: support.example.com
"""
BUSY = re.compile(r"postoffice: another import of \S+ is running; nothing is left to do here\n")
_LONGEST_SECONDS = 60


def prepared(kind: str, folder: Path) -> Iterator[Server]:
    """Give a server that is not started yet."""
    try:
        with SERVERS[kind](folder / "server") as server:
            yield server
    except ServerMissing as error:
        pytest.skip(str(error))


@pytest.fixture(params=["zeo", "file", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A ZEO server, that of a file, and a PostgreSQL server; none is started yet."""
    yield from prepared(request.param, tmp_path)


@pytest.fixture(params=SERVERS)
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server of each kind, which is not started yet."""
    yield from prepared(request.param, tmp_path)


@pytest.fixture
def zeo(tmp_path: Path) -> Iterator[Server]:
    """A ZEO server on a unix socket, which is not started yet."""
    yield from prepared("zeo-socket", tmp_path)


def test_each_message_exactly_once(server: Server, tmp_path: Path) -> None:
    """While importers, consumers and the server are killed, each message is somewhere, and once."""
    blows = plan(seed=1, messages=200, kills=2, restarts=2, how=server.how)
    outcome = Torture(tmp_path / "run", server, 1, 200, blows).run()
    assert not outcome.finds, f"seed 1: {outcome}"
    assert outcome.kills["consumer"] + outcome.kills["importer stored"] >= 2, outcome
    assert all(outcome.kills[f"server {how}"] == 1 for how in server.how)


@pytest.mark.torture
@pytest.mark.parametrize("seed", [7])
def test_each_message_exactly_once_for_long(any_server: Server, tmp_path: Path, seed: int) -> None:
    """The same holds over 20,000 messages, with a hundred kills and twenty restarts."""
    blows = plan(seed, messages=20_000, kills=50, restarts=20, how=any_server.how)
    outcome = Torture(tmp_path / "run", any_server, seed, 20_000, blows).run()
    assert not outcome.finds, f"seed {seed}: {outcome}"


def test_a_seed_is_a_plan() -> None:
    """The same seed draws the same blows in order of progress, and another seed draws others."""
    drawn = plan(3, 1000, 5, 4, ("SIGKILL", "SIGTERM"))
    assert drawn == plan(3, 1000, 5, 4, ("SIGKILL", "SIGTERM"))
    assert drawn != plan(4, 1000, 5, 4, ("SIGKILL", "SIGTERM"))
    assert [blow.at for blow in drawn] == sorted(blow.at for blow in drawn)
    assert Counter(blow.how for blow in drawn if blow.victim == "server") == {
        "SIGKILL": 2,
        "SIGTERM": 2,
    }


def mail(number: int, to: str) -> bytes:
    """Compose a message whose Message-ID and Subject are those of its number."""
    return (
        f"From: ann@paper.example\nTo: in@{to}.example.com\nSubject: {number}\n"
        f"Message-ID: <{number}@paper.example>\n\nHello.\n"
    ).encode()


def found(server: Server, queue_name: str, consumers: list[str]) -> Counter[str]:
    """Count the subjects that consumers took from a queue, that wait, or are in quarantine."""
    database = open_database(server.uri("watcher"))
    try:
        root = database.open().root()
        trees = [root[TAKEN][name] for name in consumers]
        return everything(trees, find_queue(root, queue_name))
    finally:
        transaction.abort()
        database.close()


def lay_out(server: Server, machine: Machine, consumers: list[str]) -> None:
    """Make the queues of a machine's configuration, and a tree for each consumer."""
    with PostOffice(machine.ini) as office:
        office.reconcile_queues()
        with office.connection() as connection:
            trees = connection.root()[TAKEN] = OOBTree()
            for name in consumers:
                trees[name] = OOBTree()
            connection.transaction_manager.commit()


def test_importers_on_one_maildir(server: Server, tmp_path: Path) -> None:
    """Of several importers on one Maildir one imports; the others say so at once and succeed."""
    server.start()
    machine = Machine(tmp_path / "one", server.uri("one"), QUEUES)
    lay_out(server, machine, [])
    for number in range(30):
        machine.deliver(f"{number}.M1.one", mail(number, "billing"))
    runs = [machine.start_import(tmp_path / f"import-{number}") for number in range(6)]
    for run in runs:
        assert run.process.wait(_LONGEST_SECONDS) == 0, run.said
    assert any(run.said == "" for run in runs)
    assert all(run.said == "" or BUSY.fullmatch(run.said) for run in runs), [r.said for r in runs]
    assert found(server, "billing", []) == Counter(str(number) for number in range(30))
    assert machine.waiting() == 0


def test_losers_wait_for_nothing(zeo: Server, tmp_path: Path) -> None:
    """Importers end at once on a Maildir whose importer waits for its server, which then works."""
    zeo.start()
    uri = zeo.uri("one").replace("wait_timeout=3", "wait_timeout=60")
    machine = Machine(tmp_path / "one", uri, QUEUES)
    lay_out(zeo, machine, [])
    machine.deliver("1.M1.one", mail(1, "billing"))
    zeo.stop("SIGTERM")
    first = machine.start_import(tmp_path / "first")
    while not (machine.maildir / ".postoffice.lock").exists():
        assert first.process.poll() is None, first.said
        time.sleep(0.01)
    losers = [machine.start_import(tmp_path / f"loser-{number}") for number in range(2)]
    for loser in losers:
        assert loser.process.wait(_LONGEST_SECONDS) == 0, loser.said
        assert BUSY.fullmatch(loser.said), loser.said
    assert first.process.poll() is None, first.said
    zeo.start()
    assert first.process.wait(_LONGEST_SECONDS) == 0, first.said
    assert found(zeo, "billing", []) == Counter("1")


def test_two_machines_into_one_depot(server: Server, tmp_path: Path) -> None:
    """Two Maildirs with the same Message-IDs fill two queues completely, with consumers at work."""
    server.start()
    machines = {
        name: Machine(tmp_path / name, server.uri(name), QUEUES) for name in ("billing", "support")
    }
    consumers = {"billing": ("pop", "claim"), "support": ("consume",)}
    trees = {name: [f"{name}-{kind}" for kind in kinds] for name, kinds in consumers.items()}
    lay_out(server, machines["billing"], [*trees["billing"], *trees["support"]])
    runs = [
        Run(
            *(tmp_path / f"{name}-{kind}", "tests.processes", kind),
            *(server.uri(name), name, f"{name}-{kind}", "1"),
        )
        for name, kinds in consumers.items()
        for kind in kinds
    ]
    for round in range(2):
        for number in range(40 * round, 40 * round + 40):
            for name, machine in machines.items():
                machine.deliver(f"{number}.M1.{name}", mail(number, name))
        imports = [
            machine.start_import(tmp_path / f"import-{name}-{round}")
            for name, machine in machines.items()
        ]
        for run in imports:
            assert (run.process.wait(_LONGEST_SECONDS), run.said) == (0, "")
    for run in runs:
        run.process.terminate()
    for run in runs:
        assert run.process.wait(_LONGEST_SECONDS) == 0, run.said
    wanted = Counter(str(number) for number in range(80))
    for name in machines:
        assert found(server, name, trees[name]) == wanted


def test_new_objects_after_a_restart(zeo: Server) -> None:
    """A client that was there before the server's restart makes new objects at the first attempt.

    The server gives ids that it gave away, and that nobody used, to others.
    """
    zeo.start()
    with contextlib.ExitStack() as stack:

        def client() -> tuple[Any, TransactionManager]:
            database, manager = open_database(zeo.uri("one")), TransactionManager()
            stack.callback(database.close)
            stack.callback(manager.abort)
            return database.open(manager).root(), manager

        first, in_first = client()
        first["old"], first["new"] = OOBTree(), OOBTree()
        in_first.commit()
        old, in_old = client()
        old["old"]["before"] = OOBTree()
        in_old.commit()
        zeo.stop("SIGTERM")
        zeo.start()
        new, in_new = client()
        for number in range(100):
            new["new"][number] = OOBTree()
        in_new.commit()
        until = time.monotonic() + _LONGEST_SECONDS
        while True:
            in_old.begin()
            try:
                assert sum(len(tree) for tree in old["new"].values()) == 0
                if len(old["new"]) == 100:
                    break
            except TransientError:
                in_old.abort()
            assert time.monotonic() < until, "it does not see the server again"
            time.sleep(0.05)
        old["old"]["after"] = OOBTree()
        in_old.commit()
