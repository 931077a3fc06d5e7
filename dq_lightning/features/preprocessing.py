"""Preprocessing that turns one RGB image into the tensor that an encoder takes."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dq_lightning.core.arrays import image_to_uint8

Preprocessing = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ResizeToSquare:
    """Scale the whole image to `side` x `side` pixels with Pillow's bicubic filter, which averages when it shrinks.

    The result is uint8 [3, side, side]; the encoder normalises whole batches on its device.
    """

    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return image_to_uint8(image)
