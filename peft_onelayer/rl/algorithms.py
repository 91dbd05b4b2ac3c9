"""The algorithms of `onelayer train --algorithm`, as data: the TRL trainer behind a name, its paper's loss settings.

    load_algorithm("dr_grpo").settings  # {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, ...}

A name sets the loss: its type, scaling, clip, and the weight of the KL term. Batch sizes, learning rates and lengths
are the run's. TRL is imported only for the configuration and the trainer.

Figures of the papers were compared with the settings that TRL's documentation gives for them ("paper index"), where it
lists the paper. A field that a paper says nothing about keeps TRL's default.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DataKind = Literal["task", "preference", "unpaired", "demonstration", "triple", "context"]


@dataclass(frozen=True)
class Algorithm:
    """An algorithm as the run takes it.

    Attributes:
        name: of `--algorithm`.
        trainer: import path of the trainer; its configuration has the same path with "Config" for "Trainer".
        settings: fields of the configuration that the paper sets.
        data: what it trains on. "task": prompts and a reward, generated and graded while it trains. All others are
            offline, in the formats of `preferences.load_preferences`.
        source: arXiv number of the paper.
        note: what a user should know, one line; "" for nothing.
        completion_length: the field that limits a completion's tokens; None where nothing is generated.
        group_size: the field with the completions per prompt; None where there is none.
        environments: whether it takes an `environment_factory`, for tasks with turns.
        needs_environment: whether it trains on nothing else.
        takes_peft_config: whether the trainer has `peft_config=`; otherwise it is given a PEFT model.
        adapter_mixin: import path of a class to put in front of the trainer when an adapter is trained; "" for none.
        prompts_as_text: as of `Sampling`: how the trainer tokenizes prompts.
        takes_entropy: whether the loss is `GRPOTrainer`'s own, so that the top-entropy option applies.
    """

    name: str
    trainer: str
    data: DataKind
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    completion_length: str | None = None
    group_size: str | None = None
    environments: bool = False
    needs_environment: bool = False
    takes_peft_config: bool = True
    adapter_mixin: str = ""
    prompts_as_text: bool = False
    takes_entropy: bool = False

    @property
    def online(self) -> bool:
        """Whether it generates and grades completions itself."""
        return self.data == "task"

    @property
    def config_name(self) -> str:
        """The name of the configuration's class."""
        return self.trainer.rpartition(".")[2].removesuffix("Trainer") + "Config"

    @property
    def config_class(self) -> type[Any]:
        """The configuration, a subclass of transformers' `TrainingArguments`."""
        return _load(self.trainer.rpartition(".")[0] + "." + self.config_name)

    def trainer_class(self, *, adapter: bool = True) -> type[Any]:
        """The trainer; for an adapter with `adapter_mixin` in front of it."""
        trainer = _load(self.trainer)
        if not (adapter and self.adapter_mixin):
            return trainer
        return type(trainer.__name__, (_load(self.adapter_mixin), trainer), {})


def _load(path: str) -> type[Any]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _online(name: str, trainer: str, source: str, note: str = "", **settings: Any) -> Algorithm:
    return Algorithm(name, trainer, "task", source, settings, note, "max_completion_length", "num_generations")


def _grpo(name: str, source: str, note: str = "", *, trainer: str = "trl.GRPOTrainer", **settings: Any) -> Algorithm:
    """GRPO and what differs from it; its advantage divides by the group's standard deviation unless told otherwise."""
    return Algorithm(
        name,
        trainer,
        "task",
        source,
        {"scale_rewards": "group", **settings},
        note,
        "max_completion_length",
        "num_generations",
        environments=True,
        needs_environment=name == "gigpo",
        # GMPOTrainer has a `_compute_loss` of its own, and the other two losses divide by no number of tokens.
        takes_entropy=name not in ("gmpo", "dr_grpo", "luspo"),
    )


def _offline(name: str, trainer: str, data: DataKind, source: str, note: str = "", **settings: Any) -> Algorithm:
    return Algorithm(name, trainer, data, source, settings, note)


def _dpo(name: str, source: str, note: str = "", **settings: Any) -> Algorithm:
    return _offline(name, "trl.DPOTrainer", "preference", source, note, **settings)


def _cpo(name: str, source: str, **settings: Any) -> Algorithm:
    return _offline(name, "trl.experimental.cpo.CPOTrainer", "preference", source, **settings)


OFF_POLICY = (
    "differs from grpo only off policy: the paper makes four updates of a generation, which is steps_per_generation "
    "four times gradient_accumulation_steps (32 at the default step in one process); or --set num_iterations=2"
)
ZERO_OR_ONE = "looks for right and wrong completions: the reward should be 0 or 1"
PPO_CLIP: dict[str, Any] = {"epsilon": 0.2}
# The weight is that of arXiv 2607.01232, Table 8. The KL is the estimator of arXiv 2402.03300, eq. 4, without the
# importance weight of arXiv 2512.02556 that TRL multiplies it with by default.
PAPER_KL: dict[str, Any] = {"beta": 0.001, "use_bias_correction_kl": False}
NO_KL: dict[str, Any] = {"beta": 0.0}

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        _grpo("grpo", "2402.03300", loss_type="grpo", **PPO_CLIP, **PAPER_KL),
        _grpo("dr_grpo", "2503.20783", loss_type="dr_grpo", scale_rewards="none", **PPO_CLIP, **NO_KL),
        _grpo(
            "gigpo",
            "2505.10978",
            trainer="peft_onelayer.rl.gigpo.GiGPOTrainer",
            loss_type="grpo",
            gamma=0.95,
            omega=1.0,
            normalize="std",
            scale_rewards=None,  # follows `normalize`
            **PPO_CLIP,
            **PAPER_KL,
        ),
        _grpo(
            "dapo",
            "2503.14476",
            "without dynamic sampling, which TRL lacks, and without the soft punishment of long completions",
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            mask_truncated_completions=True,
            **NO_KL,
        ),
        _grpo("lite_ppo", "2508.08221", loss_type="dapo", scale_rewards="batch", **PPO_CLIP, **NO_KL),
        # TRL's name, without a paper of its own.
        _grpo(
            "bnpo", "2503.14476", "dapo's loss, normalized over the local batch", loss_type="bnpo", **PPO_CLIP, **NO_KL
        ),
        # The paper names no bound; 5 is that of arXiv 2510.13786. TRL clips at the value itself, not at 1 + value.
        _grpo("cispo", "2506.13585", loss_type="cispo", epsilon_high=5.0, **NO_KL),
        _grpo(
            "gspo",
            "2507.18071",
            OFF_POLICY,
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            **NO_KL,
        ),
        _grpo(
            "luspo",
            "2602.05261",
            loss_type="luspo",
            importance_sampling_level="sequence",
            epsilon=2e-3,
            epsilon_high=2.5e-3,
            **NO_KL,
        ),
        _grpo("sapo", "2511.20347", loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, **NO_KL),
        _grpo(
            "vespo",
            "2602.10693",
            loss_type="vespo",
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            vllm_importance_sampling_mode="token_truncate",  # TRL refuses vespo with its default under vLLM
            **NO_KL,
        ),
        # The clip is of the logarithm of the ratio.
        _grpo("gmpo", "2507.20673", trainer="trl.experimental.gmpo.GMPOTrainer", epsilon=0.4, **NO_KL),
        _online("rloo", "trl.RLOOTrainer", "2402.14740", beta=0.03, normalize_advantages=False),
        _online(
            "reinforce_pp",
            "trl.RLOOTrainer",
            "2501.03262",
            "an approximation: rloo with advantages normalized over the batch",
            normalize_advantages=True,
        ),
        Algorithm(
            "a2po",
            "trl.experimental.a2po.A2POTrainer",
            "task",
            "2505.20686",
            {"beta1": 0.5, "beta2": 1e-3, "num_value_samples": 8},
            ZERO_OR_ONE,
            "max_completion_length",
            takes_peft_config=False,
            prompts_as_text=True,
        ),
        Algorithm(
            "online_dpo",
            "trl.experimental.online_dpo.OnlineDPOTrainer",
            "task",
            "2402.04792",
            {"loss_type": "sigmoid", "beta": 0.1},
            completion_length="max_new_tokens",
            prompts_as_text=True,
        ),
        Algorithm(
            "sdpo",
            "trl.experimental.sdpo.SDPOTrainer",
            "task",
            "2601.20802",
            {"teacher_model_kind": "ema", "distillation_weight": 1.0, "success_reward_threshold": 1.0},
            ZERO_OR_ONE,
            "max_completion_length",
            "num_generations",
            adapter_mixin="peft_onelayer.rl.ema.EMATeacherMixin",
        ),
        Algorithm(
            "sdft",
            "trl.experimental.sdft.SDFTTrainer",
            "context",
            "2601.19897",
            {"teacher_model_kind": "ema"},
            completion_length="max_completion_length",
            group_size="num_generations",
            adapter_mixin="peft_onelayer.rl.ema.EMATeacherMixin",
        ),
        _dpo("dpo", "2305.18290", loss_type=["sigmoid"], beta=0.1),
        _dpo("dpo_norm", "2411.15124", "dpo, normalized by length", loss_type=["sigmoid_norm"], beta=5.0),
        _dpo("ipo", "2310.12036", loss_type=["ipo"]),
        _dpo("slic", "2305.10425", loss_type=["hinge"]),
        _dpo(
            "rso",
            "2309.06657",
            "the loss only; the rejection sampling of the pairs is the data's",
            loss_type=["hinge"],
            beta=0.05,
        ),
        _dpo("exo", "2402.00856", loss_type=["exo_pair"], beta=0.1, label_smoothing=1e-3),
        _dpo("nca", "2402.05369", loss_type=["nca_pair"], beta=0.01),
        _dpo("robust_dpo", "2403.00409", loss_type=["robust"], beta=0.01, label_smoothing=0.1),
        _dpo("bco", "2404.04656", loss_type=["bco_pair"], beta=0.01),
        _dpo("sppo", "2405.00675", loss_type=["sppo_hard"], beta=1e-3),
        _dpo("aot", "2406.05882", loss_type=["aot"]),
        _dpo("aot_unpaired", "2406.05882", loss_type=["aot_unpaired"]),
        _dpo("apo_zero", "2408.06266", loss_type=["apo_zero"], beta=0.1),
        _dpo("apo_down", "2408.06266", loss_type=["apo_down"], beta=0.1),
        _dpo("discopop", "2406.08414", loss_type=["discopop"], beta=0.05, discopop_tau=0.05),
        _dpo("rpo", "2405.16436", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.005], beta=0.01),
        _dpo("mpo", "2411.10442", loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
        _offline(
            "kto",
            "trl.KTOTrainer",
            "unpaired",
            "2402.01306",
            "needs per_device_train_batch_size of 2 or more",
            loss_type="kto",
            beta=0.1,
            desirable_weight=1.0,
            undesirable_weight=1.0,
        ),
        _offline(
            "apo_zero_unpaired", "trl.KTOTrainer", "unpaired", "2408.06266", loss_type="apo_zero_unpaired", beta=0.1
        ),
        _cpo("cpo", "2401.08417", loss_type="sigmoid", beta=0.1, cpo_alpha=1.0),
        _cpo("simpo", "2405.14734", loss_type="simpo", beta=2.5, simpo_gamma=1.375, cpo_alpha=0.0),
        # What CPOConfig makes of loss_type="alphapo".
        _cpo("alphapo", "2501.03884", loss_type="simpo", beta=2.5, simpo_gamma=0.1, alpha=0.25, cpo_alpha=0.0),
        _offline("orpo", "trl.experimental.orpo.ORPOTrainer", "preference", "2403.07691", beta=0.1),
        _offline(
            "tpo",
            "trl.experimental.tpo.TPOTrainer",
            "triple",
            "2405.16681",
            loss_type="sigmoid",
            beta=0.01,
            tpo_alpha=1.0,
        ),
        _offline("sft", "trl.SFTTrainer", "demonstration", "2203.02155", loss_type="nll"),
        _offline("dft", "trl.SFTTrainer", "demonstration", "2508.05629", loss_type="dft"),
    )
}

TEACHER = "it distills a second, teacher model"
NOT_OFFERED = {
    "trl.RewardTrainer": "it trains a reward model, not a policy",
    "trl.DistillationTrainer": TEACHER,
    "trl.experimental.gkd.GKDTrainer": TEACHER,
    "trl.experimental.gold.GOLDTrainer": TEACHER,
    "trl.experimental.iw_opd.IWOPDTrainer": TEACHER,
    "trl.experimental.server_distillation.ServerDistillationTrainer": TEACHER + " behind a server",
    "trl.experimental.async_distillation.AsyncDistillationTrainer": TEACHER + " behind a server",
    "trl.experimental.async_grpo.AsyncGRPOTrainer": "it generates with a vLLM server, which must be started beside it",
    "trl.experimental.bema_for_ref_model.DPOTrainer": "it is dpo, prepared for BEMACallback, which moves the reference",
}


def load_algorithm(name: str) -> Algorithm:
    """Return the algorithm `name`.

    Raises:
        ValueError: for an unknown name, with the near ones and all others; for a trainer of TRL that is not offered,
            with the reason.

    >>> load_algorithm("gspo").settings["importance_sampling_level"]
    'sequence'
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    for trainer, reason in NOT_OFFERED.items():
        if trainer.rpartition(".")[2].removesuffix("Trainer").lower() == name.replace("_", "").lower():
            raise ValueError(f"algorithm {name!r} is not offered: {reason}; use TRL's {trainer} from Python")
    near = difflib.get_close_matches(name.lower().replace("-", "_").replace(" ", "_"), ALGORITHMS)
    meant = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise ValueError(f"algorithm {name!r} is not known{meant} expected one of {', '.join(ALGORITHMS)}")
