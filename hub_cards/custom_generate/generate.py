"""Judged decoding for `target.generate(..., custom_generate=..., trust_remote_code=True)`."""

from functools import lru_cache

from hf_selfjudge import Judge, JudgedModel, JudgeRule


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
    All arguments of `generate`; and of `JudgedModel.from_pretrained` the `threshold` (a number, one for each token
    gained as "0.03/token", or an operating point), the `draft_length`, `allow_other_weights`, and the `revision` of
    the judge.
    """
    rule = JudgeRule(load(judge, revision=revision, token=token), threshold, allow_other_weights)
    return JudgedModel(model, rule, draft_length).generate(**kwargs)
