"""Which chunks requests have named, so that they are found again in prompts whose requests name none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvtier.blend.finding import ChunkFinder, ChunkSpace
from kvtier.blend.layout import Placement

MAX_ANCHORS = 16
"""behind which chunks are remembered; each costs a look at every prompt that begins with it"""
MAX_CHUNKS = 1024
"""behind each of them"""


@dataclass(slots=True)
class _Known:
    """What is known behind one anchor."""

    prefix_ids: tuple[int, ...]
    """the anchor's tokens as far as prompts have them"""
    finder: ChunkFinder
    keys: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


class KnownChunks:
    """Chunks by what they lie behind. Those named longest ago are forgotten first. Not thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[bytes, bytes, tuple[int, ...]], _Known] = OrderedDict()

    def learn(self, space: ChunkSpace, prefix_ids: tuple[int, ...], prompt: Sequence[int], placements: Iterable[Placement]) -> None:
        """Finds from now on what lies at these places of the prompt; chunks of a few tokens are left out."""
        key = (space.root, space.anchor.key, prefix_ids)
        known = self._known.pop(key, None) or _Known(prefix_ids, ChunkFinder(space))
        self._known[key] = known
        for at in placements:
            if at.chunk.key in known.keys or known.finder.add(prompt[at.start : at.end]) is not None:
                known.keys[at.chunk.key] = None
                known.keys.move_to_end(at.chunk.key)
        while len(known.keys) > MAX_CHUNKS:
            known.finder.discard(known.keys.popitem(last=False)[0])
        while len(self._known) > MAX_ANCHORS:
            self._known.popitem(last=False)

    def find(self, root: bytes, prompt: Sequence[int]) -> tuple[int, list[Placement]]:
        """How many tokens the prompt shares with an anchor, and the chunks behind it: those that cover most of the prompt."""
        best: tuple[int, list[Placement]] = (0, [])
        most = 0
        for (known_root, _, prefix_ids), known in self._known.items():
            first = len(prefix_ids)
            if known_root != root or tuple(prompt[:first]) != prefix_ids:
                continue
            found = [at for at in known.finder.find(prompt) if at.start >= first]
            covered = sum(at.num_tokens for at in found)
            if covered > most:
                best, most = (first, found), covered
        return best
