"""The wheel holds everything and works from elsewhere."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; paths to the checkout are kept from it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    kept = ["pyproject.toml", "README.md", "graphpar", "passes", "cost_models", "examples"]
    call("cp", "-rP", *(ROOT / name for name in kept), copy, cwd=ROOT)
    target = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    call(sys.executable, "-m", "pip", "wheel", *options, "-w", target, copy, cwd=copy)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which sees the packages installed here but not the checkout."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A plain path line is added behind the environment's own folder, and .pth files in it are not run,
    # so that an editable install of the checkout stays out of sight.
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "python"


def test_wheel_holds_every_module_and_table(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("graphpar/")}
    files = set()
    for folder, inside in (("graphpar", "graphpar"), *((n, f"graphpar/{n}") for n in _mapped())):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            linked = folder == "graphpar" and relative.parts[0] in _mapped()
            if path.is_file() and "__pycache__" not in path.parts and not linked:
                files.add(f"{inside}/{relative}")
    assert held == files


def _mapped() -> list[str]:
    """Folders beside `graphpar` that become its subpackages."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    return [folder for package, folder in tools["package-dir"].items() if package != "graphpar"]


def test_installed_package_is_used_from_elsewhere(python: Path, tmp_path: Path) -> None:
    assert "demo" in call(python, "-m", "graphpar", "--help", cwd=tmp_path)
    program = """
import torch, graphpar, graphpar.passes, graphpar.cost_models
model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Linear(9, 4))
x = torch.randn(6, 4)
with graphpar.compile(model, {"devices": [{"kind": "cpu", "threads": 1}]}, (x,)) as job:
    assert torch.allclose(job(x), model(x), atol=1e-6)
print(graphpar.Cluster.from_dict({"devices": [{"kind": "h100-sxm-80gb"}]}))
print(graphpar.passes.__file__)
"""
    *cluster, where = call(python, "-c", program, cwd=tmp_path).splitlines()
    assert "H100" in "".join(cluster).upper()
    assert Path(where).is_relative_to(python.parents[1])
