"""The steps of tools/gpu_proof.py.

A step is a function of a Proof that returns its result as JSON values and raises ExpressError if something that it
checks is wrong. Steps import libraries when they need them, so that a missing package costs no other step.
"""
