"""Immucore, the early-boot agent of image-based Linux.

Importing a module of it must not import the program.
"""

__version__ = "0.1.0"
