"""The units for systemd under ``etc``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.postfix import ROOT

UNITS = sorted(
    path.name for path in (ROOT / "etc").iterdir() if path.suffix in {".service", ".timer", ".path"}
)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_each_unit(tmp_path: Path, name: str) -> None:
    """Systemd finds no fault in a unit, and knows each of its lines."""
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("systemd is not installed")
    command = tmp_path / "postoffice"
    command.symlink_to("/bin/true")
    for one in UNITS:
        text = (ROOT / "etc" / one).read_text()
        text = text.replace("/opt/postoffice/bin/postoffice", str(command))
        (tmp_path / one).write_text(text.replace("User=postoffice", "User=daemon"))
    done = subprocess.run(
        [analyse, "verify", tmp_path / name], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or name in line]
    assert (done.returncode, said) == (0, [])


def test_the_daemon_is_shut_in() -> None:
    """The daemon's unit keeps it from what it does not need: it is exposed a little only."""
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("systemd is not installed")
    done = subprocess.run(
        [analyse, "security", "--offline=yes", "--threshold=35", ROOT / "etc/postoffice.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
