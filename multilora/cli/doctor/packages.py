"""Which of the packages that multilora asks for are installed, and whether their versions are new enough.

The list is the installed package's own metadata, so it cannot differ from pyproject.toml. Called by `command.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata

from packaging.requirements import Requirement

NAME = "multilora"
FOR_DEVELOPERS = ("dev", "browser", "docs")
"""Extras that no server needs."""


@dataclass(frozen=True)
class InstalledPackage:
    """One requirement. version: None if it is not installed; wanted: as in pyproject.toml, such as ">=2.11"."""

    name: str
    wanted: str
    version: str | None

    @property
    def fits(self) -> bool:
        return self.version is not None and Requirement(f"{self.name}{self.wanted}").specifier.contains(
            self.version, prereleases=True
        )


@dataclass(frozen=True)
class InstalledPackages:
    """What there is. listed: whether multilora is installed as a package, so that it is known what it asks for."""

    listed: bool
    core: list[InstalledPackage] = field(default_factory=list)
    extras: dict[str, list[InstalledPackage]] = field(default_factory=dict)


def installed_packages(requirements: Iterable[str] | None = None) -> InstalledPackages:
    """The state of every requirement that applies here. requirements: those of the package by default."""
    if requirements is None:
        try:
            requirements = metadata.requires(NAME) or ()
        except metadata.PackageNotFoundError:
            return InstalledPackages(False)
    core: list[InstalledPackage] = []
    extras: dict[str, list[InstalledPackage]] = {}
    for requirement in map(Requirement, requirements):
        extra = _extra(requirement)
        marker = requirement.marker
        if extra in FOR_DEVELOPERS or (marker is not None and not marker.evaluate({"extra": extra or ""})):
            continue
        found = InstalledPackage(requirement.name, str(requirement.specifier), _version(requirement.name))
        (core if extra is None else extras.setdefault(extra, [])).append(found)
    return InstalledPackages(True, core, extras)


def _extra(requirement: Requirement) -> str | None:
    """The extra that asks for it; None: multilora always does."""
    marker = str(requirement.marker or "")
    _, found, rest = marker.partition('extra == "')
    return rest.partition('"')[0] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
