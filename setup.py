"""Packaging; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
version = next(
    line.split('"')[1]
    for line in (root / "mdistiller" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXPORT = ["safetensors", "onnx", "onnxscript", "onnxruntime"]

setup(
    name="mdistiller",
    version=version,
    description="Knowledge distillation for vision: methods, models, data, training",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mdistiller", "mdistiller.*"]), "mdistiller.configs"],
    package_dir={"mdistiller.configs": "configs"},
    package_data={"mdistiller": ["py.typed", "reports/tables/*.yaml"], "mdistiller.configs": ["**/*.yaml"]},
    install_requires=(root / "requirements.txt").read_text().split(),
    extras_require={
        "plots": ["matplotlib"],
        "models": ["timm", "safetensors"],
        "export": EXPORT,
        "detection": ["pycocotools"],
        "dev": [
            "matplotlib",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "timm",
            "pycocotools",
            *EXPORT,
        ],
    },
)
