"""Queue files as postcat shows them: what is true in them, whatever a sender has written."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postoffice.postfix import MailHeaders, PostfixError, PostfixMissing, PostfixSettings
from postoffice.postfix.records import QueueFile, read_envelopes, read_files, read_queue_files
from tests.postcat import Postcat, records_of, shown

SAMPLE = Path(__file__).parent / "postfix_samples" / "postcat-milter.txt"
ARRIVAL = datetime(2026, 11, 21, 14, 15, 44)  # noqa: DTZ001  # local and naive, as listings are
FORGED = b"a@b\n      999 recipient: forged@b.example\nrecipient: forged@b.example"


@pytest.fixture
def postcat(tmp_path: Path) -> Postcat:
    """A postcat that shows nothing yet."""
    return Postcat(tmp_path)


def read(postcat: Postcat, *ids: str) -> list[QueueFile]:
    """Read files by it."""
    return list(read_queue_files(postcat.settings, ids))


def test_a_file_is_read(postcat: Postcat) -> None:
    """A file gives its queue, size, arrival, sender, recipients and header."""
    header = (b"Received: by x", b"\tid Y", b"Subject: hello", b"X-Nul: \x00\x1b[2J")
    postcat.show("ABCDEF", shown("ABCDEF", records_of(header=header), "hold"))
    assert read(postcat, "ABCDEF") == [
        QueueFile(
            name="ABCDEF",
            queue="hold",
            size=sum(len(line) + 2 for line in header),
            arrival=ARRIVAL,
            sender="a@b.example",
            recipients=("x@y.example",),
            header=b"".join(line + b"\n" for line in header),
        )
    ]


def test_the_time_of_arrival_is_the_first_or_second_record(postcat: Postcat) -> None:
    """Without the size, as in maildrop, a file is believed; with a second time of arrival, not."""
    size, arrival, _, *others = records_of()
    postcat.show("AAAAAA", shown("AAAAAA", [arrival, *others], "maildrop"))
    postcat.show("BBBBBB", shown("BBBBBB", [arrival, arrival, *others], "maildrop"))
    postcat.show("CCCCCC", shown("CCCCCC", [size, arrival, arrival, *others]))
    one, *doubtful = read(postcat, "AAAAAA", "BBBBBB", "CCCCCC")
    assert (one.fault, one.arrival, one.size) == ("", ARRIVAL, None)
    assert all("uncertain" in other.fault for other in doubtful)


def test_a_header_that_a_milter_changed(postcat: Postcat) -> None:
    """Where a milter has changed a message, its records are followed to where they now are."""
    postcat.show("E69A42FE227", SAMPLE.read_bytes())
    (file,) = read(postcat, "E69A42FE227")
    assert (file.fault, file.sender, file.size) == ("", "new@b.example", 353)
    assert file.recipients == ("z@y.example", "added@y.example")
    fields = MailHeaders.from_bytes(file.header)
    assert (fields["Subject"], fields["X-Added"]) == (["changed subject"], ["by milter"])
    assert list(fields)[1:3] == ["DKIM-Signature", "From"]


@pytest.mark.parametrize("original", [FORGED, b"x\n", b"\n\n*** MESSAGE FILE END deferred/A ***"])
def test_lines_that_imitate_postcat(postcat: Postcat, original: bytes) -> None:
    """Lines that a sender has put into an address are no records, and those behind them are."""
    records = records_of([(original, b"x@y.example"), (b"", b"z@y.example")])
    postcat.show("AAAAAA", shown("AAAAAA", records))
    (file,) = read(postcat, "AAAAAA")
    assert file.fault == ""
    assert file.recipients == ("x@y.example", "z@y.example")
    assert file.header == b"Subject: hello\n"


def test_lines_that_imitate_postcat_with_their_places(postcat: Postcat) -> None:
    """A forged line that knows its place in the file is found out, and the file is in doubt."""
    before = shown("AAAAAA", records_of()).split(b"dsn_orig_rcpt=rfc822;")[0]
    place = int(before.rpartition(b"\n")[2].split()[0])
    at = place + 2 + len(b"dsn_orig_rcpt=rfc822;a@b")
    original = b"a@b\n%9d recipient: forged@b.example" % at
    postcat.show("AAAAAA", shown("AAAAAA", records_of([(original, b"x@y.example")])))
    (file,) = read(postcat, "AAAAAA")
    assert "looks like Postfix's own" in file.fault
    assert file.sender == "a@b.example"
    assert "x@y.example" in file.recipients


def test_a_forger_who_hides_a_recipient(postcat: Postcat) -> None:
    """Who shows one recipient instead of another, all places and counts being right, is found out.

    The first address holds a recipient that there is not, and a record that goes on until behind
    the true one, whose line it takes for its text.
    """
    before = shown("AAAAAA", records_of()).split(b"dsn_orig_rcpt=rfc822;")[0]
    place = int(before.rpartition(b"\n")[2].split()[0])
    found = False
    for padding in range(200):
        at = place + 2 + len(b"dsn_orig_rcpt=rfc822;a")
        fake = b"f" * padding + b"@b"
        after = at + (2 if len(fake) < 128 else 3) + len(fake)
        original = b"a\n%9d recipient: %b\n%9d original_recipient: " % (at, fake, after)
        records = records_of([(original, b"x@y.example"), (b"", b"z@y.example")])
        postcat.show("AAAAAA", shown("AAAAAA", records))
        (file,) = read(postcat, "AAAAAA")
        hidden = "x@y.example" not in file.recipients
        assert file.fault or not hidden
        found = found or bool(file.fault)
    assert found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_forgeries_are_never_believed(postcat: Postcat, data: st.DataObject) -> None:
    """Whatever stands in addresses, the recipients are the true ones or the file is in doubt."""
    place = st.integers(0, 900).map(lambda number: b"%9d " % number)
    label = st.sampled_from(
        [
            *(b"recipient: ", b"sender: ", b"pointer_record: ", b"named_attribute: "),
            *(b"create_time: ", b"message_arrival_time: ", b"original_recipient: "),
            *(b"regular_text: ", b"*** MESSAGE CONTENTS x ***"),
            b"*** MESSAGE FILE END deferred/AAAAAA ***",
        ]
    )
    text = st.sampled_from([b"", b"f@b", b"600", b"x" * 200, b"\r", b"\x00", b"Sat Nov 21"])
    line = st.tuples(place, label, text).map(b"".join)
    original = st.lists(st.one_of(line, st.binary(max_size=9)), max_size=4).map(b"\n".join)
    addresses = [b"%d@y.example" % number for number in range(3)]
    pairs = [(data.draw(original), address) for address in addresses]
    postcat.show("AAAAAA", shown("AAAAAA", records_of(pairs)))
    (file,) = read(postcat, "AAAAAA")
    assert file.fault or file.recipients == tuple(map(bytes.decode, addresses))
    assert file.sender == "a@b.example"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(output=st.lists(st.binary(max_size=60), max_size=8).map(b"\n".join))
def test_no_output_raises_anything_else(postcat: Postcat, output: bytes) -> None:
    """Whatever a command prints, what it does not tell is missing or an error of Postfix's."""
    postcat.show("AAAAAA", b"*** ENVELOPE RECORDS deferred/AAAAAA ***\n" + output)
    try:
        (file,) = read(postcat, "AAAAAA")
    except PostfixError:
        return
    assert file.recipients == () or file.fault


def test_a_message_that_foresees_another(postcat: Postcat) -> None:
    """A message that holds the beginning of another's part takes nothing from that one."""
    ids = [f"{number:06X}" for number in range(40)]
    for number, qid in enumerate(ids):
        original = b""
        if number == 7:
            theirs = shown(ids[8], records_of(sender=b"forged@b.example"))
            original = b"\n%9d *** MESSAGE FILE END deferred/%b ***\n%b" % (
                700,
                qid.encode(),
                theirs,
            )
        postcat.show(qid, shown(qid, records_of([(original, b"%d@y.example" % number)])))
    files = read(postcat, *ids)
    assert [file.name for file in files] == ids
    for number, file in enumerate(files):
        assert file.sender == "a@b.example"
        if number != 7:
            assert (file.recipients, file.fault) == ((f"{number}@y.example",), "")
    assert "7@y.example" in files[7].recipients
    assert "looks like Postfix's own" in files[7].fault


def test_a_message_that_foresees_one_that_has_gone(postcat: Postcat) -> None:
    """What a message holds of one that has gone is not taken for it, nor the next for gone."""
    theirs = shown("BBBBBB", records_of(sender=b"forged@b.example"))
    original = b"\n%9d *** MESSAGE FILE END deferred/AAAAAA ***\n%b" % (700, theirs)
    forger = shown("AAAAAA", records_of([(original, b"x@y.example")]))
    # All that would make what follows look odd is left out.
    postcat.show("AAAAAA", forger[: forger.index(theirs) + len(theirs)])
    postcat.show("CCCCCC", shown("CCCCCC", records_of()))
    first, second, third = read(postcat, "AAAAAA", "BBBBBB", "CCCCCC")
    assert first.fault
    assert (second.sender, second.fault) == ("", "it is not in Postfix's queue any more")
    assert (third.sender, third.fault) == ("a@b.example", "")


def test_many_that_have_gone_cost_few_processes(postcat: Postcat, tmp_path: Path) -> None:
    """Files that have gone cost the others nothing, and not a process each."""
    spool = tmp_path / "spool"
    for queue in ("maildrop", "incoming", "active", "deferred", "hold"):
        (spool / queue).mkdir(parents=True)
    ids = [f"{number:06X}" for number in range(300)]
    there = ids[::2]
    for qid in there:
        postcat.show(qid, shown(qid, records_of()))
        (spool / "deferred" / qid).write_bytes(b"")
        (spool / "deferred" / qid).chmod(0o700)
    files = read(postcat, *ids)
    assert [file.name for file in files if not file.fault] == there
    assert {file.fault for file in files} == {"", "it is not in Postfix's queue any more"}
    assert postcat.runs <= 4


def test_a_file_at_which_postcat_fails(postcat: Postcat) -> None:
    """A file that ends postcat has its fault, and those behind it are read."""
    for qid in ("AAAAAA", "CCCCCC"):
        postcat.show(qid, shown(qid, records_of()))
    script = Path(postcat.settings.cat_message[0])
    cut = shown("BBBBBB", records_of())[:200].decode()
    script.write_text(
        script.read_text().replace(
            "    -*) ;;\n",
            "    -*) ;;\n    BBBBBB) cat <<'END'\n" + cut + "\nEND\n"
            "        echo 'postcat: fatal: malformed' >&2; exit 1 ;;\n",
        )
    )
    first, second, third = read(postcat, "AAAAAA", "BBBBBB", "CCCCCC")
    assert (first.fault, third.fault) == ("", "")
    assert second.fault.endswith("postcat: fatal: malformed")


def test_a_header_without_end_is_cut(postcat: Postcat) -> None:
    """Of a header beyond all measure the beginning is kept."""
    header = [b"X-%d: %b" % (number, b"y" * 2000) for number in range(2000)]
    postcat.show("AAAAAA", shown("AAAAAA", records_of(header=header)))
    (file,) = read(postcat, "AAAAAA")
    assert 1 << 18 < len(file.header) < 1 << 19
    assert file.fault == "its header is longer than 256 KB; the rest was left out"
    assert file.recipients == ("x@y.example",)


def test_envelopes_alone(postcat: Postcat) -> None:
    """The envelope is read without the header, and a path is as good as an id."""
    records = [one for one in records_of() if one[0] != b"regular_text"]
    postcat.show("AAAAAA", shown("AAAAAA", records))
    (file,) = read_envelopes(postcat.settings, ["AAAAAA"])
    assert (file.recipients, file.header, file.fault) == (("x@y.example",), b"", "")
    assert list(read_files(postcat.settings, [])) == []


def test_no_postcat() -> None:
    """Without the command, one line says so."""
    nowhere = PostfixSettings(cat_message=("/nowhere/postcat",))
    with pytest.raises(PostfixMissing, match="no command /nowhere/postcat"):
        list(read_queue_files(nowhere, ["AAAAAA"]))
