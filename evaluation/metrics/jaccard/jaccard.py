"""Intersection over union of masks, the J of DAVIS, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from evaluation.metrics import masks
from evaluation.video_segmentation import jaccard


CITATION = """\
@inproceedings{perazzi2016benchmark,
  title={A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation},
  author={Perazzi, Federico and Pont-Tuset, Jordi and McWilliams, Brian and Van Gool, Luc and Gross, Markus and
    Sorkine-Hornung, Alexander},
  booktitle={CVPR},
  year={2016}
}"""


class Jaccard(evaluate.Metric):
    def _info(self):
        mask = datasets.List(datasets.List(datasets.Value("bool")))
        return evaluate.MetricInfo(
            description="Mean over masks of the intersection over the union; 1 where both are empty.",
            citation=CITATION,
            inputs_description="predictions: boolean masks (height, width); references: the right ones",
            features=datasets.Features({"predictions": mask, "references": mask}),
            reference_urls=["https://davischallenge.org"],
        )

    def _compute(self, predictions, references):
        return {"jaccard": float(np.mean([jaccard(*masks(*pair)) for pair in zip(predictions, references)]))}
