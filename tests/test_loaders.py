"""Samplers and counts for any number of ranks, without starting them; settings of loaders."""

import itertools
import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.data import _update_dataloader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, Subset, default_collate
from torchvision.transforms import Compose, Lambda

from dq_lightning import QuantizedDataModule
from dq_lightning.core.errors import ConfigError
from dq_lightning.loading.loaders import LoaderSettings, automatic_workers, make_loader
from dq_lightning.loading.processes import attributes_below
from dq_lightning.loading.steps import check_steps, steps_per_epoch
from dq_lightning.loading.trainer_facts import TrainerFacts
from tests.lightning_scripts.common import Recorder, name_of, photos, trainer


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    made = QuantizedDataModule(
        photos(), keep_ratio=0.25, num_bins=5, batch_size=4, num_workers=0, cache_dir=tmp_path_factory.mktemp("cache")
    )
    made.prepare_data()
    made.setup("fit")
    return made


def share_of(loader, rank, num_ranks, epoch=0):
    """What Lightning makes of a loader on one of several ranks: the same loader with a distributed sampler."""
    shuffle = not isinstance(loader.sampler, SequentialSampler)
    sampler = DistributedSampler(loader.dataset, num_ranks, rank, shuffle=shuffle, seed=0)
    sampler.set_epoch(epoch)
    return DataLoader(loader.dataset, loader.batch_size, sampler=sampler, drop_last=loader.drop_last)


def test_eight_ranks_share_the_compact_set(module):
    kept = {name_of(photos()[i][0]) for i in module.selection.index.tolist()}
    loader = module.train_dataloader()
    for epoch in (0, 1):
        shares = [[name_of(x) for b in share_of(loader, r, 8, epoch) for x in b[0]] for r in range(8)]
        # 50 samples, padded to 56: every rank has 7, and together they saw everything
        assert [len(share) for share in shares] == [7] * 8
        assert set().union(*shares) == kept
        assert sum(map(len, shares)) - len(set().union(*map(set, shares))) == 6
    assert all(len(share_of(loader, r, 8)) == steps_per_epoch(50, 4, 8, False) == 2 for r in range(8))


@given(samples=st.integers(1, 300), batch=st.integers(1, 40), ranks=st.integers(1, 16), drop_last=st.booleans())
def test_steps_are_those_of_the_distributed_sampler(samples, batch, ranks, drop_last):
    data = range(samples)
    counts = {
        len(DataLoader(data, batch, sampler=DistributedSampler(data, ranks, r), drop_last=drop_last))
        for r in range(ranks)
    }
    assert counts == {steps_per_epoch(samples, batch, ranks, drop_last)}


@dataclass
class Settings:
    """The settings of a Trainer that steps depend on, at Lightning's defaults."""

    limit_train_batches: float = 1.0
    limit_val_batches: float = 1.0
    val_check_interval: float = 1.0
    check_val_every_n_epoch: int | None = 1
    log_every_n_steps: int = 50
    loggers: list = field(default_factory=list)
    fast_dev_run: bool = False
    overfit_batches: float = 0


def test_eight_ranks_too_few_samples():
    steps = steps_per_epoch(50, 8, 8, True)
    assert steps == 0
    with pytest.raises(ConfigError, match=r"50 samples: with 8 processes, batch_size=8 and drop_last=True"):
        check_steps(Settings(), steps, num_samples=50, batch_size=8, num_ranks=8)


def test_advice_fits_what_lightning_does():
    def advice(steps, **settings):
        return check_steps(Settings(**settings), steps, num_samples=100, batch_size=10, num_ranks=1)

    assert advice(10) == []
    assert advice(10, loggers=[1], log_every_n_steps=10) == []
    assert "Trainer(log_every_n_steps=5)" in advice(10, loggers=[1])[0]
    assert "Trainer(log_every_n_steps=1)" in advice(1, loggers=[1])[0]
    assert advice(10, val_check_interval=10) == advice(10, val_check_interval=0.25) == []
    assert advice(10, val_check_interval=11, limit_val_batches=0) == []
    assert advice(10, val_check_interval=11, fast_dev_run=True) == []
    with pytest.raises(ConfigError, match="val_check_interval=4 is more than the 3 steps"):
        advice(10, val_check_interval=4, limit_train_batches=3)


def test_interval_that_we_accept_lightning_accepts(module):
    for interval in range(10, 16):
        model = Recorder()
        module.trainer = None
        settings = {"val_check_interval": interval, "limit_val_batches": 1}
        accepted = True
        try:
            trainer(**settings).fit(model, module)
        except ConfigError:
            accepted = False
        assert accepted == (interval <= math.ceil(50 / 4))


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 1), (16, 1, 8), (16, 8, 1), (64, 4, 8)])
def test_workers_leave_a_core_to_each_training_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    assert automatic_workers(processes) == workers


def test_automatic_settings():
    data = list(range(10))
    cpu, gpu = TrainerFacts(device="cpu"), TrainerFacts(device="cuda:0")
    two = LoaderSettings(num_workers=2, pin_memory="auto")
    assert make_loader(data, two, cpu).persistent_workers
    assert not make_loader(data, two, TrainerFacts(device="cpu", reloads=True)).persistent_workers
    assert not make_loader(data, LoaderSettings(num_workers=0), cpu).persistent_workers
    assert not make_loader(data, two, cpu).pin_memory
    assert make_loader(data, two, gpu).pin_memory
    assert not make_loader(data, LoaderSettings(pin_memory=False), gpu).pin_memory


class Shifted(Dataset):
    def __init__(self):
        self.by, self.transform = 0, Compose([Lambda(lambda value: value), Shift()])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(index + self.by), os.getpid()


class Collate:
    by = 0

    def __call__(self, batch):
        values, owners = default_collate(batch)
        return values + self.by, owners


class Shift:
    by = 0

    def __call__(self, value):
        return value + self.by


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "re-made by Lightning for ranks"])
def test_kept_workers_see_what_was_changed_on_the_dataset_between_epochs(sharded):
    dataset, collate = Shifted(), Collate()
    settings = LoaderSettings(4, num_workers=1, shuffle=False, collate_fn=collate)
    loader = make_loader(Subset(dataset, [0, 1, 2, 3]), settings, TrainerFacts())
    if sharded:
        loader = _update_dataloader(loader, DistributedSampler(loader.dataset, 1, 0, shuffle=False))
    processes = []

    def epoch():
        ((values, owners),) = list(loader)
        processes.append(owners[0].item())
        return values.tolist()

    assert epoch() == epoch() == [0, 1, 2, 3]
    dataset.by = 10
    assert epoch() == [10, 11, 12, 13]
    dataset.transform.transforms[1].by = 100  # an attribute of one of several transforms
    assert epoch() == epoch() == [110, 111, 112, 113]
    dataset.transform = Lambda(lambda value: -value)
    assert epoch() == [-10, -11, -12, -13]
    collate.by = 1
    assert epoch() == [-9, -10, -11, -12]
    assert [one == other for one, other in itertools.pairwise(processes)] == [True, False, False, True, False, False]


def test_comparing_attributes_is_bounded():
    table = {number: [number] for number in range(100_000)}
    shared = SimpleNamespace(table=table, rows=[*range(100_000)], module=os)
    shared.itself = shared
    assert len(attributes_below(shared)) < 20
    shared.many = [SimpleNamespace(rows=[*range(60)], other=[[one] for one in range(60)]) for _ in range(64)]
    shared.many[0].more = [SimpleNamespace(rows=[object() for _ in range(60)]) for _ in range(60)]
    assert len(attributes_below(shared)) == 10_000


def test_lambdas_reach_the_workers():
    """Datasets and functions that cannot be pickled, as notebooks have them."""
    loader = make_loader(
        list(range(6)), LoaderSettings(2, num_workers=1, collate_fn=lambda batch: sum(batch)), TrainerFacts()
    )
    assert sum(loader) == 15


def test_weighted_draws_differ_between_epochs_but_not_between_ranks():
    settings = LoaderSettings(4, num_workers=0, weights=torch.ones(40), num_draws=40)
    draws = [list(make_loader(range(40), settings, TrainerFacts(epoch=e), 3).sampler) for e in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert list(make_loader(range(40), settings, TrainerFacts(), 4).sampler) != draws[0]


def test_facts_of_a_trainer():
    facts = TrainerFacts.of(trainer(reload_dataloaders_every_n_epochs=1))
    assert facts == TrainerFacts(
        fits=True, num_ranks=1, num_shares=1, processes_on_node=1, device="cpu", reloads=True, progress=False
    )
    assert TrainerFacts.of(None) == TrainerFacts()


@pytest.mark.parametrize(("shared", "shares"), [(True, 2), (False, 1)])
def test_processes_share_an_epoch_only_by_lightnings_sampler(shared, shares):
    facts = TrainerFacts.of(trainer(devices=2, strategy="ddp", use_distributed_sampler=shared))
    assert (facts.num_ranks, facts.num_shares) == (2, shares)
