"""How often a query finds something among the first k, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from evaluation.metrics import ranks_of_positives
from evaluation.retrieval import recall_at_k


CITATION = """\
@inproceedings{song2016deep,
  title={Deep Metric Learning via Lifted Structured Feature Embedding},
  author={Oh Song, Hyun and Xiang, Yu and Jegelka, Stefanie and Savarese, Silvio},
  booktitle={CVPR},
  year={2016}
}"""


class RecallAtK(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of queries that find at least one of what they should among the first k.",
            citation=CITATION,
            inputs_description="predictions: each query's similarity with each entry of the database; references: "
            "1 for what it should find, 0 for what it should not, -1 for what is taken out of the ranking; and, of "
            "`compute`, k (1, 5, 10)",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1511.06452"],
        )

    def _compute(self, predictions, references, k=(1, 5, 10)):
        ranks = [ranks_of_positives(*query) for query in zip(predictions, references)]
        ranks = [found for found in ranks if len(found)]
        if not ranks:
            raise ValueError("no query has anything to find (relevance 1)")
        ks = [k] if isinstance(k, int) else k
        if min(ks) < 1:
            raise ValueError(f"k must be at least 1, got {min(ks)}")
        return {f"recall_at_{k}": float(np.mean([recall_at_k(found, k) for found in ranks])) for k in ks}
