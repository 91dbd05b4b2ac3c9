"""Which modules of a block are trained: refuses blocks that cannot be, and picks by `target_modules`."""

from __future__ import annotations

import re

import regex  # type: ignore[import-untyped]  # has a limit of time, which `re` lacks
from torch import nn

from peft_onelayer.records.text import one_line, printable
from peft_onelayer.sparse.names import unwrapped

from .buffers import running_statistics
from .config import SingleLayerConfig
from .layer import SingleLayerLayer
from .quantized import unsupported_quantization
from .stack import DecoderStack

SECONDS = 0.5  # a regular expression may take for one name
GROUPS = 40
# Recursion, flags and the like; and braces other than `x{9}`, `x{1,9}`, `x{1,}` behind a single character or class.
UNBOUNDED = re.compile(r"\(\?(?![:!=]|<[!=])|(?<=[)}])\{|\{(?!\d{1,2}(,\d{0,2})?\})")


def check_blocks(model: nn.Module, stack: DecoderStack, indices: list[int], config: SingleLayerConfig) -> None:
    """Raise ValueError for a block that cannot be trained module by module, or not without changing others."""
    everywhere: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        everywhere.setdefault(id(parameter), []).append(name)
    for index in indices:
        block, prefix = stack.blocks[index], f"{stack.name}.{index}."
        direct = [name for name, _ in block.named_parameters(recurse=False)]
        if direct and config.target_modules is None:
            raise ValueError(
                f"block {index} ({type(block).__name__}) owns parameters directly ({', '.join(direct)}), which "
                "cannot be wrapped; name the parts to train with target_modules."
            )
        if (module := running_statistics(block)) is not None:
            raise ValueError(
                f"{prefix}{module} keeps running statistics, which training changes and which are no parameters, so an "
                "adapter could neither save them nor switch them off; train a block without such a module."
            )
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if unsupported_quantization(name, tensor):
                raise ValueError(
                    f"{prefix}{name} holds {type(tensor).__name__} of {tensor.dtype}: of quantized blocks only "
                    "those of bitsandbytes (4 and 8 bit) and torchao (int8) can be trained in full; load the base "
                    "in bfloat16, or keep this block out of the quantization."
                )
        for name, parameter in block.named_parameters():
            if "single_layer_params" in name:
                continue
            others = [n for n in everywhere[id(parameter)] if unwrapped(n) != unwrapped(prefix + name)]
            if others:
                raise ValueError(
                    f"{prefix}{name} is shared with {others[0]}; training one block of a model whose blocks share "
                    "parameters would change the other one too."
                )


def target_names(stack: DecoderStack, indices: list[int], config: SingleLayerConfig) -> set[str]:
    """The names in the unwrapped model of the modules to train.

    Raises:
        ValueError: an entry of `target_modules` names nothing in the blocks: a typo must not shrink what trains.
    """
    chosen = modules = [(prefix, path) for prefix, path, _ in targetable(stack, indices)]
    targets = config.target_modules
    if targets is not None:
        chosen, whole = [], isinstance(targets, str)
        for target in [targets] if isinstance(targets, str) else targets:
            found = [
                (prefix, path) for prefix, path in modules if matches(target, unwrapped(path), whole, unwrapped(prefix))
            ]
            if not found:
                known = printable(", ".join(dict.fromkeys(path for _, path in modules)), 300)
                raise ValueError(
                    f"target_modules entry {printable(target, 80)!r} matches nothing in block "
                    f"{', '.join(map(str, indices))}; its modules are {known}."
                )
            chosen += found
    saved_whole = [f".{name}." for name in config.modules_to_save or []]
    names = {prefix + path for prefix, path in chosen}
    return {name for name in names if not any(part in f".{name}." for part in saved_whole)}


def targetable(stack: DecoderStack, indices: list[int]) -> list[tuple[str, str, nn.Module]]:
    """The modules of the blocks with parameters of their own: name of the block with a dot, path inside, module.

    Names and modules are the same whether or not an earlier adapter has wrapped the modules.
    """
    return [
        (f"{stack.name}.{index}.", re.sub(r"\.base_layer(?=\.|$)", "", path), module)
        for index in indices
        for path, module in stack.blocks[index].named_modules()
        if path and not isinstance(module, SingleLayerLayer) and "single_layer_params" not in path
        if any(True for _ in module.parameters(recurse=False))
    ]


def matches(target: str, path: str, whole: bool, prefix: str) -> bool:
    """PEFT's matching rule for a module of a block or one of its parents: a name, the end of one, or a full regex.

    `path` is relative to the block ("self_attn.q_proj"), `prefix` what stands before it in the model's names. `whole`:
    target_modules is one string, for which PEFT also tries a regular expression on the full name.
    """
    parts = path.split(".")
    for candidate in (".".join(parts[: i + 1]) for i in range(len(parts))):
        if candidate == target or f"{prefix}{candidate}".endswith(f".{target}") or prefix + candidate == target:
            return True
        if whole and (_matches_whole(target, candidate) or _matches_whole(target, prefix + candidate)):
            return True
    return False


def is_name(target: str) -> bool:
    """Whether an entry of `target_modules` is a module's name, and not a regular expression."""
    return re.fullmatch(r"[\w.]+", target) is not None


def _matches_whole(pattern: str, name: str) -> bool:
    """`re.fullmatch`, for an expression that may come from a stranger.

    Raises:
        ValueError: no regular expression, one that takes more than `SECONDS` on one name, or one whose compiled form
            might not fit into memory.
    """
    if is_name(pattern):
        return re.fullmatch(pattern, name) is not None
    if pattern.count("(") > GROUPS or UNBOUNDED.search(pattern):
        raise ValueError(
            f"target_modules {printable(pattern, 80)!r} has more than {GROUPS} groups, a group of a special kind, or a "
            "repetition in braces of a group or of 100 and more; give a list of names."
        )
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"target_modules {printable(pattern, 80)!r} takes more than {SECONDS} s to be matched with {name}; "
            "give a list of names."
        ) from None
    except regex.error as error:
        problem = one_line(error, 100)
        raise ValueError(f"target_modules {printable(pattern, 80)!r} is no regular expression: {problem}.") from None
