"""Seeded inputs of five kinds, mostly broken, and what the doors of the package make of them."""
