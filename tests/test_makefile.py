import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("python", ["false", "/no/such/python"])
def test_a_python_too_old_or_absent_is_named_and_nothing_is_made(tmp_path: Path, python: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    ran = subprocess.run(["make", "env", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    assert f"make: {python} is not Python 3.11 or later; name one that is" in ran.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_left_without_pip_is_made_again(tmp_path: Path) -> None:
    """What `python3 -m venv` leaves on a Debian without python3-venv has a python and no pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/true")
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "made: $*"\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    ran = subprocess.run(["make", "env", "PYTHON=./python"], cwd=tmp_path, capture_output=True, text=True)
    assert "made: -m venv .venv" in ran.stdout
