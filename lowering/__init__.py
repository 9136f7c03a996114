"""Targets: one file each, from a rewritten ATen graph to something that runs."""

if __name__ != "cpcompile.lowering":
    raise ImportError(f"{__name__} is not a package of its own: import cpcompile.lowering")
