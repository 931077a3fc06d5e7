"""Read how a text encoder wants to be used from sentence-transformers' `modules.json` and the files that it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dq_lightning.core.errors import FeatureError

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
# These files hold the settings of the first module, the network; older releases named the file after the network.
LENGTHS = (
    "sentence_bert_config.json",
    *(
        f"sentence_{name}_config.json"
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
# This maps the switches in the config.json of a pooling module to the names that `pool_tokens` uses.
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
# These activations of a dense layer are supported; the files name them as classes of torch.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_ADVICE = 'set config.text.pooling to "mean" or "cls" to use the network without it, or pass another encoder'


@dataclass(frozen=True)
class Layer:
    """A module that follows the pooling: `"Normalize"` scales features to length one, `"Dense"` has an activation.

    The files of the module are in the folder `path` of the model's folder; `config` has the settings of a dense layer.
    """

    kind: Literal["Normalize", "Dense"]
    path: str = ""
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Card:
    """How a text encoder wants to be used, according to its files.

    Attributes:
        pooling: `"mean"`, `"cls"`, `"max"`, `"last"`, or None if the files do not say.
        max_length: largest number of tokens that the encoder is meant to read, or None if the files do not say.
        prompt: text that is put before every text; it is the default prompt of the model.
        pools_prompt: whether the tokens of the prompt are pooled, too.
        lowers: whether texts are converted to lower case.
        layers: modules that follow the pooling, in order.
    """

    pooling: str | None = None
    max_length: int | None = None
    prompt: str = ""
    pools_prompt: bool = True
    lowers: bool = False
    layers: tuple[Layer, ...] = ()


def read_card(read: Callable[[str], Any], place: str, *, whole: bool = True) -> Card:
    """Interpret the files of the model in a folder or repository, which `place` names in messages.

    `read` returns the parsed JSON content of a file, given its name, or None if it does not exist. With `whole` False
    the pooling and the modules that follow it are ignored, because the user has chosen another pooling.

    Raises:
        FeatureError: the files ask for a layer, a pooling or a setting that is not supported, or are inconsistent.
    """
    modules = read(MODULES)
    if not modules:
        return Card()
    network: Mapping[str, Any] = next((found for name in LENGTHS if (found := read(name)) is not None), {})
    prompts = read(PROMPTS) or {}
    length = network.get("max_seq_length")
    pooling, pools_prompt, layers = None, True, []
    for module in modules:
        kind, path = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if path.startswith("/") or ".." in path.split("/"):
            raise FeatureError(
                f"{place} names the folder {path!r}, which is not a folder inside the model: download the model again"
            )
        if kind == "Transformer":
            _check_network(path, network, place)
        elif kind == "Dropout" or not whole:
            continue
        elif kind == "Pooling":
            config = read(f"{path}/config.json") or {}
            pooling, pools_prompt = _pooling(config, place), bool(config.get("include_prompt", True))
        elif kind == "Normalize":
            layers.append(Layer("Normalize"))
        elif kind == "Dense":
            layers.append(_dense(path, read(f"{path}/config.json"), place))
        else:
            raise FeatureError(f"{place} has a layer {kind!r} behind its pooling, which is not supported: {_ADVICE}")
    return Card(
        pooling,
        int(length) if length else None,
        _prompt(prompts, place),
        pools_prompt,
        lowers=bool(network.get("do_lower_case")),
        layers=tuple(layers),
    )


def _check_network(path: str, network: Mapping[str, Any], place: str) -> None:
    if path not in ("", "."):
        raise FeatureError(f"{place} has its network in the subfolder {path!r}: pass this folder as encoder")
    used = (network.get("modality_config") or {}).get("text") or {}
    if (used.get("method", "forward"), used.get("method_output_name", "last_hidden_state")) != (
        "forward",
        "last_hidden_state",
    ):
        raise FeatureError(
            f"{place} uses the output {used} of its network, which is not supported: pass another encoder, or "
            "ready-made embeddings"
        )


def _prompt(config: Mapping[str, Any], place: str) -> str:
    """Return the prompt that sentence-transformers uses by default, or an empty string if there is none."""
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts.get(name), str):
        raise FeatureError(
            f"{place} names the prompt {name!r} as its default, but its prompts are {', '.join(map(repr, prompts)) or 'none'}: "
            "set config.text.prompt to the text that is to stand before every row"
        )
    return str(prompts[name])


def _dense(path: str, config: Any, place: str) -> Layer:
    config = config or {}
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    sizes = [config.get(key) for key in ("in_features", "out_features")]
    elsewhere = [config.get(f"module_{end}_name") not in (None, "sentence_embedding") for end in ("input", "output")]
    elsewhere.append(bool(config.get("use_residual")))
    if activation not in ACTIVATIONS or not all(type(size) is int for size in sizes) or any(elsewhere):
        raise FeatureError(
            f"{place} has a layer 'Dense' in {path or 'no folder'} whose settings are not supported ({dict(config)}): {_ADVICE}"
        )
    return Layer("Dense", path, config)


def _pooling(config: Mapping[str, Any], place: str) -> str:
    named = config.get("pooling_mode")
    wanted = [named] if isinstance(named, str) else list(named or ())
    wanted += [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    known = {_SWITCHES.get(name) or _NAMES.get(name) for name in wanted}
    if len(known) != 1 or None in known:
        raise FeatureError(
            f"{place} pools its tokens by {', '.join(map(str, wanted)) or 'nothing'}, which is not supported: {_ADVICE}"
        )
    return str(known.pop())
