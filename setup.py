"""Packaging of leakfree. Ranges live here; the exact versions of ``make`` are in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "leakfree" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="leakfree",
    version=VERSION,
    description="Measure, remove and compare the leakage of batch statistics in PyTorch models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["leakfree", "leakfree.*"]),
    package_data={"leakfree": ["py.typed"], "leakfree.report": ["*.html", "*.css"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "lightning>=2.5",
        "lightly>=1.5.20",
        "torchmetrics>=1.6",
        "faiss-cpu>=1.8",
        "faster-coco-eval>=1.6.5",
        "omegaconf>=2.3",
        "fvcore>=0.1.5.post20221221",
        "tensorboard>=2.14",
        "submitit>=1.5",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "pillow>=10",
        "numpy>=1.26",
        "pyyaml>=6",
    ],
    extras_require={
        "gpu": ["faiss-gpu-cu12"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.5",
            "hypothesis>=6.90",
            "timm>=1.0",
            "onnx>=1.17",
            "onnxscript>=0.2",
            "onnxruntime>=1.20",
            "ruff>=0.6",
            "mypy>=1.10",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["leakfree = leakfree.cli:main"]},
)
