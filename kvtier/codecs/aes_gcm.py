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

from kvtier.codecs import KEY_ID_BYTES, TAG_BYTES, overhead_of
from kvtier.codecs import CodecId as _CodecId

KEY_BYTES = 32
NONCE_BYTES = 12
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
    """Seals payloads with one key and opens what was sealed with it: a :class:`~kvtier.codecs.Sealer`. Thread-safe.

    ``repr`` shows the key's id alone.

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
        sealed = bytearray(NONCE_BYTES + len(payload) + TAG_BYTES)
        sealed[:NONCE_BYTES] = self.seal_into(payload, memoryview(sealed)[NONCE_BYTES:], namespace, context)
        return sealed

    def seal_into(self, payload: memoryview, room: memoryview, namespace: bytes, context: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        self._aead(namespace).encrypt_into(nonce, payload, context, room)
        return nonce

    def open_into(self, sealed: memoryview, payload: memoryview, namespace: bytes, context: bytes) -> bool:
        return self.open_with(bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:], payload, namespace, context)

    def open_with(self, nonce: bytes, room: memoryview, payload: memoryview, namespace: bytes, context: bytes) -> bool:
        try:
            self._aead(namespace).decrypt_into(nonce, room, context, payload)
        except InvalidTag:
            return False
        return True

    def _aead(self, namespace: bytes) -> AESGCM:
        aead = self._of_namespace.get(namespace)
        if aead is None:
            derived = HKDFExpand(SHA256(), KEY_BYTES, b"kvtier payloads of " + namespace).derive(self._key)
            aead = self._of_namespace.setdefault(namespace, AESGCM(derived))
        return aead
