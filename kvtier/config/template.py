"""A configuration file to start from: every setting with its default, and above it what it is for and what is allowed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kvtier.config.fields import Section, text_of
from kvtier.config.model import Config, plain_of
from kvtier.config.source import Dumper

EXAMPLE: Mapping[str, Any] = {
    "tiers": [{"type": "host", "capacity": "8GiB"}, {"type": "disk", "path": "/var/cache/kvtier", "capacity": "100GiB"}]
}
"""the settings that have no default, for both types of tier"""

_HEAD = """\
# Every setting of kvtier. What is required has no default: adapt it. Everything else may be left out.
# Without the tier of type disk, blocks are kept in host memory only.
"""
_WIDTH = 120


def commented_defaults() -> str:
    """The file's text. ``Config.load`` of it gives what ``EXAMPLE`` gives."""
    return _HEAD + "\n".join(_section(Config.from_mapping(EXAMPLE), "")) + "\n"


def _section(section: Section, indent: str) -> Iterator[str]:
    plain = plain_of(section)
    for name, field in type(section).model_fields.items():
        if name == "type":
            continue  # stands beside the dash of its tier
        key, value = field.alias or name, getattr(section, name)
        kind, allowed = text_of(field, "kind"), text_of(field, "allowed")
        yield ""
        yield from _comment(field.description or "", indent)
        if isinstance(value, Section):
            yield f"{indent}{key}:"
            yield from _section(value, indent + "  ")
            continue
        yield from _comment(f"{'Required' if field.is_required() else kind.capitalize()}: {allowed}.", indent)
        if isinstance(value, tuple):
            yield f"{indent}{key}:"
            for tier in value:
                yield ""
                yield from _comment(type(tier).__doc__ or "", indent + "  ")
                yield f"{indent}  - type: {tier.type}"
                yield from _section(tier, indent + "    ")
        else:
            yield indent + yaml.dump({key: plain[key]}, Dumper=Dumper, width=1 << 20).rstrip("\n")


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text.replace("`", ""), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_long_words=False
    )
