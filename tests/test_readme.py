"""What the documents say can be done, can be done."""

import ast
import re
import shlex
from pathlib import Path

import dq_lightning
from dq_lightning import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])


def test_there_are_exactly_two_set_up_lines():
    lines = [line for line in README.splitlines() if "pip install" in line]
    assert lines == [
        "python -m pip install . && dq-lightning demo",
        'python -m pip install -e ".[test]" && python -m pytest',
    ]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_ci_runs_the_test_line_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'python -m pip install -q -e ".[test]"' in script
    assert "python -m pytest" in script.splitlines()


def test_python_blocks_parse_and_import_public_names():
    texts = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for block in re.findall(r"```python\n(.*?)```", texts, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "dq_lightning":
                assert all(hasattr(dq_lightning, alias.name) for alias in node.names)


def test_named_files_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:examples|benchmarks|tests|dq_lightning)/[\w/.]+\.(?:py|md))`", text):
            assert (ROOT / name).is_file(), f"{document} names {name}"


def test_relative_links_lead_to_files():
    """Links work on the repository's own pages; the build of the site also follows those to headings."""
    found = 0
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document} links to {target}"
            found += 1
    assert found > 30


def test_the_reference_has_every_public_name_and_command():
    folder = ROOT / "docs" / "reference"
    text = (folder / "api.md").read_text(encoding="utf-8") + (folder / "settings.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", text, re.MULTILINE))
    assert documented == set(dq_lightning.__all__)
    shown = re.findall(
        r"^```\{command-help\} ([\w-]+)$", (folder / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert shown == list(cli.COMMANDS)


def test_the_tests_behind_the_promises_exist():
    page = (ROOT / "docs" / "explanation" / "promises.md").read_text(encoding="utf-8")
    table = next(part for part in page.split("\n\n") if part.startswith("| promise"))
    folder, named = "tests", 0
    for name in re.findall(r"`([\w/.:]+?)(?:\.\.\.)?`", table):
        path, _, function = name.partition("::")
        if not path.startswith(("tests", "test_")):
            continue
        # a bare name is in the folder of the one before it
        place = path if "/" in path else f"{folder}/{path}"
        folder, named = str(Path(place).parent), named + 1
        if path.startswith("test_") and not path.endswith(".py"):
            continue
        assert (ROOT / place).exists(), place
        assert not function or f"def {function}(" in (ROOT / place).read_text(encoding="utf-8"), name
    assert named > 15


def test_every_public_name_can_be_imported():
    for name in dq_lightning.__all__:
        assert getattr(dq_lightning, name).__doc__


def test_benchmark_commands_in_documents_name_their_options():
    text = README + (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^python (benchmarks/\w+\.py.*)$", text, re.MULTILINE):
        script, *arguments = shlex.split(line, comments=True)
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in (part for part in arguments if part.startswith("--")):
            assert f'"{option}"' in source, f"{script} has no {option}"
