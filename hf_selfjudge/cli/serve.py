"""`serve`: vLLM's server with a judge. It prints the whole command that it runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..bench.runner import BenchConfig
from ..judge.shipped import find_judge, shipped_for
from ..models.pair import LOOKUP, parse_pair
from ..serving.settings import KEY, Rules, ServingConfig
from ..utils.names import absolute_if_folder
from .console import say
from .options import JudgeOptions, option, reuse


WORKER = "hf_selfjudge.serving.worker.JudgedWorker"
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve`, which not every distribution of vLLM has
OURS = ("--speculative-config", "--worker-cls", "--additional-config")
REFUSED = (*OURS, "--model", "-sc", "--config")  # others would replace these, or serve another target
SILENT = ("VLLM_LOGGING_LEVEL", "ERROR")  # set by trl when it is imported
OPENMP = "libiomp5.so"  # comes with vLLM for CPUs, which is slow without it


@dataclass(frozen=True, kw_only=True)
class ServeOptions(JudgeOptions):
    instead_of_judge: str | None = option("A rule that needs no judge, such as margin=0.5.", None)
    draft_length: int | str = reuse(BenchConfig, "draft_length", 5)

    def config(self, target: str, draft: str | None) -> ServingConfig:
        """What the server decodes with. By default the judge shipped for the models."""
        if self.instead_of_judge is not None:
            if self.judge is not None:
                raise ValueError("`--judge` and `--instead-of-judge` name two rules. Use one of the two.")
            return ServingConfig(threshold=self.threshold, rule=self.instead_of_judge)
        judge = self.judge or shipped_for(target, draft or LOOKUP)
        if judge is None:
            raise ValueError("`--judge`: none is shipped for these models. Name one, or use `--instead-of-judge`.")
        return ServingConfig(absolute_if_folder(str(find_judge(judge))), self.threshold, allow_other_weights=True)


def serve_command(
    pair: Annotated[str, typer.Argument(help="A known pair, 'TARGET,DRAFT', or TARGET alone: prompt lookup drafts.")],
    options: ServeOptions,
    arguments: Annotated[list[str] | None, typer.Argument(help="Options of vLLM's server: --port 8000 …")] = None,
) -> None:
    """Serve a target with a judge in vLLM, for clients of OpenAI's interface. Other options go to vLLM's server."""
    words = server_words(pair, options, arguments or [])
    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here. Make an environment of its own in a checkout of this package: pip install "
            "'.[vllm]', or on a CPU tests/serving/environment.sh FOLDER."
        )
    with tempfile.TemporaryDirectory(prefix="selfjudge-metrics-") as metrics:
        # All processes write their metrics there, so that those of the worker are among those of the server.
        changed = {"VLLM_USE_V2_MODEL_RUNNER": "0", "PROMETHEUS_MULTIPROC_DIR": metrics}
        if (library := Path(sys.prefix) / "lib" / OPENMP).is_file():
            changed["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
        say(shlex.join([*(f"{name}={value}" for name, value in changed.items()), "python", *words]))
        inherited = {name: value for name, value in os.environ.items() if (name, value) != SILENT}
        servers: list[subprocess.Popen] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: [server.send_signal(number) for server in servers])
        # In a session of its own it gets these signals once, from here.
        servers.append(subprocess.Popen([sys.executable, *words], env=inherited | changed, start_new_session=True))
        code = servers[0].wait()
    sys.exit(code if code >= 0 else 128 - code)  # as a shell tells which signal ended it


def server_words(pair: str, options: ServeOptions, arguments: Sequence[str]) -> list[str]:
    """
    What follows `python` in the command that starts vLLM's server.

    Raises:
        ValueError: If an option has a value that it cannot have; says so before vLLM starts.
    """
    for argument in arguments:
        if argument.partition("=")[0].partition(".")[0].replace("_", "-") in REFUSED:
            raise ValueError(
                f"`{argument}` is set by this command. To set it yourself, run `vllm serve`; see the docs."
            )
    if not isinstance(options.draft_length, int) or options.draft_length < 1:
        raise ValueError(f"`--draft-length` must be a number of tokens, 1 or more, got {options.draft_length!r}.")
    target, draft = parse_pair(pair, with_draft=False)
    serving = options.config(target, draft)
    Rules(serving)  # refuses what cannot be served
    drafts = {"num_speculative_tokens": options.draft_length}
    # Prompt lookup matches as many tokens as that of transformers.
    drafts |= (
        {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2} if draft is None else {"model": draft}
    )
    given = {name: value for name, value in vars(serving).items() if value is not None and value is not False}
    ours = (json.dumps(drafts), WORKER, json.dumps({KEY: given}))
    own = (word for pair in zip(OURS, ours, strict=True) for word in pair)
    return ["-m", SERVER, "--model", target, *own, *arguments]
