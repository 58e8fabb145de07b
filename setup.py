"""Lets tools that still look for ``setup.py`` install the project; everything is declared in ``pyproject.toml``."""

from setuptools import setup

setup()
