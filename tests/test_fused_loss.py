"""The loss that is computed with the last layer, beside the double loop over views and PyTorch's own weight norm."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.modeling_dino import DINOPrototypes
from training.fused_loss import fused_cross_entropy
from training.loss import DINOLoss


NUM_CROPS, BATCH, DIM, OUT_DIM = 5, 3, 8, 9001  # the prototypes are three chunks, the last one not full


def make_layer(**fields) -> DINOPrototypes:
    torch.manual_seed(0)
    layer = DINOPrototypes(DINOConfig(**{"out_dim": OUT_DIM, "head_bottleneck_dim": DIM} | fields)).double()
    nn.init.normal_(layer.weight_v)
    if isinstance(layer.weight_g, nn.Parameter):
        nn.init.uniform_(layer.weight_g, 0.5, 1.0)
    return layer


def make_batch(out_dim: int = OUT_DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last layer is given, (rows, dim), and targets (target rows, out_dim) of two teacher views."""
    torch.manual_seed(1)
    rows = nn.functional.normalize(torch.randn(NUM_CROPS * BATCH, DIM, dtype=torch.float64), dim=-1)
    return rows, torch.softmax(4 * torch.randn(2 * BATCH, out_dim, dtype=torch.float64), dim=-1)


def double_loop(layer: DINOPrototypes, rows: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and its gradients: of the rows and of the layer's parameters."""
    rows = rows.clone().requires_grad_()
    logits = rows @ torch._weight_norm(layer.weight_v, layer.weight_g, 0).T
    q, p = targets.chunk(2), torch.log_softmax(logits / 0.1, dim=-1).chunk(NUM_CROPS)
    terms = [-(q[t] * p[v]).sum(-1).mean() for t in range(2) for v in range(NUM_CROPS) if v != t]
    loss = sum(terms) / len(terms)
    return [loss, *torch.autograd.grad(loss, [rows, *layer.parameters()])]


def fused(layer: DINOPrototypes, rows: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    rows = rows.clone().requires_grad_()
    loss = scale * fused_cross_entropy(rows, layer, targets, NUM_CROPS, student_temp=0.1).loss
    return [loss, *torch.autograd.grad(loss, [rows, *layer.parameters()])]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("norm_last_layer", [True, False], ids=["gain frozen", "gain trained"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_equal_those_of_the_double_loop(dtype, tolerance, norm_last_layer):
    layer, batch = make_layer(norm_last_layer=norm_last_layer).to(dtype), [tensor.to(dtype) for tensor in make_batch()]
    expected = double_loop(copy.deepcopy(layer).double(), *(tensor.double() for tensor in batch))
    for scale in (1.0, -3.0):
        actual = fused(layer, *batch, scale=scale)
        assert len(actual) == (3 if norm_last_layer else 4)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == dtype and relative_error(ours, scale * theirs) < tolerance


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_crops_may_be_given_one_part_after_another(cut):
    layer, (rows, targets) = make_layer(), make_batch()
    whole = fused(layer, rows, targets)
    rows.requires_grad_()
    parts = [
        fused_cross_entropy(rows[crops.start * BATCH : crops.stop * BATCH], layer, targets, NUM_CROPS, 0.1, crops).loss
        for crops in (range(cut), range(cut, NUM_CROPS))
    ]
    loss = sum(parts)
    for ours, theirs in zip([loss, *torch.autograd.grad(loss, [rows, layer.weight_v])], whole, strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_gradient_is_right_by_finite_differences():
    layer, (rows, targets) = make_layer(out_dim=7, norm_last_layer=False), make_batch(7)

    def loss(rows: torch.Tensor, weight_v: torch.Tensor, weight_g: torch.Tensor) -> torch.Tensor:
        other = copy.copy(layer)
        other._parameters = {"weight_v": weight_v, "weight_g": weight_g}
        return fused_cross_entropy(rows, other, targets, NUM_CROPS, 0.1).loss

    assert torch.autograd.gradcheck(loss, (rows.requires_grad_(), layer.weight_v, layer.weight_g))


def test_under_autocast_it_is_the_loss_of_the_logits_that_the_network_gives():
    torch.manual_seed(0)
    network = DINOForPreTraining(
        DINOConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, out_dim=OUT_DIM,
            head_hidden_dim=16, head_bottleneck_dim=DIM,
        )
    )  # fmt: skip
    crops = [torch.randn(2 * BATCH, 3, 16, 16), torch.randn((NUM_CROPS - 2) * BATCH, 3, 8, 8)]
    targets = make_batch()[1].float()
    criterion = partial(fused_cross_entropy, targets=targets, num_crops=NUM_CROPS, student_temp=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(crops).logits
        plain = DINOLoss(OUT_DIM).cross_entropy(logits, targets, NUM_CROPS)
        output = network(crops, criterion=criterion)
    assert logits.dtype == torch.bfloat16 and output.logits is None and output.loss.loss.dtype == torch.float32
    assert relative_error(output.loss.loss, plain.double()) < 1e-6
    weights = [network.head.last_layer.weight_v, network.head.mlp[-1].weight]
    expected, actual = (torch.autograd.grad(loss, weights) for loss in (plain, output.loss.loss))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and relative_error(ours, theirs.double()) < 0.01  # bf16 has steps of 0.008


def test_statistics_are_those_of_the_targets():
    layer, (rows, targets) = make_layer(), make_batch()
    targets[1] = nn.functional.one_hot(torch.tensor(9000), OUT_DIM)  # whose logarithms are not finite
    targets[2] = 1 / OUT_DIM
    _, entropies, largest, target_sum = fused_cross_entropy(rows, layer, targets, NUM_CROPS, 0.1)
    expected = torch.distributions.Categorical(probs=targets).entropy()
    torch.testing.assert_close(entropies, expected, rtol=1e-9, atol=1e-9)
    assert largest.tolist() == targets.argmax(-1).tolist() and largest[1] == 9000
    torch.testing.assert_close(target_sum, targets.sum(0), rtol=1e-12, atol=0)
    of_locals = fused_cross_entropy(rows[2 * BATCH :], layer, targets, NUM_CROPS, 0.1, range(2, NUM_CROPS))
    assert not of_locals.target_entropies.numel() and not of_locals.largest.numel() and not of_locals.target_sum.any()


class LargestResult(TorchDispatchMode):
    """Of all operations within, the elements of the largest tensor that one puts out."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.num_elements = max(self.num_elements, each.numel())
        return result


def test_logits_of_all_prototypes_are_never_there():
    layer, batch = make_layer(), make_batch()
    seen = {}
    for function in (double_loop, fused):
        with LargestResult() as largest:
            function(layer, *batch)
        seen[function] = largest.num_elements
    assert seen[double_loop] >= NUM_CROPS * BATCH * OUT_DIM
    assert seen[fused] == layer.weight_v.numel()  # a gradient


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(14, 6), (15, 5), (0, 6), (15, 0)])
def test_rows_that_are_no_whole_batch_are_refused(student_rows, teacher_rows):
    layer = make_layer(out_dim=4)
    rows, targets = torch.zeros(student_rows, DIM).double(), torch.zeros(teacher_rows, 4).double()
    with pytest.raises(ValueError, match="student rows must be num_crops = 5 times the batch"):
        fused_cross_entropy(rows, layer, targets, NUM_CROPS, 0.1)
