"""The command `quantize`, which runs all stations of the method in order.

No function here may have the name of a public function of the package: jsonargparse looks such a name up in the
package, which would import the heavy module that defines it.
"""

from pathlib import Path
from typing import Any, Literal

from dq_lightning.core.config import (
    SHORT_FORMS,
    Balance,
    BinConfig,
    EncodingConfig,
    FeatureConfig,
    OnError,
    PatchConfig,
    Preset,
    QualityConfig,
    QuantizeConfig,
    SelectionConfig,
    StoreKind,
    TextConfig,
    VerifyPolicy,
    replace_fields,
)


def quantize_dataset(
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
    output: str | None = None,
    keep_ratio: float | None = None,
    num_bins: int | None = None,
    drop_ratio: float | None = None,
    max_bytes: int | str | None = None,
    encoder: str | None = None,
    seed: int | None = None,
    indices: str | list[int] | None = None,
    scores: str | None = None,
    drop_worst: float | Literal["auto"] | None = None,
    balance: Balance | None = None,
    preset: Preset | None = None,
    features: FeatureConfig = FeatureConfig(),  # noqa: B008 (frozen)
    bins: BinConfig = BinConfig(),  # noqa: B008
    selection: SelectionConfig = SelectionConfig(),  # noqa: B008
    patches: PatchConfig = PatchConfig(),  # noqa: B008
    quality: QualityConfig = QualityConfig(),  # noqa: B008
    text: TextConfig = TextConfig(),  # noqa: B008
    encoding: EncodingConfig = EncodingConfig(),  # noqa: B008
    store: StoreKind = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool | str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    fingerprint: str | None = None,
    force_recompute: bool = False,
    verify: VerifyPolicy = "size",
    on_error: OnError = "raise",
    progress: bool = True,
    distributed: Literal["auto", "all", "off"] = "auto",
) -> None:
    """Make the compact set of a dataset: features, bins, sampling, patches, store.

    Example: dq-lightning quantize --dataset CIFAR10 --data_path ~/data_cifar --keep_ratio 0.125 --output results/cifar

    Args:
        dataset: a torchvision class (CIFAR10), ImageNet, ImageFolder, hub:OWNER/NAME, package.module.Class, or in YAML
            class_path and init_args; when left out, data_path decides what kind of dataset it is.
        data_path: folder or file of the dataset: class folders, Parquet, Arrow, CSV, JSON rows, or a folder that the
            datasets library saved.
        split: split to read, for datasets that have several.
        output: folder for config.yaml (every setting with its final value; pass it as --config to repeat the run),
            info.json, the positions as select_indices_NAME_RATIO.npy, and a copy of the compact set in compact/; when
            left out, the compact set is in the cache only.
        keep_ratio: share of samples kept; short for selection.keep_ratio.
        num_bins: number of disjoint bins in each class; short for bins.num_bins.
        drop_ratio: share of the patches of every image that is dropped; short for patches.drop_ratio.
        max_bytes: bytes that the set may take, such as 15MB or 10% of the dataset's; the number of samples and the
            codec of images are then chosen.
        encoder: auto, bundled, a model name of timm or transformers, a folder, a .npy of ready-made features, or
            openai:MODEL; short for features.encoder.
        seed: seed of the random draw; short for selection.seed.
        indices: an existing selection, in place of keep_ratio and num_bins: .npy of positions (a published
            select_indices file), or a list of positions. No encoder runs.
        scores: what a sample is worth: margin (how well its label fits its features), none, a .npy of one number a
            sample, or a column of numbers; short for quality.score.
        drop_worst: share of each class that is left out for its low scores, or auto for the samples whose labels seem
            wrong; short for quality.drop_worst. With output, they are listed in suspects.csv.
        balance: proportional, sqrt or equal shares of the classes; short for selection.balance.
        preset: published for the paper's way of choosing, whatever the defaults are (ten bins, a uniform draw, no sample
            or patch left out).
        features: settings of station 1, which turns samples into feature vectors.
        bins: settings of station 2, which splits every class into bins.
        selection: settings of station 3, which draws samples from the bins.
        patches: settings of station 4, which drops patches of images.
        quality: settings of what is left out before the bins because labels seem wrong or scores are low.
        text: how rows of text are read.
        encoding: how whole images are stored.
        store: indices stores row numbers only, packed copies the samples, auto is indices as long as no patches are
            dropped.
        image_column: image column of a Hugging Face dataset; found by its feature type when left out.
        label_column: class column of a Hugging Face dataset; found by its feature type when left out.
        labels: a column to group by in place of the classes (it may list several labels), false for no groups, quantiles
            or quantiles:5 for groups of a number, or dominant for the class that covers most of an image.
        cache_dir: folder of the cache; when left out, DQ_LIGHTNING_CACHE or else the platform's cache folder.
        device: device that the networks run on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        fingerprint: identity of the dataset, in place of the digest of its content.
        force_recompute: build again what is in the cache already.
        verify: how a cache entry is checked before use: size, hash or off.
        on_error: raise stops at a sample that cannot be read; skip leaves such samples out and counts them.
        progress: show progress bars.
        distributed: auto shares the work among the ranks that torchrun or srun started, and works alone where they
            cannot reach each other, which is an error with all; off works alone. Rank 0 writes the output.
    """
    config = QuantizeConfig(
        features,
        bins,
        selection,
        patches,
        text,
        store,
        image_column,
        label_column,
        on_error,
        encoding,
        max_bytes,
        quality,
    )
    short: dict[str, Any] = {
        "keep_ratio": keep_ratio,
        "num_bins": num_bins,
        "drop_ratio": drop_ratio,
        "encoder": encoder,
        "seed": seed,
        "balance": balance,
        "scores": scores,
        "drop_worst": drop_worst,
        "preset": preset,
    }
    config = replace_fields(config, {SHORT_FORMS[name]: value for name, value in short.items()})
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.launch import find_launch
    from dq_lightning.exports.rows import check_writable
    from dq_lightning.pipeline.quantize import quantize
    from dq_lightning.selection.given import check_alone

    check_alone(indices, **short)
    launch = find_launch() if distributed != "off" else None
    reports = launch is None or launch.rank == 0
    if output is not None and reports:
        output = str(Path(output).expanduser())
        check_writable(output)
    opened = open_dataset(dataset, data_path, split)
    info = quantize(
        opened,
        config,
        labels=labels,
        indices=indices,
        cache_dir=cache_dir,
        device=device,
        fingerprint=fingerprint,
        force_recompute=force_recompute,
        verify=verify,
        progress=progress and reports,
        distributed=distributed,
    )
    if not reports:
        return
    if output is not None:
        from dq_lightning.exports.results import write_results
        from dq_lightning.sources.adapt import as_source

        place = {
            "dataset": dataset,
            "data_path": data_path,
            "split": split,
            "labels": labels,
            "indices": indices,
            "fingerprint": fingerprint,
        }
        # The suspects are listed by name.
        source = None if info.suspects is None else as_source(opened, text=text, needs_images=False)
        write_results(Path(output), info, config, place, source)
    if info.num_unreadable:
        print(f"{info.num_unreadable:,} samples could not be read and were skipped, as on_error=skip asks for")
    share = info.num_samples / info.num_source_samples
    print(f"kept {info.num_samples:,} of {info.num_source_samples:,} samples ({share:.2%}): {output or info.path}")
