# The compiled core. kvtier/_fallback.py is its specification; use both through kvtier/_native.py.

from collections.abc import Sequence

from typing_extensions import Buffer

ABI_VERSION: int
SOURCE_DIGEST: str
SHA256: str
READS_LISTS_DIRECTLY: int

def chain_keys(
    parent: Buffer,
    token_ids: Sequence[int] | Buffer,
    first_token: int,
    num_blocks: int,
    block_tokens: int,
    extras: Sequence[Buffer] | None,
    /,
) -> list[bytes]: ...
def chain_keys_portably(
    parent: Buffer,
    token_ids: Sequence[int] | Buffer,
    first_token: int,
    num_blocks: int,
    block_tokens: int,
    extras: Sequence[Buffer] | None,
    /,
) -> list[bytes]: ...
def copy_blocks(
    paged: Buffer, arena_address: int, arena_bytes: int, block_ids: Buffer, arena_offsets: Buffer, to_arena: bool, num_threads: int = 1, /
) -> int: ...
def receive(fd: int, buffers: Sequence[Buffer], hashed: int, stall_us: int, total_us: int, /) -> bytes | None: ...
def receive_portably(fd: int, buffers: Sequence[Buffer], hashed: int, stall_us: int, total_us: int, /) -> bytes | None: ...
def ring_open(num_entries: int, /) -> object: ...
def ring_register(ring: object, slot: int, address: int, num_bytes: int, /) -> None: ...
def ring_submit(ring: object, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[Buffer], slot: int, /) -> None: ...
def ring_wake(ring: object, /) -> None: ...
def ring_wait(ring: object, timeout_us: int, /) -> list[tuple[int, int]]: ...
def ring_close(ring: object, /) -> None: ...
