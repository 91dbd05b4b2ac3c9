"""Merging adapters into the base's weights and taking them out again bit for bit, on every module or on none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor

from .quantized import is_quantized
from .sharding import refuse_silent_wrap
from .weights import AdapterWeights


class MergeableWeights(AdapterWeights):
    """Merging in one module. While merged, W_0 is kept beside the base's parameters."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base's parameters the adapters' weights, keeping W_0 so that `unmerge` restores it bit for bit.

        What is already merged is brought up to date with its masters.

        Args:
            safe_merge: refuse to write NaN or Inf.
            adapter_names: default, the active adapters; those not on this module are passed over.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # which PEFT's check refuses
            names = [name for name in names if name in self.single_layer_params]
        names = check_adapters_to_merge(self, names) if names else []
        together = self.merged_adapters + names
        if not together:
            return
        self.refuse_merging()
        if safe_merge:
            self.check_mergeable(together)
        refuse_silent_wrap(self.base_layer, dict(self._own()), list(self.single_layer_params.values()))
        with torch.no_grad(), self._gathered(write=True):
            weights, own = self._weights_of(together), dict(self._own())
            if not self.merged:
                self._unmerged = {n: p.detach().clone() if isinstance(p, DTensor) else p.data for n, p in own.items()}
            for name, parameter in own.items():
                with torch.inference_mode(False), torch.no_grad():  # a tensor made in that mode could never train
                    merged = torch.empty_like(parameter).copy_(weights[name])
                _set_data(parameter, merged)
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit; does nothing if nothing is merged."""
        unmerged = self._unmerged  # another thread that runs with the adapters off may be restoring it too
        if not unmerged:  # filled before the first write, so that an interrupted merge is undone too
            return
        with torch.no_grad(), self._gathered(write=True):
            for name, parameter in self._own():
                if name in unmerged:
                    _set_data(parameter, unmerged[name])
        self._unmerged = {}
        self.merged_adapters = []

    def merged_weights(self) -> dict[str, torch.Tensor]:
        """The base's own parameters as merging the active adapters would leave them, by name, in the base's dtypes.

        Nothing is written. A tensor may be one that the module keeps.
        """
        names = [name for name in self.names_when_merged() if name in self.single_layer_params]
        return {**self._base_weights(), **self._weights_of(names)}

    def names_when_merged(self) -> list[str]:
        """The adapters that are merged once the active ones are too, on this module or not."""
        return list(dict.fromkeys([*self.merged_adapters, *self.active_adapters]))

    def refuse_merging(self) -> None:
        """Raise ValueError if the base's weights are quantized: rounding to their grid would undo the training."""
        if any(is_quantized(parameter) for _, parameter in self._own()):
            raise ValueError(
                f"the base's {type(self.base_layer).__name__} is quantized, and merging would round the trained "
                "weights to its grid; save the adapter, load it on the base in bfloat16 and merge there."
            )

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise PEFT's own ValueError if merging `adapter_names` would write NaN or Inf into the base."""
        with self._gathered():
            finite = [bool(torch.isfinite(weight).all()) for weight in self._weights_of(adapter_names).values()]
        if not all(finite):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )


class MergingTuner(BaseTuner):
    """Merging in a whole model: all checks come before the first write, and a failed merge leaves nothing merged."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """See `BaseTuner.merge_adapter`. If it fails or is interrupted, no module is changed."""
        self._check_merge(adapter_names, safe_merge)
        before = {module: module.merged_adapters for module in self._mergeable()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for module, merged in before.items():
                module.unmerge()
                if merged:
                    module.merge(adapter_names=merged)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        else:  # `unload` gives back the base, also when an adapter is merged
            for module in self._mergeable():
                module.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        while any(True for _ in self._mergeable()):  # those inside a composite module
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Unloading puts the base module back as it is; PEFT's own version reads `.weight`, which experts lack."""
        setattr(parent, child_name, new_module)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names: Any = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):  # refused by PEFT's check_adapters_to_merge
            return
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise ValueError(f"no adapter named {', '.join(unknown)}; the model has {', '.join(self.peft_config)}.")
        for module in self._mergeable():
            if any(name in module.single_layer_params for name in names):
                module.refuse_merging()
                if safe_merge:
                    module.check_mergeable(list(dict.fromkeys([*module.merged_adapters, *names])))

    def _mergeable(self) -> Iterator[MergeableWeights]:
        return (module for module in self.model.modules() if isinstance(module, MergeableWeights))


def _set_data(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Exchange the tensor behind `parameter`.

    Not a copy in place: vLLM's `pack_tensors` still reads the merged tensors that TRL handed it after TRL has unmerged
    the model, because it copies a buffer of up to 1 GiB at a time and the last one when TRL's generator has ended
    (`VLLMGeneration._iter_named_params`). FSDP2 does keep the storage to itself, so there it is written.
    """
    if isinstance(parameter, DTensor):
        parameter.copy_(value)
    else:
        parameter.data = value.to(parameter.device, parameter.dtype)
