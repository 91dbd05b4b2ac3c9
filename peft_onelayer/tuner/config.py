"""The configuration of the single-layer method, as PEFT stores it in adapter_config.json."""

from __future__ import annotations

import copy
import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from safetensors import safe_open

from peft_onelayer.layers import parse_layers, plain_indices
from peft_onelayer.records.adapter_config import check_adapter_config
from peft_onelayer.records.files import WEIGHTS
from peft_onelayer.records.text import printable
from peft_onelayer.sparse.names import TRAINED, base_name

from .mask import Mask


class SingleLayerPeftType(str, enum.Enum):  # noqa: UP042  PEFT parses str(), which StrEnum changes
    """The PEFT type of this method. peft.PeftType is a closed enum; because this one is a `str` whose member's name
    equals its value, it hashes and compares like the plain string found in adapter_config.json, and so serves as a
    key of PEFT's mappings."""

    SINGLE_LAYER = "SINGLE_LAYER"


@dataclass
class SingleLayerConfig(PeftConfig):
    """Configuration of a [`SingleLayerModel`]: full training of one transformer block (or of a few).

    Args:
        layer (`int`, `str` or `list[int]`):
            The block to train. An index counts from 0, a negative one from the end. Also a list of indices, a range
            "8-13" (both ends included), "middle" (block L // 2), "mid-5" (the paper's five middle blocks), or several
            of these, "3,8-10"; or "all" blocks (embeddings, final norm and head are in none). Required.
        target_modules (`str` or `list[str]`, *optional*):
            Train only these parts of the block, by PEFT's matching rules: a list of names ("q_proj", "self_attn"; a
            name stands for everything below it) or one name or regular expression. Default: every parameter.
        layers_pattern (`str`, *optional*):
            Name of the ModuleList that holds the blocks ("layers", "decoder.block"), for models with several.
        init_weights (`bool`, defaults to `True`):
            Start from the base model's weights. `False` adds noise to them and is of use only in tests.
        master_dtype (`str`, defaults to `"float32"`):
            Precision in which the trained weights are kept: "float32" (the forward pass rounds them to the base's
            dtype; small RL updates would be lost in bfloat16) or "base", the dtype of the base model.
        modules_to_save (`list[str]`, *optional*):
            Modules outside the block that are trained and saved whole, e.g. a classification head.
        mask (`str`, *optional*):
            A safetensors file of boolean tensors by the names of the base's parameters, in their shapes: an entry
            trains where its tensor holds True, within the blocks and `target_modules`. A tensor that is not in the
            file is frozen. [`make_mask`] writes one. The file is read at once and not needed again: afterwards the
            field holds a record of the mask, "trained" of "entries" and their "sha256". What `save_pretrained` writes
            holds the mask itself; a sparse adapter does not, and to train one further takes the file again.
        combined (`dict`, *optional*):
            Of an adapter that [`combine_adapters`] made, its "method" and "parts". Read from the file, and kept.
        layer_indices (`list[int]`, *optional*):
            The resolved `layer`, ascending, which takes its place. Set in the model's own copy of the configuration,
            saved in adapter_config.json and read back from there. A `layer` that names other blocks is an error when
            a model is wrapped.
        num_layers (`int`, *optional*):
            Number of blocks of the base model, set and saved like `layer_indices`; a model of another depth is an
            error.
        encoding (`dict`, *optional*):
            Of an adapter stored in the sparse encoding: its format, the counts of changes and the digests that guard
            it (peft_onelayer/sparse/SPECIFICATION.md). Read from adapter_config.json; what PEFT saves is dense, so it
            is never written.
        trained_on (`dict`, *optional*):
            Samples of all tensors of the base, which guard the adapter against another one
            (peft_onelayer/sparse/base.py). Set by wrapping, saved, and read back.
        saved_embeddings (`list[str]`, *optional*):
            Names of the embeddings' tensors that the adapter's file also holds, as `save_pretrained` writes them where
            the vocabulary was resized or `save_embedding_layers=True`. Written by saving and read with the file; a
            file that holds other tensors is refused. None again once the file is loaded.

    Wrapping a model copies the configuration, so one object serves several models; the model's own, with what was
    resolved, is `model.peft_config["default"]`.

    `PeftModel.from_pretrained(base, folder, allow_other_base=True)` loads an adapter on a base of the same shapes that
    is not the one it was trained on. Where PEFT and transformers read the configuration themselves, hand it to
    them: `config = SingleLayerConfig.from_pretrained(folder, allow_other_base=True)`, then
    `peft_model.add_adapter(name, config)` before `peft_model.load_adapter(folder, name)`, or transformers'
    `model.load_adapter(folder, peft_config=config)`.

    Raises:
        ValueError: `layer` missing or malformed, `master_dtype` unknown, `mask` no file of boolean tensors with a True
            entry, or a field of another type. Whether `layer` is in range and the mask fits is checked against the
            model when it is wrapped.
    """

    layer: int | str | list[int] | None = field(default=None, metadata={"help": "The block(s) to train."})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Parts of the block to train; default: all of it."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the ModuleList of blocks, for models with several."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from the base model's weights."})
    master_dtype: str = field(
        default="float32", metadata={"help": 'Precision of the trained weights: "float32" or "base".'}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules outside the block that are trained and saved whole."}
    )
    mask: str | dict | None = field(
        default=None, metadata={"help": "File of the entries to train; then a record of it."}
    )
    combined: dict | None = field(
        default=None, repr=False, metadata={"help": "What it was combined of; read from the file."}
    )
    layer_indices: list[int] | None = field(default=None, metadata={"help": "The resolved layer; set by wrapping."})
    num_layers: int | None = field(default=None, metadata={"help": "Blocks of the base model; set by wrapping."})
    encoding: dict | None = field(
        default=None, repr=False, metadata={"help": "The sparse encoding; read from the file."}
    )
    trained_on: dict | None = field(
        default=None, repr=False, metadata={"help": "What the base is known by; set by wrapping."}
    )
    saved_embeddings: list[str] | None = field(
        default=None, metadata={"help": "Embeddings that the file also holds; written by saving."}
    )
    allow_other_base: bool = field(default=False, init=False, repr=False)  # no argument: a file must not set it
    base_is_recorded: bool = field(default=False, init=False, repr=False)  # `trained_on` is of the model at hand
    embeddings_seen: set[str] = field(
        default_factory=set, init=False, repr=False, compare=False
    )  # saved or loaded here
    entries: Mask | None = field(default=None, init=False, repr=False, compare=False)  # the mask itself, where known

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SingleLayerPeftType.SINGLE_LAYER
        if self.layer is None:
            raise ValueError('SingleLayerConfig needs the block to train, for example layer=14 or layer="middle".')
        parse_layers(self.layer)
        if not isinstance(self.layer, str):
            self.layer = plain_indices(self.layer)
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; leave it out to train the whole block.")
        if self.master_dtype not in ("float32", "base"):
            raise ValueError(
                f'master_dtype={printable(self.master_dtype, 60)!r} is not known; expected "float32" or "base".'
            )
        if isinstance(self.mask, (str, os.PathLike)):
            if self.layer_indices is not None:  # from a file, which may come from a stranger
                raise ValueError("a saved adapter names a file as its mask; it holds the mask itself, or a record.")
            self.entries = Mask.read(self.mask)
            self.mask = self.entries.record()
        check_adapter_config(vars(self), "SingleLayerConfig")

    @property
    def trainable_token_indices(self) -> None:
        """A field of `LoraConfig` that TRL reads where it has added tokens; there is none here."""
        raise AttributeError(
            "SingleLayerConfig has no trainable_token_indices: chat_template_path adds tokens, whose embeddings are "
            "outside of the block and would not be trained; add the tokens and train them first, or give a tokenizer "
            "that has its chat template."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, allow_other_base: bool = False, **kwargs: Any) -> SingleLayerConfig:
        """See `PeftConfig.from_pretrained`, to which `PeftModel.from_pretrained` hands its keyword arguments."""
        config = super().from_pretrained(*args, **kwargs)
        config.allow_other_base = allow_other_base
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved beside dense weights. A base into which blocks were merged in memory has no
        name: that of the model before would name another base."""
        fields = super().to_dict() | {"encoding": None}
        for of_this_process in ("allow_other_base", "base_is_recorded", "embeddings_seen", "entries"):
            del fields[of_this_process]
        stages = (self.trained_on or {}).get("stages")
        if stages and stages[-1].get("base") == fields["base_model_name_or_path"]:
            fields |= {"base_model_name_or_path": None, "revision": None}
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """See `PeftConfig.save_pretrained`, which PEFT calls when the weights are in `save_directory`: notes which
        embeddings are among them."""
        weights, written = Path(save_directory) / WEIGHTS, copy.copy(self)
        if weights.is_file():
            with safe_open(weights, framework="np") as file:
                beside = [base_name(key) for key in file.keys() if TRAINED not in key]  # noqa: SIM118  it is no dict
            written.saved_embeddings = sorted(n for n in beside if not saved_whole(n, self.modules_to_save)) or None
            self.embeddings_seen |= set(written.saved_embeddings or [])
        super(SingleLayerConfig, written).save_pretrained(save_directory, **kwargs)


def saved_whole(name: str, modules_to_save: list[str] | None) -> bool:
    """Whether a tensor of an adapter's file, by its name in the base, is one of `modules_to_save`. Where the module is
    an embedding that is saved too, PEFT also writes what its wrapper holds, under names of the wrapper's."""
    wrapped = any(part in f".{name}." for part in (".original_module.", ".modules_to_save."))
    return not wrapped and any(f".{module}." in f".{name}" for module in modules_to_save or [])
