"""A few LoRA steps on any model."""

import torch


def losses_of_four_steps(model, ids):
    """The losses of four AdamW steps on one batch."""
    return losses_of_steps(model, ids, 4)


def losses_of_steps(model, ids, steps):
    """The losses of some AdamW steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
