"""Loaders and sharders that ours are measured beside; tools/bench/alone.py runs each in a process of its own.

A loader yields the sizes of its batches without end; a sharder yields when it can begin, and the number of its images
when it is done.
FFCV's module imports nothing of the project: its environment has none of its packages.
"""
