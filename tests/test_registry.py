"""The phone book: names, nearest names, loading, and the extra that a missing package needs."""

import importlib.util

import pytest

from megatron import registry
from megatron.errors import ConfigError
from megatron.registry import Entry, Registry


def family() -> Registry:
    return Registry(
        "shape",
        "shape",
        [
            Entry("path", "pathlib:Path", "A path"),
            Entry("absent", "a_package_that_is_absent:Thing", "Not there", extra="absent"),
            Entry("unlisted", "a_package_that_is_absent:Thing", "Not there"),
            Entry("unbuilt", "megatron.not_there:Thing", "Ours, but missing"),
        ],
    )


def test_a_name_loads_its_target() -> None:
    from pathlib import Path

    assert family().load("path") is Path
    assert "path" in family()
    assert "paht" not in family()
    assert family().names == ("path", "absent", "unlisted", "unbuilt")


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    assert family().nearest("Paht") == "path"
    assert family().nearest("zzzzzz") is None
    with pytest.raises(ConfigError, match=r"shape = 'paht'.*did you mean path\? The choices are path, absent"):
        family().entry("paht")
    with pytest.raises(ConfigError, match="the choices are path"):
        family().load("zzzzzz")


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"a_package_that_is_absent.*pip install neox\[absent\]"):
        family().load("absent")


def test_a_error_of_our_own_is_not_called_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError):
        family().load("unbuilt")
    with pytest.raises(ModuleNotFoundError):
        family().load("unlisted")


def test_a_name_is_once() -> None:
    with pytest.raises(ValueError, match="there is a shape named path already"):
        family().register(Entry("path", "pathlib:PurePath", "Another path"))


GPU_EXTRAS = {"transformer-engine": "transformer_engine"}
"""What no machine without a GPU can install, and the package that it brings."""
FAMILIES = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_resolves(name: str) -> None:
    listed = FAMILIES[name]
    assert listed.names
    for entry in listed.names:
        assert listed.entry(entry).doc
        extra = listed.entry(entry).extra
        if extra in GPU_EXTRAS and importlib.util.find_spec(GPU_EXTRAS[extra]) is None:
            with pytest.raises(ConfigError, match=rf"pip install neox\[{extra}\]"):
                listed.load(entry)
        else:
            assert callable(listed.load(entry)), f"{name} {entry}"
