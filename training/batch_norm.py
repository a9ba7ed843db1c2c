"""Batch norms that see the batches of all processes, on CPU too, where PyTorch has none."""

import torch
from torch import nn


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOfAll.forward(ctx, gradient)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training, normalises by mean and variance over the rows of all processes, which must hold equally many.

    What `torch.nn.SyncBatchNorm` does on CUDA, in plain operations, the gradients of the statistics included.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass  # of any number of dimensions

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        others = [dim for dim in range(input.ndim) if dim != 1]
        channels = [1, -1] + [1] * (input.ndim - 2)
        num_rows = input.numel() // input.shape[1] * torch.distributed.get_world_size()
        rows = input.float()  # under autocast it is bf16, whose sums keep two or three digits
        mean = _SumOfAll.apply(rows.sum(others)) / num_rows
        centred = rows - mean.view(channels)
        variance = _SumOfAll.apply(centred.square().sum(others)) / num_rows
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num_rows / (num_rows - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(channels) + self.bias.view(channels)).to(input.dtype)


def share_batch_norms_(network: nn.Module, device: torch.device) -> None:
    """Replaces every batch norm of `network`, with its weights, by one that is shared between processes on `device`.

    Raises:
        ValueError: a batch norm that does more than the usual, such as some of timm's, or less.
    """
    shared_class = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        is_plain = module.affine and module.track_running_stats and module.momentum is not None
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d) or not is_plain:
            raise ValueError(
                f"several processes cannot share the batch norm {name}, {module}; take another network, or one process"
            )
        shared = shared_class(module.num_features, module.eps, module.momentum)
        shared.load_state_dict(module.state_dict())
        shared.train(module.training)
        for ours, theirs in zip(shared.parameters(), module.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        network.set_submodule(name, shared)
