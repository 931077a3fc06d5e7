"""`QuantizedDataModule` for Trainers of the package `pytorch_lightning`.

No other file of the library imports that package.

```python
import pytorch_lightning as pl
from dq_lightning.pytorch import QuantizedDataModule
```
"""

import pytorch_lightning as pl

from dq_lightning.datamodule import QuantizedHooks


class QuantizedDataModule(QuantizedHooks, pl.LightningDataModule):  # type: ignore[misc]  # noqa: D101
    __doc__ = QuantizedHooks.__doc__
