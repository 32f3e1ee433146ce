"""Imports go one way only: from the top layer to the bottom one."""

import ast
from pathlib import Path

import flexjudge_fast

# Top to bottom. A module may import from its own layer and from those below.
LAYERS = (
    "cli",
    "cli_options",
    "judge",
    "progress",
    "tally",
    "engine",
    "prompts",
    "media",
    "models",
    "layers",
    "weights",
    "ops",
)
# An op is one unit in several places: kernels take the types of their ops, and ops alone reach for kernels.
SAME = {"kernels": "ops"}
ROOT = Path(flexjudge_fast.__file__).parent
KERNELS = (ROOT / "kernels").resolve()  # a link to a folder beside the package
FILES = [*ROOT.rglob("*.py"), *(ROOT / "kernels" / p.relative_to(KERNELS) for p in KERNELS.rglob("*.py"))]
FREE = {"errors", "verdict"}  # import nothing of ours; anyone may import them


def imported(path: Path) -> set[str]:
    """The layers that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("flexjudge_fast.")}
    return found


def test_imports_go_down():
    wrong = []
    for path in FILES:
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer == "__init__" or path.name == "__main__.py":  # the public face; a command
            continue
        rank = SAME.get(layer, layer)
        assert rank in LAYERS or layer in FREE, f"{path}: which layer is it?"
        for other in imported(path) - FREE:
            is_up = layer in FREE or LAYERS.index(SAME.get(other, other)) < LAYERS.index(rank)
            if is_up or (other in SAME and rank != SAME[other]):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_a_forbidden_import_is_noticed(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from flexjudge_fast.engine.engine import Engine\n")
    assert imported(path) == {"engine"}


def test_first_lines_say_what_files_do():
    for path in FILES:
        assert path.read_text().startswith('"""'), path
        assert len(path.read_text().splitlines()) <= 400, path
