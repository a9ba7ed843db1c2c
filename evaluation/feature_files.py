"""Files of features: one Parquet, .npz or CSV for each split, which names its origin.

A Parquet file has a row for each image, in the dataset's order:

    name        string                   file path relative to the dataset's folder, else the row's path or number
    label       int64, string or a list  null for images without; only if the dataset has labels
    class_name  string                   only if the dataset names its classes
    features    fixed_size_list<float>   (hidden,), or (patches, hidden) of patch tokens
    pixel_hash  int64                    equal for images of equal pixels

One line reads it:

    pandas.read_parquet("features/train.parquet")  # numpy.stack(table["features"]) is (images, hidden)
    polars.read_parquet("features/train.parquet")
    datasets.Dataset.from_parquet("features/train.parquet")

The schema's metadata has the manifest as JSON under `dino_hf`: model, dataset, image processor and what else the
features depend on, and the images that could not be decoded. An .npz has the columns and the manifest as arrays. A CSV
has the features as columns f0, f1, ..., and its manifest and failed images in files beside it.
"""

import csv
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from modeling_dino.command_line import check_files

from .outputs import mark, replacing, write_text


KEY = "dino_hf"  # of the manifest
# `num_images` counts rows, `failed` lists the other images of the split as {name, reason, row}
MANIFEST = ("model", "data", "image_processor", "dtype", "tokens", "class_names", "num_images", "failed")
# what libraries raise for damaged files and files of other kinds
_ERRORS = (pa.ArrowException, zipfile.BadZipFile, zlib.error, EOFError, OSError)
_ERRORS += (ValueError, TypeError, AttributeError, KeyError)


def make_table(
    names: Sequence[str],
    labels: Sequence,
    hashes: np.ndarray,
    features: torch.Tensor,
    label_type: pa.DataType | None,
    class_names: Sequence[str] | None,
) -> pa.Table:
    """Return the columns of a Parquet file.

    Args:
        names: Names of the images.
        labels: Their labels; None, and -1 where classes are named, for images without.
        hashes: (images,) in int64.
        features: (images, hidden) or (images, patches, hidden).
        label_type: Type of the labels in the dataset; None if it has no labels.
        class_names: Names of the classes, if there are any.
    """
    columns = {"name": pa.array(names, pa.string())}
    if label_type is not None:
        if class_names:
            labels = [None if label == -1 else label for label in labels]
        columns["label"] = pa.array(labels, pa.int64() if pa.types.is_integer(label_type) else label_type)
        if class_names:
            names = [None if label is None else class_names[label] for label in labels]
            columns["class_name"] = pa.array(names, pa.string())
    values = pa.array(features.float().contiguous().numpy().reshape(-1))
    for size in reversed(features.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return pa.table(columns | {"features": values, "pixel_hash": pa.array(hashes, pa.int64())})


def write_part(path: Path, table: pa.Table, manifest: dict) -> None:
    """Write a Parquet file of one row group."""
    with replacing(path) as temporary, _open_writer(temporary, table.schema, manifest) as writer:
        if len(table):
            writer.write_table(table, row_group_size=len(table))


def _open_writer(path: Path, schema: pa.Schema, manifest: dict) -> pq.ParquetWriter:
    schema = schema.with_metadata({KEY: json.dumps(manifest)})
    texts = [name for name in ("label", "class_name") if name in schema.names]
    return pq.ParquetWriter(path, schema, use_dictionary=texts, write_page_checksum=True)


def write_parquet(path: Path, parts: Sequence[Path], manifest: dict) -> None:
    """Write parts into one Parquet file, a row group for each, with one part in memory at a time."""
    with replacing(path) as temporary, _open_writer(temporary, pq.read_schema(parts[0]), manifest) as writer:
        for table in _tables(parts):
            writer.write_table(table, row_group_size=len(table))


def write_npz(path: Path, parts: Sequence[Path], manifest: dict) -> None:
    """Write parts into an .npz file that `numpy.load` reads without pickles, one part in memory at a time.

    Missing integer labels are -1, other missing labels are empty text, and lists of labels are JSON.
    """
    columns: dict[str, list] = {}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            for number, table in enumerate(_tables(parts)):
                rows = to_matrix(table["features"])
                if number == 0:
                    shape = (manifest["num_images"], *rows.shape[1:])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows.astype("<f4").tobytes())
                for name in table.column_names:
                    if name != "features":
                        columns.setdefault(name, []).extend(_without_nulls(table[name]))
        failed = [(image["name"], image["reason"]) for image in manifest["failed"]]
        arrays = {name: np.array(values) for name, values in columns.items()}
        arrays |= {"failed": np.array(failed, dtype=str).reshape(-1, 2), KEY: np.array(json.dumps(manifest))}
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        archive.comment = mark("features").encode()


def _without_nulls(column: pa.ChunkedArray) -> list:
    kind, values = column.type, column.to_pylist()
    if pa.types.is_nested(kind):
        return _as_json(column)
    if pa.types.is_floating(kind):
        return [math.nan if value is None else value for value in values]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return [-1 if value is None else value for value in values]
    return ["" if value is None else str(value) for value in values]


def _as_json(column: pa.ChunkedArray) -> list[str]:
    return [json.dumps(value) for value in column.to_pylist()]


def write_csv(path: Path, parts: Sequence[Path], manifest: dict) -> None:
    """Write parts into a CSV file, one part in memory at a time; and its manifest and failed images beside it."""
    _, failed, described = files_of(path)
    with replacing(path) as temporary:
        writer = None
        for table in _tables(parts):
            rows = to_matrix(table["features"])
            columns = {name: table[name] for name in table.column_names if name not in ("features", "pixel_hash")}
            if "label" in columns and pa.types.is_nested(columns["label"].type):
                columns["label"] = pa.array(_as_json(columns["label"]))
            columns |= {f"f{number}": pa.array(column) for number, column in enumerate(rows.T)}
            table = pa.table(columns)
            writer = writer or pyarrow.csv.CSVWriter(temporary, table.schema)
            writer.write_table(table)
        writer.close()
        path.resolve().unlink(missing_ok=True)  # a manifest is of the CSV beside it, never of an older one
        with replacing(failed) as beside, beside.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(("name", "reason"))
            lines.writerows((image["name"], image["reason"]) for image in manifest["failed"])
        write_text(described, json.dumps(manifest, indent=2))


WRITERS = {".parquet": write_parquet, ".npz": write_npz, ".csv": write_csv}


def files_of(path: Path) -> list[Path]:
    """Return the files that a command writes for a split: the one given, and for a CSV those beside it."""
    beside = ("failed.csv", "manifest.json") if path.suffix == ".csv" else ()
    return [path, *(path.with_name(f"{path.stem}.{name}") for name in beside)]


def _tables(parts: Iterable[Path]) -> Iterator[pa.Table]:
    for part in parts:
        yield from read_tables(part)


def read_tables(path: Path) -> Iterator[pa.Table]:
    """Read a Parquet file of features row group by row group.

    Raises:
        ValueError: a damaged file; names it.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path) from error


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Return features as an array (images, hidden) or (images, patches, hidden)."""
    values, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def to_labels(labels: list) -> np.ndarray:
    """Return labels as an array (images,), of objects where some are None or lists."""
    if not any(isinstance(label, list) for label in labels):
        return np.array(labels)
    array = np.empty(len(labels), dtype=object)
    for number, label in enumerate(labels):
        array[number] = label
    return array


def read_manifest(path: Path) -> dict | None:
    """Return the manifest of a file of features, None if there is no file.

    Raises:
        ValueError: a file that is damaged or is not one of features.
    """
    if not os.path.lexists(path):
        return None
    try:
        check_files(path)
        manifest = json.loads(_read_text(path))
        if missing := [name for name in MANIFEST if name not in manifest]:
            raise ValueError(f"the manifest lacks {missing[0]}")
        if path.suffix == ".parquet" and pq.read_metadata(path).num_rows != manifest["num_images"]:
            raise ValueError(f"the manifest counts {manifest['num_images']} images")
        return manifest
    except _ERRORS as error:
        raise _damaged(path) from error


def _read_text(path: Path) -> str | bytes:
    if path.suffix == ".parquet":
        return (pq.read_schema(path).metadata or {})[KEY.encode()]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[KEY].item()
    return files_of(path)[-1].read_text()


def is_from_features(path: Path) -> bool:
    """Return whether the existing files of a split are from a command that keeps features.

    Raises:
        ValueError: a Parquet file that is cut off, whose origin cannot be read; names it.
    """
    if not path.is_file() and path.suffix != ".csv":
        return False
    try:
        if path.suffix == ".parquet":
            with path.open("rb") as file:
                is_parquet = file.read(4) == b"PAR1"
            return is_parquet and KEY.encode() in (pq.read_schema(path).metadata or {})
        return read_manifest(files_of(path)[-1]) is not None
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path) from error
    except ValueError:
        return False


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged, or is not a file of features. Delete it and run the command that made it again, or "
        "choose another --features."
    )
