"""Times LoRA steps on the experts of a Qwen3-30B-A3B shape: ours packed, ours in bf16, and PEFT + bitsandbytes.

A step is one batch of tokens, forward, backward and AdamW, on adapters of rank 16 on attention and on every expert;
weights and tokens are random. Each row is a process of its own; figures are medians after the first steps. With
`--block` a row is the experts of one layer with their router alone, on random hidden states.

Rows of bitsandbytes: `packed` has experts in NF4 through `bitsandbytes.nn.parametrize`, under PEFT's
`target_parameters` (PEFT 0.21.2 can't take a second step so, but for a repair that is made here); `load_in_4bit` leaves
experts in bf16, as that does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench_train import pack_linears, write_profile
from random_artifact import PARAMETERS, qwen3_moe_config, write_random_artifact
from surogate_formats.registry import make_format

RANK, STEPS, WARM_UP = 16, 8, 3

ROWS = {
    "nf4": ("nf4", ""),
    "fp8": ("fp8", ""),
    "fp4": ("fp4", ""),
    "nf4 compiled": ("nf4", "compiled"),
    "fp8 compiled": ("fp8", "compiled"),
    "nf4 captured": ("nf4", "captured"),
    "fp8 captured": ("fp8", "captured"),
    "bf16 grouped": ("bf16", ""),
    "bf16 grouped compiled": ("bf16", "compiled"),
    "bf16 grouped captured": ("bf16", "captured"),
    "bitsandbytes packed": ("bitsandbytes packed", ""),
    "bitsandbytes load_in_4bit": ("bitsandbytes", ""),
    "peft bf16": ("peft", ""),
}
"""Name to base, and whether its decoder layers are compiled, or also the micro-step captured in a CUDA graph."""

TINY = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main() -> None:
    """Runs the rows, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=["nf4", "fp8", "bf16 grouped", "bitsandbytes packed"]
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs=2, default=(2, 2048), metavar=("ROWS", "TOKENS"))
    parser.add_argument("--block", action="store_true", help="the experts of one layer alone")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--profile", type=Path, help="write the kernels' times of a step of each row to this folder")
    parser.add_argument("--one", metavar="ROW", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(bench(arguments.one, arguments)))
        return
    results = []
    for row in arguments.rows:
        results.append(_in_a_process(row))
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    _print(results)


def _in_a_process(row: str) -> dict:
    given = sys.argv[1:]
    ran = subprocess.run([sys.executable, __file__, *given, "--one", row], capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"row": row, "error": ran.stderr.strip()[-1500:]}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def bench(row: str, arguments: argparse.Namespace) -> dict:
    """One row in this process."""
    base, how = ROWS[row]
    device = torch.device(arguments.device)
    sizes = {"num_hidden_layers": 1 if arguments.block else arguments.layers, **(TINY if arguments.tiny else {})}
    started = time.perf_counter()
    model = MODELS.get(base, _ours)(base, sizes, device, bool(how))
    loaded = time.perf_counter() - started
    experts = _experts_bytes(model)
    resident = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    make_step = _block_step if arguments.block else _captured_step if how == "captured" else _model_step
    step = make_step(model, tuple(arguments.batch), device)
    seconds = [_timed(step, device) for _ in range(STEPS)]
    if arguments.profile:
        write_profile(step, arguments.profile / f"{row.replace(' ', '-')}.txt")
    tokens = arguments.batch[0] * arguments.batch[1]
    config = model.config.get_text_config()
    dense = 2 * 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    return {
        "row": row,
        "tokens_per_s": round(tokens / statistics.median(seconds[WARM_UP:])),
        "step_ms": round(1e3 * statistics.median(seconds[WARM_UP:]), 2),
        "experts_gb": round(experts / 1e9, 3),
        "experts_against_bf16": round(experts / dense, 4),
        "resident_gb": round(resident / 1e9, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else 0,
        "load_s": round(loaded, 1),
        "first_step_s": round(seconds[0], 2),
        "layers": config.num_hidden_layers,
        "tokens": tokens,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _experts_bytes(model: nn.Module) -> int:
    """Bytes of everything that stands for the experts' weights, adapters aside."""
    found = {}
    for name, module in model.named_modules():
        if ".experts" in name and "lora_" not in name:
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            state = getattr(module, "quant_state", None)  # bitsandbytes' scales are no parameters
            nested = getattr(state, "state2", None)
            tensors += [t for s in (state, nested) if s is not None for t in (s.absmax, s.code)]
            found.update({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors})
    return sum(found.values())


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _model_step(model: nn.Module, batch: tuple[int, int], device: torch.device) -> Callable[[], object]:
    ids = torch.randint(0, model.config.vocab_size, batch, device=device)
    return _with_optimizer(model, lambda: model(input_ids=ids, labels=ids).loss)


def _captured_step(model: nn.Module, batch: tuple[int, int], device: torch.device) -> Callable[[], object]:
    from surogate_load import MicroStep

    ids = torch.randint(0, model.config.vocab_size, batch, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda or None)
    micro_step = MicroStep(model)

    def step():
        micro_step(input_ids=ids, labels=ids)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _block_step(model: nn.Module, batch: tuple[int, int], device: torch.device) -> Callable[[], object]:
    block = model.get_base_model().model.layers[0].mlp
    x = torch.randn(*batch, model.config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def loss():
        x.grad = None
        return (block(x) * dy).sum()

    return _with_optimizer(block, loss)


def _with_optimizer(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda or None)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _lora(model: nn.Module) -> nn.Module:
    import peft

    # In full, since PEFT finds parameters that bitsandbytes has packed by no other name.
    experts = [f"model.layers.{layer}.mlp.experts.{name}" for layer in range(model.config.num_hidden_layers)
               for name in ("gate_up_proj", "down_proj")]  # fmt: skip
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION, target_parameters=experts,
                               task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    adapted = {name for name, parameter in made.named_parameters() if "lora_A" in name and parameter.requires_grad}
    if len(adapted) != len(experts) + len(ATTENTION) * model.config.num_hidden_layers:
        raise RuntimeError(f"only {len(adapted)} adapters")
    return made


def _ours(base: str, sizes: dict, device: torch.device, compiled: bool) -> nn.Module:
    from surogate_load import load_model

    name = "-".join([base, *(str(value) for value in sizes.values())])
    path = Path(tempfile.gettempdir()) / f"qwen3-moe-{name}"
    if not path.exists():
        with tempfile.TemporaryDirectory(
            dir=path.parent
        ) as folder:  # a run that was stopped leaves nothing half written
            made = write_random_artifact(
                qwen3_moe_config(**sizes), make_format(base, PARAMETERS[base]), Path(folder) / "a"
            )
            made.rename(path)
    return _lora(load_model(path, device=device, compile="layers" if compiled else None))


def _dense(sizes: dict, device: torch.device) -> nn.Module:
    """A random model of transformers in bf16."""
    from transformers import AutoModelForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(qwen3_moe_config(**sizes), experts_implementation="grouped_mm")
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def _grouped(base: str, sizes: dict, device: torch.device, compiled: bool) -> nn.Module:
    """The same dense weights through our own grouped products and adapters."""
    from surogate_load.loss.fused_head import fuse_head
    from surogate_load.step.regional import compile_layers

    model = _dense(sizes, device)
    for layer in model.model.layers:
        layer.mlp.experts = dense_experts(layer.mlp.experts)
    fuse_head(model)
    if compiled:
        compile_layers(model)
    return _lora(model)


def dense_experts(original: nn.Module) -> nn.Module:
    """Our experts over dense weights, which stand as they are."""
    from surogate_formats.nf4 import NF4
    from surogate_load.experts.kind import ExpertsKind
    from surogate_load.experts.module import DOWN, GATE_UP, Projection, QuantizedExperts

    class Dense:
        """A `GroupedWeight`."""

        def forward(self, parts, ends, dtype):
            return parts[0]

        def backward(self, gradient, parts, ends, dtype):
            return parts[0]

    class DenseExperts(QuantizedExperts):
        def parts(self, name):
            return (self._parameters[name],)

    weights = {name: getattr(original, name) for name in (GATE_UP, DOWN)}
    shapes = {name: ExpertsKind(NF4(), tuple(weight.shape[1:]), len(weight), 1) for name, weight in weights.items()}
    made = DenseExperts(original, {name: Projection(kind, (name,), {}) for name, kind in shapes.items()}, "",
                        compute_dtype=weights[DOWN].dtype)  # fmt: skip
    for name, weight in weights.items():
        made.register_parameter(name, weight)
        made._weights[name] = Dense()
    return made


def _peft(base: str, sizes: dict, device: torch.device, compiled: bool) -> nn.Module:
    return _lora(_dense(sizes, device))


def _bitsandbytes(base: str, sizes: dict, device: torch.device, compiled: bool) -> nn.Module:
    """Decoder linears as `load_in_4bit` makes them; with `packed` the experts too."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = _dense(sizes, device)
    pack_linears(model, device)
    if base.endswith("packed"):
        for name, module in list(model.named_modules()):
            if name.endswith(".experts"):
                for parameter in ("gate_up_proj", "down_proj"):
                    replace_parameter_4bit(module, parameter, compress_statistics=True, quant_type="nf4")
        _let_peft_find_its_proxy()
    model.is_loaded_in_4bit = True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _lora(model.requires_grad_(False))


def _let_peft_find_its_proxy() -> None:
    """Lets PEFT 0.21.2 take its adapter off a parameter that has another parametrization: else its second step fails.

    It looks for one class of proxies there, and has put in another one.
    """
    from peft.tuners.lora import layer

    original = getattr(layer, "_LoraFactorsProxy", None)
    if original is None:
        return

    class Factors(layer._LoraParameterProxy):
        def __init__(self, lhs, rhs, scaling):
            nn.Module.__init__(self)
            self.lhs, self.rhs, self.scaling = lhs, rhs, scaling

        forward = original.forward

    layer._LoraFactorsProxy = Factors


MODELS = {"bf16": _grouped, "peft": _peft, "bitsandbytes": _bitsandbytes, "bitsandbytes packed": _bitsandbytes}
"""Base to what makes its model, where that isn't an artifact of ours."""


def _print(results: list[dict]) -> None:
    speeds = {result["row"]: result.get("tokens_per_s") for result in results}
    table = Table("row", "tokens/s", "step ms", "against bf16 grouped", "against bitsandbytes packed", "experts GB",
                  "experts / bf16", "resident GB", "peak GB", "first step s")  # fmt: skip
    for result in results:
        if "error" in result:
            table.add_row(result["row"], result["error"].splitlines()[-1])
            continue
        ratios = [
            f"{result['tokens_per_s'] / speeds[other]:.2f}" if speeds.get(other) else ""
            for other in ("bf16 grouped", "bitsandbytes packed")
        ]
        keys = ("experts_gb", "experts_against_bf16", "resident_gb", "peak_gb", "first_step_s")
        table.add_row(result["row"], str(result["tokens_per_s"]), str(result["step_ms"]), *ratios,
                      *(str(result[key]) for key in keys))  # fmt: skip
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
