"""Hands the compiled part to CMake; everything declarative is in pyproject.toml."""

from setuptools import setup

setup(
    cmake_source_dir=".",
    # The Triton kernels live in the top-level folder kernels/. Without the "" entry an editable install would put the
    # extension beside setup.py.
    package_dir={"": "src", "shapleycam.kernels": "kernels"},
)
