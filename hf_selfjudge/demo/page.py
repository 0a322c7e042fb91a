"""The page: see the judge at work.

In: a judged pair. Out: a Gradio page that streams judged text, each token coloured by who decided it; that puts
lossless and judged decoding side by side; and that shows the judge's measured curve.
"""

from __future__ import annotations

import atexit
import difflib
import html
import itertools
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gradio as gr
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import TooLong, encode
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import Candidate, JudgeRule, KLGate, Lossless, Margin, Rule
from ..hub.publish import pull_judge
from ..judge.card import read_results
from ..judge.info import PER_TOKEN, limit_of
from ..judge.judge import Judge
from ..models.load import fingerprint
from ..models.tokens import context_of, special_tokens
from ..utils.names import public_name
from ..utils.text import in_markdown, in_python, pieces, token_text
from ..utils.transfer import HubError


LONGEST_PROMPT, LONGEST_ANSWER = 4000, 256  # characters, tokens
WAITING = 8  # visitors in the queue
COLOURS = {"draft, matched": "#2f9e44", "draft, judged": "#e8590c", "target": "#868e96"}
NAMES = {"matched": "draft, matched", "judged": "draft, judged", "target": "target"}
STEP = 0.001  # of the threshold
RULES = ("judge", "judge per token", "lossless", "margin", "KL gate")
EXAMPLES = (
    "A baker sells 24 rolls in the morning and twice as many in the afternoon. How many rolls is that in all?",
    "Why is the sky blue?",
    "Write a short email to my neighbours about the street party on Saturday.",
    "Translate to German: The library is closed on Mondays, but the garden is open.",
    "Write a Python function that returns the longest word of a sentence.",
    "Summarise in one sentence: Bees carry pollen from flower to flower. Without them most plants bear no fruit.",
)


@dataclass(frozen=True)
class Token:
    """
    A token of an answer.

    Args:
        id (`int`): In the vocabulary.
        source (`str`): `"matched"`, `"judged"` or `"target"`.
        instead (`int`, *optional*): Of a judged token: what the target would have said.
        cost (`float`, *optional*): Of a judged token: the judge's probability that it changes the meaning; for a rule
            without a judge how much less likely the target finds it, nats.
    """

    id: int
    source: str
    instead: int | None = None
    cost: float | None = None


@dataclass
class Progress:
    """An answer as far as it has come: its tokens, how many each round kept, and seconds since it began."""

    tokens: list[Token] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def judged(self) -> list[Token]:
        return [token for token in self.tokens if token.source == "judged"]


class Noting(Rule):
    """A rule, and what it accepted: for each position the token, what the target would have said, and the cost."""

    def __init__(self, rule: Rule):
        self.rule, self.noted = rule, {}
        self.special_tokens, self.needs_draft_logits = rule.special_tokens, rule.needs_draft_logits

    def check_target(self, target: PreTrainedModel) -> None:
        self.rule.check_target(target)

    def replay_on(self, target: PreTrainedModel):
        return self.rule.replay_on(target)

    def accept(self, candidate: Candidate) -> bool:
        accepted = self.rule.accept(candidate)
        if accepted:
            judging = isinstance(self.rule, JudgeRule)
            cost = self.rule.log_odds(candidate).sigmoid() if judging else candidate.margin
            choice = candidate.final_scores.argmax().item()
            self.noted[candidate.position] = candidate.token, choice, cost.item()
        return accepted


class _Rounds(BaseStreamer):
    """Hands what each round kept to another thread."""

    def __init__(self):
        self.queue: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def answer(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    rule: Rule,
    special_tokens: Sequence[int],
    ids: torch.LongTensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[Progress]:
    """
    Decode an answer in a thread of its own, and tell after each round how far it is. Whoever stops listening stops it.

    Args:
        ids (`torch.LongTensor` of shape `(1, prompt_length)`): The prompt.
        temperature (`float`): 0 is greedy.
    """
    noting, streamer, stop, progress = Noting(rule), _Rounds(), threading.Event(), Progress()
    noting.special_tokens = [*(rule.special_tokens or ()), *special_tokens]
    judged = JudgedModel(target, noting)
    how = {"do_sample": temperature > 0, "repetition_penalty": 1.0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}

    def decode() -> None:
        try:
            if temperature > 0:
                torch.manual_seed(seed)
            judged.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=draft,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=[_Stop(stop)],
                **how,
            )
            streamer.queue.put(None)
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            streamer.queue.put(error)

    since = time.perf_counter()
    worker = threading.Thread(target=decode, name="decode", daemon=True)
    worker.start()
    try:
        while (kept := streamer.queue.get()) is not None:
            if isinstance(kept, BaseException):
                raise kept
            for place, token in enumerate(kept):
                told = noting.noted.get(len(progress.tokens))
                if told is not None and told[0] == token and told[1] != token:
                    progress.tokens.append(Token(token, "judged", *told[1:]))
                else:
                    progress.tokens.append(Token(token, "target" if place == len(kept) - 1 else "matched"))
            progress.rounds.append(len(kept))
            progress.seconds = time.perf_counter() - since
            yield progress
        # A draft that the end of the text cuts off is followed by no token of the target.
        decided = zip(progress.tokens, judged.stats.sources, strict=True)
        progress.tokens[:] = [replace(token, source=source) for token, source in decided]
    finally:
        stop.set()
        worker.join()


def coloured(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], growing: bool = False
) -> list[tuple[str, str]]:
    """Text and who decided it, see [`pieces`]; neighbours of one source are one."""
    runs = [(source, len(list(same))) for source, same in itertools.groupby(token.source for token in tokens)]
    ends = list(itertools.accumulate(count for _, count in runs))
    texts = pieces(tokenizer, [token.id for token in tokens], ends, growing)
    return [(text, NAMES[source]) for text, (source, _) in zip(texts, runs, strict=True) if text]


def figures(progress: Progress) -> str:
    """What has been measured so far, in a line."""
    tokens, rounds, judged = len(progress.tokens), len(progress.rounds), progress.judged
    if not rounds:
        return ""
    cost = sum(token.cost for token in judged)
    return (
        f"{tokens} tokens in {progress.seconds:.1f} s: **{tokens / progress.seconds:.1f} tokens/s**, "
        f"**{tokens / rounds:.2f} tokens a round**, {len(judged) / tokens:.0%} judged, cost so far {cost:.2f}"
    )


def rows_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token]) -> list[list[str]]:
    """Judged tokens as rows of a table: place, token, what the target would have said, cost."""
    ids, rows = [token.id for token in tokens], []
    for place, token in enumerate(tokens):
        if token.source == "judged":
            both = (repr(token_text(tokenizer, ids[:place], choice)) for choice in (token.id, token.instead))
            rows.append([place + 1, *both, round(token.cost, 3)])
    return rows


def differences(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[Token], second: Sequence[Token], growing: bool = False
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """Two answers, with the tokens that only one of them has marked; see [`pieces`]."""
    a, b = ([token.id for token in tokens] for tokens in (first, second))
    found = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    marks = [None if kind == "equal" else "differs" for kind, *_ in found]
    left = pieces(tokenizer, a, [j for _, _, j, _, _ in found], growing)
    right = pieces(tokenizer, b, [m for *_, m in found], growing)
    return tuple([(text, mark) for text, mark in zip(side, marks, strict=True) if text] for side in (left, right))


def picture(rounds: dict[str, Sequence[int]]) -> Figure:
    """One bar for each round: how many tokens it kept."""
    figure = Figure(figsize=(8, 1.3 * len(rounds) + 0.6))
    axes = figure.subplots(len(rounds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, kept) in zip(axes, rounds.items(), strict=True):
        axis.bar(range(1, len(kept) + 1), kept, width=0.8)
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0].set_title("A bar for each round: how many tokens it kept", fontsize="medium")
    axes[-1].set_xlabel("round")
    figure.tight_layout()
    return figure


def folder_of(judge: str) -> Path:
    """
    Where a judge is, with what was measured of it: its folder, or one that is fetched from the Hub and goes with this
    process.

    Raises:
        FileNotFoundError, ValueError, HubError: See [`pull_judge`].
    """
    if Path(judge).is_dir():
        return Path(judge)
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name) / "judge"
    try:
        pull_judge(judge, folder)
    except HubError:  # out of reach: the judge may be in the cache, what was measured of it is not
        Judge.from_pretrained(judge).save_pretrained(folder)
    return folder


# -- the page --------------------------------------------------------------------------------------------------------

UNITS = {
    "judge": "Threshold: accepted below this probability of another meaning (0 is lossless)",
    "judge per token": "Threshold: accepted below this probability of another meaning for each token gained",
    "lossless": "Threshold: none, nothing is accepted",
    "margin": "Threshold: nats that a token may be less likely than the target's",
    "KL gate": "Threshold: nats between the target's distribution and the draft's",
}
# Gradio writes black on these colours in the dark too, where they are dark themselves, and breaks lines within words.
STYLE = """<style>
.dark .token.highlighted, .dark .legend-item { color: white !important; }
.textfield { word-break: normal !important; overflow-wrap: anywhere; }
</style>"""
INTRODUCTION = """
# Judge decoding

A small **draft** model proposes tokens, the **target** checks them all at once. Stock decoding throws a draft token
away whenever the target would have chosen another. A **judge** keeps those that would not change what the answer says,
so that each check of the target yields more tokens. Orange is what it kept; the table lists what the target would have
said instead, and what the judge makes of it.
"""


def rule_of(name: str, threshold: float, judge: Judge) -> Rule:
    """
    Raises:
        ValueError: If the rule is unknown or cannot have this threshold.
    """
    if name not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {name!r}.")
    if name in ("judge", "judge per token"):
        limit = threshold if name == "judge" else f"{threshold:g}{PER_TOKEN}"
        return JudgeRule(judge, limit, allow_other_weights=True)
    return {"lossless": Lossless(), "margin": Margin(threshold), "KL gate": KLGate(threshold)}[name]


def shown_as(threshold: float | str) -> tuple[str, float]:
    """The rule and the place of the slider for a threshold of the judge."""
    limit, per_token = limit_of(threshold)
    return "judge per token" if per_token else "judge", limit


def build(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    name: str,
    folder: Path | None = None,
) -> gr.Blocks:
    """
    The page.

    Args:
        name (`str`): What the judge is loaded by.
        folder (`Path`, *optional*): The judge's, for its curve.
    """
    context, special = context_of(target), special_tokens(target, tokenizer)
    references = target.config.name_or_path, draft.config.name_or_path, name
    target_name, draft_name, judge_name = (in_python(public_name(reference)) for reference in references)

    def prepared(
        prompt: str, rule: str, threshold: float, temperature: float, length: int
    ) -> tuple[Rule, torch.LongTensor]:
        """What to decode with, or an error in words."""
        if not prompt.strip():
            raise gr.Error("Write a prompt first, or choose one of the examples.", duration=8)
        if len(prompt) > LONGEST_PROMPT:
            raise gr.Error(f"The prompt has {len(prompt)} characters, more than {LONGEST_PROMPT}. Shorten it.")
        if not 0 <= temperature <= 2 or not 1 <= length <= LONGEST_ANSWER:
            raise gr.Error(f"The temperature must be in [0, 2], the length in [1, {LONGEST_ANSWER}] tokens.")
        try:
            ids = encode(tokenizer, prompt, context, int(length)).to(target.device)
            return rule_of(rule, threshold, judge), ids
        except TooLong as error:
            raise gr.Error(html.escape(f"The prompt is longer than the model can read. {error}", False)) from error
        except ValueError as error:
            raise gr.Error(html.escape(str(error), False)) from error  # what it says is shown as HTML

    def generate(prompt: str, rule: str, threshold: float, temperature: float, length: int):
        """Judged text as it comes: coloured parts, figures, and the judged tokens."""
        made, ids = prepared(prompt, rule, threshold, temperature, length)
        for progress in answer(target, draft, made, special, ids, int(length), temperature):
            tokens = progress.tokens
            yield coloured(tokenizer, tokens, growing=True), figures(progress), rows_of(tokenizer, tokens)
        yield coloured(tokenizer, tokens), figures(progress), rows_of(tokenizer, tokens)

    def marked(done: dict[str, Progress], growing: bool = False):
        return differences(tokenizer, *(progress.tokens for progress in done.values()), growing)

    def compare(prompt: str, rule: str, threshold: float, length: int):
        """Lossless and judged, one after the other: both texts with the differences marked, and their rounds."""
        made, ids = prepared(prompt, rule, threshold, 0.0, length)
        ways = {"lossless": Lossless(), f"with {rule}": made}
        done = {label: Progress() for label in ways}
        for label, decoding in ways.items():
            for progress in answer(target, draft, decoding, special, ids, int(length)):
                done[label] = progress
                yield *marked(done, growing=True), gr.skip(), gr.skip()
        lines = [f"**{label}**: {figures(progress)}" for label, progress in done.items()]
        bars = picture({label: progress.rounds for label, progress in done.items()})
        yield *marked(done), bars, "\n\n".join(lines)

    def code(rule: str, threshold: float, temperature: float, length: int) -> str:
        """What to copy for these settings."""
        sampling = f", do_sample=True, temperature={temperature:g}" if temperature else ", do_sample=False"
        from_judge = f"JudgedModel.from_pretrained(target, {judge_name}, threshold="
        loaded = {
            "judge": f"{from_judge}{threshold:g})",
            "judge per token": f'{from_judge}"{threshold:g}{PER_TOKEN}")',
            "lossless": "JudgedModel(target, Lossless())",
            "margin": f"JudgedModel(target, Margin({threshold:g}), tokenizer=tokenizer)",
            "KL gate": f"JudgedModel(target, KLGate({threshold:g}), tokenizer=tokenizer)",
        }[rule]
        judging = rule.startswith("judge")
        rules = "" if judging else "from hf_selfjudge.rules import KLGate, Lossless, Margin\n"
        return (
            f"from hf_selfjudge import JudgedModel, load_model\n{rules}\n"
            f"target, tokenizer = load_model({target_name})\n"
            f"draft, _ = load_model({draft_name})\njudged = {loaded}\n"
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
            f"output = judged.generate(**inputs, assistant_model=draft, max_new_tokens={int(length)}{sampling})\n"
            "print(tokenizer.decode(output[0]), judged.stats)\n"
        )

    def scaled(rule: str):
        """The slider for a rule."""
        most, value = begins[rule]
        return gr.Slider(0, most, value, step=STEP, label=UNITS[rule], interactive=rule != "lossless")

    def at(point: str):
        """The judge, and the slider at one of its operating points."""
        rule, value = shown_as(points[point])
        return rule, gr.Slider(0, 1, value, step=STEP, label=UNITS[rule], interactive=True)

    points = judge.info.thresholds
    own, value = shown_as(judge.info.threshold)
    begins = {"judge": (1, 0.3), "judge per token": (1, 0.03)} | {own: (1, value)}
    begins |= {"lossless": (1, 0), "margin": (5, 1), "KL gate": (5, 0.5)}
    with gr.Blocks(title="Judge decoding") as page:
        gr.HTML(STYLE, visible="hidden")
        gr.Markdown(INTRODUCTION)
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=LONGEST_PROMPT, value=EXAMPLES[0], elem_id="prompt")
        gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples")
        with gr.Row():
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", elem_id="stop")
                    text = gr.HighlightedText(
                        label="Answer", color_map=COLOURS, combine_adjacent=True, show_legend=True, elem_id="answer"
                    )
                    line = gr.Markdown(elem_id="figures")
                    table = gr.Dataframe(
                        headers=["place", "judged token", "the target's choice", "estimated cost"],
                        label="Judged tokens", interactive=False, elem_id="judged",
                    )  # fmt: skip
                with gr.Tab("Compare"):
                    with gr.Row():
                        both = gr.Button("Compare", variant="primary", elem_id="compare")
                        halt = gr.Button("Stop")
                    with gr.Row():
                        marks = {"color_map": {"differs": "#e8590c"}, "show_inline_category": False}
                        first = gr.HighlightedText(label="Lossless", elem_id="lossless", **marks)
                        second = gr.HighlightedText(label="With the rule", elem_id="ruled", **marks)
                    bars = gr.Plot(show_label=False, elem_id="rounds")
                    told = gr.Markdown(elem_id="told")
                with gr.Tab("Curve"):
                    _curve(judge, folder)
                with gr.Tab("Use it"):
                    shown = gr.Code(language="python", value="", label="Copy this", interactive=False)
            with gr.Column(scale=1, min_width=280):
                rule = gr.Dropdown(list(RULES), value=own, label="Rule")
                point = gr.Radio([*points], label="Operating point", visible=bool(points))
                threshold = gr.Slider(0, 5, begins[own][1], step=STEP, label=UNITS[own], elem_id="threshold")
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
                length = gr.Slider(16, LONGEST_ANSWER, 96, step=8, label="Longest answer, tokens")
                settings = [rule, threshold, temperature, length]
        aside = {"queue": False, "api_visibility": "private"}  # answered at once, however many are waiting
        rule.input(scaled, rule, threshold, **aside)
        point.input(at, point, [rule, threshold], **aside)
        for setting in settings:
            setting.change(code, settings, shown, **aside)
        page.load(scaled, rule, threshold, **aside)
        page.load(code, settings, shown, **aside)
        alone = {"concurrency_id": "models", "concurrency_limit": 1}  # one at a time: the machine is shared
        running = go.click(generate, [prompt, *settings], [text, line, table], api_name="generate", **alone)
        stop.click(None, cancels=[running], api_visibility="private")
        comparing = both.click(
            compare, [prompt, rule, threshold, length], [first, second, bars, told], api_name="compare", **alone
        )
        halt.click(None, cancels=[comparing], api_visibility="private")
    return page.queue(max_size=WAITING)  # who comes when so many are waiting is told so


def _curve(judge: Judge, folder: Path | None) -> None:
    """What was measured of the judge."""
    benches = {} if folder is None else read_results(folder, fingerprint(judge)).get("bench", {})
    if not benches:
        gr.Markdown("Nothing was measured of this judge yet. `hf-selfjudge bench` and `hf-selfjudge card` do that.")
    for name, bench in benches.items():
        gr.Markdown(f"### {in_markdown(name)}\n\n{in_markdown(bench['heading'])}")
        if (picture_file := folder / f"curve-{name}.png").is_file():
            gr.Image(str(picture_file), show_label=False, interactive=False)
        rows = [
            [row["setting"], *(_rounded(row[key]) for key in ("tokens_per_round", "speed", "retention"))]
            for row in bench["settings"]
        ]
        headers = ["decoding", "tokens a round", "× lossless", "retention"]
        gr.Dataframe(rows, headers=headers, interactive=False)


def _rounded(value: list[float] | None) -> str:
    return "–" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value)
