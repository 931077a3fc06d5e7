"""Describes functions, classes and objects by their code and by all that it refers to.

The user's code is described by its syntax tree, so that comments, line numbers and the version of Python do not matter;
its bytecode is used only if no source fits the running code. What an installed library defines is described by its name
and the library's version. A short list of trusted modules and functions decides whether code could be resolved
completely; the reasons why it could not are collected in `CodeDescriber.unknown`.
"""

import builtins
import enum
import functools
import io
import linecache
import random
import re
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.core.errors import FeatureError
from dq_lightning.core.libraries import is_library, library_version, module_of
from dq_lightning.identity.syntax import Call, Code, cells_of, composed_names
from dq_lightning.identity.values import Describer, digest_text

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_BUILTIN_FUNCTIONS = (
    *(types.BuiltinFunctionType, types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.MethodWrapperType, types.ClassMethodDescriptorType, np.ufunc),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DEFINED = (type, types.FunctionType, types.ModuleType, *_BUILTIN_FUNCTIONS)
# Modules whose functions are trusted to depend on their arguments alone. `_TRUSTED_BUILTINS` holds such builtins, and
# `_UNTRUSTED` the exceptions among the modules.
_TRUSTED = re.compile(
    r"(abc|array|base64|bisect|cmath|_?collections|colorsys|copy|copyreg|dataclasses|datetime|decimal|enum|fractions|_?functools"
    r"|heapq|itertools|logging|math|numbers|_?operator|re|statistics|string|_?struct|types|typing|unicodedata|uuid|warnings|zlib"
    r"|numpy|torch|torchvision\.(transforms|tv_tensors|ops|datasets)|PIL\.Image\w*|dq_lightning)(\.|$)"
)
_UNTRUSTED = re.compile(
    r"(torch\.(hub|distributed|utils\.cpp_extension)|numpy\.(ctypeslib|f2py)|PIL\.Image(Grab|Font|Show|Tk|Qt))(\.|$)"
)
_TRUSTED_BUILTINS = _words(
    "abs all any ascii bin bool bytearray bytes callable chr classmethod complex dict divmod enumerate filter float "
    "format frozenset hasattr hash int isinstance issubclass iter len list map max min next object oct ord pow "
    "print property range repr reversed round set slice sorted staticmethod str sum super tuple type zip hex "
    "Ellipsis NotImplemented __debug__"
)
# Names under which functions of trusted modules read files. They may be given a name that is described as it is, but
# not a name that the code composes.
_READERS = frozenset(("open", "load", "fromfile", "memmap", "loadtxt", "genfromtxt"))
_INDIRECT_NAMES = frozenset(("from_file", "open_memmap", "DataSource", "load_library", "attrgetter", "methodcaller"))
# Types whose attributes any code may use on the values that it is given.
_VALUES = (
    *(object, str, bytes, int, float, complex, list, tuple, dict, set, slice, range, type(None), re.Pattern, re.Match),
    *(Tensor, np.ndarray, np.generic, Image.Image, io.BytesIO),
)
_ATTRIBUTES = frozenset(name for kind in _VALUES for name in dir(kind)).union(
    ("name", "stem", "suffix", "__name__", "info"), *(dir(kind) for kind in (nn.Module, torch.Size, torch.finfo))
)
# Attributes through which code can get at anything, so that its references cannot be resolved.
_INTROSPECTION = _words(
    "__getattribute__ __getattr__ __dict__ __globals__ __builtins__ __subclasses__ __closure__ __code__ __module__"
)
# Methods that run when an object is made. Their effect on an object that exists already is in its attributes.
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
# Attributes that Python keeps on a class and that do not change what the class does.
_NEUTRAL_MEMBERS = _words(
    "__module__ __dict__ __weakref__ __doc__ __annotations__ __firstlineno__ __static_attributes__ __parameters__ "
    "__orig_bases__ __abstractmethods__ __dataclass_params__ __dataclass_fields__ __match_args__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __slots__ __slotnames__ _abc_impl"
)
# Methods that dataclasses and named tuples generate for a class from its fields, which are described anyway.
_GENERATED_METHODS = _words(
    "__eq__ __repr__ __hash__ __lt__ __le__ __gt__ __ge__ __setattr__ __delattr__ __replace__ __init__ __new__"
)
_MODULE_NAMES = frozenset(vars(nn.Module()))
_MISSING = object()


def patches_of(kind: type) -> list[tuple[str, Any]]:
    """Return name and value of the functions that other code has put into an installed class or its installed bases."""
    members = [(owner, name) for owner in kind.__mro__ if is_library(owner) for name in vars(owner)]
    found = [(f"{owner.__name__}.{name}", _wrapped_function(vars(owner)[name])) for owner, name in members]
    return [(name, one) for name, one in found if not is_library(one if isinstance(one, _DEFINED) else type(one))]


def _wrapped_function(member: Any) -> Any:
    """Return the function inside a method, a property or a wrapper of `functools`."""
    while not isinstance(member, _DEFINED):
        inner = [getattr(member, name, None) for name in ("__func__", "fget", "func", "__wrapped__")]
        if not any(inner):
            break
        member = next(one for one in inner if one)
    return member


def is_untouched(kind: type) -> bool:
    """Whether a class belongs to an installed library and none of its functions was replaced."""
    return is_library(kind) and not patches_of(kind)


class CodeDescriber(Describer):
    """Describer of objects by all that they hold, and of classes and functions by their code and what it refers to.

    Args:
        known_names: names of attributes that exist although they are not described.

    Attributes:
        unknown: reasons why equal texts do not guarantee equal behaviour; empty if everything was resolved.
        opaque: objects that cannot be described, each with the reason.
    """

    order_of_keys = True
    trusts_libraries = True
    """Whether a class of any installed library is sufficiently described by its name, version and attributes."""

    def __init__(self, known_names: frozenset[str] | set[str] = frozenset()) -> None:
        super().__init__()
        self.opaque: list[tuple[Any, str]] = []
        self._unknown: dict[str, None] = {}
        self._known_attributes = set(known_names)  # names of the attributes of everything that was described
        # Names of the attributes that code uses, each with the name of that code.
        self._used_attributes: dict[str, str] = {}
        self._calls: list[Call] = []
        self._readers: set[str] = set()
        self._computed: set[str] = set()  # names of attributes that code sets, or that are computed when they are used
        # names under which only functions of the same name are called
        self._own_names = set(known_names) | _ATTRIBUTES | _TRUSTED_BUILTINS
        self._aliases: set[str] = set()  # names under which functions of another name are called
        self._versions: dict[str, str | None] = {}
        self._searched_modules: set[int] = set()  # ids of the modules that were searched for replaced functions

    @property
    def unknown(self) -> list[str]:
        found = [*self._unknown, *(f"a {type(value).__name__}, which {why}" for value, why in self.opaque)]
        for name, where in self._used_attributes.items():
            if name not in self._known_attributes:
                found.append(f"{where} uses .{name}, which was not found")
        plain = self._own_names - self._aliases
        return found + composed_names(self._calls, self._readers, self._computed, plain)

    def unresolved(self, why: str) -> None:
        """Add a reason why equal texts do not guarantee equal behaviour."""
        self._unknown[why] = None

    # methods that subclasses override

    def opaque_value(self, value: Any, why: str) -> str:
        self.opaque.append((value, why))
        return f"opaque:{type(value).__qualname__}"

    def random_generator(self, value: Any) -> str:
        """Describe a random generator; here by its class alone, without its state."""
        return type(value).__qualname__

    def referred(self, value: Any) -> str:
        """Describe a value that code refers to."""
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
        if isinstance(value, GENERATORS):
            return self.random_generator(value)
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
        if isinstance(value, _BUILTIN_FUNCTIONS):
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
            self.unresolved(f"{value.__name__} keeps earlier results (lru_cache)")
            return digest_text("remembering", self.describe(value.__wrapped__))
        return None

    def library(self, value: Any) -> str | None:
        """Return name and version of what an installed library defines; None for what the user defines.

        None is also returned if the library has no version, since the name alone says too little.
        """
        if not is_library(value):
            return None
        module = module_of(value)
        top = module.partition(".")[0]
        if top not in self._versions:
            self._versions[top] = _version(top)
        version = self._versions[top]
        if version is None:  # the name alone would say too little
            return None
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        return f"{module}.{name}" + (f"@{version}" if version else "")

    def _module(self, module: types.ModuleType) -> str:
        library = self.library(module)
        if library is None or not _is_trusted(module.__name__):
            self.unresolved(f"the whole module {module.__name__} is used")
        if library is not None:
            return library
        # The source as it was loaded or is on the disk.
        file = getattr(module, "__file__", None) or ""
        linecache.checkcache(file)
        name = module.__name__.replace("__mp_main__", "__main__")
        return digest_text("module", name, digest_text(*linecache.getlines(file)))

    def _class(self, kind: type) -> str:
        library = self.library(kind)
        if library is None:
            return self._written_class(kind)
        patches = patches_of(kind)
        for name, _ in patches:
            self.unresolved(f"{name} was replaced by other code")
        self._known_attributes.update(dir(kind))
        self._check_held(kind)
        replaced = patches + self._replaced_near(kind)
        return digest_text(library, *(text for name, one in replaced for text in (name, self.describe(one))))

    def _check_held(self, value: Any) -> None:
        """Add a reason if a library's function or class that may be called may depend on more than its arguments."""
        name = f"{module_of(value)}.{value.__name__}"
        if not self.trusts_libraries and (not _is_trusted(name) or _reads(value)):
            self.unresolved(f"{name} is used, which may read more than its arguments")

    def _replaced_near(self, value: Any) -> list[tuple[str, Any]]:
        """Return name and value of functions that other code has put into a library's modules near a function or class.

        These are the module that defines the function or class, and the modules of the same library that it imports.
        """
        module = sys.modules.get(module_of(value))
        top = module_of(value).partition(".")[0] + "."
        near = [] if module is None else [module, *(m for m in vars(module).values() if type(m) is types.ModuleType)]
        found = []
        for one in near:
            if one.__name__.startswith(top) and id(one) not in self._searched_modules:
                self._searched_modules.add(id(one))
                functions = [(name, f) for name, f in list(vars(one).items()) if type(f) is types.FunctionType]
                found += [
                    (f"{one.__name__}.{name}", function) for name, function in functions if not is_library(function)
                ]
        for name, _ in found:
            self.unresolved(f"{name} was replaced by other code")
        return found

    def _written_class(self, kind: type) -> str:
        members = dict(vars(kind))
        self._known_attributes.update(members)
        parts = [kind.__qualname__, *self.all(kind.__bases__)]
        if not is_library(type(kind)):
            parts.append(self.describe(type(kind)))
        if issubclass(kind, enum.Enum):
            values = {name: member.value for name, member in kind.__members__.items()}
            members = {name: one for name, one in members.items() if isinstance(one, types.FunctionType)} | values
        for name, one in sorted(members.items()):
            if name in _NEUTRAL_MEMBERS or name in _CONSTRUCTORS:
                continue
            parts += [name, self.describe(one)]
            self.note_name(name, one)
            if not isinstance(one, types.FunctionType) and hasattr(type(one), "__get__"):
                self._computed.add(name)
        if {"__getattr__", "__getattribute__"} & members.keys():
            self.unresolved(f"{kind.__name__} computes attributes in __getattr__")
        if "__getitem__" in members and not issubclass(kind, torch.utils.data.Dataset):
            self._computed.add("[]")
        return digest_text(*parts)

    def constructors(self, kind: type) -> list[str]:
        """Describe the methods of the user's code that run when an object of a class is made."""
        return [
            self.describe(vars(owner)[name])
            for owner in kind.__mro__
            for name in _CONSTRUCTORS
            if name in vars(owner) and self.library(owner) is None
        ]

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        self._known_attributes.update(held)
        for name, one in held.items():
            self.note_name(name, one)
        if not isinstance(value, nn.Module):
            return held
        parts: dict[str, Any] = {name: dict(held.get(name) or {}) for name in ("_parameters", "_buffers", "_modules")}
        self._known_attributes.update(*parts.values())
        # The keys of hooks are numbers that count up through the process, so only the hooks themselves are described.
        hooks = {name: list((held.get(name) or {}).values()) for name in ("_forward_hooks", "_forward_pre_hooks")}
        own = {} if is_library(type(value)) else {"training": value.training}
        return parts | hooks | own | {name: one for name, one in held.items() if name not in _MODULE_NAMES}

    def note_name(self, name: str, value: Any) -> None:
        """Record whether a function is held under its own name or under another one."""
        if callable(value) or isinstance(value, staticmethod | classmethod):
            (self._own_names if getattr(value, "__name__", None) == name else self._aliases).add(name)

    # functions

    def _function(self, function: types.FunctionType) -> str:
        library = self.library(function)
        world = cells_of(function)
        if library is not None:
            self._check_held(function)
            replaced = [*world.items(), *self._replaced_near(function)]
            return digest_text(library, *(text for name, one in replaced for text in (name, self.referred(one))))
        self._known_attributes.update(vars(function))
        code = Code(function)
        text = code.text
        if code.node is None:
            text = self._bytecode(function.__code__)
            if function.__name__ not in _GENERATED_METHODS:
                self.unresolved(f"the source of {code.name} cannot be found")
        defaults = self.all((function.__defaults__, function.__kwdefaults__, vars(function)))
        return digest_text(function.__qualname__, text, *defaults, *self._referred(code))

    def _bytecode(self, code: types.CodeType) -> str:
        consts = code.co_consts[code.co_consts[:1] == (getattr(code, "__doc__", _MISSING),) :]
        inner = [self._bytecode(one) if isinstance(one, types.CodeType) else self.describe(one) for one in consts]
        return digest_text(code.co_code.hex(), code.co_names, code.co_varnames, *inner)

    def _referred(self, code: Code) -> list[str]:
        """Describe all values that a function refers to: name and text of each, in the order of the names."""
        texts = {}
        for chain in sorted(set(code.chains)):
            value, rest = code.scope.get(chain[0], _MISSING), list(chain[1:])
            if value is _MISSING:
                value = getattr(builtins, chain[0], _MISSING)
                if value is _MISSING:
                    self.unresolved(f"{code.name} uses {chain[0]}, which is not defined")
                elif chain[0] not in _TRUSTED_BUILTINS and not (
                    isinstance(value, type) and issubclass(value, BaseException)
                ):
                    self.unresolved(f"{code.name} uses {chain[0]}, which may depend on more than its arguments")
                self._use_attributes(rest, code)
                continue
            while rest and isinstance(value, types.ModuleType):
                value = getattr(value, rest.pop(0), _MISSING)
            name = ".".join(chain[: len(chain) - len(rest)])
            if value is _MISSING:
                self.unresolved(f"{code.name} uses {name}, which is not defined")
                continue
            texts[name] = self._describe_use(value, name, rest, code, called=chain not in code.passed_on)
        for name in code.attributes:
            self._use_attributes([name], code)
        for why in code.unresolved:
            self.unresolved(why)
        self._known_attributes.update(code.stored)
        self._computed |= code.stored
        self._own_names.add(code.function_name)
        self._calls += code.calls
        return [text for pair in sorted(texts.items()) for text in pair]

    def _use_attributes(self, names: list[str], code: Code) -> None:
        for name in names:
            if name in _INTROSPECTION:
                self.unresolved(f"{code.name} uses .{name}")
            elif name not in _ATTRIBUTES:
                self._used_attributes.setdefault(name, code.name)

    def _describe_use(self, value: Any, name: str, rest: list[str], code: Code, *, called: bool) -> str:
        library = self.library(value) if isinstance(value, _DEFINED) else None
        if library is not None:
            self._own_names.add(name.rpartition(".")[2])
            trusted = _is_trusted(f"{module_of(value)}.{value.__name__}") or value is io.BytesIO
            if not trusted or value.__name__ in _INDIRECT_NAMES or not _READERS.isdisjoint(rest):
                self.unresolved(f"{code.name} uses {'.'.join((name, *rest))}")
            elif isinstance(value, types.ModuleType) or (_reads(value) and not called):
                self.unresolved(f"{code.name} passes {name} to other code")
            elif _reads(value):
                self._readers.add(name.rpartition(".")[2])
            # A function that reads a file is described by its name if it is only called here: it is not held, so
            # nothing else can call it with a name that is not described.
            return library if _reads(value) or value is io.BytesIO else self.describe(value)
        self._use_attributes(rest, code)
        if not rest:
            self.note_name(name.rpartition(".")[2], value)
        if isinstance(value, type):
            return digest_text(self.describe(value), *self.constructors(value))
        return self.referred(value)


def _version(top: str) -> str | None:
    """Return the version of an installed package without its build tag: "" for modules of Python, None if unknown."""
    if top in sys.stdlib_module_names or top in ("dq_lightning", "builtins"):
        return ""
    version = getattr(sys.modules.get(top), "__version__", None)
    return version.partition("+")[0] if isinstance(version, str) else library_version(top) or None


def _is_trusted(name: str) -> bool:
    return name.startswith("builtins.") or (_TRUSTED.match(name) is not None and _UNTRUSTED.match(name) is None)


def _reads(value: Any) -> bool:
    """Whether a function of a trusted library reads the file whose name it is given."""
    names = {value.__name__, getattr(value, "__qualname__", "").partition(".")[0]}
    return not names.isdisjoint(_READERS | _INDIRECT_NAMES)


def describe_callable(function: Any) -> tuple[str, list[str]]:
    """Return a text that changes if a preprocessing callable changes, and that is equal in every process.

    A string attribute `identity` is used in place of a description, both of the callable and of any object that it
    holds. What an installed library defines is described by its name and version; objects by all their attributes; the
    user's functions and classes by their code, default arguments, closure and the names that they use.

    The reasons why equal texts do not guarantee equal behaviour are returned, too; none if everything was resolved.

    Raises:
        FeatureError: something that the callable holds cannot be described.
    """
    describer = CodeDescriber()
    text = describer.describe(function)
    if describer.opaque:
        value, why = describer.opaque[0]
        raise FeatureError(
            f"the preprocessing cannot be identified: it holds {value!r}, which {why}. Give it a string "
            "attribute `identity` that you change whenever its behaviour changes"
        )
    return text, describer.unknown
