"""Parameter groups of the optimiser."""

from torch import nn


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: matrices and embeddings, not norms, biases and scales (section 4.3)."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
