"""The specification's YAML: its examples as they stand, every key, aliases, foreign keys, and everything refused."""

from dataclasses import asdict

import pytest

from surogate_formats import strict_yaml
from surogate_formats.errors import UsageError
from surogate_formats.recipe import Recipe
from surogate_formats.training_config import (
    KEYS,
    LARGEST_FILE,
    Lora,
    TrainingConfig,
    TrainingConfigError,
    TwoFormatsError,
    UnknownKeyError,
    load_training_config,
    parameter_keys,
)

FP8_EXAMPLE = """\
qlora_fp8: true
skip_quant_first_layers: 1
skip_quant_last_layers: 2
recipe: bf16
lora: true
lora_rank: 16
"""

FP4_EXAMPLE = """\
qlora_fp4: true
recipe: nvfp4
lora: true
lora_rank: 16
skip_quant_first_layers: 1
skip_quant_last_layers: 4
"""

NF4_EXAMPLE = """\
model: Qwen/Qwen3-4B
lora: true
lora_rank: 16
lora_alpha: 32

qlora_bnb: true
qlora_bnb_block_size: 64
qlora_bnb_double_quant: true

recipe: bf16
"""

ROWS = {
    "qlora_fp8": "true",
    "margin": "2",
    "amax_history_len": "16",
    "amax_compute_algo": "MOST_RECENT",
    "reduce_amax": "false",
    "skip_quant_first_layers": "1",
    "skip_quant_last_layers": "3",
    "qlora_fp4": "true",
    "disable_rht": "true",
    "disable_stochastic_rounding": "true",
    "disable_2d_quantization": "true",
    "backend": "cudnn",
    "enable_four_over_six": "false",
    "four_over_six_metric": "AbsMax",
    "qlora_bnb": "true",
    "qlora_bnb_block_size": "128",
    "qlora_bnb_double_quant": "false",
    "model": "org/name",
    "recipe": "fp8-hybrid",
    "lora": "true",
    "lora_rank": "8",
    "lora_alpha": "64",
    "lora_dropout": "0.1",
    "lora_dtype": "bf16",
    "lora_target_modules": "[q_proj, v_proj]",
}
"""Every key of the specification's tables and examples, and of the adapter, with a value other than its default."""

FOREIGN = (
    "learning_rate", "datasets", "gradient_accumulation_steps", "per_device_train_batch_size", "sequence_len",
    "lora_bias", "optimizer", "warmup_ratio", "max_steps", "seed", "attn_implementation", "trust_remote_code",
    "gradient_checkpointing", "report_to", "local_rank", "base_model", "recompute", "zero_level", "gpus",
)  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def write_and_load(text, **arguments):
        path = tmp_path / "train.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_training_config(path, **arguments)

    return write_and_load


def test_the_three_examples_as_they_stand(load):
    lora = Lora(enabled=True, rank=16)
    assert load(FP8_EXAMPLE) == TrainingConfig(
        format_name="fp8", recipe=Recipe("bf16"), lora=lora, skip_first_layers=1, skip_last_layers=2
    )
    assert load(FP4_EXAMPLE) == TrainingConfig(
        format_name="fp4", recipe=Recipe("nvfp4"), lora=lora, skip_first_layers=1, skip_last_layers=4
    )
    assert load(NF4_EXAMPLE) == TrainingConfig(
        model="Qwen/Qwen3-4B",
        format_name="nf4",
        by_format={"nf4": {"block_size": 64, "double_quant": None}},
        recipe=Recipe("bf16"),
        lora=Lora(enabled=True, rank=16, alpha=32),
    )


@pytest.mark.parametrize("example", [FP8_EXAMPLE, FP4_EXAMPLE, NF4_EXAMPLE])
def test_the_examples_hold_no_foreign_key(example, load):
    assert load(example, strict=True).ignored == ()


def test_defaults_are_the_specifications(load):
    config = load("lora: true\n")
    assert config.format_name is None
    assert config.parameters == {}
    assert asdict(config.recipe) == {
        "name": "bf16",
        "margin": 0,
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "reduce_amax": True,
        "disable_rht": False,
        "disable_stochastic_rounding": False,
        "disable_2d_quantization": False,
        "backend": "cutlass",
        "four_over_six": True,
        "four_over_six_metric": "mse",
    }


def test_every_key_is_known_and_has_a_row_here():
    assert KEYS.keys() == ROWS.keys() | {"fp4_backend", "fp8_amax_history"}


@pytest.mark.parametrize(("key", "value"), ROWS.items())
def test_every_key_is_taken_with_strict_and_null_leaves_its_default(key, value, load):
    config = load(f"{key}: {value}\n", strict=True)
    assert config != TrainingConfig() or key.startswith("qlora_bnb_")
    assert load(f"{key}: null\n", strict=True) == TrainingConfig()


@pytest.mark.parametrize(
    ("alias", "text"),
    [
        ("fp4_backend: cudnn", "backend: cudnn"),
        ("fp8_amax_history: 16", "amax_history_len: 16"),
        ("recipe: fp8_hybrid", "recipe: fp8-hybrid"),
        ("recipe: FP8-Hybrid", "recipe: fp8-hybrid"),
        ("amax_compute_algo: most_recent", "amax_compute_algo: MOST_RECENT"),
        ("four_over_six_metric: absmax", "four_over_six_metric: AbsMax"),
        ("four_over_six_metric: L1", "four_over_six_metric: l1"),
        ("fp4_backend: cudnn\nbackend: cudnn", "backend: cudnn"),
    ],
)
def test_spellings_that_mean_the_same(alias, text, load):
    assert load(alias) == load(text) != TrainingConfig()


def test_spellings_that_contradict_each_other_are_refused(load):
    with pytest.raises(TrainingConfigError, match="contradicts another spelling"):
        load("fp4_backend: cudnn\nbackend: cutlass\n")


def test_parameters_of_a_format_that_is_off_change_nothing_of_the_one_that_is_on(load):
    config = load(NF4_EXAMPLE + "qlora_fp8: false\nqlora_fp4: false\ndisable_2d_quantization: true\n")
    assert config.format_name == "nf4"
    assert config.parameters == {"block_size": 64, "double_quant": None}
    assert config.recipe.disable_2d_quantization


def test_foreign_keys_are_listed_in_the_files_order(load):
    text = "".join(f"{key}: 1\n" for key in FOREIGN) + "1: 2\nnested:\n  qlora_fp8: true\n"
    config = load(FP8_EXAMPLE + text)
    assert config.ignored == (*FOREIGN, "1", "nested")
    assert config.format_name == "fp8"


def test_foreign_keys_that_would_mean_something_here_come_with_advice(load):
    config = load("learning_rate: 1\ntorch_dtype: bfloat16\nlora_bias: all\nlora_x: null\nuse_dora: false\nlora_y: 1\n")
    assert list(config.without_effect) == ["torch_dtype", "lora_bias", "lora_y"]
    assert config.without_effect["torch_dtype"] == "pass torch_dtype= to from_config or load_model"
    assert set(config.without_effect) < set(config.ignored)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("lora_r", "lora_rank"),
        ("target_modules", "lora_target_modules"),
        ("load_in_4bit", "qlora_bnb"),
        ("load_in_8bit", "qlora_fp8"),
        ("bnb_4bit_use_double_quant", "qlora_bnb_double_quant"),
    ],
)
def test_another_trainers_name_for_a_key_of_ours_is_refused_unless_it_is_off(key, ours, load):
    with pytest.raises(UnknownKeyError, match=rf"train\.yaml: '{key}' is another trainer's key; here it is '{ours}'"):
        load(f"{key}: true\n")
    assert load(f"{key}: false\n").ignored == load(f"{key}: null\n").ignored == (key,)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all", "all-linear"),
        ("[all-linear]", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("[q_proj, v_proj]", ("q_proj", "v_proj")),
    ],
)
def test_target_modules(text, targets, load):
    assert load(f"lora_target_modules: {text}\n").lora.target_modules == targets


def test_every_parameter_that_a_key_sets_is_one_of_its_format(load):
    assert parameter_keys("nf4") == {"block_size": "qlora_bnb_block_size", "double_quant": "qlora_bnb_double_quant"}
    assert parameter_keys("fp4").keys() == {"two_d", "four_over_six", "metric"}
    assert parameter_keys("fp8") == {}


@pytest.mark.parametrize("text", ["qlora_bnb_block_size: 100\n", "amax_history_len: 0\n"])
def test_a_value_that_the_format_or_recipe_refuses_comes_with_the_files_path(text, load):
    with pytest.raises(TrainingConfigError, match=r"train\.yaml: .*(block_size|amax_history_len)"):
        load(text)


def test_strict_refuses_the_first_foreign_key(load):
    with pytest.raises(UnknownKeyError, match="'learning_rate' is not a key of ours; leave out --strict"):
        load(FP8_EXAMPLE + "learning_rate: 1e-4\n", strict=True)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("qlora_fb8", "qlora_fp8"),
        ("qlora_bnb_blocksize", "qlora_bnb_block_size"),
        ("qlora_bnb_double_quantization", "qlora_bnb_double_quant"),
        ("qlora_nf8", "qlora_fp8"),
        ("amax_history_length", "amax_history_len"),
        ("amax_algo", "amax_compute_algo"),
        ("reduce_amx", "reduce_amax"),
        ("skip_quant_layers", "skip_quant_last_layers"),
        ("skip_quant_first_layer", "skip_quant_first_layers"),
        ("disable_rth", "disable_rht"),
        ("disable_stochastic_round", "disable_stochastic_rounding"),
        ("enable_four_six", "enable_four_over_six"),
        ("four_over_six_metrics", "four_over_six_metric"),
        ("lora_rnk", "lora_rank"),
        ("lora_alfa", "lora_alpha"),
        ("recipes", "recipe"),
        ("margins", "margin"),
        ("fp4_backends", "fp4_backend"),
        ("fp8_amax_hist", "fp8_amax_history"),
        ("Model", "model"),
    ],
)
def test_a_misspelling_of_ours_is_refused_with_the_nearest_key(key, nearest, load):
    with pytest.raises(UnknownKeyError, match=rf"train\.yaml: unknown key '{key}'; did you mean '{nearest}'\?"):
        load(f"{key}: 1\n")


@pytest.mark.parametrize("key", ["qlora_x", "fp8_x", "fp4_x", "skip_quant_x", "amax_x"])
def test_whatever_begins_like_ours_is_never_passed_over(key, load):
    with pytest.raises(UnknownKeyError, match=f"unknown key '{key}'; did you mean "):
        load(f"{key}: 1\n")


@pytest.mark.parametrize("first", ["qlora_fp8", "qlora_fp4", "qlora_bnb"])
def test_two_formats_are_refused(first, load):
    others = {"qlora_fp8", "qlora_fp4", "qlora_bnb"} - {first}
    for other in others:
        with pytest.raises(TwoFormatsError, match="are both on"):
            load(f"{first}: true\n{other}: true\n")
        assert load(f"{first}: true\n{other}: false\n").format_name is not None
        chosen = load(f"{first}: true\n{other}: true\n", format_name="fp4").format_name
        assert chosen == "fp4" or "qlora_fp4" not in (first, other)


WRONG_VALUES = {
    "true or false": (
        "qlora_fp8",
        "lora",
        "reduce_amax",
        "disable_rht",
        "qlora_bnb_double_quant",
        "enable_four_over_six",
    ),
    "a whole number": ("margin", "amax_history_len", "lora_rank", "skip_quant_first_layers", "qlora_bnb_block_size"),
    "a number from 0": ("lora_dropout",),
    "fp32 or bf16": ("lora_dtype",),
    "one of": ("recipe", "backend", "amax_compute_algo", "four_over_six_metric"),
}


@pytest.mark.parametrize(("expected", "key"), [(text, key) for text, keys in WRONG_VALUES.items() for key in keys])
@pytest.mark.parametrize("value", ["-1", "1.5", '"yes"', "[1]", "{a: 1}", "0x"])
def test_values_of_the_wrong_type_are_refused(expected, key, value, load):
    with pytest.raises(TrainingConfigError, match=rf"train\.yaml: {key} is .*; expected {expected}"):
        load(f"{key}: {value}\n")


@pytest.mark.parametrize("text", ["[]", "3", "[3]", "{a: b}", '""'])
def test_target_modules_of_the_wrong_type(text, load):
    with pytest.raises(TrainingConfigError, match="expected all-linear, or a list of module names"):
        load(f"lora_target_modules: {text}\n")


@pytest.mark.parametrize(
    "text", ["qlora_fp8: 1", "lora: 0", "margin: true", "lora_rank: true", "model: 3", 'model: ""']
)
def test_yaml_types_are_not_mixed_up(text, load):
    with pytest.raises(TrainingConfigError, match="; expected "):
        load(text)


@pytest.mark.parametrize("text", ["lora_rank: 0", "amax_history_len: 0"])
def test_counts_that_must_be_at_least_one(text, load):
    with pytest.raises(UsageError, match="must be at least 1"):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qlora_fp8: true\nqlora_fp8: false\n", "key 'qlora_fp8' stands twice"),
        ("a:\n  b: 1\n  b: 2\n", "key 'b' stands twice"),
        ("a: &x 1\nb: *x\n", "anchors are not supported"),
        ("base: &base {qlora_fp8: true}\n<<: *base\n", "anchors are not supported"),
        ("- qlora_fp8\n", "not a mapping"),
        ("qlora_fp8\n", "not a mapping"),
        ("", "not a mapping"),
        ("a: 1\n---\nb: 2\n", "no YAML that we read"),
        ("a: [1\n", "no YAML that we read"),
        ("\tqlora_fp8: true\n", "no YAML that we read"),
        ("a: !!python/object/apply:os.system [true]\n", "no YAML that we read"),
        ("? [1, 2]\n: 3\n", "no YAML that we read"),
        ("a: 2001-99-99\n", "no YAML that we read"),
        (b"a: \xff\n", "no YAML that we read"),
        (b"a: \x00\n", "no YAML that we read"),
        ("[" * 5000, "no YAML that we read"),
    ],
    ids=range(16),
)
def test_files_that_are_no_training_file(text, message, load):
    with pytest.raises(TrainingConfigError, match=message) as caught:
        load(text)
    assert str(caught.value).isprintable()
    assert "train.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", "line 3, column 2: expected ',' or ']', but got ':'"),
        ("a: 1\nb: 2\n\na: 3\n", "line 4, column 1: key 'a' stands twice"),
        ("a: &x 1\nb: *x\n", "line 2, column 4: anchors are not supported"),
        ("a: 'b\n", "line 2, column 1: found unexpected end of stream"),
    ],
)
def test_a_syntax_error_is_one_line_that_gives_its_place(text, message, load):
    with pytest.raises(TrainingConfigError) as caught:
        load(text)
    assert str(caught.value).endswith(f"train.yaml: no YAML that we read ({message})")


def test_keys_are_not_compared_each_with_each(load, monkeypatch):
    compared = []

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    def construct(self, node, deep=False):
        value = original(self, node, deep=deep)
        return Counted(value) if isinstance(value, str) else value

    original = strict_yaml._StrictLoader.construct_object
    monkeypatch.setattr(strict_yaml._StrictLoader, "construct_object", construct)
    load("a:\n" + "".join(f"  key{i}: 0\n" for i in range(300)))
    assert len(compared) < 3000


def test_paths_that_hold_no_training_file(tmp_path):
    with pytest.raises(TrainingConfigError, match="No such file"):
        load_training_config(tmp_path / "none.yaml")
    with pytest.raises(TrainingConfigError, match="directory"):
        load_training_config(tmp_path)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (LARGEST_FILE + 1))
    with pytest.raises(TrainingConfigError, match="larger than"):
        load_training_config(large)


def test_parameters_of_a_format_that_the_command_line_turns_on_are_kept(load):
    config = load("qlora_bnb_block_size: 128\nqlora_bnb_double_quant: false\n")
    assert config.parameters == {}
    assert config.by_format["nf4"] == {"block_size": 128, "double_quant": "none"}


def test_a_foreign_key_may_be_near_to_one_of_ours(load):
    assert load("mode: train\n").ignored == ("mode",)
