from pathlib import Path

from setuptools import setup


TIMM = ["timm>=1.0"]
ONNX = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]
TENSORBOARD = ["tensorboard>=2.15"]
VIDEO = ["av>=14"]
UMAP = ["umap-learn>=0.5.7"]
SCIENTIFIC = ["tifffile>=2024.1", "imagecodecs>=2024.1"]
HEIF = ["pillow-heif>=0.16"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "polars>=1.20", "parameterized>=0.9", "peft>=0.19"]
TEST += ["nbclient>=0.10", "ipykernel>=6.29"]
TEST += [*TIMM, *ONNX, *TENSORBOARD, *VIDEO, *UMAP, *SCIENTIFIC, *HEIF]


setup(
    name="dino-hf",
    version="0.1.0",
    description="DINO (self-distillation with no labels) for transformers, accelerate, datasets and the Hub",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["modeling_dino", "training", "evaluation", "evaluation.metrics", "configs"],
    package_data={
        "configs": ["*.yaml", "eval/*.yaml", "models/*.json", "accelerate/*.yaml", "slurm/*.sbatch"],
        "evaluation.metrics": ["*/*.py", "*/README.md"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "accelerate>=1.15",
        "datasets>=5.2",
        "huggingface_hub>=1.5",
        "filelock>=3.24",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "evaluate>=0.4.6",
        "numpy>=1.26",
        "pandas>=2.2",
        "pyarrow>=24",
        "matplotlib>=3.8",
        "pillow>=10.1",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "timm": TIMM,
        "onnx": ONNX,
        "tensorboard": TENSORBOARD,
        "video": VIDEO,
        "umap": UMAP,
        "scientific": SCIENTIFIC,
        "heif": HEIF,
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.4"],
        "test": TEST,
        "benchmarks": ["lightly>=1.5"],
        "dev": [*TEST, "ruff>=0.12", "pre-commit>=4"],
    },
    entry_points={
        "console_scripts": [
            "dino-train = training.__main__:main",
            "dino-eval = evaluation.__main__:main",
            "dino-check = training.check:main",
            "dino-publish = training.publish:main",
            "dino-convert = modeling_dino.convert_dino_checkpoint:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
