"""What can go wrong when an artifact is loaded or trained, one class per cause; see `surogate_formats.errors`."""

from __future__ import annotations

from surogate_formats.errors import ArtifactError, SurogateError, UsageError


class MissingExtraError(SurogateError):
    """A package that only training needs is not installed."""


class MismatchedModelError(ArtifactError):
    """The artifact's tensors and the model's parameters are not the same set."""


class UnsupportedModuleError(ArtifactError):
    """A quantized weight belongs to a module that is no plain `torch.nn.Linear`."""


class PackedExpertsError(UnsupportedModuleError):
    """Packed experts that can't be loaded packed here, or that transformers would read wrongly."""


class UnsupportedDeviceError(SurogateError):
    """The device can't run the recipe natively, and its emulation was not asked for."""


class DeviceUnavailableError(SurogateError):
    """torch can't reach the device: it doesn't exist, or torch was built without it."""


class DeviceMemoryError(SurogateError):
    """The device has no room for the model."""


class TransformersTooOldError(SurogateError):
    """The installed transformers can't load a layout into packed modules."""


class UnknownArchitectureError(SurogateError):
    """The installed transformers can't make a model from the artifact's config.json."""


class BackendUnavailableError(SurogateError):
    """The package behind `backend` is not installed."""


class NeedsTwoDimensionalScalesError(UsageError):
    """`backend=cudnn` multiplies weights with 16x16 scales only."""


class CopiedModelError(SurogateError):
    """A copy of a model trains under a recipe whose state still belongs to the original."""


class MergeUnsupportedError(UsageError):
    """An adapter can't be merged into packed weights."""


class DenseInitializationError(UsageError):
    """An adapter is to be initialised from the values of a dense base, and the base is packed."""


class DenseAdapterError(UsageError):
    """A kind of adapter is to be put on a packed layer that computes with a dense weight, or isn't known not to."""


class QuantizerFailedError(SurogateError):
    """The quantizer, run as a process of its own, ended with an error."""


class SourceMissingError(UsageError):
    """A YAML file names no model, and none was given."""


class NoSuchSourceError(UsageError):
    """A path names no directory, and can't be the name of a repository on the Hub."""


class NotPackedError(UsageError):
    """A repository on the Hub holds a model that isn't quantized in any way."""


class DifferentArtifactError(UsageError):
    """A YAML file names a packed artifact as its model, and asks for another format, other parameters or layers."""


class UnrecordedSaveError(ArtifactError):
    """A packed model was saved in a way that no manifest can be written for."""


class NoAdapterError(UsageError):
    """A model has no adapter that could be saved."""


class InPlaceDequantizationError(UsageError):
    """A packed model is asked to become a dense one where it stands."""


class NoLayersError(UsageError):
    """Decoder layers are to be compiled, and the model has none that transformers names."""


class ExportExistsError(UsageError):
    """Where a checkpoint is to be written there is something already."""


class ExportFailedError(SurogateError):
    """The disk refuses to take a checkpoint."""


class UnreadableAdapterError(UsageError):
    """A directory holds no adapter of PEFT's for this model."""


class UnreadableStateError(UsageError):
    """A file of scaling state is damaged, or another model's or recipe's."""


class ForeignTextError(UsageError):
    """Tokens that the model doesn't know, none at all, or windows that are longer than it takes."""


class NoTokenizerError(UsageError):
    """A model has no tokenizer that can be loaded, or none with a chat template."""


class ShardedWeightError(UsageError):
    """A packed weight is wanted where only this rank's rows of it are."""


class UnsupportedShardingError(UsageError):
    """A wrapper, or the way it is called, can't divide a packed model between ranks."""


class RankLostError(SurogateError):
    """Another rank has ended, or hasn't answered within the timeout."""
