"""Grad-CAM and related methods, in batches: one forward pass, and a backward pass that ends at the feature map."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.core.config import SaliencyTarget
from dq_lightning.core.errors import PatchError
from dq_lightning.patches.target_layer import TargetLayers, activation_and_gradient


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight channels by their mean gradient (Grad-CAM, Selvaraju et al. 2017, equations 1 and 2)."""
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight channels by equation 19 of Chattopadhay et al. 2018 (Grad-CAM++), for an exponential of the class score.

    The small constant is that of pytorch-grad-cam.
    """
    square = gradient**2
    alpha = square / (2 * square + activation.sum((2, 3), keepdim=True) * square * gradient + 1e-6)
    alpha = torch.where(gradient != 0, alpha, 0)
    return ((gradient.clamp(min=0) * alpha).sum((2, 3), keepdim=True) * activation).sum(1)


def x_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight gradients by their place's share of the activation (XGrad-CAM, Fu et al. 2020, equation 8).

    The small constant is that of pytorch-grad-cam.
    """
    share = gradient * activation / (activation.sum((2, 3), keepdim=True) + 1e-7)
    return (share.sum((2, 3), keepdim=True) * activation).sum(1)


def high_resolution_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Multiply gradient and activation at each place (HiResCAM, Draelos and Carin 2020, equation 4)."""
    return (gradient * activation).sum(1)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Weight the activation at each place by its positive gradient (LayerCAM, Jiang et al. 2021, equation 6)."""
    return (gradient.clamp(min=0) * activation).sum(1)


def grad_cam_elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum the positive part of gradient times activation over the channels (pytorch-grad-cam's GradCAMElementWise)."""
    return (gradient * activation).clamp(min=0).sum(1)


# Each function takes activation and gradient, float [B, C, h, w], and returns a map [B, h, w]. Its negative part is set
# to 0 afterwards.
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "xgradcam": x_grad_cam,
    "hirescam": high_resolution_cam,
    "layercam": layer_cam,
    "gradcamelementwise": grad_cam_elementwise,
}


class TargetChoice:
    """Chooses the class that each image's saliency map explains.

    Args:
        target: `"auto"` takes the label if the classifier has an output for it, and else the classifier's argmax;
            `"label"` takes the label, and raises an error if the classifier has no output for it; `"argmax"` never
            takes the label.
        num_classes: number of classes in the dataset. Without a `class_map`, labels are used as outputs if the
            classifier has exactly as many outputs.
        class_map: the classifier's output for every label; labels are then used whatever the number of outputs is.
    """

    def __init__(
        self, target: SaliencyTarget = "auto", num_classes: int | None = None, class_map: Sequence[int] | None = None
    ) -> None:
        self.target = target
        self.num_classes = num_classes
        self.class_map = None if class_map is None else torch.tensor(class_map, dtype=torch.int64)

    def choose(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Choose the explained output of each image, int64 [B], by the classifier's outputs [B, C].

        A label, int64 [B], outside of the classes counts as unknown.

        Raises:
            PatchError: if labels are required but not known, or if `class_map` names an output that does not exist.
        """
        own = logits.argmax(1)
        outputs = logits.shape[1]
        knows = self.class_map is not None or self.num_classes == outputs
        if self.target == "argmax" or (self.target == "auto" and (labels is None or not knows)):
            return own
        if labels is None or not knows:
            raise PatchError(
                f'target="label" needs labels that the classifier knows: it has {outputs} outputs, the dataset '
                f'{self.num_classes} classes; pass class_map=, or target="argmax"'
            )
        labels = labels.to(logits.device)
        table = torch.arange(outputs) if self.class_map is None else self.class_map
        table = table.to(logits.device)
        if len(table) and not 0 <= int(table.min()) <= int(table.max()) < outputs:
            raise PatchError(
                f"class_map must name outputs of the classifier, 0 ... {outputs - 1}, got {table.tolist()[:20]}"
            )
        inside = (labels >= 0) & (labels < len(table))
        if self.target == "label" and not bool(inside.all()):
            raise PatchError(f'target="label", but a label is outside 0 ... {len(table) - 1}: use target="auto"')
        return torch.where(inside, table[labels.clamp(0, len(table) - 1)], own)


class SaliencyMaps(ABC):
    """Computes saliency maps of a classifier at one of its layers.

    Args:
        module: classifier on the images' device; it gives logits [B, C].
        method: name of the method.
        targets: choice of the explained class; the default is `TargetChoice()`.
        target_layer: name of the layer; None finds one by `find_target_layer`.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str = "gradcam",
        targets: TargetChoice | None = None,
        target_layer: str | None = None,
    ) -> None:
        self._module, self._method = module, method
        self._targets = targets or TargetChoice()
        self._layers = TargetLayers(module, target_layer)

    @abstractmethod
    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Compute the saliency in [0, 1] of every pixel.

        Args:
            images: floating [B, 3, h, w] as the classifier takes them.
            labels: int64 [B], class of each image, or None.
            size: (H, W) of the maps in pixels; None takes the size of the images.

        Returns:
            float32 [B, H, W]; the largest value of each map is 1, or the whole map is 0 if it has no positive part.

        Raises:
            PatchError: if no layer can be found, the class cannot be chosen, or the method fails on this network, such
                as by a gradient that is zero at the layer.
        """

    @abstractmethod
    def check(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Check that maps can be computed for images like these; the arguments are those of `__call__`.

        Raises:
            PatchError: if they cannot.
        """

    def replica(self, device: torch.device) -> Self:
        """Return a copy with a classifier of its own on another device; both know the layers that either finds."""
        twin = copy.copy(self)
        twin._module = copy.deepcopy(self._module).to(device)
        twin._layers = self._layers.of_copy(twin._module)
        return twin


class ActivationMaps(SaliencyMaps):
    """Computes saliency maps from one layer's activation and gradient; the network is not changed.

    The part of the network before the layer runs without an autograd graph. The gradient is computed only for the
    feature map, and no parameter gets one. The method is a name in `METHODS`.
    """

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        layer = self._layers.of(images)
        activation, gradient = activation_and_gradient(
            self._module, layer, images, lambda logits: self._targets.choose(logits, labels)
        )
        # Half precision would lose accuracy in the sums over places. float64 stays, because Grad-CAM++ divides by
        # numbers that may be nearly 0.
        kind = torch.promote_types(gradient.dtype, torch.float32)
        return upscale(
            METHODS[self._method](activation.to(kind), gradient.to(kind)), size or (images.shape[2], images.shape[3])
        )

    def check(self, images: Tensor, labels: Tensor | None = None) -> None:
        self(images, labels)


def upscale(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Set negative values of maps [B, h, w] to 0, and enlarge the maps bilinearly to `size`; return float32 [B, H, W].

    Each map is scaled to [0, 1] before and after it is enlarged.
    """
    scaled = _scale(maps.clamp(min=0))
    enlarged = F.interpolate(scaled[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return _scale(enlarged).float()


def _scale(maps: Tensor) -> Tensor:
    shifted = maps - maps.amin((1, 2), keepdim=True)
    largest = shifted.amax((1, 2), keepdim=True)
    # A flat map stays 0. Dividing by a small constant instead would flatten faint maps, too.
    return shifted / torch.where(largest > 0, largest, 1)
