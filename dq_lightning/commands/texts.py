"""The commands `embed` and `sample-text` for instruction data, with the files of the published scripts."""

from dq_lightning.core.config import (
    BinConfig,
    FeatureConfig,
    QuantizeConfig,
    SelectionConfig,
    TextConfig,
    replace_fields,
)
from dq_lightning.core.errors import ConfigError

EMBEDS = "alpaca_embeds"


def embed(
    data: str,
    output: str = ".",
    index: int = 0,
    nums: int | None = None,
    merge: bool = False,
    encoder: str | None = None,
    text: TextConfig = TextConfig(),  # noqa: B008 (frozen)
    features: FeatureConfig = FeatureConfig(),  # noqa: B008
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Embed instruction data in pieces (was embed.py), or join the pieces (was alpaca_embed.py --merge).

    Writes alpaca_embeds_{index}.npy with a .json beside it, and with --merge alpaca_embeds.npy. A piece that exists is
    kept.
    Example: dq-lightning embed alpaca_data.json --encoder openai:text-embedding-ada-002 --index 0 --nums 10000

    Args:
        data: file of rows, .json or .jsonl (also .xz, .gz, .bz2), or anything that quantize takes as data_path.
        output: folder of the pieces.
        index: number of the piece, from 0.
        nums: number of rows in a piece; when left out, one piece holds all rows.
        merge: join all pieces into one file.
        encoder: auto, a model name or folder of transformers, or openai:MODEL (OPENAI_API_KEY holds the key); short for
            features.encoder.
        text: which part of a row is embedded, the pooling, and the other settings of text.
        features: settings of the encoder; batch_size, num_workers and precision are used.
        cache_dir: folder of the cache; the results of paid API requests are kept beside the pieces instead.
        device: device that the encoder runs on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        progress: show progress bars.
    """
    from functools import partial
    from pathlib import Path

    import numpy as np

    from dq_lightning.cache.entries import Cache, default_cache_dir
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.errors import FeatureError
    from dq_lightning.exports.rows import whole
    from dq_lightning.features.choose import choose_encoder
    from dq_lightning.features.extract import extract_features
    from dq_lightning.features.pieces import embed_piece, merge_pieces, merge_published
    from dq_lightning.sources.adapt import as_source

    if features.selection_epochs and not merge:
        raise FeatureError(
            "selection_epochs trains an encoder of images, but embed reads text: leave selection_epochs out"
        )
    source, folder = as_source(open_dataset(None, data), text=text), Path(output).expanduser()
    memory = Cache(cache_dir or default_cache_dir()).memory
    if merge:
        if any(folder.glob(f"{EMBEDS}_*.json")):
            merged = merge_pieces(folder, name=EMBEDS, identity={"source": source.digest(memory)})
        else:
            merged = merge_published(folder, EMBEDS)
        if len(merged) != len(source):
            raise FeatureError(
                f"the pieces have {len(merged):,} rows, but {data} has {len(source):,}: pass the data that they were made from"
            )
        path = whole(folder / f"{EMBEDS}.npy", lambda place: np.save(place, merged, allow_pickle=False))
        print(f"joined all pieces: {path}")
        return
    if source.modality != "text":
        raise FeatureError(
            f"{source.describe()} holds images, but embed reads rows of text: use quantize to make features of images"
        )
    spec = choose_encoder(encoder or features.encoder, modality="text", text=text).resolve(memory)
    identity = {"source": source.digest(memory), "encoder": spec.identity(memory), "text": source.text_identity()}
    run = partial(
        extract_features,
        spec=spec,
        device=device,
        precision=features.precision,
        batch_size=features.batch_size,
        num_workers=features.num_workers,
        progress=progress,
        api_embeddings=folder / "paid",
    )
    size = len(source) if nums is None else nums
    path = embed_piece(source, run, index=index, nums=size, out_dir=folder, identity=identity, name=EMBEDS)
    print(f"wrote the embeddings of piece {index}: {path}")


def sample_text(
    data: str,
    output: str,
    embeds: str | None = None,
    ratio: float = 0.1,
    k: int | None = None,
    random: bool = False,
    seed: int = 0,
    encoder: str | None = None,
    text: TextConfig = TextConfig(),  # noqa: B008 (frozen)
    features: FeatureConfig = FeatureConfig(),  # noqa: B008
    bins: BinConfig = BinConfig(),  # noqa: B008
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Choose rows of instruction data (was alpaca_sample.py).

    Writes the rows as JSON and their numbers as .npy beside it.

    Example: dq-lightning sample-text alpaca_data.json alpaca_dq.json --embeds alpaca_embeds.npy --ratio 0.1 --k 10

    Args:
        data: file of rows, .json or .jsonl (also .xz, .gz, .bz2), or anything that quantize takes as data_path.
        output: file that the rows are written into, .json (the layout of the published Alpaca) or .jsonl.
        embeds: .npy of embeddings [N, D], as embed --merge writes it; when left out, the encoder makes the embeddings.
        ratio: share of rows kept.
        k: number of bins, 10 when left out; short for bins.num_bins.
        random: draw uniformly from all rows instead, as a baseline for comparison.
        seed: seed of the random draw.
        encoder: the encoder, as in embed; short for features.encoder.
        text: which part of a row is embedded, and the other settings of text.
        features: settings of the encoder; batch_size, num_workers and precision are used.
        bins: objective, maximizer and the other settings of bins.
        cache_dir: folder of the cache.
        device: device that the encoder runs on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        progress: show progress bars.
    """
    if not output.endswith((".json", ".jsonl")):
        raise ConfigError(
            f"output={output!r} must end in .json or .jsonl: the rows are written there, and their numbers beside it as .npy"
        )
    if random and embeds is not None:
        raise ConfigError("random=True draws rows without looking at embeddings: leave embeds= out, or random=")
    from pathlib import Path

    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.evaluation.baselines import baseline_selection
    from dq_lightning.exports.rows import write_index, write_json
    from dq_lightning.pipeline.compact import load_selection
    from dq_lightning.pipeline.quantize import quantize
    from dq_lightning.sources.jsonl import is_rows_file, read_rows

    opened = open_dataset(None, data)
    rows = read_rows(opened) if is_rows_file(opened) else opened
    config = QuantizeConfig(features, bins, SelectionConfig(ratio, seed), text=text, store="indices")
    ready_made = None if embeds is None else str(Path(embeds).expanduser())
    config = replace_fields(config, {"features.encoder": ready_made or encoder, "bins.num_bins": k})
    if random:
        index = baseline_selection("random", rows, keep_ratio=ratio, seed=seed).index
    else:
        index = load_selection(quantize(rows, config, cache_dir=cache_dir, device=device, progress=progress).path).index
    path = write_json(rows, index, Path(output).expanduser())
    write_index(index, path.with_suffix(".npy"))
    print(f"kept {len(index):,} of {len(rows):,} rows: {path}, {path.with_suffix('.npy').name}")
