"""Judged decoding for `target.generate(..., custom_generate=..., trust_remote_code=True)`."""

from functools import lru_cache

from hf_selfjudge import Judge, JudgedModel
from hf_selfjudge.rules import JudgeRule


JUDGE = "{{ repo_id }}"
load = lru_cache(maxsize=8)(Judge.from_pretrained)


def generate(
    model,
    judge=JUDGE,
    threshold=None,
    draft_length=None,
    allow_other_weights=False,
    revision=None,
    token=None,
    **kwargs,
):
    """
    Takes all arguments of `generate`, and these of `JudgedModel.from_pretrained`: `threshold` (a number, "0.03/token"
    for one per token gained, or the name of an operating point), `draft_length`, `allow_other_weights`, and the
    `revision` and `token` for a judge on the Hub.
    """
    rule = JudgeRule(load(judge, revision=revision, token=token), threshold, allow_other_weights)
    return JudgedModel(model, rule, draft_length).generate(**kwargs)
