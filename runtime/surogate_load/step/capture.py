"""Captures one micro-step, and replays it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.kernels import load_kernels
from surogate_load.recipes.delayed import DelayedScale
from surogate_load.recipes.noise import Noise
from surogate_load.step.attention import fastest_attention
from surogate_load.step.checkpointing import without_random_state

_WARM_UP = 3
"""Steps before a capture: compilers, cuBLAS and cuDNN choose and allocate in the first ones."""


class Gradients:
    """One buffer a trainable parameter, to which graphs add: they know addresses, not attributes.

    Args:
        parameters: that a model trains.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes the buffers; `attach` fills them."""
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    def attach(self) -> None:
        """Makes the buffers the parameters' gradients, with what those hold: zeros where there is none."""
        zero = []
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                zero.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if zero:
            torch._foreach_zero_(zero)


class Capture:
    """A micro-step for batches of one shape.

    Args:
        model: as it stands now.
        given: the batch and `gradient_scale`, on the model's device.
        gradients: what the graph adds to.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any], gradients: Gradients) -> None:
        """Runs a few steps, captures one, and puts back gradients, random state and scaling state."""
        self._gradients = gradients
        self._inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in given.items()}
        self._graph = torch.cuda.CUDAGraph()
        load_kernels(next(model.parameters()).device)
        gradients.attach()
        with (
            _unchanged(model, gradients),
            _capturable_masks(),
            _no_autocast_cache(),
            fastest_attention(),
            without_random_state(model),
        ):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._step(model)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._loss = self._step(model)

    def _step(self, model: nn.Module) -> Tensor:
        batch = {name: value for name, value in self._inputs.items() if name != "gradient_scale"}
        loss: Tensor = model(**batch).loss
        # Not backward(): that would add each parameter's gradient in a kernel of its own.
        scaled = loss * self._inputs["gradient_scale"]
        made = torch.autograd.grad(scaled, self._gradients.parameters, allow_unused=True)
        pairs = [pair for pair in zip(self._gradients.buffers, made, strict=True) if pair[1] is not None]
        torch._foreach_add_([buffer for buffer, _ in pairs], [gradient for _, gradient in pairs])
        return loss.detach()

    def replay(self, given: Mapping[str, Any]) -> Tensor:
        """The loss of another batch; adds its gradients."""
        for name, value in given.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value, non_blocking=True)
        self._gradients.attach()
        self._graph.replay()
        return self._loss.clone()


@contextmanager
def _unchanged(model: nn.Module, gradients: Gradients) -> Iterator[None]:
    """Puts back what steps change, and their gradients."""
    changing = [
        buffer
        for module in model.modules()
        if isinstance(module, (DelayedScale, Noise))
        for buffer in module.buffers(recurse=False)
    ]
    state = [*gradients.buffers, *changing]
    saved = [tensor.clone() for tensor in state]
    random = torch.cuda.get_rng_state()
    try:
        yield
    finally:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(random)


_WITHOUT_A_MASK = {"is_tracing": lambda *_: False, "find_packed_sequence_indices": lambda *_: None}
"""What transformers' masking finds in a batch without mask and position_ids, which it would read on the host."""


@contextmanager
def _capturable_masks() -> Iterator[None]:
    """Has transformers leave the causal mask to the attention kernel, as it does outside a capture.

    Seeing a capture, some versions build the mask in full, for which there are only slow kernels.
    """
    from transformers import masking_utils

    originals = {name: getattr(masking_utils, name) for name in _WITHOUT_A_MASK if hasattr(masking_utils, name)}
    for name in originals:
        setattr(masking_utils, name, _WITHOUT_A_MASK[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A cached cast would be made outside the graph, once."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
