"""The wheel holds what the tree holds, under the import names, once; and works away from the tree."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib.metadata, pathlib, sys
import cpcompile, cpcompile.lowering, cpcompile.passes, torch

target = pathlib.Path(sys.argv[1])
for module in (cpcompile, cpcompile.lowering, cpcompile.passes):
    assert target in pathlib.Path(module.__file__).parents, module.__file__
for entry in importlib.metadata.distribution("cpcompile").entry_points:
    entry.load()
    print(entry.group, entry.name, entry.value)
assert "cpcompile" in torch.compiler.list_backends(), torch.compiler.list_backends()
"""


def tree_files() -> list[str]:
    """Files below cpcompile/ as an import sees them, through the symlinks."""
    walk = os.walk(ROOT / "cpcompile", followlinks=True)
    files = [Path(folder, name) for folder, _, names in walk for name in names if not folder.endswith("__pycache__")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree: a build/ folder left in the tree would bring deleted files back."""
    tmp = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp / "tree", symlinks=True, ignore=ignore)
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp)
    run(*pip_wheel, tmp / "tree", cwd=tmp)
    (built,) = tmp.glob("*.whl")
    return built


def test_packages_list_matches_the_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(file).parent for file in tree_files() if file.endswith(".py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_symlinks_point_at_the_real_folders() -> None:
    for name in ("passes", "lowering"):
        assert os.readlink(ROOT / "cpcompile" / name) == f"../{name}"


def test_wheel_holds_every_file_of_the_tree_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == tree_files()


def test_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=elsewhere)
    printed = run(sys.executable, "-c", PROBE, target, cwd=elsewhere, PYTHONPATH=str(target))
    assert printed.splitlines() == [
        "console_scripts cpcompile cpcompile.cli:app",
        "sglang.srt.plugins cpcompile cpcompile.serving.sglang_plugin:register",
        "torch_dynamo_backends cpcompile cpcompile.backend:cpcompile_backend",
        "vllm.general_plugins cpcompile cpcompile.serving.vllm_plugin:register",
    ]


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_folder_is_no_package_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"^{name} is not a package of its own: import cpcompile.{name}$"):
        importlib.import_module(name)
