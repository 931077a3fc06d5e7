"""Near-duplicates of images are left out before the bins, class by class."""

import numpy as np
import torch

from dq_lightning import BinConfig, QuantizeConfig, QuantizedDataModule, SelectionConfig
from tests.inputs.broken import Pictures


def test_copies_inside_a_class_are_left_out_and_those_in_other_classes_stay(tmp_path):
    rows = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    # Even positions are of one class and odd ones of the other; a copy points the same way and has another length.
    rows[10], rows[21], rows[1], rows[14] = 2 * rows[2], 3 * rows[5], rows[0], rows[2]
    made = {}
    for by_label in (True, False):
        bins = BinConfig(num_bins=2, deduplicate=0.999, by_label=by_label)
        config = QuantizeConfig(bins=bins, selection=SelectionConfig(keep_ratio=0.5))
        module = QuantizedDataModule(Pictures(24), config=config, encoder=rows, num_workers=0, cache_dir=tmp_path)
        module.prepare_data()
        module.setup("fit")
        made[by_label] = (module.bins.assignment < 0).nonzero().flatten().tolist()
        assert len(module.selection) == 12
        assert not torch.isin(module.selection.index, torch.tensor(made[by_label])).any()
    assert made == {True: [10, 14, 21], False: [1, 10, 14, 21]}
