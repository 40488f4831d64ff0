"""Tessera: one text corpus to one promoted adapter on rented GPUs, and what every dollar bought.

Importing this package loads neither torch, nor mlflow, nor sky: each room imports what it needs.
"""

__version__ = "0.1.0"
