"""Which NUMA node memory comes from. Linux only; without libnuma."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

from kvtier.errors import ArenaError

_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_NODES_PATH = "/sys/devices/system/node/has_memory"
_MASK_WORDS = 16
_libc = ctypes.CDLL(None, use_errno=True)


def parse_nodes(text: str) -> list[int]:
    """The numbers of a kernel list such as ``0-2,5``."""
    nodes: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        nodes.extend(range(int(first), int(last or first) + 1))
    return nodes


def memory_nodes() -> list[int]:
    """The NUMA nodes that have memory; node 0 where the kernel knows nothing of NUMA."""
    try:
        with open(_NODES_PATH, encoding="ascii") as file:
            return parse_nodes(file.read())
    except FileNotFoundError:
        return [0]


def check_node(node: int) -> None:
    """Raises ArenaError, naming the nodes there are, where ``node`` has no memory."""
    nodes = memory_nodes()
    if node not in nodes:
        raise ArenaError(f"numa_node is {node}, but this machine's nodes with memory are {', '.join(map(str, nodes))}")


def prefer_node(address: int, num_bytes: int, node: int) -> None:
    """Lets pages of a mapping come from ``node`` from now on. Has no effect on pages that are there already.

    When the node has none left, the kernel takes another one instead of killing the process.  On a shared mapping of
    a tmpfs file the rule holds for all processes.  Raises ArenaError where the node does not exist or the kernel refuses.
    """
    check_node(node)
    number = _MBIND.get(platform.machine())
    if number is None:
        raise ArenaError(f"numa_node is not supported on {platform.machine()}; leave it unset")
    mask = (ctypes.c_ulong * _MASK_WORDS)()
    mask[node // 64] = 1 << (node % 64)
    # the kernel reads one bit less than it is told
    max_node = _MASK_WORDS * 64 + 1
    args = (ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MPOL_PREFERRED, mask, ctypes.c_ulong(max_node), 0)
    if _libc.syscall(ctypes.c_long(number), *args):
        code = ctypes.get_errno()
        if code == errno.ENOSYS and memory_nodes() == [node]:
            return
        raise ArenaError(f"mbind to numa_node {node} failed: {os.strerror(code)}; leave numa_node unset or grant CAP_SYS_NICE")
