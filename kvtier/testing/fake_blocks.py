"""The block pool of the fake engine: reference counts and, where wanted, a prefix cache of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out block ids. Block 0 is never given (engines keep it as a null block).

    A freed block keeps its content's name until it is handed out anew, and can be found by it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._name_to_block: dict[int, int] = {}
        self._block_to_name: dict[int, int] = {}
        self.handed_out: list[int] = []
        """blocks with a new owner since the list was last emptied"""

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """New blocks for one owner. The caller has looked at ``num_free``."""
        blocks = []
        for _ in range(num_blocks):
            block, _nothing = self._free.popitem(last=False)
            self.forget_name(block)
            self._references[block] = 1
            blocks.append(block)
        self.handed_out += blocks
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of blocks that were found by name."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One user less; the last block of a request is given out first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was freed twice"
            if not self._references[block]:
                self._free[block] = None

    def find(self, names: Sequence[int]) -> list[int]:
        """The blocks of the leading names that are known."""
        found = []
        for name in names:
            block = self._name_to_block.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody uses: sharing them takes them out of the free ones."""
        return sum(1 for block in blocks if not self._references[block])

    def name(self, block: int, name: int) -> None:
        """From now on the block can be found. A name that is taken stays where it is."""
        if name not in self._name_to_block and block not in self._block_to_name:
            self._name_to_block[name] = block
            self._block_to_name[block] = name

    def forget_name(self, block: int) -> None:
        """The block cannot be found any more."""
        name = self._block_to_name.pop(block, None)
        if name is not None:
            del self._name_to_block[name]

    def forget_names(self) -> None:
        """Forgets the whole prefix cache."""
        self._name_to_block.clear()
        self._block_to_name.clear()
