"""Finds the layer of a classifier that a saliency map is computed at, and how its output becomes a feature map.

The layout of an output is measured, not guessed from names. If the network accepts taller and wider images, these show
which dimensions are the height and the width. In addition, a textured square is moved over a plain image: a layout is
accepted if the change of the output moves along with the square.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.core.errors import PatchError

# Names of the norm before the attention of a transformer block: timm and torchvision's Swin, torchvision's ViT,
# transformers.
FIRST_NORMS = ("norm1", "ln_1", "layernorm_before")
MAX_PREFIX_TOKENS = 16
# The image is divided into 3 x 3 equal parts, and the square is put into each of them.
PARTS_A_SIDE = 3
# If a network accepts images of any size, larger images are used: in a map of 2 x 2 places, the places hardly differ.
PROBE_SIDE = 128
# Least correlation between the change of an output and the position of the square. Random networks of 70 families of
# timm gave 0.3 to 1 in the right layout, and in a wrong one at most 0.25 for tokens and 0.1 for four dimensions.
MIN_CORRELATION = 0.3
# Least correlation for an output with four dimensions whose shape admits only one layout.
MIN_CORRELATION_OF_ONE = 0.15
# Least correlation if taller and wider images have already shown the dimensions. Then the square must just not
# contradict, as it would if the map were rolled over. A network that mixes all places of a small map gives about 0.
MIN_CORRELATION_AFTER_SIZES = -0.2
# Number of layers whose outputs are held in memory at the same time.
LAYERS_AT_ONCE = 8
HOW_TO_NAME = (
    "name the layer yourself: PatchConfig(target_layer=NAME), a name of network.named_modules() whose output is [B, C, h, w], "
    '[B, h, w, C] or [B, tokens, C]; or pass another classifier=, or saliency="variance", which needs none'
)


@dataclass(frozen=True)
class TargetLayer:
    """A layer and the layout of its output.

    Attributes:
        name: name of the layer, as `get_submodule` takes it.
        layout: `"NCHW"`, `"NHWC"` or `"tokens"` ([B, prefix + rows * columns, C]).
        rows: number of rows of the feature map.
        columns: number of columns of the feature map.
        prefix: number of class and register tokens before the tokens of the patches.
    """

    name: str
    layout: Literal["NCHW", "NHWC", "tokens"]
    rows: int
    columns: int
    prefix: int = 0

    def to_map(self, output: Tensor) -> Tensor:
        """Convert the layer's output, or a gradient of the same shape, to a map [B, C, rows, columns]."""
        if self.layout == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            tokens = output[:, self.prefix :].transpose(1, 2)
            return tokens.reshape(*tokens.shape[:2], self.rows, self.columns)
        return output


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Run a block with the network in eval mode and without gradients for its parameters, then restore every flag."""
    modes = [(child, child.training) for child in module.modules()]
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        # The flags are set one by one, because a network may override train() and eval().
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


class TargetLayers:
    """The layer, named or found by `find_target_layer`, at which maps of images of every size are computed."""

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        self._module, self._name = module, name
        self._known: dict[tuple[int, ...], TargetLayer] = {}

    def of(self, images: Tensor) -> TargetLayer:
        """Return the layer for images [B, C, H, W] of this size, as the classifier takes them.

        It is looked for once for each size. If an earlier size has a layer that also gives a map for this size, that
        layer is used again.

        Raises:
            PatchError: if no layer is found.
        """
        shape = tuple(images.shape[1:])
        if shape not in self._known:
            layer = self._known_layer(images) or find_target_layer(self._module, images, self._name)
            self._known[shape] = layer
        return self._known[shape]

    def of_copy(self, module: nn.Module) -> "TargetLayers":
        """Return the same for a copy of the network; a layer that is found for one is known to both."""
        twin = TargetLayers(module, self._name)
        twin._known = self._known
        return twin

    def _known_layer(self, images: Tensor) -> TargetLayer | None:
        # A copy in another thread may add a layer meanwhile.
        first = next(iter(list(self._known.values())), None)
        if first is None:
            return None
        output = _outputs(self._module, images[:1], [first.name])[first.name]
        return next((layer for layer in _layouts(first.name, output.shape, images) if _same_layout(layer, first)), None)


def find_target_layer(module: nn.Module, images: Tensor, name: str | None = None) -> TargetLayer:
    """Find the layer for saliency maps, and prove the layout of its output, by running the network on a few images.

    For a transformer this is the norm before its last attention: behind this attention, class-token pooling leaves the
    patches without any gradient. For any other network it is the last layer that has a map. A layer is accepted if the
    change of its output follows a square that is moved over the image, and if its map receives a nonzero gradient of
    the class score.

    Args:
        module: the classifier; it is not changed.
        images: [B, C, H, W] as the classifier takes them; only their size, mean and standard deviation are used to
            prove a layout.
        name: name of the layer if it is given; then only its layout is looked for.

    Raises:
        PatchError: if there is no such layer, or no layout of its output can be proved; the message says how to name
            one by `target_layer=`. Also if the class scores do not depend on the image.
    """
    images = images.detach()
    shapes = _shapes(module, images[:1].expand(2, -1, -1, -1))
    if name is not None and name not in shapes:
        raise PatchError(
            f"target_layer={name!r} gives no tensor in {type(module).__name__}: name "
            f"another layer, such as {_last_names(shapes)}"
        )
    sizes = _ResizedShapes(module, images)
    # Two images were passed. In the output of window attention, for example, the first dimension is not the batch.
    fitting = {
        key: sizes.required_correlations(list(_layouts(key, shape, images)), shape)
        for key, shape in shapes.items()
        if shape[0] == 2
    }
    order = [key for key in reversed(fitting) if fitting[key] and name in (None, key)]
    if name is None and order:
        # The norm of a stem has the name of a transformer's norms too, but a far finer grid than the last layers.
        finest = 2 * max(one.rows for one in fitting[order[0]])

        def may_be_before_attention(key: str) -> bool:
            return _is_first_norm(key) and any(one.layout != "NCHW" and one.rows <= finest for one in fitting[key])

        order.sort(key=lambda key: not may_be_before_attention(key))
    probes, places = make_probes(images, sizes.times)
    for start in range(0, len(order), LAYERS_AT_ONCE):
        some = order[start : start + LAYERS_AT_ONCE]
        outputs = _outputs(module, probes, some)
        for key in some:
            layer = _best_layout(fitting[key], outputs[key], probes, places)
            if layer is None or (name is None and _is_first_norm(key) and layer.layout == "NCHW"):
                continue
            if name is not None or _has_gradient(module, layer, images[:1]):
                return layer
            _check_depends_on_image(module, images)
    if name is not None:
        raise PatchError(
            f"the output {tuple(shapes[name])} of target_layer={name!r} of {type(module).__name__} is not a feature map of "
            f"images of {tuple(images.shape[2:])} pixels: when something moves in the image, the change of the output moves "
            "along in none of the layouts [B, C, h, w], [B, h, w, C] and [B, tokens, C]. Name another layer; the last ones are "
            f"{_last_names(shapes)}"
        )
    raise PatchError(
        f"no layer of {type(module).__name__} was found to be a feature map of images of {tuple(images.shape[2:])} pixels: "
        f"pass larger images, or {HOW_TO_NAME}. The last layers are {_last_names(shapes)}"
    )


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, C] in a network's output: itself, its `.logits`, or the first element of a tuple or list.

    Raises:
        PatchError: if they are no tensor with two dimensions.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PatchError(
            f"the classifier must give logits [B, C], got {type(output).__name__} {getattr(logits, 'shape', '')}"
        )
    return logits


def activation_and_gradient(
    module: nn.Module, layer: TargetLayer, images: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute a layer's output, and the gradient of the chosen class scores with respect to it.

    Both are returned as maps [B, C, rows, columns]. The part of the network before the layer runs without an autograd
    graph, no parameter gets a gradient, and the network is not changed. `choose` is a function from logits [B, C] to
    the class of every image, int64 [B].

    Raises:
        PatchError: if the logits do not depend on the layer, or if their gradient is zero in the whole map.
    """
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        # The network may continue in place. Autograd does not allow that on a leaf, and the activation must not change.
        return leaves[-1].clone()

    with frozen(module), torch.inference_mode(False), torch.enable_grad():
        handle = module.get_submodule(layer.name).register_forward_hook(cut)
        try:
            logits = logits_of(module(images.detach()))
        finally:
            handle.remove()
        score = logits.gather(1, choose(logits.detach())[:, None]).sum()
        if not score.requires_grad:
            raise PatchError(f"the logits do not depend on layer {layer.name!r}: pass another target_layer")
        gradient = torch.autograd.grad(score, leaves[-1], allow_unused=True)[0]
    if gradient is None or not bool(layer.to_map(gradient).any()):
        raise PatchError(
            f"the gradient of the class score is zero at layer {layer.name!r}: the classifier does not look at the patches "
            "there (class-token pooling behind the last attention does this); pass another target_layer"
        )
    return layer.to_map(leaves[-1].detach()), layer.to_map(gradient)


def _outputs(module: nn.Module, images: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return the last output of each of the named layers."""
    seen: dict[str, Tensor] = {}
    # The output is copied, since the network may change it in place.
    _run_with(lambda name, output: seen.update({name: output.clone()}), names, module, images)
    return seen


def _shapes(module: nn.Module, images: Tensor) -> dict[str, torch.Size]:
    """Return the shapes of the last outputs of all layers that give a tensor, in the order in which layers finish."""
    seen: dict[str, torch.Size] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.pop(name, None)
            seen[name] = output.shape

    _run_with(note, [name for name, _ in module.named_modules() if name], module, images)
    return {name: shape for name, shape in seen.items() if len(shape) in (3, 4)}


def _run_with(note: Callable[[str, Any], None], names: Collection[str], module: nn.Module, images: Tensor) -> None:
    """Run the network, and call `note` with the name and the output of each of the named layers when it finishes."""
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name in names
    ]
    try:
        with frozen(module), torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()


class _ResizedShapes:
    """Compares output shapes for images of twice the height, and of twice the width, to identify dimensions.

    `times` is the side of the probe images divided by the side of the given images.
    """

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        self.times = 1
        self._tall: dict[str, torch.Size] = {}
        self._wide: dict[str, torch.Size] = {}
        try:
            self._tall = _shapes(module, images[:1].repeat(1, 1, 2, 1))
            self._wide = _shapes(module, images[:1].repeat(1, 1, 1, 2))
            times = -(-PROBE_SIDE // min(images.shape[2:]))
            _shapes(module, images[:1].repeat(1, 1, times, times))
            self.times = times
        except Exception:
            # A network for one size only can fail in many ways: at position embeddings, windows, or linear layers.
            self._tall = self._wide = {}

    def required_correlations(self, layers: list[TargetLayer], shape: torch.Size) -> dict[TargetLayer, float]:
        """Return the layouts that the sizes do not contradict, with the correlation that each of them needs."""
        left = [layer for layer in layers if not self._depends_on_size(layer, shape) or self._confirms(layer, shape)]
        unproved = MIN_CORRELATION_OF_ONE if len(left) == 1 and len(shape) == 4 else MIN_CORRELATION
        return {layer: MIN_CORRELATION_AFTER_SIZES if self._confirms(layer, shape) else unproved for layer in left}

    def _confirms(self, layer: TargetLayer, shape: torch.Size) -> bool:
        """Return whether the output's shape for taller and wider images confirms this layout."""
        tall, wide = self._tall.get(layer.name), self._wide.get(layer.name)
        if not self._depends_on_size(layer, shape) or tall is None or wide is None:
            return False
        if layer.layout == "tokens":
            higher, further = tall[1] - layer.prefix, wide[1] - layer.prefix
            return (
                higher % layer.columns == further % layer.rows == 0
                and layer.rows < higher // layer.columns <= 2 * layer.rows + 1
                and layer.columns < further // layer.rows <= 2 * layer.columns + 1
                and tall[2] == wide[2] == shape[2]
            )
        row = 2 if layer.layout == "NCHW" else 1
        return _changed_axes(shape, tall) == [row] and _changed_axes(shape, wide) == [row + 1]

    def _depends_on_size(self, layer: TargetLayer, shape: torch.Size) -> bool:
        """Return whether the output's shape changes with the image size; pooling to a fixed size prevents that."""
        return any(
            len(other) != len(shape) or _changed_axes(shape, other)
            for shapes in (self._tall, self._wide)
            if (other := shapes.get(layer.name)) is not None
        )


def _changed_axes(shape: torch.Size, other: torch.Size) -> list[int]:
    """Return the dimensions after the batch dimension in which two shapes differ."""
    return [axis for axis in range(1, len(shape)) if len(other) == len(shape) and other[axis] != shape[axis]]


def _layouts(name: str, shape: torch.Size, images: Tensor) -> Iterator[TargetLayer]:
    """Yield every layout that fits an output's shape: its grid has about the aspect ratio of images [B, C, H, W]."""
    height, width = images.shape[2:]

    def fits(rows: int, columns: int) -> bool:
        return min(rows, columns) > 1 and abs(rows * width - columns * height) < max(height, width)

    if len(shape) == 4 and fits(shape[2], shape[3]):
        yield TargetLayer(name, "NCHW", shape[2], shape[3])
    if len(shape) == 4 and fits(shape[1], shape[2]):
        yield TargetLayer(name, "NHWC", shape[1], shape[2])
    for prefix in range(MAX_PREFIX_TOKENS + 1) if len(shape) == 3 else ():
        count = shape[1] - prefix
        if 2 * prefix > count:
            # Any number of tokens is some small grid behind enough others, but class and register tokens are few.
            break
        ideal = int((max(count, 0) * height / width) ** 0.5)
        for rows in (ideal, ideal + 1):
            if rows and count % rows == 0 and fits(rows, count // rows):
                yield TargetLayer(name, "tokens", rows, count // rows, prefix)


def _same_layout(one: TargetLayer, other: TargetLayer) -> bool:
    """Return whether two layouts are equal except for the size of the map."""
    return (one.layout, one.prefix) == (other.layout, other.prefix)


def _is_first_norm(name: str) -> bool:
    return name.rpartition(".")[2] in FIRST_NORMS


def _last_names(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in list(shapes.items())[-12:])


def make_probes(images: Tensor, times: int = 1) -> tuple[Tensor, Tensor]:
    """Make a plain image, and nine copies of it, each with a textured square in another place.

    The probes [1 + 9, C, times * H, times * W], the plain one first, have the mean and standard deviation of the given
    images [B, C, H, W]. The places [9, 1, times * H, times * W] are 1 in the square and 0 elsewhere.
    """
    channels, height, width = images.shape[1], times * images.shape[2], times * images.shape[3]
    draw = torch.Generator().manual_seed(0)
    mean, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    # Images of one colour, or of one pixel, have no usable standard deviation.
    spread = torch.where(spread > 1e-6, spread, 1)

    def texture(amplitude: float) -> Tensor:
        fine = torch.randn(1, channels, height, width, generator=draw)
        coarse = torch.randn(1, channels, -(-height // 8), -(-width // 8), generator=draw)
        return mean + amplitude * spread * (fine + F.interpolate(coarse, (height, width))).to(images)

    plain, square = texture(0.3), texture(1.0) + spread
    places = torch.zeros(PARTS_A_SIDE**2, 1, height, width, device=images.device, dtype=images.dtype)
    for place in range(len(places)):
        row, column = divmod(place, PARTS_A_SIDE)
        ys = slice(row * height // PARTS_A_SIDE, (row + 1) * height // PARTS_A_SIDE)
        xs = slice(column * width // PARTS_A_SIDE, (column + 1) * width // PARTS_A_SIDE)
        places[place, :, ys, xs] = 1
    return torch.cat([plain, torch.where(places > 0, square, plain)]), places


def _best_layout(
    required_correlations: dict[TargetLayer, float], output: Tensor, probes: Tensor, places: Tensor
) -> TargetLayer | None:
    """Return the layout in which the output [1 + 9, ...] follows the square best, or None if it does so too little."""
    best, found = -1.0, None
    for layer in required_correlations:
        for probed in _layouts(layer.name, output.shape, probes):
            if _same_layout(layer, probed) and (correlation := _square_correlation(probed, output, places)) > best:
                best, found = correlation, layer
    return found if found is not None and best >= required_correlations[found] else None


def _square_correlation(layer: TargetLayer, output: Tensor, places: Tensor) -> float:
    """Return the correlation, -1 to 1, between where a layer's output for the probes changes and where the square is.

    It is taken over all places of the square, [9, 1, H, W], and is 0 if nothing changes.
    """
    maps = layer.to_map(output.float())
    plain, moved = maps[:1], maps[1:]
    length = plain.norm(dim=1) + moved.norm(dim=1)
    # The change is relative to the length, because in trained transformers a few tokens are far longer than all others.
    change = (moved - plain).norm(dim=1) / torch.where(length > 0, length, 1)
    change = change / change.sum((1, 2), keepdim=True).clamp(min=1e-30)
    covered = F.adaptive_avg_pool2d(places.float(), (layer.rows, layer.columns))[:, 0]
    # This removes what is the same wherever the square is.
    change, covered = change - change.mean(0), covered - covered.mean(0)
    scale = float(change.norm() * covered.norm())
    return float((change * covered).sum()) / scale if scale > 0 else 0.0


def _has_gradient(module: nn.Module, layer: TargetLayer, images: Tensor) -> bool:
    """Return whether the class score has a nonzero gradient at a layer."""
    try:
        activation_and_gradient(module, layer, images, lambda logits: logits.argmax(1))
    except PatchError:
        return False
    return True


def _check_depends_on_image(module: nn.Module, images: Tensor) -> None:
    """Raise a PatchError if the gradient of the class scores is zero at every pixel of the image."""
    with frozen(module), torch.inference_mode(False), torch.enable_grad():
        probes = make_probes(images)[0][:2].requires_grad_()
        score = logits_of(module(probes)).amax(1).sum()
        gradient = torch.autograd.grad(score, probes, allow_unused=True)[0] if score.requires_grad else None
    if gradient is None or not bool(gradient.any()):
        raise PatchError(
            f"the class scores of {type(module).__name__} do not depend on the image (weights of a new head are often zero): "
            'train it first, pass another classifier=, or use saliency="variance"'
        )
