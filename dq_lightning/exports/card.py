"""The dataset card of a compact set on the Hugging Face hub: what it holds, what it was made of, and how to make it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dq_lightning.core.libraries import library_version
from dq_lightning.exports.results import HUB

# The hub's name for each range of numbers of samples, by its upper end.
_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"),
)  # fmt: skip
# More classes than this are left out of the table, those with the fewest kept samples.
_MAX_CLASSES = 100


def size_category(count: int) -> str:
    """Return the hub's name for a number of samples.

    >>> size_category(6250)
    '1K<n<10K'
    """
    return next((name for end, name in _SIZES if count < end), "n>10M")


def dataset_card(
    repository: str,
    facts: dict[str, Any],
    *,
    kept: Sequence[int] | None = None,
    whole: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    settings: dict[str, Any] | None = None,
    license: str = "unknown",
) -> str:
    """Return the text of a dataset card (`README.md`): metadata in YAML, and Markdown.

    Args:
        repository: `OWNER/NAME` on the hub.
        facts: what `set_facts` returns.
        kept: number of kept samples of each class, or None without classes.
        whole: number of samples of each class in the whole dataset, where it is known.
        class_names: name of each class.
        settings: settings of `dq-lightning quantize --config`, where they are known.
        license: licence of the data by the hub's identifier, such as `cc-by-4.0`.
    """
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license=license,
        pretty_name=repository.rpartition("/")[2],
        size_categories=size_category(facts["samples"]),
        task_categories=["image-classification"] if kept is not None else None,
        source_datasets=[facts["hub"]] if facts.get("hub") else None,
        tags=["dataset-quantization", "dq-lightning"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    share = f" ({facts['samples'] / facts['of']:.2%} of {facts['of']:,})" if facts.get("of") else ""
    lines = [
        f"# {repository.rpartition('/')[2]}",
        "",
        f"{facts['samples']:,} images{share}, chosen by Dataset Quantization "
        "([Zhou et al., ICCV 2023](https://arxiv.org/abs/2308.10524)) with `dq_lightning`. The columns `index`, `bin` and `id` "
        "name the position, the bin and the file or position of each image in the dataset that they come from.",
        "",
        *_table(("", ""), _rows_of_facts(facts, license)),
    ]
    if kept is not None:
        lines += ["", "## Classes", "", *_class_table(kept, whole, class_names)]
    lines += ["", "## How to make it again", "", *_recipe(facts, settings)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _rows_of_facts(facts: dict[str, Any], license: str) -> list[tuple[str, str]]:
    named = {
        "Source": facts.get("source"),
        "Licence": "not stated: that of the source applies" if license == "unknown" else license,
        "Encoder": facts.get("encoder"),
        "Digest of the encoder": facts.get("encoder_digest"),
        "Keep ratio": facts.get("keep_ratio"),
        "Bins": facts.get("num_bins"),
        "Seed": facts.get("seed"),
        "Share of the patches": facts.get("patches"),
        "Content hash": facts.get("content_hash"),
    }
    return [(name, _cell(value)) for name, value in named.items() if value is not None]


def _class_table(kept: Sequence[int], whole: Sequence[int] | None, names: Sequence[str] | None) -> list[str]:
    order = sorted(range(len(kept)), key=lambda number: (-kept[number], number))
    shown = sorted(order[:_MAX_CLASSES])
    name = [str(number) if names is None else names[number] for number in range(len(kept))]
    header = ("class", "kept") if whole is None else ("class", "kept", "of")
    rows = [(_cell(name[c]), f"{kept[c]:,}", *(() if whole is None else (f"{whole[c]:,}",))) for c in shown]
    left_out = len(kept) - len(shown)
    return _table(header, rows) + ([f"\n{left_out:,} classes with fewer images are not listed."] if left_out else [])


def _recipe(facts: dict[str, Any], settings: dict[str, Any] | None) -> list[str]:
    release = library_version("dq-lightning")
    lines = ["```", f'pip install "dq-lightning=={release}"' if release else "pip install dq-lightning"]
    if settings is None:
        return [*lines, "```", "", "The settings that the set was made with are not known to this export."]
    import yaml

    tools: Any = yaml
    place = "" if str(settings.get("dataset", "")).startswith(HUB) else " --data_path FOLDER"
    plain = {key: _without_folder(value) for key, value in settings.items() if value is not None and key != "data_path"}
    text = tools.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip()
    lines += [f"dq-lightning quantize --config settings.yaml{place} --output results", "```", ""]
    return [*lines, "`settings.yaml`:", "", "```yaml", *text.split("\n"), "```"]


def _without_folder(value: Any) -> Any:
    """Return settings in which an absolute path is its last part: folders of one machine say nothing to others."""
    if isinstance(value, dict):
        return {key: _without_folder(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    """Return a value as text that fits into one cell of a Markdown table."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
