"""Loaders and sharders that ours are measured beside; tools/bench/alone.py runs each in a process of its own.

`batches` yields the sizes of a loader's batches without end, `measure` does one piece of work and returns images and
seconds. FFCV's modules import nothing of the project: their environment has none of its packages.
"""
