"""Installed versions against the bounds in pyproject.toml, which are the versions that were tested.

Another version may work. If something fails, the warning says where to look first.
"""

import functools
import logging
import re
from collections.abc import Iterator
from importlib import metadata

logger = logging.getLogger(__name__)


def outside_bounds(requirements: list[str]) -> Iterator[str]:
    """Packages whose installed version is outside its bounds, as `NAME VERSION (tested: BOUNDS)`.

    requirements: from the package's metadata; those of extras are left out.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    for line in requirements:
        try:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = version(requirement.name)
            fits = requirement.specifier.contains(installed, prereleases=True)
        except (metadata.PackageNotFoundError, InvalidRequirement, InvalidVersion, TypeError):
            continue  # not installed, or by a tool that writes metadata in its own way
        if not fits:
            yield f"{requirement.name} {installed} (tested: {requirement.specifier})"


def version(name: str) -> str:
    """As metadata.version, without parsing the description, which takes most of its time."""
    text = metadata.distribution(name).read_text("METADATA")
    found = re.search(r"^Version: *(\S+)", text or "", re.MULTILINE)
    return found[1] if found else metadata.version(name)


@functools.cache
def warn_outside_bounds() -> None:
    """Logs one line, once per process, if a dependency's version was not tested."""
    try:
        found = list(outside_bounds(metadata.requires("bltjax") or []))
    except (metadata.PackageNotFoundError, ImportError):
        return  # used from its folder, without an installation
    if found:
        logger.warning("not tested with %s", "; ".join(found))
