"""k-NN on the scale of ImageNet: time and memory on top of the bank, as the number of queries grows.

    python benchmarks/knn.py [--bank 1281167] [--queries 50000] [--hidden 384] [--output benchmarks/results/knn.json]

Features are random, of 1000 classes, in fp32 on the CPU (or `--device cuda`). Each share of the queries (a fortieth, a
twentieth, a tenth) is timed in a process of its own; with `--whole` all of them, too. Beside it, on the smallest
share, scikit-learn's KNeighborsClassifier (brute force, cosine), which a user would pick instead.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from measuring import environment, save

from evaluation.knn import knn_accuracy


KS = (10, 20, 100, 200)


def make_bank(num_images: int, hidden_size: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (images, hidden) around the centres of 1000 classes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(1000, hidden_size, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1000, (num_images,), generator=generator)
    features = torch.empty(num_images, hidden_size)
    for rows in torch.arange(num_images).split(65536):
        features[rows] = centers[labels[rows]] + 3 * torch.randn(len(rows), hidden_size, generator=generator)
    return features.to(device), labels


def scikit_learn(train, train_labels, test, test_labels) -> dict[str, float]:
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(20, metric="cosine", algorithm="brute", n_jobs=-1, weights="distance")
    return {"top1": 100 * classifier.fit(train, train_labels).score(test, test_labels)}


def ours(train, train_labels, test, test_labels) -> dict[str, float]:
    return knn_accuracy(train, train_labels, test, test_labels, k=KS)


def peak_memory(device: str) -> float:
    """In MiB, since the process started."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace) -> None:
    """Prints seconds, peak memory on top of what was there before, and the accuracies."""
    train, test = (make_bank(n, args.hidden, seed, args.device) for n, seed in ((args.bank, 1), (args.num, 2)))
    before = peak_memory(args.device)
    start = time.perf_counter()
    accuracies = {"ours": ours, "scikit-learn": scikit_learn}[args.variant](*train, *test)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib_on_top": peak_memory(args.device) - before, "values": accuracies}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bank", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true", help="also all queries, not a tenth of them at most")
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of this one measures
    parser.add_argument("--num", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return measure(args)
    shares = [max(1, args.queries // share) for share in (40, 20, 10)] + [args.queries] * args.whole
    results = []
    print(f"{'':14}{'queries':>9}{'seconds':>10}{'per 1000':>10}{'MiB on top':>12}")
    for variant, number in [*(("ours", number) for number in shares), ("scikit-learn", shares[0])]:
        command = [sys.executable, __file__, "--variant", variant, "--num", str(number), "--device", args.device,
                   "--bank", str(args.bank), "--hidden", str(args.hidden)]  # fmt: skip
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = {"variant": variant, "queries": number} | json.loads(answer.stdout.splitlines()[-1])
        results.append(found)
        per_thousand = 1000 * found["seconds"] / number
        print(
            f"{variant:14}{number:>9}{found['seconds']:>10.1f}{per_thousand:>10.2f}{found['mib_on_top']:>12.0f}",
            flush=True,
        )
    save(args.output, environment(["torch", "scikit-learn"], args.device), results)


if __name__ == "__main__":
    main()
