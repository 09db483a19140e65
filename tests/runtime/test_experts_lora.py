"""LoRA on packed experts: PEFT's own adapters and files, the gradients of the dense model, and nothing dense kept."""

import peft
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from runtime.experts import FAMILIES, IDS, experts_of, reference
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from surogate_load import load_model, merge
from surogate_load.errors import DenseInitializationError, MergeUnsupportedError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_lora(model, *, seed=3, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "target_parameters": EXPERTS, **changes}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    randomize(model, seed)
    return model


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_peft_on_the_dense_model_in_float64(expert_artifact, family):
    ours = with_lora(load_model(expert_artifact(family), dtype=torch.float32))
    dense = with_lora(reference(expert_artifact(family), family, torch.float64))
    expected = gradients(dense)
    found = gradients(ours)
    assert found.keys() == expected.keys()
    assert any("experts.base_layer.lora_A" in name for name in found)
    for name, gradient in found.items():
        assert torch.norm(gradient - expected[name]) < 3e-5 * torch.norm(expected[name]), name


def test_all_linear_adapts_what_peft_adapts_in_the_dense_model(expert_artifact):
    model = load_model(expert_artifact("qwen3"), dtype=torch.float32)
    ours = with_lora(model, target_modules="all-linear", target_parameters=None)
    dense = with_lora(reference(expert_artifact("qwen3"), "qwen3"), target_modules="all-linear", target_parameters=None)
    shapes = [{n: p.shape for n, p in each.named_parameters() if "lora_" in n} for each in (ours, dense)]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_adapters_move_between_ours_and_plain_peft(expert_artifact, family, tmp_path):
    ours = with_lora(load_model(expert_artifact(family), dtype=torch.float32)).eval()
    ours.save_pretrained(tmp_path / "ours")
    dense = peft.PeftModel.from_pretrained(reference(expert_artifact(family), family), tmp_path / "ours")
    with torch.no_grad():
        expected = ours(IDS).logits
        torch.testing.assert_close(dense(IDS).logits, expected)
        dense.save_pretrained(tmp_path / "dense")
        again = peft.PeftModel.from_pretrained(
            load_model(expert_artifact(family), dtype=torch.float32), tmp_path / "dense"
        )
        assert torch.equal(again(IDS).logits, expected)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "dense")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_several_adapters_at_once_and_none(expert_artifact):
    ours = with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32), target_modules=[])
    dense = with_lora(reference(expert_artifact("qwen3"), "qwen3"), target_modules=[])
    with torch.no_grad():
        base = load_model(expert_artifact("qwen3"), dtype=torch.float32)(IDS).logits
        for model in (ours, dense):
            model.add_adapter("b", peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))
            randomize(model, 5)
            model.base_model.set_adapter(["default", "b"])
        torch.testing.assert_close(ours(IDS).logits, dense(IDS).logits)
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, base)
        assert torch.equal(ours.unload()(IDS).logits, base)


def test_what_is_left_alone_and_what_is_refused(expert_artifact):
    ours = with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32))
    packed = {n for n, p in ours.named_parameters() if ".experts." in n and "lora_" not in n}
    assert packed <= set(ours._ddp_params_and_buffers_to_ignore)  # DDP would broadcast, and reduce, them
    with pytest.raises(MergeUnsupportedError, match="surogate-load merge"):
        ours.merge_and_unload()
    with pytest.raises(DenseInitializationError, match="pissa"):
        with_lora(load_model(expert_artifact("qwen3")), target_modules=[], init_lora_weights="pissa")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_merged_checkpoints_hold_the_dense_sums(expert_artifact, family, tmp_path):
    path = expert_artifact(family)
    ours = with_lora(load_model(path, dtype=torch.float32), **ROUTER.get(family, {})).eval()
    ours.save_pretrained(tmp_path / "adapter")
    merge(path, tmp_path / "adapter", tmp_path / "merged", "float32")
    dense = with_lora(reference(path, family), **ROUTER.get(family, {})).merge_and_unload()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weights = {name.removesuffix(".weight"): tensor for name, tensor in merged.items() if name.endswith(".weight")}
    found = reference(tmp_path / "merged", family, weights=weights).state_dict()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)


ROUTER = {"mixtral": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]}}


def results_of(model, index, dtype=torch.float32):
    """What the experts give for fixed activations, and every gradient; zeros where there is none."""
    experts = model.base_model.model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(len(index), 128, generator=generator), torch.rand(index.shape, generator=generator)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    y = experts(leaves[0], index, leaves[1])
    y.square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = {"x": leaves[0], "weights": leaves[1], **trained}
    return {"y": y, **{name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}}


@pytest.mark.parametrize("index", [[[2]] * 6, [[0, 3], [3, 0], [0, 3]]], ids=["one expert", "two of four"])
def test_experts_without_tokens(expert_artifact, index):
    index = torch.tensor(index)
    found = results_of(with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32), target_modules=[]), index)
    dense = with_lora(reference(expert_artifact("qwen3"), "qwen3", torch.float64), target_modules=[])
    for name, expected in results_of(dense, index, torch.float64).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    without = sorted(set(range(4)) - set(index.flatten().tolist()))
    factors = [gradient for name, gradient in found.items() if "lora_A" in name]
    assert len(factors) == 2
    assert not any(gradient.unflatten(0, (4, -1))[without].any() for gradient in factors)


def test_no_tokens_at_all(expert_artifact):
    model = with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32), target_modules=[])
    found = results_of(model, torch.empty((0, 2), dtype=torch.int64))
    assert found.pop("y").shape == (0, 128)
    assert not any(gradient.any() for gradient in found.values())


def dense_sized(tensors, packed):
    return [t for t in tensors if t.is_floating_point() and t.numel() >= 4 * 128 * 128 and t.data_ptr() not in packed]


def test_nothing_dense_is_kept_for_the_backward(expert_artifact):
    model = with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32))
    packed = {parameter.data_ptr() for parameter in model.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(IDS, labels=IDS).loss.backward()
    assert len(saved) > 20
    assert dense_sized(saved, packed) == []


def test_a_compiled_block_is_one_graph_with_the_same_numbers_and_keeps_nothing_dense(expert_artifact):
    model = with_lora(load_model(expert_artifact("qwen3"), dtype=torch.float32), target_modules=[])
    block = model.base_model.model.model.layers[0].mlp
    saved, x = [], torch.randn(2, 9, 128)

    def forward_compiler(graph, _):
        saved.extend(node.meta["val"] for node in graph.graph.output_node().args[0] if node is not None)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    results = []
    for run in (block, torch.compile(block, backend=backend, fullgraph=True)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    kept = [value for value in saved if hasattr(value, "numel")]
    assert [v for v in kept if v.is_floating_point() and v.numel() >= 4 * 128 * 128] == []


def test_a_compiled_block_of_two_parts_whose_input_has_no_gradient(expert_artifact):
    """As the first layer has it; dynamo counts what `forward` of an autograd function takes."""
    experts = experts_of(load_model(expert_artifact("mixtral", "fp8-tensor"), dtype=torch.float32))
    x, weights = torch.randn(5, 128), torch.full((5, 2), 0.5)
    index = torch.tensor([[0, 1]] * 5)
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, index, weights), experts(x, index, weights))
