"""Splits what a wheel says it needs into requirement files. Run by the Python of the environment it is for.

python wheel_requirements.py WHEEL --out FILE --bare FILE --missing FILE --left-out NAME... --without-dependencies NAME...
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

# pip's own copy: the only parser of requirements that every environment has.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name


def requirements_of(wheel: Path) -> list[Requirement]:
    """What the wheel needs on this machine, extras aside."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in fields.get_all("Requires-Dist") or ()]
    return [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def is_installed(requirement: Requirement) -> bool:
    """Whether this environment has a version that the requirement allows."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(version, prereleases=True))


def without_marker(requirement: Requirement) -> str:
    return str(requirement).split(";")[0].strip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Split what a wheel needs into requirement files.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="to install with what they need in turn")
    parser.add_argument("--bare", type=Path, required=True, help="to install by themselves")
    parser.add_argument("--missing", type=Path, required=True, help="of both, those that this environment lacks")
    parser.add_argument("--left-out", nargs="*", default=[])
    parser.add_argument("--without-dependencies", nargs="*", default=[])
    options = parser.parse_args(arguments)
    wanted = [r for r in requirements_of(options.wheel) if canonicalize_name(r.name) not in options.left_out]
    bare = [r for r in wanted if canonicalize_name(r.name) in options.without_dependencies]
    # setuptools only builds packages; which version runs beside the engine makes no difference to it
    missing = [r for r in wanted if not is_installed(r) and r.name != "setuptools"]
    for path, requirements in ((options.out, [r for r in wanted if r not in bare]), (options.bare, bare), (options.missing, missing)):
        path.write_text("".join(without_marker(r) + "\n" for r in requirements))
        print(path, *requirements, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
