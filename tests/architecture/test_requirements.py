"""Laws of what is installed: every import is declared, every declaration has a tested version inside its range."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture.source import PRODUCT, ROOT, imports

# Where the name to install is not the name to import.
INSTALLED_AS = {
    "faiss": "faiss-cpu",
    "fla": "fla-core",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn",  # version 3, built from a folder of the same source
    "transformer_engine": "transformer-engine",
    "yaml": "pyyaml",
    "lm_eval": "lm-eval",
}
# Built against the CUDA of the machine that runs them; no version was tested where there is none.
GPU_ONLY = {"apex", "fla-core", "flash-attn", "transformer-engine"}
# Comes with one that is declared.
COMES_WITH = {
    "botocore": "boto3",
    "huggingface_hub": "tokenizers",
    "jinja2": "torch",
    "packaging": "deepspeed",
    "pydantic_core": "pydantic",
    "starlette": "fastapi",
}


def requirements(path: Path) -> list[Requirement]:
    """The requirements of one file, comments left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def declared() -> dict[str, list[Requirement]]:
    """Requirements by feature: "" for the base, else the extra."""
    found = {"": requirements(ROOT / "requirements/requirements.txt")}
    for path in sorted((ROOT / "requirements").glob("requirements-*.txt")):
        found[path.stem.removeprefix("requirements-")] = requirements(path)
    return found


def undeclared(imported: Iterable[str], names: Iterable[str]) -> list[str]:
    """Imported packages that no requirement names."""
    known = {canonicalize_name(name) for name in names}
    third_party = {
        name for name in imported if name not in sys.stdlib_module_names | {"megatron", "tools", "tests", "benchmarks"}
    }
    expected = {name: INSTALLED_AS.get(name, COMES_WITH.get(name, name)) for name in third_party}
    return sorted(name for name, package in expected.items() if canonicalize_name(package) not in known)


def outside_constraints(expected: Iterable[Requirement], tested: dict[str, str]) -> list[str]:
    """Requirements without a tested version, with one outside their range, or with no range but that version."""
    found = []
    for requirement in expected:
        version = tested.get(canonicalize_name(requirement.name))
        if requirement.name in GPU_ONLY:
            continue
        if version is None:
            found.append(f"{requirement.name} has no tested version in constraints.txt")
        elif Version(version) not in requirement.specifier:
            found.append(f"{requirement} leaves out the tested version {version}")
        elif any(part.operator in {"==", "==="} for part in requirement.specifier):
            found.append(f"{requirement} is an exact version; only constraints.txt has those")
    return found


def constraints() -> dict[str, str]:
    """constraints.txt as {canonical name: version}."""
    found = {}
    for requirement in requirements(ROOT / "requirements/constraints.txt"):
        (exact,) = requirement.specifier
        assert exact.operator == "==", f"{requirement} is not an exact version"
        found[canonicalize_name(requirement.name)] = exact.version
    return found


def test_every_import_is_declared() -> None:
    # Benchmarks also run what they compare with, which whoever compares installs.
    shipped = [source for source in PRODUCT if not source.within("benchmarks/")]
    imported = {item.top for source in shipped for item in imports(source)}
    assert "torch" in imported
    assert undeclared(imported, [item.name for group in declared().values() for item in group]) == []


def test_every_requirement_has_a_tested_version() -> None:
    tested = constraints()
    groups = [*declared().values(), requirements(ROOT / "requirements/alone.txt")]
    assert [line for group in groups for line in outside_constraints(group, tested)] == []


def test_every_feature_is_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert sorted(["", *extras]) == sorted(declared())
    for name, source in extras.items():
        assert f"requirements/requirements-{name}.txt" in source["file"]


def test_constraints_name_no_local_build() -> None:
    text = (ROOT / "requirements/constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"^.*(?:\+| @ |file:).*$", text, re.MULTILINE) == []


def test_requirement_laws_can_complain() -> None:
    assert undeclared({"torch", "polars", "os"}, ["torch"]) == ["polars"]
    assert undeclared({"yaml"}, ["PyYAML"]) == []
    tested = {"torch": "2.13.0"}
    assert outside_constraints([Requirement("polars>=1")], tested)
    assert outside_constraints([Requirement("torch>=2.14")], tested)
    assert outside_constraints([Requirement("torch==2.13.0")], tested)
    assert outside_constraints([Requirement("torch>=2.6")], tested) == []
