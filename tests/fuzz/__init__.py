"""Random calls of the public interface, good and bad, each judged against the reference: `make fuzz`.

A call is a line of text (spec.py): function, seed of its plain arguments, what is done to them, and the mode that it
runs in. Workers that die or hang are reported with the line that they were at, which `python -m fuzz LINE` repeats.
"""
