"""Payloads encrypted and authenticated with AES-256-GCM (NIST SP 800-38D), by the package ``cryptography``."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from kvtier.codecs import KEY_ID_BYTES, overhead_of
from kvtier.codecs import CodecId as _CodecId

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
_HEX_DIGITS = 2 * KEY_BYTES

assert overhead_of(_CodecId.AES_GCM) == NONCE_BYTES + TAG_BYTES


def parse_key(text: str) -> bytes:
    """A key as it is written down: 64 hexadecimal digits, or 32 bytes in Base64. Raises ValueError, which does not show it."""
    text = text.strip()
    try:
        key = bytes.fromhex(text) if len(text) == _HEX_DIGITS else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"not a key: {KEY_BYTES} bytes as {_HEX_DIGITS} hexadecimal digits or in Base64 are")
    return key


class Cipher:
    """Seals payloads with one key and opens what was sealed with it. Thread-safe. ``repr`` shows the key's id alone.

    Each namespace has a key of its own, derived by HKDF (RFC 5869), and each payload a random nonce; by chance two nonces of one namespace
    agree with a probability of 2^-33 after four thousand million payloads, which is when a key should be replaced.
    """

    def __init__(self, key: bytes) -> None:
        """Raises ValueError where the key has not ``KEY_BYTES`` bytes."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes; allowed: {KEY_BYTES}")
        self._key = key
        self._of_namespace: dict[bytes, AESGCM] = {}
        self.key_id = hashlib.sha256(b"kvtier key id" + key).digest()[:KEY_ID_BYTES]
        """names the key without giving it away"""

    def __repr__(self) -> str:
        return f"Cipher({self.key_id.hex()})"

    def seal(self, payload: memoryview, namespace: bytes, context: bytes) -> bytearray:
        """Nonce, encrypted payload and tag. ``context`` must be the same when it is opened; it is not part of the result."""
        sealed = bytearray(NONCE_BYTES + len(payload) + TAG_BYTES)
        nonce = sealed[:NONCE_BYTES] = os.urandom(NONCE_BYTES)
        self._aead(namespace).encrypt_into(nonce, payload, context, memoryview(sealed)[NONCE_BYTES:])
        return sealed

    def open_into(self, sealed: memoryview, payload: memoryview, namespace: bytes, context: bytes) -> bool:
        """Writes what was sealed to ``payload``, which is undefined where the answer is False: it was not sealed so."""
        try:
            self._aead(namespace).decrypt_into(bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:], context, payload)
        except InvalidTag:
            return False
        return True

    def _aead(self, namespace: bytes) -> AESGCM:
        aead = self._of_namespace.get(namespace)
        if aead is None:
            derived = HKDFExpand(SHA256(), KEY_BYTES, b"kvtier payloads of " + namespace).derive(self._key)
            aead = self._of_namespace.setdefault(namespace, AESGCM(derived))
        return aead
