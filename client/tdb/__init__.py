"""Transformer Debugger: the torch-free client and the generated stubs (`tdb.inference.v1`)."""

from importlib.metadata import version

__version__ = version("transformer-debugger")
