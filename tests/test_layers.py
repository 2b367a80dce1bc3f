"""Imports go down only, and nothing is used that only one operating system has (DESIGN I8)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
HOST_BORDER = {
    f"nodes/{name}.py"
    for name in (
        *("host", "folders", "encoders", "linear", "sampling", "graph_queue", "adaptive_guider"),
        *("native", "native_clip", "native_lora", "native_fit", "native_ranges", "native_fuse"),
        "native_attention",
    )
}
SCHEMA_MODULE = "comfy_api"
"""The V3 schema may be imported anywhere in nodes/."""

# The upper layers of trainers/, from the top. Everything else lies below, and SETTINGS lowest.
UPPER_LAYERS = ["__main__", "job", "loop"]
SETTINGS = {"config", "checks", "block_weights"} | {
    f"{part}_settings" for part in ("lora", "optimizer", "flow", "preservation", "speed")
}

ONE_SYSTEM_MODULES = {"fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "termios", "winreg"}
ONE_SYSTEM_TEXT = [
    r"\bos\.(fork|getuid|geteuid|getpgid|killpg|mkfifo|setsid|sched_\w+|statvfs|uname)\b",
    r"\bos\.O_DIRECTORY\b",
    r"\bsignal\.(SIGKILL|SIGHUP|SIGUSR1|SIGUSR2|SIGALRM|alarm|pause)\b",
    r"['\"]/(proc|tmp|dev/shm|sys|etc|home|usr)/",
    r"\bshell=True\b",
]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACK_FILES = [ROOT / "__init__.py", *python_files("nodes", "trainers")]
ALL_FILES = [*PACK_FILES, *python_files("scripts", "benchmarks", "assets")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every import anywhere in a file as (number of leading dots, dotted name)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.level, node.module))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, alias.name) for alias in node.names]
    return found


def siblings_of(path: Path) -> set[str]:
    """The modules of the same folder that a file imports."""
    return {name.split(".")[0] for dots, name in imports_of(path) if dots == 1}


@pytest.mark.parametrize("path", PACK_FILES, ids=name_of)
def test_host_modules_are_imported_at_the_border_only(path: Path) -> None:
    used = {name.split(".")[0] for dots, name in imports_of(path) if dots == 0} & HOST_MODULES
    if name_of(path) in HOST_BORDER:
        return
    allowed = {SCHEMA_MODULE} if path.is_relative_to(ROOT / "nodes") else set()
    assert used <= allowed


@pytest.mark.parametrize("path", PACK_FILES, ids=name_of)
def test_the_pack_imports_itself_relatively(path: Path) -> None:
    own = {"trainers", "atelier", "scripts", "tests", "assets"}
    assert not {name.split(".")[0] for dots, name in imports_of(path) if dots == 0} & own


@pytest.mark.parametrize("path", python_files("trainers"), ids=name_of)
def test_trainers_do_not_reach_up_to_the_nodes(path: Path) -> None:
    depth = len(path.relative_to(ROOT / "trainers").parts)
    assert all(dots <= depth for dots, _ in imports_of(path))


@pytest.mark.parametrize("path", python_files("trainers"), ids=name_of)
def test_trainers_import_down_only(path: Path) -> None:
    used = siblings_of(path)
    layer = UPPER_LAYERS.index(path.stem) if path.stem in UPPER_LAYERS else len(UPPER_LAYERS)
    assert not used & set(UPPER_LAYERS[:layer])
    if path.stem in SETTINGS:
        assert used <= SETTINGS


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    for folder in ("trainers", "nodes"):
        graph = {path.stem: siblings_of(path) for path in python_files(folder)}
        graph.pop("__init__", None)
        while leaves := [name for name, used in graph.items() if not used & graph.keys()]:
            for name in leaves:
                del graph[name]
        assert not graph, f"{folder} imports in a circle through {sorted(graph)}"


def test_dynamic_threshold_stands_alone() -> None:
    path = ROOT / "nodes" / "dynamic_threshold.py"
    assert all(dots == 0 for dots, _ in imports_of(path))


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_file_needs_one_operating_system(path: Path) -> None:
    used = {name.split(".")[0] for _, name in imports_of(path)}
    assert not used & ONE_SYSTEM_MODULES
    text = path.read_text(encoding="utf-8")
    found = [match.group() for rule in ONE_SYSTEM_TEXT for match in re.finditer(rule, text)]
    assert not found


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_text_files_are_opened_with_an_encoding(path: Path) -> None:
    """Without one, Windows reads and writes text in the system's own code page."""
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if is_text_call(n)]
    assert not [f"line {call.lineno}" for call in calls]


def is_text_call(node: ast.AST) -> bool:
    """`read_text()`, `write_text(x)` or a text-mode `open()` without encoding=."""
    if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
        return False
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name != "open" or (isinstance(function, ast.Attribute) and not is_path_like(function)):
        return False
    mode = next((k.value for k in node.keywords if k.arg == "mode"), None)
    position = 1 if isinstance(function, ast.Name) else 0
    if mode is None and len(node.args) > position:
        mode = node.args[position]
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def is_path_like(function: ast.Attribute) -> bool:
    """False for the `open` of modules that open no text: Image.open, webbrowser.open, os.open."""
    owner = function.value
    return not (
        isinstance(owner, ast.Name)
        and (owner.id[0].isupper() or owner.id in ("webbrowser", "os", "zipfile", "tarfile"))
    )
