"""How well clusters agree with classes, as an `evaluate` metric."""

import datasets
import evaluate

from evaluation.clustering import clustering_scores


CITATION = """\
@article{hubert1985comparing,
  title={Comparing partitions},
  author={Hubert, Lawrence and Arabie, Phipps},
  journal={Journal of Classification},
  year={1985}
}"""


class ClusteringScores(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Normalised mutual information, adjusted Rand index and accuracy of the best assignment.",
            citation=CITATION,
            inputs_description="predictions: each image's cluster; references: its class",
            features=[
                datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value(label)})
                for label in ("int64", "string")
            ],
            reference_urls=["https://scikit-learn.org/stable/modules/clustering.html"],
        )

    def _compute(self, predictions, references):
        return clustering_scores(references, predictions)
