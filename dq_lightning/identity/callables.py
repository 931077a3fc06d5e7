"""What code does: functions, classes and objects by their code and all that it refers to.

Code of the user's is described by its syntax tree, so that comments, line numbers and the version of Python do not matter; only
where no source fits the running code, by its bytecode. What an installed library defines is described by its name and the
library's version. Whether code was understood in full is a matter of a short list of what is trusted; the reasons why not are
collected in `CodeDescriber.unknown`.
"""

import builtins
import enum
import functools
import importlib.metadata
import io
import linecache
import os
import random
import re
import sys
import sysconfig
import types
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.core.errors import FeatureError
from dq_lightning.identity.syntax import Call, Code, cells_of, composed_names
from dq_lightning.identity.values import Describer, digest_text

_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# of another installation that this one builds on, of the user, of a distribution
_INSTALL_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
# these are known wherever they lie
_NAMED = ("dq_lightning", "torch", "torchvision", "numpy", "PIL")
STREAMS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_FUNCTIONS_BELOW = (
    *(types.BuiltinFunctionType, types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, np.ufunc),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DEFINED = (type, types.FunctionType, types.ModuleType, *_FUNCTIONS_BELOW)
# What is trusted to depend on its arguments alone: these modules, and in builtins these names.
_TRUSTED = re.compile(
    r"(abc|array|base64|bisect|cmath|_?collections|colorsys|copy|copyreg|dataclasses|datetime|decimal|enum|fractions|_?functools"
    r"|heapq|itertools|logging|math|numbers|_?operator|re|statistics|string|_?struct|types|typing|unicodedata|uuid|warnings|zlib"
    r"|numpy|torch|torchvision\.(transforms|tv_tensors|ops|datasets)|PIL\.Image\w*|dq_lightning)(\.|$)"
)
_AMBIENT = re.compile(
    r"(torch\.(hub|distributed|utils\.cpp_extension)|numpy\.(ctypeslib|f2py)|PIL\.Image(Grab|Font|Show|Tk|Qt))(\.|$)"
)
_TRUSTED_BUILTINS = _words(
    "abs all any ascii bin bool bytearray bytes callable chr classmethod complex dict divmod enumerate filter float "
    "format frozenset hasattr hash int isinstance issubclass iter len list map max min next object oct ord pow "
    "print property range repr reversed round set slice sorted staticmethod str sum super tuple type zip hex "
    "Ellipsis NotImplemented __debug__"
)
# by these names functions of trusted modules read files; they may be given what is described as it stands, no composed names
_READERS = frozenset(("open", "load", "fromfile", "memmap", "loadtxt", "genfromtxt"))
_AMBIENT_NAMES = frozenset(("from_file", "open_memmap", "DataSource", "load_library", "attrgetter", "methodcaller"))
# any code may ask for these on what it is given
_VALUES = (
    *(object, str, bytes, int, float, complex, list, tuple, dict, set, slice, range, type(None), re.Pattern, re.Match),
    *(Tensor, np.ndarray, np.generic, Image.Image, io.BytesIO),
)
_ATTRIBUTES = frozenset(name for kind in _VALUES for name in dir(kind)).union(
    ("name", "stem", "suffix", "__name__", "info"), *(dir(kind) for kind in (nn.Module, torch.Size, torch.finfo))
)
# by these, anything at all may be asked for
_ANYTHING = _words(
    "__getattribute__ __getattr__ __dict__ __globals__ __builtins__ __subclasses__ __closure__ __code__ __module__"
)
# run when an object is made; what they did to one that exists is in its attributes
_STARTS = ("__init__", "__new__", "__post_init__")
# Python's notes on a class, which change nothing that it does
_NOTES = _words(
    "__module__ __dict__ __weakref__ __doc__ __annotations__ __firstlineno__ __static_attributes__ __parameters__ "
    "__orig_bases__ __abstractmethods__ __dataclass_params__ __dataclass_fields__ __match_args__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __slots__ __slotnames__ _abc_impl"
)
# methods that dataclasses and named tuples write for a class, from what is seen of it
_WRITTEN_BY_CODE = _words(
    "__eq__ __repr__ __hash__ __lt__ __le__ __gt__ __ge__ __setattr__ __delattr__ __replace__ __init__ __new__"
)
_MODULE_NAMES = frozenset(vars(nn.Module()))
_MISSING = object()


def _is_installed(place: str) -> bool:
    return place.startswith(("<frozen ", *_INSTALLED)) or any(folder in place for folder in _INSTALL_FOLDERS)


def module_of(value: Any) -> str:
    """Name of the module that defines a function, class or module, by where its code lies: wrappers carry others' names."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType) and not code.co_filename.startswith("<"):
        return str(value.__globals__.get("__name__", ""))
    name = getattr(value, "__module__", None)
    if name is None:  # methods of built-in types
        owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        name = getattr(owner, "__module__", None) or getattr(owner, "__name__", None)
    return str(name or "builtins")


def is_library(value: Any) -> bool:
    """Whether an installed library or Python itself defines a function, class or module."""
    name = module_of(value)
    if name.partition(".")[0] in _NAMED:
        return True
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType) and not code.co_filename.startswith("<"):
        return _is_installed(code.co_filename)
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(name)
    place = getattr(module, "__file__", None)
    # a module without a file is built in, unless it is the session that is being typed
    return _is_installed(place) if place else name.partition(".")[0] in sys.builtin_module_names


def patches_of(kind: type) -> list[tuple[str, Any]]:
    """Functions that were put into an installed class, or a class above it, from outside."""
    members = [(owner, name) for owner in kind.__mro__ if is_library(owner) for name in vars(owner)]
    found = [(f"{owner.__name__}.{name}", _inside(vars(owner)[name])) for owner, name in members]
    return [(name, one) for name, one in found if not is_library(one if isinstance(one, _DEFINED) else type(one))]


def _inside(member: Any) -> Any:
    """The function in a method, a property or what `functools` makes of one."""
    while not isinstance(member, _DEFINED):
        inner = [getattr(member, name, None) for name in ("__func__", "fget", "func", "__wrapped__")]
        if not any(inner):
            break
        member = next(one for one in inner if one)
    return member


def is_untouched(kind: type) -> bool:
    """Whether a class is an installed library's own, as it was installed."""
    return is_library(kind) and not patches_of(kind)


class CodeDescriber(Describer):
    """Describes objects by all they hold, classes and functions by their code and what it refers to.

    Attributes:
        unknown: why equal texts do not promise equal behaviour; empty where all was resolved.
        opaque: objects that cannot be looked into, with why.
    """

    order_of_keys = True
    trusts_libraries = True
    """Whether any class of an installed library is known well enough by name, version and attributes."""

    def __init__(self, known_names: frozenset[str] | set[str] = frozenset()) -> None:
        super().__init__()
        self.opaque: list[tuple[Any, str]] = []
        self._unknown: dict[str, None] = {}
        self._offered = set(known_names)  # names of attributes of what was described
        self._asked: dict[str, str] = {}  # names of attributes that code asks for, and which
        self._calls: list[Call] = []
        self._readers: set[str] = set()
        self._computed: set[str] = set()  # names of attributes that code sets, or computes when they are asked for
        self._plain = set(known_names) | _ATTRIBUTES | _TRUSTED_BUILTINS  # names that what is called by them has itself
        self._aliases: set[str] = set()  # other names of functions
        self._versions: dict[str, str | None] = {}
        self._looked_at: set[int] = set()  # modules

    @property
    def unknown(self) -> list[str]:
        found = [*self._unknown, *(f"a {type(value).__name__}, which {why}" for value, why in self.opaque)]
        asked = [f"{where} uses .{name}" for name, where in self._asked.items() if name not in self._offered]
        return found + asked + composed_names(self._calls, self._readers, self._computed, self._plain - self._aliases)

    def unresolved(self, why: str) -> None:
        """Note why equal texts do not promise equal behaviour."""
        self._unknown[why] = None

    # policies

    def unseen(self, value: Any, why: str) -> str:
        self.opaque.append((value, why))
        return f"unseen:{type(value).__qualname__}"

    def stream(self, value: Any) -> str:
        """Of where a stream of numbers stands."""
        return type(value).__qualname__

    def used(self, value: Any) -> str:
        """Of a value that code refers to."""
        return self.describe(value)

    # kinds of values

    def kind(self, kind: type) -> str:
        return self.describe(kind)

    def special(self, value: Any) -> str | None:
        own = getattr(value, "identity", None)
        if isinstance(own, str) and not isinstance(value, type | types.ModuleType):
            return own
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, enum.Enum):
            return digest_text("enum", self.kind(type(value)), value.name, self.describe(value.value))
        if isinstance(value, STREAMS):
            return self.stream(value)
        if isinstance(value, torch.device | weakref.ref):
            return type(value).__qualname__
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return digest_text("method", *self.all((value.__self__, value.__func__)))
        if isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
            return f"slot:{value.__name__}"
        if isinstance(value, _FUNCTIONS_BELOW):
            self._check_held(value)
            owner = getattr(value, "__self__", None)
            held = [] if owner is None or isinstance(owner, types.ModuleType) else [self.describe(owner)]
            return digest_text("builtin", self.library(value) or module_of(value), value.__name__, *held)
        if isinstance(value, staticmethod | classmethod | property | functools.cached_property):
            below = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", None)
            return digest_text(type(value).__name__, self.describe(below))
        if isinstance(value, functools.partial | functools.partialmethod):
            return digest_text(type(value).__name__, *self.all((value.func, value.args, value.keywords)))
        if isinstance(value, functools._lru_cache_wrapper):
            self.unresolved(f"{value.__name__} remembers what it gave (lru_cache)")
            return digest_text("remembering", self.describe(value.__wrapped__))
        return None

    def library(self, value: Any) -> str | None:
        """Name and version of what an installed library defines; None for what is the user's own."""
        if not is_library(value):
            return None
        module = module_of(value)
        top = module.partition(".")[0]
        if top not in self._versions:
            self._versions[top] = _version(top)
        version = self._versions[top]
        if version is None:  # its name says too little
            return None
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        return f"{module}.{name}" + (f"@{version}" if version else "")

    def _module(self, module: types.ModuleType) -> str:
        library = self.library(module)
        if library is None or not _is_trusted(module.__name__):
            self.unresolved(f"all of module {module.__name__} is used")
        return library or digest_text("module", module.__name__.replace("__mp_main__", "__main__"), _content_of(module))

    def _class(self, kind: type) -> str:
        library = self.library(kind)
        if library is None:
            return self._written_class(kind)
        patches = patches_of(kind)
        for name, _ in patches:
            self.unresolved(f"{name} was replaced")
        self._offered.update(dir(kind))
        self._check_held(kind)
        replaced = patches + self._replaced_near(kind)
        return digest_text(library, *(text for name, one in replaced for text in (name, self.describe(one))))

    def _check_held(self, value: Any) -> None:
        """Note where a library's function or class may be called that is not known to depend on its arguments alone."""
        name = f"{module_of(value)}.{value.__name__}"
        if not self.trusts_libraries and (not _is_trusted(name) or _reads(value)):
            self.unresolved(f"{name} is used")

    def _replaced_near(self, value: Any) -> list[tuple[str, Any]]:
        """Functions that were put into the module of a library's function or class, or those beside it, from outside."""
        module = sys.modules.get(module_of(value))
        top = module_of(value).partition(".")[0] + "."
        near = [] if module is None else [module, *(m for m in vars(module).values() if type(m) is types.ModuleType)]
        found = []
        for one in near:
            if one.__name__.startswith(top) and id(one) not in self._looked_at:
                self._looked_at.add(id(one))
                functions = [(name, f) for name, f in list(vars(one).items()) if type(f) is types.FunctionType]
                found += [
                    (f"{one.__name__}.{name}", function) for name, function in functions if not is_library(function)
                ]
        for name, _ in found:
            self.unresolved(f"{name} was replaced")
        return found

    def _written_class(self, kind: type) -> str:
        members = dict(vars(kind))
        self._offered.update(members)
        parts = [kind.__qualname__, *self.all(kind.__bases__)]
        if not is_library(type(kind)):
            parts.append(self.describe(type(kind)))
        if issubclass(kind, enum.Enum):
            values = {name: member.value for name, member in kind.__members__.items()}
            members = {name: one for name, one in members.items() if isinstance(one, types.FunctionType)} | values
        for name, one in sorted(members.items()):
            if name in _NOTES or name in _STARTS:
                continue
            parts += [name, self.describe(one)]
            self.note_name(name, one)
            if not isinstance(one, types.FunctionType) and hasattr(type(one), "__get__"):
                self._computed.add(name)
        if {"__getattr__", "__getattribute__"} & members.keys():
            self.unresolved(f"{kind.__name__} makes up attributes")
        if "__getitem__" in members and not issubclass(kind, torch.utils.data.Dataset):
            self._computed.add("[]")
        return digest_text(*parts)

    def made(self, kind: type) -> list[str]:
        """Of what runs when code makes an object of a class."""
        return [
            self.describe(vars(owner)[name])
            for owner in kind.__mro__
            for name in _STARTS
            if name in vars(owner) and self.library(owner) is None
        ]

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        self._offered.update(held)
        for name, one in held.items():
            self.note_name(name, one)
        if not isinstance(value, nn.Module):
            return held
        parts: dict[str, Any] = {name: dict(held.get(name) or {}) for name in ("_parameters", "_buffers", "_modules")}
        self._offered.update(*parts.values())
        # hooks are filed under numbers that count up through the process
        hooks = {name: list((held.get(name) or {}).values()) for name in ("_forward_hooks", "_forward_pre_hooks")}
        own = {} if is_library(type(value)) else {"training": value.training}
        return parts | hooks | own | {name: one for name, one in held.items() if name not in _MODULE_NAMES}

    def note_name(self, name: str, value: Any) -> None:
        """Note where a function is called by another name than its own."""
        if callable(value) or isinstance(value, staticmethod | classmethod):
            (self._plain if getattr(value, "__name__", None) == name else self._aliases).add(name)

    # functions

    def _function(self, function: types.FunctionType) -> str:
        library = self.library(function)
        world = cells_of(function)
        if library is not None:
            self._check_held(function)
            replaced = [*world.items(), *self._replaced_near(function)]
            return digest_text(library, *(text for name, one in replaced for text in (name, self.used(one))))
        self._offered.update(vars(function))
        code = Code(function)
        text = code.text
        if code.node is None:
            text = self._bytecode(function.__code__)
            if function.__name__ not in _WRITTEN_BY_CODE:
                self.unresolved(f"no source fits {code.name}")
        defaults = self.all((function.__defaults__, function.__kwdefaults__, vars(function)))
        return digest_text(function.__qualname__, text, *defaults, *self._referred(code))

    def _bytecode(self, code: types.CodeType) -> str:
        consts = code.co_consts[code.co_consts[:1] == (getattr(code, "__doc__", _MISSING),) :]
        inner = [self._bytecode(one) if isinstance(one, types.CodeType) else self.describe(one) for one in consts]
        return digest_text(code.co_code.hex(), code.co_names, code.co_varnames, *inner)

    def _referred(self, code: Code) -> list[str]:
        """Of all values that a function refers to, each by its name, in order."""
        texts = {}
        for chain in sorted(set(code.chains)):
            value, rest = code.world.get(chain[0], _MISSING), list(chain[1:])
            if value is _MISSING:
                value = getattr(builtins, chain[0], _MISSING)
                if value is _MISSING:
                    self.unresolved(f"{code.name} uses {chain[0]}, which is not there")
                elif chain[0] not in _TRUSTED_BUILTINS and not (
                    isinstance(value, type) and issubclass(value, BaseException)
                ):
                    self.unresolved(f"{code.name} uses {chain[0]}")
                self._ask(rest, code)
                continue
            while rest and isinstance(value, types.ModuleType):
                value = getattr(value, rest.pop(0), _MISSING)
            name = ".".join(chain[: len(chain) - len(rest)])
            if value is _MISSING:
                self.unresolved(f"{code.name} uses {name}, which is not there")
                continue
            texts[name] = self._use(value, name, rest, code, called=chain not in code.handed)
        for name in code.attributes:
            self._ask([name], code)
        for why in code.unresolved:
            self.unresolved(why)
        self._offered.update(code.stored)
        self._computed |= code.stored
        self._plain.add(code.short)
        self._calls += code.calls
        return [text for pair in sorted(texts.items()) for text in pair]

    def _ask(self, names: list[str], code: Code) -> None:
        for name in names:
            if name in _ANYTHING:
                self.unresolved(f"{code.name} uses .{name}")
            elif name not in _ATTRIBUTES:
                self._asked.setdefault(name, code.name)

    def _use(self, value: Any, name: str, rest: list[str], code: Code, *, called: bool) -> str:
        library = self.library(value) if isinstance(value, _DEFINED) else None
        if library is not None:
            self._plain.add(name.rpartition(".")[2])
            trusted = _is_trusted(f"{module_of(value)}.{value.__name__}") or value is io.BytesIO
            if not trusted or value.__name__ in _AMBIENT_NAMES or not _READERS.isdisjoint(rest):
                self.unresolved(f"{code.name} uses {'.'.join((name, *rest))}")
            elif isinstance(value, types.ModuleType) or (_reads(value) and not called):
                self.unresolved(f"{code.name} hands {name} on")
            elif _reads(value):
                self._readers.add(name.rpartition(".")[2])
            # what is called here and now is no function that is held, to be called with anything
            return library if _reads(value) or value is io.BytesIO else self.describe(value)
        self._ask(rest, code)
        if not rest:
            self.note_name(name.rpartition(".")[2], value)
        if isinstance(value, type):
            return digest_text(self.describe(value), *self.made(value))
        return self.used(value)


def _version(top: str) -> str | None:
    """Version of an installed package, without what tells builds of one version apart; "" for Python's own modules."""
    if top in sys.stdlib_module_names or top in ("dq_lightning", "builtins"):
        return ""
    version = getattr(sys.modules.get(top), "__version__", None)
    return version.partition("+")[0] if isinstance(version, str) else library_version(top) or None


def library_version(name: str) -> str:
    """Version of an installed distribution, which need not be imported; "" where there is none."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_trusted(name: str) -> bool:
    return name.startswith("builtins.") or (_TRUSTED.match(name) is not None and _AMBIENT.match(name) is None)


def _reads(value: Any) -> bool:
    """Whether a function of a trusted library reads the file that it is given."""
    names = {value.__name__, getattr(value, "__qualname__", "").partition(".")[0]}
    return not names.isdisjoint(_READERS | _AMBIENT_NAMES)


def _content_of(module: types.ModuleType) -> str:
    """Digest of a module's source, as it is loaded or lies on the disk."""
    linecache.checkcache(getattr(module, "__file__", None) or "")
    return digest_text(*linecache.getlines(getattr(module, "__file__", None) or ""))


def describe_callable(function: Any) -> str:
    """A text that changes when a preprocessing callable does, equal in every process.

    An `identity` attribute (string) is believed, of the callable and of whatever it holds. What belongs to an installed
    library counts by its name and version; objects count by all their attributes; the user's functions and classes by their
    code, its defaults, its closure and the names that it uses.

    Raises:
        FeatureError: something in it cannot be looked into.
    """
    return described(function)[0]


def described(function: Any) -> tuple[str, list[str]]:
    """The same text, and why equal texts do not promise equal behaviour: empty where all was resolved.

    Raises:
        FeatureError: something in it cannot be looked into.
    """
    describer = CodeDescriber()
    text = describer.describe(function)
    if describer.opaque:
        value, why = describer.opaque[0]
        raise FeatureError(
            f"the preprocessing cannot be identified: it holds {value!r}, which {why}; give the preprocessing a string "
            "attribute `identity` that you change whenever its behaviour changes"
        )
    return text, describer.unknown
