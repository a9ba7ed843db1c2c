"""Several protocols on several models: one table."""

import csv
import json
import shutil

import pytest
import yaml
from PIL import Image

from evaluation import suite
from evaluation.__main__ import evaluate_from_command_line
from evaluation.outputs import is_from

from .test_bad_input import answer
from .test_features import ours  # noqa: F401


KNN = {"protocol": "knn", "dataset_name": "images", "k": [1, 5], "show": ["knn_5_top1"]}
MASKS = {"protocol": "knn", "dataset_name": "elsewhere", "k": [3]}


@pytest.fixture
def config(tmp_path):
    def write(*entries, **data):
        path = tmp_path / "suite.yaml"
        data = {"images": "nowhere/images", "elsewhere": "./nowhere/else"} | data
        path.write_text(yaml.safe_dump({"data": data, "measure": list(entries)}))
        return path

    return write


@pytest.fixture
def flags(ours, config, parquet_folder, tmp_path):  # noqa: F811
    def make(*entries, models=None, **data):
        models = models or [ours, f"raw_pixels:{ours}"]
        argv = ["suite", "--config", config(*entries), "--data", f"images={parquet_folder}", "--model", *models]
        return [str(arg) for arg in (*argv, "--output_dir", tmp_path / "suite")]

    return make


def test_table_has_the_commands_values(flags, ours, parquet_folder, tmp_path, capsys):  # noqa: F811
    evaluate_from_command_line(flags(KNN, MASKS))
    printed = capsys.readouterr().out
    assert "\nknn, images\nin percent" in printed and "\nk-NN, k = 5, top-1" in printed and "k = 1," not in printed
    assert max(map(len, printed.splitlines()[-8:-1])) <= 80
    assert "left out: there is no elsewhere here; say where it lies by --data elsewhere=PLACE" in printed
    argv = ["knn", "--model", str(ours), f"raw_pixels:{ours}", "--dataset_name", str(parquet_folder), "--k", "1", "5"]
    evaluate_from_command_line([*argv, "--output", str(tmp_path / "knn.json")])
    expected = json.loads((tmp_path / "knn.json").read_text())
    lines = list(csv.DictReader((tmp_path / "suite/table.csv").read_text().splitlines()))
    assert [(line["name"], line["model"]) for line in lines] == [
        ("knn_5_top1", str(ours)),
        ("knn_5_top1", f"raw_pixels:{ours}"),
    ]
    for line, report in zip(lines, expected):
        assert float(line["value"]) == report["values"]["knn_5_top1"]
        assert [float(line["low"]), float(line["high"])] == report["intervals"]["knn_5_top1"]
        assert f"{report['values']['knn_5_top1']:.2f} [" in (tmp_path / "suite/table.md").read_text()
    assert expected[0]["model"]["revision"] == lines[0]["revision"] != lines[1]["revision"]
    with Image.open(tmp_path / "suite/table.png") as picture:
        assert picture.width > picture.height
    assert all(is_from(tmp_path / f"suite/table{suffix}", "suite") for suffix in (".png", ".pdf", ".svg"))


def test_suite_goes_on_after_the_last_report(flags, monkeypatch):
    measured, measure_model = [], suite.measure_model

    def measure_once(args):
        if measured:
            raise KeyboardInterrupt
        measured.append(args.model)
        return measure_model(args)

    monkeypatch.setattr(suite, "measure_model", measure_once)
    with pytest.raises(KeyboardInterrupt):
        evaluate_from_command_line(flags(KNN))
    monkeypatch.setattr(suite, "measure_model", lambda args: measured.append(args.model) or measure_model(args))
    evaluate_from_command_line(flags(KNN))
    assert len(measured) == len(set(measured)) == 2


def test_measurement_that_fails_does_not_take_the_others_along(flags, ours, tmp_path, capsys):  # noqa: F811
    shutil.copytree(ours, tmp_path / "broken", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    message = answer(evaluate_from_command_line, flags(KNN, models=[tmp_path / "broken", ours]), capsys)
    assert f"1 of 2 measurements failed: knn, images: {tmp_path / 'broken'}: " in message
    assert len((tmp_path / "suite/table.csv").read_text().splitlines()) == 2


def test_mistyped_model_is_told_first(flags, ours, tmp_path, capsys):  # noqa: F811
    message = answer(evaluate_from_command_line, flags(KNN, models=[ours, tmp_path / "nothing"]), capsys)
    assert f"there is no folder {tmp_path / 'nothing'} with a model" in message
    assert not (tmp_path / "suite").exists()


def test_changed_data_is_measured_anew(flags, parquet_folder, tmp_path, capsys):
    shutil.copytree(parquet_folder, tmp_path / "data")
    argv = flags(KNN)
    argv[argv.index("--data") + 1] = f"images={tmp_path / 'data'}"
    evaluate_from_command_line(argv)
    first = (tmp_path / "suite/table.csv").read_text()
    evaluate_from_command_line(argv)
    assert capsys.readouterr().out.count("(was there already)") == 2
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    shutil.copy(tmp_path / "data/train-00000-of-00002.parquet", tmp_path / "data/train-00001-of-00002.parquet")
    evaluate_from_command_line(argv)
    assert "(was there already)" not in capsys.readouterr().out
    assert (tmp_path / "suite/table.csv").read_text() != first


def test_value_that_one_model_lacks_leaves_its_cell_empty(flags, ours, tmp_path):  # noqa: F811
    few = {"protocol": "few_shot", "dataset_name": "images", "shots": [1], "percent": [], "num_draws": 2}
    evaluate_from_command_line(flags(KNN, few, KNN | {"k": [7], "show": ["knn_7_top1"]}))
    table = (tmp_path / "suite/table.md").read_text()
    assert "| few_shot, images | logistic, 1 label a class |" in table
    assert "| knn, images, k [1, 5] | k-NN, k = 5, top-1 |" in table
    assert "| knn, images, k [7] | k-NN, k = 7, top-1 |" in table


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (KNN | {"protocol": "kn"}, "entry 1: there is no protocol kn, did you mean knn?"),
        (KNN | {"temprature": 1}, "there is no option --temprature, did you mean --temperature?"),
        (KNN | {"dataset_name": "imags"}, "entry 1: it must name one entry of `data`, got none"),
        (KNN | {"show": ["knn_6_top1"]}, "knn, images has no value knn_6_top1 to show, did you mean"),
        (MASKS, "none of the data of"),
        (KNN | {"protocol": "attention"}, "entry 1: there is no protocol attention"),
    ],
)
def test_bad_configs(flags, entry, message, capsys):
    assert message in answer(evaluate_from_command_line, flags(entry), capsys)


def test_bad_data(flags, capsys):
    argv = flags(KNN)
    argv[argv.index("--data") + 1] = "image=x"
    assert "has no data named image, did you mean images?" in answer(evaluate_from_command_line, argv, capsys)
    argv[argv.index("--data") + 1] = "images=./nowhere"
    assert "there is no ./nowhere, given by --data" in answer(evaluate_from_command_line, argv, capsys)
    argv[argv.index("--data") + 1] = "images"
    assert "data must be written as name=place, got images" in answer(evaluate_from_command_line, argv, capsys)
