"""Keeps people's wearable data fresh in the background, and readable for the rest of an application."""

__version__ = "0.1.0"
