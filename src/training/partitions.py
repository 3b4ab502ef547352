"""What a process holds of a model that ZeRO-3 shares between processes."""

import torch
from transformers import TrainerCallback


class InPlace(TrainerCallback):
    """Has DeepSpeed train the fp32 weights that the model computes with, not a copy of them."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        while hasattr(optimizer, "optimizer") and not hasattr(optimizer, "fp32_partitioned_groups_flat"):
            optimizer = optimizer.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat") and not optimizer.offload_optimizer:
            share_masters(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)


def share_masters(masters: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Let masters that are equal to the weights they were copied from have those in their place.

    DeepSpeed means to: `_create_fp32_partitions` of its stage3.py takes fp32 weights as their own masters where they are on the optimizer's device, but
    compares a torch.device with the device's name, which are never equal (0.19.8).
    """
    for master, weight in zip(masters, weights):
        if (master.dtype, master.device) == (weight.dtype, weight.device) and torch.equal(master, weight):
            master.data = weight.data
