"""Gives a model's quantized layers the arithmetic of a recipe."""

from __future__ import annotations

import logging

import torch
from torch import nn

from surogate_formats.errors import UsageError
from surogate_formats.recipe import Recipe, check_compatible
from surogate_load.experts.module import DOWN, QuantizedExperts
from surogate_load.fused.projections import fuse_projections
from surogate_load.linear import QuantizedLinear
from surogate_load.parallel.data_parallel import keep_from_broadcast
from surogate_load.recipes import RECIPE_LAYERS
from surogate_load.recipes.delayed import watch
from surogate_load.recipes.device import check_device
from surogate_load.recipes.layer import PackedWeight
from surogate_load.recipes.notes import Notes

_LOG = logging.getLogger("surogate_load")


def set_recipe(model: nn.Module, recipe: Recipe, *, emulate: bool = False) -> None:
    """Makes every `QuantizedLinear` of a model multiply as the recipe says; its scaling state starts anew.

    A packed head multiplies as under recipe bf16: logits are no place for rounded operands; so do
    experts, for which no grouped product in FP8 or FP4 is used, and that is said. Adapters that exist already
    keep their parameters.

    Args:
        model: the root: an optimizer that owns parameters of it ends its training steps.
        recipe: name and switches.
        emulate: compute fp8 and fp4 products in float32 from the same quantized operands, on any device.

    Raises:
        IncompatibleRecipeError: the format can't be trained so.
        UnsupportedDeviceError: the device can't multiply so, and `emulate` is off.
        UsageError: the model holds no quantized layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
    if not layers and not experts:
        raise UsageError("set_recipe: the model holds no quantized layer; load it with surogate_load.load_model")
    kinds = [layer.kind for layer in layers.values()] + [each.projections[DOWN].kind for each in experts.values()]
    for kind in kinds:
        check_compatible(kind.format.name, recipe)
    if not emulate:
        parts = [layer.parts for layer in layers.values()] + [each.parts(DOWN) for each in experts.values()]
        check_device(recipe, parts[0][0].device)
    notes, head = Notes(), _head(model)
    for name in experts if recipe.name != "bf16" else ():
        notes.add("experts multiply as under recipe bf16", name)
    for name, layer in layers.items():
        make = RECIPE_LAYERS["bf16" if layer is head else recipe.name]
        with torch.no_grad():
            made = make(PackedWeight(name, layer.kind, layer.parts), recipe, notes, emulate)
        device = layer.parts[0].device
        layer.recipe = made.to("cpu" if device.type == "meta" else device).train(layer.training)
    for module in model.modules():
        if callable(adopt := getattr(module, "adopt_recipe", None)):
            adopt()
    fuse_projections(model)
    keep_from_broadcast(model)
    watch(model)
    for line in notes.lines():
        _LOG.warning("recipe %s: %s", recipe.name, line)


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, without what PEFT put around it."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return getattr(head, "base_layer", head)
