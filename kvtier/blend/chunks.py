"""What a chunk is: its own tokens, and the anchor that its KV was computed behind.

The anchor is nothing, or the system prefix that the prompts share. Attention to it is then right wherever the chunk
is put behind the same prefix; attention to other chunks is what is missing, and what the selection methods mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.hashing import chunk_root, served_root, whole_keys
from kvtier.types import BlockKey


@dataclass(frozen=True, slots=True)
class Anchor:
    """The tokens before a chunk when its KV was computed. Make it with :func:`anchor_of`; ``NO_ANCHOR`` is the empty one."""

    key: bytes = b""
    """identifies the tokens; empty: none"""
    num_tokens: int = 0


NO_ANCHOR = Anchor()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The identity of a chunk. Equal exactly where tokens, anchor and the request's root are."""

    key: BlockKey
    """of the whole chunk: the last of ``block_keys``"""
    block_keys: tuple[BlockKey, ...]
    """under which its KV is kept, the last block shorter than the others where the tokens do not fill it"""
    num_tokens: int
    anchor: Anchor


def anchor_of(root: bytes, prefix_token_ids: Sequence[int], block_tokens: int) -> Anchor:
    """The anchor that these tokens make at the beginning of a request with this root.

    Raises:
        ValueError: as :func:`kvtier.hashing.whole_keys` does.
    """
    if not prefix_token_ids:
        return NO_ANCHOR
    return Anchor(whole_keys(root, prefix_token_ids, block_tokens)[-1], len(prefix_token_ids))


def served_anchor(root: bytes, prefix_token_ids: Sequence[int], block_tokens: int) -> Anchor:
    """The anchor of chunks whose KV is copied from prompts that begin with these tokens, and go on with others before the chunk.

    No prompt begins with it, so that KV is never taken for exact.

    Raises:
        ValueError: as :func:`kvtier.hashing.whole_keys` does.
    """
    parent = served_root(root)
    return Anchor(whole_keys(parent, prefix_token_ids, block_tokens)[-1] if prefix_token_ids else parent, len(prefix_token_ids))


def chunk_of(root: bytes, anchor: Anchor, token_ids: Sequence[int], block_tokens: int) -> Chunk:
    """The chunk that these tokens make behind the anchor.

    Raises:
        ValueError: no tokens, or as :func:`kvtier.hashing.whole_keys` does.
    """
    if not token_ids:
        raise ValueError("a chunk has at least one token")
    keys = whole_keys(chunk_root(root, anchor.key), token_ids, block_tokens)
    return Chunk(keys[-1], tuple(keys), len(token_ids), anchor)
