"""`QuantizedDataModule` for Trainers of the package `lightning`; no other file of the library imports that package."""

import lightning as L

from dq_lightning.datamodule import QuantizedHooks


class QuantizedDataModule(QuantizedHooks, L.LightningDataModule):  # noqa: D101 (the next line)
    __doc__ = QuantizedHooks.__doc__
