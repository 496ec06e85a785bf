"""Opens the tiers in remote stores that a configuration names. Their clients are extras, imported when asked for."""

from __future__ import annotations

from typing import Any

from kvtier.config import ObjectTierConfig, RedisTierConfig
from kvtier.errors import ConfigError
from kvtier.tiers.remote import RemoteClient, RemoteSettings, RemoteTier
from kvtier.tiers.remote.records import Sealer


def open_remote(section: RedisTierConfig | ObjectTierConfig) -> RemoteTier:
    """The tier that a section of the configuration describes.

    Raises:
        ConfigError: a secret cannot be read or is none, or an extra is not installed.
        RemoteError: the store does not answer or refuses, and the tier is required.
        TierFormatError: the store is of another format version.
    """
    options: dict[str, Any] = {} if isinstance(section, RedisTierConfig) else {"batch_bytes": 1}  # one request for each object
    settings = RemoteSettings(
        prefix=section.prefix,
        threads=section.threads,
        max_in_flight_bytes=section.max_in_flight_bytes,
        total_timeout_s=section.total_timeout_s,
        retries=section.retries,
        must_answer=section.required,
        **options,
    )
    sealer = _sealer(section)
    client = _redis(section) if isinstance(section, RedisTierConfig) else _object(section)
    return RemoteTier(client, name=section.type, settings=settings, sealer=sealer)


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
    return RedisClient(access, ttl_s=section.ttl_s, hedge_after_s=section.hedge_after_s)


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


def _sealer(section: RedisTierConfig | ObjectTierConfig) -> Sealer | None:
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
    return ConfigError(f"this configuration needs the extra kvtier[{extra}], which is not installed ({error})")
