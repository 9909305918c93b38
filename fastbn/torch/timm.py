"""The batch normalization of timm's models that activates; imported where timm is loaded."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch.nn.modules import module as torch_module

from fastbn.torch import modules
from fastbn.torch.fusion import Activation, activation_of_module, is_tapped

THEIRS = timm.layers.BatchNormAct2d


class BatchNormAct2d(modules.BatchNorm2d, THEIRS):  # type: ignore[misc, valid-type]
    """``timm.layers.BatchNormAct2d``, on CPU tensors by fastbn's kernels.

    Its ReLU, ReLU6 or LeakyReLU is part of the pass. Other activations, and those with hooks or
    behind a dropout, run as they are.
    """

    def _activation_in_pass(self) -> Activation | None:
        """The activation that is part of the pass, if one is."""
        drop, act = self.drop, self.act
        is_plain = type(drop) is torch.nn.Identity and not is_tapped(drop) and not is_tapped(act)
        if not is_plain or torch_module._has_any_global_hook():
            return None
        return activation_of_module(act)

    def _own_activation(self) -> str | None:
        activation = self._activation_in_pass()
        return None if activation is None else activation.name

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        activation = self._activation_in_pass()
        if activation is None:
            return self.act(self.drop(super().forward(x)))
        return super().forward(
            x, activation=activation.name, negative_slope=activation.negative_slope
        )
