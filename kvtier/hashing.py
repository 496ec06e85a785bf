"""Block keys: which bytes are the KV of which tokens, in which context, of which model.

A key is 16 bytes of SHA-256, chained::

    namespace digest  model, geometry, layout, salt       what must be equal for bytes to be interchangeable
          |
    request root      + adapter, cache salt               what separates whole requests
          |
    block key 0       + tokens and media of block 0
          |
    block key 1 ...

so a key says everything that its block's KV depends on. Two different blocks with one key would hand one user another user's
KV; hence a cryptographic hash. Every message ends with 16 bytes that say what it is: a constant for a namespace or a root, the
parent's key for a block. So no choice of tokens, salts or names makes one pass for another.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import cast

from kvtier import _native
from kvtier.types import KEY_BYTES, BlockKey

KEY_FORMAT = 2
"""grows whenever equal tokens get other keys, or a block's bytes another meaning"""

_NAMESPACE_END = b"kvtier/namespace"
_REQUEST_END = b"kvtier/request/1"
_CHUNK_END = b"kvtier/chunks/01"
_SERVED_END = b"kvtier/served/01"
_FIRST_BATCH_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything that must be equal for two engines' blocks to be interchangeable, byte for byte.

    A connector fills in every field. What differs between requests (adapters, salts) is not here: see :func:`request_root`.
    """

    model: str
    revision: str = ""
    weights: str = ""
    """what tells the weights from others under that name"""
    engine: str = ""
    kv_dtype: str = ""
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    block_tokens: int = 0
    layout: str = ""
    """how the attention backend lays out a block's bytes"""
    tensor_parallel_size: int = 1
    format_version: int = KEY_FORMAT
    salt: str = ""
    """separates tenants that must not see each other's blocks"""

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the namespace. The same in every process and on every machine.

        Raises:
            TypeError: a field is neither text nor an integer.
        """
        parts = [_encode_field(field.name, getattr(self, field.name)) for field in sorted(fields(self), key=lambda field: field.name)]
        return hashlib.sha256(b"".join(parts) + _NAMESPACE_END).digest()[:KEY_BYTES]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A run of tokens whose ids do not say what they stand for: the placeholders of an image, say.

    ``identifier`` does. The keys of the blocks that the span overlaps depend on it, and on where in the block it lies.
    """

    start: int
    num_tokens: int
    identifier: bytes

    def __post_init__(self) -> None:
        if self.start < 0 or self.num_tokens <= 0:
            raise ValueError(f"a span of {self.num_tokens} tokens at {self.start}")


def request_root(namespace_digest: bytes, extras: Sequence[bytes] = ()) -> bytes:
    """The parent of a request's first block. ``extras`` separate requests that must not share blocks: adapter, cache salt.

    Raises:
        ValueError: the digest is not 16 bytes long.
    """
    _check_key("a namespace's digest", namespace_digest)
    parts = [namespace_digest, struct.pack("<I", len(extras)), *(_encode_bytes(extra) for extra in extras), _REQUEST_END]
    return hashlib.sha256(b"".join(parts)).digest()[:KEY_BYTES]


def salt_extra(salt: str) -> bytes:
    """What a cache salt adds to the root of a request's keys."""
    return b"salt " + salt.encode()


def tenant_extra(tenant: str) -> bytes:
    """What the tenant that a request names adds to the root of its keys."""
    return b"tenant " + tenant.encode()


def chunk_root(root: bytes, anchor: bytes = b"") -> bytes:
    """The parent of the first block of a chunk, whose keys never equal those of a prefix.

    ``root`` is the request's; ``anchor`` identifies the tokens that the chunk's KV was computed behind, empty: none. See
    :func:`whole_keys` for the key of an anchor.

    Raises:
        ValueError: the root is not 16 bytes long, or the anchor neither empty nor 16 bytes.
    """
    _check_key("a root", root)
    if anchor:
        _check_key("an anchor", anchor)
    return hashlib.sha256(root + _encode_bytes(anchor) + _CHUNK_END).digest()[:KEY_BYTES]


def served_root(root: bytes) -> bytes:
    """The root of the anchors of chunks whose KV is copied from prompts that were served: whatever else stood before it there is in it.

    Raises:
        ValueError: the root is not 16 bytes long.
    """
    _check_key("a root", root)
    return hashlib.sha256(root + _SERVED_END).digest()[:KEY_BYTES]


def whole_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """One key for each block of ``token_ids``, the last one shorter where they do not fill it. The last key identifies all of them.

    Raises:
        ValueError: a root that is not 16 bytes, no tokens in a block, or a token id outside [0, 2**32).
        TypeError: a token id that is no integer.
    """
    keys = KeyChain(root, block_tokens).update(token_ids, len(token_ids))
    num_hashed = len(keys) * block_tokens
    if num_hashed < len(token_ids):
        parent = keys[-1] if keys else root
        rest = _native.chain_keys(parent, token_ids, num_hashed, 1, len(token_ids) - num_hashed, None)
        keys += cast("list[BlockKey]", rest)
    return keys


class KeyChain:
    """The keys of one request's full blocks, in order. Keeps what it has hashed, so a growing request costs only what is new.

    The token ids that were hashed once must stay as they are: a change there is not noticed, the old keys are returned.
    Any sequence of token ids will do; a list or an array of 32- or 64-bit integers is fastest. Not thread-safe.
    """

    __slots__ = ("_block_tokens", "_keys", "_root", "_spans")

    def __init__(self, root: bytes, block_tokens: int, spans: Sequence[TokenSpan] = ()) -> None:
        """``root`` comes from :func:`request_root`.

        Raises:
            ValueError: a root that is not 16 bytes, or no tokens in a block.
        """
        _check_key("a root", root)
        if block_tokens < 1:
            raise ValueError(f"blocks of {block_tokens} tokens")
        self._root = BlockKey(root)
        self._block_tokens = block_tokens
        self._spans = _sorted(spans)
        self._keys: list[BlockKey] = []

    def note_spans(self, spans: Sequence[TokenSpan]) -> None:
        """All spans from now on: those there were, and new ones. Blocks from the first new one on get other keys."""
        new = set(spans).difference(self._spans)
        if new:
            self._spans = _sorted(spans)
            del self._keys[min(span.start for span in new) // self._block_tokens :]

    def update(self, token_ids: Sequence[int], num_tokens: int) -> list[BlockKey]:
        """The keys of all full blocks of ``token_ids[:num_tokens]``, as a new list. Hashes only blocks it has not seen.

        Raises:
            ValueError: a token id outside [0, 2**32). The chain is as it was.
            TypeError: a token id that is no integer. The chain is as it was.
        """
        num_blocks = self._num_blocks(token_ids, num_tokens)
        self._grow(token_ids, num_blocks)
        return self._keys[:num_blocks]

    def iter(self, token_ids: Sequence[int], num_tokens: int) -> Iterator[BlockKey]:
        """Like :meth:`update`, key by key: whoever stops early has hashed at most 8 blocks, or twice what was asked for.

        Raises what ``update`` raises, when it comes to that.
        """
        num_blocks = self._num_blocks(token_ids, num_tokens)
        position = 0
        batch_end = max(len(self._keys), _FIRST_BATCH_BLOCKS)
        while position < num_blocks:
            end = min(batch_end, num_blocks)
            self._grow(token_ids, end)
            yield from self._keys[position:end]
            position = end
            batch_end = 2 * end

    def _num_blocks(self, token_ids: Sequence[int], num_tokens: int) -> int:
        return max(0, min(num_tokens, len(token_ids))) // self._block_tokens

    def _grow(self, token_ids: Sequence[int], num_blocks: int) -> None:
        first = len(self._keys)
        if num_blocks <= first:
            return
        parent = self._keys[-1] if self._keys else self._root
        extras = self._extras(first, num_blocks) if self._spans else None
        keys = _native.chain_keys(parent, token_ids, first * self._block_tokens, num_blocks - first, self._block_tokens, extras)
        new_keys = cast("list[BlockKey]", keys)
        if first:
            self._keys += new_keys
        else:
            self._keys = new_keys

    def _extras(self, first_block: int, end_block: int) -> list[bytes] | None:
        """For each block, the spans that overlap it and where they lie. ``None``: nowhere any."""
        extras: list[bytes] | None = None
        for span in self._spans:
            first = max(first_block, span.start // self._block_tokens)
            end = min(end_block, -(-(span.start + span.num_tokens) // self._block_tokens))
            for block in range(first, end):
                if extras is None:
                    extras = [b""] * (end_block - first_block)
                offset = span.start - block * self._block_tokens  # negative where the span began in an earlier block
                extras[block - first_block] += struct.pack("<qq", offset, span.num_tokens) + _encode_bytes(span.identifier)
        return extras


def _sorted(spans: Sequence[TokenSpan]) -> list[TokenSpan]:
    return sorted(spans, key=lambda span: (span.start, span.num_tokens, span.identifier))


def _encode_bytes(value: bytes) -> bytes:
    """``value`` after its length, so that no two sequences of values encode alike."""
    return struct.pack("<I", len(value)) + value


def _encode_field(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return _encode_bytes(name.encode()) + b"s" + _encode_bytes(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, int):
        return _encode_bytes(name.encode()) + b"i" + _encode_bytes(str(int(value)).encode())
    raise TypeError(f"{name} of a namespace is {value!r}, neither text nor an integer")


def _check_key(what: str, key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"{what} has {KEY_BYTES} bytes, not {len(key)}")
