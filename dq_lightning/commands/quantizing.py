"""`quantize`: all stations at once.

No function here may bear a public name: jsonargparse looks it up in the package, which would import what stands behind it.
"""

from pathlib import Path
from typing import Any

from dq_lightning.core.config import (
    BinConfig,
    FeatureConfig,
    OnError,
    PatchConfig,
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
    encoder: str | None = None,
    seed: int | None = None,
    indices: str | list[int] | None = None,
    features: FeatureConfig = FeatureConfig(),  # noqa: B008 (frozen)
    bins: BinConfig = BinConfig(),  # noqa: B008
    selection: SelectionConfig = SelectionConfig(),  # noqa: B008
    patches: PatchConfig = PatchConfig(),  # noqa: B008
    text: TextConfig = TextConfig(),  # noqa: B008
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
) -> None:
    """Make the compact set of a dataset: features, bins, sampling, patches, store.

    Example: dq-lightning quantize --dataset CIFAR10 --data_path ~/data_cifar --keep_ratio 0.125 --output results/cifar

    Args:
        dataset: a torchvision class (CIFAR10), ImageNet, ImageFolder, hub:OWNER/NAME, package.module.Class, or in YAML
            class_path and init_args; told by data_path when left out.
        data_path: folder or file of the dataset: class folders, Parquet, Arrow, CSV, JSON rows, or what datasets saved.
        split: of datasets that have several.
        output: folder for config.yaml (every setting, resolved; pass it as --config to repeat), info.json, the positions as
            select_indices_NAME_RATIO.npy, and the compact set as a copy in compact/; else it stays in the cache alone.
        keep_ratio: share of samples kept; short for selection.keep_ratio, and so are the next for others.
        num_bins: disjoint bins in each class; bins.num_bins.
        drop_ratio: share of the patches of every image that is dropped; patches.drop_ratio.
        encoder: auto, bundled, a name of timm or transformers, a folder, a .npy of ready-made features, openai:MODEL;
            features.encoder.
        seed: of the draw; selection.seed.
        indices: a choice that exists already, in place of keep_ratio and num_bins: .npy of positions (a published
            select_indices file), or a list of them. No encoder runs.
        features: station 1.
        bins: station 2.
        selection: station 3.
        patches: station 4, for images.
        text: how text is read.
        store: indices copies nothing, packed is self-contained, auto is indices while all patches are kept.
        image_column: of a Hugging Face dataset; found by its feature type when left out.
        label_column: column of the classes; likewise.
        labels: a column to group by in place of the classes, or false for no groups.
        cache_dir: folder of the cache; else DQ_LIGHTNING_CACHE, else the platform's.
        device: auto, cpu, cuda, cuda:1, ...
        fingerprint: identity of the dataset, in place of the digest of its content.
        force_recompute: build again what is in the cache already.
        verify: how an entry is checked before use.
        on_error: raise, or skip: samples that can't be read are left out and counted.
        progress: show progress bars.
    """
    config = QuantizeConfig(features, bins, selection, patches, text, store, image_column, label_column, on_error)
    short = {
        "selection.keep_ratio": keep_ratio,
        "bins.num_bins": num_bins,
        "patches.drop_ratio": drop_ratio,
        "features.encoder": encoder,
        "selection.seed": seed,
    }
    config = replace_fields(config, short)
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.exports.rows import check_writable
    from dq_lightning.pipeline.quantize import quantize
    from dq_lightning.selection.given import check_alone

    check_alone(indices, keep_ratio=keep_ratio, num_bins=num_bins, encoder=encoder)
    if output is not None:
        output = str(Path(output).expanduser())
        check_writable(output)
    info = quantize(
        open_dataset(dataset, data_path, split),
        config,
        labels=labels,
        indices=indices,
        cache_dir=cache_dir,
        device=device,
        fingerprint=fingerprint,
        force_recompute=force_recompute,
        verify=verify,
        progress=progress,
    )
    if output is not None:
        from dq_lightning.exports.results import write_results

        place = {
            "dataset": dataset,
            "data_path": data_path,
            "split": split,
            "labels": labels,
            "indices": indices,
            "fingerprint": fingerprint,
        }
        write_results(Path(output), info, config, place)
    if info.num_unreadable:
        print(f"{info.num_unreadable:,} samples could not be read and were skipped")
    share = info.num_samples / info.num_source_samples
    print(f"{info.num_samples:,} of {info.num_source_samples:,} samples ({share:.2%}): {output or info.path}")
