"""Splat and Distill as a Nerfstudio plugin.

Kept free of imports on purpose: every ``ns-*`` command imports this package while it discovers plugins.
"""
