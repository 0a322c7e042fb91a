"""The real pair and its shipped judge: `pytest -m slow`. Downloads 1.6 GB on first use."""

import pytest
import torch

from hf_selfjudge import JudgedModel, load_model
from hf_selfjudge.data.prompts import encode
from hf_selfjudge.judge.shipped import shipped_judge
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.models.pair import DRAFT_MODEL, LOOKUP, PAIRS
from hf_selfjudge.models.tokens import greedy
from hf_selfjudge.models.wheels import described
from hf_selfjudge.scoring.meaning import similarity


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    (target, tokenizer), (draft, _) = (load_model(reference) for reference in PAIRS["qwen2.5-coder"])
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return target, draft, tokenizer


@pytest.fixture
def no_hub():
    """Here the Hub may be asked."""


def test_what_the_wheels_are_a_copy_of(real):
    assert {described(fingerprint(model)) for model in real[:2]} == {
        f"a GGUF copy of mostly {bits} bits a weight, dequantised" for bits in (4, 5)
    }


def test_the_target_answers(real):
    target, _, tokenizer = real
    ids = encode(tokenizer, "What is 12 * 7? Answer with the number only.", 1024, 8)
    output = target.generate(ids, generation_config=greedy(target, 8))
    assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip() == "84"


@pytest.mark.parametrize(
    ("drafts", "text"),
    [
        (DRAFT_MODEL, "Why is the sky blue?"),
        (
            LOOKUP,
            "Repeat this and mend it where it is wrong: The mill by the river closed in 1962, that by the lake in 74.",
        ),
    ],
)
def test_the_shipped_judge_belongs_to_it_and_accepts(real, drafts, text):
    target, draft, tokenizer = real
    judged = JudgedModel.from_pretrained(target, shipped_judge("qwen2.5-coder", drafts))
    assert judged.rule.judge.info.target_fingerprint == fingerprint(target)
    ids = encode(tokenizer, text, 1024, 48)
    how = greedy(target, 48)
    how.prompt_lookup_num_tokens = 10 if drafts == LOOKUP else None
    given = {} if drafts == LOOKUP else {"assistant_model": draft}
    rounds = {}
    for threshold in (0.0, 0.5, 1.0):  # its own may accept nothing of one answer
        judged.threshold = threshold
        judged.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how, **given)
        rounds[threshold] = judged.stats.rounds
        assert (judged.stats.judged > 0) == (threshold > 0)
    assert rounds[1.0] < rounds[0.0]


def test_sentence_embeddings(no_hub):
    texts = "How old are you?", "What is your age?", "The train leaves at nine."
    near, far = (similarity("sentence-transformers/all-MiniLM-L6-v2", texts[0], other) for other in texts[1:])
    assert near > 0.7
    assert far < 0.3
