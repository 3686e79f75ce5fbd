"""Benchmarks: each writes a table for people and JSON with hardware, versions and command."""
