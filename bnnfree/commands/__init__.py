"""The commands: `bnnfree NAME`, or `python tools/NAME.py` in a checkout. One file each, whose docstring is its help.

A command imports what it needs when it has read its arguments, so that help is quick and a prediction needs no torch.
"""
