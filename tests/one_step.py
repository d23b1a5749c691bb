"""One step of a trainer on all its rows."""

import torch


def move(model, seed, scale):
    """Move the trained weights of a model a little, by a seed: it is not its reference any more."""
    torch.manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "ref" not in name:
            parameter.data += scale * torch.randn_like(parameter)


def loss_of(trainer):
    """The loss of one batch of all rows."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch)


def step_of(trainer):
    """Loss, gradients and metrics of one batch of all rows."""
    loss = loss_of(trainer)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics
