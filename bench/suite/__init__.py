"""The benchmark suite: cases, providers, what times and checks them; `qempo-fast bench` runs it.

A script of bench/ puts bench/ on sys.path, so that it and others import `from suite import heads`. Never the root: its
kernels/ would hide the package of that name that transformers probes for.
"""
