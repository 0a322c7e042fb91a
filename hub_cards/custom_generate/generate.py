"""Judged decoding for `target.generate(..., custom_generate=..., trust_remote_code=True)`."""

from hf_selfjudge import JudgedModel


JUDGE = "{{ repo_id }}"


def generate(
    model, judge=JUDGE, threshold=None, draft_length=None, allow_other_weights=False, revision=None, **kwargs
):
    """
    All arguments of `generate`; and of `JudgedModel.from_pretrained` the `threshold` (a number or an operating point),
    the `draft_length`, `allow_other_weights`, and the `revision` of the judge.
    """
    judged = JudgedModel.from_pretrained(
        model,
        judge,
        threshold=threshold,
        draft_length=draft_length,
        allow_other_weights=allow_other_weights,
        revision=revision,
        token=kwargs.pop("token", None),
    )
    return judged.generate(**kwargs)
