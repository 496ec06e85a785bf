"""How much two token sequences have in common, from 0 to 1: F1 for answers, Rouge-L for longer texts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def f1(right: Sequence[int], written: Sequence[int]) -> float:
    """The harmonic mean of precision and recall over tokens, whatever their order (as for SQuAD: Rajpurkar and others, 2016)."""
    return _harmonic((Counter(right) & Counter(written)).total(), right, written)


def rouge_l(right: Sequence[int], written: Sequence[int]) -> float:
    """The same over the longest common subsequence (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004)."""
    lengths = [0] * (len(written) + 1)
    for token in right:
        diagonal = 0
        for place, other in enumerate(written, start=1):
            diagonal, lengths[place] = lengths[place], diagonal + 1 if token == other else max(lengths[place], lengths[place - 1])
    return _harmonic(lengths[-1], right, written)


def _harmonic(common: int, right: Sequence[int], written: Sequence[int]) -> float:
    return 2 * common / (len(right) + len(written)) if common else 0.0
