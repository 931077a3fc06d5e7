"""Decides which reconstructor a name stands for, and identifies it without loading it."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.errors import PatchError
from dq_lightning.core.libraries import library_version
from dq_lightning.identity.networks import WEIGHT_FILES, digest_module, find_commit
from dq_lightning.identity.values import digest_text
from dq_lightning.patches.mae import INSTEAD, MaskedAutoencoder, bundled_folder, load_mae

AUTO_SMALL_SIDE = 64
# Its weights are published and were trained on plain pixels. It takes a third of the large network's time.
AUTO_PHOTO_MAE = "facebook/vit-mae-base"
FOLDER_FILES = (".json", ".safetensors", ".bin")
# This setting is left out of the identity: the mask is given explicitly, so the share of masked patches is never used.
MASK_SHARE = ("mask_ratio",)


@dataclass(frozen=True)
class ReconstructorSpec:
    """A reconstructor that is chosen but not loaded.

    Attributes:
        name: name of the choice: `"bundled"`, a hub name with or without `@REVISION`, a path, or the name of a class.
        path: folder or checkpoint file, or None.
        module: network in memory, or None.
        commit: commit of a hub name, or None while it is unknown.
        num_heads: number of heads of the encoder in a checkpoint file, or None.
        decoder_num_heads: number of heads of the decoder in a checkpoint file, or None.
    """

    name: str
    path: Path | None = None
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    commit: str | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None

    def identity(self, memory: DigestMemory) -> str | None:
        """Identify weights and configuration without loading the network, by a hexadecimal digest.

        It is None if the commit of the hub name is not remembered: then call `resolve` first.
        """
        if self.module is not None:
            return digest_text("mae_module", digest_module(self.module, without=MASK_SHARE))
        version = library_version("transformers")
        if self.path is not None and self.path.is_file():
            content = memory.file(self.path)
            return digest_text("mae_file", version, content, self.num_heads, self.decoder_num_heads)
        if self.path is not None:
            files = sorted(path for path in self.path.iterdir() if path.suffix in FOLDER_FILES)
            names = [path.name for path in files]
            return digest_text("mae_folder", version, *names, *memory.files([str(path) for path in files]))
        commit = self.commit or memory.recall(f"hub:{self.name}")
        return None if commit is None else digest_text("mae_hub", version, self.name.partition("@")[0], commit)

    def resolve(self, memory: DigestMemory) -> "ReconstructorSpec":
        """Return the same choice with its hub commit, and record that in `memory`; no other method may ask the hub.

        Raises:
            PatchError: if the weights are neither in the local cache nor reachable; the message says what to pass
                instead.
        """
        if self.path is not None or self.module is not None:
            return self
        commit = self.commit or memory.recall(f"hub:{self.name}")
        commit = commit or find_commit(self.name, WEIGHT_FILES, f"reconstructor {self.name!r}", INSTEAD, PatchError)
        memory.remember(f"hub:{self.name}", commit)
        return replace(self, commit=commit)

    def load(self, device: str = "cpu") -> MaskedAutoencoder:
        """Load the reconstructor onto a device, with its frozen model.

        Raises:
            PatchError: if it cannot be found or read.
        """
        if self.module is not None:
            # The model is a copy, so that the user's own network keeps its device, mode and mask ratio.
            return load_mae(deepcopy(self.module), device=device)
        if self.path is not None:
            return load_mae(
                self.path, num_heads=self.num_heads, decoder_num_heads=self.decoder_num_heads, device=device
            )
        repository, _, revision = self.name.partition("@")
        return load_mae(repository, revision=self.commit or revision or None, device=device)


def choose_reconstructor(
    reconstructor: Any,
    *,
    image_size: tuple[int, int],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> ReconstructorSpec:
    """Choose a masked autoencoder; this loads nothing and does not ask the hub.

    | `reconstructor` | choice |
    |---|---|
    | `"auto"` | images up to 64 px (longer side): bundled; larger: `facebook/vit-mae-base`. Nothing else changes it. |
    | `"bundled"` | the CIFAR-10 network in `assets/` |
    | existing folder | a model that transformers can load |
    | existing file | a checkpoint of the original format |
    | `"OWNER/NAME"`, `"OWNER/NAME@REVISION"` | a repository on the Hugging Face hub |
    | `nn.Module` | a `ViTMAEForPreTraining` |

    Args:
        reconstructor: name, path or network, see the table.
        image_size: (height, width) of a typical image in pixels.
        num_heads: number of heads of the encoder in a checkpoint file whose size is not official.
        decoder_num_heads: number of heads of the decoder in a checkpoint file whose size is not official.

    Raises:
        PatchError: if the choice is unknown, or a local file is missing.
    """
    if isinstance(reconstructor, nn.Module):
        return ReconstructorSpec(type(reconstructor).__name__, module=reconstructor)
    if not isinstance(reconstructor, str | Path):
        raise PatchError(f"reconstructor must be a name, a path or a network, got {type(reconstructor).__name__}")
    name = str(reconstructor)
    if name == "auto":
        name = "bundled" if max(image_size) <= AUTO_SMALL_SIDE else AUTO_PHOTO_MAE
    if name == "bundled":
        return ReconstructorSpec(name, path=bundled_folder())
    path = Path(name).expanduser()
    if path.exists():
        return ReconstructorSpec(name, path.absolute(), num_heads=num_heads, decoder_num_heads=decoder_num_heads)
    if path.is_absolute() or path.suffix in (".pth", ".pt", ".bin", ".safetensors") or name.count("/") != 1:
        raise PatchError(
            f"reconstructor={name!r} is neither an existing file or folder nor a hub name OWNER/NAME: {INSTEAD}"
        )
    return ReconstructorSpec(name)
