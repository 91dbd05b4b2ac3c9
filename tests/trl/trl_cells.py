"""The matrix of TRL trainers as data: one `Cell` for each trainer and way of using it, with the variants it stands for.

Says nothing of what should come out: `trl_runner.run` finds that out.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl import DPOConfig

from models import build
from peft_onelayer.rl.ema import EMAAdapterCallback, EMATeacherMixin

LAYERS, LAYER = 3, 1


def reward(completions, **_) -> list[float]:
    """Differs from completion to completion, so that the advantages are not zero."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 17) for text in texts]


def zero_or_one(completions, **_) -> list[float]:
    """A*-PO and SDPO look for right and wrong completions."""
    return [value % 2 for value in reward(completions)]


def chat(role: str, texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


PROMPTS, GOOD, BAD = ["one", "two", "three", "four"], ["abc", "defg", "hij", "klm"], ["nop", "q", "rstu", "vw"]
DATA: dict[str, dict[str, list]] = {
    "prompt": {"prompt": PROMPTS},
    "chat": {"prompt": chat("user", PROMPTS)},
    "preference": {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD},
    "three answers": {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD, "reference": PROMPTS},
    "label": {"prompt": PROMPTS, "completion": GOOD, "label": [True, False, True, False]},
    "text": {"text": [f"{a} {b}" for a, b in zip(PROMPTS, GOOD, strict=True)]},
    "context": {"prompt": PROMPTS, "privileged_context": GOOD},
    "messages": {"messages": [q + a for q, a in zip(chat("user", PROMPTS), chat("assistant", GOOD), strict=True)]},
}


def teacher(tokenizer, folder: Path, dtype) -> dict[str, Any]:
    """Another model than the student's base, with its tokenizer in a folder: some trainers compare the two."""
    model = build(num_layers=LAYERS, seed=7, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return {"teacher_model": model}


def rewarded(function: Callable = reward) -> Callable[..., dict[str, Any]]:
    return lambda *_: {"reward_funcs": function}


def nothing(*_) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Cell:
    """One trainer and a way of using it.

    Args:
        path: module and class of the trainer, inside `trl`.
        data: key of `DATA`.
        mode: what sets the cell apart from the trainer's others, for the table.
        options: fields of the trainer's configuration.
        axes: fields with several values each; the cell stands for all combinations.
        extra: further arguments of the trainer, made from the tokenizer, an empty folder and the base's dtype.
        zero_at_first: a logged number that is zero only as long as the policy equals its reference.
        head: the model classifies sequences, and PEFT trains its head beside the adapter.
        mixin: a class of ours put in front of the trainer.
        follower: the adapter that follows the trained one.
        by_name: the trainer loads the model itself, from a name or a folder.
        slow: whether one run takes more than a few seconds.
    """

    path: str
    data: str
    mode: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple] = field(default_factory=dict)
    extra: Callable[..., dict[str, Any]] = nothing
    zero_at_first: str | None = None
    head: bool = False
    mixin: type | None = None
    follower: str | None = None
    by_name: bool = False
    slow: bool = False

    @property
    def trainer(self) -> type:
        return self._load(self.name)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def config(self) -> type:
        # The experimental DPO, which only changes what callbacks are told, has no configuration of its own.
        return DPOConfig if self.name == "DPOTrainer" else self._load(self.name.replace("Trainer", "Config"))

    def _load(self, name: str) -> type:
        module = "trl." + self.path.rpartition(".")[0]
        return getattr(importlib.import_module(module.rstrip(".")), name)

    @property
    def title(self) -> str:
        """The trainer's name in the table."""
        return self.name + (" (experimental)" if self.path.startswith("experimental") else "")

    def variants(self) -> list[dict[str, Any]]:
        """The values of the axes, one dict for each combination."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def label(self, variant: dict[str, Any] | None = None) -> str:
        """The table's text for one variant, or for all of them."""
        axes = {k: (v,) for k, v in variant.items()} if variant is not None else self.axes
        listed = [f"{name} " + ", ".join(str(value) for value in values) for name, values in axes.items()]
        return "; ".join([self.mode, *listed] if self.mode else listed) or "defaults"


GENERATE = {"num_generations": 4, "max_completion_length": 6}
SHORT = {"max_completion_length": 6}
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
KTO_LOSSES = ("kto", "apo_zero_unpaired")

KL, MARGIN = "kl", "rewards/margins"
REFERENCE = {**GENERATE, "beta": 0.05}


def grpo(mode: str = "", path: str = "GRPOTrainer", **options) -> Cell:
    return Cell(path, "prompt", mode, {**REFERENCE, **options}, {}, rewarded(), KL)


def dpo(mode: str = "", axes: dict | None = None, **options) -> Cell:
    return Cell("DPOTrainer", "preference", mode, options, axes or {}, zero_at_first=MARGIN)


def kto(mode: str = "", axes: dict | None = None, **options) -> Cell:
    return Cell("KTOTrainer", "label", mode, options, axes or {}, zero_at_first=MARGIN)


def sdpo(mode: str = "", axes: dict | None = None, **options) -> Cell:
    options = {**GENERATE, **options}
    return Cell("experimental.sdpo.SDPOTrainer", "context", mode, options, axes or {}, rewarded(zero_or_one))


def sdft(mode: str = "", axes: dict | None = None, **options) -> Cell:
    options = {**GENERATE, "distillation_topk": 8, **options}  # of 64 tokens
    return Cell("experimental.sdft.SDFTTrainer", "context", mode, options, axes or {})


def following(cell: Cell) -> Cell:
    """With the reference moving after the policy, by our callback in place of `sync_ref_model`."""

    def extra(*args) -> dict[str, Any]:
        return {**cell.extra(*args), "callbacks": [EMAAdapterCallback(rate=0.5, every=1)]}

    return replace(cell, mode="EMAAdapterCallback of peft_onelayer.rl", extra=extra, follower="ref")


def taught(cell: Cell) -> Cell:
    return replace(
        cell, mode=f"{cell.mode}, EMATeacherMixin of peft_onelayer.rl", mixin=EMATeacherMixin, follower="teacher"
    )


def bema(*_) -> dict[str, Any]:
    from trl.experimental.bema_for_ref_model import BEMACallback

    return {"callbacks": [BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)]}


CELLS = [
    Cell("GRPOTrainer", "prompt", "beta 0", GENERATE, {"loss_type": GRPO_LOSSES}, rewarded()),
    Cell("GRPOTrainer", "prompt", "beta > 0", REFERENCE, {"loss_type": GRPO_LOSSES}, rewarded(), KL),
    grpo("num_iterations 2", num_iterations=2),
    grpo("importance_sampling_level sequence", importance_sampling_level="sequence", loss_type="grpo"),
    grpo("cast_lm_head_to_fp32", cast_lm_head_to_fp32=True),
    replace(grpo("use_transformers_continuous_batching", use_transformers_continuous_batching=True), slow=True),
    grpo("sync_ref_model", sync_ref_model=True, ref_model_sync_steps=1),
    following(grpo()),
    grpo("beta > 0", path="RLOOTrainer"),
    grpo("sync_ref_model", path="RLOOTrainer", sync_ref_model=True, ref_model_sync_steps=1),
    following(grpo(path="RLOOTrainer")),
    dpo(axes={"loss_type": DPO_LOSSES}, label_smoothing=0.1),
    dpo("several losses", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    dpo("precompute_ref_log_probs", precompute_ref_log_probs=True),
    dpo("sync_ref_model", sync_ref_model=True, ref_model_sync_steps=1),
    following(dpo()),
    kto(axes={"loss_type": KTO_LOSSES}),
    kto("precompute_ref_log_probs", precompute_ref_log_probs=True),
    kto("sync_ref_model", sync_ref_model=True, ref_model_sync_steps=1),
    following(kto()),
    Cell("RewardTrainer", "preference", head=True),
    Cell("SFTTrainer", "text", "", {}, {"loss_type": ("nll", "dft", "chunked_nll")}),
    Cell("SFTTrainer", "text", "packing", {"packing": True, "max_length": 32}),
    Cell("SFTTrainer", "text", "packing wrapped", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    Cell("SFTTrainer", "text", "padding_free", {"padding_free": True, "max_length": None}),
    Cell("SFTTrainer", "messages", "assistant_only_loss", {"assistant_only_loss": True}),
    Cell("DistillationTrainer", "prompt", "", SHORT, {"beta": (0.0, 0.5, 1.0)}, teacher),
    grpo("beta > 0", path="experimental.gmpo.GMPOTrainer"),
    Cell("experimental.a2po.A2POTrainer", "prompt", "", {**SHORT, "num_value_samples": 4}, extra=rewarded(zero_or_one)),
    Cell(
        "experimental.online_dpo.OnlineDPOTrainer",
        "prompt",
        "",
        {"max_new_tokens": 6, "max_length": 32},
        {"loss_type": ("sigmoid", "ipo")},
        rewarded(),
        MARGIN,
    ),
    Cell("experimental.orpo.ORPOTrainer", "preference", "", {"max_length": 32}),
    Cell(
        "experimental.cpo.CPOTrainer",
        "preference",
        "",
        {"max_length": 32},
        {"loss_type": ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
    ),
    Cell("experimental.tpo.TPOTrainer", "three answers", "", {}, {"loss_type": ("sigmoid", "hinge", "ipo", "tpo-l")}),
    Cell("experimental.bema_for_ref_model.DPOTrainer", "preference", "BEMACallback", extra=bema),
    sdpo(axes={"teacher_model_kind": ("base", "live")}),
    sdpo(
        "policy loss",
        axes={"loss_type": ("grpo", "bnpo", "dr_grpo", "dapo")},
        teacher_model_kind="base",
        distillation_weight=0.5,
    ),
    sdpo("teacher_model_kind ema", teacher_model_kind="ema"),
    taught(sdpo("teacher_model_kind ema", teacher_model_kind="ema")),
    sdft(axes={"teacher_model_kind": ("base", "live")}),
    sdft("teacher_model_kind ema", teacher_model_kind="ema"),
    taught(sdft("teacher_model_kind ema", teacher_model_kind="ema")),
    Cell("experimental.gkd.GKDTrainer", "messages", "", {"max_new_tokens": 6}, {"lmbda": (0.0, 1.0)}, teacher),
    Cell("experimental.gold.GOLDTrainer", "messages", "", SHORT, {"lmbda": (0.0, 1.0)}, teacher),
    Cell("experimental.gold.GOLDTrainer", "messages", "use_uld_loss", {**SHORT, "use_uld_loss": True}, {}, teacher),
    Cell(
        "experimental.iw_opd.IWOPDTrainer",
        "messages",
        "",
        {**SHORT, "max_length": 32},
        {"distillation_objective": ("iw_opd", "jsd")},
        teacher,
    ),
]

# Run in processes of their own by test_trl_servers.py, against stand-ins of the servers.
SERVED = "against a stand-in of its server"
SERVER_CELLS = [
    Cell(
        "experimental.async_grpo.AsyncGRPOTrainer",
        "chat",
        SERVED,
        {**GENERATE, "dtype": "float32"},
        extra=rewarded(),
        by_name=True,
    ),
    Cell(
        "experimental.async_distillation.AsyncDistillationTrainer",
        "chat",
        SERVED,
        # FlashAttention, the default, runs on a GPU only.
        {**SHORT, "dtype": "float32", "model_init_kwargs": {"attn_implementation": "sdpa"}},
        by_name=True,
    ),
    Cell("experimental.server_distillation.ServerDistillationTrainer", "prompt", SERVED, {**SHORT, "beta": 0.0}),
    Cell(
        "experimental.iw_opd.IWOPDTrainer",
        "messages",
        f"use_teacher_server, {SERVED}",
        {**SHORT, "max_length": 32, "use_teacher_server": True},
    ),
]
