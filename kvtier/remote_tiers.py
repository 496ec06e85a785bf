"""Opens the tiers in remote stores that a configuration names. Their clients are extras, imported when asked for."""

from __future__ import annotations

from typing import Any

from kvtier.codecs import Sealer
from kvtier.config import DiskTierConfig, MooncakeTierConfig, ObjectTierConfig, RedisTierConfig
from kvtier.errors import ConfigError
from kvtier.tiers.remote import RemoteClient, RemoteSettings, RemoteTier

AnyRemoteConfig = RedisTierConfig | MooncakeTierConfig | ObjectTierConfig


def open_remote(section: AnyRemoteConfig, memory: tuple[int, int] | None = None) -> RemoteTier:
    """The tier that a section of the configuration describes. ``memory``: address and length of what its blocks lie in mostly.

    Raises:
        ConfigError: a secret cannot be read or is none, or an extra is not installed.
        RemoteError: the store does not answer or refuses, and the tier is required.
        TierFormatError: the store is of another format version.
    """
    options: dict[str, Any] = {"batch_bytes": 1} if isinstance(section, ObjectTierConfig) else {}  # one request for each object
    settings = RemoteSettings(
        prefix=section.prefix,
        threads=section.threads,
        max_in_flight_bytes=section.max_in_flight_bytes,
        total_timeout_s=section.total_timeout_s,
        retries=section.retries,
        must_answer=section.required,
        **options,
    )
    sealer = open_sealer(section)
    client = _client(section, memory)
    return RemoteTier(client, name=section.type, settings=settings, sealer=sealer)


def _client(section: AnyRemoteConfig, memory: tuple[int, int] | None) -> RemoteClient:
    if isinstance(section, RedisTierConfig):
        return _redis(section)
    return _object(section) if isinstance(section, ObjectTierConfig) else _mooncake(section, memory)


def _mooncake(section: MooncakeTierConfig, memory: tuple[int, int] | None) -> RemoteClient:
    try:
        from kvtier.tiers.mooncake import MooncakeAccess, MooncakeClient  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise _not_installed("mooncake", error) from error
    access = MooncakeAccess(
        master=section.master,
        local_host=section.host,
        metadata=section.metadata,
        protocol=section.protocol,
        devices=section.devices,
        segment_bytes=section.segment_bytes or 0,
        connect_timeout_s=section.connect_timeout_s,
    )
    return MooncakeClient(access, memory=memory)


def _redis(section: RedisTierConfig) -> RemoteClient:
    try:
        from kvtier.tiers.redis import RedisAccess, RedisClient  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise _not_installed("redis", error) from error
    access = RedisAccess(
        url=section.url,
        username=section.username,
        password=section.password(),
        ca_file=None if section.ca_file is None else str(section.ca_file),
        cluster=section.cluster,
        sentinel=section.sentinel,
        connect_timeout_s=section.connect_timeout_s,
        stall_timeout_s=section.stall_timeout_s,
    )
    try:
        return RedisClient(access, ttl_s=section.ttl_s, hedge_after_s=section.hedge_after_s)
    except ValueError as error:
        raise ConfigError(f"tier redis: url: {section.url!r} is wrong ({error})") from None


def _object(section: ObjectTierConfig) -> RemoteClient:
    try:
        from kvtier.tiers.object import ObjectAccess, ObjectClient  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise _not_installed("object", error) from error
    access = ObjectAccess(
        url=section.url,
        endpoint=section.endpoint,
        region=section.region,
        access_key=section.access_key,
        secret_key=section.secret_key(),
        connect_timeout_s=section.connect_timeout_s,
        request_timeout_s=section.total_timeout_s,
    )
    return ObjectClient(access)


def open_sealer(section: AnyRemoteConfig | DiskTierConfig) -> Sealer | None:
    """What encrypts the blocks of a tier; None where it has no key.

    Raises ConfigError: the key cannot be read or is none, or the extra is not installed.
    """
    text = section.encryption_key()
    if text is None:
        return None
    try:
        from kvtier.codecs.aes_gcm import Cipher, parse_key  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise _not_installed("encryption", error) from error
    try:
        return Cipher(parse_key(text))
    except ValueError as error:
        source = section.encryption_key_env or section.encryption_key_file
        raise ConfigError(f"tier {section.type}: the encryption key of {source} is {error}") from None


def _not_installed(extra: str, error: ImportError) -> ConfigError:
    text = f"this configuration needs the extra kvtier[{extra}], which"
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(f"{text} is not installed ({error})")
    return ConfigError(f"{text} is installed but does not load: {error} (a library of the system may be missing)")
