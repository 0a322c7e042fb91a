"""`demo`: the page in a browser."""

from __future__ import annotations

from dataclasses import replace

from ..judge.judge import Judge
from ..judge.shipped import shipped_judge
from ..judge.threshold import Threshold
from ..models.pair import parse_pair, with_fast_draft
from .options import JudgeOptions, PairOptions


def demo_command(models: PairOptions, judging: JudgeOptions) -> None:
    """Open the playground in a browser: judged text in colours, beside lossless text. Gradio's environment variables
    GRADIO_SERVER_NAME and GRADIO_SERVER_PORT set the address."""
    try:
        from ..demo.page import build, folder_of  # needs gradio, which is an extra
    except ModuleNotFoundError as error:
        raise ValueError("The demo needs gradio. Install it: pip install 'hf-selfjudge[demo]'.") from error
    name = judging.judge or str(shipped_judge(models.pair))
    folder = folder_of(name)
    judge = Judge.from_pretrained(folder)
    if judging.threshold is not None:
        judge.info = replace(judge.info, threshold=Threshold.parse(judging.threshold, judge.info.thresholds))
    pair = with_fast_draft(models.load(draft_length=None), parse_pair(models.pair)[1])
    judge.check_target(pair.target, allow_other_weights=True)
    build(pair, judge, name, folder).launch(ssr_mode=False)
