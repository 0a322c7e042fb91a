"""In: answers, as text, and the target. Out: what the target says of them when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import TooLong, encode
from ..models.tokens import common_prefix, context_of, decoding_greedily


CONTEXT = 12  # words shown around a difference
SAME = """Two answers to the same request differ in one passage.

Request: {request}

First answer: {first}

Second answer: {second}

Do both answers say the same? Answer with yes or no."""
ABOUT = """{text}

Question: {question}
Reply with one line: 'Answer: ' and the shortest answer in the words of the text, or 'Answer: unknown' if the text \
does not tell."""
REPLY = 48  # tokens


@dataclass
class Asked:
    """The target as one that is asked about texts. Its replies are kept: an answer is compared with many others."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    known: dict[tuple[str, ...], tuple[str, ...] | None] = field(default_factory=dict)

    @torch.no_grad()
    def says_no(self, request: str, first: str, second: str) -> float | None:
        """The target's own probability that two answers do not say the same, in [0, 1]: that of "no" against "yes" as
        its answer to [`SAME`]. `None` if the question is longer than its context."""
        if first == second:
            return 0.0
        first, second = differing(first, second)
        question = SAME.format(request=request, first=first, second=second)
        try:
            ids = self._encode(question, 0)
        except TooLong:
            return None
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1].float()
        yes, no = (logits[_first_tokens(self.tokenizer, word)].logsumexp(0) for word in ("yes", "no"))
        return float(torch.sigmoid(no - yes))

    def replies(self, text: str, questions: Sequence[str]) -> tuple[str, ...] | None:
        """The target's replies to questions about a text, each asked alone with [`ABOUT`]: it is not told what the
        text was written from (the idea of QAGS, https://huggingface.co/papers/2004.04228). `None` if a question is
        longer than its context."""
        key = text, *questions
        if key not in self.known:
            try:
                ids = [self._encode(ABOUT.format(text=text, question=question), REPLY) for question in questions]
            except TooLong:
                self.known[key] = None
            else:
                self.known[key] = self._reply(ids)
        return self.known[key]

    @torch.no_grad()
    def _reply(self, ids: list[torch.LongTensor]) -> tuple[str, ...]:
        """Replies to prompts of shape `(1, length)`. What two begin with is read once."""
        model, cache = decoding_greedily(self.model, REPLY), DynamicCache()  # keeps all keys, so that it can be cut
        texts, cached = [], []
        for row in ids:
            begins = min(common_prefix(cached, row[0].tolist()), row.shape[1] - 1)
            cache.crop(begins - cache.get_seq_length())
            output = model.generate(row, attention_mask=torch.ones_like(row), past_key_values=cache)[0]
            cached = output[:-1].tolist()
            texts.append(self.tokenizer.decode(output[row.shape[1] :], skip_special_tokens=True))
        return tuple(texts)

    def _encode(self, prompt: str, room: int) -> torch.LongTensor:
        return encode(self.tokenizer, prompt, context_of(self.model), room).to(self.model.device)


def differing(first: str, second: str) -> tuple[str, str]:
    """The passages in which two texts differ, with some words before and after them."""
    a, b = first.split(), second.split()
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()  # an empty one at the end is the last
    start = blocks[0].size if blocks[0].a == blocks[0].b == 0 else 0
    last = blocks[-2:][0]
    tail = last.size if last.a + last.size == len(a) and last.b + last.size == len(b) else 0
    tail = min(tail, len(a) - start, len(b) - start)
    start, tail = max(0, start - CONTEXT), max(0, tail - CONTEXT)
    return " ".join(a[start : len(a) - tail]), " ".join(b[start : len(b) - tail])


def _first_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    spellings = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return [*{tokenizer.encode(spelling, add_special_tokens=False)[0] for spelling in spellings}]
