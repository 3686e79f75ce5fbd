"""Loaders and sharders that ours are measured beside; tools/bench/alone.py runs each in a process of its own.

A generator yields the sizes of a loader's batches without end, other functions do one piece of work and return images
and seconds. FFCV's module imports nothing of the project: its environment has none of its packages.
"""
