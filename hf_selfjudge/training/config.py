"""How a judge is trained: its label, what it looks at, and every option of transformers' trainer."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainingArguments

from ..judge.features import SCALARS, STATES


LABELS = ("changed", "flipped", "lost", "says_no", "likelihood", "confidence")
SCORES = ("likelihood", "confidence")  # in nats: what is above a threshold counts as changed
NONE = ["none"]  # how a command line says that a list is empty
BY_LENGTH = ("group_by_length", "batch_rebalance")  # sampling strategies that ask how long each text is


@dataclass
class JudgeConfig(TrainingArguments):
    r"""
    Configuration class for the [`JudgeTrainer`].

    This class includes only the parameters that are specific to judges, and those whose defaults differ from
    [`~transformers.TrainingArguments`].

    What cannot be obeyed is refused, with the reason, before anything is trained ([`check_options`]):
    `label_smoothing_factor`, `neftune_noise_alpha`, `fp16_full_eval`, `bf16_full_eval`, `use_liger_kernel`, `fsdp`,
    `deepspeed`, `parallelism_config`, `optim_target_modules`, schedule-free optimizers, `optim_args` for an optimizer
    without any, `label_names`, `length_column_name`, and `fp16` on a CPU; on mined features also
    `activation_checkpointing`, `include_num_input_tokens_seen`, `inputs` among `include_for_metrics`, and sampling by
    length. With `push_to_hub`, the judge is published when it is saved: `hub_strategy` is `"end"`, and another one for
    checkpoints is refused. At evaluation no row is dropped, whatever `dataloader_drop_last` says. As
    `metric_for_best_model`, `false_accept_rate` is the better the lower, unless `greater_is_better` is set.

    Parameters:
        > Parameters that control the label

        label (`str`, *optional*, defaults to `"changed"`):
            What the judge predicts. `"changed"`: whether rewriting changed the final number or the passing of tests
            where that is known, else how much of the wording it lost; `"flipped"`: the former alone; `"lost"`: the
            latter alone; `"says_no"`: the target's own probability that both answers do not say the same;
            `"likelihood"` and `"confidence"`: the suffix scores of SelfJudge and of its published code, which need no
            rewrite.
        label_threshold (`float`, *optional*):
            For `"likelihood"` and `"confidence"`: what is above it counts as changed, nats. By default their median.

        > Parameters that control the judge

        scalars (`list[str]`, *optional*, defaults to all):
            Scalar features that it looks at; `"none"` for none.
        states (`list[str]`, *optional*, defaults to all):
            Hidden states that it looks at; `"none"` for none.
        components (`int`, *optional*, defaults to `64`):
            Principal components that are kept of each hidden state, at most its dimensions.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `1e-2`):
            Initial learning rate of the AdamW optimizer.
        max_steps (`int`, *optional*, defaults to `500`):
            Steps of training.
        num_train_epochs (`float`, *optional*, defaults to `0`):
            Passes over the labels, instead of `max_steps` if it is not 0.
        per_device_train_batch_size (`int`, *optional*, defaults to `256`):
            Substitutions (through the model: answers) of a training batch on each device.
        per_device_eval_batch_size (`int`, *optional*, defaults to `256`):
            The same for evaluation.
        prior (`float`, *optional*, defaults to `0.01`):
            Variance of the Gaussian prior on the head's weights: few labels are trusted less than many. Infinity is
            no prior.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            How the learning rate falls.
        logging_steps (`float`, *optional*, defaults to `100`):
            Steps between two logs.
        save_strategy (`str`, *optional*, defaults to `"no"`):
            When to write checkpoints. On mined features there is nothing to lose: training takes seconds.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Whether several processes look for parameters without a gradient: a judge has none.
        report_to (`str`, *optional*, defaults to `"none"`):
            Integrations to report to.
    """

    label: str = field(
        default="changed",
        metadata={
            "help": "What the judge predicts. 'changed': whether rewriting changed the final number or the passing of "
            "tests where that is known, else how much of the wording it lost; 'flipped': the former alone; 'lost': "
            "the latter alone; 'says_no': the target's own probability that both answers do not say the same; "
            "'likelihood' and 'confidence': the suffix scores of SelfJudge and of its published code, which need no "
            "rewrite."
        },
    )
    label_threshold: float | None = field(
        default=None,
        metadata={
            "help": "For 'likelihood' and 'confidence': what is above it counts as changed, nats. By default their "
            "median."
        },
    )
    scalars: list[str] = field(
        default_factory=lambda: list(SCALARS), metadata={"help": "Scalar features that it looks at; 'none' for none."}
    )
    states: list[str] = field(
        default_factory=lambda: list(STATES), metadata={"help": "Hidden states that it looks at; 'none' for none."}
    )
    components: int = field(
        default=64,
        metadata={"help": "Principal components that are kept of each hidden state, at most its dimensions."},
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Initial learning rate of the AdamW optimizer."})
    max_steps: int = field(default=500, metadata={"help": "Steps of training."})
    num_train_epochs: float = field(
        default=0, metadata={"help": "Passes over the labels, instead of 'max_steps' if it is not 0."}
    )
    per_device_train_batch_size: int = field(
        default=256,
        metadata={"help": "Substitutions (through the model: answers) of a training batch on each device."},
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "The same for evaluation."})
    prior: float = field(
        default=0.01,
        metadata={
            "help": "Variance of the Gaussian prior on the head's weights: few labels are trusted less than many. "
            "Infinity is no prior."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(
        default="no",
        metadata={
            "help": "When to write checkpoints. On mined features there is nothing to lose: training takes seconds."
        },
    )
    ddp_find_unused_parameters: bool = field(
        default=False,
        metadata={"help": "Whether several processes look for parameters without a gradient: a judge has none."},
    )
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})

    def __post_init__(self):
        if self.label not in LABELS:
            raise ValueError(f"`label` must be one of {', '.join(LABELS)}, got {self.label!r}.")
        if self.label_threshold is not None and self.label not in SCORES:
            raise ValueError(f"`label_threshold` is for the labels {' and '.join(SCORES)}, not {self.label!r}.")
        if self.num_train_epochs:
            self.max_steps = -1
        if self.metric_for_best_model is not None and self.metric_for_best_model.endswith("false_accept_rate"):
            self.greater_is_better = bool(self.greater_is_better)  # transformers takes all but losses for scores
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"`label_names`: the label is chosen by `label`, got {self.label_names}. Leave it out.")
        if self.push_to_hub:
            if self.hub_strategy in ("checkpoint", "all_checkpoints"):
                raise ValueError("`hub_strategy`: checkpoints are not published, only the judge. Leave it out.")
            self.hub_strategy = "end"  # what is published is the judge, not the folder with its checkpoints
        for name, known in (("scalars", SCALARS), ("states", STATES)):
            names = getattr(self, name)
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"`{name}` must be a list of names, or 'none', got {names!r}.")
            names = [] if list(names) == NONE else list(names)
            if unknown := set(names) - set(known):
                raise ValueError(f"`{name}` must be among {', '.join(known)}, got {', '.join(sorted(unknown))}.")
            setattr(self, name, names)
        if not self.scalars and not self.states:
            raise ValueError("`scalars` and `states` are both empty. Give the judge something to look at.")
        if not isinstance(self.components, int) or isinstance(self.components, bool) or self.components < 1:
            raise ValueError(f"`components` must be a whole number, 1 or more, got {self.components!r}.")
        if not self.prior > 0:
            raise ValueError(f"`prior` must be a variance above 0, got {self.prior}.")
        self.label_names = ["labels"]
        # Rows are small, and on a machine without a GPU there is nothing to pin them for.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


def check_options(args: JudgeConfig, through_model: bool, evaluates: bool, own_metrics: bool) -> None:
    """
    Args:
        through_model (`bool`): Whether the target itself is read.
        evaluates (`bool`): Whether there are labels to evaluate on.
        own_metrics (`bool`): Whether the measures at evaluation are the caller's.

    Raises:
        ValueError: If one of the options would not be obeyed; names it, and says why.
    """
    plain = args.optim.startswith(("adamw_torch", "adafactor"))
    every = (args.save_strategy == "steps", args.load_best_model_at_end, args.save_steps != args.eval_steps)
    measures = "the measures need the log-odds of all rows at once. Pass `compute_metrics` of your own"
    whole = "a judge is small, and stays whole on each device: start several processes without it, they share the rows"
    text = "on mined features no text is read. Leave it out, or train through the model"
    rules = {
        "label_smoothing_factor": (args.label_smoothing_factor, "labels are soft already. Leave it out"),
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "no noise shall be in the target's states"),
        "fp16_full_eval": (args.fp16_full_eval, "a judge is kept in fp32. Load the target in another type"),
        "bf16_full_eval": (args.bf16_full_eval, "a judge is kept in fp32. Load the target in another type"),
        "fp16": (
            args.fp16 and args.device.type == "cpu",
            "a CPU has none. Leave it out, or set `bf16` and `use_cpu`",
        ),
        "use_liger_kernel": (args.use_liger_kernel, "kernels go into the target before it is passed. Leave it out"),
        **{name: (getattr(args, name), whole) for name in ("fsdp", "deepspeed", "parallelism_config")},
        "optim_target_modules": (args.optim_target_modules, "no whole matrices of the target are trained"),
        "optim": (args.optim.startswith("schedule_free"), "its weights in training are not those to keep"),
        "optim_args": (args.optim_args and plain, f"{args.optim.value} does not look at it"),
        "length_column_name": (args.length_column_name != "length", "lengths are counted, no column is looked at"),
        "activation_checkpointing": (
            args.activation_checkpointing and not through_model,
            f"{text}. `gradient_checkpointing` is its older name",
        ),
        "include_num_input_tokens_seen": (args.include_num_input_tokens_seen != "no" and not through_model, text),
        "include_for_metrics": ("inputs" in args.include_for_metrics and not through_model, text),
        "train_sampling_strategy": (args.train_sampling_strategy in BY_LENGTH and not through_model, text),
        "eval_on_start": (args.eval_on_start and not evaluates, "there is no `eval_dataset`. Pass one"),
        "save_strategy": (
            args.save_strategy == "best" and args.eval_strategy == "no",
            "nothing says which is best. Set an `eval_strategy`",
        ),
        "save_steps": (
            all(every),
            f"the best judge might not be among the saved. Set it to `eval_steps` ({args.eval_steps})",
        ),
        "batch_eval_metrics": (args.batch_eval_metrics and not own_metrics, measures),
        "eval_do_concat_batches": (not args.eval_do_concat_batches and not own_metrics, measures),
    }
    for option, (refused, reason) in rules.items():
        if refused:
            raise ValueError(f"`{option}` is refused: {reason}.")
    for option in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"`{option}` must be 1 or more, got {getattr(args, option)}.")
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be a number above 0, got {args.learning_rate}.")
    if args.max_grad_norm is not None and not args.max_grad_norm >= 0:
        raise ValueError(f"`max_grad_norm` must be a number, 0 (no limit) or more, got {args.max_grad_norm}.")
    if not 0 <= args.weight_decay < math.inf:
        raise ValueError(f"`weight_decay` must be a number, 0 or more, got {args.weight_decay}.")


def check_steps(args: JudgeConfig, rows: int, known: np.ndarray) -> None:
    """
    Args:
        rows (`int`): Rows to train on; through the model, answers.
        known (`np.ndarray`): Their labels.

    Raises:
        ValueError: If nothing could be learned from them: there would be no step, or all labels are the same.
    """
    asked = args.max_steps if args.max_steps >= 0 else args.num_train_epochs
    if not 0 < asked < math.inf or (args.dataloader_drop_last and rows < args.train_batch_size * args.world_size):
        raise ValueError(f"Training needs a step, and an end: {steps_of(args, rows)}.")
    if np.ptp(known) == 0:
        raise ValueError(f"`label`: it is {known[0]:g} in all {len(known)} rows, so there is nothing to tell apart.")


def steps_of(args: JudgeConfig, rows: int) -> str:
    """What the number of steps depends on."""
    return (
        f"`max_steps` is {args.max_steps} and `num_train_epochs` {args.num_train_epochs:g}, there are {rows} rows for "
        f"batches of {args.train_batch_size} on each of {args.world_size} processes, and `dataloader_drop_last` is "
        f"{args.dataloader_drop_last}"
    )


def without_text(args: JudgeConfig) -> JudgeConfig:
    """The same training on mined features, where options about texts have no meaning."""
    args = copy.copy(args)
    args.activation_checkpointing, args.include_num_input_tokens_seen = False, "no"
    if args.train_sampling_strategy in BY_LENGTH:
        args.train_sampling_strategy = "random"
    return args
