"""The names of tensors: in the base model, in a wrapped model, and of their parts in a sparse adapter's file."""

from __future__ import annotations

import re

TRAINED = ".single_layer_params."  # in the key of every trained tensor; what lacks it was saved by `modules_to_save`
POSITIONS = ("indices", "gaps", "bitmap")
PARTS = (*POSITIONS, "values", "ulps")
MASK = "_mask"  # behind the key of a dense adapter's tensor: the bits of which entries trained

BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.+)$")  # the first whole number in a name counts the blocks
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # what torch calls a wrapped module


def unwrapped(name: str) -> str:
    """A name without what torch.compile and torch's wrappers add to it.

    >>> unwrapped("_orig_mod.model.layers.5._orig_mod.mlp")
    'model.layers.5.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def base_name(key: str) -> str:
    """The name in the base model of what an adapter file or a wrapped model calls `key`.

    >>> base_name("base_model.model.model.layers.5.mlp.down_proj.single_layer_params.weight")
    'model.layers.5.mlp.down_proj.weight'
    """
    key = unwrapped(key).removeprefix("base_model.model.").replace(".base_layer.", ".")
    return key.replace(TRAINED, ".")


def block_of(name: str) -> tuple[str | None, int | None, str]:
    """The block that a tensor is in, its index, and the tensor's kind; a tensor outside of the blocks is its own kind.

    >>> block_of("model.layers.5.mlp.experts.3.up_proj.weight")
    ('model.layers.5', 5, 'model.layers.*.mlp.experts.*.up_proj.weight')
    >>> block_of("lm_head.weight")
    (None, None, 'lm_head.weight')
    """
    found = BLOCK.match(name)
    if not found:
        return None, None, name
    stack, index, inside = found.groups()
    prefix = f"{stack}." if stack else ""
    return f"{prefix}{index}", int(index), f"{prefix}*.{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', inside)}"


def split_key(key: str) -> tuple[str, str]:
    """The name and the suffix of a stored tensor's key; the suffix is "" for one that is no part of an encoding.

    >>> split_key("model.norm.weight.gaps"), split_key("model.norm.weight")
    (('model.norm.weight', 'gaps'), ('model.norm.weight', ''))
    """
    name, _, suffix = key.rpartition(".")
    return (name, suffix) if name and suffix in PARTS else (key, "")
