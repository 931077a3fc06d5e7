"""Streams: read in order, recorded in the first pass, and compared in every later one; the same samples as by position."""

import functools
import http.server
import io
import itertools
import os
import threading
import weakref
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
import torch
import webdataset
from datasets.distributed import split_dataset_by_node
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import ToTensor

from dq_lightning import QuantizedDataModule, load_selection, quantize
from dq_lightning.cache.shards import KeptShards
from dq_lightning.core.config import QuantizeConfig
from dq_lightning.core.errors import ChangedError, ConfigError, SourceError
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.streams import extract_stream
from dq_lightning.loading.paths import open_path
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.in_order import HEAD_ITEMS

N = 3 * HEAD_ITEMS + 7
SETTINGS = {"selection": {"keep_ratio": 0.2}, "bins": {"num_bins": 4}, "store": "packed"}


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels // (1 + number % 4))


class Stream(IterableDataset):
    """Samples of a list, in order; `passes` counts how often they were read to the end."""

    def __init__(self, items, transform=None):
        self.items, self.transform, self.passes = items, transform, 0

    def __iter__(self):
        for image, label in self.items:
            yield (image if self.transform is None else self.transform(image)), label
        self.passes += 1


def mean_colour(sample):
    image = sample["image"] if isinstance(sample, dict) else sample[0]
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return torch.cat([pixels.mean((0, 1)), pixels.std((0, 1))])


@pytest.fixture(scope="module")
def items():
    return [(picture(i), i % 3) for i in range(N)]


def same_sets(one, other):
    """Whether two compact sets hold the same samples in the same bins, packed alike."""
    first, second = load_selection(one.path), load_selection(other.path)
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.bin, second.bin)
    for left, right in zip(PackedDataset(one.path), PackedDataset(other.path), strict=True):
        left, right = (list(x.values()) if isinstance(x, dict) else list(x) for x in (left, right))
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert type(a) is type(b)
            assert a == b


def test_a_torch_stream_gives_what_the_list_of_its_samples_gives(items, tmp_path):
    stream = Stream(items)
    source = as_source(stream)
    assert (source.in_order, source.is_read, stream.passes) == (True, False, 0)
    made = quantize(stream, SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "a", progress=False)
    same_sets(made, quantize(items, SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "b", progress=False))
    assert not made.reused
    assert quantize(Stream(items), SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "a", progress=False).reused
    named = {"encoder": mean_colour, "cache_dir": tmp_path / "a", "progress": False, "fingerprint": "first"}
    assert not quantize(Stream(items), SETTINGS, **named).reused
    stream = Stream(items)
    assert quantize(stream, SETTINGS, **named).reused
    assert stream.passes == 0
    # The identity is that of the same samples in a list.
    assert quantize(items, SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "a", progress=False).reused


def test_a_module_trains_on_a_stream_with_its_transform_and_from_the_store_without_it(items, tmp_path):
    def to_tensor(image):
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255

    module = QuantizedDataModule(
        Stream(items, to_tensor), keep_ratio=0.2, num_bins=4, encoder=mean_colour, cache_dir=tmp_path, num_workers=0
    )
    module.prepare_data()
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert module.num_classes == 3
    wanted = {to_tensor(items[i][0]).numpy().tobytes() for i in module.selection.index.tolist()}
    assert {image.numpy().tobytes() for images, _ in batches for image in images} == wanted
    again = QuantizedDataModule.from_store(module.info.path, transform=to_tensor, num_workers=0, cache_dir=tmp_path)
    again.prepare_data()
    again.setup("fit")
    assert sum(len(labels) for _, labels in again.train_dataloader()) == len(wanted)


@pytest.mark.parametrize("formatted", [False, True])
def test_a_hugging_face_stream_gives_what_the_dataset_gives(items, formatted, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = datasets.Dataset.from_dict({"image": [i for i, _ in items], "label": [c for _, c in items]}, features)
    stream = rows.to_iterable_dataset(num_shards=3)
    source, by_position = as_source(stream), as_source(rows)
    assert source.encoded(1) == by_position.encoded(1)
    assert source.labels().names == ("a", "b", "c")
    if formatted:
        stream = stream.with_format("torch")
        finish = as_source(stream).finisher(torch.arange(2))
        assert torch.equal(finish(0, by_position.plain(1))["image"], rows.with_format("torch")[1]["image"])
    one = quantize(stream, SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "a", progress=False)
    same_sets(one, quantize(rows, SETTINGS, encoder=mean_colour, cache_dir=tmp_path / "b", progress=False))


def test_a_hugging_face_stream_whose_types_are_not_known(tmp_path):
    pictures = [Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)) for i in range(N)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(N)]}, columns)
    mapped = rows.to_iterable_dataset().map(lambda row: row | {"more": 1})
    assert mapped.features is None
    source = as_source(mapped)
    assert source.image(3).tobytes() == pictures[3].tobytes()
    assert source.labels().values.tolist() == rows["label"][:]
    info = quantize(mapped, SETTINGS, encoder=mean_colour, cache_dir=tmp_path, progress=False)
    assert PackedDataset(info.path)[0]["more"] == 1


def test_a_hugging_face_stream_of_text(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [f"row {i * i}" for i in range(N)]})
    source = as_source(rows.to_iterable_dataset())
    assert source.modality == "text"
    assert source.texts(range(N)) == as_source(rows).texts(range(N))
    assert len(source) == N


@pytest.fixture(scope="module")
def shards(items, tmp_path_factory):
    """The folder of three tars and of three Parquet files of the same samples; all were written long ago."""
    folder = tmp_path_factory.mktemp("shards")
    features = datasets.Features({"jpg": datasets.Image(), "cls": datasets.Value("int64")})
    for number in range(3):
        place, rows = folder / "tars" / f"{number}.tar", {"jpg": [], "cls": []}
        place.parent.mkdir(exist_ok=True)
        with webdataset.TarWriter(str(place)) as tar:
            for i in range(number, N, 3):
                file = io.BytesIO()
                items[i][0].save(file, "JPEG")
                tar.write({"__key__": f"{i:05}", "jpg": file.getvalue(), "cls": i % 2})
                rows["jpg"].append({"bytes": file.getvalue(), "path": None})
                rows["cls"].append(i % 2)
        (folder / "parquet").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "parquet" / f"{number}.parquet")
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    return folder


def test_tars_and_parquet_files(shards, tmp_path, monkeypatch):
    # A file is not trusted by its times in the two seconds after a change, of which no test can set the time.
    monkeypatch.setattr("dq_lightning.sources.hub_streams.RACY_NANOSECONDS", 0)
    tars = sorted(map(str, (shards / "tars").iterdir()))
    settings = SETTINGS | {"image_column": "jpg"}

    def made(data, cache="a"):
        return quantize(data, settings, encoder=mean_jpg, cache_dir=tmp_path / cache, progress=False)

    one = made(tars[::-1])  # The order of the names counts.
    with monkeypatch.context() as patched:
        patched.setattr("dq_lightning.sources.in_order.StreamSource.scan", None)
        assert made(tars).reused  # The files are recognised, so nothing is read.
    again = made(shards / "tars", "b")
    assert open_path(shards / "tars", "train") == shards / "tars"
    same_sets(one, again)
    stored = PackedDataset(one.path)[0]
    assert stored["jpg"].format == "JPEG"
    # A pipeline of the library gives the same pictures and classes, and Parquet files hold the same rows.
    pipeline = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    source, by_tuple, parquet = as_source(tars), as_source(pipeline), as_source(str(shards / "parquet"))
    assert len(source) == len(by_tuple) == len(parquet) == N
    assert torch.equal(source.labels().values, by_tuple.labels().values)
    assert torch.equal(source.labels().values, parquet.labels().values)
    for i in range(0, N, 20):
        assert source.image(i).tobytes() == by_tuple.image(i).tobytes() == parquet.image(i).tobytes()
    assert source.encoded(5) == parquet.encoded(5)


def mean_jpg(sample):
    return mean_colour((sample["jpg"],))


@pytest.fixture
def addresses(shards):
    """The folder of the shards by HTTP, and in the file system of fsspec that is kept in memory."""
    memory = fsspec.filesystem("memory")
    for path in shards.rglob("*.*"):
        memory.pipe(f"/{path.relative_to(shards)}", path.read_bytes())
    handler = functools.partial(QuietHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", "memory:/"
        server.shutdown()
    memory.rm("/tars", recursive=True)
    memory.rm("/parquet", recursive=True)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *given):
        """Print nothing."""


def test_shards_at_addresses_give_the_samples_of_local_ones(shards, addresses):
    local = as_source(str(shards / "tars" / "*.tar"))
    assert local.files == sorted(map(str, (shards / "tars").iterdir()))
    for address in addresses:
        listed = [f"{address}/tars/{number}.tar" for number in (1, 0, 2)]
        for data in (listed, f"{address}/tars/*.tar", f"{address}/parquet/*.parquet"):
            source = as_source(data)
            assert len(source) == N
            assert torch.equal(source.labels().values, local.labels().values)
            assert [source.encoded(i).data for i in range(0, N, 9)] == [local.encoded(i).data for i in range(0, N, 9)]
        with pytest.raises(SourceError, match=r"tars/\*.tar"):
            as_source(f"{address}/tars/")
        with pytest.raises(SourceError, match="can't be opened as webdataset"):
            as_source([f"{address}/none.tar"])


def test_files_that_can_t_be_one_stream(tmp_path):
    for files, said in ((["a.tar", "b.parquet"], "several kinds"), (["a.tar", "a.tar"], "named twice")):
        with pytest.raises(SourceError, match=said):
            as_source(files)
    with pytest.raises(SourceError, match="can't be opened as webdataset"):
        as_source([tmp_path / "none.tar"])


def test_a_killed_first_pass_goes_on_where_its_shards_end(items, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dq_lightning.cache.shards.MIN_SECONDS", 0.0)
    monkeypatch.setattr("dq_lightning.cache.shards.MAX_SECONDS", 0.0)
    settings = SETTINGS | {"features": {"batch_size": 16}}
    calls = []

    def counting(sample):
        calls.append(sample)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return mean_colour(sample)

    counting.identity = "colour"
    options = {"encoder": counting, "cache_dir": tmp_path / "a", "progress": False}
    stop = 100
    with pytest.raises(KeyboardInterrupt):
        quantize(Stream(items), settings, **options)
    calls, stop = [], 0
    stream = Stream(items)
    made = quantize(stream, settings, **options)
    assert len(calls) == N - 96
    assert stream.passes == 1  # The second pass ends with the last sample that was chosen.
    assert made.seconds.keys() == {"identity and features", "bins", "selection", "store"}
    monkeypatch.undo()
    same_sets(made, quantize(items, settings, **options | {"cache_dir": tmp_path / "b"}))
    assert not list((tmp_path / "a" / "0-partial" / "1-features").glob("*"))


def test_work_of_other_samples_is_not_taken_up(items, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dq_lightning.cache.shards.MIN_SECONDS", 0.0)
    monkeypatch.setattr("dq_lightning.cache.shards.MAX_SECONDS", 0.0)
    source, shards = as_source(Stream(items)), KeptShards(tmp_path / "1-features" / "key", "features")
    spec = choose_encoder(mean_colour)
    with pytest.raises(SourceError, match="disk on fire"):
        extract_stream(as_source(Broken(items)), spec, tmp_path, batch_size=16, progress=False, shards=shards)
    others = [*items[:40], (picture(9999), 0), *items[41:]]
    made = extract_stream(as_source(Stream(others)), spec, tmp_path, batch_size=16, progress=False, shards=shards)
    assert "other samples than before" in caplog.text
    assert torch.equal(made, torch.stack([mean_colour(sample) for sample in others]))
    assert torch.equal(
        extract_stream(source, spec, tmp_path, batch_size=16, progress=False),
        extract_features(as_source(items), spec, batch_size=16, progress=False).embedding,
    )


class Broken(Stream):
    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 100)
        raise OSError("disk on fire")


def test_few_samples_are_in_memory_at_once(tmp_path):
    alive, most = [0], [0]

    def gone():
        alive[0] -= 1

    class Long(IterableDataset):
        def __iter__(self):
            for number in range(500):
                image = np.full((8, 8, 3), number % 251, np.uint8)
                weakref.finalize(image, gone)
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                yield image, number % 3

    settings = SETTINGS | {"features": {"batch_size": 16}}
    info = quantize(Long(), settings, encoder=mean_colour, cache_dir=tmp_path, progress=False)
    assert info.num_samples == 100
    # The first items, those of a batch, and those by which the layout of the store is chosen.
    assert most[0] < 4 * HEAD_ITEMS


class Lengths:
    """An encoder of text whose features tell the batch that a text was in."""

    num_classes, max_length = None, 64

    def tokenize(self, texts):
        return [list(map(ord, text)) for text in texts]

    def replica(self, device):
        return self

    def embed(self, tokens):
        rows = torch.stack([tokens.sum(1), (tokens < 0).sum(1)], 1).float()
        return torch.cat([rows, torch.full((len(tokens), 1), float(tokens.shape[1] * len(tokens)))], 1)


def test_texts_of_a_stream_are_encoded_in_the_batches_of_the_dataset(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["x" * (7 * i % 50) + "y" for i in range(N)]})
    spec = SimpleNamespace(load=lambda device, precision: Lengths())
    stream = as_source(rows.to_iterable_dataset())
    made = extract_stream(stream, spec, tmp_path, device="cpu", batch_size=2, progress=False)
    assert torch.equal(
        made, extract_features(as_source(rows), spec, device="cpu", batch_size=2, progress=False).embedding
    )


class OneShard(KeptShards):
    """The run is stopped after its first shard."""

    def keep(self, count, arrays):
        super().keep(count, arrays)
        raise KeyboardInterrupt


def test_texts_of_a_stream_that_was_stopped_inside_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr("dq_lightning.cache.shards.MIN_SECONDS", 0.0)
    # The longest texts come first in the window, so that its first batch has no gaps.
    rows = datasets.Dataset.from_dict({"text": ["x" * (60 if i < 2 else 7 * i % 50) + "y" for i in range(N)]})
    spec, entry = SimpleNamespace(load=lambda device, precision: Lengths()), tmp_path / "1-features" / "key"

    def extract(shards):
        stream = as_source(rows.to_iterable_dataset())
        return extract_stream(stream, spec, tmp_path, device="cpu", batch_size=2, progress=False, shards=shards)

    with pytest.raises(KeyboardInterrupt):
        extract(OneShard(entry, "features"))
    (shard,) = tmp_path.rglob("*.shard")
    assert shard.name.startswith(f"{0:012}-{2:012}-")
    whole = extract_features(as_source(rows), spec, device="cpu", batch_size=2, progress=False)
    assert torch.equal(extract(KeptShards(entry, "features")), whole.embedding)


def test_the_loader_of_a_data_module_may_read_a_stream(items, tmp_path):
    class Module(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Stream(items), batch_size=8, collate_fn=list)

    module = QuantizedDataModule.from_datamodule(Module(), keep_ratio=0.2, encoder=mean_colour, cache_dir=tmp_path)
    module.prepare_data()
    module.setup("fit")
    assert sum(map(len, module.train_dataloader())) == round(0.2 * N)


# what is refused


class Shuffled(Stream):
    def __iter__(self):
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(len(self.items))
        yield from (self.items[i] for i in order)


def test_shuffles_are_refused(items):
    rows = datasets.Dataset.from_dict({"x": list(range(9))}).to_iterable_dataset()
    pipeline = webdataset.WebDataset(["a.tar"], shardshuffle=False)
    for shuffled in (
        rows.shuffle(seed=1),
        rows.shuffle(seed=1).map(dict),
        datasets.interleave_datasets([rows, rows], probabilities=[0.5, 0.5], seed=1),
        pipeline.shuffle(10),
        webdataset.WebDataset(["a.tar"], shardshuffle=10),
        webdataset.WebDataset(["a.tar"], shardshuffle=10, detshuffle=True),
        webdataset.DataPipeline(webdataset.ResampledShards(["a.tar"])),
    ):
        with pytest.raises(SourceError, match="is shuffled"):
            as_source(shuffled, needs_images=False)
    with pytest.raises(ChangedError, match=r"item 0 .*is another one.*take shuffles out"):
        as_source(Shuffled(items)).digest(None)


def test_share_of_one_rank_is_refused():
    rows = datasets.Dataset.from_dict({"x": list(range(9))}).to_iterable_dataset()
    for share in (
        split_dataset_by_node(rows, rank=0, world_size=2).map(dict),
        webdataset.WebDataset(["a.tar"], shardshuffle=False, nodesplitter=webdataset.split_by_node).decode("pil"),
    ):
        with pytest.raises(SourceError, match="share of one rank: pass the whole stream"):
            as_source(share, needs_images=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda items: items[:-1], "ends after"),
        (lambda items: [*items, items[0]], "gives more"),
        (lambda items: [*items[:150], (picture(9999), 1), *items[151:]], "item 150 "),
    ],
)
def test_a_pass_that_differs_is_an_error_that_names_the_first_difference(items, change, said):
    stream = Stream(items)
    source = as_source(stream)
    assert len(source) == N
    stream.items = change(items)
    with pytest.raises(ChangedError, match=said):
        list(itertools.takewhile(source.has, itertools.count()))


def test_what_needs_positions_is_refused(items, tmp_path):
    for settings, said in ({"store": "indices"}, 'store="packed"'), ({"max_bytes": 10**6}, "keep_ratio"):
        with pytest.raises(ConfigError, match=said):
            quantize(Stream(items), QuantizeConfig.from_dict(settings), encoder=mean_colour, cache_dir=tmp_path)
    with pytest.raises(SourceError, match="is empty"):
        as_source(Stream([]))


def test_transforms_that_are_passed_with_a_stream(items, tmp_path):
    """They are taken off and put on again as those of a dataset with positions."""
    given = {"transform": ToTensor(), "target_transform": lambda label: label + 10}
    settings = {"keep_ratio": 0.25, "num_bins": 2, "num_workers": 0, "store": "packed", "encoder": mean_colour}
    made = []
    for data in (Stream(items), items):
        module = QuantizedDataModule(data, cache_dir=tmp_path, **settings, **given)
        module.prepare_data()
        module.setup("fit")
        made.append(module.train_dataloader().dataset)
    assert len(made[0]) == round(N * 0.25)
    for (image, label), (other, target) in zip(*made, strict=True):
        assert torch.equal(image, other)
        assert label == target >= 10
