"""The page as a Space: the shipped pair and its judge."""

import os

from hf_selfjudge import Judge, load_pair
from hf_selfjudge.demo.page import build, folder_of
from hf_selfjudge.judge.shipped import shipped_judge
from hf_selfjudge.models.pair import with_fast_draft


JUDGE = os.environ.get("JUDGE") or str(shipped_judge("qwen2.5-coder"))
folder = folder_of(JUDGE)
judge = Judge.from_pretrained(folder)
pair = load_pair(f"{judge.info.target},{judge.info.draft}", draft_length=None)
page = build(with_fast_draft(pair, judge.info.draft), judge, JUDGE, folder)

if __name__ == "__main__":
    page.launch()
