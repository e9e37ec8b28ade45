"""The one place for fastpo's version; setup.py and CITATION.cff are checked against it."""

__version__ = "0.1.0"
