"""Installs what an image needs of requirements.lock into its virtual environment; run while the image is built.

`install.py "main demo"`: `main` stands for the dependencies in pyproject.toml, the name of an extra for that extra's,
any other word for a package of the lock file; each with all that it needs. What that is, the lock file's own `# via`
lines say: nothing is resolved again, and there is no second lock file that could differ from the first.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = Path("/opt/venv")
ENTRY = re.compile(r"^([\w.-]+)==.*\n(?:[ \t].*\n)*", re.MULTILINE)
NEEDED_BY = re.compile(r"^ +# +(?:via +)?([\w.-]+)", re.MULTILINE)
NAME = re.compile(r"[\w.-]+")


def main(words: list[str]) -> int:
    """Leaves the part that is installed beside what is installed."""
    part = VENV / "requirements.lock"
    part.write_text(part_of((HERE / "requirements.lock").read_text(), (HERE / "pyproject.toml").read_text(), words))
    # A base's certificates are trusted, also those that a site has added; without its cache uv leaves nothing behind.
    uv = [str(HERE / "uv" / "bin" / "uv"), "pip", "install", "--system-certs", "--no-cache", "--compile-bytecode"]
    # DeepSpeed is a source distribution: what it is built with is the lock file's as well.
    pinned = ["--require-hashes", "--build-constraints", str(HERE / "requirements.lock"), "-r", str(part)]
    code = subprocess.call([*uv, "--python", str(VENV / "bin" / "python"), *pinned])
    (VENV / ".lock").unlink(missing_ok=True)  # uv's own, which everybody may write
    return code


def part_of(lock: str, project: str, words: list[str]) -> str:
    """The entries of the words and of all that they need.  Exits when the lock file has none for a word."""
    entries: dict[str, str] = defaultdict(str)  # of a package there may be several, for different interpreters
    needed_by: dict[str, set[str]] = defaultdict(set)
    for found in ENTRY.finditer(lock):
        entries[found[1]] += found[0]
        needed_by[found[1]].update(NEEDED_BY.findall(found[0]))
    wanted = set(roots(project, words))
    if unknown := wanted - entries.keys():
        sys.exit(f"requirements.lock has no {', '.join(sorted(unknown))}: PACKAGES takes main, extras and its packages")
    while more := {name for name in entries if name not in wanted and needed_by[name] & wanted}:
        wanted |= more
    return "".join(text for name, text in entries.items() if name in wanted)


def roots(project: str, words: list[str]) -> list[str]:
    """The names that the words stand for, as the lock file spells them."""
    content = tomllib.loads(project)["project"]
    groups = {"main": content["dependencies"], **content["optional-dependencies"]}
    return [normal(requirement) for word in words for requirement in groups.get(word, [word])]


def normal(requirement: str) -> str:
    found = NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else requirement


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]).split()))
