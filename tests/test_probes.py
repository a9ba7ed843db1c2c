"""Logistic regression, few labels and clustering, against scikit-learn's own and by hand."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from evaluation import clustering, few_shot, logistic
from evaluation.__main__ import evaluate_from_command_line
from evaluation.features import read_features
from modeling_dino import DINOModel
from modeling_dino.command_line import run
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .conftest import noise
from .original import recorded, tiny_config
from .test_bad_input import answer


@pytest.fixture(scope="module")
def bank():
    data = recorded("knn")
    return tuple(data[name] for name in ("train_features", "train_labels", "test_features", "test_labels"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DINOModel(tiny_config()).save_pretrained(folder)
    make_image_processor(32, 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Three classes of 12, 12 and 4 training images; `validation` has them too, `test` a fourth besides."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "eel", "fox"])})
    for split, counts in {"train": (12, 12, 4), "validation": (3, 3, 3), "test": (1, 1, 1, 1)}.items():
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        rows = {"image": [noise(rng) for _ in labels], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


# logistic regression


def test_logistic_regression_is_scikit_learns(bank):
    train, test = (normalize(features.double().numpy()) for features in (bank[0], bank[2]))
    reference = LogisticRegression(C=10, tol=1e-12, max_iter=1000).fit(train, bank[1])
    hits, c = logistic.logistic_hits(*bank, c=[10])
    assert c == 10
    assert (hits["logistic_top1"] == (reference.predict(test) == bank[3].numpy())).all()
    assert 20 < 100 * hits["logistic_top1"].mean() < 100
    expected = top_k_accuracy_score(bank[3], reference.predict_proba(test), k=5)
    assert hits["logistic_top5"].mean() == pytest.approx(expected)


def test_many_classes_are_fitted_to_the_end():
    """Where the gradients at the start are already smaller than scikit-learn's tolerance; another solver agrees."""
    rng = np.random.default_rng(0)
    features, labels = normalize(rng.normal(size=(1200, 64))), np.repeat(np.arange(400), 3)
    model, has_converged = logistic.fit(features, labels, 100, 1000)
    expected = LogisticRegression(C=100, solver="newton-cg", tol=1e-9, max_iter=500).fit(features, labels)
    assert has_converged and model.score(features, labels) > 0.9
    np.testing.assert_allclose(model.predict_proba(features), expected.predict_proba(features), atol=1e-5)
    assert LogisticRegression(C=100).fit(features, labels).n_iter_[0] < model.n_iter_[0] / 4


def test_c_is_chosen_on_a_tenth_of_each_class_of_the_training_images(bank, monkeypatch):
    train = normalize(bank[0].double().numpy())
    row_of = {row.tobytes(): index for index, row in enumerate(logistic.normalize(bank[0]))}
    seen = []

    def recorded_fit(features, labels, c, max_iter):
        rows = [row_of[row.tobytes()] for row in features]  # a test image would be none
        seen.append((c, rows))
        assert (labels == bank[1].numpy()[rows]).all()
        return LogisticRegression(C=c, max_iter=max_iter).fit(features, labels), True

    monkeypatch.setattr(logistic, "fit", recorded_fit)
    grid = [0.001, 1.0, 100.0, 1e5]
    _, chosen = logistic.logistic_hits(*bank, c=grid)
    assert [c for c, _ in seen] == [*grid, chosen]
    assert all(rows == seen[0][1] for _, rows in seen[:-1]) and len(seen[-1][1]) == len(train)
    held_out = np.setdiff1d(np.arange(len(train)), seen[0][1])
    counts = np.bincount(bank[1])
    assert (np.bincount(bank[1][held_out]) == np.maximum(1, np.round(counts / 10))).all()
    accuracies = [
        LogisticRegression(C=c, max_iter=1000)
        .fit(train[seen[0][1]], bank[1][seen[0][1]])
        .score(train[held_out], bank[1][held_out])
        for c in grid
    ]
    assert chosen == grid[int(np.argmax(accuracies))] and len(set(accuracies)) > 1


def test_names_are_labels_too_and_the_order_of_images_does_not_matter(bank):
    names = [np.array([f"class {label}" for label in labels.tolist()]) for labels in (bank[1], bank[3])]
    expected, _ = logistic.logistic_hits(*bank, c=[10])
    order = torch.randperm(len(bank[0]))
    hits, _ = logistic.logistic_hits(bank[0][order], names[0][order], bank[2], names[1], c=[10])
    assert (hits["logistic_top1"] == expected["logistic_top1"]).all()


def test_top_k_of_equal_scores_is_decided_by_the_order_of_classes():
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert [logistic.top_k_hits(scores, np.array([0, 2]), k).tolist() for k in (1, 2, 3)] == [
        [True, False],
        [True, True],
        [True, True],
    ]
    with pytest.raises(ValueError, match="labels must be from 0 to 2, .* got 0 to 3"):
        logistic.top_k_hits(scores, np.array([0, 3]), 1)


def test_fits_that_end_early_and_a_c_at_the_end_are_told(bank):
    with pytest.warns(UserWarning, match=r"1 logistic regressions \(C = 10\) stopped after 2 steps"):
        logistic.logistic_hits(*bank, c=[10], max_iter=2)
    with pytest.warns(UserWarning, match="the largest C of all, 0.1, is the best"):
        logistic.logistic_hits(*bank, c=[1e-4, 0.1])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 0, 0, 0], [0, 0], "all training images are of class 0"),
        ([0, 1, 0, 1], [1, 7], "no training images of 1 of the test images' classes, such as 7"),
        (["a", "b", "a", "b"], ["b", "c"], "such as c"),
        ([0, 1, None, 1], [0, 1], "some without"),
        ([0, 1, 2, 3], [0, 1], "no class has two training images"),
        ([], [0, 1], "got 0 and 2"),
    ],
)
def test_labels_that_cannot_be_are_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        logistic.logistic_hits(torch.randn(len(train), 3), train, torch.randn(2, 3), test)


# few labels


def test_as_many_shots_as_there_are_images_are_all_of_them(bank):
    train_features, train_labels, *test = bank
    kept = torch.from_numpy(logistic.draw(train_labels.numpy(), np.full(12, 20), np.random.default_rng(0)))
    train = train_features[kept], train_labels[kept]
    hits = few_shot.few_shot_hits(*train, *test, shots=20, num_draws=2)
    expected, _ = logistic.logistic_hits(*train, *test, c=[400])
    assert (hits["logistic"] == expected["logistic_top1"]).all() and hits["logistic"].shape == (2, len(test[0]))
    rows = normalize(train[0].double().numpy())
    means = np.stack([rows[train[1] == label].mean(0) for label in range(12)])
    nearest = KNeighborsClassifier(1, metric="cosine").fit(means, range(12)).predict(test[0].double())
    assert (hits["class_mean"] == (nearest == test[1].numpy())).all()


def test_draws_have_the_numbers_asked_for_and_every_image_its_chance():
    labels = np.array([2, 0, 1, 0, 0, 2, 1, 0, 0])
    drawn = [logistic.draw(labels, np.array([2, 0, 1]), np.random.default_rng(seed)) for seed in range(400)]
    assert all(sorted(labels[indices]) == [0, 0, 2] and len(set(indices)) == 3 for indices in drawn)
    chances = np.bincount(np.concatenate(drawn), minlength=9) / 400
    np.testing.assert_allclose(chances, [0.5, 0.4, 0, 0.4, 0.4, 0.5, 0, 0.4, 0.4], atol=0.08)


def test_percents_are_of_each_class_and_one_image_at_least(bank, monkeypatch):
    train_labels = np.array([0] * 400 + [1] * 250 + [2] * 50)
    numbers = []

    def recorded_fit(features, labels, c, max_iter):
        numbers.append(np.bincount(labels).tolist())
        return LogisticRegression(C=c).fit(features, labels), True

    monkeypatch.setattr(few_shot, "fit", recorded_fit)
    for percent in (0.5, 1, 10):
        few_shot.few_shot_hits(bank[0], train_labels, bank[2], bank[3] % 3, percent=percent, num_draws=1)
    assert numbers == [[2, 1, 1], [4, 2, 1], [40, 25, 5]]


def test_draws_go_by_the_seed_and_more_of_them_begin_with_the_same(bank):
    two, three, other = (
        few_shot.few_shot_hits(*bank, shots=1, num_draws=draws, seed=seed)["class_mean"]
        for draws, seed in ((2, 0), (3, 0), (2, 1))
    )
    assert (three[:2] == two).all() and (two != other).any() and (two[0] != two[1]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 1000}, r"shots must be at most \d+, the number of training images of class \d, got 1000"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"percent": 101}, "at most 100"),
        ({"percent": 1, "num_draws": 0}, "num_draws"),
        ({"shots": 1, "percent": 1}, "either shots or percent"),
        ({}, "either shots or percent"),
    ],
)
def test_settings_that_cannot_be_are_refused(bank, settings, message):
    with pytest.raises(ValueError, match=message):
        few_shot.few_shot_hits(*bank, **settings)


# clustering


def test_k_means_finds_classes_that_lie_apart_whatever_the_length_of_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(25)
    features = torch.eye(4, 8)[labels] + 0.05 * torch.randn(100, 8, generator=generator)
    clusters = clustering.k_means(features * torch.rand(100, 1, generator=generator).add(0.01).mul(100), 4)
    assert clustering.clustering_scores(labels.numpy(), clusters) == pytest.approx({"nmi": 1, "ari": 1, "accuracy": 1})
    for num_clusters in (1, 101):
        with pytest.raises(ValueError, match=f"from 2 to the 100 images .* got {num_clusters}"):
            clustering.k_means(features, num_clusters)


@pytest.mark.parametrize("num_clusters", [2, 3, 4])
def test_clustering_scores_are_scikit_learns_and_the_best_assignment(num_clusters):
    rng = np.random.default_rng(num_clusters)
    labels, clusters = rng.integers(0, 3, 60), rng.integers(0, num_clusters, 60)
    scores = clustering.clustering_scores([f"class {label}" for label in labels], clusters)
    assert scores["nmi"] == normalized_mutual_info_score(labels, clusters)
    assert scores["ari"] == adjusted_rand_score(labels, clusters)
    names = [*range(3), *[-1] * num_clusters]  # clusters may be left over, and classes too
    best = max(
        np.mean(np.array(assigned)[clusters] == labels) for assigned in itertools.permutations(names, num_clusters)
    )
    assert scores["accuracy"] == pytest.approx(best)


def test_intervals_are_as_wide_as_other_images_would_make_them_and_around_the_value(monkeypatch):
    """Of 100 clusters of 1000 images; the plain percentiles of resamples do not even contain the value."""
    rng = np.random.default_rng(0)

    def images():
        labels = rng.integers(0, 100, 1000)
        return labels, np.where(rng.random(1000) < 0.5, labels, rng.integers(0, 100, 1000))

    monkeypatch.setattr(clustering, "NUM_RESAMPLES", 200)
    labels, clusters = images()
    intervals = clustering.clustering_intervals(labels, clusters)
    others = [clustering.clustering_scores(*images()) for _ in range(200)]
    for name, value in clustering.clustering_scores(labels, clusters).items():
        low, high = intervals[name]
        assert low < value < high
        assert (high - low) / 3.92 == pytest.approx(np.std([scores[name] for scores in others]), rel=0.35)


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [([0, 1], [0], "got 2 and 1"), ([], [], "got 0 and 0"), ([0, None], [0, 1], "some without")],
)
def test_clusters_of_what_has_no_labels_are_refused(labels, clusters, message):
    with pytest.raises(ValueError, match=message):
        clustering.clustering_scores(labels, clusters)


# commands


def report_of(*argv) -> dict:
    evaluate_from_command_line([str(arg) for arg in argv])
    (report,) = json.loads(argv[-1].read_text())
    return report


def test_commands_report_what_the_functions_find(model, small_folder, tmp_path):
    """From kept features; with a class that has too few images for one setting of few shots."""
    kept, output = tmp_path / "features", tmp_path / "report.json"
    data = ("--dataset_name", small_folder, "--eval_split", "validation", "--features", kept)
    report = report_of("logistic", "--model", model, *data, "--c", 10, "--output", output)
    train, test = (read_features(kept / f"{split}.parquet") for split in ("train", "validation"))
    splits = train.features, train.labels, test.features, test.labels
    hits, c = logistic.logistic_hits(*splits, c=[10])
    assert report["values"] == {"logistic_top1": pytest.approx(100 * hits["logistic_top1"].mean())}
    assert report["data"]["selected_c"] == c == 10
    assert report["data"]["test"]["num_images"] == 9 and set(report["intervals"]) == {"logistic_top1"}

    few = ("few_shot", "--shots", 5, 2, "--percent", 10, "--num_draws", 3, "--eval_split", "validation")
    with pytest.warns(UserWarning, match="no 5 shots: class eel has only 4 training images"):
        report = report_of(*few, "--features", kept, "--overwrite", "--output", output)
    expected = {}
    for name, setting in {"2_shot": {"shots": 2}, "10_percent": {"percent": 10}}.items():
        for classifier, hits in few_shot.few_shot_hits(*splits, **setting, num_draws=3).items():
            expected[f"{classifier}_{name}"] = 100 * hits.mean()
            expected[f"{classifier}_{name}_std"] = 100 * np.std([draw.mean() for draw in hits], ddof=1)
    assert report["values"] == pytest.approx(expected)
    assert set(report["intervals"]) == {name for name in expected if not name.endswith("_std")}

    argv = ("clustering", "--eval_split", "validation", "--features", kept, "--overwrite")
    report = report_of(*argv, "--output", output)
    scores = clustering.clustering_scores(test.labels, clustering.k_means(test.features, 3))
    assert report["values"] == pytest.approx({f"kmeans_{name}": 100 * value for name, value in scores.items()})
    for name, (low, high) in report["intervals"].items():
        assert low <= report["values"][name] <= high


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["logistic"], "no training images of 1 of the test images' classes, such as 3"),
        (["logistic", "--eval_split", "train"], "logistic learns from one split and is measured on another"),
        (["logistic", "--eval_split", "validation", "--c", "0"], "c must be above 0"),
        (
            ["few_shot", "--eval_split", "validation", "--shots", "9", "--percent"],
            "at most 4, the number of training images of class eel, got 9",
        ),
        (["few_shot", "--eval_split", "validation", "--shots", "--percent"], "give --shots or --percent"),
        (["clustering", "--num_clusters", "5"], "num_clusters must be from 2 to the 4 images"),
    ],
)
def test_what_commands_cannot_do_is_told_in_a_line(model, small_folder, argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            "dino-eval",
            evaluate_from_command_line,
            [*argv, "--model", model, "--dataset_name", str(small_folder)],
        )
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def assignments_of(path, *argv) -> list[dict]:
    evaluate_from_command_line(list(map(str, ["clustering", *argv, "--assignments", path])))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scikit_learns(features, num_clusters: int) -> list[str]:
    points = normalize(features.numpy())
    return [str(cluster) for cluster in KMeans(num_clusters, n_init=10, random_state=0).fit_predict(points)]


def test_unlabeled_images_get_clusters_and_no_scores(model, flat_folder, tmp_path, capsys):
    data = ("--dataset_name", flat_folder, "--num_clusters", 3)
    rows = assignments_of(tmp_path / "new/c.csv", "--model", model, *data)
    assert capsys.readouterr().out == f"wrote {tmp_path}/new/c.csv\n"
    assert [row["name"] for row in rows] == sorted(path.name for path in flat_folder.iterdir())
    evaluate_from_command_line(
        ["features", "--model", model, "--dataset_name", str(flat_folder), "--features", str(tmp_path)]
    )
    features = read_features(tmp_path / "train.parquet").features
    assert [row["cluster"] for row in rows] == scikit_learns(features, 3) and list(rows[0]) == ["name", "cluster"]
    kept = assignments_of(tmp_path / "kept.csv", "--features", tmp_path, "--num_clusters", 3)
    assert [row["cluster"] for row in kept] == [row["cluster"] for row in rows]
    capsys.readouterr()
    evaluate_from_command_line(list(map(str, ["clustering", "--model", model, *data])))
    assert capsys.readouterr().out == (tmp_path / "new/c.csv").read_text()  # printed


def test_labeled_images_get_clusters_and_scores(model, small_folder, tmp_path):
    argv = ("--model", model, "--dataset_name", small_folder, "--eval_split", "validation", "--num_clusters", 4)
    report = tmp_path / "r.json"
    rows = assignments_of(tmp_path / "c.csv", *argv, "--output", report, "--features", tmp_path / "f")
    kept = read_features(tmp_path / "f/validation.parquet")
    assert [row["cluster"] for row in rows] == scikit_learns(kept.features, 4)
    assert [row["label"] for row in rows] == ["cat"] * 3 + ["dog"] * 3 + ["eel"] * 3
    assert [row["name"] for row in rows] == list(map(str, range(9)))
    (found,) = json.loads(report.read_text())
    nmi = normalized_mutual_info_score([row["label"] for row in rows], [row["cluster"] for row in rows])
    assert found["values"]["kmeans_nmi"] == pytest.approx(100 * nmi) and "assignments" not in found["settings"]


def test_partly_labeled_images_are_scored_on_their_labels(model, tmp_path):
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [noise(rng) for _ in range(6)], "label": [0, 1, None, 0, 1, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = ("--model", model, "--dataset_name", tmp_path / "train.parquet")
    with pytest.warns(UserWarning, match="2 of the 6 images of train have no label and do not count"):
        found = assignments_of(tmp_path / "c.csv", *data, "--num_clusters", 2, "--output", tmp_path / "r.json")
    assert [row["label"] for row in found] == ["cat", "dog", "", "cat", "dog", ""]
    labeled = [row for row in found if row["label"]]
    nmi = normalized_mutual_info_score([row["label"] for row in labeled], [row["cluster"] for row in labeled])
    [report] = json.loads((tmp_path / "r.json").read_text())
    assert report["values"]["kmeans_nmi"] == pytest.approx(100 * nmi)


def test_bad_assignments_give_one_line_error(model, flat_folder, tmp_path, capsys):
    def ask(*more):
        argv = ["clustering", "--model", model, "--dataset_name", flat_folder, *more]
        return answer(evaluate_from_command_line, argv, capsys)

    assert "num_clusters must be given for images without labels, got none: split train of" in ask()
    assert "output must be left out for images" in ask("--num_clusters", 2, "--output", tmp_path / "r.json")
    assert "assignments must end in .csv, got x.json" in ask("--num_clusters", 2, "--assignments", "x.json")
    assert "--assignments is for one model, got 2" in ask(
        "--num_clusters", 2, "--assignments", "x.csv", "--model", model, model
    )
    (tmp_path / "c.csv").write_text("name,cluster,mine\n")
    message = ask("--num_clusters", 2, "--assignments", tmp_path / "c.csv")
    assert "c.csv exists and is not from dino-eval clustering" in message
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


@pytest.mark.parametrize("protocol", ["logistic", "clustering"])
def test_images_without_labels_are_told(model, flat_folder, protocol):
    argv = [protocol, "--model", model, "--dataset_name", str(flat_folder), "--eval_split", "train"]
    with pytest.raises(ValueError, match="has no labels" if protocol == "clustering" else "learns from one split"):
        evaluate_from_command_line(argv)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model, small_folder, tmp_path):
    argv = ("few_shot", "--model", model, "--dataset_name", small_folder, "--eval_split", "validation", "--shots", 2)
    one = report_of(*argv, "--output", tmp_path / "one.json")
    finished = command(*argv, "--output", tmp_path / "two.json", processes=2, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    (two,) = json.loads((tmp_path / "two.json").read_text())
    assert two["values"] == pytest.approx(one["values"]) and two["intervals"] == one["intervals"]
    assert finished.stdout.count("in percent, 95 % interval") == 1  # of one table
