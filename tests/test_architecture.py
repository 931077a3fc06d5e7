"""The table of ranks, the doors of heavy libraries, and how light the package is to import."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm_processes

PACKAGE = Path(__file__).resolve().parents[1] / "dq_lightning"
# Folders and files of the package, lowest first. A file imports from lower ranks and from its own folder alone.
RANKS = (
    ("core",),
    ("identity", "cache"),
    ("sources", "features", "quality", "bins", "selection", "patches", "packed"),
    ("pipeline",),
    ("loading", "exports", "evaluation"),
    ("tokens", "report"),
    ("datamodule",),
    ("lightning", "pytorch"),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
    ("__init__",),
)
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}
# heavy library -> the files that alone may import it
DOORS = {
    # one file a package; the hooks in datamodule.py name the base class to type checkers alone
    "lightning": ("lightning.py", "datamodule.py", "demo/run.py"),
    "pytorch_lightning": ("pytorch.py",),
    "timm": ("features/timm_encoder.py",),
    "datasets": (
        "sources/hub.py",
        "sources/hub_streams.py",
        "sources/finish.py",
        "exports/rows.py",
        "exports/hub.py",
        "commands/opening.py",
    ),
    "transformers": (
        "patches/mae.py",
        "features/text_encoder.py",
        "features/image_transformer.py",
        "tokens/tokenizer.py",
    ),
    "fsspec": ("pipeline/remote.py",),
    "openai": ("features/openai_embeddings.py",),
    "pytorch_grad_cam": ("patches/package_maps.py",),
    "pandas": ("commands/opening.py",),
    # used by libraries of ours alone; tests/test_packages.py runs without them
    **dict.fromkeys(("cv2", "sklearn", "scipy", "matplotlib"), ()),
}
HEAVY = ("timm", "datasets", "pyarrow", "transformers", "openai", "pytorch_grad_cam", "torchvision", "lightning")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, wherever in the file the import stands."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            leaves = [alias.name for alias in node.names if is_module(f"{module}.{alias.name}")]
            found += [f"{module}.{leaf}" for leaf in leaves]
            if len(leaves) < len(node.names):
                found.append(module)
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or folder of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("dq_lightning") and (path.with_suffix(".py").is_file() or path.is_dir())


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_every_folder_has_a_rank():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in package_files()}
    assert names == set(RANK_OF)


@pytest.mark.parametrize("path", package_files(), ids=place)
def test_imports_come_from_lower_ranks(path):
    own = place(path).split("/")[0].removesuffix(".py")
    for name in imports_of(path):
        if name.split(".")[0] != "dq_lightning":
            continue
        assert name != "dq_lightning", f"{place(path)} imports the package root"
        target = name.split(".")[1]
        assert target == own or RANK_OF[target] < RANK_OF[own], f"{place(path)} imports {name}"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which an import leads back to themselves."""
    found = []
    for start in graph:
        reached: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += graph.get(module, ())
        if start in reached:
            found.append(start)
    return found


def test_no_import_leads_back_to_where_it_began():
    graph = {dotted(path): set(imports_of(path)) for path in package_files()}
    assert not circles(graph)


def test_the_test_of_circles_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library):
    for path in package_files():
        uses = any(name.split(".")[0] == library for name in imports_of(path))
        assert not uses or place(path) in DOORS[library], f"{place(path)} imports {library}"


def test_no_download_may_bring_code():
    roots = [PACKAGE, PACKAGE.parent / "examples", PACKAGE.parent / "benchmarks"]
    calls = [
        (path, node)
        for root in roots
        for path in root.rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    assert len(calls) > 5
    for path, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno} does not say trust_remote_code=False"


def blocks_around_yields(trees: list[ast.AST]) -> list[tuple[str, set[str], bool]]:
    """Functions with a `yield` inside a `with` block: name, what is called there, whether it is a context manager."""
    found = []
    for function in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        called = {
            ast.unparse(one.context_expr).split("(")[0].split(".")[-1]
            for block in ast.walk(function)
            if isinstance(block, ast.With)
            and any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(block))
            for one in block.items
        }
        if called:
            is_manager = any("contextmanager" in ast.unparse(one) for one in function.decorator_list)
            found.append((function.name, called, is_manager))
    return found


def left_unfinished(trees: list[ast.AST]) -> set[str]:
    """Generators that hold the random state of the process while they wait.

    One that is left unfinished, as after an error, would restore this state whenever it is destroyed: in the middle of
    the user's training. A `with` block ends where the reader sees it, so context managers may hold the state.
    """
    names, found, known = {"isolated_random_state"}, set(), 0
    blocks = blocks_around_yields(trees)
    while known != len(names):
        known = len(names)
        for name, called, is_manager in blocks:
            if called & names:
                (names if is_manager else found).add(name)
    assert {"isolated", "_loaded", "extract_pieces"} <= names
    return found


def test_no_generator_holds_the_random_state():
    trees: list[ast.AST] = [tree_of(path) for path in package_files()]
    assert not left_unfinished(trees)
    with_one = [*trees, ast.parse("def items():\n    with _loaded() as loop:\n        yield 1")]
    assert left_unfinished(with_one) == {"items"}


QUESTIONS = {
    "package": "import dq_lightning",
    "numpy": "import numpy",
    "command line": "import dq_lightning.cli",
    "stations": "import torch; import dq_lightning.bins.make, dq_lightning.selection.select, dq_lightning.packed.reader"
    ", dq_lightning.pipeline.quantize",
    "list of images": "import torch; from dq_lightning.sources.adapt import as_source; from PIL import Image"
    "; as_source([(Image.new('L', (4, 4)), 0)]).labels()",
    "command": """import torch
import contextlib, io, numpy, tempfile
from dq_lightning.cli import main
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    os.environ["DQ_LIGHTNING_CACHE"] = folder
    numpy.save(f"{folder}/ready.npy", numpy.random.default_rng(0).normal(size=(2000, 4)).astype("float32"))
    main(["quantize", "--dataset", "dq_lightning.demo.sample_data.SampleCIFAR10", "--encoder", f"{folder}/ready.npy"])
""",
    "pytorch_lightning": "import torch, pytorch_lightning; tell(); from dq_lightning.pytorch import QuantizedDataModule",
}
# each in a child of one interpreter, which imports torch when the first of them needs it
ANSWERS = """
import json, os, sys

def tell():
    print(json.dumps([name, sorted({module.split('.')[0] for module in sys.modules})]), flush=True)

for name, code in json.loads(sys.argv[1]).items():
    if code.startswith("import torch"):
        import torch
    child = os.fork()
    if not child:
        exec(code)
        tell()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[set[str]]]:
    """By question: the top-level modules that a fresh interpreter has loaded, where it tells of them."""
    return asked(*(name for name in QUESTIONS if name != "pytorch_lightning"))


def asked(*names: str) -> dict[str, list[set[str]]]:
    """The answers to some questions of one interpreter."""
    command = [sys.executable, "-c", ANSWERS, json.dumps({name: QUESTIONS[name] for name in names})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers: dict[str, list[set[str]]] = {}
    for name, modules in map(json.loads, done.stdout.splitlines()):
        answers.setdefault(name, []).append(set(modules))
    return answers


def test_the_package_and_the_command_line_load_nothing_heavy(loaded):
    assert not loaded["package"][0] & {*HEAVY, "torch", "numpy"}
    assert not loaded["command line"][0] & {*HEAVY, "torch"}
    # the test can fail
    assert "numpy" in loaded["numpy"][0]


def test_bins_selection_and_store_work_without_lightning(loaded):
    assert not loaded["stations"][0] & {"lightning", "pytorch_lightning", "timm", "datasets", "transformers"}


def test_a_library_is_loaded_only_for_its_own_datasets(loaded):
    assert not loaded["list of images"][0] & {"datasets", "pyarrow", "torchvision", "transformers"}


def test_a_whole_run_of_a_command_leaves_lightning_alone(loaded):
    assert "torch" in loaded["command"][0]
    assert not loaded["command"][0] & {"lightning", "pytorch_lightning", "timm", "transformers", "openai"}


@pytest.mark.parametrize("package", ["lightning", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_the_data_module_adds_no_heavy_module_to(package):
    # the process that forks scripts begins with Lightning and the data module; the other package takes long to load
    answers = warm_processes.before_and_after_the_data_module() if package == "lightning" else asked(package)[package]
    before, after = ({name.split(".")[0] for name in modules} for modules in answers)
    assert package in before
    assert "dq_lightning.lightning" in answers[1] or package != "lightning"
    assert not (after - before) & set(HEAVY)
