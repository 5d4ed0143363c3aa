"""Reading a config: what is accepted, what is refused, and that each refusal is one line which leads to its mending."""

import itertools
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer import rules, support
from trainer.config import RunConfig, UserError
from trainer.config_file import differences, dump, from_tree, json_schema, known_keys, load, override, parse_yaml
from trainer.presets import PRESETS
from trainer.schedule import Schedule

Tree = dict[str, Any]


def refusal(tree: Tree, *settings: str) -> str:
    with pytest.raises(UserError) as caught:
        override(tree, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def value_at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://user:hunter2@host/bucket", "s3://user:...@host/bucket"),
        ("s3://bucket/run?X-Amz-Signature=hunter2", "s3://bucket/run"),
        ("https://hunter2@host/run", "https://...@host/run"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, shown: str) -> None:
    message = refusal({}, f"checkpoint.upload_to={url}")
    assert f"holds credentials or a query, {shown}," in message and "AWS_SECRET_ACCESS_KEY" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/run",
        "gs://bucket/a:b@c",
        "abfs://container@account.dfs.core.windows.net/run",
        "sftp://user@host:22/run",
        "file:///mnt/a@b:c",
        "copies/what?",
    ],
)
def test_urls_without_credentials_are_taken(url: str) -> None:
    assert from_tree({"checkpoint": {"upload_to": url}}).checkpoint.upload_to == url


# ----------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("modle", "model"),
        ("optimiser", "optimizer"),
        ("model.num_layer", "model.num_layers"),
        ("model.layers", "model.num_layers"),
        ("train.total_token", "train.total_tokens"),
        ("parallel.zero_stage", "parallel.zero"),
        ("parallel.tensor_parallel", "parallel.tensor"),
        # the right name in the wrong section
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("data.lr", "optimizer.lr"),
        ("train.seed", "seed"),
        ("model.micro_batch_size", "train.micro_batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, suggestion: str) -> None:
    assert refusal({}, f"{key}=1") == f"unknown key {key}; did you mean {suggestion}?"


def test_unknown_key_is_not_answered_with_its_own_section() -> None:
    for section in ("model", "train", "data", "evaluation", "parallel"):
        assert not refusal({}, f"{section}.zz=1").endswith(f"did you mean {section}?")


def test_unknown_key_like_nothing_lists_its_section() -> None:
    top_level = ", ".join(key for key in known_keys() if "." not in key)
    assert refusal({"zzz": 1}) == f"unknown key zzz; known: {top_level}"


def test_unknown_preset_names_the_nearest_or_lists_all() -> None:
    assert refusal({"preset": "gpt3_smal"}) == "preset: unknown preset 'gpt3_smal'; did you mean gpt3_small?"
    for nonsense in (3, [], {}, "#"):
        assert refusal({"preset": nonsense}).endswith(f"known: {', '.join(PRESETS)}")


# sections that are only there when asked for
EVERY_SECTION = {"data": {"datasets": {"NAME": {"sources": "x"}}, "dedup": {"fuzzy": "standard"}}}


def test_every_key_of_the_tree_is_known() -> None:
    keys = known_keys()
    config = from_tree(EVERY_SECTION)
    assert len(set(keys)) == len(keys) > 50
    for key in keys:
        value_at(config, key)
    assert set(json_schema()["properties"]) == {key for key in keys if "." not in key}


# ------------------------------------------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("model.num_layers=two", ["model.num_layers", "integer", "'two'"]),
        ("model.num_layers='12'", ["model.num_layers", "integer", "'12'"]),
        ("model.num_layers=12.0", ["model.num_layers", "integer", "12.0"]),
        ("model.num_layers=true", ["model.num_layers", "integer", "True"]),
        ("model.num_layers=", ["model.num_layers", "integer", "None"]),
        ("model.num_layers=0", ["model.num_layers", "greater than or equal to 1", "got 0"]),
        ("model.dropout=1.0", ["model.dropout", "less than 1", "got 1.0"]),
        ("model.norm_placement=middle", ["model.norm_placement", "'pre' or 'post'", "'middle'"]),
        ("model.tied_embeddings=1", ["model.tied_embeddings", "boolean", "got 1"]),
        ("train.precision=fp16", ["train.precision", "'bf16' or 'fp32'", "'fp16'"]),
        ("train.total_tokens=-3", ["train.total_tokens", "greater than or equal to 0", "-3"]),
        ("train.total_tokens=0", ["train.total_tokens", "at least 1"]),
        ("train.total_tokens=300b", ["train.total_tokens", "integer", "'300b'"]),
        ("train.total_tokens=-3M", ["train.total_tokens", "integer", "'-3M'"]),
        ("train.total_tokens=1.0001k", ["train.total_tokens", "integer", "'1.0001k'"]),
        ("optimizer.lr=1e", ["optimizer.lr", "number", "'1e'"]),
        ("optimizer.lr=0", ["optimizer.lr", "greater than 0", "got 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite"]),
        ("optimizer.weight_decay=.inf", ["optimizer.weight_decay", "finite"]),
        ("parallel.zero=4", ["parallel.zero", "1, 2 or 3", "got 4"]),
        ("parallel.zero=0", ["parallel.zero", "1, 2 or 3", "got 0"]),
        ("data.sources=[]", ["data.sources", "at least 1"]),
        ("data.sources=5", ["data.sources", "got 5"]),
        ("data.sources=[1]", ["data.sources.0", "string", "got 1"]),
        ("data.heldout_fraction=0.0", ["data.heldout_fraction", "greater than 0"]),
        ("name=a/b", ["name", "pattern", "'a/b'"]),
        ("name=.hidden", ["name", "pattern"]),
        ("seed=2147483648", ["seed", "less than 2147483648"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("model=5", ["model", "got 5"]),
        ("model.num_layers.x=5", ["model.num_layers", "integer"]),
    ],
)
def test_wrong_value_states_field_rule_and_value(setting: str, fragments: list[str]) -> None:
    message = refusal({}, setting)
    for fragment in fragments:
        assert fragment in message


def test_long_value_is_shortened_and_further_problems_are_counted() -> None:
    message = refusal({"seed": "x" * 500, "model": {"num_layers": "a", "num_heads": "b"}})
    assert len(message) < 200 and message.endswith("(and 2 more)")


def test_a_value_that_aliases_multiply_is_shortened_too() -> None:
    names = "abcdefghijklmnopqrstuvwxyz"  # written out, the last of them has 2^25 entries and more
    text = "a: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names))
    message = refusal({"seed": parse_yaml(text)["z"]})
    assert "seed: input should be a valid integer, got [[[" in message and len(message) < 200


def test_config_is_immutable() -> None:
    config = RunConfig()
    for section, field in ((config, "seed"), (config.model, "num_layers")):
        with pytest.raises(ValidationError):
            setattr(section, field, 3)


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("300B", 300 * 10**9),
        ("375M", 375 * 10**6),
        ("4k", 4000),
        ("4K", 4000),
        ("1.5T", 15 * 10**11),
        ("0.5M", 500_000),
        ("'7'", 7),
        ("7", 7),
        ("2 M", 2 * 10**6),
        ("4.1M", 4_100_000),  # 4.1 x 10^6 is no whole number in floating point
        ("'9007199254740993'", 2**53 + 1),  # nor is this a double
    ],
)
def test_counts(text: str, count: int) -> None:
    config = override({}, [f"train.total_tokens={text}"])
    assert config.train.total_tokens == count and type(config.train.total_tokens) is int


@given(st.decimals(min_value="0.001", max_value=10**6, places=3), st.sampled_from("kMBT"))
def test_a_count_is_its_decimal_value_exactly(number: Decimal, unit: str) -> None:
    exact = number * 10 ** {"k": 3, "M": 6, "B": 9, "T": 12}[unit]
    assert from_tree({"train": {"total_tokens": f"{number}{unit}"}}).train.total_tokens == exact


# ------------------------------------------------------------------------------------------------- files and overrides


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1e-04", "10e-5", "0.0001", ".1e-3", "+1e-4", "1_0e-5"])
def test_floats_of_every_form(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"optimizer: {{lr: {text}}}\n")
    assert load(path).optimizer.lr == override({}, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


def test_a_name_that_looks_like_no_number_stays_a_string() -> None:
    assert parse_yaml("[1e, e4, 1e-4x, '1e-4', 1-4, 1.5.2e3]") == ["1e", "e4", "1e-4x", "1e-4", "1-4", "1.5.2e3"]


def test_overrides_apply_in_order_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nmodel: {num_layers: 3, num_heads: 4}\ntrain:\n")
    settings = ["model.num_layers=5", "model.num_layers=7", "train.micro_batch_size=2", "generate.prompt=a=b"]
    config = load(path, settings)
    assert (config.name, config.model.num_layers, config.model.num_heads) == ("a", 7, 4)
    assert config.train.micro_batch_size == 2  # into a section that the file left empty
    assert config.generate.prompt == "a=b"  # only the first = separates


def test_override_takes_yaml_values() -> None:
    config = override({}, ["model={num_layers: 3}", "data.sources=[a, b]", "parallel.tensor=2", "data.prepared=null"])
    assert config.model.num_layers == 3 and config.parallel.tensor == 2 and config.data.prepared is None
    assert config.data.sources == ("a", "b")
    assert override({}, ["data.sources=a"]).data.sources == ("a",)


@pytest.mark.parametrize("setting", ["x", "=1", "model.=1", ".a=1", "model..a=1", "model.num_layers", ""])
def test_override_of_another_form(setting: str) -> None:
    assert refusal({}, setting) == f"--set {setting!r} must have the form section.key=value"


@pytest.mark.parametrize("setting", ["generate.prompt=[", "generate.prompt=a: b: c", "seed=2020-13-45"])
def test_override_with_a_value_that_is_not_yaml(setting: str) -> None:
    assert refusal({}, setting) == f"--set {setting!r}: the value is not valid YAML"


def test_override_below_a_value() -> None:
    assert "seed is a value, not a section" in refusal({"seed": 5}, "seed.x=1")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"- a\n", "must hold a mapping of config keys, not a list"),
        (b"3\n", "must hold a mapping of config keys, not a int"),
        (b"a: [\n", "is not valid YAML"),
        (b"a: 1\n---\nb: 1\n", "is not valid YAML"),
        (b"? [1, 2]\n: 3\n", "is not valid YAML"),
        (b"seed: 2020-13-45\n", "is not valid YAML"),
        (b"seed: !!python/object:os.system {}\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "cannot read the config"),
        (b"1: 2\n", "keys should be strings"),
    ],
)
def test_unusable_file(content: bytes, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        load(tmp_path / "absent.yaml")


def test_empty_file_is_the_default_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load(tmp_path / "run.yaml") == RunConfig()


# ----------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_preset_merges_under_the_users_values(name: str) -> None:
    preset = PRESETS[name]()
    config = from_tree({"preset": name, "model": {"num_layers": 6}, "optimizer": {"lr": 0.5}, "seed": 9})
    assert (config.model.num_layers, config.optimizer.lr, config.seed) == (6, 0.5, 9)
    for section, values in preset.items():
        for key, value in values.items():
            if (section, key) not in {("model", "num_layers"), ("optimizer", "lr")}:
                assert value_at(config, f"{section}.{key}") == value


def test_preset_can_come_from_an_override_and_lose_to_others() -> None:
    config = override({"model": {"num_layers": 2}}, ["preset=gpt1", "model.hidden_size=96"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.norm_placement) == (2, 96, "post")


def test_reading_a_preset_changes_nothing_for_the_next_reader() -> None:
    before = from_tree({"preset": "gpt1"})
    override({"preset": "gpt1"}, ["model.num_layers=1"])
    assert from_tree({"preset": "gpt1"}) == before


# ------------------------------------------------------------------------------------------------- dump, differences


def test_dump_reads_back_equal_for_every_preset() -> None:
    for name in PRESETS:
        config = from_tree({"preset": name, "data": {"sources": ["a", "b"]}})
        assert from_tree(parse_yaml(dump(config))) == config


@given(
    prompt=st.text(min_size=1),
    source=st.text(min_size=1),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    fraction=st.floats(0, 1),
)
def test_dump_reads_back_equal_whatever_the_values(prompt: str, source: str, lr: float, fraction: float) -> None:
    tree = {
        "generate": {"prompt": prompt},
        "data": {"sources": [source, "yes", "1e-4", "null"], "text_field": "010", "prepared": source},
        "optimizer": {"lr": lr, "min_lr_fraction": fraction},
    }
    config = from_tree(tree)
    text = dump(config)
    assert from_tree(parse_yaml(text.encode().decode())) == config
    assert set(known_keys()) >= set(re.findall(r"^(\w+):", text, flags=re.MULTILINE))


def test_dump_writes_out_every_value() -> None:
    tree = parse_yaml(dump(from_tree(EVERY_SECTION)))
    for key in known_keys():
        section: Any = tree
        for part in key.split("."):
            section = section[part]


def test_differences_names_each_field_once() -> None:
    old = from_tree({"preset": "gpt1"})
    assert differences(old, from_tree({"preset": "gpt1"})) == []
    new = from_tree({"preset": "gpt1", "model": {"num_layers": 6}, "data": {"sources": ["x"]}})
    found = {each.key: (each.old, each.new) for each in differences(old, new)}
    assert found == {"model.num_layers": (12, 6), "data.sources": (None, ["x"])}
    assert sorted(map(str, differences(old, new))) == [
        "data.sources: None -> ['x']",
        "model.num_layers: 12 -> 6",
    ]


def test_derived_values() -> None:
    config = from_tree(
        {
            "model": {"vocab_size": 257, "seq_length": 10, "hidden_size": 48, "num_heads": 6},
            "train": {"total_tokens": 101, "global_batch_size": 12, "micro_batch_size": 2},
            "parallel": {"data": 3, "tensor": 2, "pipeline": 2},
            "launch": {"nodes": 2},
        }
    )
    assert (config.model.padded_vocab_size, config.model.ffn_size) == (384, 192)
    assert (config.tokens_per_step, Schedule(config).num_steps, config.num_microbatches) == (120, 1, 2)
    assert (config.parallel.num_ranks, config.ranks_per_node) == (12, 6)
    two_steps = 2 * 256 * 2048
    assert Schedule(override({}, [f"train.total_tokens={two_steps}"])).num_steps == 2
    assert Schedule(override({}, [f"train.total_tokens={two_steps + 1}"])).num_steps == 3
    assert override({}, ["model.vocab_size=256"]).model.padded_vocab_size == 256


# ------------------------------------------------------------------------------------------------------ spanning rules

RULES: dict[str, tuple[list[str], list[str], str, list[Any]]] = {
    # name: (settings, what the message says, key that the fix changes, the values it proposes)
    "heads": (
        ["model.num_heads=5"],
        ["model.hidden_size 768", "num_heads 5", "all heads", "use 765 or 770 for model.hidden_size, or 4 or 6 for"],
        "model.hidden_size",
        [765, 770],
    ),
    "hidden below heads": (
        ["model.hidden_size=5"],
        ["model.hidden_size 5", "num_heads 12", "use 12"],
        "model.hidden_size",
        [12],
    ),
    "tensor and heads": (
        ["parallel.tensor=5"],
        ["model.num_heads 12", "parallel.tensor 5", "use 4 or 6 for parallel.tensor"],
        "parallel.tensor",
        [4, 6],
    ),
    "tensor and feed-forward": (
        ["parallel.tensor=4", "model.ffn_hidden_size=3070"],
        ["model.ffn_hidden_size 3070", "parallel.tensor 4", "use 2 for parallel.tensor, or 3068 or 3072 for"],
        "parallel.tensor",
        [2],
    ),
    "tensor and vocabulary": (
        ["parallel.tensor=3", "model.vocab_size=200"],
        ["padded vocabulary 256", "parallel.tensor 3", "use 2 or 4 for parallel.tensor"],
        "parallel.tensor",
        [2, 4],
    ),
    "layers": (
        ["parallel.pipeline=5"],
        [
            "model.num_layers 12",
            "parallel.pipeline 5 x virtual_pipeline 1",
            "use 10 or 15 for model.num_layers, or 4 or 6 for",
        ],
        "model.num_layers",
        [10, 15],
    ),
    "layers, interleaved": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
        ["model.num_layers 12", "parallel.pipeline 2 x virtual_pipeline 4", "use 8 or 16 for model.num_layers"],
        "model.num_layers",
        [8, 16],
    ),
    "interleaved without pipeline": (
        ["parallel.virtual_pipeline=2"],
        ["virtual_pipeline 2 needs parallel.pipeline above 1", "use 1 for parallel.virtual_pipeline, or 2 for"],
        "parallel.virtual_pipeline",
        [1],
    ),
    "sequence without tensor": (
        ["parallel.sequence=true"],
        ["parallel.sequence true", "parallel.tensor above 1, which is 1", "use false for parallel.sequence"],
        "parallel.sequence",
        [False],
    ),
    "sequence length": (
        ["parallel.sequence=true", "parallel.tensor=4", "model.seq_length=30"],
        ["model.seq_length 30", "parallel.tensor 4", "sequence parallel splits", "use 28 or 32"],
        "model.seq_length",
        [28, 32],
    ),
    "key-value heads": (
        ["model.num_kv_heads=5"],
        ["model.num_heads 12", "num_kv_heads 5", "use 4 or 6"],
        "model.num_kv_heads",
        [4, 6],
    ),
    "rotary heads": (
        ["model.positions=rotary", "model.hidden_size=36"],
        ["model.hidden_size 36", "2 x num_heads 12", "rotary positions turn pairs", "use 24 or 48"],
        "model.hidden_size",
        [24, 48],
    ),
    "tensor and key-value heads": (
        ["parallel.tensor=4", "model.num_kv_heads=6"],
        ["model.num_kv_heads 6", "parallel.tensor 4", "use 3 or 6 for parallel.tensor"],
        "parallel.tensor",
        [3, 6],
    ),
    "context and heads": (
        ["parallel.context=4", "parallel.tensor=2"],
        ["model.num_heads 12", "parallel.tensor 2 x context 4 = 8", "use 2 for parallel.context"],
        "parallel.context",
        [2],
    ),
    "context and key-value heads": (
        ["parallel.context=4", "model.num_kv_heads=2"],
        ["model.num_kv_heads 2", "parallel.tensor 1 x context 4", "use 2 for parallel.context"],
        "parallel.context",
        [2],
    ),
    "context and sequence length": (
        ["parallel.context=4", "model.seq_length=30"],
        ["model.seq_length 30", "2 x parallel.context 4 = 8", "early and a late piece", "use 24 or 32"],
        "model.seq_length",
        [24, 32],
    ),
    "context, sequence parallel and sequence length": (
        ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", "model.seq_length=28"],
        ["model.seq_length 28", "2 x parallel.context 2 x tensor 2 = 8", "use 24 or 32 for model.seq_length"],
        "model.seq_length",
        [24, 32],
    ),
    "nodes": (
        ["parallel.data=4", "launch.nodes=3"],
        ["pipeline 1 x context 1 x data 4 = 4", "launch.nodes 3", "use 2 or 4 for launch.nodes"],
        "launch.nodes",
        [2, 4],
    ),
    "a tensor parallel group over two nodes": (
        ["parallel.tensor=4", "launch.nodes=2"],
        ["pipeline 1 x context 1 x data 1 = 1", "launch.nodes 2", "whole tensor parallel groups", "use 1 for launch"],
        "launch.nodes",
        [1],
    ),
    "more nodes than ranks": (
        ["launch.nodes=3"],
        ["data 1 = 1", "launch.nodes 3", "use 1 for launch.nodes"],
        "launch.nodes",
        [1],
    ),
    "ranks per node": (
        ["parallel.data=4", "launch.nodes=2", "launch.ranks_per_node=3"],
        [
            "tensor 1 x pipeline 1 x context 1 x data 4 = 4",
            "launch.nodes 2 x ranks_per_node 3 = 6",
            "use 2 or empty for launch.ranks_per_node",
        ],
        "launch.ranks_per_node",
        [2],
    ),
    "warm-up and the run": (
        ["train.total_tokens=2000", "optimizer.warmup_tokens=2k"],
        ["optimizer.warmup_tokens 2000", "train.total_tokens 2000", "never reach its peak", "use 100 for"],
        "optimizer.warmup_tokens",
        [100, 1999],
    ),
    "warm-up and the decay": (
        ["optimizer.decay_tokens=2000", "optimizer.warmup_tokens=3k"],
        ["optimizer.warmup_tokens 3000", "optimizer.decay_tokens 2000", "never reach its peak", "use 100 for"],
        "optimizer.warmup_tokens",
        [100, 1999],
    ),
    "batch": (
        ["train.global_batch_size=30", "train.micro_batch_size=4", "parallel.data=2"],
        ["train.global_batch_size 30", "micro_batch_size 4 x parallel.data 2", "use 24 or 32"],
        "train.global_batch_size",
        [24, 32],
    ),
    "batch below one round": (
        ["train.global_batch_size=3", "parallel.data=4"],
        ["train.global_batch_size 3", "micro_batch_size 1 x parallel.data 4", "use 4"],
        "train.global_batch_size",
        [4],
    ),
    "interleaved micro-batches": (
        ["train.global_batch_size=6", "train.micro_batch_size=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["micro_batch_size 2 x parallel.data 1 x pipeline 2 = 4", "use 4 or 8 for train.global_batch_size"],
        "train.global_batch_size",
        [4, 8],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_states_rule_values_and_a_fix_that_works(name: str) -> None:
    settings, fragments, key, fixes = RULES[name]
    message = refusal({}, *settings)
    for fragment in fragments:
        assert fragment in message
    for fix in fixes:
        assert value_at(override({}, [*settings, f"{key}={str(fix).lower()}"]), key) == fix


LAYOUTS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "num_layers": st.sampled_from([4, 8, 12, 6]),
                "hidden_size": st.sampled_from([48, 96, 50]),
                "num_heads": st.sampled_from([4, 6, 12]),
                "ffn_hidden_size": st.sampled_from([None, 96, 99]),
                "vocab_size": st.sampled_from([100, 384, 500]),
                "seq_length": st.sampled_from([8, 12, 15]),
                "num_kv_heads": st.sampled_from([None, None, 2, 4, 5]),
                "positions": st.sampled_from(["learned", "rotary"]),
                "tied_embeddings": st.booleans(),
            }
        ),
        "train": st.fixed_dictionaries(
            {"global_batch_size": st.sampled_from([8, 16, 24, 12]), "micro_batch_size": st.sampled_from([1, 2, 3])}
        ),
        "parallel": st.fixed_dictionaries(
            {
                "tensor": st.sampled_from([1, 2, 3, 4]),
                "pipeline": st.sampled_from([1, 2, 4, 3]),
                "virtual_pipeline": st.sampled_from([1, 1, 2]),
                "context": st.sampled_from([1, 1, 2, 3]),
                "data": st.sampled_from([1, 2, 4]),
                "sequence": st.booleans(),
                "zero": st.sampled_from([1, 1, 2, 3]),
            }
        ),
        "launch": st.fixed_dictionaries(
            {"nodes": st.sampled_from([1, 1, 2, 3]), "ranks_per_node": st.sampled_from([None, None, 2, 4])}
        ),
    }
)


def works(tree: Tree) -> bool:
    """What megatron-core, DeepSpeed and the launcher need, said a second time."""
    model, train, layout, launch = (tree[section] for section in ("model", "train", "parallel", "launch"))
    tp, pp, vp, cp, dp = (layout[axis] for axis in ("tensor", "pipeline", "virtual_pipeline", "context", "data"))
    kv_heads = model["num_kv_heads"] or model["num_heads"]
    head_size = model["hidden_size"] // model["num_heads"]
    pieces = (tp if layout["sequence"] else 1) * (2 * cp if cp > 1 else 1)
    vocab_rows = next(rows for rows in range(0, 10_000, 128) if rows >= model["vocab_size"])
    ffn = model["ffn_hidden_size"] or 4 * model["hidden_size"]
    per_replica, ragged = divmod(train["global_batch_size"], dp * train["micro_batch_size"])
    per_node = launch["ranks_per_node"]
    return (
        model["hidden_size"] % model["num_heads"] == 0
        and (model["positions"] == "learned" or head_size % 2 == 0)
        and model["num_heads"] % kv_heads == 0
        and kv_heads % (tp * cp) == 0
        and ffn % tp == 0
        and vocab_rows % tp == 0
        and model["num_layers"] % (pp * vp) == 0
        and ragged == 0
        and (vp == 1 or (pp > 1 and per_replica % pp == 0))
        and (not layout["sequence"] or tp > 1)
        and model["seq_length"] % pieces == 0
        and (pp * cp * dp) % launch["nodes"] == 0
        and (per_node is None or per_node * launch["nodes"] == tp * pp * cp * dp)
    )


TOKENS = st.fixed_dictionaries(
    {
        "train.total_tokens": st.sampled_from([0, 10, 1000]),
        "train.ramp_tokens": st.sampled_from([0, 5]),
        "train.ramp_start_batch_size": st.sampled_from([None, 2, 3, 40]),
        "optimizer.warmup_tokens": st.sampled_from([0, 30]),
        "optimizer.decay_tokens": st.sampled_from([None, 20, 100]),
    }
)


@settings(deadline=None)
@given(LAYOUTS, TOKENS, st.data())
def test_following_any_advice_ends_at_a_layout_that_works(tree: Tree, tokens: Tree, data: st.DataObject) -> None:
    """However many rules the values break at once: no refusal is without a fix, and following the fixes ends."""
    values = {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()} | tokens
    config = rules.changed(RunConfig(), values)
    answered = []
    while broken := next(rules.broken(config, support.RULES), None):
        key, value = data.draw(st.sampled_from(broken.alternatives(config, support.RULES)))
        config = rules.changed(config, {key: value})
        answered.append(broken.statement)
        assert len(answered) <= len(support.RULES), answered
    assert from_tree(config.model_dump()) == config and works(config.model_dump())


def test_exactly_the_layouts_that_work_are_accepted() -> None:
    verdicts: list[bool] = []

    @given(LAYOUTS)
    def check(tree: Tree) -> None:
        try:
            from_tree(tree)
        except UserError as error:
            assert not works(tree), error
            assert "\n" not in str(error) and re.search(r"\d", str(error))
            verdicts.append(False)
        else:
            assert works(tree)
            verdicts.append(True)

    check()
    assert 10 <= sum(verdicts) <= len(verdicts) - 10, "the strategy no longer draws both kinds"
