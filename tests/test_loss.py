import math
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState

from training.loss import DINOLoss, koleo_loss, sinkhorn_knopp

from .original import recorded


NUM_CROPS = {0: 8, 1: 2, 2: 10}


@pytest.mark.parametrize("case", NUM_CROPS)
def test_loss_gradient_and_center_equal_the_originals(case):
    given = {name.removeprefix(f"{case}."): tensor for name, tensor in recorded("loss").items()}
    dino_loss = DINOLoss(given["student"].shape[1])
    dino_loss.center.copy_(given["center_before"])
    student = given["student"].clone().requires_grad_()
    loss = dino_loss(student, given["teacher"], teacher_temp=0.07, num_crops=NUM_CROPS[case])
    loss.backward()
    assert torch.equal(dino_loss.center, given["center_before"])  # only the loop moves it
    dino_loss.update_center(given["teacher"])
    assert loss.item() == pytest.approx(given["loss"].item(), rel=1e-6)
    torch.testing.assert_close(student.grad, given["grad"], rtol=0, atol=1e-6)
    torch.testing.assert_close(dino_loss.center, given["center_after"], rtol=0, atol=1e-6)


def test_golden_values_in_double_precision():
    student = torch.tensor([[math.sin(r + 1 + 2 * k) for k in range(5)] for r in range(8)], dtype=torch.float64)
    teacher = torch.tensor([[math.cos(r + 1 + k) for k in range(5)] for r in range(4)], dtype=torch.float64)
    dino_loss = DINOLoss(5).double()
    assert dino_loss(student, teacher, 0.04, 4).item() == pytest.approx(9.866789036314392, rel=1e-14)
    dino_loss.update_center(teacher)
    center = [-0.0379870162035765, -0.04440301921369934, -0.009995091133761633, 0.033602277639832125]
    assert dino_loss.center[0].tolist() == pytest.approx([*center, 0.04630586731620709], rel=1e-13)
    assert dino_loss(student, teacher, 0.04, 4).item() == pytest.approx(9.877747594970346, rel=1e-14)
    assert dino_loss(student, teacher, 0.07, 4).item() == pytest.approx(9.772669667378274, rel=1e-14)


def test_gradient_equals_that_of_the_double_loop():
    torch.manual_seed(0)
    student = torch.randn(6 * 3, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2 * 3, 11, dtype=torch.float64)
    dino_loss = DINOLoss(11).double()
    dino_loss.center.normal_()
    q = torch.softmax((teacher - dino_loss.center) / 0.05, dim=-1).chunk(2)
    p = torch.log_softmax(student / 0.1, dim=-1).chunk(6)
    terms = [-(q[t] * p[v]).sum(-1).mean() for t in range(2) for v in range(6) if v != t]
    expected = torch.autograd.grad(sum(terms) / len(terms), student)[0]
    actual = torch.autograd.grad(dino_loss(student, teacher, 0.05, 6), student)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_uniform_student_has_a_loss_of_ln_k():
    loss = DINOLoss(4096)(torch.zeros(8, 4096), torch.randn(4, 4096), teacher_temp=0.04, num_crops=4)
    assert loss.item() == pytest.approx(math.log(4096), rel=1e-6)


def test_low_precision_logits_are_computed_on_in_fp32():
    student, teacher = torch.randn(8, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    dino_loss = DINOLoss(64)
    assert torch.equal(dino_loss(student, teacher, 0.04, 4), dino_loss(student.float(), teacher.float(), 0.04, 4))


def test_center_takes_a_sum_over_micro_batches():
    teacher = torch.randn(12, 7)
    at_once, summed = DINOLoss(7), DINOLoss(7)
    at_once.update_center(teacher)
    summed.update_center(teacher[:4].sum(0, keepdim=True) + teacher[4:].sum(0, keepdim=True), num_rows=12)
    torch.testing.assert_close(summed.center, at_once.center)


def update_center_unevenly(path):
    """Two processes, one row in the first and three in the second."""
    state = PartialState(cpu=True)
    dino_loss = DINOLoss(3)
    rows = torch.arange(12.0).view(4, 3)
    dino_loss.update_center(rows[:1] if state.process_index == 0 else rows[1:])
    torch.save(dino_loss.center, f"{path}/{state.process_index}.pt")


def test_center_is_the_mean_over_all_processes(tmp_path):
    # in a process of its own: one that knows its number of processes would pass that on
    code = f"debug_launcher(update_center_unevenly, args=({str(tmp_path)!r},), num_processes=2)"
    imports = "from accelerate import debug_launcher; from tests.test_loss import update_center_unevenly; "
    subprocess.run([sys.executable, "-c", imports + code], check=True, capture_output=True, timeout=120)
    expected = 0.1 * torch.arange(12.0).view(4, 3).mean(0, keepdim=True)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(7, 4), (8, 3), (0, 4), (8, 0)])
def test_rows_that_are_no_whole_batch_are_refused(student_rows, teacher_rows):
    with pytest.raises(ValueError, match="student rows must be num_crops = 4 times the batch"):
        DINOLoss(5)(torch.zeros(student_rows, 5), torch.zeros(teacher_rows, 5), 0.04, num_crops=4)


def plain_sinkhorn_knopp(logits: torch.Tensor, temp: float, num_iterations: int = 3) -> torch.Tensor:
    q = torch.exp(logits / temp)
    num_rows, out_dim = q.shape
    for _ in range(num_iterations):
        for k in range(out_dim):
            q[:, k] /= q[:, k].sum() * out_dim
        for r in range(num_rows):
            q[r] /= q[r].sum() * num_rows
    return q * num_rows


def test_sinkhorn_knopp_equals_the_plain_loop_and_balances():
    torch.manual_seed(0)
    logits = torch.rand(12, 7, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.07), plain_sinkhorn_knopp(logits, 0.07), rtol=1e-12, atol=0)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.07).sum(1), torch.ones(12, dtype=torch.float64))
    balanced = sinkhorn_knopp(logits, 0.07, num_iterations=500)
    torch.testing.assert_close(balanced.sum(0), torch.full((7,), 12 / 7, dtype=torch.float64), rtol=1e-6, atol=0)
    collapsed = sinkhorn_knopp(logits[:1].expand(12, 7), 0.07)
    torch.testing.assert_close(collapsed, torch.full((12, 7), 1 / 7, dtype=torch.float64))  # no prototype is preferred


def test_sinkhorn_knopp_of_large_logits_is_finite():
    """Of 64 rows at most as many prototypes are any one's: exponentials of the others are 0 in fp32."""
    targets = DINOLoss(512, centering="sinkhorn_knopp").teacher_probs(100 * torch.randn(64, 512).bfloat16(), 0.04)
    assert targets.dtype == torch.float32 and targets.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(64), rtol=0, atol=1e-3)


def test_loss_by_sinkhorn_knopp_is_of_its_targets_and_ignores_the_center():
    torch.manual_seed(0)
    student, teacher = torch.randn(12, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    dino_loss = DINOLoss(7, centering="sinkhorn_knopp").double()
    dino_loss.center.normal_()
    q, p = plain_sinkhorn_knopp(teacher, 0.5).chunk(2), torch.log_softmax(student / 0.1, dim=-1).chunk(4)
    terms = [-(q[t] * p[v]).sum(-1).mean() for t in range(2) for v in range(4) if v != t]
    loss = dino_loss(student, teacher, 0.5, num_crops=4)
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-12)


def balance_unevenly(path):
    """Two processes, one row in the first and three in the second."""
    state = PartialState(cpu=True)
    rows = torch.arange(12.0).sin().view(4, 3)
    targets = sinkhorn_knopp(rows[:1] if state.process_index == 0 else rows[1:], 0.1)
    torch.save(targets, f"{path}/{state.process_index}.pt")


def test_sinkhorn_knopp_is_over_the_rows_of_all_processes(tmp_path):
    code = f"debug_launcher(balance_unevenly, args=({str(tmp_path)!r},), num_processes=2)"
    imports = "from accelerate import debug_launcher; from tests.test_loss import balance_unevenly; "
    subprocess.run([sys.executable, "-c", imports + code], check=True, capture_output=True, timeout=120)
    targets = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    expected = plain_sinkhorn_knopp(torch.arange(12.0).sin().view(4, 3).double(), 0.1).float()
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-6)


def test_koleo_and_its_gradient_equal_the_double_loop():
    torch.manual_seed(0)
    features = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    x = [row / row.norm() for row in features]
    distances = [min((x[i] - x[j]).norm() for j in range(9) if j != i) for i in range(9)]
    expected = torch.stack([-torch.log(distance + 1e-8) for distance in distances]).mean()
    loss = koleo_loss(features)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(each, features)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_koleo_is_computed_in_fp32_under_autocast():
    features = torch.randn(8, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(features)
    assert loss.dtype == torch.float32 and torch.equal(loss, koleo_loss(features.float()))


def test_koleo_of_images_that_are_alike_is_finite_and_of_one_is_refused():
    features = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-6) and features.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        koleo_loss(features[:1])
