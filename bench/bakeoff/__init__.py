"""Objectives, refresh policies and signals compared on shared first caches: `python -m bench.bakeoff`."""
