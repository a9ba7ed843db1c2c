"""What a step asks of the host: nothing that waits for the device, and no loop over parameters."""

import io

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.decoding import EncodedImage, Reading
from modeling_dino import DINOForPreTraining
from training.arguments import TrainingArguments
from training.augmentation import MultiCrop, collate
from training.guard import Guard
from training.networks import load_config, make_teacher
from training.schedules import Schedule
from training.state import prepare_state
from training.train import train_step


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select", "equal")


class Operations(TorchDispatchMode):
    """The names of all operations within, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Training:
    """A tiny network, and steps of it as a run takes them, without lines of metrics."""

    def __init__(self, num_hidden_layers: int = 2, **settings):
        overrides = [
            "hidden_size=16", f"num_hidden_layers={num_hidden_layers}", "num_attention_heads=2", "image_size=32",
            "patch_size=8", "out_dim=32", "head_hidden_dim=16", "head_bottleneck_dim=8",
        ]  # fmt: skip
        self.args = TrainingArguments(
            dataset_name="unused", output_dir="unused", config_overrides=overrides, global_crop_size=32,
            local_crop_size=16, num_local_crops=2, per_device_train_batch_size=4, **settings,
        )  # fmt: skip
        self.accelerator = Accelerator(cpu=True)
        student = DINOForPreTraining(load_config(self.args))
        self.state = prepare_state(self.accelerator, self.args, student, make_teacher(student))
        student.train()
        self.guard = Guard(self.accelerator, self.state.optimizer)
        self.schedule = Schedule(self.args, 10, 100, 4)
        self.done = 10  # steps: the last layer is frozen before
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 48, 3), dtype=np.uint8)).save(file, "png")
        image, crops = EncodedImage({"bytes": file.getvalue(), "path": None}, Reading(3)), MultiCrop(self.args, seed=0)
        self.batch = collate([crops(image, 0, position) for position in range(4)])

    def step(self) -> None:
        now = self.schedule(self.done)
        self.done += 1
        train_step(self.accelerator, self.args, self.state, [self.batch], self.done, now, self.guard)


def test_no_step_reads_from_the_device_but_the_guards_flags_of_the_one_before(monkeypatch):
    training = Training(koleo_weight=0.1)
    training.step()  # states of the optimiser are made
    fields = [field for drawn in training.batch.photometrics for field in drawn]
    on_host = {field.untyped_storage().data_ptr() for field in fields}  # which never goes to the device
    read = []

    def noted(name: str):
        original = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            if self.untyped_storage().data_ptr() not in on_host:
                read.append((name, tuple(self.shape), self is training.guard.found))
            return original(self, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    with Operations() as operations:
        training.step()
    assert len(operations.names) > 100
    assert not [name for name in operations.names if name in WAITING]
    assert read == [("tolist", (3,), True)]  # pinned memory of the host, on a GPU, of the step before


def test_what_follows_backward_does_not_grow_with_the_number_of_parameters():
    """One operation for all parameters each: norms, clipping, optimiser, teacher."""
    counts = []
    for num_hidden_layers in (1, 4):
        training = Training(num_hidden_layers)
        training.step()
        with Operations() as operations:
            training.step()
        after = operations.names[operations.names.index("_foreach_norm") :]
        assert {"_foreach_mul_", "_fused_adamw_", "_foreach_lerp_"} <= set(after)
        counts.append(len(after))
    assert counts[0] == counts[1]
