"""Any valid configuration survives its journey unchanged; no mutation of one ends in a traceback."""

import json
from typing import Any, get_args, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import FIELDS, Config, Resolution, Resources, resolve, serialize
from megatron.config.config import FieldInfo
from megatron.config.deepspeed_config import deepspeed_config
from megatron.config.type_names import union_members
from megatron.errors import ConfigError, ConfigIssue
from megatron.plan import make_plan
from tests.config.small import SMALL

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
plain = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), finite, text)
anything = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)), max_leaves=6
)

SIMPLE = {bool: st.booleans(), int: st.integers(), float: finite, str: text, type(None): st.none()}


def values_of(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that the key's type allows."""
    if field.name in ("attention_config", "sinks"):
        return st.one_of(st.none(), st.lists(st.sampled_from(field.choices), max_size=4).map(tuple))
    if field.choices:
        return st.sampled_from(field.choices)
    if field.annotation is Any:
        return plain
    return st.one_of([value_of(member) for member in union_members(field.annotation)])


def value_of(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is tuple:
        inner = SIMPLE.get(get_args(kind)[0], plain)
        return st.lists(inner, max_size=3).map(tuple)
    if get_origin(kind) is dict:
        return st.dictionaries(text, plain, max_size=3)
    return SIMPLE[kind]


some_keys = st.lists(st.sampled_from(sorted(FIELDS)), max_size=30, unique=True)


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    return {name: draw(values_of(FIELDS[name])) for name in draw(some_keys)}


@settings(max_examples=60, deadline=None)
@given(valid())
def test_flat_to_config_to_wire_and_back(values: dict[str, Any]) -> None:
    config = Config.from_flat(values)
    assert {name: config.flat()[name] for name in values} == values
    assert Config.from_flat(config.flat()) == config
    assert serialize.from_json(serialize.to_json(config)) == config
    assert serialize.decode(serialize.encode(config)) == config.replace(config_files=None)
    assert config.replace() == config


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    values = dict(SMALL)
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5)):
        near = st.sampled_from(
            [-1, 0, 1, 2, 3, 7, 0.5, True, "", "auto", [], {}, {"enabled": True}, [[["flash"], "all"]]]
        )
        values[name] = draw(st.one_of(near, values_of(FIELDS[name]), anything))
    return values


@settings(max_examples=250, deadline=None)
@given(mutated(), st.integers(1, 64))
def test_a_mutated_configuration_resolves_or_is_refused_in_words(values: dict[str, Any], world_size: int) -> None:
    resolution = attempt(values, world_size)
    if resolution is None:
        return
    json.dumps(resolution.config.flat())
    assert make_plan(resolution).text()
    again = resolve([], resolution.config.flat(), Resources(world_size))
    assert again.config == resolution.config


FULL: dict[str, Any] = {
    **SMALL,
    "pipe_parallel_size": 1,
    "model_parallel_size": 2,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "norm": "rmsnorm",
    "num_kv_heads": 2,
    "precision": "bfloat16",
    "zero_optimization": {"stage": 1},
    "min_lr": 0.0001,
    "lr_decay_iters": 90,
    "save": "runs/x",
    "checkpoint_factor": 10,
    "train_data_paths": ["a", "b"],
    "train_data_weights": [1.0, 2.0],
    "gradient_clipping": 1.0,
    "split": "90,5,5",
    "seed": 3,
}
"""A valid configuration in which many rules and derivations have something to say."""


@settings(max_examples=150, deadline=None)
@given(st.sets(st.sampled_from(sorted(FULL)), max_size=6), st.sets(st.sampled_from(sorted(FULL)), max_size=4))
def test_nothing_is_reported_but_what_is_wrong(mistyped: set[str], misspelt: set[str]) -> None:
    """A wrong value or a misspelt key has no echo: everything else is judged as if it were right."""
    values: dict[str, Any] = {name: value for name, value in FULL.items() if name not in misspelt}
    values |= {f"{name}q": FULL[name] for name in misspelt}
    mistyped = mistyped - misspelt
    values |= {name: 7 if isinstance(FULL[name], dict) else {"wrong": 1} for name in mistyped}
    wrong = {f"{name}q" for name in misspelt} | mistyped
    reported: tuple[ConfigIssue, ...] = ()
    try:
        resolve([], values, Resources(4))
    except ConfigError as error:
        reported = error.issues
    assert sorted(str(issue.key) for issue in reported) == sorted(wrong), reported


def attempt(values: dict[str, Any], world_size: int) -> Resolution | None:
    """The resolution, or None for a refusal in words; anything else that is raised fails the test."""
    try:
        resolution = resolve([], values, Resources(world_size))
        deepspeed_config(resolution.config)
    except ConfigError as error:
        if not error.issues or not all(str(issue).strip() for issue in error.issues):
            raise AssertionError("a refusal without words") from error
        return None
    return resolution
