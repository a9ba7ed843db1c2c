"""A model of ours as an ONNX file that runs without PyTorch: any batch, one image size or any."""

import copy
import io
import logging
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .modeling_dino import DINOForImageClassification, DINOModel


TOLERANCE = 1e-4  # of outputs in onnxruntime against PyTorch's, which above 1 counts in parts of the largest


class _Outputs(nn.Module):
    def __init__(self, model: DINOModel | DINOForImageClassification, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values)
        return tuple(output[name] for name in self.names)


def save_as_onnx(model: DINOModel | DINOForImageClassification, path: Path, dynamic_image_size: bool) -> float:
    """Writes `model`, and runs what was written in onnxruntime.

    Args:
        model: Gives `last_hidden_state` and `pooler_output`, or a classifier's `logits`, of `pixel_values`
            (batch, num_channels, height, width).
        path: `.onnx` file to write.
        dynamic_image_size: Any height and width that the model takes, instead of `config.image_size`.

    Returns:
        The largest difference between onnxruntime's outputs and PyTorch's, over the largest output if that is above 1.

    Raises:
        ValueError: packages that are missing, a network that PyTorch cannot export, or outputs further than 1e-4
            apart; there is no file then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install 'dino-hf[onnx]'") from error
    names = ["logits"] if isinstance(model, DINOForImageClassification) else ["last_hidden_state", "pooler_output"]
    outputs = _Outputs(copy.deepcopy(model), names).eval()
    config, (height, width) = model.config, model.config.image_height_and_width
    step = config.patch_size if config.backbone_config is None else 32
    sizes = [(height, width)]
    if dynamic_image_size:
        sizes += [(2 * step, 3 * step), (height + step, width)]
    examples = [torch.rand(batch, config.num_channels, *sides) for batch, sides in enumerate(sizes + sizes, start=1)]
    try:
        with torch.no_grad():
            expected = [outputs(example) for example in examples]
    except Exception as error:  # of networks that are not ours
        raise ValueError(f"the network does not take images of every size: {_first_line(error)}") from error

    dynamic = torch.export.Dim.DYNAMIC
    shapes = {0: dynamic} | ({2: dynamic, 3: dynamic} if dynamic_image_size else {})
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        try:
            program = torch.onnx.export(
                outputs, (examples[-1],), dynamo=True, dynamic_shapes=(shapes,), input_names=["pixel_values"],
                output_names=names, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = _first_line(error.__cause__ or error)
            raise ValueError(f"PyTorch cannot export this network to ONNX: {reason}") from error
    written = io.BytesIO()
    program.save(written, external_data=False)
    try:
        session = onnxruntime.InferenceSession(written.getvalue(), providers=["CPUExecutionProvider"])
        found = [session.run(None, {"pixel_values": example.numpy()}) for example in examples]
    except Exception as error:  # onnxruntime's have no common class
        raise ValueError(f"onnxruntime cannot run what PyTorch has exported: {_first_line(error)}") from error
    difference = 0.0
    for output, b in zip(chain(*found), chain(*expected), strict=True):
        apart = np.abs(output - b.numpy()).max() / max(1.0, b.abs().max().item())
        difference = max(difference, apart.item())
    if not difference <= TOLERANCE:
        raise ValueError(f"onnxruntime's outputs are {difference:.1e} from PyTorch's, more than {TOLERANCE:.0e}")
    path.write_bytes(written.getvalue())
    return difference


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
