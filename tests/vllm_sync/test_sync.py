"""Training with use_vllm=True: what reaches the engine, and what is left of it in the model that trains."""

import contextlib
import copy
import importlib
import warnings
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuner.helpers import base_weights, logits, masters, move, same, tuner_layers, wrap

from models import build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from vllm_sync import engine

# gpt_oss: attention with parameters of its own beside its children, fused experts with biases.
FAMILIES = ("qwen3", "llama", "gemma3_text", "gpt_oss", "qwen3_moe", "gpt2")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # of gpt2


def reward(completions, **_):
    """Differs from completion to completion, so that the advantages are not zero."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


def copies(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


PROMPTS, ANSWERS = ["one", "two", "three", "four"] * 4, ["a", "bc", "def", "ghij"] * 4
MESSAGES = [
    [{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in zip(PROMPTS, ANSWERS, strict=True)
]
HINTED = {"prompt": PROMPTS, "privileged_context": ANSWERS}
GROUPS = {"num_generations": 4, "max_completion_length": 6}
SHORT = {"max_completion_length": 6, "max_length": 32}


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def teacher(folder) -> dict:
    """Another model with the same tokenizer, which some trainers look for beside it."""
    build_architecture("qwen3", hidden_size=16).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "teacher")
    return {"teacher_model": AutoModelForCausalLM.from_pretrained(folder / "teacher")}


def rewarded(_) -> dict:
    return {"reward_funcs": reward}


def zero_or_one(_) -> dict:
    return {"reward_funcs": lambda completions, **_: [value % 2 for value in reward(completions)]}


def nothing(_) -> dict:
    return {}


# Package, options, columns, further arguments. SDPO's default teacher wants LoRA by name.
EXPERIMENTAL = "trl.experimental"
TRAINERS = {
    "GRPO": ("trl", GROUPS, {"prompt": PROMPTS}, rewarded),
    "RLOO": ("trl", GROUPS, {"prompt": PROMPTS}, rewarded),
    "Distillation": ("trl", {"max_completion_length": 6}, {"prompt": PROMPTS}, teacher),
    "OnlineDPO": (f"{EXPERIMENTAL}.online_dpo", {"max_new_tokens": 6, "max_length": 32}, {"prompt": PROMPTS}, rewarded),
    "SDPO": (f"{EXPERIMENTAL}.sdpo", GROUPS | {"teacher_model_kind": "base"}, HINTED, zero_or_one),
    "SDFT": (f"{EXPERIMENTAL}.sdft", GROUPS | {"distillation_topk": 8}, HINTED, nothing),
    "IWOPD": (f"{EXPERIMENTAL}.iw_opd", SHORT | {"top_p": 1.0}, {"messages": MESSAGES}, teacher),
}
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}


class Run:
    """A trainer with an engine of its own, every sync of which is compared with the model at that moment."""

    def __init__(
        self,
        folder,
        tokenizer,
        serve,
        name="GRPO",
        mode="colocate",
        family="qwen3",
        dtype=torch.float32,
        layer=1,
        entrance="wrapped",
        modules_to_save=None,
        **options,
    ):
        self.checkpoint = str(folder / "model")
        plain = build_architecture(family, dtype=dtype, **NO_DROPOUT if family == "gpt2" else {})
        plain.save_pretrained(self.checkpoint)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(self.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype="auto")
        self.names = {name for name, _ in model.named_parameters()}
        self.start = base_weights(model)
        config = {"layer": layer, "task_type": "CAUSAL_LM", "modules_to_save": modules_to_save}
        if entrance == "wrapped":
            model = wrap(model, **config)
            move(model)  # the first rollouts must come from this adapter, not from the base
        if mode == "server":
            self.server = serve(self.checkpoint)
            port = self.server.http.server_address[1]
            options |= {"vllm_server_base_url": self.server.url, "vllm_group_port": port}
        module, own_options, columns, extra = TRAINERS[name]
        options = COMMON | own_options | {"use_vllm": True, "vllm_mode": mode} | options
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            module = importlib.import_module(module)
            if name == "OnlineDPO" and mode == "server":  # which asks for the accelerator's name without looking
                stack.enter_context(patch("torch.accelerator.current_accelerator", lambda: torch.device("cuda")))
                stack.enter_context(patch("torch.cuda.current_device", lambda: 0))
            self.trainer = getattr(module, f"{name}Trainer")(
                model=model,
                args=getattr(module, f"{name}Config")(str(folder), **options),
                train_dataset=Dataset.from_dict(columns),
                processing_class=tokenizer,
                peft_config=SingleLayerConfig(**config) if entrance == "peft_config" else None,
                **extra(folder),
            )
        self.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        # OnlineDPO has a copy of its own of what the others have in VLLMGeneration.
        online_dpo = name == "OnlineDPO"
        owner, sync = (self.trainer, "_move_model_to_vllm") if online_dpo else (self.generation, "sync_weights")
        self.sync = getattr(owner, sync)
        setattr(owner, sync, self.checked_sync)

    @property
    def generation(self):
        return self.trainer if hasattr(self.trainer, "llm") else self.trainer.vllm_generation

    @property
    def engine(self):
        if hasattr(self, "server"):
            return self.server.engine
        return self.generation.llm.engine

    def merged(self) -> torch.nn.Module:
        """The plain model that the adapter stands for."""
        return copy.deepcopy(self.model).merge_and_unload()

    def checked_sync(self):
        expected = {name: p.detach() for name, p in self.merged().named_parameters()}
        tuned = copies(masters(self.model))
        self.sync()
        assert self.engine.syncs[-1].keys() == self.names
        assert same(self.engine.syncs[-1], expected)
        assert same(copies(dict(self.engine.model.named_parameters())), expected)
        self.assert_base_untouched()
        assert same(copies(masters(self.model)), tuned)

    def assert_base_untouched(self) -> None:
        base = base_weights(self.model)
        base = {n.replace(".original_module", ""): w for n, w in base.items() if "modules_to_save" not in n}
        assert same(base, self.start)
        assert not any(layer.merged or layer._unmerged for layer in tuner_layers(self.model))

    def train(self, syncs: int = 2) -> None:
        before = {n: p.detach().clone() for n, p in masters(self.model).items()}
        done = len(self.engine.syncs)
        self.trainer.train()
        assert len(self.engine.syncs) == done + syncs
        assert not any(torch.equal(p, before[n]) for n, p in masters(self.model).items())
        assert {p.dtype for p in masters(self.model).values()} == {torch.float32}

    def assert_on_policy(self, tolerance: float = 1e-4) -> None:
        """The engine's log-probabilities of its samples are those of the model that trains."""
        difference = [e["sampling/sampling_logp_difference/max"] for e in self.trainer.state.log_history[:-1]]
        assert len(difference) == 2 and max(difference) < tolerance


@pytest.fixture
def run(tmp_path, tokenizer, serve):
    return lambda **options: Run(tmp_path, tokenizer, serve, **options)


BF16 = torch.bfloat16
CASES = [
    *({"family": family, "mode": "server", "dtype": BF16} for family in ("gpt_oss", "gpt2")),
    {"family": "qwen3_moe"},
    {"layer": [0, 3], "dtype": BF16},
    {"name": "RLOO", "mode": "server", "entrance": "peft_config"},
    {"name": "OnlineDPO"},
]
MORE_CASES = [
    *({"family": family, "mode": "server", "dtype": BF16} for family in ("qwen3", "gemma3_text")),
    {"layer": 0, "entrance": "peft_config"},
    {"layer": "middle", "mode": "server", "entrance": "peft_config"},
]
SLOW_CASES = [
    *({"family": family, "max_steps": 3, "syncs": 3} for family in FAMILIES),
    *({"family": family, "dtype": BF16, "entrance": "peft_config"} for family in FAMILIES),
    *({"family": family, "layer": [1, 2], "mode": "server", "beta": 0.05} for family in FAMILIES),
    *({"layer": layer, "dtype": BF16, "mode": "server"} for layer in (0, "middle", [0, 3])),
    {"modules_to_save": ["lm_head"], "mode": "server"},
    {"num_iterations": 2, "syncs": 1},
    {"name": "RLOO", "dtype": BF16},
    {"name": "OnlineDPO", "mode": "server", "entrance": "peft_config"},
    {"name": "OnlineDPO", "vllm_enable_sleep_mode": True},
    *({"name": name} for name in ("SDPO", "SDFT", "IWOPD", "Distillation")),
    *({"name": name, "mode": "server"} for name in ("SDPO", "SDFT", "IWOPD", "Distillation")),
]


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *(pytest.param(case, marks=pytest.mark.more) for case in MORE_CASES),
        *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_every_sync_pushes_the_merged_model(run, case):
    syncs = case.get("syncs", 2)
    r = run(**{key: value for key, value in case.items() if key != "syncs"})
    r.train(syncs)
    if "name" not in case and "dtype" not in case and syncs == 2:
        r.assert_on_policy()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_rollouts_are_those_of_the_merged_model(run, mode):
    r = run(mode=mode, generation_kwargs={"temperature": 0.0})
    r.generation.sync_weights()
    prompts = token_batch(batch=2)
    _, completions, _, _ = r.generation.generate(prompts.repeat_interleave(2, 0).tolist(), None, num_generations=2)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = r.merged().generate(prompts, **greedy)[:, 10:].tolist()
    with r.model.disable_adapter():
        assert r.model.generate(prompts, **greedy)[:, 10:].tolist() != expected
    assert completions == [expected[0], expected[0], expected[1], expected[1]]


def test_everything_is_pushed_again_after_sleep(run):
    """Sleep level 2 forgets the weights; with two rollouts per optimizer step, the second has only its own push."""
    r = run(vllm_enable_sleep_mode=True, gradient_accumulation_steps=2, steps_per_generation=1)
    assert all(p.isnan().all() for p in r.engine.model.parameters())
    r.train(syncs=4)
    assert r.engine.generations == 4 * 4
    assert all(p.isnan().all() for p in r.engine.model.parameters())


@pytest.mark.more
@pytest.mark.parametrize(
    ("mode", "then"),
    [("colocate", "train"), ("server", "train"), ("colocate", "forward"), ("server", "sync")],
)
def test_a_failed_push_leaves_nothing_behind(run, monkeypatch, mode, then):
    monkeypatch.setattr(engine, "BUFFER_BYTES", 32 * 1024)  # several: after the last, TRL has unmerged already
    r = run(mode=mode, layer=[1, 2])
    expected, tuned = logits(r.model), copies(masters(r.model))
    if mode == "server":
        r.generation.vllm_client.communicator.fail = True
    else:
        r.engine.fail_at = "model.layers.2.mlp.up_proj.weight"  # when much has been pushed already
    with pytest.raises(RuntimeError, match=r"connection was lost|out of memory"):
        r.trainer.train()
    # TRL's generator ends at its `yield`: nothing in VLLMGeneration._iter_named_params unmerges then.
    assert all(layer.merged for layer in tuner_layers(r.model))
    assert torch.equal(logits(r.model), expected)
    assert same(copies(masters(r.model)), tuned)
    r.engine.arrived, r.engine.fail_at = {}, None
    if mode == "server":
        r.generation.vllm_client.communicator.fail = False
    if then == "sync":  # with other weights than those that are still merged
        move(r.model, seed=2)
        with pytest.warns(UserWarning, match="already merged"):
            r.sync()
        assert same({n: r.engine.syncs[-1][n] for n in tuned}, copies(masters(r.model)))
    elif then == "forward":
        r.model.train()
        tokens = token_batch()
        with pytest.warns(UserWarning, match="merged while it trains"):
            r.model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in masters(r.model).values())
    else:
        r.train()
    r.assert_base_untouched()
