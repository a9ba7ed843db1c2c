"""One step of DINO, as it is taken here and as others have it: the original's, restated plainly, and lightly's.

Each takes finished crops. The other two train networks of timm, and are written as their sources are, with what that
costs; nothing of them is used by the project itself.
"""

import argparse
import copy
from importlib.util import find_spec

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from measuring import make_parser
from torch import nn

from modeling_dino import DINOForPreTraining
from training.arguments import TrainingArguments
from training.augmentation import CropBatch
from training.guard import Guard
from training.networks import load_config, make_teacher
from training.schedules import Schedule
from training.state import prepare_state
from training.train import train_step


MODELS = {  # ours: timm's
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_small_patch8": "vit_small_patch8_224",
    "vit_base_patch16": "vit_base_patch16_224",
    "resnet50": "resnet50",
}
PACKAGES = ["torch", "torchvision", "transformers", "accelerate", "timm", "lightly"]


def make_parser_of_steps(description: str) -> argparse.ArgumentParser:
    parser = make_parser(description, batch=8, precision="bf16")
    parser.add_argument("--model", choices=MODELS, default="vit_small_patch16")
    parser.add_argument("--eager_only", action="store_true", help="leave out what has to be compiled")
    return parser


def variants(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The names of all that is measured, and of the peers among them. Without lightly, it is left out."""
    precision = "fp32" if args.precision == "no" else args.precision
    peers = ["lightly, fp32"] * bool(find_spec("lightly")) + [f"plain, {precision}"]
    return peers + [f"ours, {precision}"] + [f"ours compiled, {precision}"] * (not args.eager_only), peers


def make_variant(args: argparse.Namespace) -> "Ours | Plain | Lightly":
    kind, _, precision = args.variant.partition(", ")
    precision = "no" if precision == "fp32" else precision
    if kind.startswith("ours"):
        return Ours(args, precision, kind == "ours compiled")
    return {"plain": Plain, "lightly": Lightly}[kind](args, precision)


class Ours:
    """`train_step` of the training itself, with its signals and its guard."""

    def __init__(self, args: argparse.Namespace, precision: str, is_compiled: bool):
        self.args = TrainingArguments(
            dataset_name="unused",
            output_dir="unused",
            model_config=args.model,
            config_overrides=[f"out_dim={args.out_dim}"],
            per_device_train_batch_size=args.batch,
            num_local_crops=args.local_crops,
        )
        plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if is_compiled else None
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision, dynamo_plugin=plugin)
        student = DINOForPreTraining(load_config(self.args))
        self.state = prepare_state(self.accelerator, self.args, student, make_teacher(student))
        student.train()
        self.guard = Guard(self.accelerator, self.state.optimizer)
        self.schedule = Schedule(self.args, 1000, 100_000, args.batch)
        self.done = 20_000  # steps, so that neither the rate warms up nor prototypes are frozen

    def step(self, batch: CropBatch) -> None:
        now = self.schedule(self.done)
        self.done += 1
        train_step(self.accelerator, self.args, self.state, [batch], self.done, now, self.guard)


def make_backbone(model: str, drop_path_rate: float = 0.0) -> nn.Module:
    timm.layers.set_fused_attn(False)  # the original has no other
    is_vit = "vit" in model
    options = {"dynamic_img_size": True, "drop_path_rate": drop_path_rate} if is_vit else {}
    return timm.create_model(MODELS[model], num_classes=0, **options)


def make_plain_last_layer(out_dim: int) -> nn.Module:
    """PyTorch's weight norm, with a gain of 1 that is not trained."""
    last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, out_dim, bias=False))
    gain = last_layer.parametrizations.weight.original0
    gain.data.fill_(1)
    gain.requires_grad = False
    return last_layer


def plain_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, center: torch.Tensor, num_views: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss by the double loop over views, and the next centre."""
    student = (student_logits / 0.1).chunk(num_views)
    teacher = torch.softmax((teacher_logits - center) / 0.04, dim=-1).detach().chunk(2)
    total, num_terms = 0.0, 0
    for t, q in enumerate(teacher):
        for v in range(num_views):
            if v != t:
                total = total + torch.sum(-q * torch.log_softmax(student[v], dim=-1), dim=-1).mean()
                num_terms += 1
    mean = teacher_logits.sum(0, keepdim=True) / len(teacher_logits)
    return total / num_terms, center * 0.9 + mean.detach() * 0.1


class PlainHead(nn.Module):
    """The original's projection head."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last_layer = make_plain_last_layer(out_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last_layer(nn.functional.normalize(self.mlp(features), dim=-1))


class Plain:
    """The original's step: views of a size at once, the loss pair by pair, all else parameter by parameter."""

    def __init__(self, args: argparse.Namespace, precision: str):
        self.device, self.precision = args.device, precision
        networks = []
        for drop_path_rate in (0.1, 0.0):
            backbone = make_backbone(args.model, drop_path_rate)
            networks.append(nn.ModuleList([backbone, PlainHead(backbone.num_features, args.out_dim)]).to(args.device))
        self.student, self.teacher = networks
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        decayed, rest = [], []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                (rest if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}])
        self.center = torch.zeros(1, args.out_dim, device=args.device)

    def run(self, network: nn.ModuleList, views: list[torch.Tensor]) -> torch.Tensor:
        backbone, head = network
        sizes = [view.shape[-1] for view in views]
        features = [torch.cat([v for v in views if v.shape[-1] == size]) for size in dict.fromkeys(sizes)]
        return head(torch.cat([backbone(crops) for crops in features]).float())

    def step(self, views: list[torch.Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            teacher_logits = self.run(self.teacher, views[:2])
            loss, self.center = plain_loss(self.run(self.student, views), teacher_logits, self.center, len(views))
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        norms = []
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.data.norm(2)
                norms.append(norm.item())
                coefficient = 3.0 / (norm + 1e-6)
                if coefficient < 1:
                    parameter.grad.data.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.student.parameters(), self.teacher.parameters()):
                theirs.data.mul_(0.996).add_((1 - 0.996) * ours.detach().data)
        return value


class Lightly:
    """The loop of lightly's documentation, with its head, loss and momentum update; clipped as in its benchmarks."""

    def __init__(self, args: argparse.Namespace, precision: str):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        self.update_momentum, self.device, self.precision = update_momentum, args.device, precision
        backbone = make_backbone(args.model)
        heads = [DINOProjectionHead(backbone.num_features, 2048, 256, args.out_dim) for _ in range(2)]
        self.student_backbone, self.student_head = backbone.to(args.device), heads[0].to(args.device)
        self.teacher_backbone, self.teacher_head = copy.deepcopy(backbone).to(args.device), heads[1].to(args.device)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.student = nn.ModuleList([self.student_backbone, self.student_head])
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, weight_decay=0.04)
        self.criterion = DINOLoss(output_dim=args.out_dim, warmup_teacher_temp_epochs=5).to(args.device)

    def step(self, views: list[torch.Tensor]) -> float:
        self.update_momentum(self.student_backbone, self.teacher_backbone, m=0.996)
        self.update_momentum(self.student_head, self.teacher_head, m=0.996)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            teacher_out = [self.teacher_head(self.teacher_backbone(view).flatten(start_dim=1)) for view in views[:2]]
            student_out = [self.student_head(self.student_backbone(view).flatten(start_dim=1)) for view in views]
            loss = self.criterion(teacher_out, student_out, epoch=1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.student_head.cancel_last_layer_gradients(current_epoch=1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
