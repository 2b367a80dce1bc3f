"""Installing the pack changes no package of a ComfyUI, of either generation of hosts (DESIGN 6).

tests/data/hosts.json lists the packages of two hosts with their real requirements. They are put
into an empty environment as metadata only, which is all that pip's resolver reads; pip then says
what it would install. Needs the package index: without it these tests are skipped.
"""

import json
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from atelier.trainers.flux import build_transformer
from atelier.trainers.formats import bitsandbytes_functional
from atelier.trainers.load import load_flux
from atelier.trainers.metadata_files import read_metadata
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.optimizers import make_optimizer
from atelier.trainers.packages import importing, install_command
from atelier.trainers.packed_weight import PackedWeight
from flux_files import write_flux

ROOT = Path(__file__).resolve().parent.parent
HOSTS = json.loads((ROOT / "tests" / "data" / "hosts.json").read_text(encoding="utf-8"))
REQUIREMENTS = ROOT / "requirements.txt"
PACKAGES = ROOT / "trainers" / "packages.py"
DIFFUSERS = "diffusers>=0.33.0"
OPTIONAL = (
    *("pyarrow>=16.1.0", "tensorboard>=2.18.0", "wandb>=0.30.0"),
    *("torch-optimi>=0.3.0", "pytorch-optimizer>=4.0.0", "prodigyopt>=1.1.0"),
    *("prodigy-plus-schedule-free>=2.0.0", "schedulefree>=1.4.0", "torchao>=0.18.0"),
)
"""For metadata.parquet, the loggers and the optimizers, so nothing installs them unasked."""
OURS = ("diffusers", "bitsandbytes", *(one.partition(">=")[0] for one in OPTIONAL))
NO_INDEX = ("No matching distribution found", "Failed to establish a new connection", "Max retries")


@pytest.fixture(params=HOSTS, ids=lambda name: name.replace(",", ""))
def host(request: pytest.FixtureRequest, tmp_path: Path) -> "Host":
    return Host(tmp_path, HOSTS[request.param])


class Host:
    """An environment that holds the metadata of a host's packages."""

    def __init__(self, folder: Path, packages: list[dict]) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = next((folder / "venv").glob("[bS][ic][nr]*/python*"))
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        output = subprocess.run([self.python, "-c", code], check=True, capture_output=True)
        self.site = Path(output.stdout.decode().strip())
        self.report = folder / "report.json"
        self.versions = {canonical(p["name"]): p["version"] for p in packages}
        for package in packages:
            self.add(package["name"], package["version"], package["requires"])

    def add(self, name: str, version: str, requires: list[str]) -> None:
        stem = canonical(name).replace("-", "_")
        for older in self.site.glob(f"{stem}-*.dist-info"):
            (older / "METADATA").unlink()
            older.rmdir()
        info = self.site / f"{stem}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n\n", encoding="utf-8")

    def install(self, *arguments: str | Path) -> dict[str, str]:
        """What pip would install: canonical name -> version. The host then has it."""
        self.report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", "--dry-run"]
        command += ["--quiet", "--retries", "1", "--report", self.report, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if any(sign in done.stderr for sign in NO_INDEX):
            pytest.skip(f"the package index cannot be reached: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        found = [
            item["metadata"]
            for item in json.loads(self.report.read_text(encoding="utf-8"))["install"]
        ]
        for item in found:
            needed = [r for r in item.get("requires_dist", []) if "extra ==" not in r]
            self.add(item["name"], item["version"], needed)
        return {canonical(item["name"]): item["version"] for item in found}

    def changed(self, installed: dict[str, str]) -> dict[str, str]:
        return {name: version for name, version in installed.items() if name in self.versions}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_lines() -> list[str]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_floors_without_torch() -> None:
    for line in requirement_lines():
        assert re.fullmatch(r'[a-z0-9_-]+>=[0-9.]+(; python_version < "3\.11")?', line)
        assert not line.startswith("torch")


def test_the_host_s_own_floor_comes_first() -> None:
    assert requirement_lines()[0] == "transformers>=4.50.3"


def test_one_command_changes_no_package_of_the_host(host: Host) -> None:
    installed = host.install("-r", REQUIREMENTS)
    assert host.changed(installed) == {}
    assert "bitsandbytes" in installed


@pytest.mark.slow
def test_line_by_line_changes_no_package_of_the_host(host: Host) -> None:
    for line in requirement_lines():
        assert host.changed(host.install(line)) == {}, line


def command_of_the_message(package: str, python: Path) -> list[str]:
    """What the sentence about a missing package tells the users of that Python to run."""
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['install_command'](sys.argv[2]))"
    command = [python, "-c", code, PACKAGES, package]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return shlex.split(done.stdout)


@pytest.mark.parametrize("package", OURS)
def test_the_command_of_the_message_asks_for_the_package_and_holds_the_host(package: str) -> None:
    command = command_of_the_message(package, Path(sys.executable))
    assert command[:5] == ["python", "-m", "pip", "install", "--upgrade"]
    assert command[5] in [*requirement_lines(), DIFFUSERS, *OPTIONAL]
    held = [f"{name}==={version(name)}" for name in ("transformers", "huggingface_hub")]
    assert {*held} <= {*command[6:]}


@pytest.mark.slow
@pytest.mark.parametrize("package", OURS)
def test_the_command_of_the_message_fits_the_host(host: Host, package: str) -> None:
    installed = host.install(*command_of_the_message(package, host.python)[4:])
    assert host.changed(installed) == {}
    assert package in installed


@pytest.mark.parametrize("package", OURS)
def test_a_package_that_does_not_fit_is_one_sentence_with_the_command(package: str) -> None:
    with pytest.raises(ValueError, match=f"^The package {package} is missing, or does") as caught:
        with importing(package):
            from transformers import ThatWasRemoved  # noqa: F401
    assert str(caught.value).endswith(install_command(package))


def test_a_package_that_was_made_for_another_torch_is_the_same_sentence() -> None:
    with pytest.raises(ValueError, match=r"^The package torchao is missing, or does"):
        with importing("torchao"):
            _ = torch.NameOfAnotherTorch
    with pytest.raises(ValueError, match=r"^The package torchao is missing, or does"):
        with importing("torchao"):
            torch.ops.load_library("of_another_torch.so")


@pytest.mark.parametrize("package", OURS)
def test_a_package_that_is_too_old_is_the_same_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (floor,) = re.findall(f"{package}>=([0-9.]+)", install_command(package))
    major, minor, _ = map(int, floor.split("."))
    older = f"{major}.{minor - 1}.9" if minor else f"{major - 1}.9.9"
    for found, is_refused in ((older, True), (floor, False)):
        info = tmp_path / found / f"{package.replace('-', '_')}-{found}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {found}")
        monkeypatch.syspath_prepend(tmp_path / found)
        refused = pytest.raises(ValueError, match=f"^The package {package} is missing, or does")
        with refused if is_refused else nullcontext(), importing(package):
            pass


def optimizer(name: str) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(1))
    return make_optimizer(OptimizerSettings(optimizer=name), {"a": parameter}, 1e-4)


DISTRIBUTIONS = {
    "optimi": "torch-optimi",
    "pytorch_optimizer": "pytorch-optimizer",
    "prodigyplus": "prodigy-plus-schedule-free",
}
"""Where the package has another name than its module."""
MISSING = {
    "diffusers": lambda flux: build_transformer(flux.store, flux.config, torch.float32),
    "bitsandbytes.optim": lambda flux: optimizer("adamw8bit"),
    "torchao.optim": lambda flux: optimizer("adamw_bf16"),
    "optimi": lambda flux: optimizer("lion"),
    "pytorch_optimizer": lambda flux: optimizer("came"),
    "prodigyopt": lambda flux: optimizer("prodigy"),
    "prodigyplus": lambda flux: optimizer("prodigy_schedulefree"),
    "schedulefree": lambda flux: optimizer("adamw_schedulefree"),
    "bitsandbytes.functional": lambda flux: bitsandbytes_functional(),
    "pyarrow.parquet": lambda flux: read_metadata(Path("metadata.parquet")),
}


@pytest.mark.parametrize("module", MISSING)
def test_what_needs_a_missing_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    flux = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    monkeypatch.setitem(sys.modules, module, None)
    bitsandbytes_functional.cache_clear()
    package = DISTRIBUTIONS.get(module, module.partition(".")[0])
    with pytest.raises(ValueError, match=f"^The package {package} is missing"):
        MISSING[module](flux)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_where_bitsandbytes_is_missing_its_formats_name_one_without() -> None:
    matrix = torch.linspace(-1, 1, 64 * 64, dtype=torch.bfloat16).view(64, 64)
    with pytest.raises(ValueError, match=r"For pictures, choose the format int4") as caught:
        PackedWeight.pack(matrix, "nf4")
    assert str(caught.value).endswith(install_command("bitsandbytes"))
    kept = PackedWeight.pack(matrix, "int4").dequantize(torch.float32)
    assert (kept - matrix.float()).norm() < 0.1 * matrix.float().norm()


@pytest.mark.slow
def test_diffusers_alone_would_change_the_older_host(tmp_path: Path) -> None:
    """Why diffusers is not in requirements.txt; when this fails, it can be."""
    older = Host(tmp_path, next(iter(HOSTS.values())))
    assert "huggingface-hub" in older.changed(older.install(DIFFUSERS))


@pytest.mark.slow
def test_the_command_of_the_readme_fits_the_host(host: Host, tmp_path: Path) -> None:
    held = [f"{name}=={version}" for name, version in host.versions.items()]
    (tmp_path / "host.txt").write_text("\n".join(held), encoding="utf-8")
    installed = host.install("-r", REQUIREMENTS, DIFFUSERS, "-c", tmp_path / "host.txt")
    assert host.changed(installed) == {}
    assert {"diffusers", "bitsandbytes"} <= installed.keys()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_loggers_leave_the_protobuf_of_another_pack(host: Host, package: str) -> None:
    host.add("protobuf", "6.33.0", [])
    host.versions["protobuf"] = "6.33.0"
    installed = host.install(*command_of_the_message(package, host.python)[4:])
    assert host.changed(installed) == {}
    assert package in installed
