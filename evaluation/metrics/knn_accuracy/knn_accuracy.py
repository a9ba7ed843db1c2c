"""Accuracy of a weighted vote of the nearest training images, as an `evaluate` metric."""

import datasets
import evaluate
import torch

from evaluation.knn import knn_hits


CITATION = """\
@inproceedings{caron2021emerging,
  title={Emerging Properties in Self-Supervised Vision Transformers},
  author={Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien and
    Bojanowski, Piotr and Joulin, Armand},
  booktitle={ICCV},
  year={2021}
}"""


class KnnAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy of the weighted k-nearest-neighbour classifier of DINO.",
            citation=CITATION,
            inputs_description="predictions: features of the test images; references: their labels; of `compute`, "
            "also train_features, train_labels, k (10, 20, 100, 200) and temperature (0.07)",
            features=[
                datasets.Features(
                    {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value(label)}
                )
                for label in ("int64", "string")
            ],
            reference_urls=["https://arxiv.org/abs/2104.14294"],
        )

    def _compute(self, predictions, references, train_features, train_labels, k=(10, 20, 100, 200), temperature=0.07):
        train_features, test_features = (torch.as_tensor(part) for part in (train_features, predictions))
        hits = knn_hits(train_features, train_labels, test_features, references, k, temperature)
        return {name: float(hit.mean()) for name, hit in hits.items()}
