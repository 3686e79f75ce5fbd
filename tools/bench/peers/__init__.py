"""Loaders that ours is measured beside; each runs in a process of its own and prints one JSON line."""
