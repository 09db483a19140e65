"""Runs a causal language model one decoder block at a time: the memory of one block, whatever the model's size.

Blocks are transformers' own modules, built without memory and filled from a checkpoint's safetensors when their turn
comes. What the model passes to its blocks beside the hidden states (masks, rotary embeddings) is recorded once a shape,
by running the model with recorders in the blocks' places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surogate_formats.checkpoint import Checkpoint
from surogate_load.architecture import one_line
from surogate_load.block_calls import Answer, NoBlocksError, NotFiniteError, Recorder, equal
from surogate_load.empty_model import assign, empty_model
from surogate_load.experts.apart import ExpertsApart, put_apart
from surogate_load.model_tensors import DenseTensors, ModelTensors
from surogate_load.packed_names import names_in_model

__all__ = ["BlockRunner", "NoBlocksError", "NotFiniteError"]


class BlockRunner:
    """A model whose blocks are loaded one at a time; everything else of it is in memory.

    Experts whose weights stand in the checkpoint by themselves are linears by themselves here, too. Modules are named
    as in the checkpoint.

    Args:
        tensors: of the model, or the dense checkpoint that holds them.
        device: where the model runs; on `meta` nothing is read, and the model can be looked at alone.
        dtype: of weights and activations.

    Attributes:
        name: of the model's class.
        device: where it runs.
        count: number of blocks.
        longest: tokens of a row that the model takes.
        vocabulary: number of tokens that it knows.
        width: of its hidden states.
        prefix: of the blocks' names in the checkpoint, such as `model.layers`.

    Raises:
        NoBlocksError: see the class; the message names the architecture.
    """

    def __init__(self, tensors: Checkpoint | ModelTensors, device: str | torch.device, dtype: torch.dtype) -> None:
        """Builds the model and fills what isn't a block."""
        self._tensors: ModelTensors = DenseTensors(tensors) if isinstance(tensors, Checkpoint) else tensors
        self.device, self._dtype = torch.device(device), dtype
        self._model = empty_model(self._tensors, dtype)
        self.name = type(self._model).__name__
        put_apart(self._model, self._tensors.names)
        self._on_disk = names_in_model(self._model, self._tensors.names)
        self._in_model = {stored: name for name, stored in self._on_disk.items()}
        self.prefix, self._blocks = self._find_blocks()
        self.count = len(self._blocks)
        self.width: int = self._model.get_input_embeddings().weight.shape[1]
        self.vocabulary: int = self._model.get_input_embeddings().weight.shape[0]
        self.longest: int = getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        self._empty = list(self._blocks)
        self._shares = self._shares_of_experts()
        self._calls: list[dict[str, Any]] = []
        self._shape: tuple[int, ...] = ()
        self._fill(self._model, "", skip=f"{self.prefix}.")
        for index in range(self.count):
            self._blocks[index] = nn.Identity()
        self._model.to(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states before the first block, [rows, tokens, hidden], of int64 [rows, tokens].

        What the blocks are called with for rows of this shape is known from then on.

        Raises:
            NoBlocksError: that isn't the same for every text, or the blocks aren't called one after the other.
            NotFiniteError: see the class.
        """
        recorders = [Recorder() for _ in range(self.count)]
        with self._in_place(recorders), torch.no_grad(), self._running():
            self._model.base_model(input_ids=ids.to(self.device), use_cache=False)
        if not all(recorder.called for recorder in recorders):
            raise NoBlocksError(
                f"{self.name}: not every block is called once, in order; it can't be run block by block"
            )
        calls, shape = [recorder.keywords for recorder in recorders], tuple(ids.shape)
        if shape == self._shape and not equal(calls, self._calls):
            raise NoBlocksError(
                f"{self.name}: what its blocks are given depends on the text; it can't be run block by block"
            )
        self._calls, self._shape = calls, shape
        return self._finite(recorders[0].hidden, "what goes into its blocks")

    def check_blocks(self) -> None:
        """Raises `NoBlocksError` unless the files hold every tensor of every block, in the model's shape."""
        for index, block in enumerate(self._empty):
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                self._check(self._stored(f"{self.prefix}.{index}.{name}"), tensor)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, for as long as the block of code lasts."""
        block = self._empty[index]
        self._fill(block, f"{self.prefix}.{index}.")
        block.to(self.device).eval()
        try:
            yield block
        finally:
            block.to("meta")

    def keep_blocks_alone(self) -> None:
        """Frees the weights that are of no block; nothing but `block`, `run` and `module` may be called after it."""
        for name, tensor in list(self._model.named_parameters(remove_duplicate=False)):
            assign(self._model, name, tensor.to("meta"))

    def module(self, name: str) -> nn.Module | None:
        """The module of a block by its full name, without its weights; None if there is none."""
        known = self._in_model.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        index, _, inner = known.removeprefix(f"{self.prefix}.").partition(".")
        try:
            return self._empty[int(index)].get_submodule(inner)
        except (AttributeError, IndexError, ValueError):
            return None

    def share(self, name: str) -> float:
        """The part of all tokens that a block's linear multiplies, about: less than 1 for an expert's alone."""
        return self._shares.get(id(self.module(name)), 1.0)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its blocks, for as long as the block of code lasts."""
        with ExitStack() as stack, self._in_place([stack.enter_context(self.block(i)) for i in range(self.count)]):
            yield self._model

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after a block, in the shape of those before it; `NotFiniteError` if they are none."""
        with torch.no_grad(), self._running():
            found = block(hidden.to(self.device), **self._calls[index])
        return self._finite(found[0] if isinstance(found, tuple) else found, f"{self.prefix}.{index}")

    def through(self, ids: Tensor) -> Tensor:
        """The logits of int64 [rows, tokens], a block in memory at a time."""
        hidden = self.embed(ids)
        for index in range(self.count):
            with self.block(index) as block:
                hidden = self.run(index, block, hidden)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states after the last block."""
        with self._in_place([Answer(hidden) for _ in range(self.count)]), torch.no_grad():
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
            found: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return self._finite(found, "its head")

    def _finite(self, found: Tensor, where: str) -> Tensor:
        if not torch.isfinite(found).all():
            dtype = str(found.dtype).removeprefix("torch.")
            raise NotFiniteError(f"{self.name}: {where} gives a NaN or an infinity in {dtype}: look at its weights")
        return found

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Names the model in what its own code raises where it isn't made to be run so."""
        try:
            yield
        except (TypeError, IndexError, AttributeError, KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NoBlocksError(f"{self.name}: can't be run block by block ({one_line(error)})") from error

    @contextmanager
    def _in_place(self, modules: list[Any]) -> Iterator[None]:
        for index, module in enumerate(modules):
            self._blocks[index] = module
        try:
            yield
        finally:
            for index in range(self.count):
                self._blocks[index] = nn.Identity()

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        wanted = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        lists = [
            (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == wanted
        ]
        outer = [pair for pair in lists if f"{pair[0]}.0." in " ".join(self._tensors.names)]
        if len(outer) != 1:
            raise NoBlocksError(f"{self.name}: its decoder blocks can't be told; it can't be run block by block")
        return outer[0]

    def _fill(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        """Gives a module's parameters and buffers their values from the checkpoint, in the runner's dtype."""
        tied = getattr(self._model, "all_tied_weights_keys", {}) if not prefix else {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            full = self._stored(prefix + name)
            if skip is not None and full.startswith(skip):
                continue
            if full in self._tensors.names or name not in tied:
                self._check(full, tensor)
            if full in self._tensors.names and self.device.type != "meta":
                assign(module, name, self._tensors.read(full, self.device, self._dtype))
        if not prefix:
            self._model.tie_weights()

    def _shares_of_experts(self) -> dict[int, float]:
        chosen: int = getattr(self._model.config.get_text_config(), "num_experts_per_tok", 1)
        experts = [each for block in self._empty for each in block.modules() if isinstance(each, ExpertsApart)]
        return {id(linear): chosen / each.count for each in experts for linear in each.modules()}

    def _stored(self, name: str) -> str:
        return self._on_disk.get(name, name)

    def _check(self, name: str, like: Tensor) -> None:
        if name in self._tensors.names:
            shape = self._tensors.shape(name)
            if tuple(like.shape) != shape:
                raise NoBlocksError(f"{self.name}: {name} is {list(shape)}, the model wants {list(like.shape)}")
        elif like.is_meta:
            raise NoBlocksError(
                f"{self.name}: {name} isn't in the checkpoint under this name; it can't be run block by block"
            )
