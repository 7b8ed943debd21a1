"""A wheel holds what works when it is installed: no results, no training, nothing of the repository."""

import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = find_packages(str(ROOT), **SETTINGS["packages"]["find"])


def files() -> list[Path]:
    """Every file of a wheel but the extension, as pyproject.toml names them."""
    folders = {package: ROOT / package.replace(".", "/") for package in PACKAGES}
    found = [path for folder in folders.values() for path in folder.glob("*.py")]
    for package, patterns in SETTINGS["package-data"].items():
        for pattern in patterns:
            matches = list(folders[package].glob(pattern))
            assert matches, f"package-data of {package}: expected files, {pattern} names none"
            found += matches
    return [path.relative_to(ROOT) for path in found]


def test_only_the_package_is_in_it():
    assert {package.split(".")[0] for package in PACKAGES} == {"vllm_xlayer"}
    assert {"vllm_xlayer.connector.disk", "vllm_xlayer.bench.peers", "vllm_xlayer.demo"} <= set(PACKAGES)


def test_it_has_no_results_and_no_training():
    # The shipped model says how it was trained: that file stays.
    names = [path for path in files() if path.parent.name != "model"]
    assert Path("vllm_xlayer/cli.py") in names and len(names) > 80
    assert [path for path in names if path.suffix not in (".py", ".yaml", ".jsonl")] == []
    assert [path for path in names if path.stem in ("train", "start", "readme", "suite", "faults")] == []


def test_it_asks_for_no_path_outside_itself():
    """Such as tests/ or README.md: what is above the package is site-packages, where it is installed."""
    upward = [path for path in files() if path.suffix == ".py" and ".parents[" in (ROOT / path).read_text()]
    assert upward == []


def test_its_metadata_is_what_an_index_takes():
    """PEP 639: an index refuses a classifier of the licence beside the expression."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = {name.rpartition(" :: ")[2] for name in project["classifiers"] if "Python :: 3." in name}
    assert pythons == {"3.11", "3.12", "3.13", "3.14"} and project["requires-python"] == ">=3.11"
    assert "Environment :: GPU :: NVIDIA CUDA" in project["classifiers"] and project["keywords"]
    assert project["license"] == "Apache-2.0"
    assert not [name for name in project["classifiers"] if name.startswith("License ::")]
