"""Mean average precision of rankings, as Revisited Oxford and Paris measure it, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from evaluation.metrics import ranks_of_positives
from evaluation.retrieval import average_precision


CITATION = """\
@inproceedings{radenovic2018revisiting,
  title={Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking},
  author={Radenovi{\\'c}, Filip and Iscen, Ahmet and Tolias, Giorgos and Avrithis, Yannis and Chum, Ond{\\v{r}}ej},
  booktitle={CVPR},
  year={2018}
}"""


class MeanAveragePrecision(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Mean over queries of the area under the precision-recall curve, by trapezoids.",
            citation=CITATION,
            inputs_description="predictions: each query's similarity with each entry of the database; references: "
            "1 for what it should find, 0 for what it should not, -1 for what is taken out of the ranking",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1803.11285"],
        )

    def _compute(self, predictions, references):
        ranks = [ranks_of_positives(*query) for query in zip(predictions, references)]
        values = [average_precision(found, len(found)) for found in ranks if len(found)]
        if not values:
            raise ValueError("no query has anything to find (relevance 1)")
        return {"mean_average_precision": float(np.mean(values))}
