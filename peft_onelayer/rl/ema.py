"""An adapter that follows the trained one: a moving reference policy, and the EMA teacher of self-distillation.

TRL keeps both as a second model, and refuses them for PEFT models (`sync_ref_model=True`) or makes them for LoRA only
(`teacher_model_kind="ema"`, whose adapter starts at zero: for LoRA that is the base, for a whole block no model at
all). Here they are a second adapter of the same model.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import TrainerCallback

from peft_onelayer.seams import check

TEACHER = "teacher"


def _pairs(model: PeftModel, source: str, target: str) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """The parameters of two adapters, side by side. An adapter may be named like a module ("mlp", "layers")."""
    named = dict(model.named_parameters())
    return [
        (parameter, named[name.replace(f".{holder}.{source}.", f".{holder}.{target}.")])
        for holder in ("single_layer_params", "modules_to_save")
        for name, parameter in named.items()
        if f".{holder}.{source}." in name
    ]


@torch.no_grad()
def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Give the adapter `target` the weights of `source`."""
    for parameter, copied in _pairs(model, source, target):
        copied.copy_(parameter)


class EMAAdapterCallback(TrainerCallback):
    """Moves one adapter towards another: target <- (1 - rate) * target + rate * source, every `every` steps.

    With the adapter "ref", which TRL's trainers make when they are given a PEFT model and a reference is needed, this
    is TR-DPO's soft update (arXiv 2404.09656), `sync_ref_model=True` for PEFT models.

    Args:
        target: the adapter that moves.
        rate: `ref_model_mixup_alpha` or `teacher_update_rate` of TRL's configurations; 1 copies.
        every: `ref_model_sync_steps` or `teacher_sync_steps`.
        source: the adapter that is trained.

    Raises:
        ValueError: at the start of training, if the model has no such adapters, or DeepSpeed ZeRO-3 holds their parts.
    """

    def __init__(self, target: str = "ref", rate: float = 0.6, every: int = 512, source: str = "default") -> None:
        self.target, self.rate, self.every, self.source = target, rate, every, source

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = extract_model_from_parallel(model)
        adapters = list(getattr(model, "peft_config", {}))
        if missing := {self.source, self.target} - set(adapters):
            raise ValueError(
                f"no adapter named {', '.join(sorted(missing))}, only {', '.join(adapters)}: hand the trainer a "
                "PeftModel. With peft_config= the reference is the base model, which must not move."
            )
        if any(p.numel() == 0 for pair in _pairs(model, self.source, self.target) for p in pair):
            raise ValueError("DeepSpeed ZeRO-3 holds the adapters in parts; use ZeRO-2 or FSDP2.")

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            for source, target in _pairs(extract_model_from_parallel(model), self.source, self.target):
                target.mul_(1.0 - self.rate).add_(source, alpha=self.rate)


class EMATeacherMixin:
    """`teacher_model_kind="ema"` for `SDPOTrainer` and `SDFTTrainer` of trl.experimental and a single-layer adapter.

    The teacher is an adapter `TEACHER` that starts as a copy of the student's and follows it at
    `args.teacher_update_rate`, every `args.teacher_sync_steps` steps.

    Example:

        ```py
        class Trainer(EMATeacherMixin, SDPOTrainer): ...
        ```
    """

    args: Any
    model: Any
    accelerator: Any
    teacher_model: Any
    add_callback: Any

    def __init_subclass__(cls) -> None:
        check(__name__)
        super().__init_subclass__()

    def _use_peft_ema_teacher_adapter(self) -> bool:
        # trl.experimental.sdpo.sdpo_trainer asks this where it chooses the teacher's weights.
        return self.args.teacher_model_kind == "ema"

    def _setup_teacher_model(self) -> None:
        if not self._use_peft_ema_teacher_adapter():
            super()._setup_teacher_model()  # type: ignore[misc]
            return
        model = self.accelerator.unwrap_model(self.model)
        student = model.active_adapter
        model.add_adapter(TEACHER, model.peft_config[student])
        copy_adapter(model, student, TEACHER)
        self.teacher_model = self.model
        self.add_callback(
            EMAAdapterCallback(TEACHER, self.args.teacher_update_rate, self.args.teacher_sync_steps, student)
        )
