"""The public configurations resolve to what the public project derives from them.

public_configs.json holds the facts: the values of each configuration that are not defaults, put together from named
parts, the number of ranks it is meant for, and what follows from it. `differs` names what is another value here, and
why (docs/differences.md); `refused` names keys that no release of the public project with today's keys accepts either,
or whose value is broken in the published text; `note` marks entries that differ from the published text.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, Resources, resolve
from megatron.errors import ConfigError

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "public_configs.json").read_text(encoding="utf-8"))
RESOLVED = [name for name, one in FACTS["configs"].items() if "resolves" in one]
REFUSED = [name for name, one in FACTS["configs"].items() if "refused" in one]


def keys(name: str) -> dict[str, Any]:
    """Everything that the public file says."""
    one = FACTS["configs"][name]
    values: dict[str, Any] = {}
    for part in one["parts"]:
        values |= FACTS["parts"][part]
    return values | one["keys"]


def resolved(name: str) -> Config:
    return resolve([], keys(name), Resources(FACTS["configs"][name]["ranks"], "cuda")).config


def values(config: Config) -> dict[str, Any]:
    """The resolved values that the facts speak of."""
    betas = list((config.optimizer.optimizer or {})["params"]["betas"])
    return {
        **config.flat(),
        "data_parallel_size": config.parallelism.data_parallel_size,
        "mlp_width": config.model.mlp_width,
        "betas": betas,
    }


@pytest.mark.parametrize("name", RESOLVED)
def test_it_resolves_to_the_public_values(name: str) -> None:
    expected = dict(FACTS["configs"][name]["resolves"])
    found = json.loads(json.dumps(values(resolved(name))))
    if found["precision"] != "fp32" and expected.get("zero_stage") == 0:
        expected["zero_stage"] = 1  # docs/differences.md
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_key_of_today_means_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(name)
    assert {issue.key for issue in error.value.issues} == set(FACTS["configs"][name]["refused"])
    assert all(issue.hint for issue in error.value.issues)


def test_what_differs_is_reported() -> None:
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")
    assert [name for name, one in FACTS["configs"].items() if "differs" in one] == [
        "mistral/7B.yml + llama/train_config.yml"
    ]
    assert "an odd pair gave two widths that did not fit" in page
