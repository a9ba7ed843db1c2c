"""How often the right class is among the k best, as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

from evaluation.logistic import top_k_hits


CITATION = """\
@article{russakovsky2015imagenet,
  title={ImageNet Large Scale Visual Recognition Challenge},
  author={Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
    Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
    Fei-Fei, Li},
  journal={International Journal of Computer Vision},
  year={2015}
}"""


class TopKAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images whose class is among the k with the highest scores.",
            citation=CITATION,
            inputs_description="predictions: each image's scores of all classes, or its predicted class; references: "
            "indices of the right classes; of `compute`, also k (1)",
            features=[
                datasets.Features({"predictions": prediction, "references": datasets.Value("int64")})
                for prediction in (datasets.List(datasets.Value("float64")), datasets.Value("int64"))
            ],
        )

    def _compute(self, predictions, references, k=(1,)):
        ks = [k] if isinstance(k, int) else k
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.ndim == 1:
            if list(ks) != [1]:
                raise ValueError(f"k must be 1 where predictions are classes and not the scores of all, got {ks}")
            return {"top_1_accuracy": float(np.mean(predictions == references))}
        return {f"top_{k}_accuracy": float(top_k_hits(predictions, references, k).mean()) for k in ks}
