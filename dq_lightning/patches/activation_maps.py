"""Grad-CAM and its kin: one forward pass, and a backward pass that ends at the feature map. Batched, on the images' device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.core.config import SaliencyTarget
from dq_lightning.core.errors import PatchError
from dq_lightning.patches.target_layer import TargetLayers, activation_and_gradient


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2: channels weighted by their mean gradient."""
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


def grad_cam_plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, equation 19, for an exponential of the score; the small constant is pytorch-grad-cam's."""
    square = gradient**2
    alpha = square / (2 * square + activation.sum((2, 3), keepdim=True) * square * gradient + 1e-6)
    alpha = torch.where(gradient != 0, alpha, 0)
    return ((gradient.clamp(min=0) * alpha).sum((2, 3), keepdim=True) * activation).sum(1)


def x_grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Fu et al. 2020, equation 8: gradients weighted by the share of the activation; the constant is pytorch-grad-cam's."""
    share = gradient * activation / (activation.sum((2, 3), keepdim=True) + 1e-7)
    return (share.sum((2, 3), keepdim=True) * activation).sum(1)


def high_resolution_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM, Draelos and Carin 2020, equation 4: gradient times activation, place by place."""
    return (gradient * activation).sum(1)


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Jiang et al. 2021, equation 6: positive gradients weight their own place."""
    return (gradient.clamp(min=0) * activation).sum(1)


def grad_cam_elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    """Positive part of gradient times activation, summed over channels (pytorch-grad-cam's GradCAMElementWise)."""
    return (gradient * activation).clamp(min=0).sum(1)


# each takes activation and gradient, float [B, C, h, w], and gives a map [B, h, w] whose negative part is cut off afterwards
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": grad_cam,
    "gradcam++": grad_cam_plus_plus,
    "xgradcam": x_grad_cam,
    "hirescam": high_resolution_cam,
    "layercam": layer_cam,
    "gradcamelementwise": grad_cam_elementwise,
}


class TargetChoice:
    """Which class each image is explained for.

    Args:
        target: `"auto"`: the label where the classifier knows it, and else the classifier's own argmax; `"label"`: an error
            where it does not know it; `"argmax"`: never the label.
        num_classes: of the dataset. The classifier knows the labels if it has exactly as many outputs.
        class_map: for every label the classifier's output that stands for it; then it knows the labels.
    """

    def __init__(
        self, target: SaliencyTarget = "auto", num_classes: int | None = None, class_map: Sequence[int] | None = None
    ) -> None:
        self.target = target
        self.num_classes = num_classes
        self.class_map = None if class_map is None else torch.tensor(class_map, dtype=torch.int64)

    def choose(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Output int64 [B] for logits [B, C] and labels int64 [B]; a label outside the classes is one that is not known.

        Raises:
            PatchError: labels are wanted but not known, or `class_map` names an output that there is not.
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
            raise PatchError(f"class_map names outputs outside 0 ... {outputs - 1}: {table.tolist()[:20]}")
        inside = (labels >= 0) & (labels < len(table))
        if self.target == "label" and not bool(inside.all()):
            raise PatchError(f'target="label", but a label is outside 0 ... {len(table) - 1}; use target="auto"')
        return torch.where(inside, table[labels.clamp(0, len(table) - 1)], own)


class ActivationMaps:
    """Saliency maps from one layer's activation and gradient; the network is left exactly as it was.

    The part of the network before the layer runs without a graph, and the gradient is asked for the feature map alone: no
    parameter gets one.

    Args:
        module: classifier, on the images' device; it gives logits [B, C].
        method: a name in `METHODS`.
        targets: which class is explained.
        target_layer: name of the layer; found by `find_target_layer` when None.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str = "gradcam",
        targets: TargetChoice | None = None,
        target_layer: str | None = None,
    ) -> None:
        if method not in METHODS:
            raise PatchError(f"unknown saliency method {method!r}; here are {', '.join(METHODS)}")
        self._module = module
        self._combine = METHODS[method]
        self._targets = targets or TargetChoice()
        self._layers = TargetLayers(module, target_layer)

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Saliency in [0, 1] of every pixel.

        Args:
            images: floating [B, 3, h, w] as the classifier takes them.
            labels: int64 [B] or None.
            size: (H, W) of the maps; that of the images when None.

        Returns:
            float32 [B, H, W]; the largest value of an image is 1, or the map is 0 where nothing speaks for the class.

        Raises:
            PatchError: the gradient does not reach the layer, or no layer can be found.
        """
        layer = self._layers.of(images)
        activation, gradient = activation_and_gradient(
            self._module, layer, images, lambda logits: self._targets.choose(logits, labels)
        )
        # half precision would lose the sums over places; double stays, because Grad-CAM++ divides by what may nearly vanish
        kind = torch.promote_types(gradient.dtype, torch.float32)
        return upscale(
            self._combine(activation.to(kind), gradient.to(kind)), size or (images.shape[2], images.shape[3])
        )

    def check(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Raise PatchError if there can be no maps of images like these; arguments as for the maps."""
        self(images, labels)


def upscale(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut off what is negative in maps [B, h, w], scale each to [0, 1], enlarge them bilinearly to `size`, scale again."""
    scaled = _scale(maps.clamp(min=0))
    enlarged = F.interpolate(scaled[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return _scale(enlarged).float()


def _scale(maps: Tensor) -> Tensor:
    shifted = maps - maps.amin((1, 2), keepdim=True)
    largest = shifted.amax((1, 2), keepdim=True)
    # a flat map has no largest place; dividing by a small constant instead would flatten faint maps too
    return shifted / torch.where(largest > 0, largest, 1)
