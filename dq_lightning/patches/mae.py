"""Fills dropped patches with a masked autoencoder (He et al. 2022).

Only this file of the folder imports transformers. Loading reads files, and may download weights from the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_lightning.core.errors import PatchError
from dq_lightning.core.grid import pad_to_grid, pixel_mask, unpatchify
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.records import Grid
from dq_lightning.patches.choose import mask_of
from dq_lightning.patches.harmonic import fill_harmonically
from dq_lightning.patches.original_checkpoint import convert_keys, read_original, read_sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BUNDLED_MAE = Path(__file__).resolve().parent.parent / "assets" / "cifar10_mae"
INSTEAD = 'pass a folder or a checkpoint file of the original format, or reconstructor="bundled"'


class MaskedAutoencoder:
    """A reconstructor that fills dropped patches by a masked autoencoder and leaves kept patches unchanged.

    Each patch of an image is one patch of the model. If the image's grid has as many rows and columns as the model's,
    but larger or smaller patches, the image is resized to the model's size, and the prediction is resized back. For any
    other grid the model runs with position embeddings that are interpolated in two dimensions.

    Args:
        model: a `ViTMAEForPreTraining`; this object takes it over and freezes it.
        mean: mean of each channel, for pixels in [0, 1], that the model was trained with.
        std: standard deviation of each channel that the model was trained with.
        harmonic: whether the model was trained to predict the difference from the harmonic filling instead of the
            pixels.

    Raises:
        PatchError: if the model was trained for normalised patches, which do not contain a patch's colour.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        harmonic: bool = False,
    ) -> None:
        self._model: Any = model
        self._model.eval().requires_grad_(False)
        config: Any = model.config
        if config.norm_pix_loss:
            raise PatchError(
                "this masked autoencoder predicts patches normalised one by one (norm_pix_loss), from which no image can be "
                "made; pass one trained on plain pixels, as facebook/vit-mae-base is"
            )
        self.mean, self.std = mean, std
        self.harmonic = harmonic
        self._positions: dict[tuple[int, int], Tensor] = {}

    @property
    def model_patch_size(self) -> int:
        """Side of the model's own patches in pixels."""
        size = self._model.config.patch_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def model_grid(self) -> tuple[int, int]:
        """Number of rows and columns of the model's own grid."""
        size = self._model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.model_patch_size, width // self.model_patch_size

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        device: torch.device = next(self._model.parameters()).device
        return device

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move the model in place to a device, change its precision if a dtype is given, and return this object."""
        self._model.to(device=device, dtype=dtype or self._model.dtype)
        self._positions.clear()
        return self

    def patch_size_for(self, height: int, width: int) -> int:
        """Return the patch side in pixels for images of this size.

        This is the side with which the image gets the model's grid, if such a side exists, and else the model's own.
        """
        rows, columns = self.model_grid
        if height % rows == 0 and width % columns == 0 and height // rows == width // columns:
            return height // rows
        return self.model_patch_size

    def reconstruct(self, images: Tensor, kept: Tensor, patch_size: int | None = None) -> Tensor:
        """Fill the patches that are not kept.

        Args:
            images: floating [B, C, H, W], normalised with `mean` and `std`; the content of dropped patches is ignored.
            kept: int64 [B, k], numbers of the kept patches of each image, without repetition, in any order.
            patch_size: P, side of a patch in pixels, of the grid that `kept` refers to; None takes `patch_size_for`.

        Returns:
            Filled images [B, C, H, W] of the same dtype and device; the pixels of kept patches are unchanged bit by
            bit.

        Raises:
            PatchError: if `kept` does not fit the grid.
        """
        grid = Grid(images.shape[2], images.shape[3], patch_size or self.patch_size_for(*images.shape[2:]))
        mask = _checked_mask(kept, len(images), grid).to(images.device)
        if bool(mask.all()) or not len(images):
            return images.clone()
        stays = pixel_mask(mask, grid)
        # Dropped pixels may have any value, even NaN, so they are set to 0.
        visible = pad_to_grid(torch.where(stays, images, 0), grid)
        size = (grid.rows * self.model_patch_size, grid.columns * self.model_patch_size)
        predicted = self._predict(_resize_patches(visible, mask, grid, size), mask)
        if size != tuple(visible.shape[2:]):
            whole = (visible.shape[2], visible.shape[3])
            predicted = F.interpolate(predicted, whole, mode="bicubic", align_corners=False, antialias=True)
        filled = predicted[..., : grid.height, : grid.width].to(images)
        if self.harmonic:
            filled = filled + fill_harmonically(images, mask, grid.patch_size)
        return torch.where(stays, images, filled)

    def _predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the prediction float32 [B, C, h, w] for images on a grid of model patches; it sees `mask` only."""
        config, size = self._model.config, self.model_patch_size
        grid = Grid(images.shape[2], images.shape[3], size)
        count, total = int(mask[0].sum()), grid.num_patches
        # The model keeps the int(L * (1 - mask_ratio)) patches of lowest noise. Half a patch more makes rounding safe.
        config.mask_ratio = 1 - (count + 0.5) / total
        places = torch.arange(total, device=mask.device)
        noise = (places + total * (~mask)).float().to(self.device)
        own = (grid.rows, grid.columns) == self.model_grid
        arguments: dict[str, Any] = {"noise": noise, "interpolate_pos_encoding": not own}
        replaced = {} if own else {"decoder.decoder_pos_embed": self._decoder_positions(grid)}
        with torch.no_grad():
            output = torch.func.functional_call(
                self._model, replaced, (images.to(self.device, self._model.dtype),), arguments
            )
        if not torch.equal(output.mask.bool(), ~mask.to(self.device)):
            raise PatchError(
                "the masked autoencoder did not keep the chosen patches, so this version of transformers is not supported: "
                "install another one"
            )
        pixels = output.logits.float().view(len(images), total, size, size, -1).permute(0, 1, 4, 2, 3)
        return unpatchify(pixels, grid)

    def _decoder_positions(self, grid: Grid) -> Tensor:
        """Return the decoder's position embeddings for another grid.

        The model itself would interpolate them along a line, as if the grid had one dimension.
        """
        key = (grid.rows, grid.columns)
        if key not in self._positions:
            whole: Tensor = self._model.decoder.decoder_pos_embed.detach()
            square = whole[:, 1:].float().transpose(1, 2).reshape(1, whole.shape[2], *self.model_grid)
            spread = F.interpolate(square, key, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
            self._positions[key] = torch.cat([whole[:, :1], spread.to(whole)], dim=1)
        return self._positions[key]


def _checked_mask(kept: Tensor, batch: int, grid: Grid) -> Tensor:
    if kept.ndim != 2 or len(kept) != batch or kept.is_floating_point():
        raise PatchError(f"kept must be int64 [{batch}, k], got {kept.dtype} {tuple(kept.shape)}")
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < grid.num_patches:
        raise PatchError(
            f"kept must lie in 0 ... {grid.num_patches - 1} for {grid}, got {int(kept.min())} ... {int(kept.max())}"
        )
    mask = mask_of(kept.long(), grid.num_patches)
    if bool((mask.sum(1) != kept.shape[1]).any()):
        raise PatchError("kept names a patch of an image twice")
    return mask


def _resize_patches(visible: Tensor, mask: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Resize images to `size` so that dropped pixels, which must be 0, do not influence the kept ones."""
    if size == tuple(visible.shape[2:]):
        return visible
    padded = Grid(visible.shape[2], visible.shape[3], grid.patch_size)
    both = torch.cat([visible.float(), pixel_mask(mask, padded).float()], dim=1)
    # Bilinear weights are positive inside of the kept patches. The model does not look at the other patches.
    both = F.interpolate(both, size, mode="bilinear", align_corners=False, antialias=True)
    inside = pixel_mask(mask, Grid(*size, size[0] // grid.rows))
    return torch.where(inside, both[:, :-1] / torch.where(inside, both[:, -1:], 1), 0)


def load_mae(
    path_or_name: Any,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> MaskedAutoencoder:
    """Load a masked autoencoder.

    Args:
        path_or_name: `"bundled"`, a hub name (`"facebook/vit-mae-base"`), a folder that transformers can load, a
            checkpoint file of the original format (`mae_visualize_vit_large_ganloss.pth`), or a `ViTMAEForPreTraining`.
            No code in a file is executed.
        num_heads: number of heads of the encoder in a checkpoint file whose size is not official.
        decoder_num_heads: number of heads of the decoder in a checkpoint file whose size is not official.
        revision: branch, tag or commit of a hub name.
        device: device that the model runs on.

    Returns:
        The reconstructor with the frozen model.

    Raises:
        PatchError: if the model cannot be found or read, its number of heads is not known, weights are missing, or it
            was trained for normalised patches.

    Example:
        >>> mae = load_mae("bundled")  # trained on CIFAR-10
        >>> images, kept = torch.zeros(1, 3, 32, 32), torch.arange(48)[None]
        >>> mae.reconstruct(images, kept).shape
        torch.Size([1, 3, 32, 32])
    """
    if isinstance(path_or_name, nn.Module):
        return MaskedAutoencoder(path_or_name).to(device)
    path = bundled_folder() if path_or_name == "bundled" else Path(path_or_name).expanduser()
    if path.is_file():
        return MaskedAutoencoder(_from_original(path, num_heads, decoder_num_heads)).to(device)
    if num_heads or decoder_num_heads:
        raise PatchError(
            f"num_heads= and decoder_num_heads= are only for checkpoint files, and {path_or_name!r} is not one: leave them "
            "out, since its configuration holds the numbers of heads"
        )
    name = str(path) if path.is_dir() else str(path_or_name)
    return MaskedAutoencoder(_from_pretrained(name, revision), **_preprocessing(name, revision)).to(device)


def _from_original(path: Path, num_heads: int | None, decoder_num_heads: int | None) -> nn.Module:
    from transformers import ViTMAEConfig

    state = read_original(path)
    config = ViTMAEConfig(**read_sizes(state, num_heads, decoder_num_heads))
    network = _from_pretrained(None, None, config=config, state_dict=convert_keys(state), what=str(path))
    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in (network.parameters(), state.values())]
    if sizes[0] != sizes[1]:
        raise PatchError(
            f"{path} has {sizes[1]} weights, but a masked autoencoder of this size has {sizes[0]}: it is of another "
            f"architecture; {INSTEAD}"
        )
    return network


def _from_pretrained(name: str | None, revision: str | None, what: str | None = None, **arguments: Any) -> nn.Module:
    from transformers import ViTMAEForPreTraining

    if revision is not None:
        arguments["revision"] = revision
    tool: Any = ViTMAEForPreTraining
    try:
        # transformers draws missing weights at random before it reports them, so the random state is isolated.
        with isolated_random_state(), _without_bars():
            model, report = tool.from_pretrained(
                name, trust_remote_code=False, output_loading_info=True, dtype=torch.float32, **arguments
            )
    except Exception as error:
        raise PatchError(
            f"transformers cannot load a masked autoencoder from {what or name}: {error}. Pass a hub name, a folder with "
            "config.json and weights, or a checkpoint file of the original format"
        ) from error
    absent = [key for kind in ("missing_keys", "mismatched_keys") for key in report[kind]]
    if absent:
        raise PatchError(
            f"{what or name} is not a complete masked autoencoder: it lacks the weights "
            f"{', '.join(map(str, sorted(absent)[:5]))}; {INSTEAD}"
        )
    network: nn.Module = model
    return network


@contextmanager
def _without_bars() -> Iterator[None]:
    """Run a block without the progress bar that transformers shows while it loads weights."""
    from transformers.utils import logging

    tools: Any = logging
    shown = tools.is_progress_bar_enabled()
    tools.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            tools.enable_progress_bar()


def _preprocessing(name: str, revision: str | None) -> dict[str, Any]:
    """Return `image_mean`, `image_std` (default: ImageNet) and `harmonic` of the model's preprocessor_config.json."""
    from transformers.image_processing_base import ImageProcessingMixin

    tool: Any = ImageProcessingMixin
    try:
        values, _ = tool.get_image_processor_dict(name, **({} if revision is None else {"revision": revision}))
    except OSError:
        values = {}
    return {
        "mean": tuple(values.get("image_mean", IMAGENET_MEAN)),
        "std": tuple(values.get("image_std", IMAGENET_STD)),
        "harmonic": bool(values.get("harmonic", False)),
    }


def bundled_folder() -> Path:
    """Return the folder of the bundled network.

    Raises:
        PatchError: if it is missing.
    """
    if not (BUNDLED_MAE / "config.json").is_file():
        raise PatchError(
            f"the bundled masked autoencoder {BUNDLED_MAE} is missing: install the package again, or {INSTEAD}"
        )
    return BUNDLED_MAE
