"""`demo`: the page in a browser."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..judge.judge import Judge
from ..judge.shipped import shipped_judge
from ..judge.threshold import Threshold
from .options import Int8Options, JudgeOptions, option


@dataclass(frozen=True, kw_only=True)
class DemoOptions(JudgeOptions, Int8Options):
    """Where the page is served."""

    host: str = option("Address to listen on.", "127.0.0.1")
    port: int = option("Port to listen on.", 7860, min=1, max=65535)


def demo_command(options: DemoOptions) -> None:
    """Open the playground in a browser: judged text in colours, beside lossless text."""
    try:
        from ..demo.page import build, folder_of  # needs gradio, which is an extra
    except ModuleNotFoundError as error:
        raise ValueError("The demo needs gradio. Install it: pip install 'hf-selfjudge[demo]'.") from error
    name = options.judge or str(shipped_judge(options.pair))
    folder = folder_of(name)
    judge = Judge.from_pretrained(folder)
    if options.threshold is not None:
        threshold = Threshold.parse(options.threshold, judge.info.thresholds)
        judge.info = replace(judge.info, threshold=threshold)
    pair = options.load(with_draft=not options.int8_draft)
    judge.check_target(pair.target, allow_other_weights=True)
    if options.int8_draft:
        pair = replace(pair, draft=options.load_int8_draft(pair))
    build(pair, judge, name, folder).launch(server_name=options.host, server_port=options.port, ssr_mode=False)
