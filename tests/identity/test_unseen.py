"""Two things that are not the same never share an identity, wherever the difference is kept; equal ones do."""

import importlib
import importlib.metadata
import os
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split
from torchvision import tv_tensors
from torchvision.datasets import CIFAR10, ImageFolder

from dq_lightning import as_source
from dq_lightning.cache.digests import DigestMemory, file_stamp
from dq_lightning.features.choose import choose_encoder
from dq_lightning.identity.callables import describe_callable
from dq_lightning.identity.networks import digest_encoder, digest_module
from dq_lightning.identity.values import digest_of
from dq_lightning.sources.adapt import grouping_id
from tests import warm_processes
from tests.memories import DictMemory

COUNT = 60
HEAD = """
import functools
import os
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

COUNT, HIDDEN = 60, 2
PIXELS = np.random.default_rng(0).integers(0, 255, (COUNT, 6, 5, 3), dtype=np.uint8)
LABELS = [i % 2 for i in range(COUNT)]
OTHER = [*LABELS]
OTHER[HIDDEN] = 1 - OTHER[HIDDEN]
PLACE = os.path.dirname(__file__)

class Sized(Dataset):
    def __len__(self):
        return COUNT

    def item(self, index, label):
        return Image.fromarray(PIXELS[index]), label

def write(folder, changed=False):
    os.makedirs(folder, exist_ok=True)
    for index in range(COUNT):
        pixels = PIXELS[index] if not (changed and index == HIDDEN) else 255 - PIXELS[index]
        np.save(f"{folder}/{index:03d}.npy", pixels)
        os.utime(f"{folder}/{index:03d}.npy", ns=(1, 1))

def paths(folder=PLACE):
    return [f"{folder}/{index:03d}.npy" for index in range(COUNT)]
"""
FILES = """
write(PLACE)

class Data(Sized):
    def __init__(self):
        self.paths = {held}

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.paths[index])), LABELS[index]
"""
REWRITTEN = "write(PLACE, changed=True)"
HELPER = "import helper_module\nhelper_module.LABELS = OTHER"
# what the classes look like, and what changes one item that is not looked at
DATASETS = {
    "paths in an array of text": (FILES.format(held="np.array(paths())"), REWRITTEN),
    "paths in an array of bytes": (FILES.format(held="np.array([os.fsencode(p) for p in paths()])"), REWRITTEN),
    "paths as bytes": (FILES.format(held="[os.fsencode(p) for p in paths()]"), REWRITTEN),
    "paths in an array of objects": (FILES.format(held="np.array(paths(), dtype=object)"), REWRITTEN),
    "paths in a table": (FILES.format(held="__import__('pandas').Series(paths())"), REWRITTEN),
    "paths as keys": (FILES.format(held="dict(enumerate(paths()))"), REWRITTEN),
    "remembering": (
        """
class Data(Sized):
    @functools.lru_cache(4)
    def __getitem__(self, index):
        return self.item(index, LABELS[index])
""",
        "LABELS = OTHER",
    ),
    "partial method": (
        """
class Data(Sized):
    def read(self, index, table):
        return self.item(index, table[0][index])
TABLE = [LABELS]
Data.__getitem__ = functools.partialmethod(Data.read, table=TABLE)
Data.__getitem__ = lambda self, index, get=Data.read: get(self, index, TABLE)
""",
        "TABLE[0] = OTHER",
    ),
    "class as decorator": (
        """
class Reads:
    def __init__(self, function):
        self.function = function

    def __get__(self, owner, kind):
        return lambda index: self.function(owner, index)

class Data(Sized):
    @Reads
    def __getitem__(self, index):
        return self.item(index, LABELS[index])
""",
        "LABELS = OTHER",
    ),
    "import inside a method": (
        """
class Data(Sized):
    def __getitem__(self, index):
        import helper_module

        return self.item(index, helper_module.LABELS[index])
""",
        HELPER,
    ),
    "importlib": (
        """
import importlib
import importlib.metadata

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, importlib.import_module("helper_module").LABELS[index])
""",
        HELPER,
    ),
    "module of the user's": (
        """
import helper_module

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, helper_module.LABELS[index])
""",
        HELPER,
    ),
    "module of the user's by a name made up": (
        """
import helper_module

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, getattr(helper_module, "LAB" + "ELS")[index])
""",
        HELPER,
    ),
    "globals": (
        """
class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, globals()["LAB" + "ELS"][index])
""",
        "LABELS = OTHER",
    ),
    "eval": (
        """
class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, eval("LABELS[index]"))
""",
        "LABELS = OTHER",
    ),
    "in the clothes of a library": (
        """
@functools.wraps(np.abs)
def read(index):
    return LABELS[index]

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, read(index))
""",
        "LABELS = OTHER",
    ),
    "method of an enumeration": (
        """
import enum

class Way(enum.Enum):
    PLAIN = 1

    def label(self, index):
        return LABELS[index]

class Data(Sized):
    way = Way.PLAIN

    def __getitem__(self, index):
        return self.item(index, self.way.label(index))
""",
        "LABELS = OTHER",
    ),
    "names from the working folder": (
        """
write("here")

class Data(Sized):
    def __getitem__(self, index):
        return Image.fromarray(np.load(os.path.abspath("here") + f"/{index:03d}.npy")), LABELS[index]
""",
        "write('here', changed=True)",
    ),
    "property that makes up names": (
        """
write(PLACE)

class Data(Sized):
    at = 0

    @property
    def path(self):
        return "{}/{:03d}.npy".format(PLACE, self.at)

    def __getitem__(self, index):
        self.at = index
        return Image.fromarray(np.load(self.path)), LABELS[index]
""",
        REWRITTEN,
    ),
    "list that makes up names": (
        """
write(PLACE)

class Names:
    def __getitem__(self, index):
        return "{}/{:03d}.npy".format(PLACE, index)

class Data(Sized):
    names = Names()

    def __getitem__(self, index):
        return Image.fromarray(np.load(self.names[index])), LABELS[index]
""",
        REWRITTEN,
    ),
    "names handed to a function": (
        """
write(PLACE)

def opened(path):
    return Image.fromarray(np.load(path))

class Data(Sized):
    def __getitem__(self, index):
        return opened("%s/%03d.npy" % (PLACE, index)), LABELS[index]
""",
        REWRITTEN,
    ),
    "reader in a variable": (
        """
write(PLACE)

class Data(Sized):
    def __getitem__(self, index):
        reader = np.load
        return Image.fromarray(reader("%s/%03d.npy" % (PLACE, index))), LABELS[index]
""",
        REWRITTEN,
    ),
    "reader in an attribute": (
        """
write(PLACE)

class Data(Sized):
    def __init__(self, reader=np.load):
        self.reader = reader

    def __getitem__(self, index):
        return Image.fromarray(self.reader("%s/%03d.npy" % (PLACE, index))), LABELS[index]
""",
        REWRITTEN,
    ),
    "attributes by any name": (
        """
import pathlib
write(PLACE)

class Data(Sized):
    def __init__(self):
        self.place = pathlib.Path(PLACE)

    def __getitem__(self, index):
        data = object.__getattribute__(self.place / f"{index:03d}.npy", "read_" + "bytes")()
        return Image.fromarray(np.frombuffer(data[-90:], np.uint8).reshape(6, 5, 3)), LABELS[index]
""",
        REWRITTEN,
    ),
    "name kept in an attribute": (
        """
write(PLACE)

class Data(Sized):
    def __getitem__(self, index):
        self.path = "%s/%03d.npy" % (PLACE, index)
        return Image.fromarray(np.load(self.path)), LABELS[index]
""",
        REWRITTEN,
    ),
    "name kept in a container": (
        """
write(PLACE)
KEPT = {}

class Data(Sized):
    def __getitem__(self, index):
        names = []
        names.append("%s/%03d.npy" % (PLACE, index))
        KEPT["name"] = names[0]
        return Image.fromarray(np.load(names[0])), LABELS[index]
""",
        REWRITTEN,
    ),
    "function by another name": (
        """
write(PLACE)

def opened(path):
    return Image.fromarray(np.load(path))

class Data(Sized):
    def __init__(self):
        self.loader = opened

    def __getitem__(self, index):
        return self.loader("%s/%03d.npy" % (PLACE, index)), LABELS[index]
""",
        REWRITTEN,
    ),
    "object that is called": (
        """
write(PLACE)

class Opens:
    def __call__(self, path):
        return Image.fromarray(np.load(path))

class Data(Sized):
    opens = Opens()

    def __getitem__(self, index):
        return self.opens("%s/%03d.npy" % (PLACE, index)), LABELS[index]
""",
        REWRITTEN,
    ),
    "module in a variable": (
        """
write(PLACE)

class Data(Sized):
    def __getitem__(self, index):
        numbers = np
        return Image.fromarray(numbers.load("%s/%03d.npy" % (PLACE, index))), LABELS[index]
""",
        REWRITTEN,
    ),
    "pathlib": (
        """
import pathlib
write(PLACE)

class Data(Sized):
    def __init__(self):
        self.place = pathlib.Path(PLACE)

    def __getitem__(self, index):
        data = (self.place / f"{index:03d}.npy").read_bytes()
        return Image.fromarray(np.frombuffer(data[-90:], np.uint8).reshape(6, 5, 3)), LABELS[index]
""",
        REWRITTEN,
    ),
    "made up attributes": (
        """
class Data(Sized):
    def __getattr__(self, name):
        if name != "table":
            raise AttributeError(name)
        return LABELS

    def __getitem__(self, index):
        return self.item(index, self.table[index])
""",
        "LABELS = OTHER",
    ),
    "table of functions": (
        """
READERS = {"label": lambda index: LABELS[index]}

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, READERS["label"](index))
""",
        "LABELS = OTHER",
    ),
    "default argument": (
        """
class Data(Sized):
    def __getitem__(self, index, *, table=LABELS):
        return self.item(index, table[index])
""",
        "LABELS[HIDDEN] = OTHER[HIDDEN]",
    ),
    "base class": (
        """
class Base(Sized):
    table = LABELS

class Data(Base):
    def __getitem__(self, index):
        return self.item(index, self.table[index])
""",
        "Base.table = OTHER",
    ),
    "metaclass": (
        """
class Meta(type):
    table = LABELS

class Data(Sized, metaclass=Meta):
    def __getitem__(self, index):
        return self.item(index, type(self).table[index])
""",
        "Meta.table = OTHER",
    ),
    "bound method": (
        """
class Reader:
    def read(self, index):
        return LABELS[index]

class Data(Sized):
    def __init__(self):
        self.read = Reader().read

    def __getitem__(self, index):
        return self.item(index, self.read(index))
""",
        "LABELS = OTHER",
    ),
    "slots beside attributes": (
        """
class Slots:
    __slots__ = ("table",)

class Data(Slots, Sized):
    def __init__(self):
        self.table, self.more = LABELS, 1

    def __getitem__(self, index):
        return self.item(index, self.table[index])
""",
        "LABELS[HIDDEN] = OTHER[HIDDEN]",
    ),
    "made in the middle": (
        """
class Reader:
    def __init__(self):
        self.table = globals()["LABELS"]

class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, Reader().table[index])
""",
        "LABELS = OTHER",
    ),
    "environment": (
        """
class Data(Sized):
    def __getitem__(self, index):
        return self.item(index, LABELS[index] if os.environ.get("UNSEEN_TEST") is None else OTHER[index])
""",
        "os.environ['UNSEEN_TEST'] = '1'",
    ),
    "subclass of a dataset of torchvision": (
        """
from torchvision.datasets import FakeData

class Data(FakeData):
    def __init__(self):
        super().__init__(COUNT, (3, 8, 8))

    def __getitem__(self, index):
        return super().__getitem__(index)[0], globals()["LABELS"][index]
""",
        "LABELS = OTHER",
    ),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Makes a module of the user's from its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("UNSEEN_TEST", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def made(name, text, folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(spec.loader.get_source(name), str(folder / f"{name}.py"), "exec"), vars(module))
        return module

    return made


def identity(dataset, memory):
    """As a run finds it."""
    source = as_source(dataset)
    return (source.quick_digest(memory) if source.identity_is_certain else None) or source.digest(memory)


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_that_differ_in_one_item(name, world):
    text, change = DATASETS[name]
    memory = DictMemory()
    world("helper_module", "LABELS = [i % 2 for i in range(60)]")
    module = world("users_data", HEAD + text)
    before = identity(module.Data(), memory)
    assert identity(module.Data(), memory) == before
    exec(change, vars(module))
    assert identity(module.Data(), memory) != before


def save_images(folder, changed=False):
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        Image.new("RGB", (6, 5), (index, changed * (index == 2) * 90, 7)).save(
            folder / "ab"[index % 2] / f"{index:03}.png"
        )
    return folder


FOLDERS = {
    "loader of another module": (
        """
        import helper_module
        from torchvision.datasets import ImageFolder

        def load(path):
            return helper_module.opened(path)

        def make(root):
            return ImageFolder(root, loader=load)
        """,
        "from PIL import Image\ndef opened(path):\n    return Image.open(path)",
        "from PIL import Image\ndef opened(path):\n"
        "    return Image.open(path).point(lambda value: 255 - value if '003' in path else value)",
    ),
    "subclass that reads elsewhere": (
        """
        import os
        from PIL import Image
        from torchvision.datasets import ImageFolder

        class Data(ImageFolder):
            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                return image, target if not (index == 2 and os.path.exists("moved.txt")) else 1 - target

        make = Data
        """,
        "",
        "open('moved.txt', 'w').close()",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_read_otherwise(name, world, tmp_path):
    text, first, second = FOLDERS[name]
    memory, root = DictMemory(), save_images(tmp_path / "images")
    world("helper_module", first)
    module = world("users_data", text)
    before = identity(module.make(root), memory)
    assert identity(module.make(root), memory) == before
    module.helper_module = world("helper_module", second)
    assert identity(module.make(root), memory) != before


def other_item(real):
    def read(self, index):
        image, target = real(self, index)
        return (image, target) if index != 2 else (image, 1 - target)

    return read


def cifar():
    dataset = CIFAR10.__new__(CIFAR10)
    super(CIFAR10, dataset).__init__("nowhere")
    dataset.data = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8)
    dataset.targets = [i % 2 for i in range(COUNT)]
    return dataset


@pytest.mark.parametrize("kind", [CIFAR10, TensorDataset, ImageFolder])
def test_methods_of_libraries_that_were_replaced(kind, monkeypatch, memory, tmp_path):
    images = torch.randint(0, 255, (COUNT, 3, 5, 6), dtype=torch.uint8)
    make = {
        CIFAR10: cifar,
        TensorDataset: lambda: TensorDataset(images, torch.arange(COUNT) % 2),
        ImageFolder: lambda: ImageFolder(save_images(tmp_path)),
    }[kind]
    before = identity(make(), memory)
    monkeypatch.setattr(kind, "__getitem__", other_item(kind.__getitem__))
    assert identity(make(), memory) != before


@pytest.mark.parametrize(
    "place", ["torchvision.datasets.folder.pil_loader", "PIL.Image.open", "PIL.Image.Image.convert"]
)
def test_functions_of_libraries_that_were_replaced(place, monkeypatch, memory, tmp_path):
    data = ImageFolder(save_images(tmp_path))
    before = identity(data, memory)
    owner = (
        importlib.import_module("PIL.Image").Image
        if place.endswith("convert")
        else importlib.import_module(place.rpartition(".")[0])
    )
    name = place.rpartition(".")[2]
    real = getattr(owner, name)

    def replaced(first, *more, **named):
        made = real(first, *more, **named)
        red = made.getpixel((0, 0))[0]
        return made if red != 2 else made.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: 255 - value)

    monkeypatch.setattr(owner, name, replaced)
    assert identity(data, memory) != before


def palette_image(value):
    image = Image.new("PA", (4, 4))
    image.putpalette([value] * 768)
    return image


def oriented(value):
    image = Image.new("RGB", (4, 4))
    image.info["orientation"] = value
    return image


ITEMS = {
    "palette with alpha": (lambda: palette_image(1), lambda: palette_image(2)),
    "header": (lambda: oriented(1), lambda: oriented(6)),
    "format of boxes": tuple(
        lambda form=form: tv_tensors.BoundingBoxes(torch.ones(1, 4), format=form, canvas_size=(9, 9))
        for form in ("XYXY", "XYWH")
    ),
    "text with a separator": (lambda: ["a\x1fstr:'b'"], lambda: ["a", "b"]),
}


@pytest.mark.parametrize("name", ITEMS)
def test_items_that_differ(name):
    first, second = ITEMS[name]
    assert digest_of(first()) == digest_of(first()) != digest_of(second())


def test_a_link_to_another_file_of_equal_size_and_times(tmp_path, memory):
    for name, value in (("a", 1), ("b", 2)):
        np.save(tmp_path / f"{name}.npy", np.full((6, 5, 3), value, np.uint8))
        os.utime(tmp_path / f"{name}.npy", ns=(1, 1))
    link = tmp_path / "link.npy"
    link.symlink_to("a.npy")
    first = file_stamp(str(link))
    link.unlink()
    link.symlink_to("b.npy")
    second = file_stamp(str(link))
    assert first[:2] == second[:2]
    # also where the times of change are equal
    assert first[3:] != second[3:]
    assert DigestMemory(tmp_path / "memory").file(link) == DigestMemory(tmp_path / "memory").file(tmp_path / "b.npy")


def test_unlabelled_samples_are_no_class():
    one, other = (as_source(cifar(), labels=labels) for labels in ([*[0, 1] * 29, 2, -1], [*[0, 1] * 29, 2, 3]))
    assert grouping_id(one) != grouping_id(other)


# preprocessing and networks


PREPROCESSING = {
    "another module": (
        "import helper_module\ndef prepare(image):\n    return helper_module.scale(image)",
        "import torch, numpy as np\ndef scale(image):\n    return torch.tensor(np.array(image)).permute(2, 0, 1) / {}",
    ),
    "import inside": (
        "def prepare(image):\n    import helper_module\n    return helper_module.scale(image)",
        "import torch, numpy as np\ndef scale(image):\n    return torch.tensor(np.array(image)).permute(2, 0, 1) / {}",
    ),
    "environment": (
        "import os, torch, numpy as np\n"
        "def prepare(image):\n    return torch.tensor(np.array(image)).permute(2, 0, 1) / int(os.environ['UNSEEN_TEST'])",
        "import os\nos.environ['UNSEEN_TEST'] = '{}'",
    ),
}


class Mean(nn.Module):
    def __init__(self, way=1.0):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.way = way

    def forward(self, rows):
        return self.linear(rows.mean(dim=(2, 3))) * self.way


@pytest.mark.parametrize("name", PREPROCESSING)
def test_preprocessing_whose_code_lies_elsewhere(name, world):
    text, helper = PREPROCESSING[name]
    texts = []
    for number in (1, 1, 2):
        world("helper_module", helper.format(number))
        texts.append(digest_encoder(Mean(), world("users_code", text).prepare))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("known", ["version", "code"])
def test_a_new_version_of_a_package(known, world, tmp_path):
    texts = []
    for number in (1, 1, 2):
        version = f"__version__ = '{number}.0'\n" if known == "version" else ""
        body = "x" if known == "version" else f"x * {number}"
        world("users_package", f"{version}def scale(x):\n    return {body}", tmp_path / "site-packages")
        code = "from users_package import scale\ndef prepare(x):\n    return scale(x)"
        texts.append(describe_callable(world("users_code", code).prepare))
    assert texts[0] == texts[1] != texts[2]


def test_comments_and_lines_change_nothing(world):
    texts = [
        describe_callable(world("users_code", text).prepare)
        for text in (
            "def prepare(x):\n    return [x, 1.5]",
            "\n\n# why\ndef prepare(x):  # what\n    '''Words.'''\n    return [\n        x, 1.5]",
            "def prepare(x: int) -> list:\n    return [x, 1.5]",
            "def prepare(x):\n    return [x, 1.6]",
        )
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_pickling_an_object_changes_nothing(world):
    dataset = world("users_code", "class Held:\n    def __init__(self):\n        self.values = [1, 2]").Held()
    before = describe_callable(type(dataset))
    # copyreg notes the slots of a class on the class itself
    dataset.__reduce_ex__(2)
    assert "__slotnames__" in vars(type(dataset))
    assert describe_callable(type(dataset)) == before


def test_a_source_that_was_edited_meanwhile_is_not_believed(world, tmp_path):
    module = world("users_code", "def prepare(x):\n    return x + 1")
    before = describe_callable(module.prepare)
    (tmp_path / "users_code.py").write_text("def prepare(x):\n    return x + 2")
    changed = world("users_code", "def prepare(x):\n    return x + 2")
    (tmp_path / "users_code.py").write_text("def prepare(x):\n    return x + 1")
    assert describe_callable(changed.prepare) != before


def test_a_function_beside_a_class_of_a_library_that_was_replaced(monkeypatch):
    from torchvision import transforms

    before = describe_callable(transforms.Resize(3))
    assert describe_callable(transforms.Resize(3)) == before
    monkeypatch.setattr(transforms.functional, "resize", lambda image, *more: image)
    assert describe_callable(transforms.Resize(3)) != before


def patched_class(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, rows: nn.functional.linear(rows, self.weight, self.bias) + 1)


class HoldsAList(Mean):
    """Has weights that are registered nowhere."""

    def __init__(self, value):
        super().__init__()
        self.inner = [nn.Linear(2, 2)]
        nn.init.constant_(self.inner[0].weight, value)
        nn.init.zeros_(self.inner[0].bias)

    def forward(self, rows):
        return self.inner[0](super().forward(rows))


def test_networks_whose_class_was_patched_or_that_hold_weights_aside(monkeypatch):
    before = digest_module(Mean())
    assert digest_module(Mean()) == before
    assert digest_module(HoldsAList(1)) == digest_module(HoldsAList(1)) != digest_module(HoldsAList(2))
    patched_class(monkeypatch)
    assert digest_module(Mean()) != before


SETTING = {"scale": 1.0}


class Looks(Mean):
    def forward(self, rows):
        return super().forward(rows) * float(os.environ.get("UNSEEN_TEST", "1"))


def test_a_network_that_is_not_understood_is_tried_out(monkeypatch):
    monkeypatch.delenv("UNSEEN_TEST", raising=False)
    network, threads = Looks(), torch.get_num_threads()
    state = torch.get_rng_state()
    before = digest_module(network)
    assert digest_module(network) == before
    assert torch.get_num_threads() == threads
    monkeypatch.setenv("UNSEEN_TEST", "3")
    assert digest_module(network) != before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_config_of_a_network_of_transformers():
    transformers = pytest.importorskip("transformers")

    def made(ratio):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        return transformers.ViTMAEModel(
            transformers.ViTMAEConfig(**sizes, image_size=32, patch_size=16, mask_ratio=ratio)
        )

    assert digest_module(made(0.75)) == digest_module(made(0.75)) != digest_module(made(0.0))


class ShowsMore(Mean):
    def extra_repr(self):
        return f"{object()} { {'a', 'b', 'c', 'd'} }"


ELSEWHERE = """
import numpy as np, torch
from torch import nn
from torch.utils.data import Dataset
from PIL import Image

class Box:
    def __init__(self, value):
        self.value = value

class Data(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Image.fromarray(np.full((4, 4, 3), index, np.uint8)), Box(index)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.names = {"a", "b", "c"}

    def forward(self, rows):
        return rows.mean(dim=(2, 3))

    def extra_repr(self):
        return f"{object()} {self.names}"

def prepare(image):
    return torch.tensor(np.array(image)).permute(2, 0, 1)

def show():
    from dq_lightning import as_source
    from dq_lightning.identity.networks import digest_encoder
    from tests.memories import DictMemory
    print(digest_encoder(Net(), prepare), as_source(Data()).digest(DictMemory()))

if __name__ == "__main__":
    show()
"""


def test_a_script_in_another_process_and_a_module_are_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    done = warm_processes.run([tmp_path / "elsewhere.py"], warm_processes.environment(), tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("elsewhere").show()
    del sys.modules["elsewhere"]
    assert done.stdout
    assert capsys.readouterr().out == done.stdout


def test_an_address_in_what_is_printed_changes_nothing():
    assert digest_module(ShowsMore()) == digest_module(ShowsMore())


# what must stay cheap


SIMPLE = (
    HEAD
    + """
write(PLACE)
for index in range(COUNT):
    Image.fromarray(PIXELS[index]).save(f"{PLACE}/{index}.png")
    os.utime(f"{PLACE}/{index}.png", (1, 1))

class Data(Sized):
    def __init__(self, transform=None):
        self.files = [(f"{PLACE}/{index}.png", LABELS[index]) for index in range(COUNT)]
        self.transform = transform

    def __getitem__(self, index):
        path, label = self.files[index]
        image = Image.open(path).convert("RGB")
        if self.transform is not None:
            image = self.transform(image)
        return image, label

def opened(path):
    with Image.open(path) as image:
        return image.convert("RGB")

class Helped(Data):
    def __getitem__(self, index):
        return opened(self.files[index][0]), self.files[index][1]

class Arrays(Sized):
    def __init__(self):
        self.images, self.labels, self.folder = PIXELS, np.array(LABELS), PLACE

    def __getitem__(self, index):
        image = self.images[index].astype(np.float32) / 255
        return np.clip(image.transpose(2, 0, 1), 0, 1), int(self.labels[index])
"""
)


@pytest.mark.parametrize("name", ["Data", "Helped", "Arrays"])
def test_simple_classes_of_users_are_certain(name, world, monkeypatch):
    # files that were changed just now may change once more
    monkeypatch.setattr("dq_lightning.identity.datasets._RACY_NANOSECONDS", 0)
    module = world("users_data", SIMPLE)
    source = as_source(getattr(module, name)())
    assert source.by_items
    assert source.state().unknown == ()
    memory = DictMemory()
    digest = source.digest(memory)
    assert as_source(getattr(module, name)()).quick_digest(memory) == digest


def test_datasets_of_libraries_are_certain(tmp_path, memory):
    datasets = pytest.importorskip("datasets")
    tensors = TensorDataset(torch.zeros(COUNT, 3, 4, 4, dtype=torch.uint8), torch.arange(COUNT) % 2)
    folder = ImageFolder(save_images(tmp_path))
    table = datasets.Dataset.from_dict({"image": [np.zeros((4, 4, 3), np.uint8).tolist()] * 4, "label": [0, 1, 0, 1]})
    table = table.cast_column("image", datasets.Array3D((4, 4, 3), "uint8"))
    parts = random_split(folder, [30, 30], torch.Generator().manual_seed(0))
    for data in (cifar(), tensors, folder, Subset(cifar(), [1, 2]), ConcatDataset([tensors, tensors]), parts[0], table):
        source = as_source(data)
        assert not source.by_items
        assert source.identity_is_certain
    rows = [{"instruction": "a", "output": "b"}] * 4
    assert as_source(rows).identity_is_certain


def test_a_moved_folder_and_touched_files_with_a_loader_of_the_users(tmp_path, memory, world):
    text = """
    from PIL import Image

    def load(path):
        return Image.open(path).convert("L")
    """
    load = world("users_data", text).load
    source = as_source(ImageFolder(save_images(tmp_path / "images"), loader=load))
    assert not source.by_items, source._beside().unknown
    before = source.digest(memory)
    (tmp_path / "images").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.png"):
        os.utime(path, (5, 5))
    assert as_source(ImageFolder(tmp_path / "moved", loader=load)).digest(memory) == before


# data that change while they are read


CHANGING = """
import os
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

class Data(Dataset):
    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return Image.fromarray(np.load(f"{self.folder}/{index}.npy")), index % 2
"""


def test_an_item_that_is_another_one_by_now_is_an_error(world, tmp_path, memory):
    from dq_lightning.core.errors import ChangedError

    for index in range(40):
        np.save(tmp_path / f"{index}.npy", np.full((4, 4, 3), index, np.uint8))
    data = world("users_data", CHANGING).Data(str(tmp_path))
    source = as_source(Subset(data, range(30)), on_error="skip")
    source.digest(memory)
    np.save(tmp_path / "3.npy", np.zeros((4, 4, 3), np.uint8))
    for read in (source.plain, source.image):
        with pytest.raises(ChangedError, match="changed while it was read"):
            read(3)
    np.save(tmp_path / "3.npy", np.full((4, 4, 3), 3, np.uint8))
    source.plain(3)


@pytest.mark.parametrize(
    ("name", "library"), [("resnet10t.c3_in1k", "timm"), ("sentence-transformers/all-MiniLM-L6-v2", "transformers")]
)
def test_encoders_by_name_belong_to_a_version_of_their_library(name, library, memory, monkeypatch):
    pytest.importorskip(library)
    spec = choose_encoder(name, modality="text" if library == "transformers" else "image")
    memory.remember(f"hub:{name}", "0" * 40)
    before = spec.identity(memory)
    assert spec.identity(memory) == before is not None
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda asked: "99.0" if asked == library else real(asked))
    assert spec.identity(memory) != before
