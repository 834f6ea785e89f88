"""Triton kernels, one file per op: kernels, their launchers, and COMPILE for the offline compiler.

Importing one of these modules imports Triton; importing this package does not.
"""
