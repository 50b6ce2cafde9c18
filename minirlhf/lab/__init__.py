"""Instruments: each file runs by itself with `python -m minirlhf.lab.NAME`, and can be deleted alone."""
