"""AdamW (arXiv 1711.05101), with torch's constants, on tensors that a checkpoint can hold."""

from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


def adamw_(
    variable: Tensor,
    mean: Tensor,
    squares: Tensor,
    gradient: Tensor,
    *,
    updates: float,
    rate: float,
    decay: float = 0.0,
) -> None:
    """One step down ``gradient``, in place, of ``variable`` and of the gradient's mean and mean square.

    updates: how many this one makes, 1 for the first. decay: weight decay.
    """
    first, second = BETAS
    mean.lerp_(gradient, 1 - first)
    squares.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    deviation = (squares / (1 - second**updates)).sqrt() + EPS
    variable.mul_(1 - rate * decay).addcdiv_(mean, deviation, value=-rate / (1 - first**updates))
