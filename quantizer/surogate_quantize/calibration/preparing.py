"""Whether a run calibrates, and if so with what; torch is imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surogate_formats.checkpoint import Checkpoint
from surogate_quantize.calibration_options import CalibrationOptionsError
from surogate_quantize.engine import Engine
from surogate_quantize.plan import Plan

if TYPE_CHECKING:
    from surogate_quantize.calibration.calibrate import Calibration


def prepare_calibration(
    source: Checkpoint, plan: Plan, engine: Engine, ranks: int, max_memory: int, *, reading: bool = True
) -> Calibration | None:
    """The calibrated pass of a plan that asks for calibrated codes; None for any other.

    Args:
        source: the dense checkpoint.
        plan: the plan.
        engine: of the run.
        ranks: how many processes take part.
        max_memory: bytes.
        reading: see `Calibration`.

    Raises:
        CalibrationOptionsError: several ranks, or torch or transformers are missing.
        NoBlocksError: the model can't be run block by block.
    """
    if not plan.options.calibrates:
        return None
    what = "codes='calibrated'" if plan.options.codes == "calibrated" else "adapter_init"
    if ranks > 1:
        raise CalibrationOptionsError(f"`{what}` runs in one process; start it without torchrun")
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
        import torch

        from surogate_quantize.calibration.calibrate import Calibration
    except ImportError as error:
        raise CalibrationOptionsError(f"`{what}` needs {error.name}: pip install 'surogate-quant[train]'") from error
    device = "cuda" if engine.device.startswith("cuda") else "cpu"
    threads = torch.get_num_threads()
    return Calibration(source, plan, plan.options.calibration, device, threads, max_memory, reading=reading)
