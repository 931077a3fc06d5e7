"""The commands for single stations and for lists of samples, with the files of the published scripts."""

from pathlib import Path
from typing import Any, Literal

from dq_lightning.core.config import (
    Balance,
    BinConfig,
    Draw,
    FeatureConfig,
    OnError,
    PatchConfig,
    QualityConfig,
    QuantizeConfig,
    SelectionConfig,
    TextConfig,
    replace_fields,
)
from dq_lightning.core.fields import check_ratio


def bins(
    output: str,
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
    num_bins: int | None = None,
    encoder: str | None = None,
    features: FeatureConfig = FeatureConfig(),  # noqa: B008 (frozen)
    bins: BinConfig = BinConfig(),  # noqa: B008
    text: TextConfig = TextConfig(),  # noqa: B008
    labels: bool | str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    on_error: OnError = "raise",
    progress: bool = True,
) -> None:
    """Split a dataset into bins (was quantize_sample.py).

    Writes select_indices_NAME_exp{0..K-1}.npy, bins.npz and config.yaml.

    Example: dq-lightning bins results/bin_cifar_010 --dataset CIFAR10 --data_path ~/data_cifar

    Args:
        output: folder that the files are written into.
        dataset: the dataset, as in quantize.
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        num_bins: number of disjoint bins in each class; short for bins.num_bins.
        encoder: the encoder, as in quantize; short for features.encoder.
        features: how samples become feature vectors.
        bins: how feature vectors become bins.
        text: how rows of text are read.
        labels: a column to group by in place of the classes, or false for no groups.
        cache_dir: folder of the cache.
        device: device that the encoder runs on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        on_error: raise stops at a sample that cannot be read; skip leaves such samples out of all bins.
        progress: show progress bars.
    """
    config = QuantizeConfig(features=features, bins=bins, text=text, store="indices", on_error=on_error)
    config = replace_fields(config, {"bins.num_bins": num_bins, "features.encoder": encoder})
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.exports.published import write_bin_files
    from dq_lightning.exports.results import CONFIG, dataset_name, write_config
    from dq_lightning.pipeline.plan import BINS
    from dq_lightning.pipeline.quantize import station_of_dataset

    opened = open_dataset(dataset, data_path, split)
    made = station_of_dataset(
        opened, config, BINS, labels=labels, cache_dir=cache_dir, device=device, progress=progress
    )
    folder, name = Path(output).expanduser(), dataset_name(dataset, data_path)
    write_bin_files(folder, name, made)
    place = {"dataset": dataset, "data_path": data_path, "split": split, "labels": labels}
    settings = config.to_dict()
    write_config(folder / CONFIG, place | {key: settings[key] for key in ("features", "bins", "text")})
    print(f"put {len(made):,} samples into {made.num_bins} bins: {folder}/select_indices_{name}_exp*.npy")


def suspects(
    dataset: str,
    data_path: str | None = None,
    split: str = "train",
    output: str = "suspects.csv",
    drop_worst: float | Literal["auto"] = "auto",
    scores: str = "margin",
    encoder: str | None = None,
    features: FeatureConfig = FeatureConfig(),  # noqa: B008 (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    labels: str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    on_error: OnError = "raise",
    progress: bool = True,
) -> None:
    """List the samples whose labels seem wrong, with the labels that their features suggest, as a table (CSV).

    Example: dq-lightning suspects ImageFolder --data_path photos --output suspects.csv

    Args:
        dataset: the dataset, as in quantize: CIFAR10, ImageFolder, hub:OWNER/NAME, ...
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        output: file that is written: position, name, score, label and suggested label, the most suspicious first.
        drop_worst: auto estimates how many labels are wrong; a share lists the worst of each class.
        scores: margin (how well a label fits the features), a .npy of one number a sample, or a column of numbers.
        encoder: the encoder, as in quantize; short for features.encoder. It must not be trained on these labels.
        features: how samples become feature vectors.
        text: how rows of text are read.
        labels: a column that takes the place of the classes.
        cache_dir: folder of the cache.
        device: device that the encoder runs on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        on_error: raise stops at a sample that cannot be read; skip passes over such samples.
        progress: show progress bars.
    """
    quality = QualityConfig(scores, drop_worst)
    kept = SelectionConfig(keep_ratio=1e-9)  # nothing is drawn, so any share may be listed
    config = QuantizeConfig(features, selection=kept, text=text, store="indices", on_error=on_error, quality=quality)
    config = replace_fields(config, {"features.encoder": encoder})
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.errors import ConfigError
    from dq_lightning.exports.results import write_suspects
    from dq_lightning.pipeline.plan import BINS
    from dq_lightning.pipeline.quantize import station_of_dataset
    from dq_lightning.sources.adapt import as_source

    opened = open_dataset(dataset, data_path, split)
    made = station_of_dataset(
        opened, config, BINS, labels=labels, cache_dir=cache_dir, device=device, progress=progress
    )
    if made.suspects is None:
        raise ConfigError(
            "no label can be judged, because the samples have fewer than two classes or too few samples of each: pass other "
            "classes as labels=, scores= of your own, or the share to list as drop_worst="
        )
    source = as_source(opened, labels=labels, text=text, on_error=on_error)
    path = write_suspects(made.suspects, Path(output).expanduser(), source)
    print(f"listed {len(made.suspects):,} of {len(made):,} samples, the most suspicious first: {path}")
    if not len(made.suspects):
        print("to look at the labels that fit least all the same, pass a share of each class: --drop_worst 0.01")


def duplicates(
    dataset: str,
    data_path: str | None = None,
    split: str = "train",
    against: str | None = None,
    against_path: str | None = None,
    against_split: str | None = None,
    output: str = "duplicates.csv",
    threshold: float = 0.95,
    encoder: str | None = None,
    against_encoder: str | None = None,
    features: FeatureConfig = FeatureConfig(),  # noqa: B008 (frozen)
    text: TextConfig = TextConfig(),  # noqa: B008
    labels: bool | str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    on_error: OnError = "raise",
    progress: bool = True,
) -> None:
    """List near-duplicates within a dataset, or samples of it that are near to some of another one, as a table (CSV).

    Within a dataset these are the samples that bins.deduplicate leaves out, each with the one that is kept in its place.

    Example: dq-lightning duplicates ImageFolder --data_path photos/train --against ImageFolder --against_path photos/val

    Args:
        dataset: the dataset, as in quantize: CIFAR10, ImageFolder, hub:OWNER/NAME, ...
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        against: another dataset, such as the one for validation, that the samples are compared with instead.
        against_path: folder or file of the other dataset.
        against_split: split of the other dataset, train when left out; alone, that split of the same dataset.
        output: file that is written: position, name, near, near_name and cosine, the closest pair first.
        threshold: smallest cosine of the features of near-duplicates.
        encoder: the encoder, as in quantize; short for features.encoder. Both datasets need the same.
        against_encoder: .npy of the other dataset's features, where encoder is one.
        features: how samples become feature vectors.
        text: how rows of text are read.
        labels: a column that takes the place of the classes, within which samples are compared, or false for none.
        cache_dir: folder of the cache.
        device: device that the encoder runs on: auto, cpu, cuda, ...
        on_error: raise stops at a sample that cannot be read; skip passes over such samples.
        progress: show progress bars.
    """
    check_ratio("duplicates", "threshold", threshold)
    config = QuantizeConfig(features, text=text, store="indices", on_error=on_error)
    config = replace_fields(config, {"features.encoder": encoder})
    from dq_lightning.bins.duplicates import find_duplicates, near_pairs
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.errors import ConfigError
    from dq_lightning.exports.results import write_table
    from dq_lightning.pipeline.duplicates import config_of_other
    from dq_lightning.pipeline.plan import FEATURES
    from dq_lightning.pipeline.quantize import station_of_dataset
    from dq_lightning.sources.adapt import as_source

    def vectors(opened: Any, config: QuantizeConfig, labels: Any) -> Any:
        given: dict[str, Any] = {"labels": labels, "cache_dir": cache_dir, "device": device, "progress": progress}
        return station_of_dataset(opened, config, FEATURES, **given).embedding

    opened, second = open_dataset(dataset, data_path, split), None
    if against is not None or against_path is not None:
        second = open_dataset(against, against_path, against_split or "train")
    elif against_split is not None:
        second = open_dataset(dataset, data_path, against_split)
    elif against_encoder is not None:
        raise ConfigError(
            "against_encoder= holds the features of another dataset: name it as against= or against_path="
        )
    if second is not None and labels:
        raise ConfigError(
            "samples of two datasets are compared whatever their classes are: leave labels= out, or against= and the like"
        )
    source = other = as_source(opened, labels=labels, text=text, on_error=on_error)
    second_config = None if second is None else config_of_other(opened, second, config, against_encoder)
    mine, theirs, classes = vectors(opened, config, labels), None, None
    if second_config is None:
        classes = source.labels()
    else:
        other, theirs = as_source(second, text=text, on_error=on_error), vectors(second, second_config, None)
        if mine.shape == theirs.shape and bool((mine == theirs).all()):
            raise ConfigError(
                "both datasets have the same features, so they are the same data: correct against=, against_path= or "
                "against_split=, or leave them out to compare the samples of one dataset"
            )
    of = find_duplicates(mine, threshold, labels=None if classes is None else classes.values, against=theirs)
    pairs, cosine = near_pairs(mine, of, against=theirs)
    rows = [
        (place, source.sample_id(place), near, other.sample_id(near), f"{value:.6g}")
        for (place, near), value in zip(pairs.tolist(), cosine.tolist(), strict=True)
    ]
    path = write_table(Path(output).expanduser(), ("position", "name", "near", "near_name", "cosine"), rows)
    print(f"listed {len(pairs):,} of {len(mine):,} samples, the closest to another one first: {path}")


def sample(
    bins_path: str,
    keep_ratio: float = 0.125,
    output: str | None = None,
    seed: int = 0,
    draw: Draw = "auto",
    bin_weights: tuple[float, ...] | None = None,
    balance: Balance = "proportional",
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
) -> None:
    """Draw the same share from every bin (was quantize_bin.py); writes select_indices_NAME_RATIO.npy.

    Example: dq-lightning sample results/bin_cifar_010 --keep_ratio 0.125 --output results/sample_quantized_cifar_010

    Args:
        bins_path: folder that the command bins wrote, or a folder of published files select_indices_NAME_exp{k}.npy.
        keep_ratio: share of samples kept; exactly floor(N * keep_ratio + 1/2) of N samples are kept.
        output: folder that the file is written into; bins_path when left out.
        seed: seed of the random draw.
        draw: scored draws from the samples of a bin that have the best scores, seeded from all of them; rank takes the
            samples that were picked first. auto is scored where the bins hold scores, else seeded.
        bin_weights: one weight for each bin, in place of equal shares.
        balance: proportional, sqrt or equal shares of the classes.
        dataset: dataset that gives the classes, for published files without bins.npz and for bins that were made in
            clusters; the shares are then also equal by class.
        data_path: folder or file of that dataset.
        split: split of that dataset.
    """
    SelectionConfig(keep_ratio, seed, draw, bin_weights, balance)
    import torch

    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.core.console import get_logger
    from dq_lightning.exports.published import read_bin_files, selection_file
    from dq_lightning.exports.results import recorded_settings
    from dq_lightning.exports.rows import write_index
    from dq_lightning.selection.select import is_split_of, select
    from dq_lightning.sources.adapt import as_source

    labels = None
    clusters = (recorded_settings(bins_path).get("bins") or {}).get("clusters")
    if dataset is None and data_path is None and clusters is not None:
        get_logger().warning(
            f"the bins were made in {clusters} clusters of each class, and their files do not say which belong to a class, so "
            "every cluster counts as a class: name the dataset (--dataset, --data_path) for the shares of the classes"
        )
    if dataset is not None or data_path is not None:
        labels = as_source(open_dataset(dataset, data_path, split)).labels()
    bins, positions, name = read_bin_files(bins_path, None if labels is None else labels.values)
    classes = None if labels is None else labels.values[torch.from_numpy(positions)]
    if classes is not None and not is_split_of(bins, classes):
        classes = None  # The bins were made inside groups of another kind.
    drawn = select(
        bins, keep_ratio=keep_ratio, seed=seed, draw=draw, bin_weights=bin_weights, balance=balance, labels=classes
    )
    index, folder = positions[drawn.index.numpy()], Path(output or bins_path).expanduser()
    path = write_index(torch.from_numpy(index), folder / selection_file(name, keep_ratio))
    print(f"kept {len(index):,} samples and wrote their positions: {path}")


def reconstruct(
    output: str,
    dataset: str | dict[str, Any] | None = None,
    data_path: str | None = None,
    split: str = "train",
    indices: str | list[int] | None = None,
    drop_ratio: float | None = None,
    reconstructor: str | None = None,
    patches: PatchConfig = PatchConfig(drop_ratio=0.2),  # noqa: B008 (frozen)
    cache_dir: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> None:
    """Drop uninformative patches and fill them again (was quantize_pixel.py); writes CLASS/POSITION.png and tables.

    Example: dq-lightning reconstruct results/pixel --dataset CIFAR10 --data_path ~/data_cifar
    --indices results/sample/select_indices_CIFAR10_0.125.npy --drop_ratio 0.2

    Args:
        output: folder that the images are written into; it does not exist yet, or an earlier run wrote it.
        dataset: the dataset, as in quantize.
        data_path: folder or file of the dataset, as in quantize.
        split: split to read, for datasets that have several.
        indices: .npy of the positions of the images to reconstruct, or a list of positions; all images when left out,
            as in the published script.
        drop_ratio: share of patches dropped (published as mask_ratio); short for patches.drop_ratio.
        reconstructor: auto, bundled, a hub name, a folder, or an original checkpoint file (published as resume); short
            for patches.reconstructor.
        patches: saliency, classifier, patch size and the other settings of patches; saliency random corresponds to
            leaving out cam_mask in the published script.
        cache_dir: folder of the cache. The cache keeps the results (as raw pixels, until prune removes them), so that a
            stopped run can go on.
        device: device that the networks run on: auto, cpu, cuda, cuda:1, or several: cuda:0,cuda:1
        progress: show progress bars.
    """
    config = QuantizeConfig(patches=patches)
    config = replace_fields(config, {"patches.drop_ratio": drop_ratio, "patches.reconstructor": reconstructor})
    from dq_lightning.commands.opening import open_dataset
    from dq_lightning.commands.reconstruction import reconstruct_images
    from dq_lightning.exports.images import write_image_folder
    from dq_lightning.exports.results import dataset_name
    from dq_lightning.exports.rows import check_writable

    check_writable(str(Path(output).expanduser()))
    images = reconstruct_images(
        open_dataset(dataset, data_path, split),
        config.patches,
        indices=indices,
        name=dataset_name(dataset, data_path),
        cache_dir=cache_dir,
        device=device,
        progress=progress,
    )
    print(f"filled {len(images):,} images: {write_image_folder(images, Path(output).expanduser())}")
