"""PEFT's kinds of adapters on packed layers: each gives what it gives on the dequantized model, or is refused."""

import copy
import inspect

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from surogate_load import load_model
from surogate_load.adapter_rules import ON_PACKED
from surogate_load.errors import DenseAdapterError
from surogate_load.export.dense import dequantize

IDS = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(0))
CONFIGS = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "VBLORA": {"vector_length": 16, "num_vectors": 32, "topk": 2},
}
"""What a kind must be told; the others do with their defaults."""

OTHERS = sorted(
    kind
    for kind, config in CONFIGS.items()
    if kind not in (*ON_PACKED, "ADAPTION_PROMPT") and "target_modules" in inspect.signature(config).parameters
)
NO_LINEARS = {"LN_TUNING": "input_layernorm", "TRAINABLE_TOKENS": "embed_tokens"}
"""What these are for."""


@pytest.fixture(scope="module")
def models(artifact, tmp_path_factory):
    """Copies the packed model, and the dense one with the same values."""
    path, folder = artifact("nf4"), tmp_path_factory.mktemp("dense") / "model"
    dequantize(path, folder, "float32")
    packed = load_model(path, dtype=torch.float32)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lambda: copy.deepcopy(packed), lambda: copy.deepcopy(dense)


def logits(model, kind, **settings):
    """With every value of a seeded adapter moved."""
    settings = {"target_modules": ["q_proj", "down_proj"], **SETTINGS.get(kind, {}), **settings}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, CONFIGS[kind](**settings)).eval()
    torch.manual_seed(1)
    for _, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return adapted(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("kind", ON_PACKED)
def test_on_packed_layers_it_is_what_it_is_on_dense_ones(models, kind):
    packed, dense = models
    with torch.no_grad():
        base = dense()(input_ids=IDS).logits
    expected = logits(dense(), kind)
    assert (expected - base).abs().max() > 1e-4
    torch.testing.assert_close(logits(packed(), kind), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind not in NO_LINEARS])
def test_others_are_refused_before_the_model_is_touched(models, kind):
    model = models[0]()
    modules = [name for name, _ in model.named_modules()]
    try:
        config = CONFIGS[kind](target_modules=["q_proj", "down_proj"])
    except ImportError as error:  # a package that it wants
        pytest.skip(str(error))
    with pytest.raises(
        DenseAdapterError, match=rf"^{kind} reads the base's weight.*q_proj's is packed; .*LORA"
    ) as caught:
        peft.get_peft_model(model, config)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == modules


def test_a_loha_on_all_linears_by_default_or_by_pattern_is_refused(models):
    for targets in ("all-linear", None, r".*\.o_proj"):
        with pytest.raises(DenseAdapterError, match=r"^LOHA"):
            peft.get_peft_model(models[0](), peft.LoHaConfig(target_modules=targets))


def test_what_is_put_on_layers_that_are_not_packed_is_peft_s(models):
    packed, dense = models
    for kind, target in NO_LINEARS.items():
        settings = {"target_modules": [target]} | ({"token_indices": [1, 2]} if kind == "TRAINABLE_TOKENS" else {})
        torch.testing.assert_close(logits(packed(), kind, **settings), logits(dense(), kind, **settings))
