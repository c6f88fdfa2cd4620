"""Optimisers and their parameter groups."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024), as in torch.optim.Muon.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LAYER_PATTERN = re.compile(r"(^|\.)layers?\.\d+\.")


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: matrices and embeddings, not norms, biases and scales (section 4.3)."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def orthogonalize(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """
    The nearest semi-orthogonal matrices, roughly: singular values near 1. (N, rows, columns) -> the same, in bf16.

    A Newton-Schulz iteration of `steps` steps over all N at once; of a tall matrix its transpose is iterated.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    states = (matrices.mT if is_tall else matrices).bfloat16()
    states = states / states.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = states @ states.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        states = torch.baddbmm(states, update, states, beta=a)
    return states.mT if is_tall else states


class MuonWithAdamW(Optimizer):
    """
    Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for everything else.

    torch.optim.Muon takes one matrix at a time and no others; here matrices of one shape go through the
    Newton-Schulz iteration together. A group with `parts` above 0 is Muon's: each of its matrices is cut into so many
    matrices of equal rows (query, key and value of a fused projection). Their learning rate is that of torch's Muon:
    times sqrt(rows / columns) where a matrix is tall.

    Args:
        params: groups as of torch's optimisers.
        lr: learning rate of a group without its own.
        betas, eps: AdamW's.
        weight_decay: decoupled, both of Muon and AdamW.
        momentum: Muon's, of Nesterov's kind.
        newton_schulz_steps: Muon's iterations.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "newton_schulz_steps": newton_schulz_steps,
            "parts": 0,
            "fused": True,  # a loaded state then keeps AdamW's count of steps on the parameter's device
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a parameter without gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices([group for group in self.param_groups if group["parts"]])
        for group in self.param_groups:
            if not group["parts"]:
                self._step_adamw(group)
        return loss

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        steps = defaultdict(list)  # (rows, columns, iterations) -> (part of a parameter, direction, group)
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"])
                for part, part_direction in zip(
                    parameter.chunk(group["parts"]), direction.chunk(group["parts"]), strict=True
                ):
                    steps[(*part.shape, group["newton_schulz_steps"])].append((part, part_direction, group))
        for (rows, columns, iterations), parts in steps.items():
            directions = orthogonalize(torch.stack([direction for _, direction, _ in parts]), iterations)
            scale = max(1.0, rows / columns) ** 0.5
            for (part, _, group), direction in zip(parts, directions, strict=True):
                part.mul_(1 - group["lr"] * group["weight_decay"])
                part.add_(direction, alpha=-group["lr"] * scale)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_parameter_groups(
    model: nn.Module, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """
    Groups for [`MuonWithAdamW`]: the weights of the linear layers inside the layers of the model are Muon's, AdamW's
    are embeddings, decoder, norms and scales. Raises `ValueError` for a model without such layers.
    """
    gated = bool(getattr(model.config, "gated_linear_unit", False))
    matrices = {
        f"{name}.weight": fused_matrices(name, gated)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and LAYER_PATTERN.search(name)
    }
    if not matrices:
        raise ValueError(
            f"muon_learning_rate is for the linear layers inside a model's layers (named like layers.0.), and "
            f"{type(model).__name__} has none: leave it out"
        )
    decayed = set(decayed_parameter_names(model))
    # By who decays, not by how much: a resumed run may choose another weight_decay, and finds its groups again.
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts, is_decayed = matrices.get(name, 0), name in decayed
        options = {
            "lr": muon_learning_rate if parts else learning_rate,
            "weight_decay": weight_decay if is_decayed else 0.0,
            "parts": parts,
        }
        group = groups.setdefault((parts, is_decayed), {"params": [], **options})
        group["params"].append(parameter)
    return list(groups.values())


def fused_matrices(name: str, gated: bool) -> int:
    """How many matrices the linear layer `name` holds: query, key and value are three, value and gate two."""
    if name.endswith("query_key_value"):
        return 3
    return 2 if gated and name.endswith("dense_in") else 1
