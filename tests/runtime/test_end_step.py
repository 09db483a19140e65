"""Delayed scaling where the optimizer owns copies of the parameters: said once, and ended by hand."""

import logging

import numpy as np
import pytest
import torch
from runtime.layers import make_layer, with_recipe

from surogate_formats.recipe import Recipe
from surogate_load import end_step


@pytest.fixture
def model():
    return with_recipe(make_layer("fp8-tensor", bias=True)[0], Recipe("fp8-hybrid"))


def backward(model, magnitude):
    model(torch.full((2, 32), magnitude, requires_grad=True)).sum().backward()


def step_of_another(copies=None):
    torch.optim.SGD(copies or [torch.nn.Parameter(torch.zeros(1))], lr=0).step()


def test_an_optimizer_of_copies_is_warned_of_once(model, caplog):
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters() if parameter.is_leaf]
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        for _ in range(5):
            backward(model, 2.0)
            step_of_another(copies[-1:])
    assert len(caplog.messages) == 1
    assert "none owns parameters of this model" in caplog.messages[0]
    assert "surogate_load.end_step(model)" in caplog.messages[0]
    assert model[0].recipe.input.scale.item() == 0


def test_a_step_ended_by_hand_is_a_step(model, caplog):
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        for magnitude in (2.0, 5.0, 3.0):
            backward(model, magnitude)
            step_of_another()
            end_step(torch.nn.Sequential(model))  # a wrapper will do
    assert not caplog.messages
    state = model[0].recipe.input
    assert state.history[-3:].tolist() == [2.0, 5.0, 3.0]
    assert state.scale.item() == np.float32(448) / np.float32(5)
    end_step(model)
    assert state.history[-3:].tolist() == [2.0, 5.0, 3.0]


def test_its_own_optimizer_settles_it(model, caplog):
    own = torch.optim.SGD([model[0].bias], lr=0)
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        for _ in range(4):
            backward(model, 2.0)
            own.step()
            step_of_another()
            backward(model, 1.0)
            step_of_another()
    assert not caplog.messages


def test_a_model_that_does_not_train_is_not_suspected(model, caplog):
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        for _ in range(4):
            step_of_another()
        model.eval()
        model(torch.ones(2, 32))
        step_of_another()
    assert not caplog.messages


def test_other_recipes_have_no_step_to_end():
    end_step(with_recipe(make_layer("fp8-tensor")[0], Recipe("bf16")))
