"""What FSDP2 needs where it has cut the parameters up: each process then holds a part of every one, as a `DTensor`."""

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, convert_outputs_to_fp32
from accelerate.utils.other import compile_regions_fsdp2
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from modeling_dino import DINOForPreTraining


def shard_(accelerator: Accelerator, student: DINOForPreTraining, teacher: DINOForPreTraining) -> None:
    """Cuts both networks up alike, so that what is done to every element needs no other process.

    Blocks are put together one after another when they are needed, as Accelerate's plugin says; its own preparation
    takes one network and one optimiser. Mixed precision is autocast's, as without FSDP, and so parts travel in fp32:
    the plugin's would also round what autocast leaves in fp32.
    """
    plugin, dynamo = accelerator.state.fsdp_plugin, accelerator.state.dynamo_plugin
    offload_policy = plugin.cpu_offload or OffloadPolicy()
    for network in (student, teacher):
        if accelerator.mixed_precision == "bf16":
            autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
            network.forward = convert_outputs_to_fp32(autocast(network.forward))
        if dynamo.backend != DynamoBackend.NO:
            compile_regions_fsdp2(network, **dynamo.to_kwargs())
        for module in network.modules():
            if type(module).__name__ in network._no_split_modules and module is not network:
                reshard = plugin.reshard_after_forward
                fully_shard(module, reshard_after_forward=reshard, offload_policy=offload_policy)
        fully_shard(network, offload_policy=offload_policy)
    # no backward pass follows to do it; the moving average would go to a copy that is thrown away
    teacher.set_reshard_after_forward(True)


def local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """This process's parts, in their own memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together, where it is cut up; by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tree, is_wanted: bool):
    """A nest of dicts, lists and tensors, in which those that are cut up are put together on the processor.

    By all processes, and None for those of which it is not wanted. One tensor after another, as all of them may be
    more than a device holds.
    """

    def gather(leaf):
        if not isinstance(leaf, DTensor):
            return leaf
        leaf = leaf.full_tensor()
        return leaf.cpu() if is_wanted else None

    return tree_map(gather, tree)


def whole_network(
    network: DINOForPreTraining, is_wanted: bool = True, device: torch.device | str | None = None
) -> DINOForPreTraining | None:
    """The network itself or, where it is cut up, a copy that is not, on `device` or its own; by all processes.

    None where it is cut up and not wanted.
    """
    if not isinstance(network, FSDPModule):
        return network
    state = gathered(network.state_dict(), is_wanted)
    if not is_wanted:
        return None
    copied = DINOForPreTraining(network.config).eval().requires_grad_(False)
    copied.load_state_dict(state)
    return copied.to(device or next(network.parameters()).device)


def cut_up_like_(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimiser whose tensors are whole, for one whose parameters may be cut up."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape:
                    value = value.to(parameter.device)
                    values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return state
