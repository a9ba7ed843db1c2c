"""F measure of the boundaries of masks, the F of DAVIS, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from evaluation.metrics import masks
from evaluation.video_segmentation import boundary_f_measure


CITATION = """\
@inproceedings{perazzi2016benchmark,
  title={A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation},
  author={Perazzi, Federico and Pont-Tuset, Jordi and McWilliams, Brian and Van Gool, Luc and Gross, Markus and
    Sorkine-Hornung, Alexander},
  booktitle={CVPR},
  year={2016}
}"""


class BoundaryF(evaluate.Metric):
    def _info(self):
        mask = datasets.List(datasets.List(datasets.Value("bool")))
        return evaluate.MetricInfo(
            description="Mean over masks of the F measure of their boundaries, which may be a few pixels apart.",
            citation=CITATION,
            inputs_description="predictions: boolean masks (height, width); references: the right ones; and, of "
            "`compute`, tolerance (0.008), the distance allowed, as a share of the image's diagonal",
            features=datasets.Features({"predictions": mask, "references": mask}),
            reference_urls=["https://davischallenge.org"],
        )

    def _compute(self, predictions, references, tolerance=0.008):
        values = [boundary_f_measure(*masks(*pair), tolerance) for pair in zip(predictions, references)]
        return {"boundary_f": float(np.mean(values))}
