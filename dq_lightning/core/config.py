"""Every setting of the flow: frozen dataclasses, validated when made, JSON both ways."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.fields import JsonFields, check_choice, check_ratio

Saliency = Literal[
    "gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "gradcamelementwise",
    "ablationcam", "eigencam", "eigengradcam", "fem", "fullgrad", "kpcacam", "scorecam", "segeigencam", "shapleycam",
    "variance", "random",
]  # fmt: skip
SaliencyTarget = Literal["auto", "label", "argmax"]
Reconstruct = Literal["prepare", "batch", "off"]
PatchCodec = Literal["auto", "raw", "png", "jpeg", "webp"]


@dataclass(frozen=True)
class PatchConfig(JsonFields):
    """Which patches of an image are kept, and how the others are filled (Zhou et al. 2023, section 3.3).

    Attributes:
        drop_ratio: share of patches dropped; floor(L * (1 - drop_ratio) + 0.5) of L are kept, exactly.
        patch_size: side of a patch in pixels; 4 for images up to 64 px and 16 for larger ones when None.
        spread: spread the same total over all images by how much saliency each patch holds.
        max_bytes: upper bound on the stored patches of all images, in bytes; more patches are dropped, of the least salient
            images first, until it holds. None: no bound.
        least_ratio: share of its patches that every image keeps when the total is spread.
        saliency: how patches are scored; `"variance"` and `"random"` need no classifier.
        classifier: as `FeatureConfig.encoder`, with a linear head.
        weights: local weight file (.safetensors or .pth) of the classifier.
        target: class explained: the `"label"`, the classifier's `"argmax"`, or the label where the classifier knows it.
        class_map: for every label the classifier's output that stands for it, or None.
        target_layer: name of the layer the map is read from; found by itself when None.
        seed: of `"random"`.
        reconstructor: `"auto"`, `"bundled"`, a hub name, a folder, or an original checkpoint file.
        num_heads: of the encoder in such a file when its size is not an official one; `decoder_num_heads` likewise.
        reconstruct: `"prepare"` once, `"batch"` on the device of the training, `"off"` fills with the mean colour.
        codec: of the kept patches; `"auto"` is raw for small images and PNG for others.
        quality: of JPEG and WebP, 1 to 100.
        batch_size: images per step. Not part of the identity.
    """

    drop_ratio: float = 0.0
    patch_size: int | None = None
    spread: bool = False
    max_bytes: int | None = None
    least_ratio: float = 0.25
    saliency: Saliency = "gradcam"
    classifier: str = "auto"
    weights: str | None = None
    target: SaliencyTarget = "auto"
    class_map: tuple[int, ...] | None = None
    target_layer: str | None = None
    seed: int = 0
    reconstructor: str = "auto"
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    reconstruct: Reconstruct = "prepare"
    codec: PatchCodec = "auto"
    quality: int = 90
    batch_size: int = 64

    @property
    def drops(self) -> bool:
        """Whether any patch may be dropped."""
        return self.drop_ratio > 0 or self.max_bytes is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("PatchConfig", "drop_ratio", self.drop_ratio, zero=True)
        for name, choices in (("saliency", Saliency), ("target", SaliencyTarget), ("codec", PatchCodec)):
            check_choice("PatchConfig", name, getattr(self, name), choices)
        check_choice("PatchConfig", "reconstruct", self.reconstruct, Reconstruct)
        for name, good in (
            ("patch_size", self.patch_size is None or self.patch_size >= 1),
            ("max_bytes", self.max_bytes is None or self.max_bytes >= 1),
            ("least_ratio", 0 <= self.least_ratio <= 1),
            ("class_map", self.class_map is None or min(self.class_map, default=-1) >= 0),
            ("seed", 0 <= self.seed < 2**64),
            ("quality", 1 <= self.quality <= 100),
            ("batch_size", self.batch_size >= 1),
        ):
            if not good:
                raise ConfigError(f"PatchConfig.{name} is out of range: {getattr(self, name)!r}")


FeatureKind = Literal["embedding", "gradient"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
SelectionTrain = Literal["head", "all"]
Objective = Literal["graph_cut", "facility_location", "log_determinant", "sum_redundancy", "feature_based"]
Maximizer = Literal["naive", "lazy", "stochastic", "approximate_lazy"]
Similarity = Literal["cosine", "dot", "rbf"]
Draw = Literal["seeded", "rank"]
StoreKind = Literal["auto", "indices", "packed"]
Template = Literal["auto", "alpaca", "prompt", "chat", "plain"]
EmbeddedText = Literal["both", "instruction", "response"]
Pooling = Literal["auto", "mean", "cls"]
VerifyPolicy = Literal["size", "hash", "off"]
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class FeatureConfig(JsonFields):
    """How samples become vectors.

    Attributes:
        encoder: `"auto"`, `"bundled"`, a timm name, `"hf-hub:OWNER/NAME"`, or a folder or file that timm can load; for text a
            model of transformers; for both an .npy of ready-made features, for text `"openai:MODEL"`.
        weights: local weight file (.safetensors or .pth) for a timm name; nothing is then asked of a hub.
        kind: `"embedding"` (pooled features) or `"gradient"` (last-layer gradient; needs an encoder with a head for these
            classes, or `selection_epochs`, which give any network one).
        precision: of the encoder; `"auto"` is bfloat16 or float16 on a GPU and float32 on a CPU. Not part of the identity.
        batch_size: images per step; halved by itself when the GPU's memory is short. Not part of the identity.
        num_workers: loader processes. Not part of the identity.
        whiten: decorrelate the embeddings (principal components scaled to unit variance) before the bins.
        selection_epochs: train the encoder on the dataset's classes for so many epochs before it makes features; its weights
            as you gave them are not touched. The paper takes 10, the published commands 0.
        selection_train: what is trained: `"all"` of it, as published, or `"head"`, a linear layer on frozen features, which
            matters to `kind="gradient"` alone.
        selection_lr: first learning rate of that training, falling to zero along a cosine.
        selection_batch_size: images per step of that training.
        selection_seed: of the order of its batches and of a new head.
    """

    encoder: str = "auto"
    weights: str | None = None
    kind: FeatureKind = "embedding"
    precision: Precision = "auto"
    batch_size: int = 256
    num_workers: int | Literal["auto"] = "auto"
    whiten: bool = False
    selection_epochs: int = 0
    selection_train: SelectionTrain = "all"
    selection_lr: float = 0.1
    selection_batch_size: int = 128
    selection_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("FeatureConfig", "kind", self.kind, FeatureKind)
        check_choice("FeatureConfig", "precision", self.precision, Precision)
        check_choice("FeatureConfig", "selection_train", self.selection_train, SelectionTrain)
        for name, least in (
            ("batch_size", 1),
            ("selection_epochs", 0),
            ("selection_batch_size", 2),
            ("selection_seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"FeatureConfig.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.selection_lr < float("inf"):
            raise ConfigError(f"FeatureConfig.selection_lr must be a positive number, got {self.selection_lr}")
        if self.selection_epochs and self.selection_train == "head" and self.kind == "embedding":
            raise ConfigError(
                'training the head changes no embedding: with selection_epochs and selection_train="head" pass '
                'kind="gradient", or selection_train="all"'
            )

    def selection_training(self) -> dict[str, Any]:
        """What identifies the training before features are made; empty without one."""
        if self.selection_epochs == 0:
            return {}
        names = ("selection_epochs", "selection_train", "selection_lr", "selection_batch_size", "selection_seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BinConfig(JsonFields):
    """How features become bins (Dataset Quantization, Zhou et al. 2023, section 3.2).

    Attributes:
        num_bins: K, the number of disjoint bins in each class.
        objective: submodular function.
        maximizer: how it is maximised.
        similarity: between two samples.
        lam: weight of representativeness against diversity in the graph cut.
        by_label: make the bins inside each class when there are classes; else over the whole set.
        clusters: split every group further into so many k-means clusters, or None. The bins are then made inside each.
        gamma: of the radial basis function exp(-gamma |a - b|^2); one over the mean squared distance when None.
        epsilon: accuracy of the maximizer `"stochastic"`: its samples miss the best gain this often.
        beta: accuracy of the maximizer `"approximate_lazy"`: share of the best gain that is good enough.
        search_seed: of the maximizer `"stochastic"` and of the clusters.
        deduplicate: cosine similarity from which on a sample counts as a near-duplicate of an earlier one and is left out of
            the bins, or None.
    """

    num_bins: int = 10
    objective: Objective = "graph_cut"
    maximizer: Maximizer = "naive"
    similarity: Similarity = "cosine"
    lam: float = 1.0
    by_label: bool = True
    clusters: int | None = None
    gamma: float | None = None
    epsilon: float = 0.1
    beta: float = 0.9
    search_seed: int = 0
    deduplicate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("BinConfig", "objective", self.objective, Objective)
        check_choice("BinConfig", "maximizer", self.maximizer, Maximizer)
        check_choice("BinConfig", "similarity", self.similarity, Similarity)
        if not 1 <= self.num_bins <= 32767:
            raise ConfigError(f"BinConfig.num_bins must be between 1 and 32767, got {self.num_bins}")
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"BinConfig.clusters must be at least 1 or None, got {self.clusters}")
        for name, value, good in (
            ("lam", self.lam, 0 <= self.lam < float("inf")),
            ("gamma", self.gamma, self.gamma is None or 0 < self.gamma < float("inf")),
            ("epsilon", self.epsilon, 0 < self.epsilon < 1),
            ("beta", self.beta, 0 < self.beta <= 1),
            ("search_seed", self.search_seed, self.search_seed >= 0),
            ("deduplicate", self.deduplicate, self.deduplicate is None or 0 < self.deduplicate <= 1),
        ):
            if not good:
                raise ConfigError(f"BinConfig.{name} is out of range: {value!r}")


@dataclass(frozen=True)
class SelectionConfig(JsonFields):
    """How bins become a selection.

    Attributes:
        keep_ratio: share of samples kept; floor(N * keep_ratio + 0.5) samples are kept, exactly.
        seed: of the draw.
        draw: `"seeded"` draws uniformly inside a bin, `"rank"` takes the first by rank.
        bin_weights: one non-negative weight a bin in place of the even share, or None.
    """

    keep_ratio: float = 0.125
    seed: int = 0
    draw: Draw = "seeded"
    bin_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("SelectionConfig", "keep_ratio", self.keep_ratio)
        if self.seed < 0:
            raise ConfigError(f"SelectionConfig.seed must be at least 0, got {self.seed}")
        check_choice("SelectionConfig", "draw", self.draw, Draw)


@dataclass(frozen=True)
class TextConfig(JsonFields):
    """How the rows of a text dataset are read.

    Attributes:
        template: which columns hold what: `"alpaca"` (instruction, input, output), `"prompt"` (prompt, completion),
            `"chat"` (messages), `"plain"` (text), or `"auto"`, by the columns.
        columns: the columns that hold the text, where they have other names: those of `template` in that order, or of plain
            text any number, joined line by line. None takes the usual names (`prompts.LAYOUTS`).
        embed: the part of a row that is embedded: `"instruction"` with its input, `"response"`, or `"both"`, as published.
        pooling: of the encoder's tokens; `"auto"` is what the model's own files say.
        normalize: scale every embedding to length 1.
        max_length: tokens of a row that the encoder reads; its own limit when None.
        prompt: put before every row that the encoder reads; the default one of the model's own files when None, `""` for none.
        train_length: tokens of a row in training, with `tokenizer=`. Not part of the identity, nor are the next two.
        pack_rows: put several rows into one sequence of `train_length` tokens, none of which sees another row's.
        use_chat_template: write rows for training by the tokenizer's chat template: when None only conversations, and
            where there is one; when True all rows; when False none, which uses the published wording.
    """

    template: Template = "auto"
    columns: tuple[str, ...] | str | None = None
    embed: EmbeddedText = "both"
    pooling: Pooling = "auto"
    normalize: bool = True
    max_length: int | None = None
    prompt: str | None = None
    train_length: int = 512
    pack_rows: bool = False
    use_chat_template: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.columns, str):
            object.__setattr__(self, "columns", (self.columns,))
        if self.columns is not None and not (self.columns and all(isinstance(name, str) for name in self.columns)):
            raise ConfigError(f"TextConfig.columns must be names of columns, got {self.columns!r}")
        if self.train_length < 8:
            raise ConfigError(f"TextConfig.train_length must be at least 8 tokens, got {self.train_length}")
        for name, choices in (("template", Template), ("embed", EmbeddedText), ("pooling", Pooling)):
            check_choice("TextConfig", name, getattr(self, name), choices)
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"TextConfig.max_length must be at least 1 or None, got {self.max_length}")


@dataclass(frozen=True)
class QuantizeConfig(JsonFields):
    """The whole flow.

    Attributes:
        features: station 1.
        bins: station 2.
        selection: station 3.
        patches: station 4, for images; nothing happens while `drop_ratio` is 0.
        text: how text is read.
        store: `"indices"` copies nothing, `"packed"` is self-contained, `"auto"` is `"indices"` while all patches are kept.
        image_column: column of a Hugging Face dataset; found by its feature type when None.
        label_column: column of the classes; likewise.
        on_error: what a sample that can't be read does: `"raise"` an error that names it, or `"skip"`: it is in no bin, so it
            is never kept, and it is counted in `StoreInfo.num_unreadable`.
    """

    features: FeatureConfig = field(default_factory=FeatureConfig)
    bins: BinConfig = field(default_factory=BinConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    patches: PatchConfig = field(default_factory=PatchConfig)
    text: TextConfig = field(default_factory=TextConfig)
    store: StoreKind = "auto"
    image_column: str | None = None
    label_column: str | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("QuantizeConfig", "store", self.store, StoreKind)
        check_choice("QuantizeConfig", "on_error", self.on_error, OnError)


# whatever a user may pass as `config=`
AnyConfig = QuantizeConfig | dict[str, Any] | str | Path
# of the file that `dq-lightning quantize --output` leaves: they say which dataset it was
PLACES = ("dataset", "data_path", "split")


def as_config(config: AnyConfig | None) -> QuantizeConfig:
    """Settings from what a user passed as `config=`.

    Args:
        config: settings, a dict of them as `to_dict` gives, a YAML or JSON file of them, such as the `config.yaml` that
            `dq-lightning quantize --output` writes (the dataset that it names is not opened), or None for the defaults.

    Raises:
        ConfigError: it is none of these, the file can't be read, or a field is unknown or out of range.
    """
    if config is None:
        return QuantizeConfig()
    if isinstance(config, QuantizeConfig):
        return config
    if isinstance(config, str | Path):
        values = _read_settings(Path(config).expanduser())
        config = {name: value for name, value in values.items() if name not in PLACES}
    if not isinstance(config, dict):
        raise ConfigError(
            f"config must be a QuantizeConfig, a dict of its fields, or a YAML or JSON file, got {type(config).__name__}"
        )
    return QuantizeConfig.from_dict(config)


def _read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; JSON is YAML too."""
    import yaml

    tools: Any = yaml
    try:
        values = tools.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config={str(path)!r} cannot be read as a YAML or JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config={str(path)!r} holds no settings but a {type(values).__name__}")
    return values


def with_short_forms(config: AnyConfig | None, values: dict[str, Any]) -> QuantizeConfig:
    """Put keyword short forms into a config.

    Args:
        config: see `as_config`.
        values: dotted field names (`"selection.keep_ratio"`) and the keywords' values; None is a keyword that was not given.

    Raises:
        ConfigError: a keyword was given, and the config, which differs from the default there, says something else.
    """
    default, made = QuantizeConfig(), as_config(config)
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        current = getattr(made, owner) if owner else made
        standard = getattr(getattr(default, owner) if owner else default, name)
        seen = getattr(current, name)
        if value is None or value == seen:
            continue
        if seen != standard:
            raise ConfigError(
                f"{name}={value!r} was passed as a keyword, but config.{path} is {seen!r}: set it in one place only"
            )
        made = replace_fields(made, {path: value})
    return made


def replace_fields(config: QuantizeConfig, values: dict[str, Any]) -> QuantizeConfig:
    """Put values in place of a config's own.

    Args:
        config: to begin with.
        values: dotted field names (`"selection.keep_ratio"`) and values; None leaves the config's own.
    """
    for path, value in values.items():
        if value is not None:
            owner, _, name = path.rpartition(".")
            changed = _replaced(getattr(config, owner), name, value) if owner else value
            config = _replaced(config, owner or name, changed)
    return config


def _replaced(config: Any, name: str, value: Any) -> Any:
    return replace(config, **{name: value})


def config_fields(config: Any) -> list[str]:
    """Names of a config dataclass's fields, in order."""
    return [f.name for f in fields(config)] if is_dataclass(config) else []
