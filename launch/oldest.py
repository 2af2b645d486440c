"""The oldest versions that pyproject.toml allows, as constraints for pip.

    python launch/oldest.py > oldest.txt && pip install -e '.[test]' -c oldest.txt

Every dependency and every extra is pinned to its lower bound; their own dependencies are not
pinned. Reads pyproject.toml with the standard library, since nothing is installed yet.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*([^;]*)(?:;.*)?")


def constraints(project: dict) -> list[str]:
    """Lines `NAME==VERSION`, without markers: a constraint installs nothing.

    Raises:
      ValueError: for a requirement without a lower bound, or for two bounds of one package.
    """
    extras = project.get("optional-dependencies", {}).values()
    lowest = {}
    for requirement in [*project["dependencies"], *(line for lines in extras for line in lines)]:
        name, bounds = REQUIREMENT.fullmatch(requirement).groups()
        if name == project["name"]:
            continue  # an extra that contains another
        lower = re.search(r">=\s*([\w.]+)", bounds)
        if lower is None:
            raise ValueError(f"{requirement!r} has no lower bound: write {name}>=VERSION")
        if lowest.setdefault(name, lower[1]) != lower[1]:
            raise ValueError(f"{name} has two lower bounds: {lowest[name]} and {lower[1]}")
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


def main() -> int:
    try:
        lines = constraints(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])
    except ValueError as error:
        print(f"{PYPROJECT}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
