"""cluster/Dockerfile: versions of constraints.txt, a user who is not root, and no more than it copies."""

from __future__ import annotations

import re
from pathlib import Path

from dngd.doctor import SUPPORTED_PYTHON, TESTED

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "cluster" / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def test_python_is_one_with_a_recorded_run() -> None:
    version = re.search(r"ARG PYTHON_VERSION=(\S+)", TEXT)
    assert version is not None
    assert version.group(1) in TESTED["python"]
    assert SUPPORTED_PYTHON[0] <= tuple(map(int, version.group(1).split("."))) <= SUPPORTED_PYTHON[1]


def test_every_version_is_that_of_the_constraints() -> None:
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "--constraint constraints.txt" in line
        assert not re.search(r"[=<>]=", line), "a version here would be a second one"
    constraints = (ROOT / "constraints.txt").read_text()
    for package in ("torch", "ray", "dgl", "boto3", "cryptography"):
        assert re.search(rf"^{package}==", constraints, flags=re.MULTILINE), package


def test_it_ends_as_a_user_who_is_not_root() -> None:
    assert [line for line in LINES if line.startswith("USER")] == ["USER ray"]
    assert "useradd --uid 1000" in TEXT
    after = LINES[LINES.index("USER ray") :]
    assert not any(line.startswith(("RUN", "COPY")) for line in after)


def test_what_it_copies_exists_and_is_let_through() -> None:
    copied = [source for line in LINES if line.startswith("COPY") for source in line.split()[1:-1]]
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore, "nothing goes along unasked: no tokens, stores or runs"
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore
    assert sorted(copied) == sorted(line.removeprefix("!") for line in ignore if line.startswith("!"))
