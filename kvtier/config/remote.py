"""The settings of tiers in remote stores. Secrets are named here, by environment variable or file, and never held."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ValidationInfo, field_validator

from kvtier.config.fields import (
    OPTIONAL_DURATIONS,
    REQUIRED,
    SIZES,
    Duration,
    ExpandedPath,
    OptionalDuration,
    OptionalSize,
    Section,
    Size,
    WriteMode,
    max_in_flight,
    setting,
    write_mode,
)
from kvtier.config.secrets import FILE, VARIABLE, key_file, key_variable, one_key, only_one, read_secret

_MAX_PORT = 65535
_PLACE = r"(?:\[[0-9A-Fa-f:.]+\]|[^][\s/@?#,:]+)(?::[0-9]{1,5})?"
_PORT = re.compile(r":([0-9]+)(?=[,/]|$)")
_REDIS_URL = re.compile(rf"rediss?://{_PLACE}(?:,{_PLACE})*(?:/[0-9]*)?|unix://[^@?#]+(?:\?db=[0-9]+)?")
_ENDPOINT = re.compile(rf"https?://{_PLACE}(?:/[^\s@?#]*)?")
_TIMEOUT = "more than 0: `2s`, `500ms`, or seconds"


class RemoteTierConfig(Section):
    """What all tiers in remote stores have in common."""

    type: str
    url: str
    prefix: str = setting(
        "kvtier/",
        kind="text",
        allowed="names that end with `/` each, other than `.` and `..`",
        about="What the names of all values begin with.",
    )
    write: WriteMode = write_mode()
    required: bool = setting(
        True,
        kind="boolean",
        allowed="`true`, `false`",
        about="Refuse to start where the store does not answer. false: start without it; it comes in when it answers.",
    )
    connect_timeout_s: Duration = setting(1.0, key="connect_timeout", kind="duration", allowed=_TIMEOUT, about="For one connection.", gt=0)
    total_timeout_s: Duration = setting(
        5.0, key="total_timeout", kind="duration", allowed=_TIMEOUT, about="For one call, with all its attempts.", gt=0
    )
    retries: int = setting(
        1, kind="integer", allowed="a whole number from 0 to 10", about="Further attempts of a failed call.", ge=0, le=10
    )
    threads: int = setting(4, kind="integer", allowed="a whole number from 1 to 64", about="Calls under way at once.", ge=1, le=64)
    max_in_flight_bytes: Size = max_in_flight("Bytes on their way to the store at once; more is not stored.")
    encryption_key_env: str | None = key_variable()
    encryption_key_file: ExpandedPath | None = key_file()

    _one_key = field_validator("encryption_key_file")(one_key)

    @field_validator("prefix")
    @classmethod
    def _prefix_is_a_folder(cls, prefix: str) -> str:
        folders = prefix.split("/")
        if folders.pop() or not all(folders) or {".", ".."} & set(folders) or not prefix.isprintable():
            raise ValueError("not the beginning of names")
        return prefix

    def encryption_key(self) -> str | None:
        """Read now. Raises ConfigError where the variable or file is not there."""
        return read_secret(self.type, "encryption_key", self.encryption_key_env, self.encryption_key_file)

    @property
    def server_ttl_s(self) -> float | None:
        """After which the store drops a block by itself; None where it decides."""
        return None


class RedisTierConfig(RemoteTierConfig):
    """A Redis or Valkey server or cluster. At most one, after the tiers on this machine."""

    type: Literal["redis"] = setting("redis", kind="name", allowed="`redis`", about="Makes this tier a Redis or Valkey server.")
    url: str = setting(
        REQUIRED,
        kind="text",
        allowed="`redis://HOST:PORT/DB`, `rediss://HOST:PORT/DB` (TLS) or `unix:///PATH?db=DB`, without user and password",
        about="The server; with `cluster` any node of it, with `sentinel` the sentinels: `redis://HOST:PORT,HOST:PORT/DB`.",
    )
    username: str | None = setting(None, kind="text", allowed="null, or a name", about="The user (ACL). null: the server's default user.")
    password_env: str | None = setting(None, kind="name", allowed=VARIABLE, about="The variable that holds the password.")
    password_file: ExpandedPath | None = setting(None, kind="path", allowed=FILE, about="The file that holds the password, instead.")
    ca_file: ExpandedPath | None = setting(
        None, kind="path", allowed=FILE, about="Certificates that vouch for the server. null: the system's."
    )
    cluster: bool = setting(False, kind="boolean", allowed="`true`, `false`", about="Whether `url` names a node of a cluster.")
    sentinel: str | None = setting(
        None,
        kind="name",
        allowed="null, or a name; null with `cluster`",
        about="What sentinels call the primary. null: no sentinels.",
    )
    ttl_s: OptionalDuration = setting(
        None,
        key="ttl",
        kind="duration",
        allowed=OPTIONAL_DURATIONS,
        about="The server drops a block this long after it was stored. null: as its own eviction decides.",
        gt=0,
    )
    stall_timeout_s: Duration = setting(
        1.0, key="stall_timeout", kind="duration", allowed=_TIMEOUT, about="Longest time without a byte.", gt=0
    )
    hedge_after_s: OptionalDuration = setting(
        None,
        key="hedge_after",
        kind="duration",
        allowed="null, or more than 0: `20ms`, or seconds",
        about="A read that has not begun to come after this time is asked for on a second connection too. null: never.",
        gt=0,
    )

    @field_validator("url")
    @classmethod
    def _is_a_server(cls, url: str) -> str:
        if not _REDIS_URL.fullmatch(url) or (not url.startswith("unix:") and any(int(port) > _MAX_PORT for port in _PORT.findall(url))):
            raise ValueError("not the address of a server alone")
        return url

    @field_validator("sentinel")
    @classmethod
    def _sentinels_are_named(cls, sentinel: str | None, info: ValidationInfo) -> str | None:
        # absent where url itself is wrong
        places = info.data.get("url", "redis://host:1").partition("://")[2].partition("/")[0].split(",")
        if sentinel is not None and info.data.get("cluster"):
            raise ValueError("cluster is true; keep one")
        if sentinel is not None and not all(place.rpartition(":")[0] and place.rpartition(":")[2].isdecimal() for place in places):
            raise ValueError("url names no sentinels with their ports")
        return sentinel

    @field_validator("password_file")
    @classmethod
    def _one_password(cls, password_file: object, info: ValidationInfo) -> object:
        return only_one(password_file, info.data.get("password_env"), "password_env")

    @property
    def server_ttl_s(self) -> float | None:
        """As :attr:`ttl_s`."""
        return self.ttl_s

    def password(self) -> str | None:
        """Read now. Raises ConfigError where the variable or file is not there."""
        return read_secret("redis", "password", self.password_env, self.password_file)


class ObjectTierConfig(RemoteTierConfig):
    """A bucket in object storage. At most one, last."""

    type: Literal["object"] = setting("object", kind="name", allowed="`object`", about="Makes this tier a bucket in object storage.")
    url: str = setting(
        REQUIRED,
        kind="text",
        allowed="`s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH` or `file:///PATH`, without credentials",
        about="The bucket. Old objects leave it by a lifecycle rule of the bucket, for the names that begin with `prefix`.",
    )
    endpoint: str | None = setting(
        None, kind="text", allowed="null, or `http://HOST:PORT` or `https://HOST:PORT`", about="A server other than the provider's own."
    )
    region: str | None = setting(None, kind="text", allowed="null, or a name", about="The region of an S3 bucket.")
    access_key: str | None = setting(
        None, kind="text", allowed="null, or a name", about="The access key's id of S3. null: as the environment says."
    )
    secret_key_env: str | None = setting(None, kind="name", allowed=VARIABLE, about="The variable that holds the access key's secret.")
    secret_key_file: ExpandedPath | None = setting(None, kind="path", allowed=FILE, about="The file that holds it, instead.")
    threads: int = setting(16, kind="integer", allowed="a whole number from 1 to 64", about="Requests under way at once.", ge=1, le=64)
    total_timeout_s: Duration = setting(
        20.0, key="total_timeout", kind="duration", allowed=_TIMEOUT, about="For one request, with all its attempts.", gt=0
    )

    @field_validator("url")
    @classmethod
    def _is_a_bucket(cls, url: str) -> str:
        scheme, separator, rest = url.partition("://")
        if not separator or not rest or scheme not in ("s3", "gs", "az", "file") or "@" in rest or ("?" in rest and scheme != "file"):
            raise ValueError("not the address of a bucket alone")
        return url

    @field_validator("endpoint")
    @classmethod
    def _is_an_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ValueError("not the address of a server alone")
        return endpoint

    @field_validator("secret_key_file")
    @classmethod
    def _oneread_secret(cls, secret_key_file: object, info: ValidationInfo) -> object:
        return only_one(secret_key_file, info.data.get("secret_key_env"), "secret_key_env")

    def secret_key(self) -> str | None:
        """Read now. Raises ConfigError where the variable or file is not there."""
        return read_secret("object", "secret_key", self.secret_key_env, self.secret_key_file)


class MooncakeTierConfig(RemoteTierConfig):
    """A Mooncake Store. At most one, after Redis and before object storage."""

    type: Literal["mooncake"] = setting("mooncake", kind="name", allowed="`mooncake`", about="Makes this tier a Mooncake Store.")
    url: str = setting(REQUIRED, kind="text", allowed="`mooncake://HOST:PORT`", about="The master.")
    host: str = setting("127.0.0.1", kind="text", allowed="an address", about="This machine, as the others reach it.")
    metadata: str = setting(
        "P2PHANDSHAKE",
        kind="text",
        allowed="`P2PHANDSHAKE`, or the address of a metadata server without user and password",
        about="How processes find each other.",
    )
    protocol: Literal["tcp", "rdma"] = setting("tcp", kind="name", allowed="`tcp`, `rdma`", about="How blocks travel.")
    devices: str = setting("", kind="text", allowed="names, or empty: all", about="The devices of RDMA.")
    segment_bytes: OptionalSize = setting(
        None,
        key="segment",
        kind="size",
        allowed=f"null, or more than 0: {SIZES}",
        about="Memory that this engine gives to the store; what lies there is gone with the engine. null: none.",
        gt=0,
    )

    @field_validator("url")
    @classmethod
    def _is_a_master(cls, url: str) -> str:
        scheme, _, place = url.partition("://")
        host, _, port = place.rpartition(":")
        if scheme != "mooncake" or not host or not port.isdecimal() or "@" in host or "/" in host:
            raise ValueError("not the address of a master")
        return url

    @field_validator("metadata")
    @classmethod
    def _metadata_holds_no_password(cls, metadata: str) -> str:
        if "@" in metadata:
            raise ValueError("not the address of a server alone")
        return metadata

    @property
    def master(self) -> str:
        """As ``host:port``."""
        return self.url.partition("://")[2]
