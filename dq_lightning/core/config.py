"""All settings of the library: frozen dataclasses, validated when they are made, that convert to and from JSON."""

from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.fields import JsonFields, check_ratio
from dq_lightning.core.sizes import budget_bytes

Saliency = Literal[
    "gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "gradcamelementwise",
    "ablationcam", "eigencam", "eigengradcam", "fem", "fullgrad", "kpcacam", "scorecam", "segeigencam", "shapleycam",
    "variance", "random",
]  # fmt: skip
SaliencyTarget = Literal["auto", "label", "argmax"]
Reconstruct = Literal["prepare", "batch", "off"]
PatchCodec = Literal["auto", "raw", "png", "jpeg", "webp"]
WholeCodec = Literal["auto", "keep", "jpeg", "webp"]


@dataclass(frozen=True)
class PatchConfig(JsonFields):
    """Which patches of an image are kept, and how the dropped ones are filled (Zhou et al. 2023, section 3.3).

    Attributes:
        drop_ratio: share of the patches that is dropped, 0 <= drop_ratio < 1; exactly floor(L * (1 - drop_ratio) + 0.5)
            of the L patches of an image are kept.
        patch_size: side of a patch in pixels; None means 4 for images up to 64 px and 16 for larger ones.
        spread: keep the same total number of patches, but give more of them to the images whose patches hold more
            saliency.
        max_bytes: upper bound on the stored patches of all images, in bytes; more patches are dropped, those of the
            least salient images first, until the bound holds. None sets no bound.
        least_ratio: share of its patches that every image keeps when the total is spread, 0 to 1.
        saliency: method that scores the patches; `"variance"` and `"random"` need no classifier.
        classifier: network with a linear head whose decisions the saliency explains; takes the same values as
            `FeatureConfig.encoder`.
        weights: local weight file (.safetensors or .pth) of the classifier.
        target: class whose evidence is measured: the sample's `"label"`, the classifier's `"argmax"`, or `"auto"`,
            which is the label where the classifier knows it.
        class_map: for every label, the index of the classifier's output that stands for it; None if the two agree.
        target_layer: name of the layer that the saliency map is read from; None finds it automatically.
        seed: seed of `saliency="random"`, 0 <= seed < 2**64.
        reconstructor: model that fills the dropped patches: `"auto"`, `"bundled"`, a hub name, a folder, or an original
            checkpoint file.
        num_heads: number of attention heads of the encoder in such a checkpoint file; needed when the encoder has none
            of the official sizes.
        decoder_num_heads: number of attention heads of the decoder in such a checkpoint file, under the same condition.
        reconstruct: when the dropped patches are filled: once by `"prepare"`, for every `"batch"` on the training
            device, or `"off"`, which fills them with the mean colour.
        codec: format of the stored patches; `"auto"` is raw for small images and PNG for others.
        quality: quality of JPEG and WebP, 1 to 100.
        batch_size: number of images that are scored in one step, on a CPU a few at a time. It does not enter the cache
            key.

    Raises:
        ConfigError: a value is unknown or out of range.

    Example:
        >>> PatchConfig(drop_ratio=0.25, codec="webp", reconstruct="batch").drops
        True
    """

    drop_ratio: float = 0.0
    patch_size: int | None = None
    spread: bool = False
    max_bytes: int | None = None
    least_ratio: float = 0.25
    saliency: Saliency = "gradcam"
    _taken_elsewhere: ClassVar[dict[str, str]] = {"classifier": "classifier", "reconstructor": "reconstructor"}

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
        self._require_at_least(patch_size=1, max_bytes=1, batch_size=1)
        self._require("least_ratio", 0 <= self.least_ratio <= 1, "between 0 and 1")
        outputs_exist = self.class_map is None or min(self.class_map, default=-1) >= 0
        self._require("class_map", outputs_exist, "a list of outputs, counted from 0")
        self._require("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        self._require("quality", 1 <= self.quality <= 100, "between 1 and 100")


FeatureKind = Literal["embedding", "gradient"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
SelectionTrain = Literal["head", "all"]
Objective = Literal["graph_cut", "facility_location", "log_determinant", "sum_redundancy", "feature_based"]
Maximizer = Literal["naive", "lazy", "stochastic", "approximate_lazy"]
Similarity = Literal["cosine", "dot", "rbf"]
Engine = Literal["auto", "dense", "candidates", "stream"]
Draw = Literal["auto", "seeded", "scored", "rank"]
Balance = Literal["proportional", "sqrt", "equal"]
StoreKind = Literal["auto", "indices", "packed"]
Template = Literal["auto", "alpaca", "prompt", "chat", "plain"]
EmbeddedText = Literal["both", "instruction", "response"]
Pooling = Literal["auto", "mean", "cls"]
VerifyPolicy = Literal["size", "hash", "off"]
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class FeatureConfig(JsonFields):
    """How samples become feature vectors.

    Attributes:
        encoder: for images `"auto"`, `"bundled"`, a timm name, `"hf-hub:OWNER/NAME"`, a folder or file that timm can
            load, or `"transformers:OWNER/NAME"` or `"transformers:FOLDER"`; for text a model of transformers or
            `"openai:MODEL"`; for samples of any kind an .npy file of ready-made features.
        weights: local weight file (.safetensors or .pth) for a timm name; no hub is then asked for weights.
        kind: `"embedding"` (pooled features) or `"gradient"` (last-layer gradient; needs an encoder with a head for the
            classes of this dataset, or `selection_epochs`, which train such a head for any network).
        precision: floating point type that the encoder runs in; `"auto"` is bfloat16 or float16 on a GPU and float32 on
            a CPU. It does not enter the cache key.
        batch_size: number of samples in one step; halved automatically when the GPU runs out of memory, and taken a few
            images at a time on a CPU, which is faster there. It does not enter the cache key.
        num_workers: number of processes that read the dataset, for features, patches and packed samples; 0 reads it in
            this process. `"auto"` decides by the time that a few samples take. It does not enter the cache key.
        whiten: decorrelate the embeddings (principal components scaled to unit variance) before the bins are made. It
            needs many more samples than an embedding has numbers; no more than these are all equally similar afterwards.
            Near-duplicates and margins are found in the embeddings as they are.
        selection_epochs: number of epochs that a copy of the encoder is trained on the dataset's classes before it
            makes features; the given weights are not changed. The paper uses 10, the published commands 0.
        selection_train: what is trained in these epochs: `"all"` of the encoder, as published, or only the `"head"`, a
            linear layer on frozen features, which makes a difference for `kind="gradient"` alone.
        selection_lr: initial learning rate of that training, which falls to zero along a cosine.
        selection_batch_size: number of images in one step of that training, at least 2.
        selection_seed: seed of the order of the batches and of the initial weights of a new head.

    Raises:
        ConfigError: a value is unknown or out of range, or settings contradict each other.

    Example:
        >>> FeatureConfig(encoder="resnet18.a1_in1k", kind="gradient", selection_epochs=10).precision
        'auto'
    """

    _taken_elsewhere: ClassVar[dict[str, str]] = {"encoder": "encoder"}

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
        self._require_at_least(batch_size=1, selection_epochs=0, selection_batch_size=2, selection_seed=0)
        self._require("selection_lr", 0 < self.selection_lr < float("inf"), "a positive number")
        if self.selection_epochs and self.selection_train == "head" and self.kind == "embedding":
            raise ConfigError(
                'selection_train="head" trains only the head, which changes no embedding: pass kind="gradient", which uses '
                'the head, or selection_train="all"'
            )

    def selection_training(self) -> dict[str, Any]:
        """The settings that identify the training before features are made, by name; empty without such a training."""
        if self.selection_epochs == 0:
            return {}
        names = ("selection_epochs", "selection_train", "selection_lr", "selection_batch_size", "selection_seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BinConfig(JsonFields):
    """How features become bins (Dataset Quantization, Zhou et al. 2023, section 3.2).

    Attributes:
        num_bins: K, the number of disjoint bins in each class, 1 to 32767.
        objective: submodular function that is maximised.
        maximizer: algorithm that maximises it.
        similarity: measure of similarity between two samples.
        lam: weight of representativeness against diversity in the graph cut, not negative.
        by_label: make the bins inside each class if the dataset has classes; otherwise make them over the whole
            dataset.
        clusters: number of k-means clusters that every group is split into before bins are made inside each cluster;
            None does not split the groups.
        gamma: factor in the radial basis function `exp(-gamma |a - b|^2)`; None means one over the mean squared distance.
        epsilon: accuracy of the maximizer `"stochastic"`: probability that its sample misses the best gain, between 0
            and 1.
        beta: accuracy of the maximizer `"approximate_lazy"`: share of the best gain that is good enough, 0 < beta <= 1.
        search_seed: seed of the maximizer `"stochastic"` and of the clusters.
        deduplicate: cosine similarity of features from which on an image or row counts as a near-duplicate of an
            earlier one, and is left out of the bins; inside each class where bins are made inside classes (`by_label`).
            None keeps near-duplicates.
        engine: regime of the exact graph cut, see `dq_lightning.bins.graph_cut`: `"auto"` chooses by size, memory and
            what the picks turn out to cost. All make the same picks, so it is not part of the cache key.
        matrix_memory: most memory that the matrix of the regime `"dense"` takes: a number of bytes, a size (`"2GB"`), or
            a share of the free memory of the device (`"50%"`). It does not enter the cache key.

    Raises:
        ConfigError: a value is unknown or out of range.

    Example:
        >>> BinConfig(num_bins=5, lam=0.5).to_dict()["objective"]
        'graph_cut'
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
    engine: Engine = "auto"
    matrix_memory: int | str = "50%"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(clusters=1, search_seed=0)
        self._require("num_bins", 1 <= self.num_bins <= 32767, "between 1 and 32767")
        self._require("lam", 0 <= self.lam < float("inf"), "a number of at least 0")
        self._require("gamma", self.gamma is None or 0 < self.gamma < float("inf"), "a positive number or None")
        self._require("epsilon", 0 < self.epsilon < 1, "in (0, 1)")
        self._require("beta", 0 < self.beta <= 1, "in (0, 1]")
        whole = 1 << 60
        share = isinstance(self.matrix_memory, str) and self.matrix_memory.strip().endswith("%")
        if budget_bytes(self.matrix_memory, whole, "matrix_memory") > whole and share:
            raise ConfigError(f"matrix_memory={self.matrix_memory!r} is more than all of the free memory")
        if self.deduplicate is not None:
            check_ratio("BinConfig", "deduplicate", self.deduplicate)


# The share of the samples that is kept where neither the user nor a budget of bytes says another.
KEEP_RATIO = 0.125


@dataclass(frozen=True)
class SelectionConfig(JsonFields):
    """How bins become a selection.

    Attributes:
        keep_ratio: share of the samples that is kept, 0 < keep_ratio <= 1; exactly floor(N * keep_ratio + 0.5) are
            kept. None lets `max_bytes` choose, and is 0.125 without it.
        seed: seed of the random draw.
        draw: `"seeded"` draws uniformly inside a bin, `"rank"` takes the samples that were picked first, `"scored"` draws
            uniformly from the samples of a bin that have the best scores (`select` says how many these are). `"auto"` is
            `"scored"` with the margins of `quality.score` where a dataset that is not text has classes, of five samples or
            more on average, features of at most 4,096 numbers, and no share in `drop_worst`, because that was best in the
            project's benchmarks of images; else it is `"seeded"`.
        bin_weights: one non-negative weight for each bin, which replaces the even share; None keeps the even share.
        balance: how the kept samples are shared out among the classes: `"proportional"` to their sizes, to the
            square roots of the sizes (`"sqrt"`), or in `"equal"` numbers. A class gives at most what it has, and
            the others share what is missing. Samples without a class count as one class more.

    Raises:
        ConfigError: a value is unknown or out of range.

    Example:
        >>> SelectionConfig(keep_ratio=0.1, seed=1).draw
        'auto'
    """

    keep_ratio: float | None = None
    seed: int = 0
    draw: Draw = "auto"
    bin_weights: tuple[float, ...] | None = None
    balance: Balance = "proportional"

    @property
    def share(self) -> float:
        """The share that is kept where no budget of bytes decides: `keep_ratio`, or 0.125 where it is None."""
        return KEEP_RATIO if self.keep_ratio is None else self.keep_ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("SelectionConfig", "keep_ratio", self.share)
        self._require_at_least(seed=0)
        if self.bin_weights is not None:
            numbers = all(isinstance(weight, float) and 0 <= weight < float("inf") for weight in self.bin_weights)
            self._require("bin_weights", numbers and any(self.bin_weights), "finite, not negative and not all zero")


@dataclass(frozen=True)
class QualityConfig(JsonFields):
    """Which samples are left out before the bins because they are worse than others.

    Attributes:
        score: what a sample is worth, for `drop_worst` and for the draw; higher is better. `"margin"` is how well its
            label fits its features (`margin_scores`), for datasets with classes. Scores of your own are the path of an
            `.npy` file of N numbers, or the name of a column of numbers. `"none"` leaves nothing out and draws without
            scores.
        drop_worst: share of each class that is left out, those of lowest score, 0 <= drop_worst < 1; or `"auto"`, which
            estimates how many labels are wrong and leaves out as many samples as it takes until about 1 % of the other
            labels are wrong (only for margins; nothing on clean data, or without classes). Other samples are then fewer,
            but `keep_ratio` remains a share of all.

    Raises:
        ConfigError: a value is unknown or out of range, or settings contradict each other.

    Example:
        >>> QualityConfig(drop_worst=0.05).score
        'margin'
    """

    _taken_elsewhere: ClassVar[dict[str, str]] = {"score": "scores"}

    score: str = "margin"
    drop_worst: float | Literal["auto"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("score", bool(self.score), '"margin", "none", an .npy file or a column')
        if self.drop_worst != "auto":
            if isinstance(self.drop_worst, str):
                raise ConfigError(f'QualityConfig.drop_worst must be a share or "auto", got {self.drop_worst!r}')
            check_ratio("QualityConfig", "drop_worst", self.drop_worst, zero=True)
        elif self.score not in ("margin", "none"):
            raise ConfigError(
                f'drop_worst="auto" estimates how many labels are wrong from margins, and score={self.score!r} has none: '
                "pass the share to leave out, such as drop_worst=0.2"
            )

    @property
    def drops(self) -> bool:
        """Whether any sample may be left out."""
        return self.score != "none" and self.drop_worst != 0


@dataclass(frozen=True)
class TextConfig(JsonFields):
    """How the rows of a text dataset are read.

    Attributes:
        template: layout of the columns: `"alpaca"` (instruction, input, output), `"prompt"` (prompt, completion),
            `"chat"` (messages), `"plain"` (text), or `"auto"`, which decides by the names of the columns.
        columns: names of the columns that hold the text, if they differ from the usual ones: those of `template` in the
            order above, or for plain text any number of columns, which are joined line by line. None takes the usual
            names (`prompts.LAYOUTS`).
        embed: part of a row that is embedded: the `"instruction"` with its input, the `"response"`, or `"both"`, as
            published.
        pooling: how the encoder's token vectors become one vector; `"auto"` follows the model's own files.
        normalize: scale every embedding to length 1.
        max_length: number of tokens of a row that the encoder reads at most; None means the encoder's own limit.
        prompt: text put before every row that the encoder reads; None means the default prompt of the model's own
            files, `""` means no prompt.
        train_length: number of tokens of a row in training at most, used with `tokenizer=`. It does not enter the cache
            key; neither do `pack_rows` and `use_chat_template`.
        pack_rows: put several rows into one sequence of `train_length` tokens; no token attends to another row.
        use_chat_template: write rows for training with the tokenizer's chat template: None does so for conversations,
            if the tokenizer has a template; True does so for all rows; False for none, and the published wording is
            used.

    Raises:
        ConfigError: a value is unknown or out of range.

    Example:
        >>> TextConfig(template="prompt", columns=("question", "answer"), embed="instruction").max_length is None
        True
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
        self._require_at_least(train_length=8, max_length=1)


@dataclass(frozen=True)
class EncodingConfig(JsonFields):
    """How whole images are stored in a packed set. What is stored is what is trained on.

    Under `max_bytes` with a `drop_ratio` it says how the kept patches are stored, unless `patches.codec` does: `"keep"`
    then keeps their pixels exactly.

    Attributes:
        codec: `"keep"` stores images as the dataset has them; `"jpeg"` and `"webp"` encode them anew, unless their own
            file is smaller; `"auto"` lets `max_bytes` choose, and is `"keep"` without it.
        quality: quality of JPEG and WebP, 1 to 100; None lets `max_bytes` choose, and is 75 without it.
        longest_side: larger images are reduced to this longest side in pixels; None lets `max_bytes` choose (only
            images of more than 64 pixels a side are reduced), and keeps every size without it.
        least_psnr: floor for the choice that `max_bytes` makes, in dB: images are not stored more coarsely, fewer
            samples are kept instead.

    Raises:
        ConfigError: a value is unknown or out of range.

    Example:
        >>> EncodingConfig(codec="webp", quality=60, longest_side=256).encodes
        True
    """

    codec: WholeCodec = "auto"
    quality: int | None = None
    longest_side: int | None = None
    least_psnr: float = 26.0

    @property
    def encodes(self) -> bool:
        """Whether the settings themselves, without a budget, ask for images to be encoded anew."""
        return self.codec in ("jpeg", "webp")

    @property
    def closed(self) -> tuple[str, ...]:
        """Names of the settings that leave `max_bytes` no choice."""
        defaults = EncodingConfig()
        names = ("codec", "quality", "longest_side")
        return tuple(name for name in names if getattr(self, name) != getattr(defaults, name))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(longest_side=1)
        self._require("quality", self.quality is None or 1 <= self.quality <= 100, "between 1 and 100, or None")
        self._require("least_psnr", 0 <= self.least_psnr < float("inf"), "a number of at least 0")


Preset = Literal["published"]
# The paper's way of choosing (Zhou et al. 2023): exact graph cut in ten bins of each class, the same share of each bin
# drawn uniformly, and nothing left out before or inside the images.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "features.whiten": False,
        "bins.num_bins": 10,
        "bins.objective": "graph_cut",
        "bins.maximizer": "naive",
        "bins.similarity": "cosine",
        "bins.lam": 1.0,
        "bins.by_label": True,
        "bins.clusters": None,
        "bins.deduplicate": None,
        "selection.draw": "seeded",
        "selection.bin_weights": None,
        "selection.balance": "proportional",
        "quality.score": "none",
        "quality.drop_worst": 0.0,
        "patches.drop_ratio": 0.0,
        "patches.max_bytes": None,
    }
}


@dataclass(frozen=True)
class QuantizeConfig(JsonFields):
    """All settings of Dataset Quantization, from features to the stored compact set.

    Attributes:
        features: how samples become feature vectors (station 1).
        bins: how features become bins (station 2).
        selection: how bins become a selection (station 3).
        patches: which patches of the kept images are stored (station 4); nothing is dropped while `drop_ratio` is 0 and
            `max_bytes` is None.
        text: how the rows of a text dataset are read.
        store: `"indices"` copies no samples, `"packed"` writes a self-contained copy, `"auto"` is `"indices"` while
            images are stored whole and unchanged and `"packed"` otherwise.
        image_column: name of the image column of a Hugging Face dataset; None finds it by its feature type.
        label_column: name of the column of classes of a Hugging Face dataset; None finds it by its feature type.
        on_error: what happens when a sample cannot be read: `"raise"` raises an error that names the sample; `"skip"`
            leaves the sample out of all bins, so that it is never kept, and counts it in `StoreInfo.num_unreadable`.
        encoding: how whole images are stored.
        max_bytes: bytes that the set may take, everything counted: a number, a size (`"15MB"`), or a share of the
            dataset's bytes (`"10%"`). The number of samples and, for images, codec, quality and longest side are then
            chosen, unless they are fixed in `encoding`, or by `keep_ratio`. Patches are dropped only where
            `patches.drop_ratio` says so; what dropping a fifth of them would change is logged. None sets no bound.
        quality: which samples are left out before the bins, because their labels seem wrong or their scores are low.
        preset: `"published"` is the paper's way of choosing, whatever the defaults are: the fields in
            `core.config.PRESETS`, from ten bins to no dropped patch, have its values, and another value in one of them
            is an error. Encoder and kind of features, ratio, seed and budget stay free. None changes nothing.

    Raises:
        ConfigError: a value is unknown or out of range, or settings contradict each other.

    Example:
        >>> config = QuantizeConfig(bins=BinConfig(num_bins=5), selection=SelectionConfig(keep_ratio=0.1))
        >>> config == QuantizeConfig.from_dict({"bins": {"num_bins": 5}, "selection": {"keep_ratio": 0.1}})
        True
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
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    max_bytes: int | str | None = None
    quality: QualityConfig = field(default_factory=QualityConfig)
    preset: Preset | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("preset", self.preset is None or self.preset in PRESETS, '"published" or None')
        for path, value in PRESETS.get(self.preset or "", {}).items():
            owner, _, name = path.partition(".")
            part: Any = getattr(self, owner)
            if getattr(part, name) == value:
                continue
            if getattr(part, name) != getattr(type(part)(), name):
                raise ConfigError(
                    f"preset={self.preset!r} means {path}={value!r}, and {getattr(part, name)!r} was asked for: leave one of "
                    "the two out"
                )
            object.__setattr__(self, owner, replace(part, **{name: value}))
        share = self.quality.drop_worst
        # Under a budget without a keep ratio, as many samples are kept as are left.
        keep_ratio = self.selection.share if self.max_bytes is None else self.selection.keep_ratio or 0.0
        if share != "auto" and self.quality.drops and share + keep_ratio > 1 + 1e-9:
            raise ConfigError(
                f"drop_worst={share} leaves {1 - share:.4g} of the samples, but keep_ratio={keep_ratio} wants more: lower one "
                "of the two"
            )
        if self.max_bytes is not None:
            budget_bytes(self.max_bytes, 1 << 60)
        for name, asked in (("max_bytes", self.max_bytes is not None), ("encoding.codec", self.encoding.encodes)):
            if asked and self.store == "indices":
                raise ConfigError(
                    f'store="indices" copies nothing, so {name} has nothing to act on: leave one of them out'
                )
        if self.patches.drops:
            self._check_patches()

    def _check_patches(self) -> None:
        """Raise ConfigError if settings of whole images and of dropped patches contradict each other."""
        if self.max_bytes is None and self.encoding.encodes:
            raise ConfigError(
                "encoding.codec stores images whole, and drop_ratio= drops patches: leave one of them out; patches.codec is "
                "the codec of the kept patches"
            )
        if self.max_bytes is not None and self.patches.max_bytes is not None:
            raise ConfigError(
                "max_bytes bounds the whole set and patches.max_bytes its patches: leave one of them out. With "
                "drop_ratio= the first keeps this share of the patches, and as many samples as fit"
            )
        if self.max_bytes is not None and self.encoding.longest_side is not None:
            raise ConfigError(
                "encoding.longest_side reduces whole images, and drop_ratio= drops patches of images of their own size: "
                "leave one of them out"
            )
        own = self.encoding.codec != "auto" or self.encoding.quality is not None
        if self.max_bytes is not None and self.patches.codec != "auto" and own:
            raise ConfigError(
                f"patches.codec={self.patches.codec!r} fixes how patches are stored, and so does encoding: set one of them"
            )


# What a user may pass as `config=`.
AnyConfig = QuantizeConfig | dict[str, Any] | str | Path
# Names in the file written by `dq-lightning quantize --output` that say which dataset was used. They are no settings.
PLACES = ("dataset", "data_path", "split")


def as_config(config: AnyConfig | None) -> QuantizeConfig:
    """Convert what a user passed as `config=` to settings.

    Args:
        config: the settings themselves, a dict of them as `to_dict` gives, or the path of a YAML or JSON file, such as
            the `config.yaml` that `dq-lightning quantize --output` writes (the dataset that it names is not opened).
            None gives the defaults.

    Raises:
        ConfigError: `config` is none of these, the file cannot be read, or a field is unknown or out of range.
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
    """Read the mapping in a YAML file. A JSON file is accepted too, since JSON is a subset of YAML."""
    import yaml

    tools: Any = yaml
    try:
        values = tools.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config={str(path)!r} cannot be read as a YAML or JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config={str(path)!r} holds no settings but a {type(values).__name__}")
    return values


# The setting that a keyword, or an option of the command line, is the short form of.
SHORT_FORMS = {
    "keep_ratio": "selection.keep_ratio",
    "seed": "selection.seed",
    "balance": "selection.balance",
    "num_bins": "bins.num_bins",
    "drop_ratio": "patches.drop_ratio",
    "classifier": "patches.classifier",
    "reconstructor": "patches.reconstructor",
    "encoder": "features.encoder",
    "scores": "quality.score",
    "drop_worst": "quality.drop_worst",
    "max_bytes": "max_bytes",
    "store": "store",
    "on_error": "on_error",
    "preset": "preset",
}


def with_short_forms(config: AnyConfig | None, values: dict[str, Any]) -> QuantizeConfig:
    """Set fields of a config from keyword arguments, such as `keep_ratio=` for `selection.keep_ratio`.

    `values` maps dotted field names to the values of the keywords; None stands for a keyword that was not passed.

    Raises:
        ConfigError: a keyword was passed, and the config has another value there which is not the default.
    """
    default, made = QuantizeConfig(), as_config(config)
    for path, value in values.items():
        seen, standard = map(attrgetter(path), (made, default))
        if value is None or value == seen:
            continue
        if seen != standard:
            name = path.rpartition(".")[2]
            raise ConfigError(
                f"{name}={value!r} was passed as a keyword, but config.{path} is {seen!r}: set it in one place only"
            )
        made = replace_fields(made, {path: value})
    return made


def replace_fields(config: QuantizeConfig, values: dict[str, Any]) -> QuantizeConfig:
    """Return a config in which the given values, by dotted field name (`"selection.keep_ratio"`), replace its own.

    A value of None leaves the config's own value; the given config is not changed.
    """
    for path, value in values.items():
        if value is not None:
            owner, _, name = path.rpartition(".")
            part: Any = getattr(config, owner) if owner else config
            changed: Any = replace(part, **{name: value})
            config = replace(config, **{owner: changed}) if owner else changed
    return config
