"""Options of training: those of judges, and all options of transformers' trainer. An option that the trainer would
not obey is refused before anything is trained."""

from __future__ import annotations

import copy
import math
from dataclasses import Field, dataclass, field

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.utils.versions import require_version

from ..judge.features import SCALARS, STATES


LABELS = ("changed", "flipped", "lost", "says_no", "likelihood", "confidence")
SCORES = ("likelihood", "confidence")  # in nats; a score above a threshold counts as changed
NONE = ["none"]  # an empty list on the command line
BY_LENGTH = ("group_by_length", "batch_rebalance")  # sampling strategies that need the length of each text


def option(default: object, help: str, **metadata: object) -> Field:
    """A field with a help text. A tuple as `default` becomes a new list for each object."""
    own = {"default_factory": lambda: list(default)} if isinstance(default, tuple) else {"default": default}
    return field(**own, metadata={"help": help, **metadata})


def check(valid: bool, name: str, expected: str, value: object) -> None:
    """Refuse a value of an option that is not `valid`, and say what is `expected`."""
    if not valid:
        raise ValueError(f"`{name}` must be {expected}, got {value}.")


@dataclass
class JudgeConfig(TrainingArguments):
    """
    Options of the [`JudgeTrainer`]: those of [`~transformers.TrainingArguments`], some with other defaults, and
    `label`, `label_threshold`, `scalars`, `states`, `components` and `prior`. `hf-selfjudge train --help` explains
    each of them.

    Raises:
        ValueError: If an option has a value that it cannot have. Options that the trainer would not obey are refused
            by the trainer ([`check_options`]).
    """

    output_dir: str | None = option(None, "Folder for the judge and its checkpoints.", aliases=["--output"])
    label: str = option(
        "changed",
        "What the judge predicts. 'changed': whether rewriting changed the final answer or the passing of tests where "
        "that is known, else how much of the wording it lost; 'flipped': only the former; 'lost': only the latter; "
        "'says_no': the target's own probability that both answers do not say the same; 'likelihood' and "
        "'confidence': the suffix scores of the SelfJudge paper and of its published code, which need no rewrite.",
    )
    label_threshold: float | None = option(
        None, "For 'likelihood' and 'confidence': a score above it counts as changed, nats. By default their median."
    )
    scalars: list[str] = option(SCALARS, "Scalar features that the judge uses; 'none' for none.")
    states: list[str] | None = option(
        None,
        "Hidden states that the judge uses; 'none' for none. By default those before and after the substitute and, if "
        "all labels are of rounds, those ahead of it.",
    )
    components: int = option(64, "Principal components kept of each hidden state, at most its dimensions.")
    prior: float = option(
        0.01,
        "Variance of the Gaussian prior on the head's weights. It counts more with fewer labels. Infinity: none.",
    )
    learning_rate: float = option(1e-2, "Initial learning rate of the optimizer.")
    max_steps: int = option(500, "Steps of training.")
    num_train_epochs: float = option(0, "Passes over the labels, instead of 'max_steps' if it is not 0.")
    per_device_train_batch_size: int = option(
        256, "Substitutions (through the model: answers) in a training batch on each device."
    )
    per_device_eval_batch_size: int = option(256, "The same for evaluation.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls.")
    logging_steps: float = option(100, "Steps between two logs.")
    save_strategy: str = option("no", "When to write checkpoints. On mined features training takes seconds.")
    ddp_find_unused_parameters: bool = option(
        False, "Whether several processes look for parameters without a gradient: a judge has none."
    )

    def __post_init__(self):
        require_version("transformers>=5.20", "Training needs it; decoding and serving do not.")
        check(self.label in LABELS, "label", f"one of {', '.join(LABELS)}", repr(self.label))
        if self.label_threshold is not None and self.label not in SCORES:
            raise ValueError(f"`label_threshold` is for the labels {' and '.join(SCORES)}, not {self.label!r}.")
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"`label_names`: the label is chosen by `label`, got {self.label_names}. Leave it out.")
        for name, known in (("scalars", SCALARS), ("states", STATES)):
            value = getattr(self, name)
            if value is None and name == "states":
                continue
            names = [value] if isinstance(value, str) else value
            names = [] if names == NONE else names
            valid = isinstance(names, list | tuple) and all(part in known for part in names)
            check(valid, name, f"'none' or a list of {', '.join(known)}", repr(value))
            setattr(self, name, list(names))
        if not self.scalars and self.states == []:
            raise ValueError("`scalars` and `states` are both empty. Give the judge at least one feature.")
        whole = type(self.components) is int
        check(whole and self.components >= 1, "components", "a whole number, 1 or more", repr(self.components))
        check(self.prior > 0, "prior", "a variance above 0", self.prior)
        if self.num_train_epochs:
            self.max_steps = -1
        if self.metric_for_best_model is not None and self.metric_for_best_model.endswith("false_accept_rate"):
            # Lower is better. transformers would take the higher one for every name that does not end in "loss".
            self.greater_is_better = bool(self.greater_is_better)
        if self.push_to_hub:
            if self.hub_strategy in ("checkpoint", "all_checkpoints"):
                raise ValueError("`hub_strategy`: checkpoints are not published, only the judge. Leave it out.")
            self.hub_strategy = "end"  # the judge is published, not the folder with its checkpoints
        self.label_names = ["labels"]
        # Rows are small, and without a GPU there is nothing to pin them for.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        # Without a launcher transformers would copy the model to every GPU in each step, and multiply the batch.
        self._n_gpu = min(1, self.n_gpu)


def with_options(args: JudgeConfig, **options: object) -> JudgeConfig:
    """A copy of checked options with other values. They are not checked again."""
    args = copy.copy(args)
    vars(args).update(options)
    return args


def check_options(args: JudgeConfig, through_model: bool, evaluates: bool, own_metrics: bool) -> None:
    """
    Check options for a training: `through_model` or on mined features, with an `eval_dataset` if it `evaluates`, with
    a `compute_metrics` if it has `own_metrics`.

    Raises:
        ValueError: If an option would not be obeyed, or is out of its range.
    """
    fp32 = "a judge is kept in fp32. Load the target in another type"
    replicated = "a judge is small and stays whole on each device. Start several processes without it"
    no_text = "on mined features no text is read. Leave it out, or train through the model"
    older_name = f"{no_text}. `gradient_checkpointing` is its older name"
    no_best = "there is no evaluation to say which judge is best. Set an `eval_strategy`"
    best_unsaved = args.save_strategy == "steps" and args.load_best_model_at_end and args.save_steps != args.eval_steps
    at_once = "the metrics need the log-odds of all rows at once. Pass `compute_metrics` of your own"
    on_features, adaptive = not through_model, args.optim.startswith(("adamw_torch", "adafactor"))
    refusals = [
        ("label_smoothing_factor", args.label_smoothing_factor, "labels are soft already. Leave it out"),
        ("neftune_noise_alpha", args.neftune_noise_alpha is not None, "the target's states must have no noise"),
        ("fp16_full_eval", args.fp16_full_eval, fp32),
        ("bf16_full_eval", args.bf16_full_eval, fp32),
        ("fp16", args.fp16 and args.device.type == "cpu", "a CPU has none. Leave it out, or set `bf16` and `use_cpu`"),
        ("use_liger_kernel", args.use_liger_kernel, "put kernels into the target before you pass it. Leave it out"),
        *((name, getattr(args, name), replicated) for name in ("fsdp", "deepspeed", "parallelism_config")),
        ("optim_target_modules", args.optim_target_modules, "no whole matrices of the target are trained"),
        ("optim", args.optim.startswith("schedule_free"), "its weights in training are not those to keep"),
        ("optim_args", args.optim_args and adaptive, f"{args.optim.value} takes none"),
        ("length_column_name", args.length_column_name != "length", "lengths are counted, not read from a column"),
        ("activation_checkpointing", args.activation_checkpointing and on_features, older_name),
        ("include_num_input_tokens_seen", args.include_num_input_tokens_seen != "no" and on_features, no_text),
        ("include_for_metrics", "inputs" in args.include_for_metrics and on_features, no_text),
        ("train_sampling_strategy", args.train_sampling_strategy in BY_LENGTH and on_features, no_text),
        ("eval_on_start", args.eval_on_start and not evaluates, "there is no `eval_dataset`. Pass one"),
        ("save_strategy", args.save_strategy == "best" and args.eval_strategy == "no", no_best),
        ("save_steps", best_unsaved, f"the best judge might not be saved. Set it to `eval_steps` ({args.eval_steps})"),
        ("batch_eval_metrics", args.batch_eval_metrics and not own_metrics, at_once),
        ("eval_do_concat_batches", not args.eval_do_concat_batches and not own_metrics, at_once),
    ]
    for name, refused, reason in refusals:
        if refused:
            raise ValueError(f"`{name}` is refused: {reason}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check(getattr(args, name) >= 1, name, "1 or more", getattr(args, name))
    check(0 < args.learning_rate < math.inf, "learning_rate", "a number above 0", args.learning_rate)
    check((args.max_grad_norm or 0) >= 0, "max_grad_norm", "a number, 0 (no limit) or more", args.max_grad_norm)
    check(0 <= args.weight_decay < math.inf, "weight_decay", "a number, 0 or more", args.weight_decay)


def check_steps(args: JudgeConfig, rows: int, known: np.ndarray) -> None:
    """
    Check a training on a number of `rows` (through the model: answers) with the labels `known`.

    Raises:
        ValueError: If there would be no step or no end of training, or all labels are the same.
    """
    length = args.max_steps if args.max_steps >= 0 else args.num_train_epochs
    if not 0 < length < math.inf or (args.dataloader_drop_last and rows < args.train_batch_size * args.world_size):
        raise ValueError(
            f"Training needs a step, and an end: `max_steps` is {args.max_steps} and `num_train_epochs` "
            f"{args.num_train_epochs:g}, there are {rows} rows for batches of {args.train_batch_size} on each of "
            f"{args.world_size} processes, and `dataloader_drop_last` is {args.dataloader_drop_last}."
        )
    if np.ptp(known) == 0:
        raise ValueError(f"`label`: it is {known[0]:g} in all {len(known)} rows, so there is nothing to tell apart.")
