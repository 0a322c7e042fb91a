"""In: an answer. Out: measures that need no references. Whether one means anything is shown by how far it tells the
target's answers from those of a coin and of the draft alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..data.prompts import Prompt
from ..models.load import resolve_model
from .checks import CHECKS, REFERENCE_SCORES, TextCheck
from .meaning import GRAM


def check_can_score(prompts: Sequence[Prompt], embeddings: str | None) -> None:
    """Fail before the work, not after it: with a `ValueError` if a library is missing that scores by references or
    [`similarity`] (by the model `embeddings`) need, and a `SourceError` if no source has that model."""
    by_reference = [p for p in prompts if p.references and isinstance(CHECKS[p.check], TextCheck)]
    libraries = {REFERENCE_SCORES[p.category].library for p in by_reference if p.category in REFERENCE_SCORES}
    libraries |= {"sentence_transformers"} if embeddings else set()
    for library in sorted(libraries - {None}):
        try:
            __import__(library)
        except ImportError as error:
            raise ValueError(f"`prompts` need {library} to be scored: pip install 'hf-selfjudge[bench]'.") from error
    if embeddings:
        resolve_model(embeddings)


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's 4-grams that stood in it before, in [0, 1]."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def similarity(model: str, first: str, second: str) -> float:
    """Cosine of the sentence embeddings of two texts, by a sentence-transformers model (folder or Hub id)."""
    one, other = _encoder(model).encode([first, second], normalize_embeddings=True)
    return float(one @ other)


@lru_cache(maxsize=1)
def _encoder(model: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(resolve_model(model), device="cpu", model_kwargs={"use_safetensors": True})
