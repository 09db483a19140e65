"""From the stacked parameters of packed experts back to the tensors of single experts, as the files held them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from surogate_formats.format import Format
from surogate_formats.layouts import Layout, stored_arrays
from surogate_load.errors import UnrecordedSaveError
from surogate_load.experts.conversion import BIAS
from surogate_load.experts.module import GATE_UP, Projection, QuantizedExperts
from surogate_load.recoding import must_restore
from surogate_load.weight import NAMES, to_numpy, to_torch

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class ExpertsStore:
    """How the files held packed experts.

    Attributes:
        layout: how they named parts.
        format: of the weights.
        dtypes: the safetensors dtype of each weight's source by its name on disk, where it is known.
    """

    layout: Layout
    format: Format
    dtypes: Mapping[str, str]

    def as_stored(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors, by their names in it, with those of packed experts by expert; some share memory.

        Raises:
            UnrecordedSaveError: the files held what the model doesn't.
        """
        kept = dict(tensors)
        for module, experts in model.named_modules():
            if isinstance(experts, QuantizedExperts):
                for name, projection in experts.projections.items():
                    _check_whole(experts, projection)
                    names = {part: f"{module}.{projection.parameter(name, part)}" for part in projection.tensors}
                    taken = {part: kept.pop(full) for part, full in names.items()}
                    kept.update(self._by_expert(module, experts, projection, taken))
                    if experts.biases_by_expert:
                        kept.update(_biases(module, experts, name, kept.pop(f"{module}.{name}_bias")))
        return kept

    def _by_expert(
        self, module: str, experts: QuantizedExperts, projection: Projection, tensors: Mapping[str, Tensor]
    ) -> Named:
        kind = projection.kind
        specs = {part: spec for part, (_, spec) in projection.tensors.items()}
        split = {part: t.reshape(kind.experts, kind.members, *specs[part].shape) for part, t in tensors.items()}
        for number in range(kind.experts):
            for member, role in enumerate(projection.roles):
                own = {part: tensor[number, member] for part, tensor in split.items()}
                name = f"{module}.{number}.{role}"
                if must_restore(self.layout, self.format):
                    dtype = self.dtypes.get(f"{experts.stored}.{number}.{role}.weight", NAMES[experts.compute_dtype])
                    yield from self._recoded(name, projection, own, dtype)
                else:
                    yield from ((f"{name}.{projection.tensors[part][0]}", tensor) for part, tensor in own.items())

    def _recoded(self, name: str, projection: Projection, tensors: Mapping[str, Tensor], dtype: str) -> Named:
        kind = projection.kind
        parts = {part: to_numpy(t.cpu()) for part, t in zip(kind.weight.specs, tensors.values(), strict=True)}
        for key, array in stored_arrays(self.layout, self.format, parts, kind.shape, dtype).items():
            owned = array if key in parts else array.copy()  # safetensors takes no table that weights share
            yield f"{name}.{self.layout.suffixes[self.format.name][key]}", to_torch(owned)


def _check_whole(experts: QuantizedExperts, projection: Projection) -> None:
    if projection.left_out:
        raise UnrecordedSaveError(
            f"{experts.stored}: only some of the experts had {', '.join(projection.left_out)}, which the model doesn't "
            "hold: keep the original files, and save adapters alone"
        )


def _biases(module: str, experts: QuantizedExperts, name: str, bias: Tensor) -> Named:
    roles = experts.projections[name].roles
    if name == GATE_UP and not experts.is_concatenated:
        bias = bias.unflatten(1, (-1, len(roles))).transpose(1, 2)  # type: ignore[no-untyped-call]
    split = bias.reshape(len(bias), len(roles), -1)
    for number in range(len(bias)):
        for member, role in enumerate(roles):
            yield f"{module}.{number}.{role}.{BIAS}", split[number, member].clone()  # rows may be interleaved
