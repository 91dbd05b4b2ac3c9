"""What a training run will hold in a device's memory, from the shapes of its model and its batches alone.

The model is built from its configuration without weights, wrapped as the run wraps it, and passed through what the run
passes it through, by tensors that have shapes and no numbers (`shapes.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    PretrainedConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
)
from trl.trainer import utils as trl_utils

from peft_onelayer.records.text import name_blocks, one_line
from peft_onelayer.rl.packing import NOT_GIVEN, Packing, pack, packed_arguments, unpackable
from peft_onelayer.tuner import SingleLayerConfig
from peft_onelayer.tuner.prompts import can_be_split, decoder_of

from .models import quiet_logs
from .shapes import LiveBytes, fake_mode, without_numbers, without_tracebacks

LORA = "LoRA r=16, all linears"
SPARSE = {0.05: 0.050, 0.2: 0.163}  # share of changed entries: bytes over those in bfloat16 (docs/sharing.md)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What a run passes through its model.

    Attributes:
        rows: of a training pass, on one device.
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion, or of what stands in its place in offline data.
        passes: training passes of an optimizer step.
        generated: rows of the largest generation; 0 where the run generates nothing.
        group: completions of each prompt.
        kept: rows whose hidden states below the trained block are kept; 0 for none.
        scored: tokens of a row whose scores are computed in training; None for the completion's.
        shared: rows of a training pass that begin with one prompt, as far as they are packed (`packed_prompts`).
        outputs: what TRL's LM head gives for each token; None where the trainer takes all logits.
        reference: whether a whole copy of the model stands beside one that trains in full.
    """

    rows: int
    prompt: int
    completion: int
    passes: int = 1
    generated: int = 0
    group: int = 1
    kept: int = 0
    scored: int | None = None
    shared: int = 1
    outputs: tuple[str, ...] | None = ("log_probs", "entropy")
    reference: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one way of training holds, in bytes; what Python, libraries and the allocator take is not counted.

    Attributes:
        what: "block 14", "full", `LORA`.
        trained: number of parameters that train.
        weights: of the model, in the dtype it is computed with.
        masters: float32 copies of a block, or LoRA's factors.
        reference: a second model.
        gradients: of what trains.
        optimizer: its state.
        activations: of a training pass at its peak, with logits, beside all of the above.
        prefix: hidden states that are kept from one pass to another.
        cache: keys and values of the largest generation.
        sampling: what else a generation holds at its peak.
        peak: the most at one time.
        peak_without_state: the same with an optimizer without state, as `optim=sgd`.
        adapter: bytes of the adapter's file, which is float32; of the whole model's for "full".
        sparse: bytes of a sparse adapter by share of entries that changed by one step; empty where there is none.
    """

    what: str
    trained: int
    weights: int
    masters: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    prefix: int
    cache: int
    sampling: int
    peak: int
    peak_without_state: int
    adapter: int
    sparse: dict[float, int] = field(default_factory=dict)


def lora() -> LoraConfig:
    """LoRA on all linear layers, for comparison."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def estimate_memory(
    config: PretrainedConfig,
    train: Sequence[int] | PeftConfig | None,
    batches: Batches,
    arguments: TrainingArguments,
    *,
    mask: str | None = None,
    on_gpu: bool | None = None,
    trust_remote_code: bool = False,
) -> MemoryEstimate:
    """What training holds.

    Args:
        config: of the model, as `AutoConfig.from_pretrained` gives it. Nothing else of the model is needed.
        train: indices of the blocks; None for everything; or the configuration of another PEFT method.
        batches: what is passed through.
        arguments: of the trainer, such as `trl.GRPOConfig(...)`: of them are the optimizer, checkpointing, autocast and
            how completions are sampled.
        mask: file of the entries of the blocks that train, as `SingleLayerConfig` takes it.
        on_gpu: whether a GPU's kernels are meant, or a CPU's; None for what this machine has.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        ValueError: in one line: a quantized model, an optimizer or an architecture whose memory shapes do not tell.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized, and how much its weights take does not follow from its shapes")
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    mode = fake_mode()
    with warnings.catch_warnings(), quiet_logs(), without_tracebacks():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            size = next(model.parameters()).dtype.itemsize
            if batches.outputs is not None:
                trl_utils.add_fused_lm_head(
                    model, temperature=getattr(arguments, "temperature", None) or 1.0, outputs=batches.outputs
                )
            model, what = _prepared(model, train, mask)
        without_numbers(model, mode)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        own = sum(_storages([*model.parameters(), *model.buffers()]))
        masters = 0 if train is None else sum(_storages(trained))
        with mode, _folded_by_kernels() if on_gpu else contextlib.nullcontext():
            activations, prefix = _training(model, train, batches, arguments)
            cache, sampling = _generation(model, train, batches, arguments, on_gpu)
        optimizer = _optimizer(model, trained, arguments)
    gradients = sum(_storages(trained))
    reference = own if batches.reference and train is None else 0
    rest = own + reference + max(gradients + activations + prefix, cache + sampling)
    full = train is None
    return MemoryEstimate(
        what=what,
        trained=count,
        weights=own - masters,
        masters=masters,
        reference=reference,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        prefix=prefix,
        cache=cache,
        sampling=sampling,
        peak=rest + optimizer,
        peak_without_state=rest,
        adapter=count * (size if full else 4),
        sparse={share: round(count * 2 * of) for share, of in SPARSE.items()} if _is_block(train) and size == 2 else {},
    )


def _prepared(model: Any, train: Sequence[int] | PeftConfig | None, mask: str | None) -> tuple[Any, str]:
    """The model as the run trains it, and what that is called."""
    if train is None:
        return model.float().requires_grad_(True), "full"
    if isinstance(train, PeftConfig):
        what = LORA if train == lora() else str(train.peft_type.value)  # wrapping completes the configuration
        return get_peft_model(model, train), what
    wanted = SingleLayerConfig(layer=list(train), mask=mask, task_type="CAUSAL_LM")
    return get_peft_model(model, wanted), name_blocks(list(train))


def _is_block(train: Sequence[int] | PeftConfig | None) -> bool:
    return train is not None and not isinstance(train, PeftConfig)


def _storages(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Bytes of the storages of `tensors`, each once."""
    found = {id(storage): storage.nbytes() for storage in [tensor.untyped_storage() for tensor in tensors]}
    return list(found.values())


@contextlib.contextmanager
def _by_shapes(what: str) -> Iterator[None]:
    """Around a library's own code, which may want numbers or a shape that are not there: its error in one line."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError, ImportError) as error:
        raise ValueError(f"{what} does not follow from shapes: {one_line(str(error), 200)}") from error


def _of_model(model: Any) -> contextlib.AbstractContextManager[None]:
    return _by_shapes(f"what a model of type {model.config.model_type} holds")


def _training(model: Any, train: Any, batches: Batches, arguments: TrainingArguments) -> tuple[int, int]:
    """What a training pass holds at its peak beside weights and gradients, and what is kept from pass to pass."""
    model.train()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs)
    length = batches.prompt + batches.completion
    start = max(length - 1 - (batches.scored or batches.completion), 0)
    width = 0  # bytes of a position's hidden states
    decoder = decoder_of(model)
    packing = _packing(decoder, batches) if decoder is not None and batches.outputs is not None else None

    def enter(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal packing
        if packing is None or kwargs.get("input_ids") is None:  # of embeddings the run packs nothing
            packing = None
            return None
        return (), {**kwargs, **packed_arguments(decoder, packing, kwargs["input_ids"])}

    def cut(decoder: nn.Module, args: tuple, output: Any) -> None:
        nonlocal width
        states = output.last_hidden_state
        width = states.size(-1) * states.dtype.itemsize
        if packing is not None:
            states = states.flatten(0, 1)[torch.from_numpy(packing.places)]
        if batches.outputs is not None:
            output.last_hidden_state = states[:, start:]

    handles = []
    if decoder is not None:
        handles = [
            decoder.register_forward_pre_hook(enter, with_kwargs=True),
            decoder.register_forward_hook(cut),
        ]
    if batches.passes > 1:  # those of the passes before
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with LiveBytes(model) as live:
        ids = torch.empty((batches.rows, length), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if batches.outputs is None:
            with _of_model(model), _autocast(arguments):
                logits = model(**inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
            del logits
        else:
            labels = ids[:, start:] if decoder is not None else ids
            with _of_model(model), _autocast(arguments):
                output = model(**inputs, labels=labels, fused_lm_head=True)
            loss = output.log_probs.sum()
            del output
        with _of_model(model):
            loss.backward()
    held = live.peak
    if batches.passes == 1:
        held -= sum(_storages([p.grad for p in model.parameters() if p.grad is not None]))
    for handle in handles:
        handle.remove()
    kept = batches.kept if _is_block(train) and min(train) > 0 else 0
    positions = batches.rows * length if packing is None else packing.rows.size
    return max(held, 0), round(kept / batches.rows * positions * width)


def _packing(decoder: Any, batches: Batches) -> Packing | None:
    """How a pass of different rows of full length is packed."""
    if batches.shared < 2 or unpackable(decoder) is not None:
        return None
    rows = np.arange(batches.rows)[:, None]
    prompts, completions = (np.ones((1, length), np.int64) for length in (batches.prompt, batches.completion))
    ids = np.concatenate([rows // batches.shared * prompts, rows * completions], axis=1)
    labels = np.concatenate([rows * 0 * prompts - 100, rows * completions], axis=1)
    packing = pack(ids, np.ones_like(ids), labels, decoder.config.hidden_size)
    if packing is None:
        return None
    with torch.no_grad():
        try:
            decoder(**packed_arguments(decoder, packing, torch.from_numpy(ids)), use_cache=False)
        except NOT_GIVEN:  # and the run passes whole rows
            return None
    return packing


@contextlib.contextmanager
def _folded_by_kernels() -> Iterator[None]:
    """Within, TRL's LM head makes of a tile of logits what it needs without tensors beside it, as on a GPU."""
    try:
        from trl.kernels import chunked_logprob as head
    except ImportError:  # a TRL without one
        yield
        return
    kept = head._forward_tile, head._backward_tile
    head._forward_tile = head._backward_tile = lambda *args, **kwargs: None
    try:
        yield
    finally:
        head._forward_tile, head._backward_tile = kept


def _autocast(arguments: TrainingArguments) -> contextlib.AbstractContextManager[Any]:
    """What accelerate puts around the forward pass of the trainer's model, and not around the backward pass."""
    if not (arguments.bf16 or arguments.fp16):
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if arguments.bf16 else torch.float16)


@torch.no_grad()
def _generation(
    model: Any, train: Any, batches: Batches, arguments: TrainingArguments, on_gpu: bool
) -> tuple[int, int]:
    """Keys and values of a generation at its last token, and what else it holds at its peak."""
    if not batches.generated:
        return 0, 0
    model.eval()
    base = model.get_base_model() if train is not None else model
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
    size = next(p.dtype.itemsize for p in base.parameters() if not p.requires_grad) if train is not None else 4
    rounded = 0
    if _is_block(train) and size < 4:  # the copy that is kept in a generation
        rounded = sum(p.numel() for p in base.parameters() if p.requires_grad) * size
    length, rows = batches.prompt + batches.completion, batches.generated
    group = batches.group if rows % batches.group == 0 and _shares_prompts(base) else 1
    contiguous = _is_block(train)  # what its LM head is given, which spares the copies
    autocast = _autocast(arguments) if train is None else contextlib.nullcontext()  # PEFT generates with the base's own
    with LiveBytes(model, on_cpu=not on_gpu and not contiguous) as live:
        prompts = torch.empty((rows // group, batches.prompt), dtype=torch.long)
        with autocast:
            _next_token(base, prompts, None, length=batches.prompt, group=group)
        prefill = live.peak
        before = live.restart()
        with autocast:
            cache = _next_token(base, torch.empty((rows, length - 1), dtype=torch.long), None, length=length - 1)[1]
        held = live.restart() - before
        token = torch.empty((rows, 1), dtype=torch.long)
        with autocast:
            logits, cache = _next_token(base, token, cache, length=length)
        held = max(held, live.live - before - logits.untyped_storage().nbytes())
        _sample(logits, arguments)
        peak = max(live.peak - before, prefill)
    return held, peak - held + rounded


def _shares_prompts(model: Any) -> bool:
    """Whether the rows of the cache that transformers makes for a model can be chosen."""
    return can_be_split(DynamicCache(config=model.config.get_text_config(decoder=True)))


def _next_token(model: Any, ids: torch.Tensor, cache: Any, *, length: int, group: int = 1) -> tuple[torch.Tensor, Any]:
    """The logits (B, 1, V) behind `ids` (B, T), which end at position `length`, and the cache; with a `group` those of
    each row so many times, as `shared_prompts` makes them."""

    def widen(decoder: nn.Module, args: tuple, output: Any) -> None:
        output.past_key_values.batch_repeat_interleave(group)
        output.last_hidden_state = output.last_hidden_state.repeat_interleave(group, 0)

    decoder = decoder_of(model)
    handle = decoder.register_forward_hook(widen) if group > 1 and decoder is not None else None
    inputs = {"input_ids": ids, "attention_mask": torch.ones((len(ids), length), dtype=torch.long), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with _of_model(model):
        output = model(**inputs, **({} if cache is None else {"past_key_values": cache}))
    if handle is not None:
        handle.remove()
    if "past_key_values" not in output:
        raise ValueError(f"what a model of type {model.config.model_type} keeps from token to token is not known")
    return output.logits, output.past_key_values


def _sample(logits: torch.Tensor, arguments: TrainingArguments) -> None:
    """What transformers makes of the last position's logits to draw a token."""
    scores = logits[:, -1].to(torch.float32, copy=True)
    temperature, top_k, top_p = (getattr(arguments, name, None) for name in ("temperature", "top_k", "top_p"))
    warpers = LogitsProcessorList()
    if temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores = warpers(torch.empty((len(scores), 1), dtype=torch.long), scores)
    probabilities = scores.softmax(-1)
    torch.multinomial(torch.empty_like(probabilities), 1)  # inside, it draws as many numbers


def _optimizer(model: Any, trained: Sequence[nn.Parameter], arguments: TrainingArguments) -> int:
    """Bytes of the optimizer's state behind its first step.

    Raises:
        ValueError: an optimizer that needs more than shapes.
    """
    name = getattr(arguments.optim, "value", arguments.optim)
    parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in trained]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with _by_shapes(f"what optim={name} keeps"):
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        kwargs.pop("fused", None)
        optimizer = kind(parameters, **kwargs)
        optimizer.step()
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
