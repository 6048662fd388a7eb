"""requirements.lock is of requirements.txt as it is, and gives a hash of each file."""

import re
from pathlib import Path

from packaging.requirements import Requirement

import train

ROOT = Path(train.__file__).parent
WANTED = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
LOCKED = re.findall(
    r"^(\S+)==(\S+)(?: ; .*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    (ROOT / "requirements.lock").read_text(),
    re.M,
)


def test_each_requirement_is_locked_at_a_version_that_it_allows() -> None:
    for wanted in WANTED:
        versions = [version for name, version, _ in LOCKED if name == wanted.name]
        assert versions and all(version in wanted.specifier for version in versions), f"make it anew: {wanted}"


def test_nothing_in_the_lock_lacks_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text()
    packages = [line for line in text.splitlines() if not line.startswith(" ")]
    assert len(LOCKED) == len(packages) > len(WANTED)
    assert sum(len(hashes.splitlines()) for *_, hashes in LOCKED) == text.count("--hash=sha256:")
