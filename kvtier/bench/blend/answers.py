"""Answers to one question behind several versions of its prompt, computed together: full prefill's KV, and that of each method.

A version's KV has room behind its tokens, which the question and the answer are written into, and the next question's over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtier.blend.blender import margin
from kvtier.blend.entries import empty_kv
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.prefill import CausalGroups, attend


@dataclass(frozen=True)
class Gold:
    """The right answer, token by token."""

    tokens: list[int]
    is_scored: list[bool]
    """False: the token is given, nobody has to find it"""

    @property
    def scored(self) -> list[int]:
        """What is to be found."""
        return [token for token, is_scored in zip(self.tokens, self.is_scored, strict=True) if is_scored]


@dataclass(frozen=True)
class Answer:
    """What a model says where the right answer's tokens were to be found, each behind the right ones before it."""

    logits: torch.Tensor
    """``[scored tokens, vocabulary]``, as log probabilities"""
    tokens: torch.Tensor
    """the right ones"""


@dataclass
class Begun:
    """A prompt that is being answered. ``kv`` belongs to it until the answer is there."""

    kv: TokenKV
    """with room for what is still to come"""
    num_tokens: int
    """so many of them are computed"""
    rest: Sequence[int] = ()
    """of the prompt, not computed yet"""
    last: torch.Tensor | None = None
    """the logits behind the prompt, where all of it is computed"""


def with_room(model: BlendModel, kv: TokenKV, num_tokens: int) -> TokenKV:
    """A copy with room for so many more tokens."""
    longer = empty_kv(model, kv.num_tokens + num_tokens, kv.keys[0])
    longer.keys[:, :, : kv.num_tokens] = kv.keys
    longer.values[:, :, : kv.num_tokens] = kv.values
    return longer


@torch.no_grad()
def extend_all(
    model: BlendModel, begun: Sequence[Begun], token_ids: Sequence[Sequence[int]], num_wanted: Sequence[int]
) -> list[torch.Tensor]:
    """Computes more tokens behind each prompt, at least one. The logits behind the last ``num_wanted`` of each.

    The prompts share the work of everything but attention, which is what makes one token behind each of them affordable.
    """
    positions = [
        torch.arange(at.num_tokens, at.num_tokens + len(ids), device=model.device) for at, ids in zip(begun, token_ids, strict=True)
    ]
    groups = [CausalGroups(each, begun[0].kv.keys.dtype) for each in positions]
    sizes = [len(ids) for ids in token_ids]
    everywhere = torch.cat(positions)
    hidden = model.embed(torch.tensor([token for ids in token_ids for token in ids], device=model.device))
    for layer in range(model.num_layers):
        projected = model.project(layer, hidden, everywhere)
        attended = []
        parts = zip(*(tensor.split(sizes, dim=1) for tensor in projected), strict=True)
        for at, size, group, (queries, keys, values) in zip(begun, sizes, groups, parts, strict=True):
            at.kv.keys[layer][:, at.num_tokens : at.num_tokens + size] = keys
            at.kv.values[layer][:, at.num_tokens : at.num_tokens + size] = values
            attended.append(attend(queries, at.kv.keys[layer], at.kv.values[layer], group, model.scale))
        hidden = model.finish(layer, hidden, torch.cat(attended))
    for at, size in zip(begun, sizes, strict=True):
        at.num_tokens += size
    wanted = [rows[len(rows) - number :] for rows, number in zip(hidden.split(sizes), num_wanted, strict=True)]
    return list(model.logits(torch.cat(wanted)).split(list(num_wanted)))


def answer_all(model: BlendModel, begun: Sequence[Begun], gold: Gold) -> list[Answer]:
    """What each version says at the answer's places. Afterwards the prompt and all of the answer but its last token are computed."""
    ahead = [[*at.rest, *gold.tokens[:-1]] for at in begun]
    wanted = [len(gold.tokens) - (at.last is not None) for at in begun]
    busy = [index for index, ids in enumerate(ahead) if ids]
    found = [begun[0].kv.keys.new_zeros((0, 0))] * len(begun)
    if busy:
        computed = extend_all(model, [begun[index] for index in busy], [ahead[index] for index in busy], [wanted[index] for index in busy])
        for index, logits in zip(busy, computed, strict=True):
            found[index] = logits
    scored = torch.tensor(gold.is_scored, device=model.device)
    right = torch.tensor(gold.tokens, device=model.device)[scored]
    answers = []
    for at, logits in zip(begun, found, strict=True):
        if at.last is not None:
            logits = torch.cat((at.last[None], logits)) if len(logits) else at.last[None]  # noqa: PLW2901 - the same, complete
        answers.append(Answer(logits[scored].log_softmax(-1), right))
    return answers


@dataclass
class _Text:
    """What a version writes."""

    at: Begun
    place: int = 0
    ahead: list[int] = field(default_factory=list)
    """not computed yet"""
    tokens: list[int] = field(default_factory=list)


def write_anew(model: BlendModel, at: Begun, num_tokens: int) -> list[int]:
    """The most likely tokens behind a prompt, one after the other."""
    gold = Gold([0] * num_tokens, [True] * num_tokens)
    return _write(model, [_Text(at, ahead=list(at.rest))], gold)[0]


def write_all(model: BlendModel, begun: Sequence[Begun], gold: Gold, answers: Sequence[Answer]) -> list[list[int]]:
    """The most likely tokens at the places that are scored; the others are given. Call it after ``answer_all``, with its answers.

    Up to the first place where a version says something else it writes the right answer: what follows is computed only from there.
    """
    places = [place for place, is_scored in enumerate(gold.is_scored) if is_scored]
    texts = []
    for at, answer in zip(begun, answers, strict=True):
        picks = answer.logits.argmax(-1)
        missed = (picks != answer.tokens).nonzero()[:, 0].tolist()
        if not missed:
            texts.append(_Text(at, len(gold.tokens), tokens=gold.scored))
            continue
        first = missed[0]
        at.num_tokens -= len(gold.tokens) - 1 - places[first]
        token = int(picks[first])
        texts.append(_Text(at, places[first] + 1, [token], [*gold.scored[:first], token]))
    return _write(model, texts, gold)


def _write(model: BlendModel, texts: Sequence[_Text], gold: Gold) -> list[list[int]]:
    while True:
        for text in texts:
            while text.place < len(gold.tokens) and not gold.is_scored[text.place]:
                text.ahead.append(gold.tokens[text.place])
                text.place += 1
        busy = [text for text in texts if text.place < len(gold.tokens)]
        if not busy:
            return [text.tokens for text in texts]
        found = extend_all(model, [text.at for text in busy], [text.ahead for text in busy], [1] * len(busy))
        for text, logits in zip(busy, found, strict=True):
            token = int(logits[0].argmax())
            text.tokens.append(token)
            text.ahead = [token]
            text.place += 1


def compare(reference: Answer, answer: Answer) -> dict[str, Any]:
    """Over the answer's tokens, each behind the right ones before it: nats, shares, and whether greedy decoding gives the answer.

    ``margin``: of the first token alone, by how much the likeliest one's probability exceeds the next one's.
    """
    gold = reference.tokens
    picks = torch.arange(len(gold), device=gold.device)
    best, wanted = answer.logits.argmax(-1), reference.logits.argmax(-1)
    return {
        "margin": margin(answer.logits[0]),
        "kl": float((reference.logits.exp() * (reference.logits - answer.logits)).sum(-1).mean()),
        "agreement": float((best == wanted).float().mean()),
        "nll_change": float((reference.logits[picks, gold] - answer.logits[picks, gold]).mean()),
        "is_right": bool((best == gold).all()),
        "token_accuracy": float((best == gold).float().mean()),
        "full_is_right": bool((wanted == gold).all()),
    }


def gold_of(parts: Iterable[Sequence[int]]) -> Gold:
    """From what is to be found and what is given, in turn, the former first."""
    tokens: list[int] = []
    is_scored: list[bool] = []
    for index, part in enumerate(parts):
        tokens += part
        is_scored += [index % 2 == 0] * len(part)
    return Gold(tokens, is_scored)
