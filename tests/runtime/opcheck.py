"""torch's op checker, also for ops whose tensors are fp8: its schema check can't compare those."""

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check_op(op, arguments):
    """Runs opcheck; where it has to leave out the schema check, sees itself that nothing unmarked is mutated."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if not any(tensor.dtype in FP8 for tensor in tensors) and not produces_fp8(op, arguments):
        torch.library.opcheck(op, arguments)
        return
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(op, arguments, test_utils=WITHOUT_SCHEMA)
    op(*arguments)
    for old, new, argument in zip(before, arguments, op._schema.arguments, strict=True):
        if isinstance(old, torch.Tensor) and not (argument.alias_info and argument.alias_info.is_write):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)), argument.name


def produces_fp8(op, arguments):
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    results = op(*copies)
    results = results if isinstance(results, tuple) else (results,)
    return any(result is not None and result.dtype in FP8 for result in results)
