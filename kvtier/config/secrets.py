"""Secrets in settings: they are named, by environment variable or file, and never held."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationInfo

from kvtier.config.fields import setting
from kvtier.errors import ConfigError

VARIABLE = "null, or the name of an environment variable"
FILE = "null, or the path of a file; `~`, `$NAME` and `${NAME}` are expanded"


def key_variable() -> Any:
    """The setting ``encryption_key_env`` of a tier."""
    return setting(
        None,
        kind="name",
        allowed=VARIABLE,
        about="The variable that holds a key (32 bytes as 64 hexadecimal digits or in Base64) to encrypt blocks with, by AES-256-GCM. "
        "null: blocks are stored as they are.",
    )


def key_file() -> Any:
    """The setting ``encryption_key_file`` of a tier."""
    return setting(None, kind="path", allowed=FILE, about="The file that holds the key, instead.")


def one_key(encryption_key_file: object, info: ValidationInfo) -> object:
    """For a validator of ``encryption_key_file``: refuses two keys."""
    return only_one(encryption_key_file, info.data.get("encryption_key_env"), "encryption_key_env")


def only_one(file: object, variable: object, name: str) -> object:
    """The file of a secret. Raises ValueError where a variable is named too."""
    if file is not None and variable is not None:
        raise ValueError(f"{name} is given too; keep one")
    return file


def read_secret(tier: str, name: str, variable: str | None, file: os.PathLike[str] | None) -> str | None:
    """The secret, read now. Raises ConfigError where the variable or file is not there."""
    if variable is not None:
        if variable not in os.environ:
            raise ConfigError(f"tier {tier}: {name}_env: the environment variable {variable} is not set")
        return os.environ[variable]
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as content:
            return content.read().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tier {tier}: {name}_file: {os.fspath(file)}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
