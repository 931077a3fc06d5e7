"""Which layer of a classifier a saliency map is read from, and how its output becomes a feature map."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_lightning.errors import PatchError

# the norm before the attention of a transformer block: timm and torchvision's Swin, torchvision's ViT, transformers
FIRST_NORMS = ("norm1", "ln_1", "layernorm_before")
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class TargetLayer:
    """A layer and the layout of its output.

    Attributes:
        name: as `get_submodule` takes it.
        layout: `"NCHW"`, `"NHWC"` or `"tokens"` ([B, prefix + rows * columns, C]).
        prefix: class and register tokens before those of the patches.
        rows: of the tokens.
        columns: of the tokens.
    """

    name: str
    layout: Literal["NCHW", "NHWC", "tokens"]
    prefix: int = 0
    rows: int = 0
    columns: int = 0

    def to_map(self, output: Tensor) -> Tensor:
        """The layer's output, or a gradient of its shape, as [B, C, h, w]."""
        if self.layout == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            tokens = output[:, self.prefix :].transpose(1, 2)
            return tokens.reshape(*tokens.shape[:2], self.rows, self.columns)
        return output


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Run a block with the network in eval mode and no gradient for its parameters; then put every flag back."""
    modes = [(child, child.training) for child in module.modules()]
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        # set one by one: a network may override train() and eval()
        for child, _ in modes:
            child.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def find_target_layer(module: nn.Module, images: Tensor, name: str | None = None) -> TargetLayer:
    """Find the layer for saliency maps by running the network once on one image.

    A transformer gives the norm before its last attention: behind it, class-token pooling leaves the patches without any
    gradient. Every other network gives the last layer whose output still has two dimensions larger than 1.

    Args:
        module: the classifier; it is left as it was.
        images: [B, 3, H, W] as the classifier takes them; the first is used.
        name: of the layer, if it is given and only its layout is wanted.

    Raises:
        PatchError: there is no such layer.
    """
    seen: list[tuple[str, nn.Module, torch.Size]] = []

    def note(layer_name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.append((layer_name, layer, output.shape))

        return hook

    handles = [
        child.register_forward_hook(note(child_name)) for child_name, child in module.named_modules() if child_name
    ]
    try:
        with frozen(module), torch.no_grad():
            module(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    if name is not None:
        for layer_name, layer, shape in reversed(seen):
            if layer_name == name:
                return _describe(module, name, layer, shape, images)
        raise PatchError(
            f"target_layer={name!r} gives no tensor in {type(module).__name__}; layers: {_last_names(seen)}"
        )
    for layer_name, layer, shape in reversed(seen):
        is_first_norm = layer_name.rpartition(".")[2] in FIRST_NORMS and len(shape) in (3, 4)
        if is_first_norm and _normalises_last(layer, shape):
            return _describe(module, layer_name, layer, shape, images)
    for layer_name, layer, shape in reversed(seen):
        # attention weights have four dimensions too
        if len(shape) == 4 and min(shape[2:]) > 1 and not isinstance(layer, nn.Dropout | nn.Softmax):
            return _describe(module, layer_name, layer, shape, images)
    raise PatchError(
        f"no layer of {type(module).__name__} has a feature map for images of {tuple(images.shape[2:])} pixels: pass larger "
        f"images, or target_layer=; the last layers are {_last_names(seen)}"
    )


def _last_names(seen: list[tuple[str, nn.Module, torch.Size]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, _, shape in seen[-12:])


def _normalises_last(layer: nn.Module, shape: torch.Size) -> bool:
    """Whether a layer is a norm over the last dimension of its output (LayerNorm and its kin)."""
    kind = type(layer).__name__
    weight = getattr(layer, "weight", None)
    width = weight.numel() if isinstance(weight, Tensor) else shape[-1]
    return "Norm" in kind and not kind.endswith("2d") and not isinstance(layer, nn.GroupNorm) and width == shape[-1]


def _describe(module: nn.Module, name: str, layer: nn.Module, shape: torch.Size, images: Tensor) -> TargetLayer:
    if len(shape) == 4:
        return TargetLayer(name, "NHWC" if _normalises_last(layer, shape) else "NCHW")
    if len(shape) != 3:
        raise PatchError(f"the output {tuple(shape)} of layer {name!r} is no feature map; pass another target_layer")
    declared = [getattr(child, "num_prefix_tokens", None) for child in module.modules()]
    prefixes = [n for n in declared if isinstance(n, int)][:1] or list(range(MOST_PREFIX_TOKENS + 1))
    height, width = images.shape[2:]
    for prefix in prefixes:
        count = shape[1] - prefix
        rows = round((max(count, 0) * height / width) ** 0.5)
        if rows and count % rows == 0 and abs(rows * width - count // rows * height) < max(height, width):
            return TargetLayer(name, "tokens", prefix, rows, count // rows)
    raise PatchError(
        f"the {shape[1]} tokens of layer {name!r} make no grid for images of {(height, width)} pixels with "
        f"{' or '.join(map(str, prefixes))} tokens before them; pass another target_layer"
    )
