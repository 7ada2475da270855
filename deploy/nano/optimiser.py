"""Muon for the layers' matrices, AdamW for the rest, one schedule for both."""

from collections import defaultdict
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn

from operators.engine import emulated_bfloat16

MUON_RATE: Final = 5e-3
ADAMW_RATE: Final = 3.7e-3
# (step, share of the full rate): warm-up, flat, down to nothing.
SCHEDULE: Final = ((0, 0.02), (60, 1.0), (1200, 1.0), (2500, 0.1333), (2950, 0.0))


def rate(step: int) -> float:
    """Return the share of the full rate at a step, straight between the points of SCHEDULE."""
    for (begin, high), (end, low) in pairwise(SCHEDULE):
        if begin <= step < end:
            return high + (low - high) * (step - begin) / (end - begin)
    return SCHEDULE[-1][1]


def orthogonalise(stack: Tensor) -> Tensor:
    """Newton-Schulz with the quintic of Muon over [n, rows, columns], five rounds.

    In bf16, or in float32 where a CPU would only emulate its products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    emulated = stack.device.type == "cpu" and emulated_bfloat16()
    x = stack if emulated else stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.transpose(1, 2) if tall else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape go through Newton-Schulz together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ANN401
        """Take one step."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                directions = orthogonalise(torch.stack(updates))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction, alpha=-group["lr"] * scale)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices of the layers, all other trained parameters)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = ".layers." in name and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return matrices, rest
