"""What one trained network says of the images: all that a difficulty score or ordering is computed from.

The gradient of image i's cross-entropy in the last linear layer's weight and bias is (e_i h_i^T, e_i), with h_i the
layer's input and e_i = p_i - y_i the error. So the inner product of two gradients is <e_i, e_j> (1 + <h_i, h_j>), and
nobody needs the ``[n, K (D + 1)]`` gradients themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pad.data.placement import Images, fits
from pad.difficulty.scores import error_vectors
from pad.nn.networks import AnyNetwork


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one trained network, in eval mode, says of n images.

    features: ``[n, D]`` float32, the last linear layer's input; logits: ``[n, K]`` float32; labels: ``[n]`` int64; all
    on one device.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, indices: Tensor) -> "Evidence":
        """The same of some images, such as those of one class; ``indices [m]`` int64 or a mask ``[n]``."""
        indices = indices.to(self.labels.device)
        return Evidence(self.features[indices], self.logits[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> "Evidence":
        """The same on ``device``."""
        return Evidence(self.features.to(device), self.logits.to(device), self.labels.to(device))

    @property
    def errors(self) -> Tensor:
        """Probabilities minus the one-hot labels, ``[n, K]``."""
        return error_vectors(self.logits, self.labels)


@torch.no_grad()
def collect_evidence(network: AnyNetwork, images: Images, labels: Tensor, batch: int = 512) -> Evidence:
    """The evidence of all ``images [N, C, H, W]`` with ``labels [N]``, from one forward pass.

    The network must be in eval mode; then ``batch`` changes speed and memory only. The evidence lies on the device of
    the images, or on the CPU where that has no room for it.
    """
    n = len(images)
    num_classes, num_features = network.classifier.weight.shape
    dtype = network.classifier.weight.dtype
    device = images.device
    if not fits(dtype.itemsize * n * (num_features + num_classes), device):
        device = torch.device("cpu")
    features = torch.empty(n, num_features, dtype=dtype, device=device)
    logits = torch.empty(n, num_classes, dtype=dtype, device=device)
    for x, h, f in zip(images.split(batch), features.split(batch), logits.split(batch)):
        seen = network.features(x)
        h.copy_(seen)
        f.copy_(network.classifier(seen))
    return Evidence(features, logits, labels.to(device))
