"""Holds the architecture: who may import whom, how long files and functions may be, and that no error is swallowed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("nodes", "host", "runs", "testlab", "lora_train", "reward_models", "pocket", "labtools")
SCAFFOLD = ("benchmarks", "tests")
FILE_LINES = 400
FUNCTION_LINES = 60
# A node's schema is a table.
TABLES = ("define_schema",)
HOST_MODULES = frozenset(
    {"comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "folder_paths", "server", "nodes", "execution", "node_helpers", "latent_preview"}
)
HOST_LIBRARIES = ("torch", "numpy", "PIL", "av", "safetensors", "aiohttp", "sentencepiece", "einops", "huggingface_hub", "psutil")
# Entries of processes. The worker registers the pack under this name first, then imports itself by it, for a script cannot import
# relatively; the launcher chooses the host's device before anything else of the host is imported.
SCRIPT_IMPORTS = {("host/worker.py", "reward_lab.host.worker"), ("labtools/launch.py", "comfy.cli_args")}
STDLIB = frozenset(sys.stdlib_module_names)

# What each part may import: own parts by name (or part.module), outside packages by name. The standard library is free for all.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "__init__": frozenset({"nodes"}),
    "nodes": frozenset({"host", "testlab", "runs", "lora_train", "reward_models", "comfy_api"}),
    "host": frozenset({"lora_train", "reward_models", "runs", "testlab", *HOST_LIBRARIES, *HOST_MODULES}),
    "runs": frozenset({"lora_train.config", "lora_train.run_config", "lora_train.events"}),
    "testlab": frozenset({"numpy", "PIL", "av"}),
    # Optional all three: bitsandbytes and sageattention are asked for where the settings choose them; two files, loaded on choice, import triton.
    "lora_train": frozenset({"reward_models.base", "torch", "safetensors", "einops", "bitsandbytes", "sageattention", "triton"}),
    "reward_models": frozenset({"torch", "open_clip", "safetensors", "einops"}),
    "labtools": frozenset({"runs", "lora_train.config", "lora_train.run_config", "lora_train.events"}),
    "lab": frozenset({"labtools"}),
}
TORCH_FREE = ("runs", "testlab", "labtools")


def python_files() -> list[Path]:
    """Every Python file of the repository, without caches and environments."""
    folders = [ROOT / name for name in PARTS + SCAFFOLD]
    files = [ROOT / "__init__.py", ROOT / "lab.py"]
    for folder in folders:
        files += sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    return files


def names(path: Path) -> tuple[str, ...]:
    """Module name of a file relative to the root, in parts: host/wan.py gives ("host", "wan")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """Line, absolute dotted name and "is our own" of every import in a file, those inside functions included."""
    found = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or "", False))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)]
            if node.module:
                found.append((node.lineno, ".".join([*base, node.module]), True))
            # `from . import x` and `from ..part import x` may name modules or values; files tell which.
            for alias in node.names:
                dotted = [*base, *(node.module.split(".") if node.module else []), alias.name]
                target = ROOT.joinpath(*dotted)
                if target.is_dir() or target.with_suffix(".py").is_file():
                    found.append((node.lineno, ".".join(dotted), True))
    return found


def is_allowed(part: str, dotted: str, own: bool) -> bool:
    """Whether files of `part` may import the module `dotted`."""
    top = dotted.split(".")[0]
    inside = {name for name in MAY_IMPORT[part] if name.split(".")[0] in PARTS}
    if not own:
        # lab.py is a script in the root: there, `labtools` is a top-level name. For the host's files, `nodes` is the host's module.
        outside = MAY_IMPORT[part] if part == "lab" else MAY_IMPORT[part] - inside
        return top in STDLIB or top in outside or (part == "host" and top in HOST_MODULES)
    if part == "host":
        inside -= HOST_MODULES
    if top == part or top in inside:
        return True
    # `from ..lora_train import events` names the package as well; its __init__ imports nothing heavy.
    return any(dotted == name or dotted.startswith(name + ".") or name.startswith(dotted + ".") for name in inside)


def violations(path: Path) -> list[str]:
    """Sentences about forbidden imports in one file."""
    part, file = names(path)[0], path.relative_to(ROOT).as_posix()
    if part not in MAY_IMPORT:
        return []
    sentences = []
    for line, dotted, own in imports(path):
        if (file, dotted) not in SCRIPT_IMPORTS and not is_allowed(part, dotted, own):
            sentences.append(f"{path.relative_to(ROOT)}:{line} imports {dotted}, which {part} may not (DESIGN, layers)")
    return sentences


def test_only_allowed_imports() -> None:
    assert [sentence for path in python_files() for sentence in violations(path)] == []


def test_every_folder_with_python_has_a_rule() -> None:
    known = set(PARTS) | set(SCAFFOLD) | {"web"}
    found = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py") if not path.relative_to(ROOT).parts[0].startswith(".")}
    assert found - known - {"demo_out"} == set(), "a new top-level folder needs a line in MAY_IMPORT and a reason in ARCHITECTURE.md"


def test_torch_free_parts_import_no_torch_anywhere_on_the_way(repo: Path) -> None:
    import subprocess

    modules = []
    for part in TORCH_FREE:
        modules += [".".join(names(path)) for path in sorted((ROOT / part).rglob("*.py")) if path.stem not in ("launch", "probe")]
    code = (
        "import importlib, importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alias', {str(ROOT / 'labtools' / 'alias.py')!r})\n"
        "alias = importlib.util.module_from_spec(spec); spec.loader.exec_module(alias)\n"
        f"alias.register(__import__('pathlib').Path({str(ROOT)!r}))\n"
        f"[importlib.import_module('reward_lab.' + name) for name in {modules!r}]\n"
        "print([name for name in ('torch', 'comfy', 'folder_paths') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_absolute_import_of_own_parts() -> None:
    """The host loads the pack under its path: absolute imports of own parts would find the host's modules, or nothing."""
    wrong = []
    for path in python_files():
        part = names(path)[0]
        if part in ("tests", "benchmarks", "lab"):
            continue
        for line, dotted, own in imports(path):
            top = dotted.split(".")[0]
            is_hosts_own = top in HOST_MODULES and part == "host" or part == "pocket" and top in HOST_MODULES
            is_script = (path.relative_to(ROOT).as_posix(), dotted) in SCRIPT_IMPORTS
            if not own and top in (*PARTS, "reward_lab") and not is_hosts_own and not is_script:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {dotted} absolutely; make it relative")
    assert wrong == []


def test_file_length() -> None:
    files = [*python_files(), *(path for path in (ROOT / "web").rglob("*") if path.suffix in (".js", ".css"))]
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES}
    assert long == {}, f"files of more than {FILE_LINES} lines: split them by purpose"


def test_function_length() -> None:
    long = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in TABLES
            if is_function and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_no_swallowed_errors() -> None:
    """No bare `except:`; none that catches everything and then does nothing."""
    wrong = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            catches_all = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            is_empty = all(isinstance(entry, ast.Pass) for entry in node.body)
            if node.type is None or (catches_all and is_empty):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_every_file_postpones_annotations() -> None:
    missing = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        has_code = any(not isinstance(node, ast.Expr) for node in ast.parse(text).body)
        if has_code and "from __future__ import annotations" not in text:
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_loggers_have_a_constant_name() -> None:
    """The host loads the pack under a path, so `__name__` would be a path."""
    wrong = [str(path.relative_to(ROOT)) for path in python_files() if path != Path(__file__) and "getLogger(__name__)" in path.read_text(encoding="utf-8")]
    assert wrong == []


@pytest.mark.parametrize(
    ("part", "dotted", "own", "expected"),
    [
        ("reward_models", "comfy.sd", False, False),
        ("lora_train", "reward_models.base", True, True),
        ("lora_train", "reward_models.hpsv2", True, False),
        ("runs", "torch", False, False),
        ("runs", "lora_train.flow", True, False),
        ("host", "nodes", False, True),
        ("host", "nodes.loras", True, False),
        ("nodes", "comfy.sd", False, False),
        ("nodes", "comfy_api.latest", False, True),
        ("labtools", "torch", False, False),
        ("testlab", "host", True, False),
    ],
)
def test_the_rule_itself(part: str, dotted: str, own: bool, expected: bool) -> None:
    assert is_allowed(part, dotted, own) is expected
