"""What ``postoffice.ini`` may say, and what is said of it when it is wrong."""

from __future__ import annotations

import grp
import logging
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paste.deploy.loadwsgi import ConfigLoader

from postoffice.config import (
    IN_MAILDIR,
    Settings,
    TCPPlace,
    UnixPlace,
    find,
    load,
    load_postfix,
    set_up_logging,
)
from postoffice.database_uri import blob_folder_fault, database_file, shown, uri_fault
from postoffice.depot.policy import Policy
from postoffice.exceptions import ConfigurationError
from postoffice.filters import FACTORIES, HeaderRegexpFilter, ToHostnameFilter
from postoffice.loops import LoopRule
from postoffice.postfix import PostfixSettings

SAMPLE = Path(__file__).resolve().parent.parent / "etc" / "postoffice.ini.sample"
URI = "zodb_uri = file://%(here)s/Data.fs?blobstorage_dir=%(here)s/blobs"
MAIN = f"[post office]\n{URI}\nmaildir = %(here)s/Maildir\n"
QUEUE = "[queue:one]\nfilters =\n    to_hostname: .example.com\n"


class Folder:
    """A folder with a postoffice.ini in it."""

    def __init__(self, path: Path) -> None:
        """Use this folder."""
        self.path = path
        self.ini = path / "postoffice.ini"

    def load(self, text: str) -> Settings:
        """Write the file and read it."""
        self.ini.write_text(text, encoding="utf-8")
        return load(self.ini)

    def main(self, *lines: str) -> Settings:
        """Read a file with these lines at the end of its main section."""
        return self.load(MAIN + "".join(f"{line}\n" for line in lines) + QUEUE)

    def queue(self, *filters: str) -> Settings:
        """Read a file with a queue of these filters."""
        return self.load(MAIN + "[queue:one]\nfilters =\n" + "".join(f"  {f}\n" for f in filters))

    def fault(self, text: str) -> ConfigurationError:
        """Read a file that is wrong, and return the error, which is one line."""
        with pytest.raises(ConfigurationError) as caught:
            self.load(text)
        error = caught.value
        assert error.exit_status == 2
        assert error.file == str(self.ini)
        assert "\n" not in str(error)
        assert str(error).startswith(str(self.ini))
        assert error.fault
        assert error.mend
        return error

    def policy(self, *lines: str) -> Policy:
        """Read a file with a queue that has these lines, and return its policy."""
        return self.load(MAIN + QUEUE + "".join(f"{line}\n" for line in lines)).policies["one"]

    def main_fault(self, *lines: str) -> ConfigurationError:
        """Return the error that these lines in the main section make."""
        return self.fault(MAIN + "".join(f"{line}\n" for line in lines) + QUEUE)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Return an empty folder."""
    return Folder(tmp_path)


# -- whole files -----------------------------------------------------------------------------------


def test_defaults(folder: Folder) -> None:
    """With only what is required, everything else has the documented default."""
    settings = folder.load(MAIN)
    here = folder.path
    assert settings.path == folder.ini
    assert settings.folder == here
    assert settings.zodb_uri == f"file://{here}/Data.fs?blobstorage_dir={here}/blobs"
    assert settings.zodb_path == ("postoffice",)
    assert settings.zodb_path_text == "/postoffice"
    assert settings.maildir == here / "Maildir"
    assert settings.routing.reject_filters == ()
    assert settings.routing.queues == ()
    assert settings.max_message_size is None
    assert settings.loop is None
    assert settings.archive is IN_MAILDIR
    assert settings.archive_keep is None
    assert settings.lmtp is None
    assert not settings.rejects_unrouted
    assert settings.deliver_timeout == 100.0
    assert not settings.has_logging


def test_the_sample_passes_in_an_empty_folder(folder: Folder) -> None:
    """The sample file is right as it stands, without warnings, and creates nothing."""
    settings = folder.load(SAMPLE.read_text(encoding="utf-8"))
    assert settings.warnings == ()
    assert settings.queue_names == ("support", "Customer A")
    assert settings.max_message_size == 50 << 20
    assert settings.loop == LoopRule(60.0, ("To", "Subject"), 300.0)
    assert os.listdir(folder.path) == ["postoffice.ini"]


def test_every_line_of_the_sample_is_right_when_uncommented(folder: Folder) -> None:
    """The options that the sample shows in comments are right as well."""
    text = SAMPLE.read_text(encoding="utf-8")
    options = ["archive =", "archive_keep =", "reject_filters =", "    header_regexp:"]
    options += ["    to_hostname: .lists", "max_attempts =", "retry_delay =", "lease ="]
    options += ["lmtp =", "lmtp_mode =", "lmtp_group =", "unrouted =", "deliver_timeout ="]
    options += ["zeo_listen =", "zeo_mode =", "zeo_group ="]
    options += ["[postfix]", "list_queue =", "cat_message =", "control =", "spool_path ="]
    options += ["timeout ="]
    for option in options:
        assert text.count(f"\n#{option}") == 1
        text = text.replace(f"\n#{option}", f"\n{option}")
    # Not every machine has a Postfix.
    text = text.replace("/var/spool/postfix/postoffice/lmtp", "%(here)s/lmtp")
    text = text.replace("lmtp_group = postfix", f"lmtp_group = {os.getgid()}")
    text = text.replace("zeo_group = postoffice", f"zeo_group = {os.getgid()}")
    settings = folder.load(text)
    assert settings.warnings == ()
    assert settings.postfix == PostfixSettings()
    assert settings.archive == folder.path / "archive"
    assert settings.archive_keep == 90 * 86400
    assert len(settings.routing.reject_filters) == 2
    assert settings.policies == {"support": Policy(), "Customer A": Policy()}
    assert settings.lmtp == UnixPlace(folder.path / "lmtp", 0o660, os.getgid())
    assert not settings.rejects_unrouted
    assert settings.deliver_timeout == 100.0


OF_REPOZE_POSTOFFICE = r"""
[post office]
# Required parameters
zodb_uri = zconfig://%(here)s/zodb.conf#main
maildir = %(here)s/incoming/Maildir

# Optional parameters
zodb_path = /postoffice
ooo_loop_frequency = 60 # 1 Hertz
ooo_loop_headers = To,Subject
ooo_throttle_period = 300 # 5 minutes
max_message_size = 500m
reject_filters =
    header_regexp_file: reject_headers.txt
    body_regexp_file: reject_body.txt
    to_hostname: *.partycentral.com  # They need to change their MX

[queue:Customer A]
filters =
    to_hostname: app.customera.com app.aliasa.com

[queue:Customer B]
filters =
    to_hostname: .customerb.com

[queue:only_bcc]
filters =
    to_hostname: example.com;headers=X-Original-To

[queue:Parties]
filters =
    header_regexp: Subject:.+[Pp]arty.+

[queue:Weddings]
filters =
    header_regexp_file: %(here)s/wedding_invitation_header_checks.txt
"""


def test_a_file_of_repoze_postoffice_works_unchanged(folder: Folder) -> None:
    """Every example of its documents, in one file, means what it meant there."""
    (folder.path / "incoming").mkdir()
    for name in ("zodb.conf", "reject_headers.txt", "reject_body.txt"):
        (folder.path / name).write_text("a\n")
    (folder.path / "wedding_invitation_header_checks.txt").write_text("Subject:.*[Ww]edding\n")
    settings = folder.load(OF_REPOZE_POSTOFFICE)
    assert settings.zodb_uri == f"zconfig://{folder.path}/zodb.conf#main"
    assert settings.maildir == folder.path / "incoming" / "Maildir"
    assert settings.loop == LoopRule(60.0, ("To", "Subject"), 300.0)
    assert settings.max_message_size == 500 << 20
    assert settings.queue_names == (
        "Customer A",
        "Customer B",
        "only_bcc",
        "Parties",
        "Weddings",
    )
    descriptions = [one.description for one in settings.routing.reject_filters]
    assert descriptions == [
        f"header_regexp_file: {folder.path}/reject_headers.txt",
        f"body_regexp_file: {folder.path}/reject_body.txt",
        "to_hostname: *.partycentral.com",
    ]
    bcc = settings.routing.queues[2].filters[0]
    assert isinstance(bcc, ToHostnameFilter)
    assert bcc.headers == ("X-Original-To",)
    assert settings.warnings == ()


@pytest.mark.parametrize("text", [SAMPLE.read_text(encoding="utf-8"), OF_REPOZE_POSTOFFICE])
def test_the_file_is_one_of_paste_deploys(folder: Folder, text: str) -> None:
    """PasteDeploy reads the same file, with an application's sections in it."""
    folder.ini.write_text(text + "\n[app:main]\nuse = egg:some\nname = %(here)s\n")
    parser = ConfigLoader(str(folder.ini)).parser
    assert parser.get("app:main", "name") == str(folder.path)
    assert parser.has_section("post office")


def test_sections_of_others_are_left_alone(folder: Folder) -> None:
    """An application's sections may hold anything, and do not count as queues."""
    other = "[app:main]\nuse = egg:some\nzodb_uri = x\nformat = %(nothing)s 100%\n"
    other += "Twice = 1\ntwice = 2\n"
    settings = folder.load(other + MAIN + QUEUE + "[server:main]\nport = 80\n")
    assert settings.queue_names == ("one",)
    assert settings.warnings == ()


def test_queues_keep_the_order_of_the_file(folder: Folder) -> None:
    """Neither the alphabet nor the main section's place changes the queues' order."""
    queues = "".join(QUEUE.replace("one", name) for name in ("z", "a b", "m"))
    assert folder.load(queues + MAIN).queue_names == ("z", "a b", "m")


def test_defaults_section_is_known_to_all(folder: Folder) -> None:
    """Names of [DEFAULT] can be used in values and are not unknown options."""
    text = f"[DEFAULT]\nVar = %(here)s/var\ndebug = true\n{MAIN}archive = %(var)s/kept\n{QUEUE}"
    (folder.path / "var").mkdir()
    assert folder.load(text).archive == folder.path / "var" / "kept"


def test_the_file_is_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """Neither a locale of ASCII nor a byte order mark changes what is read."""
    ini = tmp_path / "postoffice.ini"
    ini.write_bytes(("\ufeff" + MAIN + QUEUE.replace("one", "Bücher")).encode())
    program = "import sys; from postoffice.config import load; "
    program += "print(ascii(load(sys.argv[1]).queue_names))"
    run = subprocess.run(
        [sys.executable, "-c", program, str(ini)],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == r"('B\xfccher',)"


def test_windows_line_ends_are_read(folder: Folder) -> None:
    """CRLF ends a line like LF."""
    folder.ini.write_bytes((MAIN + QUEUE).replace("\n", "\r\n").encode())
    assert load(folder.ini).queue_names == ("one",)


@pytest.mark.parametrize(
    ("text", "section", "option", "fault"),
    [
        ("", None, None, "no section [post office]"),
        ("[Post Office]\n", None, None, "no section [post office]"),
        ("zodb_uri = x\n", None, None, "line 1: 'zodb_uri = x'"),
        ("[post office]\nmaildir\n", None, None, "line 2: 'maildir"),
        (MAIN + MAIN, "post office", None, "line 4: the section"),
        (MAIN + QUEUE + QUEUE, "queue:one", None, "line 7: the section"),
        (MAIN + "maildir = /\n", "post office", "maildir", "line 4: the option"),
        (MAIN + "[queue:]\n", "queue:", None, "has no name"),
        (MAIN + "[queue: ]\n", "queue: ", None, "has no name"),
        (MAIN + "[queue:a\x07b]\n", "queue:a\x07b", None, "control character"),
    ],
)
def test_a_file_that_is_no_configuration(
    folder: Folder, text: str, section: str | None, option: str | None, fault: str
) -> None:
    """A file that cannot be parsed is told with the line and what to write."""
    error = folder.fault(text)
    assert (error.section, error.option) == (section, option)
    assert fault in error.fault


def test_bytes_that_are_not_utf_8_are_an_error(folder: Folder) -> None:
    """The line and the byte are named."""
    folder.ini.write_bytes(MAIN.encode() + "# Größe\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="line 4: byte 0xf6 is not UTF-8; save the file"):
        load(folder.ini)


def test_a_file_that_cannot_be_read_is_an_error(folder: Folder) -> None:
    """A missing file, a folder and a FIFO are told in one line, without waiting."""
    with pytest.raises(ConfigurationError, match="No such file"):
        load(folder.ini)
    with pytest.raises(ConfigurationError, match="no regular file"):
        load(folder.path)
    os.mkfifo(folder.path / "fifo")
    with pytest.raises(ConfigurationError, match="no regular file"):
        load(folder.path / "fifo")


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "near"),
    [("mail_dir = x", "maildir"), ("max_size = 1", "max_message_size"), ("qqq = 1", None)],
)
def test_an_unknown_option_is_an_error(folder: Folder, line: str, near: str | None) -> None:
    """The nearest known option is suggested, and all are listed."""
    error = folder.main_fault(line)
    assert (error.section, error.option) == ("post office", line.split(" ")[0])
    assert error.fault == "unknown option"
    assert (f"did you mean {near!r}?" in error.mend) == (near is not None)
    assert "ooo_loop_frequency" in error.mend


def test_an_unknown_option_of_a_queue_is_an_error(folder: Folder) -> None:
    """A queue has filters only."""
    error = folder.fault(MAIN + "[queue:one]\nfilter = to_hostname: example.com\n")
    assert (error.section, error.option) == ("queue:one", "filter")
    assert "did you mean 'filters'?" in error.mend


@pytest.mark.parametrize("option", ["zodb_uri", "maildir"])
@pytest.mark.parametrize("replacement", ["", "{option} =\n"])
def test_required_options(folder: Folder, option: str, replacement: str) -> None:
    """zodb_uri and maildir must be there, with a value."""
    lines = [line for line in MAIN.splitlines(True) if not line.startswith(option)]
    error = folder.fault("".join(lines) + replacement.format(option=option) + QUEUE)
    assert (error.section, error.option) == ("post office", option)


def test_names_of_options_have_no_case(folder: Folder) -> None:
    """ZODB_Path is zodb_path."""
    assert folder.main("ZODB_Path = /a/b").zodb_path == ("a", "b")


@pytest.mark.parametrize(
    ("value", "path"),
    [("/postoffice", "/postoffice"), ("a/b/", "/a/b"), ("//a//b c", "/a/b c")],
)
def test_zodb_path(folder: Folder, value: str, path: str) -> None:
    """The path is names between slashes, from the root."""
    settings = folder.main(f"zodb_path = {value}")
    assert settings.zodb_path_text == path
    assert settings.zodb_path == tuple(path[1:].split("/"))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("0", None),
        ("1", 1),
        ("12345", 12345),
        ("10k", 10 << 10),
        ("10kb", 10 << 10),
        ("10 KB", 10 << 10),
        ("500m", 500 << 20),
        ("10 MB", 10 << 20),
        ("1g", 1 << 30),
        ("1GB", 1 << 30),
        ("7b", 7),
        ("500m # half a gigabyte", 500 << 20),
        ("500m ; half a gigabyte", 500 << 20),
    ],
)
def test_sizes(folder: Folder, value: str, size: int | None) -> None:
    """A size is bytes, or has the suffix k, m or g, and 0 is no limit."""
    settings = folder.main(f"max_message_size = {value}")
    assert settings.max_message_size == settings.routing.max_message_size == size


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("300", 300.0),
        ("0", 0.0),
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("7 d", 604800.0),
        ("1W", 604800.0),
        ("300 # 5 minutes", 300.0),
    ],
)
def test_durations(folder: Folder, value: str, seconds: float) -> None:
    """A duration is seconds, or has the suffix s, m, h, d or w."""
    settings = folder.main("ooo_loop_frequency = 1", f"ooo_throttle_period = {value}")
    assert settings.loop == LoopRule(1.0, (), seconds)
    if seconds:
        assert folder.main(f"archive_keep = {value}").archive_keep == seconds


@pytest.mark.parametrize(
    ("value", "frequency"),
    [("60", 60.0), ("0.25", 0.25), (".5", 0.5), ("1e-2", 0.01), ("60 # 1 Hertz", 60.0)],
)
def test_frequencies(folder: Folder, value: str, frequency: float) -> None:
    """A frequency is messages a minute and may be a fraction."""
    assert folder.main(f"ooo_loop_frequency = {value}").loop == LoopRule(frequency, (), 300.0)


@pytest.mark.parametrize("value", ["0", "0.0", "0 # off"])
def test_no_frequency_is_no_loop_detection(folder: Folder, value: str) -> None:
    """A frequency of 0 turns loop detection off."""
    assert folder.main(f"ooo_loop_frequency = {value}").loop is None


def test_loop_headers(folder: Folder) -> None:
    """Names are separated by commas; white space and empty ones do not count."""
    loop = folder.main("ooo_loop_frequency = 1", "ooo_loop_headers = To , Subject,").loop
    assert loop is not None
    assert loop.headers == ("To", "Subject")
    assert folder.main("ooo_loop_headers =").loop is None
    loop = folder.main("ooo_loop_frequency = 1", "ooo_loop_headers = To,", "    Subject").loop
    assert loop is not None
    assert loop.headers == ("To", "Subject")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_message_size", "-1"),
        ("max_message_size", "10x"),
        ("max_message_size", "m"),
        ("max_message_size", "1.5m"),
        ("max_message_size", "١٠"),
        ("max_message_size", "9" * 5000),
        ("max_message_size", ""),
        ("max_message_size", "# nothing"),
        ("ooo_loop_frequency", "-1"),
        ("ooo_loop_frequency", "nan"),
        ("ooo_loop_frequency", "inf"),
        ("ooo_loop_frequency", "1e999"),
        ("ooo_loop_frequency", "often"),
        ("ooo_throttle_period", "-5m"),
        ("ooo_throttle_period", "5 minutes"),
        ("ooo_throttle_period", "0.5"),
        ("ooo_loop_headers", "To Subject"),
        ("ooo_loop_headers", "To,Sub:ject"),
        ("archive_keep", "ever"),
        ("archive_keep", "0"),
        ("zodb_path", "/"),
        ("zodb_path", ""),
        ("archive", ""),
    ],
)
def test_bad_values_are_errors(folder: Folder, option: str, value: str) -> None:
    """What is no value of the option is told with what would be one."""
    error = folder.main_fault(f"{option} = {value}")
    assert (error.section, error.option) == ("post office", option)
    assert len(str(error)) < 6000


def test_a_value_that_runs_on_is_an_error(folder: Folder) -> None:
    """An option that was indented by mistake does not become part of the one before."""
    error = folder.main_fault("zodb_path = /a", "  max_message_size = 5m")
    assert error.option == "zodb_path"
    assert "max_message_size = 5m" in error.fault


def test_comments_behind_values(folder: Folder) -> None:
    """A number sign ends numbers and hosts only; paths and expressions keep it."""
    settings = folder.main(
        "archive = a # b", "reject_filters =", "  header_regexp: Subject: # one", "  # a comment"
    )
    assert settings.archive == folder.path / "a # b"
    (one,) = settings.routing.reject_filters
    assert isinstance(one, HeaderRegexpFilter)
    assert one.sources == ("Subject: # one",)


def test_a_semicolon_behind_white_space_begins_a_comment(folder: Folder) -> None:
    """As in the files that repoze.postoffice read; filters keep their semicolons."""
    settings = folder.load(
        f"[post office]\n{URI}\nmaildir = %(here)s/M ; where mail comes\n"
        "[queue:one]\nfilters = to_hostname: example.com ;headers=From\n"
    )
    assert settings.maildir == folder.path / "M"
    one = settings.routing.queues[0].filters[0]
    assert isinstance(one, ToHostnameFilter)
    assert one.headers == ("From",)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("100%", "100%"),
        ("100%%", "100%"),
        ("100%%%", "100%%"),
        ("% d", "% d"),
        ("%(", "%("),
        ("%(off)", "%(off)"),
        ("%%(here)s", "%(here)s"),
        ("%%%(name)s", "%value"),
        ("%(NAME)s", "value"),
        ("%(percent)s", "5%"),
    ],
)
def test_percent_signs(folder: Folder, written: str, meant: str) -> None:
    """%% and a lone % are a percent sign, %(name)s is the value of that name."""
    defaults = "[DEFAULT]\nname = value\npercent = 5%\n"
    assert (
        folder.load(f"{defaults}{MAIN}archive = a{written}\n").archive == folder.path / f"a{meant}"
    )


def test_here_may_hold_a_percent_sign(tmp_path: Path) -> None:
    """The folder's own name is taken as it is."""
    (tmp_path / "100%(x)s %%").mkdir()
    folder = Folder(tmp_path / "100%(x)s %%")
    text = MAIN.replace(URI, "zodb_uri = memory://x")
    assert folder.load(text).maildir == folder.path / "Maildir"


def test_an_unknown_name_in_a_value_is_an_error(folder: Folder) -> None:
    """The mend says how to write that text itself."""
    error = folder.main_fault("archive = %(var)s/x")
    assert error.option == "archive"
    assert "'var'" in error.fault
    assert "%%(var)s" in error.mend


def test_names_that_go_round_in_a_circle_are_an_error(folder: Folder) -> None:
    """A value that names itself is told, not followed."""
    assert "circle" in folder.main_fault("archive = %(archive)s").fault
    doubling = "".join(f"a{n} = %(a{n + 1})s%(a{n + 1})s\n" for n in range(40))
    assert "circle" in folder.fault(f"[DEFAULT]\n{doubling}a40 = x\n{MAIN}archive = %(a0)s\n").fault


# -- folders ---------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory plays no part."""
    monkeypatch.chdir("/")
    text = MAIN.replace("%(here)s/Maildir", "in/../Mail") + "archive = kept\n"
    settings = folder.load(text)
    assert settings.maildir == folder.path / "Mail"
    assert settings.archive == folder.path / "kept"


def test_the_maildir_may_be_missing_but_not_its_parent(folder: Folder) -> None:
    """A misspelt path is told, and nothing is made."""
    error = folder.fault(MAIN.replace("/Maildir", "/no/such/Maildir"))
    assert error.option == "maildir"
    assert f"{folder.path}/no/such" in error.fault
    assert not (folder.path / "no").exists()
    (folder.path / "Maildir").write_text("")
    assert "is no folder" in folder.fault(MAIN).fault


@pytest.mark.parametrize("value", ["none", "None", " NONE "])
def test_the_archive_can_be_waived(folder: Folder, value: str) -> None:
    """The value none keeps no originals."""
    assert folder.main(f"archive = {value}").archive is None


@pytest.mark.parametrize("value", ["Maildir", "Maildir/new", "Maildir/cur/x", "no/such"])
def test_places_where_no_archive_can_be(folder: Folder, value: str) -> None:
    """An archive that would be imported again, or whose parent is missing, is an error."""
    assert folder.main_fault(f"archive = {value}").option == "archive"


def test_the_archive_may_lie_within_the_maildir(folder: Folder) -> None:
    """A folder of the Maildir's own is no place of delivery."""
    (folder.path / "Maildir").mkdir()
    assert folder.main("archive = Maildir/.kept").archive == folder.path / "Maildir" / ".kept"


# -- databases -------------------------------------------------------------------------------------

SCHEMES = ("demo", "file", "memory", "mysql", "oracle", "postgres", "sqlite", "zconfig", "zeo")


@pytest.mark.parametrize(
    "uri",
    [
        "file:///x/Data.fs?blobstorage_dir=/x/blobs",
        "file:///x/Data.fs?quota=1&blobstorage_dir=/x/blobs",
        "zconfig:///x/zodb.conf#main",
        "zeo://localhost:9991?blob_dir=/x",
        "zeo:///x/zeo.sock?blob_dir=/x&shared_blob_dir=true",
        "postgres://u:p@h:5432/d?blob_dir=/x",
        "mysql://u:p@h/d?blob_dir=/x",
        "sqlite:///?data_dir=/x&blob_dir=/y",
        "memory://x",
        "demo:(file:///x)/(memory://)",
    ],
)
def test_uris_that_are_right(uri: str) -> None:
    """Any kind of database that zodburi knows can be named."""
    assert uri_fault(uri, SCHEMES, lambda module: True) is None
    assert blob_folder_fault(uri) is None


@pytest.mark.parametrize(
    ("uri", "mend"),
    [
        ("file:///x/Data.fs", "file:///x/Data.fs?blobstorage_dir=/x/blobs"),
        ("file:///x/Data.fs?quota=1", "file:///x/Data.fs?quota=1&blobstorage_dir=/x/blobs"),
        ("file:///x/Data.fs?blobstorage_dir=", "file:///x/Data.fs?blobstorage_dir=/x/blobs"),
        ("file:/x/Data.fs", "file://x/Data.fs"),
        ("zeo://localhost:9991", "zeo://localhost:9991?blob_dir="),
        ("postgres://u:p@h:1/d", "postgres://u:***@h:1/d?blob_dir="),
        ("postgres://u:p@h/d?blob_dir=/x", "write postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://u:p@h:1?blob_dir=/x", "write postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://h:1/d?blob_dir=/x", "write postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://u:p@:1/d?blob_dir=/x", "write postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://u:p@h:1x/d?blob_dir=/x", "write postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://u:p@h:65536/d?blob_dir=/x", "USER:PASSWORD@HOST:5432/DATABASE"),
        ("postgres://u:p'p@h:1/d?blob_dir=/x", "a dsn, and that file by zconfig://"),
        ("postgres://u:p/p@h:1/d?blob_dir=/x", "a dsn, and that file by zconfig://"),
        ("sqlite:///?blob_dir=/x", "write sqlite:///?data_dir=FOLDER&blob_dir=FOLDER"),
        ("sqlite:///?data_dir=/x", "sqlite:///?data_dir=/x&blob_dir=/x/blobs"),
        ("postgresql://u:p@h/d", "write postgres://u:***@h/d"),
        ("FILE:///x", "write file:///x"),
        ("sqlite3:///x", "write sqlite:///x"),
        ("couchdb://x", "use one of: demo, file, memory, mysql"),
        ("/x/Data.fs", "begin with one of: demo, file"),
        ("", "begin with one of: demo, file"),
    ],
)
def test_uris_that_are_wrong(uri: str, mend: str) -> None:
    """The mend shows the very URI to write, or what there is to choose from."""
    fault = uri_fault(uri, SCHEMES, lambda module: True) or blob_folder_fault(uri)
    assert fault is not None
    assert mend in fault[1]


@pytest.mark.parametrize(
    ("uri", "shows"),
    [
        ("postgres://u:secret@h:1/d", "postgres://u:***@h:1/d"),
        ("postgres://u:sec@ret@h:1/d?blob_dir=/x@y", "postgres://u:***@h:1/d?blob_dir=/x@y"),
        ("postgres://u:sec/ret@h:1/d", "postgres://u:***@h:1/d"),
        ("postgres://u:sec?ret@h:1/d", "postgres://u:***@h:1/d"),
        ("postgres://u@h:1/d", "postgres://u@h:1/d"),
        ("zeo://h:9991?blob_dir=/x@y", "zeo://h:9991?blob_dir=/x@y"),
        ("zeo://h:9991?password=secret&blob_dir=/x", "zeo://h:9991?password=***&blob_dir=/x"),
        ("file:///x/Data.fs?blobstorage_dir=/y", "file:///x/Data.fs?blobstorage_dir=/y"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shows: str) -> None:
    """Whatever a password consists of, none of it is shown, and all else is."""
    assert shown(uri) == shows
    fault = uri_fault(uri, SCHEMES, lambda module: True) or blob_folder_fault(uri)
    assert "sec" not in str(fault)


def test_a_missing_package_is_named() -> None:
    """RelStorage and a driver are told apart, and the mend is the command to run."""
    uri = "postgres://h/d?blob_dir=/x"
    without = uri_fault(uri, ("file", "zeo"), lambda module: True)
    assert without is not None
    assert "RelStorage" in without[0]
    assert without[1] == "run pip install 'postoffice[relstorage]'"
    driverless = uri_fault(uri, SCHEMES, lambda module: False)
    assert driverless is not None
    assert "psycopg2" in driverless[0]
    assert without[1] == driverless[1]
    other = uri_fault("mysql://h/d?blob_dir=/x", SCHEMES, lambda module: False)
    assert other is not None
    assert "RelStorage[mysql]" in other[1]


def test_the_mend_of_a_uri_keeps_its_names(folder: Folder) -> None:
    """The corrected URI can be copied into the file as it is."""
    lines = "[post office]\nzodb_uri = file://%(here)s/Data.fs\nmaildir = %(here)s/Maildir\n"
    error = folder.fault(lines)
    assert (error.section, error.option) == ("post office", "zodb_uri")
    mend = "file://%(here)s/Data.fs?blobstorage_dir=%(here)s/blobs"
    assert error.mend == f"write {mend}"
    assert folder.load(lines.replace("file://%(here)s/Data.fs", mend)).warnings[1:] == ()


def test_a_missing_zconfig_file_is_an_error(folder: Folder) -> None:
    """The file that a zconfig URI names must be there."""
    error = folder.fault(MAIN.replace(URI, "zodb_uri = zconfig://%(here)s/zodb.conf#main"))
    assert f"no file {folder.path}/zodb.conf" in error.fault


@pytest.mark.parametrize(
    ("name", "mend"), [("a+b", "a%2Bb"), ("a&b", "a%26b"), ("a%20b", "a%2520b"), ("a?b", "rename")]
)
def test_a_folder_whose_name_means_something_in_a_uri(tmp_path: Path, name: str, mend: str) -> None:
    """Blobs never go to another folder than the one that is written."""
    (tmp_path / name).mkdir()
    folder = Folder(tmp_path / name)
    error = folder.fault(MAIN)
    assert error.option == "zodb_uri"
    assert mend in error.mend
    if name != "a?b":
        quoted = MAIN.replace("dir=%(here)s", f"dir={tmp_path}/{mend}")
        assert folder.load(quoted).warnings[1:] == ()


@pytest.mark.parametrize(
    ("uri", "warning"),
    [
        ("memory://x", "loses all messages"),
        ("file://Data.fs?blobstorage_dir=/x", "relative"),
        ("file:///x/Data.fs?blobstorage_dir=x", "relative"),
    ],
)
def test_a_database_in_a_doubtful_place_is_warned_of(
    folder: Folder, uri: str, warning: str
) -> None:
    """What is allowed and hardly meant is a warning that names its place."""
    (line,) = folder.load(MAIN.replace(URI, f"zodb_uri = {uri}") + QUEUE).warnings
    assert line.startswith(f"{folder.ini}: [post office] zodb_uri: ")
    assert warning in line


# -- filters and queues ----------------------------------------------------------------------------


def test_filters_are_one_a_line(folder: Folder) -> None:
    """Empty lines between filters do not count, and values keep their colons."""
    settings = folder.queue("to_hostname: a.example", "", "header_regexp : Subject: x: y")
    one, two = settings.routing.queues[0].filters
    assert one.description == "to_hostname: a.example"
    assert two.description == "header_regexp: Subject: x: y"


@pytest.mark.parametrize(
    ("line", "fault", "mend"),
    [
        ("to_hostnam: a.example", "unknown filter 'to_hostnam'", "did you mean 'to_hostname'?"),
        ("quite_other: x", "unknown filter", "there are: to_hostname, header_regexp,"),
        ("to_hostname a.example", "is no filter", "one filter a line"),
        ("to_hostname:", "no host", "at least one"),
        ("to_hostname: a@b.example", "no host name", ".example.com"),
        ("header_regexp: (", "'(' is no regular expression", "correct it"),
        ("header_regexp:", "has no value", "header_regexp: VALUE"),
        ("header_regexp_file: none.txt", "cannot read", "readable"),
        ("body_regexp_file: bad.txt", "bad.txt, line 2: '(' is no regular", "correct it"),
    ],
)
@pytest.mark.parametrize("section", ["post office", "queue:one"])
def test_bad_filters_are_errors(
    folder: Folder, line: str, fault: str, mend: str, section: str
) -> None:
    """The section and option are named with what is wrong; in a file, its line too."""
    (folder.path / "bad.txt").write_text("fine\n(\n")
    if section == "post office":
        error = folder.main_fault("reject_filters =", f"    {line}")
    else:
        error = folder.fault(f"{MAIN}[queue:one]\nfilters =\n    {line}\n")
    assert error.section == section
    assert error.option == ("reject_filters" if section == "post office" else "filters")
    assert fault in error.fault
    assert mend in error.mend


OTHER_FILTER = """
class Weekday:
    def __init__(self, value, folder):
        if value not in ("monday", "friday"):
            raise ValueError(f"{value} is no day")
        self.description = f"weekday: {value}"
        self.folder = folder

    def __call__(self, message):
        return None
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a package with filters of its own, and return the name of its module."""
    site = tmp_path / "site"
    for number in (1, 2):
        metadata = site / f"other{number}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Name: other{number}\nVersion: 1.0\n")
    module = "postoffice_test_weekdays"
    (site / f"{module}.py").write_text(OTHER_FILTER)
    points = f"[postoffice.filters]\nweekday = {module}:Weekday\nto_hostname = {module}:Weekday\n"
    points += f"broken = {module}:Nothing\nabsent = no_such_module_anywhere:x\n"
    (site / "other1-1.0.dist-info" / "entry_points.txt").write_text(
        points + f"twice = {module}:Weekday\n"
    )
    (site / "other2-1.0.dist-info" / "entry_points.txt").write_text(
        f"[postoffice.filters]\ntwice = {module}:Monthday\n"
    )
    monkeypatch.syspath_prepend(site)
    yield module
    sys.modules.pop(module, None)


def test_filters_of_other_packages(folder: Folder, other_package: str) -> None:
    """An entry point makes a filter of value and folder, but replaces none of ours."""
    settings = folder.queue("weekday: friday", "to_hostname: a.example")
    weekday, hostname = settings.routing.queues[0].filters
    assert weekday.description == "weekday: friday"
    assert vars(weekday)["folder"] == str(folder.path)
    assert isinstance(hostname, ToHostnameFilter)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("weekday: sunday", "weekday: sunday is no day"),
        ("broken: x", "cannot be loaded from postoffice_test_weekdays:Nothing"),
        ("absent: x", "cannot be loaded from no_such_module_anywhere:x"),
        ("twice: x", "several packages"),
    ],
)
def test_faults_of_other_packages(
    folder: Folder, other_package: str, line: str, fault: str
) -> None:
    """What another package's filter refuses, and one that cannot be loaded, is one line as well."""
    error = folder.fault(f"{MAIN}[queue:one]\nfilters = {line}\n")
    assert fault in error.fault
    assert "weekday" in folder.fault(f"{MAIN}[queue:one]\nfilters = none: x\n").mend


def test_filters_are_the_entry_points_of_the_package() -> None:
    """What the package declares for others to see is what the configuration knows."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    for name, factory in FACTORIES.items():
        assert f'{name} = "postoffice.filters:{factory.__qualname__}"' in text


def test_a_queue_without_filters_is_warned_of(folder: Folder) -> None:
    """It is allowed, with or without the option, and gets nothing."""
    settings = folder.load(f"{MAIN}[queue:one]\n[queue:two]\nfilters =\n")
    assert [queue.filters for queue in settings.routing.queues] == [(), ()]
    assert settings.warnings == tuple(
        f"{folder.ini}: [queue:{name}]: a queue without filters gets no messages"
        for name in ("one", "two")
    )


@pytest.mark.parametrize(
    ("earlier", "later", "unreachable"),
    [
        ("to_hostname: .example.com", "to_hostname: app.example.com", True),
        ("to_hostname: .example.com", "to_hostname: .example.com", True),
        ("to_hostname: .example.com", "header_regexp: x\n to_hostname: a.example.com", True),
        ("to_hostname: app.example.com", "to_hostname: .example.com", False),
        ("to_hostname: .example.com\n header_regexp: x", "to_hostname: .example.com", False),
        ("to_hostname: .example.com\n header_regexp: x", "header_regexp: x", False),
        (
            "to_hostname: .example.com\n header_regexp: x",
            "body_regexp: y\n header_regexp: x\n to_hostname: b.example.com",
            True,
        ),
        ("header_regexp: x", "header_regexp: x", True),
        ("header_regexp: x", "body_regexp: x", False),
        ("to_hostname: .example.com;headers=To", "to_hostname: .example.com", False),
        ("", "to_hostname: .example.com", False),
    ],
)
def test_queues_that_can_never_match_are_warned_of(
    folder: Folder, earlier: str, later: str, unreachable: bool
) -> None:
    """A queue whose mail an earlier one takes entirely is told."""
    text = f"{MAIN}[queue:early]\nfilters =\n {earlier}\n[queue:late]\nfilters =\n {later}\n"
    warnings = [line for line in folder.load(text).warnings if "[queue:late]" in line]
    assert bool(warnings) == unreachable
    if unreachable:
        assert "[queue:early]" in warnings[0]


def test_queues_that_a_reject_filter_empties_are_warned_of(folder: Folder) -> None:
    """A queue all of whose mail is rejected is told, with the filter."""
    (line,) = folder.main("reject_filters = to_hostname: .example.com").warnings
    assert "[queue:one]" in line
    assert "to_hostname: .example.com in reject_filters" in line


def test_other_slips_are_warned_of(folder: Folder) -> None:
    """No queue, a section that is nearly a queue's, and a name with spaces around it are told."""
    (folder.path / "empty.txt").write_text("# nothing yet\n")
    text = MAIN + "[Queue: x]\nfilters = y\n[queues]\n"
    assert [line for line in folder.load(text).warnings if "no queue's section" in line] == [
        f"{folder.ini}: [{name}]: this is no queue's section; write [queue:NAME]"
        for name in ("Queue: x", "queues")
    ]
    assert "there is no queue" in folder.load(MAIN).warnings[0]
    assert "' one'" in folder.load(MAIN + QUEUE.replace(":one", ": one")).warnings[0]
    assert "no expression" in folder.queue("header_regexp_file: empty.txt").warnings[0]


# -- policies --------------------------------------------------------------------------------------


def test_the_policy_of_a_queue(folder: Folder) -> None:
    """Each queue has its own number of attempts, delay and lease; the default is 5, 60 s, 300 s."""
    two = QUEUE.replace("one", "two") + "max_attempts = 3\nRetry_Delay = 5m # long\nlease = 2h\n"
    policies = folder.load(MAIN + QUEUE + two).policies
    assert policies == {"one": Policy(5, 60.0, 300.0), "two": Policy(3, 300.0, 7200.0)}


def test_a_policy_for_all_queues(folder: Folder) -> None:
    """What [DEFAULT] says holds for each queue that does not say otherwise."""
    text = "[DEFAULT]\nmax_attempts = 2\nlease = 9\n" + MAIN + QUEUE + "lease = 10\n"
    assert folder.load(text).policies == {"one": Policy(2, 60.0, 10.0)}


@pytest.mark.parametrize(
    ("line", "policy"),
    [
        ("max_attempts = 1", Policy(max_attempts=1)),
        ("max_attempts = 1000", Policy(max_attempts=1000)),
        ("max_attempts = 0005 ; so many", Policy(max_attempts=5)),
        ("retry_delay = 0", Policy(retry_delay=0.0)),
        ("retry_delay = 52w", Policy(retry_delay=52 * 604800.0)),
        ("lease = 1", Policy(lease=1.0)),
        ("lease = 7d", Policy(lease=604800.0)),
    ],
)
def test_policies_that_are_right(folder: Folder, line: str, policy: Policy) -> None:
    """From 1 to 1,000 attempts, any delay and any lease of at least a second are taken."""
    assert folder.policy(line) == policy


@pytest.mark.parametrize(
    ("option", "value", "mend"),
    [
        ("max_attempts", "0", "write a number from 1 to 1000"),
        ("max_attempts", "1001", "write a number from 1 to 1000"),
        ("max_attempts", "-1", "write a number from 1 to 1000"),
        ("max_attempts", "2.5", "write a number from 1 to 1000"),
        ("max_attempts", "٣", "write a number from 1 to 1000"),
        ("max_attempts", "9" * 5000, "write a number from 1 to 1000"),
        ("max_attempts", "", "write one, or leave the option out"),
        ("max_attempts", "# none", "write one, or leave the option out"),
        ("retry_delay", "soon", "write seconds, or 5m, 2h, 7d, 4w"),
        ("retry_delay", "-60", "write seconds, or 5m, 2h, 7d, 4w"),
        ("retry_delay", "0.5", "write seconds, or 5m, 2h, 7d, 4w"),
        ("retry_delay", "53w", "write 52w or less"),
        ("retry_delay", "999999999999w", "write 52w or less"),
        ("lease", "0", "write 1s or more"),
        ("lease", "53w", "write 52w or less"),
        ("lease", "5 minutes", "write seconds, or 5m, 2h, 7d, 4w"),
        ("lease", "5m\n  10m", "remove it"),
    ],
)
def test_policies_that_are_wrong(folder: Folder, option: str, value: str, mend: str) -> None:
    """What is no number of attempts, delay or lease is told with the section and the mend."""
    error = folder.fault(MAIN + QUEUE + f"{option} = {value}\n")
    assert (error.section, error.option, error.mend) == ("queue:one", option, mend)
    assert len(str(error)) < 6000


def test_a_misspelt_policy_is_an_error(folder: Folder) -> None:
    """An option that a queue does not have is told with the one that was meant."""
    error = folder.fault(MAIN + QUEUE + "max_attempt = 5\n")
    assert "did you mean 'max_attempts'?" in error.mend
    assert folder.fault(MAIN + "lease = 5\n" + QUEUE).section == "post office"


# -- the listener ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("unix:%(here)s/lmtp", "lmtp"),
        ("unix:lmtp", "lmtp"),
        ("unix: in/../run/lmtp ; for Postfix", "run/lmtp"),
        ("unix:run/with spaces # and more", "run/with spaces # and more"),
        ("unix:gréve", "gréve"),
    ],
)
def test_the_listener_at_a_unix_socket(folder: Folder, value: str, path: str) -> None:
    """A unix socket's path is relative to the file, its mode 0660, its group the process's own."""
    (folder.path / "run").mkdir()
    settings = folder.main(f"lmtp = {value}")
    assert settings.lmtp == UnixPlace(folder.path / path, 0o660, None)
    assert settings.warnings == ()
    assert not (folder.path / path).exists()


@pytest.mark.parametrize(
    ("value", "host", "port", "text"),
    [
        ("127.0.0.1:2424", "127.0.0.1", 2424, "127.0.0.1:2424"),
        ("127.8.9.10:00024 ; a port", "127.8.9.10", 24, "127.8.9.10:24"),
        ("[::1]:65535", "::1", 65535, "[::1]:65535"),
        ("[0:0:0:0:0:0:0:1]:1", "::1", 1, "[::1]:1"),
    ],
)
def test_the_listener_at_a_port(
    folder: Folder, value: str, host: str, port: int, text: str
) -> None:
    """A loopback address in digits and a port name a port of this machine."""
    place = folder.main(f"lmtp = {value}").lmtp
    assert place == TCPPlace(host, port)
    assert str(place) == text


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("", "no value"),
        ("2424", "no address of a listener"),
        ("127.0.0.1", "no address of a listener"),
        ("127.0.0.1:", "no address of a listener"),
        ("127.0.0.1:24x", "no address of a listener"),
        ("127.0.0.1:٢٤", "no address of a listener"),
        ("127.0.0.1:2424 # a port", "no address of a listener"),
        ("[::1]", "no address of a listener"),
        ("[::1:2424", "no address of a listener"),
        ("/var/spool/postfix/postoffice/lmtp", "no address of a listener"),
        ("127.0.0.1:0", "no port"),
        ("127.0.0.1:65536", "no port"),
        ("::1:2424", "may be an address without a port"),
        ("localhost:2424", "no address in digits"),
        ("inet:127.0.0.1:2424", "no address in digits"),
        ("lmtp:unix:x:1", "no address in digits"),
        ("*:2424", "no address in digits"),
        (":2424", "no address in digits"),
        ("[]:2424", "no address in digits"),
        ("127.1:2424", "no address in digits"),
        ("[" + "1" * 4000 + "]:2424", "no address in digits"),
        ("0.0.0.0:2424", "no loopback address"),
        ("192.0.2.1:2424", "no loopback address"),
        ("128.0.0.1:2424", "no loopback address"),
        ("[::]:2424", "no loopback address"),
        ("[2001:db8::1]:2424", "no loopback address"),
        ("[::ffff:127.0.0.1]:2424", "no loopback address"),
        ("[::1%lo]:2424", "no loopback address"),
        ("unix:", "there is no path"),
        ("unix:no/such/lmtp", "there is no folder"),
        ("unix:postoffice.ini/lmtp", "there is no folder"),
        ("unix:postoffice.ini", "no socket"),
        ("unix:.", "no socket"),
        ("unix:/", "no socket"),
        ("unix:" + "x" * 5000, "too many for a socket's address"),
        ("unix:a\n  b", "goes on in another line"),
    ],
)
def test_places_where_no_listener_can_be(folder: Folder, value: str, fault: str) -> None:
    """What is no unix socket and no loopback port is told with what would be one."""
    error = folder.main_fault(f"lmtp = {value}")
    assert (error.section, error.option) == ("post office", "lmtp")
    assert fault in error.fault
    assert len(str(error)) < 6000


def test_a_socket_of_107_bytes_is_the_longest(folder: Folder) -> None:
    """A path that just fits a socket's address is taken, in bytes and not in characters."""
    rest = 107 - len(os.fsencode(folder.path)) - 1
    if rest < 2:
        pytest.skip("the folder for temporary files has too long a path itself")
    path = folder.path / ("é" * (rest // 2) + "x" * (rest % 2))
    assert folder.main(f"lmtp = unix:{path}").lmtp == UnixPlace(path)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
    # The socket that a listener has left is no obstacle.
    assert folder.main(f"lmtp = unix:{path}").lmtp == UnixPlace(path)
    assert "108 bytes" in folder.main_fault(f"lmtp = unix:{path}x").fault


@pytest.mark.parametrize(
    ("value", "mode"),
    [("0660", 0o660), ("660", 0o660), ("0600 # us alone", 0o600), ("0220", 0o220)],
)
def test_modes_of_the_socket(folder: Folder, value: str, mode: int) -> None:
    """A mode is three octal digits, with a 0 before them or without."""
    settings = folder.main("lmtp = unix:lmtp", f"lmtp_mode = {value}")
    place = settings.lmtp
    assert isinstance(place, UnixPlace)
    assert place.mode == mode
    assert settings.warnings == ()


def test_a_socket_for_everybody_is_warned_of(folder: Folder) -> None:
    """A mode with which every user may deliver is taken, with a warning."""
    settings = folder.main("lmtp = unix:lmtp", "lmtp_mode = 0666")
    assert settings.lmtp == UnixPlace(folder.path / "lmtp", 0o666)
    (warning,) = settings.warnings
    assert warning.startswith(f"{folder.ini}: [post office] lmtp_mode: every user of this machine")


@pytest.mark.parametrize("value", ["", "9", "0668", "66", "06600", "1660", "0o660", "rw", "-660"])
def test_what_is_no_mode_is_an_error(folder: Folder, value: str) -> None:
    """A mode in another form, or with more than permissions, is told with the form."""
    error = folder.main_fault("lmtp = unix:lmtp", f"lmtp_mode = {value}")
    assert error.option == "lmtp_mode"
    assert "0660" in error.mend or "leave the option out" in error.mend


@pytest.mark.parametrize("value", ["0440", "0", "000", "0555"])
def test_a_mode_that_lets_nobody_in_is_an_error(folder: Folder, value: str) -> None:
    """A socket to which nobody may write would never get any mail."""
    error = folder.main_fault("lmtp = unix:lmtp", f"lmtp_mode = {value}")
    assert error.option == "lmtp_mode"


def test_the_group_of_the_socket(folder: Folder) -> None:
    """A group is given by its name or its number, and has to exist."""
    known = grp.getgrgid(os.getgid())
    for text in (known.gr_name, str(known.gr_gid)):
        settings = folder.main("lmtp = unix:lmtp", f"lmtp_group = {text}")
        assert settings.lmtp == UnixPlace(folder.path / "lmtp", 0o660, known.gr_gid)
    for text in ("no-such-group", "gréve", "4294967295", "9999999999", "9" * 4000, "-1"):
        error = folder.main_fault("lmtp = unix:lmtp", f"lmtp_group = {text}")
        assert error.option == "lmtp_group"
        assert error.fault == f"there is no group {text!r}"


@pytest.mark.parametrize("option", ["lmtp_mode = 0660", "lmtp_group = 0"])
@pytest.mark.parametrize("lines", [[], ["lmtp = 127.0.0.1:2424"]])
def test_permissions_are_for_a_socket(folder: Folder, option: str, lines: list[str]) -> None:
    """A mode or a group without a unix socket is an error: somebody believes to be protected."""
    error = folder.main_fault(*lines, option)
    assert error.option == option.partition(" ")[0]
    assert error.fault == "there is no unix socket for it"


def test_a_file_is_served_beside_it(folder: Folder) -> None:
    """Unless the configuration says otherwise, a file is served at its own path with .zeo."""
    settings = folder.main()
    assert settings.zeo_listen == UnixPlace(Path(f"{database_file(settings.zodb_uri)}.zeo"), 0o660)


@pytest.mark.parametrize("value", ["unix:depot.zeo", "depot.zeo", "unix:%(here)s/depot.zeo"])
def test_a_file_is_served_elsewhere(folder: Folder, value: str) -> None:
    """The socket of the file's server is where the configuration has it, with mode and group."""
    settings = folder.main(f"zeo_listen = {value}", "zeo_mode = 0600", f"zeo_group = {os.getgid()}")
    assert settings.zeo_listen == UnixPlace(folder.path / "depot.zeo", 0o600, os.getgid())


@pytest.mark.parametrize("value", ["8100", "127.0.0.1:8100", "[::1]:8100", "db.example.com:8100"])
def test_a_file_is_served_at_no_port(folder: Folder, value: str) -> None:
    """Who names a port does not get a unix socket with that name."""
    error = folder.main_fault(f"zeo_listen = {value}")
    assert error.option == "zeo_listen"
    assert error.fault == f"{value!r} is a port, and only a unix socket will do"


@pytest.mark.parametrize("value", ["none", "None ; not now"])
def test_a_file_is_not_served(folder: Folder, value: str) -> None:
    """The word none switches it off."""
    assert folder.main(f"zeo_listen = {value}").zeo_listen is None


def test_everybody_at_the_files_socket(folder: Folder) -> None:
    """A mode that lets every user of the machine in is warned of, since that gives them all."""
    (warning,) = folder.main("zeo_mode = 0666").warnings
    assert "zeo_mode: every user of this machine" in warning


@pytest.mark.parametrize("option", ["zeo_listen = depot.zeo", "zeo_mode = 0600", "zeo_group = 0"])
def test_only_a_file_is_served(folder: Folder, option: str) -> None:
    """With any other database the options are refused: nobody would heed them."""
    main = MAIN.replace("file://", "zeo://").replace("blobstorage_dir", "blob_dir")
    error = folder.fault(f"{main}{option}\n{QUEUE}")
    assert error.option == option.partition(" ")[0]
    assert error.fault == "only the file of a file:// database is served"


def test_a_folder_of_the_socket_that_cannot_be_seen(tmp_path: Path) -> None:
    """A user who may not look into the mail server's folders reads the file all the same."""
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0)
    program = (
        "import os, sys; from postoffice.config.listening import place;"
        "os.geteuid() or os.setuid(65534); print(place(*sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "unix:hidden/postoffice/lmtp", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"unix:{hidden}/postoffice/lmtp\n", "")


@pytest.mark.parametrize(
    ("value", "rejects"), [("discard", False), ("reject", True), ("Reject ; and tell", True)]
)
def test_what_becomes_of_unrouted_mail(folder: Folder, value: str, rejects: bool) -> None:
    """Mail that no queue takes is discarded or rejected."""
    assert folder.main(f"unrouted = {value}").rejects_unrouted is rejects


@pytest.mark.parametrize("value", ["", "bounce", "true", "discard, reject"])
def test_nothing_else_becomes_of_unrouted_mail(folder: Folder, value: str) -> None:
    """Any other word is told with the two that there are."""
    error = folder.main_fault(f"unrouted = {value}")
    assert error.option == "unrouted"
    assert not value or error.mend == "write discard or reject"


@pytest.mark.parametrize(
    ("value", "seconds"), [("1", 1.0), ("100s", 100.0), ("15m", 900.0), ("900 # the most", 900.0)]
)
def test_the_time_of_a_delivery(folder: Folder, value: str, seconds: float) -> None:
    """A delivery may take from a second to 15 minutes."""
    assert folder.main(f"deliver_timeout = {value}").deliver_timeout == seconds


@pytest.mark.parametrize("value", ["", "0", "0.5", "-1", "901", "16m", "1h", "soon", "9" * 5000])
def test_times_that_no_delivery_may_take(folder: Folder, value: str) -> None:
    """No time at all, or one in which the mail server would have bounced the mail, is an error."""
    error = folder.main_fault(f"deliver_timeout = {value}")
    assert error.option == "deliver_timeout"
    assert len(str(error)) < 6000


# -- the fingerprint -------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_what_counts(folder: Folder) -> None:
    """It differs when an option, a filter, their order or a file of expressions does."""
    path = folder.path / "expressions.txt"
    path.write_text("a\n")
    line = "reject_filters = header_regexp_file: expressions.txt"
    seen = {folder.main(line).fingerprint}
    path.write_text("b\n")
    seen.add(folder.main(line).fingerprint)
    seen.add(folder.main().fingerprint)
    seen.add(folder.main("max_message_size = 5m").fingerprint)
    seen.add(folder.main("ooo_loop_frequency = 5").fingerprint)
    two = QUEUE.replace("one", "two")
    seen.add(folder.load(MAIN + QUEUE + two).fingerprint)
    seen.add(folder.load(MAIN + two + QUEUE).fingerprint)
    assert len(seen) == 7


def test_the_fingerprint_stays_otherwise(folder: Folder) -> None:
    """Comments, white space, spelling and an application's sections do not change it."""
    first = folder.main("max_message_size = 1k").fingerprint
    assert folder.main("# x", "", "MAX_Message_Size: 1024 # y").fingerprint == first
    text = "[app:main]\nx = y\n" + MAIN + "max_message_size = 1KB\n" + QUEUE
    assert folder.load(text).fingerprint == first
    assert folder.load(text + "max_attempts = 9\nlease = 1m\n").fingerprint == first
    lines = ("lmtp = 127.0.0.1:2424", "unrouted = reject", "deliver_timeout = 9")
    assert folder.main("max_message_size = 1k", *lines).fingerprint == first
    assert len(first) == 64


# -- finding the file ------------------------------------------------------------------------------


def test_the_file_is_found_in_the_documented_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, etc here, etc beside the script's bin, as called and then as it really lies."""
    work, called, real = tmp_path / "work", tmp_path / "called", tmp_path / "real"
    for place in (work, called, real):
        (place / "etc").mkdir(parents=True)
        (place / "bin").mkdir()
    (real / "bin" / "postoffice").write_text("")
    (called / "bin" / "postoffice").symlink_to(real / "bin" / "postoffice")
    monkeypatch.chdir(work)
    places = [work, work / "etc", called / "etc", real / "etc"]
    for place in places:
        (place / "postoffice.ini").write_text("")
    for place in places:
        assert find(str(called / "bin" / "postoffice")) == place / "postoffice.ini"
        (place / "postoffice.ini").unlink()
    assert find(str(called / "bin" / "postoffice")) in (None, Path("/etc/postoffice.ini"))


# -- logging ---------------------------------------------------------------------------------------

LOGGING = """
[loggers]
keys = root, post
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
handlers =
[logger_post]
level = INFO
handlers = file
qualname = postoffice_test_logging
propagate = 0
[handler_file]
class = FileHandler
args = (r'%(here)s/log',)
formatter = plain
[formatter_plain]
format = %(levelname)s %(message)s 100%%
"""


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Put the root logger back as it was, and close the files of the test's own."""
    root, own = logging.getLogger(), logging.getLogger("postoffice_test_logging")
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for handler in own.handlers[:]:
        own.removeHandler(handler)
        handler.close()


@pytest.mark.usefixtures("root_logger")
def test_logging_is_set_up_when_the_file_has_it(folder: Folder) -> None:
    """[loggers] and its kin are honoured, and %(here)s is the folder."""
    settings = folder.load(MAIN + QUEUE + LOGGING)
    assert settings.has_logging
    assert set_up_logging(settings)
    logging.getLogger("postoffice_test_logging").info("hello")
    assert (folder.path / "log").read_text() == "INFO hello 100%\n"


def test_without_loggers_logging_is_left_alone(folder: Folder) -> None:
    """A file without [loggers] configures nothing."""
    settings = folder.main()
    assert not settings.has_logging
    assert not set_up_logging(settings)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FileHandler", "NoSuchHandler"),
        ("%(here)s/log", "%(here)s/no/such/log"),
        ("%(here)s", "%(nowhere)s"),
    ],
)
def test_bad_logging_is_one_line(folder: Folder, old: str, new: str) -> None:
    """What cannot be set up is a configuration error like any other."""
    settings = folder.load(MAIN + QUEUE + LOGGING.replace(old, new))
    with pytest.raises(ConfigurationError) as caught:
        set_up_logging(settings)
    assert caught.value.section == "loggers"
    assert "\n" not in str(caught.value)


# -- any text --------------------------------------------------------------------------------------


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="[]=:;#%()s \nab\x00\x85\u2028é", max_size=60))
def test_any_text_is_settings_or_an_error(tmp_path: Path, text: str) -> None:
    """Whatever is written into the file, it is read or refused in one line."""
    folder = Folder(tmp_path)
    for start in ("", MAIN, f"{MAIN}archive = ", f"{MAIN}[queue:one]\nfilters = header_regexp: "):
        folder.ini.write_text(start + text, encoding="utf-8")
        said = ""
        try:
            load(folder.ini)
        except ConfigurationError as error:
            said = str(error)
        assert "\n" not in said


def test_an_error_reads_as_one_sentence(folder: Folder) -> None:
    """File, section, option, fault and mend stand in this order in the error's text."""
    text = textwrap.dedent(
        """
        [post office]
        zodb_uri = postgresql://h/d
        maildir = x
        """
    )
    assert str(folder.fault(text)) == (
        f"{folder.ini}: [post office] zodb_uri: there is no scheme 'postgresql'; "
        "write postgres://h/d"
    )


# -- [postfix] -------------------------------------------------------------------------------------


def test_postfix_defaults(folder: Folder) -> None:
    """Without a section Postfix is where a distribution has it."""
    assert folder.main().postfix == PostfixSettings()
    folder.ini.write_text("")
    assert load_postfix(folder.ini) == PostfixSettings()


def test_postfix_options(folder: Folder) -> None:
    """Commands are split as in a shell, paths are relative to the file, names in any case."""
    text = """
[postfix]
List_Queue = "/opt/my postfix/postqueue" -v ; not the usual one
cat_message = postcat
control = postsuper
spool_path = spool
config_directory = %(here)s/etc
sudo = sudo -n
timeout = 5m # slow
"""
    folder.ini.write_text(text)
    expected = PostfixSettings(
        list_queue=("/opt/my postfix/postqueue", "-v"),
        spool_path=str(folder.path / "spool"),
        config_directory=str(folder.path / "etc"),
        sudo=("sudo", "-n"),
        timeout=300.0,
    )
    assert load_postfix(folder.ini) == expected
    settings = folder.load(MAIN + QUEUE + text)
    assert settings.postfix == expected
    assert settings.warnings == ()


def test_postfix_instance_without_its_spool(folder: Folder) -> None:
    """Another instance with the default one's spool is hardly meant, and gets a warning."""
    settings = folder.load(MAIN + QUEUE + "[postfix]\nconfig_directory = /etc/postfix-out\n")
    (warning,) = settings.warnings
    assert "[postfix] config_directory: spool_path is left at /var/spool/postfix;" in warning


@pytest.mark.parametrize(
    ("line", "fault", "mend"),
    [
        ("list_cue = x", "unknown option", "did you mean 'list_queue'?"),
        ("control =", "the option has no value", "leave the option out"),
        ("control = ; none", "the option has no value", "leave the option out"),
        ('control = "x', "cannot be split into words", "close the quotation marks"),
        ("control = x\n  y", "line break", "in one line"),
        ("sudo = yes", "'yes' is no command", "write sudo -n"),
        ("timeout = 0", "no time to wait", "write 1s to 1h"),
        ("timeout = soon", "is no duration", "write seconds"),
    ],
)
def test_postfix_faults(folder: Folder, line: str, fault: str, mend: str) -> None:
    """What cannot be used in the section is one line with the fault and the mend."""
    error = folder.fault(f"{MAIN}{QUEUE}[postfix]\n{line}\n")
    assert (error.section, fault in error.fault, mend in error.mend) == ("postfix", True, True)
