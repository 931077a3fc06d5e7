"""Objects that behave alike have one text, others different texts, here and in other processes."""

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from dq_lightning.core.errors import FeatureError
from dq_lightning.identity.callables import describe_callable
from dq_lightning.identity.networks import digest_module
from dq_lightning.identity.values import digest_bytes
from tests import warm_processes

FACTOR = 2.0
log = logging.getLogger(__name__)


class Shift(nn.Module):
    """A step whose setting its `repr` does not show."""

    def __init__(self, shift, buffer=0.0):
        super().__init__()
        self.shift = shift
        self.register_buffer("base", torch.tensor(buffer))

    def forward(self, x):
        return x - self.shift - self.base


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return image.resize((self.size, self.size))


@dataclass
class Settings:
    mean: tuple
    table: dict


class Node:
    def __init__(self, value):
        self.value, self.me = value, self

    def __call__(self, image):
        log.info("seen")
        return self.value


def make_class(factor):
    class Scale:
        factor = 1

        def __call__(self, image):
            return image * self.factor

    Scale.factor = factor
    return Scale()


def closure(value, default=1):
    def inner(image, by=default, *, also=None):
        return [value * by for _ in range(3)]

    return inner


def uses_global(image):
    return [image * FACTOR for _ in "ab"]


def steps(*parts):
    return transforms.Compose([transforms.ToTensor(), *parts])


# pairs that differ in one setting each; every maker is called twice
PAIRS = {
    "lambdas on one line": (
        lambda: steps(transforms.Lambda(lambda x: x * 2)),
        lambda: steps(transforms.Lambda(lambda x: 1 - x)),
    ),
    "lambdas of version 2": (lambda: v2.Lambda(lambda x: x * 2), lambda: v2.Lambda(lambda x: x * 3)),
    "attribute of a module": (lambda: steps(Shift(0.1)), lambda: steps(Shift(0.9))),
    "buffer of a module": (lambda: Shift(0.1, 1.0), lambda: Shift(0.1, 2.0)),
    "dtype": (lambda: v2.ToDtype(torch.float32, scale=True), lambda: v2.ToDtype(torch.float64, scale=True)),
    "order": (lambda: steps(v2.Resize(8), v2.CenterCrop(8)), lambda: steps(v2.CenterCrop(8), v2.Resize(8))),
    "slots": (lambda: Slotted(3), lambda: Slotted(4)),
    "dataclass": (lambda: Settings((1,), {"a": 1}), lambda: Settings((1,), {"a": 2})),
    "class attribute": (lambda: make_class(2), lambda: make_class(3)),
    "closure": (lambda: closure(2), lambda: closure(3)),
    "defaults": (lambda: closure(2, 1), lambda: closure(2, 4)),
    "partial": (lambda: functools.partial(closure(2), by=1), lambda: functools.partial(closure(2), by=2)),
    "method": (lambda: Node(1).__call__, lambda: Node(2).__call__),
    "cycle": (lambda: Node(1), lambda: Node(2)),
    "array": (lambda: closure(np.arange(3)), lambda: closure(np.arange(3)[::-1])),
    "half precision": (lambda: closure(torch.ones(2, dtype=torch.bfloat16)), lambda: closure(torch.ones(2))),
    "pattern": (lambda: closure(re.compile("a" * 300)), lambda: closure(re.compile("a" * 301))),
    "filter": (lambda: closure(ImageFilter.GaussianBlur(1)), lambda: closure(ImageFilter.GaussianBlur(2))),
    "image": (lambda: closure(Image.new("L", (2, 2))), lambda: closure(Image.new("L", (2, 2), 1))),
    "set": (lambda: closure({"a", "b", "c"}), lambda: closure({"a", "b", "d"})),
    "built-in": (lambda: closure(len), lambda: closure(max)),
    "type": (lambda: closure(1), lambda: closure(1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_settings_tell_apart_what_they_change(name):
    first, second = PAIRS[name]
    assert describe_callable(first()) == describe_callable(first())
    assert describe_callable(second()) == describe_callable(second())
    assert describe_callable(first()) != describe_callable(second())


def test_global_names_count_also_inside_of_inner_code(monkeypatch):
    before = describe_callable(uses_global)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert describe_callable(uses_global) != before


def test_states_of_generators_and_places_of_computation_are_no_settings():
    for make in (random.Random, np.random.default_rng, torch.Generator):
        assert describe_callable(closure(make())) == describe_callable(closure(make()))
    assert describe_callable(closure(torch.device("cpu"))) == describe_callable(closure(torch.device("cuda")))


def test_what_cannot_be_looked_into_is_refused_and_an_identity_believed():
    with Path(__file__).open() as handle, pytest.raises(FeatureError, match="identity"):
        describe_callable(closure(handle))
    step = Shift(lambda: None)
    step.identity = "shift-1"
    assert describe_callable(step)[0] == "shift-1"
    assert describe_callable(steps(step)) != describe_callable(steps(Shift(0.1)))


def test_other_processes_find_the_same_text(tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('elsewhere', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['elsewhere'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print([module.describe_callable(make()) for make, _ in module.PAIRS.values()])\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = warm_processes.run([tmp_path / "script.py"], warm_processes.environment())
    assert done.returncode == 0, done.stderr
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    del sys.modules["elsewhere"]
    assert done.stdout == here.getvalue()
    assert done.stdout.count("'") > len(PAIRS)


NETWORK = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, rows):
        return activation(self.head(rows))

class Net(Base):
    scale = 1

def activation(rows):
    return rows * Net.scale

def made(way):
    network = Net()
    if way == "hook":
        network.register_forward_hook(lambda module, rows, made: made + 1)
    if way == "hook before":
        network.head.register_forward_pre_hook(lambda module, rows: (rows[0] + 1,))
    if way == "forward of the object":
        network.forward = lambda rows: rows
    if way == "class attribute":
        Net.scale = 2
    return network
"""
EDITS = {
    "base class": ("activation(self.head(rows))", "activation(self.head(rows)) + 1"),
    "function": ("rows * Net.scale", "rows + Net.scale"),
}


@pytest.mark.parametrize("way", [*EDITS, "hook", "hook before", "forward of the object", "class attribute"])
def test_whatever_a_network_computes_with_is_in_its_digest(way, tmp_path):
    torch.manual_seed(0)
    weights = None

    def digest(text, way=""):
        nonlocal weights
        world = {"__name__": "typed_in"}
        exec(compile(text, "typed", "exec"), world)
        network = world["made"](way)
        weights = weights or network.state_dict()
        network.load_state_dict(weights)
        return digest_module(network)

    before = digest(NETWORK)
    assert digest(NETWORK) == before
    assert digest(NETWORK.replace(*EDITS[way]) if way in EDITS else NETWORK, way) != before


def test_an_edited_module_of_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = []
    for number in (1, 2):
        (tmp_path / "users_module.py").write_text(f"def prepare(image):\n    return image + {number}\n")
        monkeypatch.delitem(sys.modules, "users_module", raising=False)
        importlib.invalidate_caches()
        users_module = importlib.import_module("users_module")
        world = {"users_module": users_module, "__name__": "__main__"}
        exec("prepare = lambda image: users_module.prepare(image)", world)
        texts.append(describe_callable(world["prepare"]))
    assert texts[0] != texts[1]


def test_attributes_of_networks_count_and_training_does_not():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Shift(0.1))
    first = digest_module(network)
    network[1].shift = 0.9
    second = digest_module(network)
    network[1].handle = object()
    assert digest_module(network) != second != first
    one, two = (nn.MultiheadAttention(8, heads) for heads in (1, 2))
    assert digest_module(one) != digest_module(two)
    before = digest_module(network)
    network.eval().requires_grad_(False)
    assert digest_module(network) == before


model = nn.Linear(1, 1)


class HoldsAModel:
    def __init__(self, inner):
        self.model = inner

    def __call__(self, image):
        return self.model(image)


def test_an_attribute_is_not_the_global_of_its_name(monkeypatch):
    before = describe_callable(HoldsAModel(abs))
    monkeypatch.setitem(globals(), "model", nn.Linear(2, 2))
    assert describe_callable(HoldsAModel(abs)) == before


def taken_from(node):
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(resnet18(), {node: "out"})


def pooled(way):
    import timm

    return timm.create_model("resnet10t", global_pool=way, num_classes=0)


class Small(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(4, 5)

    def forward(self, rows):
        return self.inner(rows)


class Holds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def quantized(seed):
    return torch.ao.quantization.quantize_dynamic(Small(seed), {nn.Linear})


def frozen(seed):
    return Holds(torch.jit.freeze(torch.jit.script(Small(seed).eval())))


def scaled(factor):
    import lightning

    class Scaled(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self._factor = factor

    return Scaled()


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (taken_from, "layer4.1.bn2", "layer4.1.relu_1"),
        (pooled, "avg", "max"),
        (quantized, 1, 2),
        (frozen, 1, 2),
        (lambda used: nn.TransformerEncoderLayer(8, 2, 16, activation=used), nn.functional.silu, nn.functional.elu),
        (scaled, 1.0, 2.0),
    ],
    ids=["traced", "timm", "quantized", "frozen", "function", "lightning"],
)
def test_networks_of_libraries_differ_where_they_compute_otherwise(make, one, other):
    def digest(value):
        torch.manual_seed(0)
        return digest_module(make(value))

    assert digest(one) == digest(one) != digest(other)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, "M8[s]", "<U3", bool])
def test_the_digest_of_an_array_is_that_of_its_rows_in_any_layout(dtype):
    numbers = np.arange(600 * 8 * 3).reshape(600, 3, 4, 2).astype(np.int64) % 7
    array = numbers.astype(dtype)
    views = (array, array.transpose(0, 2, 3, 1), array[::2, :, ::-1], array[0].T, array[:0].T, np.asfortranarray(array))
    for view in views:
        assert digest_bytes(view) == hashlib.sha256(view.copy(order="C").tobytes()).hexdigest()
