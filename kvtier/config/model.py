"""The settings as frozen models. Attribute names carry units (``capacity_bytes``); the YAML keys are shorter (``capacity``)."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from kvtier.config.fields import (
    AUTO_IS_NONE,
    LIST_AS_TUPLE,
    REQUIRED,
    Section,
    setting,
    write_path,
)
from kvtier.config.problems import TIER_ORDER, Problem, explain, render
from kvtier.config.remote import MooncakeTierConfig, ObjectTierConfig, RedisTierConfig
from kvtier.config.sections import BlendConfig, ConnectorConfig, ControlConfig, DaemonConfig, RecordConfig
from kvtier.config.source import Dumper, Source, read_source
from kvtier.config.tiers import DiskTierConfig, GpuTierConfig, HostTierConfig
from kvtier.errors import ConfigError
from kvtier.units import format_duration, format_size

_TIERS = "a list: at most one tier of type gpu, then one of type host, then at most one each of type disk, redis, mooncake, object"
_TIER_ORDER = ("gpu", "host", "disk", "redis", "mooncake", "object")

LowerTierConfig = DiskTierConfig | RedisTierConfig | MooncakeTierConfig | ObjectTierConfig
TierConfig = Annotated[GpuTierConfig | HostTierConfig | LowerTierConfig, Field(discriminator="type")]


class Config(Section):
    """All settings. Frozen, comparable, and complete: what the file leaves out has its default."""

    block_tokens: Annotated[int | None, AUTO_IS_NONE] = setting(
        None,
        kind="integer",
        allowed="`auto`, or a whole number of at least 1",
        about="Tokens of one kvtier block: a multiple of the engine's block size. `auto`: the engine's.",
        ge=1,
    )
    namespace_salt: str = setting(
        "", kind="text", allowed="any text", about="Only engines with the same salt share blocks. No secret: it is shown."
    )
    tiers: Annotated[tuple[TierConfig, ...], LIST_AS_TUPLE] = setting(REQUIRED, kind="list", allowed=_TIERS, about="Fastest first.")
    connector: ConnectorConfig = setting(ConnectorConfig(), kind="mapping", allowed="a mapping", about="How requests use the tiers.")
    blend: BlendConfig = setting(BlendConfig(), kind="mapping", allowed="a mapping", about="Whether chunks are reused at any position.")
    control: ControlConfig = setting(ControlConfig(), kind="mapping", allowed="a mapping", about="What users and hints may claim.")
    record: RecordConfig = setting(RecordConfig(), kind="mapping", allowed="a mapping", about="Whether and where to record the workload.")
    daemon: DaemonConfig = setting(DaemonConfig(), kind="mapping", allowed="a mapping", about="Whether engines share one daemon's tiers.")
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        kind="name",
        allowed="`debug`, `info`, `warning`, `error`",
        about="The least severe of kvtier's own messages that the process may log.",
    )

    @field_validator("tiers")
    @classmethod
    def _in_order(cls, tiers: tuple[TierConfig, ...]) -> tuple[TierConfig, ...]:
        problems = _order_problems([tier.type for tier in tiers])
        if problems:
            raise PydanticCustomError(TIER_ORDER, "{reason}", {"reason": "; ".join(reason for _, reason in problems)})
        return tiers

    @property
    def gpu(self) -> GpuTierConfig | None:
        """The tier in device memory, if there is one."""
        return next((tier for tier in self.tiers if isinstance(tier, GpuTierConfig)), None)

    @property
    def host(self) -> HostTierConfig:
        """The host tier."""
        return next(tier for tier in self.tiers if isinstance(tier, HostTierConfig))

    @property
    def disk(self) -> DiskTierConfig | None:
        """The disk tier, if there is one."""
        return next((tier for tier in self.tiers if isinstance(tier, DiskTierConfig)), None)

    @property
    def lower(self) -> tuple[LowerTierConfig, ...]:
        """The tiers below host memory, fastest first."""
        return tuple(tier for tier in self.tiers if isinstance(tier, LowerTierConfig))

    def policy_of(self, tier: GpuTierConfig | HostTierConfig | DiskTierConfig) -> str:
        """The name of a tier's eviction policy: its own, or what ``auto`` stands for here."""
        if tier.policy != "auto":
            return tier.policy
        return "default" if isinstance(tier, HostTierConfig) and not self.lower else "lru"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a YAML file.

        Raises:
            ConfigError: the file cannot be read, is no YAML, or holds wrong settings: all are named at once, with their lines.
        """
        return cls._checked(read_source(Path(path)))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Takes the settings themselves, shaped as in the file, or ``{"config": path}`` to read a file.

        Raises:
            ConfigError: as :meth:`load`, or ``config`` stands beside other settings.
        """
        if "config" not in mapping:
            return cls._checked(Source("settings", dict(mapping)))
        path = mapping["config"]
        others = sorted(str(key) for key in mapping if key != "config")
        if others:
            raise ConfigError(f"settings: config names a file, so {', '.join(others)} must be set in that file, not beside it")
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigError(f"settings: config is {path!r}; allowed: the path of a YAML file")
        return cls.load(path)

    @classmethod
    def _checked(cls, source: Source) -> Self:
        tiers = source.data.get("tiers") if isinstance(source.data, dict) else None
        problems = [*source.problems]
        if isinstance(tiers, (list, tuple)):
            # asked here too, because pydantic asks only once each tier is right
            kinds = [tier.get("type") if isinstance(tier, Mapping) else None for tier in tiers]
            problems += [Problem(("tiers", *at), reason) for at, reason in _order_problems(kinds)]
        config: Self | None = None
        try:
            config = cls.model_validate(source.data)
        except ValidationError as error:
            problems += explain(error, cls, source.data)
        problems += [] if config is None else _policy_problems(config)
        if config is None or problems:
            # without the cause: pydantic's own account says the same again, in its terms
            raise ConfigError(render(problems, source)) from None
        return config

    def effective(self) -> str:
        """All settings as YAML, defaults included. ``Config.load`` of a file with this text gives an equal object."""
        return yaml.dump(plain_of(self), Dumper=Dumper, sort_keys=False, allow_unicode=False, width=1 << 20)


def _order_problems(kinds: Sequence[object]) -> list[tuple[tuple[int, ...], str]]:
    """What is wrong with the order and number of tiers: (index, reason), unknown types (reported elsewhere) aside."""
    problems: list[tuple[tuple[int, ...], str]] = []
    if "host" not in kinds and all(kind in _TIER_ORDER for kind in kinds):
        problems.append(((), f"there is no tier of type host; allowed: {_TIERS}"))
    for rank, kind in enumerate(_TIER_ORDER):
        places = [index for index, each in enumerate(kinds) if each == kind]
        problems += [((index,), f"a second tier of type {kind}, after tiers[{places[0]}]; allowed: {_TIERS}") for index in places[1:]]
        slower = [index for index, each in enumerate(kinds) if each in _TIER_ORDER[rank + 1 :]]
        if places and slower and slower[0] < places[0]:
            problems.append(((places[0],), f"the tier of type {kind} must stand before tiers[{slower[0]}]; allowed: {_TIERS}"))
    return problems


def _policy_problems(config: Config) -> list[Problem]:
    """What is asked of policies that have not learned it."""
    problems: list[Problem] = []
    judges = {"default", "hazard"}
    for index, tier in enumerate(config.tiers):
        if not isinstance(tier, (GpuTierConfig, HostTierConfig, DiskTierConfig)):
            continue
        place, policy = ("tiers", index), config.policy_of(tier)
        if tier.ttl_mode == "auto" and policy not in judges:
            reason = f'"auto" is wrong (the policy is {policy}); allowed: sliding, fixed, or the policies hazard, default'
            problems.append(Problem((*place, "ttl_mode"), reason))
        if isinstance(tier, DiskTierConfig) and tier.admit == "index" and not {policy, config.policy_of(config.host)} <= judges:
            policies = f"the policies are {config.policy_of(config.host)} in host memory and {policy} here"
            problems.append(
                Problem((*place, "admit"), f'"index" is wrong ({policies}); allowed: all, second_use, or hazard, default in both')
            )
    return problems


def plain_of(section: Section) -> dict[str, Any]:
    """A section under its YAML keys, as values that YAML has."""
    plain: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        plain[field.alias or name] = _plain_value(name, getattr(section, name))
    return plain


def _plain_value(name: str, value: Any) -> Any:
    match value:
        case Section():
            return plain_of(value)
        case tuple():
            return [plain_of(tier) for tier in value]
        case Path() | enum.Enum():
            return write_path(value) if isinstance(value, Path) else value.value
        case Mapping():
            return {key: format_size(num_bytes) for key, num_bytes in value.items()}
        case None if name == "block_tokens":
            return "auto"
        case int() if name.endswith("_bytes"):
            return format_size(value)
        case float() if name.endswith("_s"):
            return format_duration(value)
    return value
