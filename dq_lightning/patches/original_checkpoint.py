"""Reads checkpoint files of the original masked autoencoder (He et al. 2022) and converts them for transformers."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_lightning.core.errors import PatchError

# This maps (width, depth) of the three published encoders to their number of heads. The published decoder has width
# 512, depth 8 and 16 heads.
OFFICIAL_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}
OFFICIAL_DECODER = (512, 8)
OFFICIAL_DECODER_HEADS = 16
# Each pair is a pattern in keys of the original and its replacement in files of transformers. They are applied in
# order.
RENAMES = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^(decoder_(?:pos_embed|embed|norm|pred)\b)", r"decoder.\1"),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def read_original(path: Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file (.pth, .pt, .bin, .safetensors); no code in it is executed.

    Raises:
        PatchError: if the file cannot be read without executing code, or if it lacks an encoder or decoder of this
            kind.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # Training checkpoints also hold their command line as a Namespace, which is a harmless container.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PatchError(f"cannot read weights from {path}: {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = {
        str(key).removeprefix("module."): value for key, value in dict(state).items() if isinstance(value, Tensor)
    }
    if "patch_embed.proj.weight" not in tensors:
        raise PatchError(
            f"{path} is not a masked autoencoder of the original format: it has no patch_embed.proj.weight"
        )
    if "decoder_pred.weight" not in tensors:
        raise PatchError(
            f"{path} has an encoder but no decoder, so it cannot fill patches; those named mae_visualize_* have both"
        )
    return tensors


def read_sizes(state: dict[str, Tensor], num_heads: int | None, decoder_num_heads: int | None) -> dict[str, Any]:
    """Determine the arguments of `ViTMAEConfig` from the shapes of the weights that `read_original` returned.

    A number of heads that is None is taken from the official size that the encoder or decoder has.

    Raises:
        PatchError: if a number of heads is neither given nor known, or does not divide the width.
    """
    projection = state["patch_embed.proj.weight"]
    width, channels, patch_size, _ = projection.shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    decoder_width = state["decoder_embed.weight"].shape[0]
    depth, decoder_depth = _count(state, "blocks"), _count(state, "decoder_blocks")
    heads = num_heads or OFFICIAL_HEADS.get((width, depth))
    is_official = (decoder_width, decoder_depth) == OFFICIAL_DECODER
    decoder_heads = decoder_num_heads or (OFFICIAL_DECODER_HEADS if is_official else None)
    for name, value, size in (("num_heads", heads, width), ("decoder_num_heads", decoder_heads, decoder_width)):
        if value is None:
            raise PatchError(
                f"the checkpoint does not record its number of heads, and its width {size} is not that of a published "
                f"model: pass {name}="
            )
        if size % value:
            raise PatchError(f"{name}={value} does not divide the width {size} of the checkpoint")
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": decoder_depth,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        # This is the original's value; the default of transformers is 1e-12.
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{prefix}.")})


def convert_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the original to the names in files of transformers, and split query, key and value."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace(".attn.qkv.", f".attention.attention.{name}.")] = part.clone()
        else:
            converted[key] = value
    return converted
