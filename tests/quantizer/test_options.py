"""Options: every parameter of the specification changes what it should and nothing else, and who wins over whom."""

import pytest
from quantizer.checkpoints import LINEARS, payloads, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_formats.errors import UsageError
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import LayoutRefusesError
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import IncompatibleRecipeError, Recipe
from surogate_formats.training_config import Lora, load_training_config
from surogate_quantize import make_options, quantize
from surogate_quantize.hub.opening import open_source
from surogate_quantize.options import BadSizeError, NoFormatError, parse_size
from surogate_quantize.plan import make_plan
from surogate_quantize.run_identity import difference, run_identity

ALL = {f"{module}.weight" for module in LINEARS}
FIRST = {name for name in ALL if ".layers.0." in name}
LAST = {name for name in ALL if ".layers.1." in name}


@pytest.fixture
def load(tmp_path):
    def write_and_load(text):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return load_training_config(path)

    return write_and_load


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory):
    """From a training file's text to the opened artifact that it makes and its payloads; each made once."""
    root = tmp_path_factory.mktemp("options")
    source = write_checkpoint(root / "source")
    made = {}

    def make(text):
        if text not in made:
            config = root / f"{len(made)}.yaml"
            config.write_text(text)
            out = root / str(len(made))
            quantize(source, out, make_options(None, {}, training=load_training_config(config, strict=True)))
            with Artifact.open(out) as artifact:
                made[text] = artifact, payloads(out)
        return made[text]

    return make


def changes(before, after):
    """Every difference between two artifacts, by where it stands."""
    (old, old_bytes), (new, new_bytes) = before, after
    found = {}
    for part in ("format", "recipe", "lora", "options"):
        a, b = getattr(old.manifest, part), getattr(new.manifest, part)
        found[part] = {key: b.get(key) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    decided = {name: record.decision for name, record in old.manifest.tensors.items()}
    redecided = {name for name, record in new.manifest.tensors.items() if record.decision != decided[name]}
    found["decisions"] = redecided
    found["payload"] = {
        name
        for name, record in new.manifest.tensors.items()
        if name not in redecided
        and {key: new_bytes[key] for key in record.stored}
        != {key: old_bytes[key] for key in old.manifest.tensors[name].stored}
    }
    for part in ("tool_version", "source", "files", "schema_version", "layout"):
        if getattr(old.manifest, part) != getattr(new.manifest, part):
            found[part] = getattr(new.manifest, part)
    return {part: difference for part, difference in found.items() if difference}


FP8_ROWS = [
    ("margin: 2", {"recipe": {"margin": 2}}),
    ("amax_history_len: 16", {"recipe": {"amax_history_len": 16}}),
    ("fp8_amax_history: 16", {"recipe": {"amax_history_len": 16}}),
    ("amax_compute_algo: MOST_RECENT", {"recipe": {"amax_compute_algo": "most_recent"}}),
    ("reduce_amax: false", {"recipe": {"reduce_amax": False}}),
    ("skip_quant_first_layers: 1", {"options": {"skip_first_layers": 1}, "decisions": FIRST}),
    ("skip_quant_last_layers: 1", {"options": {"skip_last_layers": 1}, "decisions": LAST}),
    ("recipe: fp8-hybrid", {"recipe": {"name": "fp8-hybrid"}}),
    ("recipe: fp8_hybrid", {"recipe": {"name": "fp8-hybrid"}}),
    ("recipe: nvfp4", {"recipe": {"name": "nvfp4"}}),
    ("lora: true", {"lora": {"enabled": True}}),
    ("lora_rank: 8", {"lora": {"rank": 8}}),
    ("lora_alpha: 64", {"lora": {"alpha": 64}}),
    ("model: somewhere/else", {}),
    ("disable_2d_quantization: true", {"recipe": {"disable_2d_quantization": True}}),
    ("enable_four_over_six: false", {"recipe": {"four_over_six": False}}),
    ("qlora_bnb_block_size: 128", {}),
]

FP4_ROWS = [
    ("disable_rht: true", {"recipe": {"disable_rht": True}}),
    ("disable_stochastic_rounding: true", {"recipe": {"disable_stochastic_rounding": True}}),
    (
        "disable_2d_quantization: true",
        {"recipe": {"disable_2d_quantization": True}, "format": {"two_d": False}, "payload": ALL},
    ),
    ("skip_quant_first_layers: 1", {"options": {"skip_first_layers": 1}, "decisions": FIRST}),
    ("skip_quant_last_layers: 1", {"options": {"skip_last_layers": 1}, "decisions": LAST}),
    ("backend: cudnn", {"recipe": {"backend": "cudnn"}}),
    ("fp4_backend: cudnn", {"recipe": {"backend": "cudnn"}}),
    (
        "enable_four_over_six: false",
        {"recipe": {"four_over_six": False}, "format": {"four_over_six": False}, "payload": ALL},
    ),
    ("margin: 2", {"recipe": {"margin": 2}}),
]

METRIC_ROWS = [
    (
        "four_over_six_metric: L1",
        {"recipe": {"four_over_six_metric": "l1"}, "format": {"metric": "l1"}, "payload": ALL},
    ),
    (
        "four_over_six_metric: AbsMax",
        {"recipe": {"four_over_six_metric": "absmax"}, "format": {"metric": "absmax"}, "payload": ALL},
    ),
]
"""On 1-D blocks: a weight here has so few tiles that the metrics may agree about all of them."""

NF4_ROWS = [
    ("qlora_bnb_block_size: 128", {"format": {"block_size": 128}, "payload": ALL}),
    ("qlora_bnb_double_quant: false", {"format": {"double_quant": "none"}, "payload": ALL}),
    ("skip_quant_first_layers: 1", {"options": {"skip_first_layers": 1}, "decisions": FIRST}),
    ("four_over_six_metric: L1", {"recipe": {"four_over_six_metric": "l1"}}),
]


@pytest.mark.parametrize(
    ("base", "line", "expected"),
    [
        (base, *row)
        for base, rows in (
            ("qlora_fp8: true\n", FP8_ROWS),
            ("qlora_fp4: true\n", FP4_ROWS),
            ("qlora_fp4: true\ndisable_2d_quantization: true\n", METRIC_ROWS),
            ("qlora_bnb: true\n", NF4_ROWS),
        )
        for row in rows
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
def test_a_row_changes_what_it_should_and_nothing_else(base, line, expected, artifact_of):
    assert changes(artifact_of(base), artifact_of(base + line + "\n")) == expected


@pytest.mark.parametrize(
    ("key", "fmt"), [("qlora_fp8", FP8("tensor", "bfloat16")), ("qlora_fp4", NVFP4()), ("qlora_bnb", NF4())], ids=str
)
def test_the_switch_of_a_format_quantizes_every_linear_with_its_defaults(key, fmt, artifact_of):
    artifact, _ = artifact_of(f"{key}: true\n")
    assert artifact.format == fmt
    assert artifact.modules.keys() == set(LINEARS)
    assert artifact.recipe == Recipe()


@pytest.mark.parametrize(
    ("key", "defaults"),
    [
        (
            "qlora_fp8",
            "margin: 0\namax_history_len: 1024\namax_compute_algo: MAX\nreduce_amax: true\n"
            "skip_quant_first_layers: 0\nskip_quant_last_layers: 0\n",
        ),
        (
            "qlora_fp4",
            "disable_rht: false\ndisable_stochastic_rounding: false\ndisable_2d_quantization: false\n"
            "skip_quant_first_layers: 0\nskip_quant_last_layers: 0\nbackend: cutlass\nenable_four_over_six: true\n"
            "four_over_six_metric: MSE\n",
        ),
        ("qlora_bnb", "qlora_bnb_block_size: 64\nqlora_bnb_double_quant: true\n"),
    ],
)
def test_the_specifications_defaults_written_out_change_nothing(key, defaults, artifact_of):
    base = f"{key}: true\n"
    assert changes(artifact_of(base), artifact_of(base + defaults)) == {}


def test_an_argument_wins_over_the_training_file(load):
    training = load(
        "qlora_bnb: true\nqlora_bnb_block_size: 128\nqlora_bnb_double_quant: false\n"
        "skip_quant_first_layers: 1\nskip_quant_last_layers: 1\n"
    )
    assert make_options(None, {}, training=training).format == NF4(128, "none")
    options = make_options("nf4", {"block_size": 64}, training=training, skip_first_layers=0)
    assert options.format == NF4(64, "none")
    assert (options.skip.first_layers, options.skip.last_layers) == (0, 1)


def test_double_quantization_that_is_on_is_the_kind_that_the_layout_stores(load):
    on, off = (load(f"qlora_bnb: true\nqlora_bnb_double_quant: {value}\n") for value in ("true", "false"))
    assert make_options(None, {}, training=on).format.double_quant == "affine"
    assert make_options(None, {}, "bitsandbytes", training=on).format.double_quant == "dynamic"
    assert make_options(None, {}, "bitsandbytes", training=off).format.double_quant == "none"
    assert make_options(None, {"double_quant": None}, "bitsandbytes", training=off).format.double_quant == "dynamic"
    assert make_options(None, {"double_quant": "none"}, "bitsandbytes", training=on).format.double_quant == "none"


def test_how_codes_are_chosen_is_recorded_and_no_parameter_of_the_format():
    nearest, found = (make_options("nf4", {}, codes=codes) for codes in ("nearest", "search"))
    assert make_options("nf4", {}) == nearest
    assert nearest.recorded() | {"codes": "search"} == found.recorded()
    assert nearest.format == found.format
    with pytest.raises(UsageError, match=r"`codes` is 'best'; choose one of nearest, search, calibrated"):
        make_options("nf4", {}, codes="best")


def test_a_run_with_other_codes_is_another_run(tmp_path):
    path = write_checkpoint(tmp_path / "source")
    with open_source(path, None, revision=None, token=None, keep_source=False) as source:
        nearest, found = (
            run_identity(source, make_plan(source.checkpoint, make_options("nf4", {}, codes=codes)), {})
            for codes in ("nearest", "search")
        )
    assert difference(nearest, nearest) is None
    assert difference(nearest, found) == "options.codes 'nearest' there, 'search' here"


def test_recipe_and_adapter_come_from_the_training_file(load):
    options = make_options(None, {}, training=load("qlora_fp8: true\nrecipe: nvfp4\nlora: true\nlora_rank: 4\n"))
    assert options.recipe == Recipe("nvfp4")
    assert options.lora == Lora(enabled=True, rank=4)


def test_a_training_file_without_a_format_leaves_it_to_the_argument(load):
    assert make_options("fp8", {"scaling": "channel"}, training=load("lora: true\n")).format.scaling == "channel"
    with pytest.raises(NoFormatError, match="give `format_name` nf4, fp4 or fp8, or a `training` file"):
        make_options(None, {}, training=load("lora: true\n"))
    with pytest.raises(NoFormatError):
        make_options(None, {})


def test_a_format_wins_over_the_training_files_and_takes_its_own_parameters_from_there(load):
    training = load("qlora_bnb: true\nqlora_bnb_block_size: 128\ndisable_2d_quantization: true\nlora_rank: 4\n")
    assert make_options("nf4", {}, training=training).format == NF4(128)
    options = make_options("fp4", {}, training=training)
    assert options.format == NVFP4(two_d=False)
    assert options.lora.rank == 4
    with pytest.raises(IncompatibleRecipeError):
        make_options("nf4", {}, training=load("qlora_fp4: true\nrecipe: nvfp4\n"))


def test_nf4_under_nvfp4_is_refused(load):
    with pytest.raises(IncompatibleRecipeError, match="quantized twice"):
        make_options(None, {}, training=load("qlora_bnb: true\nrecipe: nvfp4\n"))


@pytest.mark.parametrize("line", ["qlora_bnb_block_size: 32", "qlora_bnb_block_size: 0"])
def test_block_sizes_that_the_format_does_not_have(line, load):
    with pytest.raises(UsageError, match=r"`block_size` is \d+; choose one of 64, 128"):
        make_options(None, {}, training=load(f"qlora_bnb: true\n{line}\n"))


@pytest.mark.parametrize(
    ("scaling", "layout"), [("tensor", "compressed-tensors"), ("channel", "compressed-tensors"), ("block", "hf-fp8")]
)
def test_the_default_layout_follows_the_scaling(scaling, layout):
    assert make_options("fp8", {"scaling": scaling}).layout.name == layout


def test_a_layout_that_cannot_hold_the_format_is_refused():
    with pytest.raises(LayoutRefusesError):
        make_options("nf4", {}, "hf-fp8")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("2GiB", 2**31),
        ("500 MiB", 500 * 2**20),
        ("1.5kB", 1500),
        ("7", 7),
        (7, 7),
        ("100B", 100),
        ("1TB", 10**12),
        (" 3 KiB ", 3072),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 parsecs", "5GBB", "-1GB", "0", "0.1B", "nanGB", "infGB", "1e999GB", "1,5GB", -3]
)
def test_sizes_that_are_none(text):
    with pytest.raises(BadSizeError, match=r"^`max_memory` "):
        parse_size(text, "max_memory")
